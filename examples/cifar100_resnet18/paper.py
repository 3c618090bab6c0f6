"""Paper: the figures and tables of arXiv 2412.18052, and what the paper left open.

`python paper.py NAME` makes one; README.md beside this file says which there are, and
RESULTS.md what came out.
"""

import dataclasses
import pathlib
import sys

import charts
import command
import figures
import options as options_lib
import plan
import report
from errors import UserError

# What a resumed run must have been begun with.
_COMPARED = (
  "setting",
  "only",
  "noisy_labels",
  "model",
  "width",
  "depth",
  "steps",
  "seeds",
  "eval_every",
  "quick",
)


def parse(argv: list[str]):
  """The options; a bad one ends the program with a sentence and exit code 2."""
  parser = options_lib.Parser(
    prog="paper.py",
    description=(
      "One figure or table: plain averaging, GAF and its random controls on the same"
      " microbatches. Names: "
      + "; ".join(f"{name}: {one.title}" for name, one in figures.FIGURES.items())
      + "."
    ),
  )
  parser.add_argument("name", choices=tuple(figures.FIGURES), metavar="NAME")
  parser.add_argument(
    "--setting",
    choices=tuple(figures.SETTINGS),
    default=figures.DIGITS,
    help="digits (minutes on two cores; default), cifar10 (a narrow ResNet on 10,000"
    " images), or cifar100: as in the paper, for an accelerator",
  )
  parser.add_argument(
    "--only",
    nargs="+",
    metavar="PART",
    help="run only these parts of it, named as in its results.csv",
  )
  model = parser.add_argument_group("model (default: that of the setting)")
  options_lib.add_model(model)
  options_lib.add_size(parser, *["that of the setting"] * 3)
  options_lib.add_files(parser)
  parser.add_argument(
    "--noisy-labels",
    metavar="FILE",
    help="the file of CIFAR-N, for experiments with labels that people got wrong;"
    " default: in --data-dir",
  )
  # What decides on devices and processes in train.py.
  parser.set_defaults(devices=None, processes=None)
  return parser.parse_args(argv)


def parts(options) -> tuple[plan.Part, ...]:
  """What the options ask for."""
  setting = figures.SETTINGS[options.setting]
  given = {
    name: getattr(options, name)
    for name in ("width", "depth", "steps", "seeds", "eval_every")
    if getattr(options, name) is not None
  }
  if options.model:
    # A setting's width and depth are of its own model.
    given = {"model": options.model, "width": None, "depth": None, **given}
  if options.quick:
    given.setdefault("seeds", 2)
  made = []
  planned = figures.FIGURES[options.name].parts(setting)
  names = [part.name for part in planned]
  if unknown := set(options.only or ()) - set(names):
    raise UserError(f"--only {unknown.pop()}: the parts are {', '.join(names)}.")
  for part in planned:
    if options.only and part.name not in options.only:
      continue
    changed = dict(given)
    if options.quick and options.steps is None:
      changed["steps"] = max(1, part.steps // 10)
    if part.noisy_labels_key:
      default = pathlib.Path(options.data_dir, figures.LABEL_FILES[part.dataset])
      changed["noisy_labels"] = options.noisy_labels or str(default)
    part = dataclasses.replace(part, **changed)
    if wrong := options_lib.wrong_width(part.model, part.width):
      raise UserError(f"{wrong}.")
    made.append(part)
  if options.noisy_labels and not any(part.noisy_labels for part in made):
    raise UserError(
      f"--noisy-labels: nothing in {options.name} of this setting has human labels."
    )
  return tuple(plan.titled(made))


def main(argv: list[str] | None = None) -> int:
  """Runs the command.

  Args:
    argv: the command line without the program, None for the process's own.

  Returns:
    The exit code, as of `train.main`.
  """
  options = parse(sys.argv[1:] if argv is None else argv)
  figure = figures.FIGURES[options.name]

  def finish(directory, experiments):
    rows = directory.metrics()
    results = [(one, report.summarize(one, rows)) for one in experiments]
    charts.draw(directory.path / f"{options.name}.png", figure, results, rows)
    return report.write_overview(directory, figure.title, results)

  def start(received):
    flags = {
      "--" + name.replace("_", "-"): getattr(options, name) for name in _COMPARED
    }
    return command.run(
      "paper.py",
      options,
      parts(options),
      f"{options.name}-{options.setting}",
      {"NAME": options.name, **flags},
      received,
      finish,
    )

  return command.guarded("paper.py", start)


if __name__ == "__main__":
  sys.exit(main())
