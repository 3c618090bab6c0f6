"""Experiment: takes every arm from its last checkpoint to its last step."""

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from common import loggers, storage
from common.arms import Arm, Chosen, Part, random_choice, random_steps
from common.command import compared
from common.devices import Team


class Stopped(Exception):
  """The run was asked to stop, and everything up to here is saved."""


class Trainer:
  """Compiled training; a subclass says what a step is.

  It has `init(arm, seed)`, a learner, of which
  `advance(arm, learner, batches, chosen)` gives the next one and a trace of the steps,
  and `evaluate(arm, learner, schedule)` numbers by name for a line of the metrics file;
  `empty_trace(part, arm)`, to be filled, and `row(trace, since)`, the other numbers of
  the line, about the steps from `since` on of those that a trace holds.
  """

  longest = 100  # Number of steps between two looks at whether to stop, at most.

  def __init__(self):
    self._compiled: dict[Any, Any] = {}
    self._compiling = threading.Lock()

  def placed(self, learner):
    """The learner where it is trained."""
    return learner

  def observed(self, learner, measured: dict[str, float]):
    """The learner after an evaluation."""
    del measured
    return learner

  def _cached(self, key, make, *args):
    # Compiled by hand, since threads that call a new `jit` function at the same
    # time each compile it.
    with self._compiling:
      if key not in self._compiled:
        self._compiled[key] = make().lower(*args).compile()
    return self._compiled[key](*args)

  def forget(self):
    """Frees the programs; what is needed again is compiled again."""
    self._compiled.clear()


class _Run(NamedTuple):
  """What all experiments of a command share."""

  directory: Any
  progress: tqdm.tqdm
  checkpoint_seconds: float
  received: list[int]  # Signals that have come, which stop it.


class Experiment:
  """One part: what each seed sees, and the arms' traces.

  Attributes:
    part: the setting.
    schedules: by seed; they have `batches(start, stop, clean)`, `wrong`, bool
      `[steps, k]`, and `control_key`, numbers that the controls' choices come from.
    traces: what happened, `[seeds, steps, ...]`, by name of the arm; filled by `run`.
    team: the processes that run it.
  """

  def __init__(
    self, part: Part, schedules: list[Any], trainer: Trainer, team: Team | None = None
  ):
    self.part, self.schedules, self.trainer = part, schedules, trainer
    self.team = team or Team()
    self.traces: dict[str, Any] = {}

  def run(self, run: _Run) -> None:
    """Runs the arms that are not complete and reads the traces of those that are.

    Raises:
      Stopped: after saving, when a signal has come.
    """
    team, part = self.team, self.part
    for arm in part.arms:
      run.progress.set_description(f"{part.name}: {arm.name}")
      checkpoints = team.together(
        lambda: run.directory.checkpoints(part.name, arm.name)
      )
      with contextlib.closing(checkpoints):
        start = int(
          team.from_first(lambda: np.int32(checkpoints.latest_step()), np.int32(0))
        )
        trace = self.trainer.empty_trace(part, arm)
        if start:
          trace = team.from_first(lambda: checkpoints.trace(trace), trace)
          trace = jax.tree.map(np.array, trace)
        run.progress.update(start)
        if start < part.steps:
          self._run_arm(arm, start, trace, checkpoints, run)
        self.traces[arm.name] = trace

  def _run_arm(self, arm, start, trace, checkpoints, run):
    part, team, trainer = self.part, self.team, self.trainer
    seeds = range(part.seeds)
    learners = [trainer.init(arm, seed) for seed in seeds]
    # The first weights too: another machine may round them otherwise.
    learners = team.from_first(
      lambda: checkpoints.learners(learners) if start else learners, learners
    )
    learners = [trainer.placed(learner) for learner in learners]
    team.together(lambda: run.directory.begin(part, arm))
    chosen = [self._chosen(arm, seed) for seed in seeds]

    def advance(seed, stop):
      steps = slice(start, stop)
      batches = self.schedules[seed].batches(start, stop, arm.clean)
      kept = jax.tree.map(lambda x: x[steps], chosen[seed])
      learner, happened = trainer.advance(arm, learners[seed], batches, kept)
      for whole, stretch in zip(trace, happened):
        if whole is not None:
          whole[seed, steps] = stretch
      if stop % part.eval_every and stop != part.steps:
        return learner, None
      measured = trainer.evaluate(arm, learner, self.schedules[seed])
      return trainer.observed(learner, measured), measured

    saved = time.monotonic()
    # Threads, since one seed's small matrices do not fill all cores. Programs that
    # exchange something have to run in one order, the same in all processes.
    workers = min(part.seeds, os.cpu_count() or 1) if team.mesh is None else 1
    with futures.ThreadPoolExecutor(workers) as pool:
      for stop in stops(part, trainer.longest, start):
        done = list(pool.map(lambda seed: advance(seed, stop), seeds))
        learners, results = map(list, zip(*done))
        since = (stop - 1) // part.eval_every * part.eval_every
        for seed, measured in zip(seeds, results):
          if measured:
            row = {"part": part.name, "arm": arm.name, "seed": seed, "step": stop}
            so_far = jax.tree.map(lambda x: x[seed, :stop], trace)
            row |= measured | trainer.row(so_far, since)
            run.directory.append_metrics(row)
        run.progress.update(stop - start)
        start = stop
        stopping = team.any(bool(run.received))
        due = time.monotonic() - saved >= run.checkpoint_seconds
        if stopping or due or start == part.steps:
          run.directory.save(checkpoints, start, learners, trace)
          saved = time.monotonic()
        if stopping:
          raise Stopped

  def learner_at(self, arm: Arm, seed: int, step: int) -> Any:
    """The learner of an arm that decides itself, trained again up to a step."""
    learner, start = self.trainer.init(arm, seed), 0
    for stop in [n for n in stops(self.part, self.trainer.longest, 0) if n <= step]:
      batches = self.schedules[seed].batches(start, stop, arm.clean)
      learner, _ = self.trainer.advance(arm, learner, batches, None)
      start = stop
    return learner

  def _chosen(self, arm, seed) -> Chosen | None:
    """What a control keeps of all steps of a seed."""
    if arm.decides_itself:
      return None
    imitated, key = self.traces[arm.imitates], self.schedules[seed].control_key
    if arm.control == "right":
      right = ~self.schedules[seed].wrong
      return Chosen(right, right.astype(np.float32))
    if arm.control == "loss":
      return Chosen(imitated.accepted[seed], imitated.weights[seed])
    if arm.control == "steps":
      return random_steps(imitated.accepted[seed], *key)
    return random_choice(imitated.accepted[seed], imitated.weights[seed], *key)


