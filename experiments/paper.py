"""Trains the arms of a figure, and writes its scores and its picture.

`python experiments/paper.py NAME`; README.md beside this file has the names, and
RESULTS.md the results.
"""

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

import charts
import figures
import report
import runs
import shared
from report import SIGNALS
from schedule import Schedule
from training import Trainer


def summary(experiment: runs.Experiment, arm: Any) -> dict[str, np.ndarray | None]:
  """Scores of an arm, `[seeds]`.

  Test accuracies: the best, the final, and the one at the highest accuracy on the noisy
  validation images. The accepted share; the number of steps taken; the mean distance of
  the last tenth of the steps; the wrong share of the accepted examples.
  """
  trace, curves = experiment.traces[arm.name], experiment.curves[arm.name]
  accuracy, accepted = curves["test_accuracy"], trace["accepted"]
  picked = curves["validation_accuracy"].argmax(axis=1)
  wrong = np.stack([schedule.wrong_examples() for schedule in experiment.schedules])
  from_wrong = None
  if wrong.any() and not arm.clean:
    # One value per example `[seeds, steps, k, b]`, also if microbatches are accepted.
    each = accepted.reshape(*wrong.shape[:3], -1) & np.ones_like(wrong)
    from_wrong = _ratio((each & wrong).sum((1, 2, 3)), each.sum((1, 2, 3)))
  late = trace["distance"][:, -max(1, experiment.part.steps // 10) :]
  finite = np.isfinite(late)
  return {
    "best": accuracy.max(axis=1),
    "final": accuracy[:, -1],
    "picked": np.take_along_axis(accuracy, picked[:, None], axis=1)[:, 0],
    "accepted": accepted.mean(axis=(1, 2)),
    "updates": accepted.any(axis=2).sum(axis=1),
    "late_distance": _ratio(np.sum(late, axis=1, where=finite), finite.sum(axis=1)),
    "from_wrong": from_wrong,
  }


def _ratio(total, number):
  return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def told_apart(experiment: runs.Experiment) -> list[dict]:
  """A line for each area under ROC of mislabeled images in runs of the plain mean."""
  curves, part = experiment.curves["plain"], experiment.part
  if SIGNALS[0] not in curves:
    return []
  return [
    {"part": part.name, "title": part.title, "seed": seed, "step": step}
    | {name: curves[name][seed, i] for name in SIGNALS}
    for i, step in enumerate(experiment.steps)
    for seed in range(part.seeds)
  ]


def draw(
  path: pathlib.Path, name: str, found: list[report.Setting], experiments
) -> None:
  """The picture of a figure: of curves, or of its scores."""
  figure = figures.FIGURES[name]
  if figure.draw == "curves":
    charts.curves(path, figure.title, experiments)
  elif figure.draw == "forest":
    charts.forest(path, figure.title, found)
  elif figure.x == "tau":
    charts.over(path, figure.title, charts.over_tau_of(found), "tau (2: plain mean)")
  else:
    x = {part.name: getattr(part, figure.x) for part in figures.parts(name)}
    x = [x[next(iter(setting.values())).part] for setting in found]
    lines = charts.over_of(found, x)
    charts.over(path, figure.title, lines, figure.x.replace("_", " "))


def main(argv: list[str] | None = None) -> None:
  parser = runs.parser(
    __doc__.partition("\n")[0], "runs/NAME", "that of the figure", "that of the figure"
  )
  parser.add_argument("name", choices=tuple(figures.FIGURES), metavar="NAME")
  parser.add_argument("--only", nargs="+", metavar="PART", help="run only these parts")
  parser.add_argument(
    "--data-dir", default="data", help="holds CIFAR-10 and its labels by people"
  )
  options = parser.parse_args(argv)
  name, cache, parts = options.name, {}, []
  for part in figures.parts(name):
    steps, seeds = options.steps or part.steps, options.seeds or part.seeds
    every = math.gcd(part.eval_every, steps)
    part = dataclasses.replace(part, steps=steps, seeds=seeds, eval_every=every)
    if part.name in (options.only or part.name):
      parts.append(part)
  if not parts:
    known = ", ".join(part.name for part in figures.parts(name))
    raise shared.UserError(f"--only {options.only[0]}: the parts are {known}.")

  def experiment(part):
    images = shared.images(part, options.data_dir, cache)
    schedules = [Schedule(part, images, seed) for seed in range(part.seeds)]
    return runs.Experiment(part, schedules, lambda: Trainer(part, images))

  experiments = [experiment(part) for part in parts]
  out = options.out or pathlib.Path("runs", name)
  asked = {key: getattr(options, key) for key in ("name", "only", "steps", "seeds")}
  runs.run_all(out, experiments, asked, options.resume)
  path = out / f"{name}.csv"
  report.write_csv(
    path,
    [
      row
      for one in experiments
      for arm in one.part.arms
      for row in report.rows(one.part, arm, summary(one, arm))
    ],
  )
  if told := [line for one in experiments for line in told_apart(one)]:
    report.write_csv(out / f"{name}-told-apart.csv", told)
  found = report.settings(path)
  draw(path.with_suffix(".png"), name, found, experiments)
  print(report.table(found))
  print(f"The scores of all seeds and a picture are in {out}.")


if __name__ == "__main__":
  runs.main(main)
