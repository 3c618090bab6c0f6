"""Devices: on which devices of which processes a run computes, and how they agree."""

import argparse
import contextlib
import hashlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from common.command import UserError

# The mesh axis that the microbatches of a step lie along.
AXIS = "data"
# The exit code of a process that lost the others.
LOST = 3
# After so long without a sign of life a process counts as dead.
_HEARTBEAT_SECONDS = 30
# How long the first waits for the others, and they for it.
_JOINING_SECONDS = 300


class Team:
  """The processes of a run; what they do together they all do, in the same order."""

  def __init__(
    self, mesh: jax.sharding.Mesh | None = None, processes: int = 1, index: int = 0
  ):
    self.mesh = mesh  # Of all devices, along `AXIS`; None for a run on one device.
    self.processes = processes
    self.first = index == 0  # Reads and writes the files, and prints.

  def any(self, flag: bool) -> bool:
    """Whether it is true in any of the processes."""
    if self.processes == 1:
      return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))

  def together(self, make: Callable[[], Any]) -> Any:
    """This process's `make()`; a `UserError` of one ends all."""
    result = error = None
    try:
      result = make()
    except UserError as raised:
      error = raised
    if self.any(error is not None):
      raise error or UserError("another process cannot go on; its message says why.")
    return result

  def from_first(self, make: Callable[[], Any], like: Any) -> Any:
    """The first process's `make()`, a tree of arrays like those of `like`."""
    result = self.together(make if self.first else lambda: like)
    if self.processes == 1:
      return result
    return multihost_utils.broadcast_one_to_all(result)

  def check_same(self, what: Any) -> None:
    """Raises a `UserError` in all processes if one has another `repr(what)`."""
    own = np.frombuffer(hashlib.sha256(repr(what).encode()).digest(), np.uint8)
    first = self.from_first(lambda: own, own)
    if self.any(not np.array_equal(own, first)):
      raise UserError(
        "the processes were started with different options or data; only --out,"
        " --data-dir and the like may differ."
      )


def join(options: argparse.Namespace) -> Team:
  """The team of a run, when all of its processes are there.

  On a CPU, JAX is asked for as many devices as are wanted, for which it must not
  have computed anything before.
  """
  if options.devices is None:
    return Team()
  processes = options.processes or 1
  each = options.devices // processes
  flags = os.environ.get("XLA_FLAGS", "")
  if jax.config.jax_num_cpu_devices < each and "device_count" not in flags:
    # It refuses where devices are there already; whether they are enough is seen.
    with contextlib.suppress(RuntimeError):
      jax.config.update("jax_num_cpu_devices", each)
  if processes > 1:
    _connect(options)
  found = jax.devices()
  of_process = [
    [d for d in found if d.process_index == process] for process in range(processes)
  ]
  if len({len(own) for own in of_process}) > 1:
    numbers = ", ".join(str(len(own)) for own in of_process)
    raise UserError(
      f"the processes have {numbers} devices, but all need equally many; were they"
      " started with the same --devices?"
    )
  chosen = [device for own in of_process for device in own[:each]]
  if len(chosen) < options.devices:
    kind = jax.default_backend()
    needed = f"{options.devices} devices"
    if processes > 1:
      needed += f", {each} in each of {processes} processes"
    hint = "" if kind == "cpu" else "; with JAX_PLATFORMS=cpu there are virtual ones"
    raise UserError(
      f"--devices {options.devices} needs {needed}, but JAX finds {len(found)}"
      f" ({kind}){hint}."
    )
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.sharding.Mesh(np.array(chosen), (AXIS,), axis_types=auto)
  return Team(mesh, processes, jax.process_index())


def _connect(options):
  host, _, port = options.coordinator.rpartition(":")
  # A coordinator on the loopback is for this machine alone.
  local = host.startswith("127.")
  try:
    # Where one of these fails, JAX would end in a crash or a page of its log.
    if options.process_id == 0:
      socket.create_server((host if local else "", int(port))).close()
    else:
      _wait_for(host.strip("[]"), int(port))
    # Gloo reports on the standard output, which is for the results.
    sys.stdout.flush()
    sys.stdout = open(os.dup(1), "w", buffering=1, encoding=sys.stdout.encoding)
    os.dup2(2, 1)
    # JAX would take SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
      options.coordinator,
      options.processes,
      options.process_id,
      cluster_detection_method="deactivate",
      coordinator_bind_address=options.coordinator if local else None,
      initialization_timeout=_JOINING_SECONDS,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )
  except (OSError, RuntimeError) as error:
    raise UserError(
      f"process {options.process_id} of {options.processes} does not find the others"
      f" over --coordinator {options.coordinator}: {_first_line(error)}."
    ) from error


def _wait_for(host, port):
  deadline = time.monotonic() + _JOINING_SECONDS
  while True:
    try:
      return socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
      if isinstance(error, socket.gaierror) or time.monotonic() > deadline:
        raise
    time.sleep(0.2)


@contextlib.contextmanager
def leaving_at_once(options: argparse.Namespace):
  """In a run of several processes an error ends this one before it waits for others.

  JAX waits for the other processes when a process ends. After an error they may be
  waiting for this one in turn, or be gone.
  """
  try:
    yield
  except (Exception, KeyboardInterrupt) as error:
    if options.process_id is None or isinstance(error, UserError):
      raise
    if isinstance(error, KeyboardInterrupt):
      code = 130
      print("train.py: stopped at once; --resume goes on.", file=sys.stderr)
    elif isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
      code = LOST
      print(
        "train.py: the exchange with the other processes failed, most likely since"
        f" one has ended ({_first_line(error)}); the same command with --resume goes"
        " on from the last checkpoint.",
        file=sys.stderr,
      )
    else:
      code = 1
      traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _first_line(error):
  return (str(error).splitlines() or [type(error).__name__])[0]