def stops(part: Part, longest: int, start: int) -> list[int]:
  """The steps after which a stretch ends, the same whatever `start` is."""
  longest = min(longest, part.eval_every)
  stretch = max(n for n in range(1, longest + 1) if part.eval_every % n == 0)
  return [*range(start + stretch, part.steps, stretch), part.steps]


def run_all(
  prog: str,
  options: argparse.Namespace,
  name: str,
  experiments: Sequence[Experiment],
  received: list[int],
  finish: Callable[[storage.RunDirectory, Sequence[Experiment]], str],
) -> int:
  """Runs all arms of experiments of one team, or what is left of them.

  Args:
    prog: the name of the command.
    options: the command line; see `command.add_output`.
    name: of the output directory, without its number.
    experiments: what runs.
    received: signals that have come, which stop the run.
    finish: writes what came out and returns it as a text.

  Returns:
    The exit code: 0, or 128 plus the signal's number.
  """
  team = experiments[0].team

  def make_directory():
    if not team.first:
      return storage.Nowhere()
    path = storage.choose_directory(options.out, name, options.resume)
    log = loggers.make(options, path)
    return storage.RunDirectory(path, compared(options), options.resume, log)

  total = sum(one.part.steps * len(one.part.arms) for one in experiments)
  shown = dict(total=total, unit="step", mininterval=0.5, disable=not team.first)
  with contextlib.closing(team.together(make_directory)) as directory:
    try:
      with tqdm.tqdm(**shown) as progress:
        run = _Run(directory, progress, options.checkpoint_seconds, received)
        for number, one in enumerate(experiments, 1):
          one.run(run)
          # Linux lets a process map 65,530 pieces of memory; a program takes hundreds.
          if all(other.trainer is not one.trainer for other in experiments[number:]):
            one.trainer.forget()
    except Stopped:
      if team.first:
        print(
          f"{prog}: stopped; the same command with --resume and --out"
          f" {directory.path} goes on from here.",
          file=sys.stderr,
        )
      # Without a signal of its own, the process stops with another one.
      return 128 + (received[0] if received else signal.SIGTERM)
    if team.first:
      print(finish(directory, experiments))
      print(f"Metrics, tables, checkpoints and plots are in {directory.path}.")
  return 0
