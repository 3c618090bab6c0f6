"""Loggers: TensorBoard and Weights & Biases, beside the metrics file, if asked for."""

import argparse
import dataclasses
import math
import numbers
import pathlib
import secrets
import time
from typing import Any

from common.command import UserError


def make(options: argparse.Namespace, path: pathlib.Path) -> "Loggers":
  """What `--tensorboard` and `--wandb` ask for; nothing else is imported.

  The output directory `path` need not exist before `Loggers.begin`.
  """
  loggers: list[Any] = []
  if options.tensorboard:
    loggers.append(_TensorBoard(path / "tensorboard"))
  if options.wandb is not None:
    loggers.append(_Wandb(options.wandb, path.absolute()))
  return Loggers(*loggers)


class Loggers:
  """Any number of loggers, also none, that take one arm after the other."""

  def __init__(self, *loggers):
    self._loggers = loggers
    self._held: list[dict[str, Any]] = []

  def begin(self, part, arm, rows: list[dict[str, Any]]) -> None:
    """Goes on to an arm, from where the metrics file is.

    Whatever else than its lines was logged of this arm comes after its checkpoint, and
    will come again.
    """
    self.close()
    rows = [row for row in rows if (row["part"], row["arm"]) == (part.name, arm.name)]
    try:
      for logger in self._loggers:
        logger.begin(part, arm, rows)
    except OSError as error:
      raise UserError(
        f"{error.filename} cannot be written to: {error.strerror}."
      ) from error

  def log(self, row: dict[str, Any]) -> None:
    """Takes a line of the metrics file, of the present arm, and holds it back."""
    if self._loggers:
      self._held.append(row)

  def flush(self) -> None:
    """Brings out what was logged; belongs right before each checkpoint."""
    for logger in self._loggers:
      for row in self._held:
        logger.send(row)
      logger.flush()
    self._held.clear()

  def close(self) -> None:
    """Ends the present arm, if there is one; what was not flushed will come again."""
    self._held.clear()
    for logger in self._loggers:
      logger.close()


def _values(row):
  """What has a curve: the finite numbers."""
  return {
    name: float(value)
    for name, value in row.items()
    if name not in ("seed", "step")
    and isinstance(value, numbers.Real)
    and math.isfinite(value)
  }


class _TensorBoard:
  """One of TensorBoard's runs for each seed of each arm, all with the same tags."""

  def __init__(self, path):
    try:
      # Not the SummaryWriter, whose flush leaves out what is still in its queue.
      from tensorboardX.event_file_writer import EventsWriter
      from tensorboardX.proto import event_pb2, summary_pb2
    except ImportError as error:
      raise UserError(
        '--tensorboard needs tensorboardX: pip install "gaf_optax[tensorboard]".'
      ) from error
    self._events, self._summary, self._writer = event_pb2, summary_pb2, EventsWriter
    self._path, self._writers = path, []

  def begin(self, part, arm, rows):
    next_step = max((row["step"] for row in rows), default=0) + 1
    for seed in range(part.seeds):
      path = self._path / part.name / arm.name / f"seed-{seed}"
      path.mkdir(parents=True, exist_ok=True)
      # Without it, a second file in the same second would replace the first.
      number = len(list(path.iterdir()))
      self._writers.append(self._writer(str(path / "events"), f".{number}"))
      # TensorBoard then drops what earlier files hold of this step and later ones.
      start = self._events.SessionLog(status=self._events.SessionLog.START)
      self._write(seed, next_step, session_log=start)
      if not number:  # Asked for only now.
        for row in rows:
          if row["seed"] == seed:
            self.send(row)

  def send(self, row):
    value = self._summary.Summary.Value
    values = [value(tag=name, simple_value=x) for name, x in _values(row).items()]
    self._write(row["seed"], row["step"], summary=self._summary.Summary(value=values))

  def _write(self, seed, step, **what):
    event = self._events.Event(wall_time=time.time(), step=step, **what)
    self._writers[seed].write_event(event)

  def flush(self):
    for writer in self._writers:
      writer.flush()

  def close(self):
    while self._writers:
      self._writers.pop().close()


class _Wandb:
  """One of wandb's runs for each seed of each arm; a resumed command goes on with it.

  wandb takes back no step: it ignores one that comes again or, where `wandb sync` joins
  what was written offline, gives it another number.
  """

  def __init__(self, project, path):
    try:
      import wandb
    except ImportError as error:
      raise UserError("--wandb needs wandb: pip install wandb.") from error
    self._wandb, self._project, self._path = wandb, project, path
    self._runs = []

  def begin(self, part, arm, rows):
    # Tells this directory's runs from others, also when it has been moved.
    token = self._path / "wandb" / "token"
    token.parent.mkdir(parents=True, exist_ok=True)
    if not (token.exists() and token.read_text()):
      token.write_text(secrets.token_hex(4))
    setting = dataclasses.asdict(part)
    del setting["arms"]
    for seed in range(part.seeds):
      name = f"{token.read_text()}-{part.name}-{arm.name}-{seed}"
      begun = any((self._path / "wandb").glob(f"*-{name}"))
      try:
        run = self._wandb.init(
          project=self._project,
          dir=self._path,
          id=name,
          resume="allow",
          reinit="create_new",
          group=f"{self._path.name}/{part.name}",
          job_type=arm.name,
          name=f"{part.name}/{arm.name}/seed-{seed}",
          config={"part": setting, "arm": dataclasses.asdict(arm), "seed": seed},
          settings=self._wandb.Settings(console="off", quiet=True),
        )
      except self._wandb.Error as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"wandb cannot start: {reason}.") from error
      self._runs.append(run)
      # A kill loses what was not sent yet. Offline nobody can tell what that was.
      if not (run.offline and begun):
        for row in rows:
          if row["seed"] == seed and row["step"] >= run.starting_step:
            self.send(row)

  def send(self, row):
    self._runs[row["seed"]].log(_values(row), step=row["step"], commit=True)

  def flush(self):
    pass

  def close(self):
    while self._runs:
      self._runs.pop().finish()
