"""Command: from the parts of a command line to its results, stopped or not."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Sequence

import tqdm

import data
import devices
import experiment
import loggers
import storage
from errors import UserError
from plan import Part


def guarded(prog: str, action: Callable[[list[int]], int]) -> int:
  """Runs a command; what the user has to know ends it with one sentence.

  Args:
    prog: the name of the command.
    action: takes a list that the first SIGINT or SIGTERM is put in, and returns the
      exit code.

  Returns:
    The exit code: of `action`, 2 after a `UserError`, 130 after a second Ctrl-C.
  """
  try:
    with _stop_signals() as received:
      return action(received)
  except UserError as error:
    print(f"{prog}: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:  # The second one: not even the checkpoint is waited for.
    print(f"{prog}: stopped at once; --resume goes on.", file=sys.stderr)
    return 128 + signal.SIGINT


def run(
  prog: str,
  options: argparse.Namespace,
  parts: Sequence[Part],
  name: str,
  compared: dict,
  received: list[int],
  finish: Callable[[storage.RunDirectory, list[experiment.Experiment]], str],
) -> int:
  """Runs all arms of all parts, or what is left of them.

  Args:
    prog: the name of the command.
    options: where files are; see `options.add_files`.
    parts: what runs.
    name: of the output directory, without its number.
    compared: in what a resumed run must agree with its beginning, by flag.
    received: signals that have come, which stop the run.
    finish: writes what came out and returns it as a text.

  Returns:
    The exit code: 0, or 128 plus the signal's number.

  Raises:
    UserError: about data or files.
  """
  # All that can be wrong with the data comes out before a directory is made.
  datasets = {
    dataset: data.load(dataset, options.data_dir, options.download)
    for dataset in sorted({part.dataset for part in parts})
  }
  team = devices.join(options)
  if team.first:
    for dataset in datasets.values():
      for note in dataset.notes:
        print(f"{prog}: note: {note}", file=sys.stderr)
  experiments = team.together(
    lambda: [
      experiment.Experiment(part, datasets[part.dataset], team) for part in parts
    ]
  )
  team.check_same([(parts, one.schedules[0].labels.tobytes()) for one in experiments])

  def make_directory():
    if not team.first:
      return storage.Nowhere()
    path = storage.choose_directory(options.out, name, options.resume)
    log = loggers.make(options, path)
    return storage.RunDirectory(path, compared, options.resume, log)

  directory = team.together(make_directory)
  with contextlib.closing(directory):
    total = sum(part.steps * len(part.arms) for part in parts)
    with tqdm.tqdm(
      total=total, unit="step", mininterval=0.5, disable=not team.first
    ) as progress:
      try:
        size = 0
        for one in experiments:
          size = one.run(
            directory,
            size,
            progress,
            options.checkpoint_seconds,
            lambda: bool(received),
          )
      except experiment.Stopped:
        progress.close()
        # Without a signal of its own, the process stops with another one.
        code = 128 + (received[0] if received else signal.SIGTERM)
        if team.first:
          print(
            f"{prog}: stopped; the same command with --resume and --out"
            f" {directory.path} goes on from here.",
            file=sys.stderr,
          )
        return code
    if team.first:
      print(finish(directory, experiments))
      print(f"Metrics, tables, checkpoints and plots are in {directory.path}.")
  return 0


@contextlib.contextmanager
def _stop_signals():
  """A list that the first SIGINT or SIGTERM is put in; a second one acts as usual."""
  received: list[int] = []

  def note(number, frame):
    del frame
    received.append(number)
    signal.signal(number, before[number])

  before = {
    number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)
  }
  try:
    yield received
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
