"""Plots: accuracy, cosine distance and accept rate over the steps, as PNG."""

import os
import pathlib

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from storage import RunDirectory

# Told apart with any colour vision (Okabe and Ito); black is the plain mean.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_ROLLING = 100


def draw(directory: RunDirectory, experiment) -> None:
  """Writes `PART_accuracy.png`, `PART_distance.png` and `PART_accept_rate.png`."""
  part = experiment.part
  rows = [row for row in directory.metrics() if row["part"] == part.name]
  styled = styles(part)
  path = lambda kind: directory.path / f"{part.name}_{kind}.png"
  _accuracy(path("accuracy"), part, rows, styled)
  _distance(path("distance"), part, experiment.traces, styled)
  _accept_rate(path("accept_rate"), part, rows, styled)


def styles(part):
  """Line styles by arm: GAF in colours, its controls dashed in the same."""
  colors = iter(COLORS * len(part.arms))
  styles = {}
  for arm in part.arms:
    if arm.imitates is not None:
      linestyle = "--" if arm.control == "steps" else "-."
      style = dict(color=styles[arm.imitates]["color"], linestyle=linestyle)
    elif arm.is_gaf:
      style = dict(color=next(colors), linestyle="-")
    else:
      style = dict(color="black", linestyle=":" if arm.clean else "-")
    styles[arm.name] = style
  return styles


def _figure(part, what, ylabel):
  figure = Figure(figsize=(10, 6.5), dpi=110, layout="constrained")
  axes = figure.add_subplot()
  _dress(axes, part, f"{what}\n{part.title}", ylabel)
  return figure, axes


def _dress(axes, part, title, ylabel):
  axes.set_title(title, fontsize=10)
  axes.set_xlabel("step")
  axes.set_ylabel(ylabel)
  axes.set_xlim(0, part.steps)
  axes.grid(alpha=0.3)


def save(figure, axes, path: pathlib.Path):
  # Below all axes, where long names take nothing from the curves.
  figure.legend(
    *axes.get_legend_handles_labels(),
    loc="outside lower center",
    ncols=3,
    fontsize=8,
    frameon=False,
  )
  partial = path.with_name(f".{path.name}.partial")
  FigureCanvasAgg(figure)
  figure.savefig(partial, format="png")
  os.replace(partial, path)


def curves(rows, part, arm, field):
  """Steps `[n]` and values `[seeds, n]` of one field of the metrics file."""
  of_arm = [row for row in rows if row["arm"] == arm.name]
  steps = [row["step"] for row in of_arm if row["seed"] == 0]
  values = np.array([row[field] for row in of_arm], float)
  return np.array(steps), values.reshape(len(steps), part.seeds).T


def band(axes, steps, values, label, style):
  mean = values.mean(axis=0)
  axes.plot(steps, mean, label=label, linewidth=1.5, **style)
  if len(values) > 1:
    spread = values.std(axis=0, ddof=1)
    axes.fill_between(
      steps,
      mean - spread,
      mean + spread,
      color=style["color"],
      alpha=0.1,
      linewidth=0,
    )


def spread_note(part):
  if part.seeds == 1:
    return "one seed"
  return f"mean of {part.seeds} seeds, band: one standard deviation"


def _accuracy(path, part, rows, styles):
  figure, axes = _figure(part, f"Test accuracy ({spread_note(part)})", "test accuracy")
  for arm in part.arms:
    steps, values = curves(rows, part, arm, "test_accuracy")
    band(axes, steps, values, arm.label, styles[arm.name])
  # A band can leave the range of the values.
  axes.set_ylim(max(0, axes.get_ylim()[0]), min(1, axes.get_ylim()[1]))
  save(figure, axes, path)


def _accept_rate(path, part, rows, styles):
  figure, axes = _figure(
    part,
    f"Accepted share of the micro-gradients so far ({spread_note(part)})",
    "accept rate",
  )
  axes.set_ylim(-0.02, 1.02)
  for arm in part.arms:
    # A control's rate ends where GAF's does by construction.
    if arm.imitates is None and not arm.clean:
      steps, values = curves(rows, part, arm, "accept_rate")
      band(axes, steps, values, arm.label, styles[arm.name])
  save(figure, axes, path)


def _distance(path, part, traces, styles):
  arms = [arm for arm in part.arms if arm.imitates is None]
  width = max(1, min(_ROLLING, part.steps // 10))
  columns = 2 if len(arms) in (2, 4) else 3
  lines = -(-len(arms) // columns)
  figure = Figure(figsize=(10, 4.5 + 2.2 * lines), dpi=110, layout="constrained")
  grid = figure.add_gridspec(lines + 1, columns, height_ratios=[2] + [1] * lines)
  together = figure.add_subplot(grid[0, :])
  _dress(
    together,
    part,
    f"Cosine distance between micro-gradients, mean of the last {width} steps and"
    f" of {part.seeds} seed{'s' * (part.seeds > 1)}; below: each step of seed 0 and"
    f" its rolling mean\n{part.title}",
    "cosine distance",
  )
  steps = np.arange(1, part.steps + 1)
  first = None
  for place, arm in enumerate(arms):
    distance, style = traces[arm.name].distance, styles[arm.name]
    single = figure.add_subplot(
      grid[1 + place // columns, place % columns], sharex=first, sharey=first
    )
    first = first or single
    _dress(single, part, arm.label, "")
    single.title.set_fontsize(8)
    single.plot(steps, distance[0], linewidth=0.4, alpha=0.4, color=style["color"])
    single.plot(steps, rolling(distance[:1], width), linewidth=1.2, **style)
    single.axhline(1, color="gray", linewidth=0.8, zorder=1)
    together.plot(
      steps, rolling(distance, width), label=arm.label, linewidth=1.5, **style
    )
  together.axhline(1, color="gray", linewidth=0.8, zorder=1)
  save(figure, together, path)


def rolling(values: np.ndarray, width: int) -> np.ndarray:
  """Mean of the finite values of the last `width` steps and all seeds.

  Args:
    values: float `[seeds, steps]`.
    width: number of steps, fewer at the beginning.

  Returns:
    float `[steps]`, NaN where there is none.
  """
  finite = np.isfinite(values)
  total = np.cumsum(np.where(finite, values, 0).sum(axis=0, dtype=float))
  number = np.cumsum(finite.sum(axis=0))
  total[width:] -= total[:-width].copy()
  number[width:] -= number[:-width].copy()
  return np.where(number > 0, total / np.maximum(number, 1), np.nan)
