"""Experiment: takes every arm from its last checkpoint to its last step."""

import dataclasses
import os
import time
from collections.abc import Callable
from concurrent import futures

import jax
import numpy as np
import tqdm

import data
import devices
import labels
import models
import training
from batches import Chosen, Schedule, random_choice, random_steps
from errors import UserError
from plan import Arm, Part
from storage import Checkpoints, Nowhere, RunDirectory


class Stopped(Exception):
  """The run was asked to stop, and everything up to here is saved."""


class Experiment:
  """One part: its data, what each seed sees, and the arms' traces.

  Attributes:
    part: the setting.
    schedules: what each seed sees.
    traces: what happened, by name of the arm, filled by `run`.
  """

  def __init__(self, part: Part, dataset: data.Dataset, team: devices.Team):
    base = dataset.train_labels
    if part.noisy_labels:
      base = labels.from_file(
        part.noisy_labels, part.noisy_labels_key, base, dataset.num_classes
      )
    rows = part.train_images or len(base)
    if rows > len(base):
      raise UserError(
        f"{rows} training images are more than the {len(base)} there are."
      )
    if part.microbatch_size * part.num_microbatches > rows:
      raise UserError(
        f"{part.num_microbatches} microbatches of {part.microbatch_size} are more"
        f" than the {rows} training images."
      )
    base = base[:rows]
    dataset = dataclasses.replace(
      dataset, train_images=dataset.train_images[:rows], train_labels=base
    )
    self.part = part
    self.schedules = [Schedule(part, dataset, base, seed) for seed in range(part.seeds)]
    self.traces: dict[str, training.Trace] = {}
    self._team = team
    self._trainer = training.Trainer(part, dataset, team.mesh)

  def run(
    self,
    directory: RunDirectory | Nowhere,
    metrics_size: int,
    progress: tqdm.tqdm,
    checkpoint_seconds: float,
    stop: Callable[[], bool],
  ) -> int:
    """Runs the arms that are not complete and reads the traces of those that are.

    Args:
      directory: where metrics and checkpoints go.
      metrics_size: of the metrics file before this part, in bytes.
      progress: moves by one for each step of an arm.
      checkpoint_seconds: time between checkpoints.
      stop: whether to stop here; asked after each stretch of steps.

    Returns:
      The size of the metrics file after this part.

    Raises:
      Stopped: after saving, when `stop()` is true.
    """
    for arm in self.part.arms:
      progress.set_description(f"{self.part.name}: {arm.name}")
      checkpoints = directory.checkpoints(self.part.name, arm.name)
      try:
        start = self._team.from_first(
          lambda: np.int32(checkpoints.latest_step() or 0), np.int32(0)
        )
        if start != self.part.steps:
          self._run_arm(
            arm,
            int(start),
            directory,
            checkpoints,
            metrics_size,
            progress,
            checkpoint_seconds,
            stop,
          )
        else:
          trace = training.empty_trace(self.part)
          self.traces[arm.name] = self._team.from_first(
            lambda: checkpoints.trace(trace), trace
          )
          progress.update(self.part.steps)
        metrics_size = self._team.together(checkpoints.metrics_size)
      finally:
        checkpoints.close()
    return metrics_size

  def _run_arm(
    self,
    arm,
    start,
    directory,
    checkpoints: Checkpoints | Nowhere,
    metrics_size,
    progress,
    checkpoint_seconds,
    stop,
  ):
    part = self.part
    seeds = range(part.seeds)
    team, trainer = self._team, self._trainer
    learners = [trainer.init(arm, seed) for seed in seeds]
    trace = training.empty_trace(part)
    # The first weights too: another machine may round them otherwise.
    learners = team.from_first(
      lambda: checkpoints.learners(learners) if start else learners, learners
    )
    if start:
      trace = team.from_first(lambda: checkpoints.trace(trace), trace)
      trace = jax.tree.map(np.array, trace)
      metrics_size = team.together(checkpoints.metrics_size)
    learners = [trainer.placed(learner) for learner in learners]
    team.together(lambda: directory.begin(part, arm, metrics_size))
    progress.update(start)

    chosen = [self._chosen(arm, seed) for seed in seeds]

    def advance(seed, stop_step):
      steps = slice(start, stop_step)
      batches = self.schedules[seed].batches(start, stop_step, arm.clean)
      kept = jax.tree.map(lambda x: x[steps], chosen[seed])
      learner, happened = trainer.advance(arm, learners[seed], batches, kept)
      for whole, stretch in zip(trace, happened):
        whole[seed, steps] = stretch
      if not _is_evaluated(part, stop_step):
        return learner, None
      accuracy, loss = trainer.evaluate(learner)
      return trainer.observed(learner, loss), (accuracy, loss)

    saved = time.monotonic()
    # Threads, since one seed's small matrices do not fill all cores. Programs that
    # exchange something have to run in one order, the same in all processes.
    workers = min(part.seeds, os.cpu_count() or 1) if team.mesh is None else 1
    with futures.ThreadPoolExecutor(workers) as pool:
      for stop_step in _stops(part, start):
        done = list(pool.map(lambda s: advance(s, stop_step), seeds))
        learners, measured = zip(*done)
        if _is_evaluated(part, stop_step):
          for seed in seeds:
            directory.append_metrics(
              _row(part, arm, seed, stop_step, trace, *measured[seed])
            )
        progress.update(stop_step - start)
        start = stop_step
        stopping = team.any(stop())
        due = time.monotonic() - saved >= checkpoint_seconds
        if stopping or due or start == part.steps:
          checkpoints.save(start, list(learners), trace, directory.metrics_size())
          saved = time.monotonic()
        if stopping:
          raise Stopped
    self.traces[arm.name] = trace

  def _chosen(self, arm, seed) -> Chosen | None:
    """What a control keeps of all steps of a seed."""
    if training.decides_itself(arm):
      return None
    imitated = self.traces[arm.imitates]
    accepted = imitated.accepted[seed]
    if arm.control == "steps":
      return random_steps(accepted, seed)
    return random_choice(accepted, imitated.weights[seed], seed)


def _stops(part: Part, start: int) -> list[int]:
  """The steps after which a stretch ends, the same whatever `start` is."""
  longest = min(models.KINDS[part.model].steps, part.eval_every)
  stretch = max(n for n in range(1, longest + 1) if part.eval_every % n == 0)
  return [*range(start + stretch, part.steps, stretch), part.steps]


def _is_evaluated(part, step):
  return step % part.eval_every == 0 or step == part.steps


def _row(part: Part, arm: Arm, seed, step, trace, accuracy, loss):
  """A line of the metrics file; means are over the steps since the line before."""
  since = (step - 1) // part.eval_every * part.eval_every
  train_loss = trace.loss[seed, since:step]
  distances = trace.distance[seed, since:step]
  distances = distances[np.isfinite(distances)]
  distance = float(distances.mean()) if len(distances) else float("nan")
  return {
    "part": part.name,
    "arm": arm.name,
    "seed": seed,
    "step": step,
    "train_loss": float(train_loss.mean()),
    "test_loss": loss,
    "test_accuracy": accuracy,
    "accept_rate": float(trace.accept_rate[seed, step - 1]),
    "skipped_steps": int(trace.skipped_steps[seed, step - 1]),
    "cosine_distance": distance,
    "threshold": float(trace.threshold[seed, step - 1]),
    "nonfinite": int(trace.nonfinite[seed, step - 1]),
  }
