"""Train: a byte language model by averaging, by GAF and by chance, side by side.

`python examples/byte_lm/train.py`; README.md beside this file says what comes out.
"""

import argparse
import contextlib
import pathlib
import signal
import sys
import threading

import byte_report
import byte_runs
import byte_text
from byte_errors import UserError


class _Parser(argparse.ArgumentParser):
  def error(self, message):
    self.exit(2, f"{self.prog}: {message.rstrip('.')}. See {self.prog} --help.\n")


def main(argv: list[str] | None = None) -> int:
  """Runs the command.

  Args:
    argv: the command line without the program, None for the process's own.

  Returns:
    The exit code: 0, 2 after a sentence about what is wrong, or 128 plus the number
    of the signal that stopped it.
  """
  options = _parsed(argv)
  plan = byte_runs.Plan(
    options.steps,
    options.seeds,
    options.num_microbatches,
    options.microbatch_size,
    options.tau,
    options.parts,
  )
  try:
    text = byte_text.load()
    byte_runs.open_directory(options.out, plan, text.digest, options.resume)
    with _stopped_by_signals() as (stop, received):
      try:
        records = byte_runs.run_all(options.out, plan, text, stop)
      except (byte_runs.Stopped, KeyboardInterrupt):
        said = "stopped; the same command with --resume goes on from here."
        print(f"train.py: {said}", file=sys.stderr)
        return 128 + received[0]
      print(byte_report.write(options.out, plan, text.description, records))
      print(f"Tables and plots are in {options.out}.")
  except OSError as error:
    where = error.filename or options.out
    print(f"train.py: {where}: {error.strerror}.", file=sys.stderr)
    return 2
  except UserError as error:
    print(f"train.py: {error}", file=sys.stderr)
    return 2
  return 0


def _parsed(argv):
  parser = _Parser(prog="train.py", description=__doc__.split("\n")[0])
  parser.add_argument(
    "--quick", action="store_true", help="fewer steps and seeds: 40 and 2"
  )
  parser.add_argument("--steps", type=_steps, help="of each run (default: 300)")
  parser.add_argument("--seeds", type=_at_least(1), help="how many (default: 5)")
  parser.add_argument(
    "--num-microbatches",
    type=_at_least(2),
    default=8,
    help="in each step, three of eight of them from wrong sources (default: 8)",
  )
  parser.add_argument(
    "--microbatch-size",
    type=_at_least(1),
    default=2,
    help=f"windows of {byte_text.CONTEXT} bytes in each (default: 2)",
  )
  parser.add_argument(
    "--tau",
    type=_tau,
    nargs="+",
    default=[1.0],
    help="thresholds of GAF, for each rule (default: 1)",
  )
  parser.add_argument(
    "--parts",
    nargs="+",
    choices=list(byte_text.PARTS),
    default=list(byte_text.PARTS),
    help="which to run (default: all)",
  )
  parser.add_argument(
    "--out",
    type=pathlib.Path,
    default=pathlib.Path("runs/byte_lm"),
    help="output directory (default: runs/byte_lm)",
  )
  parser.add_argument(
    "--resume", action="store_true", help="go on with the run in --out"
  )
  options = parser.parse_args(argv)
  options.steps = options.steps or (40 if options.quick else 300)
  options.seeds = options.seeds or (2 if options.quick else 5)
  options.tau = sorted(set(options.tau))
  options.parts = [part for part in byte_text.PARTS if part in options.parts]
  return options


def _at_least(least):
  def convert(text):
    if not text.isdecimal() or int(text) < least:
      raise argparse.ArgumentTypeError(
        f"expected a whole number of at least {least}, got {text!r}"
      )
    return int(text)

  return convert


def _steps(text):
  steps = _at_least(byte_runs.EVALUATIONS)(text)
  if steps % byte_runs.EVALUATIONS:
    raise argparse.ArgumentTypeError(
      f"expected a multiple of {byte_runs.EVALUATIONS}, the number of evaluations,"
      f" got {text!r}"
    )
  return steps


def _tau(text):
  with contextlib.suppress(ValueError):
    if 0 <= float(text) < 2:
      return float(text)
  raise argparse.ArgumentTypeError(
    f"expected a number from 0 to below 2 (at 2 it is the plain mean), got {text!r}"
  )


@contextlib.contextmanager
def _stopped_by_signals():
  """An event that the first SIGINT or SIGTERM sets; a second one acts as usual."""
  stop, received = threading.Event(), []

  def note(number, frame):
    del frame
    received.append(number)
    stop.set()
    signal.signal(number, before[number])

  before = {
    number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)
  }
  try:
    yield stop, received
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


if __name__ == "__main__":
  sys.exit(main())
