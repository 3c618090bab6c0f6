"""Train: plain averaging, GAF and its random control on the same microbatches.

`python train.py` without options runs the main job on scikit-learn's digits;
README.md beside this file says what else it does.
"""

import contextlib
import signal
import sys

import tqdm

import data
import devices
import experiment
import launch
import options as options_lib
import plots
import report
import storage
from errors import UserError


def main(argv: list[str] | None = None) -> int:
  """Runs the command.

  Args:
    argv: the command line without the program, None for the process's own.

  Returns:
    The exit code: 0, or 2 after a sentence about what is wrong with the options or
    files, or 128 plus the signal's number after an orderly stop, or 1 or 3 when
    one of several processes has died.
  """
  argv = sys.argv[1:] if argv is None else argv
  options = options_lib.parse(argv)
  try:
    with _stop_signals() as received:
      if (options.processes or 1) > 1 and options.process_id is None:
        return _launch(argv, options, received)
      launch.watch()
      with devices.leaving_at_once(options):
        return _run(options, received)
  except UserError as error:
    print(f"train.py: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:  # The second one: not even the checkpoint is waited for.
    print("train.py: stopped at once; --resume goes on.", file=sys.stderr)
    return 128 + signal.SIGINT


def _launch(argv, options, received):
  if options.download:  # Once, not in each process.
    for part in options_lib.parts(options):
      data.load(part.dataset, options.data_dir, download=True)
  return launch.launch(argv, options, received)


def _run(options, received):
  parts = options_lib.parts(options)
  # All that can be wrong with the data comes out before a directory is made.
  datasets = {
    part.dataset: data.load(part.dataset, options.data_dir, options.download)
    for part in parts
  }
  team = devices.join(options)
  if team.first:
    for dataset in datasets.values():
      for note in dataset.notes:
        print(f"train.py: note: {note}", file=sys.stderr)
  experiments = team.together(
    lambda: [
      experiment.Experiment(part, datasets[part.dataset], team) for part in parts
    ]
  )
  team.check_same([(parts, one.schedules[0].labels.tobytes()) for one in experiments])
  directory = team.together(
    lambda: _directory(options) if team.first else storage.Nowhere()
  )
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
            f"train.py: stopped; the same command with --resume and --out"
            f" {directory.path} goes on from here.",
            file=sys.stderr,
          )
        return code
    if not team.first:
      return 0
    text = report.write(directory, experiments)
    for one in experiments:
      plots.draw(directory, one)
  print(text)
  print(f"Metrics, tables, checkpoints and plots are in {directory.path}.")
  return 0


def _directory(options):
  name = options_lib.run_name(options)
  return storage.RunDirectory(
    storage.choose_directory(options.out, name, options.resume),
    options_lib.compared(options),
    options.resume,
  )


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


if __name__ == "__main__":
  sys.exit(main())
