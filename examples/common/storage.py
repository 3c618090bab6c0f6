"""Storage: the output directory, so that a run killed at any time can go on."""

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from common.command import UserError
from common.loggers import Loggers

_CONFIG = "config.json"
METRICS = "metrics.jsonl"


def write_whole(path: pathlib.Path, text: str) -> None:
  """Writes a file such that a reader finds the old or the new one, both whole."""
  partial = path.with_name(f".{path.name}.partial")
  partial.write_text(text, encoding="utf-8")
  os.replace(partial, path)


def choose_directory(out: str | None, name: str, resume: bool) -> pathlib.Path:
  """The output directory: `out`, or `runs/name-NUMBER`, a new or the newest one."""
  if out is not None:
    return pathlib.Path(out)
  ends = [
    path.name.rpartition("-")[2] for path in pathlib.Path("runs").glob(f"{name}-*")
  ]
  newest = max((int(end) for end in ends if end.isdecimal()), default=0)
  if resume and not newest:
    raise UserError(f"there is no runs/{name}-NUMBER to resume.")
  return pathlib.Path("runs") / f"{name}-{newest + (not resume)}"


class RunDirectory:
  """An output directory with its metrics file and checkpoints."""

  def __init__(
    self, path: pathlib.Path, options: dict, resume: bool, log: Loggers | None = None
  ):
    """Takes an empty or new directory, or with `resume` that of the same options.

    Args:
      path: where it is or shall be.
      options: what must be the same when a run is resumed, by flag.
      resume: whether to go on with what is there.
      log: gets the lines of the metrics file too.
    """
    self.path, self._log = path, log or Loggers()
    self._kept = 0  # What of the metrics file the last checkpoint knows of, in bytes.
    try:
      path.mkdir(parents=True, exist_ok=True)
      held = [p.name for p in path.iterdir() if not p.name.startswith(".")]
      if held and not resume:
        raise UserError(
          f"{path} already holds something; give another --out, or --resume to go"
          " on with the run in it."
        )
      if held:
        self._check_same(options)
      else:
        write_whole(path / _CONFIG, json.dumps(options, indent=2) + "\n")
      self._metrics = open(path / METRICS, "ab")
    except OSError as error:
      raise UserError(f"{path} cannot be written to: {error.strerror}.") from error

  def _check_same(self, options):
    try:
      before = dict(json.loads((self.path / _CONFIG).read_text(encoding="utf-8")))
      if not before:
        raise ValueError("no options")
    except (FileNotFoundError, ValueError, TypeError) as error:
      raise UserError(
        f"{self.path} does not hold a run that can be resumed: {_CONFIG} is missing"
        " or damaged."
      ) from error
    for flag in sorted(before.keys() | options.keys()):
      old, new = before.get(flag), options.get(flag)
      if old != new:
        raise UserError(
          f"{self.path} was begun with other options: {flag} was {_said(old)}, now"
          f" it is {_said(new)}; resume with the same ones, or choose another --out."
        )

  def append_metrics(self, row: dict[str, Any]) -> None:
    """Adds a line to the metrics file; NaN becomes null."""
    finite = {
      name: None if isinstance(value, float) and not np.isfinite(value) else value
      for name, value in row.items()
    }
    self._metrics.write((json.dumps(finite) + "\n").encode())
    self._metrics.flush()
    self._log.log(row)

  def metrics_size(self) -> int:
    """Size of the metrics file, in bytes, when all of it is on the disk."""
    self._log.flush()
    self._metrics.flush()
    os.fsync(self._metrics.fileno())
    return os.fstat(self._metrics.fileno()).st_size

  def begin(self, part, arm) -> None:
    """Goes on to an arm; what was written after the last checkpoint is taken off."""
    if self.metrics_size() < self._kept:
      raise UserError(
        f"{self.path / METRICS} is shorter than the checkpoint says; it was changed"
        " after it was written, and the run cannot go on."
      )
    self._metrics.truncate(self._kept)
    self._log.begin(part, arm, self.metrics())

  def metrics(self) -> list[dict[str, Any]]:
    """All lines of the metrics file."""
    self._metrics.flush()
    lines = (self.path / METRICS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]

  def checkpoints(self, part: str, arm: str) -> "Checkpoints":
    """The checkpoints of one arm; arms have to be asked for in their order."""
    found = Checkpoints(self.path / "checkpoints" / part / arm)
    if found.latest_step():
      self._kept = found.metrics_size()
    return found

  def save(self, checkpoints: "Checkpoints", step: int, learners, trace) -> None:
    """Makes a checkpoint that knows of all lines of the metrics file."""
    self._kept = self.metrics_size()
    checkpoints.save(step, learners, trace, self._kept)

  def close(self) -> None:
    self._metrics.close()
    self._log.close()


class Nowhere:
  """The directory of a process that leaves reading and writing to another one."""

  def checkpoints(self, *names):
    return self

  def __getattr__(self, name):
    return lambda *args: None


def _said(value):
  if value is None or value is False:
    return "not given"
  if value is True:
    return "given"
  return " ".join(map(str, value)) if isinstance(value, list) else str(value)


class Checkpoints:
  """The newest checkpoint of one arm; an older one goes when a newer is whole."""

  def __init__(self, path: pathlib.Path):
    path.mkdir(parents=True, exist_ok=True)
    self._manager = ocp.CheckpointManager(
      path.absolute(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=1,
        create=False,
        enable_async_checkpointing=False,
        cleanup_tmp_directories=True,
        # Of several processes the first is the only one here.
        multiprocessing_options=ocp.options.MultiprocessingOptions(
          primary_host=0, active_processes={0}, barrier_sync_key_prefix="first"
        ),
      ),
    )

  def latest_step(self) -> int:
    """The step after which the newest checkpoint was made, 0 without one."""
    return self._manager.latest_step() or 0

  def save(self, step: int, learners, trace, metrics_size: int) -> None:
    """Saves what the arm needs to go on from `step`; the trace is a NamedTuple."""
    # As NumPy arrays, which can be restored on any device.
    learners = jax.tree.map(np.asarray, learners)
    self._manager.save(
      step,
      args=ocp.args.Composite(
        learners=ocp.args.StandardSave(learners),
        trace=ocp.args.StandardSave(trace._asdict()),
        progress=ocp.args.JsonSave({"metrics_size": metrics_size}),
      ),
    )

  def learners(self, like):
    """The learners of the newest checkpoint, shaped like `like`."""
    like = jax.tree.map(np.asarray, like)
    return self._restore(learners=ocp.args.StandardRestore(like))

  def trace(self, like):
    """The trace of the newest checkpoint, shaped like `like`."""
    return type(like)(**self._restore(trace=ocp.args.StandardRestore(like._asdict())))

  def metrics_size(self) -> int:
    """The size of the metrics file at the newest checkpoint."""
    return self._restore(progress=ocp.args.JsonRestore())["metrics_size"]

  def close(self) -> None:
    self._manager.close()

  def _restore(self, **item):
    (name,) = item
    try:
      step = self.latest_step()
      return self._manager.restore(step, args=ocp.args.Composite(**item))[name]
    # Orbax and TensorStore raise many kinds for a checkpoint that was tampered with.
    except Exception as error:
      raise UserError(
        f"the checkpoint in {self._manager.directory} cannot be read; remove the"
        f" run or choose another --out ({type(error).__name__})."
      ) from error
