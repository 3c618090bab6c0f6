"""Launch: a run's processes on this machine, started together and ended together."""

import argparse
import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import devices

_LAUNCHED = "GAF_EXAMPLE_LAUNCHED"
# A process ends so because of another one, which has this long to end too.
_FOLLOWS = (2, devices.LOST, -signal.SIGABRT)
_GRACE_SECONDS = 5
# How much is shown of what a process wrote that is not the first.
_LAST_LINES = 20


def launch(argv: list[str], options: argparse.Namespace, received: list[int]) -> int:
  """Starts the processes, waits until they have ended, and ends them if one dies.

  The first one prints; what another one wrote is shown if it fails.

  Args:
    argv: the command line without the program.
    options: what was read from it.
    received: signals that have come; they go to the first process, which tells
      the others.

  Returns:
    The exit code: that of the processes, or 1 if one died.
  """
  address = f"127.0.0.1:{_free_port()}"
  with contextlib.ExitStack() as files:
    logs = [
      files.enter_context(tempfile.TemporaryFile()) for _ in range(options.processes)
    ]
    with contextlib.ExitStack() as started:
      children = []
      for process, log in enumerate(logs):
        children.append(_start(argv, options, address, process, log))
        started.callback(_end, children[process])
      codes = _wait(children, received)
    return _result(codes, logs, received)


def watch() -> None:
  """In a process that `launch` started: ends it when the launcher is gone."""
  if _LAUNCHED not in os.environ:
    return

  def wait():
    os.read(sys.stdin.fileno(), 1)
    os._exit(devices.LOST)

  threading.Thread(target=wait, daemon=True).start()


def _start(argv, options, address, process, log):
  each = options.devices // options.processes
  own = range(process * each, (process + 1) * each)
  return subprocess.Popen(
    [
      sys.executable,
      str(pathlib.Path(__file__).with_name("train.py")),
      *argv,
      f"--coordinator={address}",
      f"--process-id={process}",
    ],
    # The ids are for GPUs, of which each process takes its own.
    env={
      **os.environ,
      _LAUNCHED: "1",
      "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, own)),
    },
    stdin=subprocess.PIPE,  # For `watch`.
    stdout=log if process else None,
    stderr=log if process else None,
    start_new_session=True,  # Ctrl-C comes from the launcher alone.
  )


def _free_port():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def _wait(children, received):
  """The exit codes when all have ended or one died; None for one that still runs."""
  passed_on, deadline = 0, None
  while True:
    for number in received[passed_on:]:
      children[0].send_signal(number)
      passed_on += 1
    codes = [child.poll() for child in children]
    if None not in codes or _dead(codes) is not None:
      return codes
    if deadline is None and any(code in _FOLLOWS for code in codes):
      deadline = time.monotonic() + _GRACE_SECONDS
    if deadline is not None and time.monotonic() > deadline:
      return codes
    time.sleep(0.05)


def _dead(codes):
  """The number of a process that ended neither in order nor because of another."""
  dead = [
    process
    for process, code in enumerate(codes)
    if code is not None and not _in_order(code) and code not in _FOLLOWS
  ]
  # Rather one that a signal ended than one that failed, which may follow from it.
  return min(dead, key=lambda process: codes[process] > 0, default=None)


def _in_order(code):
  return code in (0, 128 + signal.SIGINT, 128 + signal.SIGTERM)


def _end(child):
  child.kill()
  child.wait()
  child.stdin.close()


def _result(codes, logs, received):
  culprit = _dead(codes)
  if culprit is None:
    if not {*codes} & {*_FOLLOWS}:
      return codes[0]
    # One that still runs is one that the others gave up.
    blamed = (2, None, -signal.SIGABRT, devices.LOST)
    culprit = codes.index(next(code for code in blamed if code in codes))
  code = codes[culprit]
  logs[culprit].seek(0)
  written = logs[culprit].read().decode(errors="replace").splitlines()
  print(*written[-_LAST_LINES:], sep="\n", end="\n" * bool(written), file=sys.stderr)
  if code == 2:
    return 2
  if received:
    print("train.py: stopped at once; --resume goes on.", file=sys.stderr)
    return 128 + received[0]
  if code is None:
    how = "no longer answered"
  else:
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else "failed"
  print(
    f"train.py: process {culprit} of {len(codes)} {how}, and the others were ended;"
    " the same command with --resume goes on from the last checkpoint.",
    file=sys.stderr,
  )
  return 1
