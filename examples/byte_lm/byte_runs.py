"""Runs: takes every arm of every seed to its last step, from where a file left it."""

import dataclasses
import json
import os
import pathlib
import threading
import zipfile
from concurrent import futures

import jax
import numpy as np
import tqdm

from byte_arms import Arm, arms, random_choice
from byte_errors import UserError
from byte_text import PARTS, Text
from byte_training import Learner, Trainer

EVALUATIONS = 20
_CONFIG = "config.json"


class Stopped(Exception):
  """The run was asked to stop; what it did up to here is in its files."""


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is run.

  Attributes:
    steps: a multiple of `EVALUATIONS`.
    seeds: how many.
    num_microbatches: k, in each step.
    microbatch_size: windows of text in each.
    tau: thresholds of the GAF arms, below 2.
    parts: keys of `byte_text.PARTS`.
  """

  steps: int
  seeds: int
  num_microbatches: int
  microbatch_size: int
  tau: list[float]
  parts: list[str]

  def arms(self) -> dict[str, list[Arm]]:
    """The arms by part."""
    return {part: arms(part, self.tau) for part in PARTS if part in self.parts}


# Of each run: loss, distances, accepted and wrong `[steps, k]`, validation
# `[EVALUATIONS]`; NaN, False and zeros after the last step taken.
Records = dict[tuple[str, str, int], dict[str, np.ndarray]]


def open_directory(path: pathlib.Path, plan: Plan, digest: str, resume: bool) -> None:
  """Makes the output directory, or checks that the run in it is the same one.

  Raises:
    UserError: if it is not, or without `resume` if there is anything in it.
  """
  config = path / _CONFIG
  ours = {**dataclasses.asdict(plan), "text": digest}
  path.mkdir(parents=True, exist_ok=True)
  if not resume:
    if any(path.iterdir()):
      raise UserError(
        f"{path} already holds something; give another --out, or --resume to go on"
        " with the run in it."
      )
    write_whole(config, json.dumps(ours, indent=2).encode() + b"\n")
  try:
    theirs = dict(json.loads(config.read_bytes()))
  except (FileNotFoundError, ValueError, TypeError) as error:
    raise UserError(f"{path} does not hold a run that can be resumed.") from error
  for name in ours.keys() | theirs.keys():
    if ours.get(name) != theirs.get(name):
      what = "another text" if name == "text" else f"another --{name}"
      raise UserError(
        f"the run in {path} was begun with {what.replace('_', '-')}; resume with the"
        " same, or give another --out."
      )


def write_whole(path: pathlib.Path, content: bytes) -> None:
  """Writes a file such that a reader finds the old or the new one, both whole."""
  partial = path.with_name(f".{path.name}.partial")
  partial.write_bytes(content)
  os.replace(partial, path)


def run_all(
  path: pathlib.Path, plan: Plan, text: Text, stop: threading.Event
) -> Records:
  """Runs what is not complete, reads the rest.

  Args:
    path: of the output directory.
    plan: what is run.
    text: what it is trained on.
    stop: when set, ends it after the next evaluation.

  Returns:
    The records by part, arm and seed.

  Raises:
    Stopped: where `stop` was set.
    UserError: if a file cannot be read.
  """
  trainer = Trainer(text, plan.steps, plan.num_microbatches)
  wanted = {
    (arm.part or part, arm.name, seed): arm
    for part, found in plan.arms().items()
    for arm in found
    for seed in range(plan.seeds)
  }
  running: dict[tuple, futures.Future] = {}
  # Several runs at a time, since one's matrices are too small to fill all cores. They
  # are taken up in this order, so what a control waits for is done or under way.
  with (
    tqdm.tqdm(total=plan.steps * len(wanted), unit="step", mininterval=0.5) as bar,
    futures.ThreadPoolExecutor(os.cpu_count()) as pool,
  ):
    moving = threading.Lock()

    def progress(steps):
      with moving:
        bar.update(steps)

    for (part, name, seed), arm in wanted.items():
      imitated = arm.imitates and running[part, arm.imitates.name, seed]
      file = path / "runs" / f"{part}_{name}_{seed}.npz"
      running[part, name, seed] = pool.submit(
        _run, file, plan, text, trainer, part, arm, seed, imitated, progress, stop
      )
    try:
      return {key: one.result() for key, one in running.items()}
    except BaseException:
      stop.set()
      pool.shutdown(wait=False, cancel_futures=True)
      raise


def _run(file, plan, text, trainer, part, arm, seed, imitated, progress, stop):
  """One arm of one seed, from its file or from the start; its record."""
  file.parent.mkdir(exist_ok=True)
  shape = plan.steps, plan.num_microbatches
  learner = None
  if file.exists():
    learner, done, record = _load(file, trainer)
  else:
    done = 0
    record = {
      "loss": np.full(shape, np.nan, np.float32),
      "distances": np.full(shape, np.nan, np.float32),
      "accepted": np.zeros(shape, bool),
      "wrong": np.zeros(shape, bool),
      "validation": np.full(EVALUATIONS, np.nan),
    }
  progress(done)
  if done == plan.steps:
    return record
  learner = learner or trainer.init(seed)
  kept = None
  if imitated is not None:
    kept = random_choice(imitated.result()["accepted"], seed)
  stretch = plan.steps // EVALUATIONS
  while done < plan.steps:
    if stop.is_set():
      raise Stopped
    steps = slice(done, done + stretch)
    batches = text.batches(
      part,
      seed,
      range(steps.start, steps.stop),
      plan.num_microbatches,
      plan.microbatch_size,
    )
    learner, happened = trainer.advance(
      arm, learner, batches, None if kept is None else kept[steps]
    )
    for name, values in {**happened, "wrong": batches.wrong}.items():
      record[name][steps] = values
    record["validation"][done // stretch] = trainer.validate(learner)
    done = steps.stop
    _save(file, None if done == plan.steps else learner, done, record)
    progress(stretch)
  return record


def _save(file, learner, done, record):
  """Writes a record, and what training needs to go on if it does."""
  leaves = {f"leaf_{i}": x for i, x in enumerate(jax.tree.leaves(learner))}
  partial = file.with_name(f".{file.name}.partial")
  with open(partial, "wb") as stream:
    np.savez(stream, done=done, **record, **leaves)
  os.replace(partial, file)


def _load(file, trainer) -> tuple[Learner | None, int, dict[str, np.ndarray]]:
  """What `_save` wrote."""
  try:
    # Opened here, since NumPy leaves a damaged file open.
    with open(file, "rb") as stream:
      arrays = dict(np.load(stream))
    done = int(arrays.pop("done"))
    leaves = [arrays.pop(f"leaf_{i}") for i in range(len(arrays) - 5)]
  except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
    raise UserError(
      f"{file} cannot be read: it was damaged; remove it, and --resume makes it anew."
    ) from error
  learner = None
  if leaves:
    learner = jax.tree.unflatten(jax.tree.structure(trainer.init(0)), leaves)
  return learner, done, arrays
