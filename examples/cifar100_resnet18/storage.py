"""Storage: the output directory, so that a run killed at any time can go on."""

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from errors import UserError
from loggers import Loggers
from plan import Arm, Part

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
  number = lambda path: int(path.name.rpartition("-")[2])
  numbered = [
    path
    for path in pathlib.Path("runs").glob(f"{name}-*")
    if path.name.rpartition("-")[2].isdecimal()
  ]
  newest = max(numbered, key=number, default=None)
  if resume:
    if newest is None:
      raise UserError(f"there is no runs/{name}-NUMBER to resume.")
    return newest
  return pathlib.Path("runs") / f"{name}-{number(newest) + 1 if newest else 1}"


class RunDirectory:
  """An output directory with its metrics file and checkpoints.

  Attributes:
    path: where it is.
  """

  def __init__(
    self,
    path: pathlib.Path,
    options: dict,
    resume: bool,
    log: Loggers | None = None,
  ):
    """Takes an empty or new directory, or with `resume` that of the same options.

    Args:
      path: where it is or shall be.
      options: what must be the same when a run is resumed, by flag.
      resume: whether to go on with what is there.
      log: gets the lines of the metrics file too.

    Raises:
      UserError: if what is there does not allow it.
    """
    self.path = path
    self._log = log or Loggers()
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
    config = self.path / _CONFIG
    try:
      before = json.loads(config.read_text(encoding="utf-8"))
      if not isinstance(before, dict):
        raise ValueError("not a dict")
    except (FileNotFoundError, ValueError) as error:
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

  def cut_metrics(self, size: int) -> None:
    """Takes off what was written after the checkpoint that says `size` bytes."""
    if self.metrics_size() < size:
      raise UserError(
        f"{self.path / METRICS} is shorter than the checkpoint says; it was changed"
        " after it was written, and the run cannot go on."
      )
    self._metrics.truncate(size)

  def begin(self, part: Part, arm: Arm, metrics_size: int) -> None:
    """Goes on to an arm, from the checkpoint that says `metrics_size` bytes."""
    self.cut_metrics(metrics_size)
    self._log.begin(part, arm, self.metrics())

  def metrics(self) -> list[dict[str, Any]]:
    """All lines of the metrics file."""
    self._metrics.flush()
    lines = (self.path / METRICS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]

  def checkpoints(self, part: str, arm: str) -> "Checkpoints":
    """The checkpoints of one arm."""
    return Checkpoints(self.path / "checkpoints" / part / arm)

  def close(self) -> None:
    self._metrics.close()
    self._log.close()


class Nowhere:
  """The directory of a process that leaves reading and writing to another one."""

  def append_metrics(self, row: dict[str, Any]) -> None:
    pass

  def metrics_size(self) -> int:
    return 0

  def begin(self, part: Part, arm: Arm, metrics_size: int) -> None:
    pass

  def checkpoints(self, part: str, arm: str) -> "Nowhere":
    return self

  def save(self, step: int, learners, trace, metrics_size: int) -> None:
    pass

  def close(self) -> None:
    pass


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

  def latest_step(self) -> int | None:
    """The step after which the newest checkpoint was made, None without one."""
    return self._manager.latest_step()

  def save(self, step: int, learners, trace, metrics_size: int) -> None:
    """Saves what the arm needs to go on from `step`.

    Args:
      step: steps taken.
      learners: a list of `Learner`, one for each seed.
      trace: the `Trace` of all seeds.
      metrics_size: of the metrics file at this moment, in bytes.
    """
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
    self._manager.wait_until_finished()

  def learners(self, like):
    """The learners of the newest checkpoint, shaped like `like`."""
    return self._restore(
      "learners", ocp.args.StandardRestore(jax.tree.map(np.asarray, like))
    )

  def trace(self, like):
    """The trace of the newest checkpoint, shaped like `like`."""
    fields = self._restore("trace", ocp.args.StandardRestore(like._asdict()))
    return type(like)(**fields)

  def metrics_size(self) -> int:
    """The size of the metrics file at the newest checkpoint."""
    return self._restore("progress", ocp.args.JsonRestore())["metrics_size"]

  def close(self) -> None:
    self._manager.close()

  def _restore(self, item, arguments):
    try:
      restored = self._manager.restore(
        self.latest_step(), args=ocp.args.Composite(**{item: arguments})
      )
    # Orbax and TensorStore raise many kinds for a checkpoint that was tampered with.
    except Exception as error:
      raise UserError(
        f"the checkpoint in {self._manager.directory} cannot be read; remove the"
        f" run or choose another --out ({type(error).__name__})."
      ) from error
    return restored[item]
