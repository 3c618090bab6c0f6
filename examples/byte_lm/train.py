"""Train: a byte language model by averaging, by GAF and by chance, side by side.

`python examples/byte_lm/train.py`; README.md beside this file says what comes out.
"""

import argparse
import dataclasses
import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

import byte_report
import byte_text
from byte_plots import EVALUATIONS
from byte_training import ByteTrainer
from common import command
from common.arms import GEOMETRIC_MEDIAN, PLAIN, RIGHT, RIVALS, Arm, Part, gaf_arms
from common.experiment import Experiment, run_all

_EMA_DECAY, _SMOOTHING = 0.98, 0.1


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns its exit code.

  It is 0, or 2 after a sentence about what is wrong, or 128 plus the number of the
  signal that stopped it.
  """
  options = _parsed(argv)

  def start(received):
    text = byte_text.load()
    options.text = text.digest  # A resumed run must have the same.
    trainer = ByteTrainer(text, options.steps, options.num_microbatches)
    experiments = [
      Experiment(
        part,
        [byte_text.Schedule(text, part, seed) for seed in range(part.seeds)],
        trainer,
      )
      for part in parts(options)
    ]
    finish = lambda directory, experiments: byte_report.write(
      directory.path, text.description, experiments, directory.metrics()
    )
    return run_all("train.py", options, "byte_lm", experiments, received, finish)

  return command.guarded("train.py", start)


def parts(options: argparse.Namespace) -> list[Part]:
  """What the options ask for."""
  found = []
  for name in options.parts:
    single = name == "documents"
    size = options.num_microbatches * options.microbatch_size
    part = Part(
      name=name,
      title=byte_text.PARTS[name],
      arms=tuple(_by_example() if single else _by_source(name, options)),
      wrong_sources=int(name in ("code-page", "shifted")),
      persistent=not single,
      microbatch_size=1 if single else options.microbatch_size,
      num_microbatches=size if single else options.num_microbatches,
      steps=options.steps,
      seeds=options.seeds,
      eval_every=options.steps // EVALUATIONS,
    )
    found.append(part)
  return found


def _rivals(**settings):
  """The simple ways that cost nothing."""
  smoothing, _, ema, _ = RIVALS
  changed = lambda arm, **more: dataclasses.replace(arm, **more, **settings)
  return [
    changed(PLAIN),
    changed(smoothing, label=f"label smoothing {_SMOOTHING}", smoothing=_SMOOTHING),
    changed(ema, label=f"weight EMA {_EMA_DECAY}", ema_decay=_EMA_DECAY),
  ]


def _by_source(name, options):
  k = options.num_microbatches
  memory = dict(memory_decay=0.98, rule="majority", adaptive=True)
  arms = [*_rivals(), GEOMETRIC_MEDIAN]
  for tau in options.tau:
    arms += gaf_arms(k, [], tau=tau, rule="most_neighbors")
  arms += gaf_arms(k, ["choice", "loss"], **memory)
  return arms if name == "clean" else [*arms, RIGHT]


def _by_example():
  compared = dict(by_example=True, rule="nearest_neighbors")
  # At tau 2 all are accepted, and compared all the same.
  return [
    *_rivals(**compared),
    dataclasses.replace(GEOMETRIC_MEDIAN, by_example=True),
    *gaf_arms(2, quantile=1 - byte_text.WRONG_SHARE, **compared),
    *gaf_arms(2, [], adaptive=True, **compared),
    dataclasses.replace(RIGHT, by_example=True),
  ]


def _parsed(argv):
  parser = command.Parser(prog="train.py", description=__doc__.split("\n")[0])
  parser.add_argument(
    "--quick", action="store_true", help="fewer steps and seeds: 40 and 2"
  )
  helps = dict(
    steps=f"of each run, a multiple of {EVALUATIONS}; default 160",
    seeds="how many; default 5",
    num_microbatches="in each step, each from a shard of its own; default 8",
    microbatch_size=f"windows of {byte_text.CONTEXT} bytes in each; default 2",
  )
  command.add_options(parser, Part, helps, **helps)
  command.add_options(parser, Arm, ["tau"], tau="of GAF by one step; default 1")
  parser.add_argument(
    "--parts",
    nargs="+",
    choices=list(byte_text.PARTS),
    default=list(byte_text.PARTS),
    help="which to run (default: all)",
  )
  command.add_output(parser, "runs/byte_lm")
  parser.set_defaults(out="runs/byte_lm")
  options = parser.parse_args(argv)
  options.steps = options.steps or (40 if options.quick else 160)
  if options.steps % EVALUATIONS:
    parser.error(f"--steps {options.steps} is not a multiple of {EVALUATIONS}")
  options.seeds = options.seeds or (2 if options.quick else 5)
  options.num_microbatches = options.num_microbatches or 8
  options.microbatch_size = options.microbatch_size or 2
  options.tau = sorted(set(options.tau or [1.0]))
  options.parts = [part for part in byte_text.PARTS if part in options.parts]
  return options


if __name__ == "__main__":
  sys.exit(main())
