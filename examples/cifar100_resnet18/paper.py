"""Paper: the figures and tables of arXiv 2412.18052, and what the paper left open.

`python paper.py NAME` makes one; README.md beside this file says which there are, and
RESULTS.md what came out.
"""

import dataclasses
import datetime as dt
import importlib.metadata
import os
import pathlib
import platform
import shutil
import sys

import jax

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

import charts
import figures
import models
import options as options_lib
import plan
import report
import runs
from common import command
from common.command import UserError
from common.storage import write_whole
from common.tables import write_csv


def parse(argv: list[str]):
  """The options; a bad one ends the program with a sentence and exit code 2."""
  parser = command.Parser(
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
    help="digits (minutes on two cores; default), patches (an MLP on fixed features of"
    " CIFAR-10), cifar10 (a narrow ResNet), or cifar100: as in the paper, for an"
    " accelerator",
  )
  parser.add_argument(
    "--only",
    nargs="+",
    metavar="PART",
    help="run only these parts of it, named as in its results.csv",
  )
  parser.add_argument(
    "--keep",
    metavar="DIR",
    help="put table, picture and csv there, too, named as the experiment and setting",
  )
  model = parser.add_argument_group("model (default: that of the setting)")
  command.add_options(model, plan.Part, ("model", "width", "depth"))
  usual = "default that of the setting"
  options_lib.add_size(parser, **dict.fromkeys(options_lib.SIZE, usual))
  options_lib.add_files(parser)
  parser.add_argument(
    "--noisy-labels",
    metavar="FILE",
    help="the file of CIFAR-N, for experiments with labels that people got wrong;"
    " default: in --data-dir",
  )
  # What decides on devices and processes in train.py.
  parser.set_defaults(devices=None, processes=None)
  options = parser.parse_args(argv)
  options.NAME = options.name  # For the comparison when a run is resumed.
  options.said = _said(argv)
  return options


def _said(argv):
  """The command, without what does not change its results."""
  unsaid, said = ("--out", "--keep", "--data-dir"), []
  for word in argv:
    if said and said[-1] in unsaid:
      said.pop()
    elif word != "--resume" and not word.startswith(tuple(f"{x}=" for x in unsaid)):
      said.append(word)
  return " ".join(["python paper.py", *said])


def parts(options) -> tuple[plan.Part, ...]:
  """What the options ask for."""
  given = options_lib.given(options, ("model", "width", "depth"))
  if options.model:
    # A setting's width and depth are of its own model.
    given = {"width": None, "depth": None, **given}
  planned = figures.FIGURES[options.name].parts(figures.SETTINGS[options.setting])
  names = [part.name for part in planned]
  if unknown := set(options.only or ()) - set(names):
    raise UserError(f"--only {unknown.pop()}: the parts are {', '.join(names)}.")
  made = []
  for part in planned:
    if options.only and part.name not in options.only:
      continue
    part = options_lib.sized(dataclasses.replace(part, **given), options)
    if part.noisy_labels_key:
      default = pathlib.Path(options.data_dir, figures.LABEL_FILES[part.dataset])
      file = options.noisy_labels or str(default)
      part = dataclasses.replace(part, noisy_labels=file)
    if wrong := options_lib.wrong_width(part.model, part.width):
      raise UserError(f"{wrong}.")
    compared = any(arm.by_example for arm in part.arms)
    if compared and models.KINDS[part.model].normalizes:
      raise UserError(
        f"{options.name} compares single examples, which BatchNorm in {part.model} does"
        " not allow; choose another --model."
      )
    made.append(part)
  if options.noisy_labels and not any(part.noisy_labels for part in made):
    raise UserError(
      f"--noisy-labels: nothing in {options.name} of this setting has human labels."
    )
  return tuple(plan.titled(made))


def _kept(command, text):
  """A table for other people: where and how it was made comes first."""
  versions = {name: importlib.metadata.version(name) for name in ("jax", "gaf_optax")}
  said = ", ".join(f"{name} {version}" for name, version in versions.items())
  made = (
    f"Made by `{command}` on {dt.date.today()}: {platform.machine()},"
    f" {jax.default_backend().upper()}, {os.cpu_count()} cores, Python"
    f" {platform.python_version()}, {said}."
  )
  title, _, tables = text.removeprefix("## ").partition("\n")
  return f"# {title}\n\n{made}\n{tables}"


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns its exit code, as that of `train.py`."""
  options = parse(sys.argv[1:] if argv is None else argv)
  figure = figures.FIGURES[options.name]

  def finish(directory, experiments):
    rows = directory.metrics()
    results = [(one, report.summarize(one, rows)) for one in experiments]
    picture = directory.path / f"{options.name}.png"
    charts.draw(picture, figure, results, rows)
    text = report.write_overview(directory.path, figure.title, results, rows)
    if options.keep is not None:
      setting = "" if options.setting == figures.DIGITS else f"-{options.setting}"
      kept = pathlib.Path(options.keep, options.name + setting)
      kept.parent.mkdir(parents=True, exist_ok=True)
      write_whole(kept.with_suffix(".md"), _kept(options.said, text))
      for name, suffix in ((picture.name, ".png"), ("results.csv", ".csv")):
        shutil.copyfile(directory.path / name, kept.with_suffix(suffix))
      if told := report.signals([one.part for one, _ in results], rows):
        write_csv(kept.with_name(f"{kept.name}-told-apart.csv"), told)
    return text

  def start(received):
    name = f"{options.name}-{options.setting}"
    return runs.run("paper.py", options, parts(options), name, received, finish)

  return command.guarded("paper.py", start)


if __name__ == "__main__":
  sys.exit(main())
