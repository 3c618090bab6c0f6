"""Plots: validation loss and cosine distance over the steps, as PNG."""

import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from common import plots
from common.experiment import Experiment

EVALUATIONS = 20


def losses(rows: list[dict], part, arm) -> np.ndarray:
  """Validation losses `[seeds, EVALUATIONS]` of an arm."""
  return plots.curves(rows, part, arm, "validation_loss")[1]


def draw(
  path: pathlib.Path, experiments: Sequence[Experiment], rows: list[dict]
) -> None:
  """Writes `validation_loss.png` and `cosine_distance.png`, a panel for each part."""
  part = experiments[0].part
  seeds = "one seed" if part.seeds == 1 else f"mean of {part.seeds} seeds"
  around = "" if part.seeds == 1 else ", band: smallest to largest"
  drawn = [losses(rows, one.part, arm) for one in experiments for arm in one.part.arms]
  # From a fifth of the steps on: the beginning is one steep fall in all arms.
  highest = np.stack(drawn)[..., EVALUATIONS // 5 :].max()
  limits = np.min(drawn) - 0.05, highest + 0.05
  title = f"Validation loss, {seeds}{around}"
  fill = lambda axes, one: _losses(axes, one.part, rows)
  _panels(
    path / "validation_loss.png", experiments, title, "bits per byte", limits, fill
  )
  title = (
    f"Cosine distance of micro-gradients, mean of each {part.eval_every} steps,"
    f" {seeds}; grey: smallest to largest of a micro-gradient, plain mean"
  )
  _panels(
    path / "cosine_distance.png",
    experiments,
    title,
    "cosine distance",
    (0, 2),
    _distances,
  )


def _panels(path, experiments, title, ylabel, ylim, fill):
  size = (5 * max(2, len(experiments)), 5.5)
  figure = Figure(figsize=size, dpi=100, layout="constrained")
  figure.suptitle(title, fontsize=11)
  panels = figure.subplots(1, len(experiments), sharey=True, squeeze=False)[0]
  for axes, one in zip(panels, experiments):
    fill(axes, one)
    axes.set_title(one.part.title.replace(": ", ":\n"), fontsize=10)
    axes.set_xlabel("step")
    axes.set_xlim(0, one.part.steps)
    axes.grid(alpha=0.3)
  panels[0].set_ylabel(ylabel)
  panels[0].set_ylim(ylim)
  plots.save(figure, panels[-1], path)  # The last panel has every kind of line.


def _losses(axes, part, rows):
  for arm in part.arms:
    style, values = plots.styles(part)[arm.name], losses(rows, part, arm)
    steps = np.arange(1, EVALUATIONS + 1) * part.eval_every
    axes.plot(steps, values.mean(axis=0), label=arm.label, linewidth=1.4, **style)
    if not arm.imitates:  # A control's band lies on that of its arm.
      low, high = values.min(axis=0), values.max(axis=0)
      axes.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _distances(axes, one):
  part = one.part
  middles = (np.arange(EVALUATIONS) + 0.5) * part.eval_every
  for arm in part.arms:
    if arm.imitates or arm.clean:
      continue
    # By stretch of steps: [seeds, stretches, all in it].
    values = one.traces[arm.name].distances.reshape(part.seeds, EVALUATIONS, -1)
    if not arm.is_gaf:
      low, high = np.nanmin(values, axis=(0, 2)), np.nanmax(values, axis=(0, 2))
      axes.fill_between(middles, low, high, color="0.9")
    style, mean = plots.styles(part)[arm.name], np.nanmean(values, axis=(0, 2))
    axes.plot(middles, mean, label=arm.label, linewidth=1.4, **style)
  plots.orthogonal(axes)
