"""Launch: a run's processes on this machine, started together and ended together."""

import argparse
import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from common import devices

_LAUNCHED = "GAF_EXAMPLE_LAUNCHED"
_IN_ORDER = (0, 128 + signal.SIGINT, 128 + signal.SIGTERM)
# Exit codes of processes that may have ended because of another one, None of one that
# still runs: the earlier in this list, the more likely it is the cause. Before them
# come other signals and other failures.
_FOLLOWS = (2, None, -signal.SIGABRT, devices.LOST, *_IN_ORDER)
# For how long the cause is waited for.
_GRACE_SECONDS = 5


def launch(
  script: str, argv: list[str], options: argparse.Namespace, received: list[int]
) -> int:
  """Starts the processes, waits until they have ended, and ends them if one dies.

  Signals that have come go to the first process, which tells the others. The exit code
  is that of the processes, or 1 if one died.
  """
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  command = [sys.executable, script, *argv, f"--coordinator={address}"]
  with contextlib.ExitStack() as stack:
    children = []
    for process in range(options.processes):
      children.append(_start(command, options, process))
      stack.callback(_end, children[process])
    return _result(_wait(children, received), received)


def watch() -> None:
  """In a process that `launch` started: ends it when the launcher is gone."""
  if _LAUNCHED not in os.environ:
    return

  def wait():
    os.read(sys.stdin.fileno(), 1)
    os._exit(devices.LOST)

  threading.Thread(target=wait, daemon=True).start()


def _start(command, options, process):
  each = options.devices // options.processes
  own = range(process * each, (process + 1) * each)
  return subprocess.Popen(
    [*command, f"--process-id={process}"],
    # The ids are for GPUs, of which each process takes its own.
    env=os.environ | {_LAUNCHED: "1", "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, own))},
    stdin=subprocess.PIPE,  # For `watch`.
    stdout=subprocess.DEVNULL if process else None,  # The first one prints.
    start_new_session=True,  # Ctrl-C comes from the launcher alone.
  )


def _wait(children, received):
  """The exit codes when all have ended or the cause of a failure is known."""
  passed_on, deadline = 0, math.inf
  while True:
    for number in received[passed_on:]:
      children[0].send_signal(number)
      passed_on += 1
    codes = [child.poll() for child in children]
    causes = [code for code in codes if code not in _FOLLOWS]
    if None not in codes or causes or time.monotonic() > deadline:
      return codes
    if any(code not in (None, *_IN_ORDER) for code in codes):
      deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    time.sleep(0.05)


def _end(child):
  child.kill()
  child.wait()
  child.stdin.close()


def _result(codes, received):
  def rank(code):
    return _FOLLOWS.index(code) if code in _FOLLOWS else -1 - (code < 0)

  code = min(codes, key=rank)
  if code in _IN_ORDER:
    return codes[0]
  if code == 2:  # They have said why.
    return 2
  if received:
    print("train.py: stopped at once; --resume goes on.", file=sys.stderr)
    return 128 + received[0]
  how = "no longer answered" if code is None else "failed"
  if code is not None and code < 0:
    how = f"was ended by {signal.Signals(-code).name}"
  print(
    f"train.py: process {codes.index(code)} of {len(codes)} {how}, and the others were"
    " ended; the same command with --resume goes on from the last checkpoint.",
    file=sys.stderr,
  )
  return 1
