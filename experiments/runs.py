"""Trains every arm of every part, and saves each arm when it is complete."""

import argparse
import dataclasses
import io
import json
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np
import tqdm

from arms import Arm, Part, chosen_by
from shared import UserError


class Trainer:
  """Compiled training; a subclass defines a step.

  It has `init(arm, seed)`, which returns a learner; `advance(arm, learner, batches,
  chosen)`, which returns the next learner and a trace of the steps; and `evaluate(arm,
  learner, schedule)`, which returns a learner and numbers by name.
  """

  def __init__(self):
    self._compiled: dict[Any, Any] = {}
    self._compiling = threading.Lock()

  def cached(self, key: Any, function: Callable, *args, **options) -> Any:
    """The result of `jax.jit(function, **options)`, compiled once per `key`."""
    # By hand, since threads that call a new `jit` function each compile it.
    with self._compiling:
      if key not in self._compiled:
        jitted = jax.jit(function, **options)
        self._compiled[key] = jitted.lower(*args).compile()
    return self._compiled[key](*args)


@dataclasses.dataclass
class Experiment:
  """One part, with each seed's schedule and results.

  Attributes:
    part: the setting.
    schedules: by seed; they have `batches(start, stop, clean)`, `wrong`, bool
      `[steps, k]`, and `control_key`, which seeds the controls' choices.
    make_trainer: returns the trainer, which is dropped when the part is complete.
    traces: by arm and name of a field, arrays `[seeds, steps, ...]`.
    curves: by arm and name of a measurement, arrays `[seeds, evaluations]`.
  """

  part: Part
  schedules: Sequence[Any]
  make_trainer: Callable[[], Trainer]
  traces: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
  curves: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)

  @property
  def steps(self) -> np.ndarray:
    """The steps after which arms are evaluated."""
    part = self.part
    return np.arange(part.eval_every, part.steps + 1, part.eval_every)

  def run(self, directory: pathlib.Path, progress: tqdm.tqdm) -> None:
    """Reads the complete arms from the directory, and trains and writes the others."""
    part, trainer = self.part, None
    for arm in part.arms:
      progress.set_description(f"{part.name}: {arm.name}")
      path = directory / part.name / f"{arm.name}.npz"
      if path.exists():
        progress.update(part.steps)
      else:
        trainer = trainer or self.make_trainer()
        found = self._train(trainer, arm, progress)
        stream = io.BytesIO()
        np.savez(stream, **found)
        write_whole(path, stream.getvalue())
      with np.load(path) as stored:
        found = dict(stored)
      of = lambda kind: {
        name.removeprefix(kind): x for name, x in found.items() if name.startswith(kind)
      }
      self.traces[arm.name], self.curves[arm.name] = of("trace/"), of("curve/")

  def _train(self, trainer, arm: Arm, progress) -> dict[str, np.ndarray]:
    """Traces and curves of all seeds, by name."""
    part = self.part

    def train(seed):
      schedule, learner = self.schedules[seed], trainer.init(arm, seed)
      imitated = self.traces.get(arm.imitates, {})
      of_seed = lambda name: imitated[name][seed] if imitated else None
      chosen = chosen_by(
        arm,
        *map(of_seed, ("accepted", "weights")),
        schedule.wrong,
        schedule.control_key,
      )
      traces, rows = [], []
      for stop in self.steps:
        start = stop - part.eval_every
        batches = schedule.batches(start, stop, arm.clean)
        kept = jax.tree.map(lambda x: x[start:stop], chosen)
        learner, trace = trainer.advance(arm, learner, batches, kept)
        traces.append(jax.tree.map(np.asarray, trace))
        learner, row = trainer.evaluate(arm, learner, schedule)
        rows.append(row)
        progress.update(part.eval_every / part.seeds)
      trace = jax.tree.map(lambda *x: np.concatenate(x), *traces)
      return {f"trace/{k}": x for k, x in trace._asdict().items() if x is not None} | {
        f"curve/{name}": np.array([row[name] for row in rows]) for name in rows[0]
      }

    # Threads, since the small matrices of one seed do not occupy all cores.
    workers = min(part.seeds, os.cpu_count() or 1)
    with futures.ThreadPoolExecutor(workers) as pool:
      found = list(pool.map(train, range(part.seeds)))
    return {name: np.stack([one[name] for one in found]) for name in found[0]}


def run_all(
  directory: pathlib.Path,
  experiments: Sequence[Experiment],
  settings: dict,
  resume: bool,
) -> None:
  """Trains the arms that are not complete yet.

  Args:
    directory: for an `.npz` file per arm; new, empty, or left by the run to resume.
    experiments: the parts to run.
    settings: must be the same when a run is resumed; JSON.
    resume: whether to keep the arms that are complete.
  """
  config = directory / "config.json"
  held = directory.is_dir() and any(directory.iterdir())
  if held and not resume:
    raise UserError(f"{directory} is not empty; choose another --out, or --resume it.")
  if held:
    before = json.loads(config.read_bytes()) if config.exists() else {}
    if before != settings:
      raise UserError(f"{directory} was begun with {before}, not {settings}.")
  write_whole(config, json.dumps(settings).encode())
  total = sum(one.part.steps * len(one.part.arms) for one in experiments)
  with tqdm.tqdm(
    total=total, unit="step", unit_scale=True, mininterval=0.5
  ) as progress:
    for one in experiments:
      one.run(directory, progress)


def write_whole(path: pathlib.Path, content: bytes) -> None:
  """Writes a file such that a reader finds the old or the new one, both complete."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.partial")
  partial.write_bytes(content)
  os.replace(partial, path)


def parser(description: str, out: str, steps: str, seeds: str):
  """A command line with options for size and output."""
  made = argparse.ArgumentParser(description=description)
  made.add_argument("--steps", type=_count, help=f"of each run; default {steps}")
  made.add_argument("--seeds", type=_count, help=f"how many; default {seeds}")
  made.add_argument("--out", type=pathlib.Path, help=f"directory; default {out}")
  made.add_argument(
    "--resume", action="store_true", help="keep the arms in --out that are complete"
  )
  return made


def _count(text):
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
  return int(text)


def main(command: Callable[[], None]) -> None:
  """Runs a command; a `UserError` ends it with one sentence and exit code 2."""
  try:
    command()
  except UserError as error:
    print(f"{pathlib.Path(sys.argv[0]).name}: {error}", file=sys.stderr)
    sys.exit(2)
