"""Charts of results and of training curves, as PNG."""

import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import report
from report import Difference

# Distinguishable with any colour vision (Okabe and Ito); black is the plain mean.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_DPI, _PALETTE = 84, 64
# The simple rivals are grey.
_DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = {
  "plain": ("black", "o", "the plain mean"),
  "chance": ("#0072B2", "s", "as much at random"),
  "rival": ("#CC79A7", "v", "the best rival"),
}
# Omitted from labels, since it is the same in a whole picture.
_UNSAID = (
  r"(, mlp|, patches-mlp, [0-9,]+ training images)\b"
  "|(by example nearest_neighbors|majority memory 0.98) |^GAF "
)
_LINEAR = 0.02  # Most differences are smaller, and some twenty times as large.


def save(figure: Figure, path: pathlib.Path, legend: Any = None) -> None:
  """Writes a PNG of few colours; the legend of the axes `legend` stands below."""
  if legend is not None:
    handles, labels = legend.get_legend_handles_labels()
    columns = 3 if max(map(len, labels), default=0) <= 45 else 2
    place = dict(loc="outside lower center", ncols=columns, frameon=False)
    figure.legend(handles, labels, fontsize=8, **place)
  figure.set_dpi(_DPI)
  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  partial = path.with_name(f".{path.name}.partial")
  image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
  image.quantize(_PALETTE).save(partial, format="png", optimize=True)
  os.replace(partial, path)


def _figure(size, title, rows=1, columns=1, **shared):
  figure = Figure(figsize=size, layout="constrained")
  figure.suptitle(title, fontsize=10)
  axes = figure.subplots(rows, columns, squeeze=False, **shared)
  for ax in axes.flat:
    ax.grid(alpha=0.3)
  return figure, axes


def band(axes, steps, values, label, style) -> None:
  """The mean of `[seeds, n]`, with one standard deviation around it."""
  mean = values.mean(axis=0)
  axes.plot(steps, mean, label=label, linewidth=1.5, **style)
  if len(values) > 1:
    spread = values.std(axis=0, ddof=1)
    around = dict(color=style["color"], alpha=0.1, linewidth=0)
    axes.fill_between(steps, mean - spread, mean + spread, **around)


def styles(arms: Sequence[Any]) -> dict[str, dict]:
  """Line styles by arm: GAF in colours, its controls dashed in them, rivals grey.

  Arms are `arms.Arm`, or `report.Result` with the name as `arm`.
  """
  colors, dashes = (iter(one * len(arms)) for one in (COLORS, _DASHES))
  found: dict[str, dict] = {}
  for arm in arms:
    name = getattr(arm, "arm", None) or arm.name
    if arm.imitates and arm.role == "chance":
      found[name] = dict(color=found[arm.imitates]["color"], linestyle="--")
    elif arm.role == "gaf":
      found[name] = dict(color=next(colors), linestyle="-")
    elif arm.role == "rival" and name != "plain":
      found[name] = dict(color="0.55", linestyle=next(dashes))
    else:
      found[name] = dict(color="black", linestyle="-")
  return found


def rolling(values: np.ndarray, width: int) -> np.ndarray:
  """Mean `[steps]` of the finite values of the last `width` steps and all seeds.

  `values` are `[seeds, steps]`; the mean is NaN if none is finite.
  """
  finite = np.isfinite(values)
  total = np.cumsum(np.where(finite, values, 0).sum(axis=0, dtype=float))
  number = np.cumsum(finite.sum(axis=0))
  total[width:] -= total[:-width].copy()
  number[width:] -= number[:-width].copy()
  return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def curves(path: pathlib.Path, title: str, experiments: Sequence[Any]) -> None:
  """Distance, test accuracy and training loss over the steps.

  A column for each part; where there is only the plain mean, a line for each part.
  """
  together = all(len(one.part.arms) == 1 for one in experiments)
  columns = 1 if together else len(experiments)
  size = (8, 9) if columns == 1 else (5.2 * columns, 9)
  note = f"{title}\nmean of {experiments[0].part.seeds} seeds, band: one deviation"
  figure, axes = _figure(size, note, 3, columns, sharex="col", sharey="row")
  for i, one in enumerate(experiments):
    part, column = one.part, axes[:, 0 if together else i]
    style, width = styles(part.arms), max(1, min(100, part.steps // 20))
    steps = np.arange(1, part.steps + 1)
    for arm in part.arms:
      how, label = style[arm.name], arm.label
      if together:
        how = dict(color=COLORS[i % len(COLORS)], linestyle="-")
        label = f"microbatches of {part.microbatch_size}"
      trace = one.traces[arm.name]
      if arm.imitates is None:
        column[0].plot(steps, rolling(trace["distance"], width), linewidth=1.2, **how)
      band(column[1], one.steps, one.curves[arm.name]["test_accuracy"], label, how)
      column[2].plot(steps, rolling(trace["loss"], width), linewidth=1.2, **how)
    column[0].axhline(1, color="gray", linewidth=0.8, zorder=1)
    column[2].set_xlabel("step")
    if not together:
      column[0].set_title(part.title, fontsize=9)
  said = ("cosine distance", "test accuracy", "training loss (labels as trained on)")
  for ax, ylabel in zip(axes[:, 0], said):
    ax.set_ylabel(ylabel)
  save(figure, path, axes[1, 0])


def over(path: pathlib.Path, title: str, lines: Sequence[tuple], xlabel: str) -> None:
  """Accuracies and accepted share over a number.

  `lines` have a label, a style, x values, and for each of these a `report.Result`.
  """
  measures = ("final", "best", "picked", "accepted")
  note = f"{title}\nmean of the seeds and its 95 % confidence interval"
  figure, axes = _figure((8, 10), note, len(measures), sharex=True)
  for measure, ax in zip(measures, axes[:, 0]):
    for label, style, x, results in lines:
      if measure == "accepted" and results[0].role != "gaf":
        continue
      found = [Difference.of(one.scores[measure]) for one in results]
      ax.errorbar(
        x,
        [one.mean for one in found],
        yerr=[one.margin or 0 for one in found],
        label=label,
        linewidth=1.2,
        elinewidth=0.7,
        capsize=2,
        **style,
      )
    ax.set_ylabel(
      f"{measure} share" if measure == "accepted" else f"accuracy, {measure}"
    )
    ax.set_ylim(max(0, ax.get_ylim()[0]), min(1.02, ax.get_ylim()[1]))
  axes[-1, 0].set_xlabel(xlabel)
  save(figure, path, axes[0, 0])


def over_of(settings: Sequence[report.Setting], x: Sequence[float]) -> list[tuple]:
  """Lines for `over`: one for each arm, over a number of each setting."""
  first = [*settings[0].values()]
  style = styles(first)
  return [
    (one.label, style[one.arm], x, [setting[one.arm] for setting in settings])
    for one in first
  ]


def over_tau_of(settings: Sequence[report.Setting]) -> list[tuple]:
  """Lines for `over`: GAF and random steps for each setting, over tau (2: plain)."""
  lines = []
  for color, setting in zip(COLORS, settings):
    plain = setting["plain"]
    title = re.sub(_UNSAID, "", plain.title)
    ours = [one for one in setting.values() if one.role == "gaf"]
    x = [float(one.arm.rpartition("tau")[2]) for one in ours]
    controls = [setting[f"{one.arm}_random_steps"] for one in ours]
    for label, linestyle, some in (
      ("GAF", "-", ours),
      ("random steps", "--", controls),
    ):
      style = dict(color=color, linestyle=linestyle)
      lines.append((f"{label}, {title}", style, [*x, 2.0], [*some, plain]))
  return lines


def forest(
  path: pathlib.Path, title: str, settings: Sequence[report.Setting], kinds=_MARKERS
) -> None:
  """GAF's gains: a line for each arm, final at the left, picked at the right."""
  found = [
    [gain for setting in settings for gain in report.gains(setting, score)]
    for score in report.SCORES
  ]
  note = (
    f"{title}: what GAF gains\nmean of paired seeds and its 95 % confidence interval;"
    f" hollow: not significant; logarithmic beyond ±{_LINEAR}"
  )
  figure, axes = _figure((12, 2 + 0.3 * len(found[0])), note, 1, 2, sharey=True)
  for ax, score, some in zip(axes[0], report.SCORES, found):
    for at, gain in enumerate(some):
      for row, kind in enumerate(kinds):
        one, (color, marker, _) = getattr(gain, kind), _MARKERS[kind]
        if one is not None:
          _interval(ax, at + 0.24 * (row - (len(kinds) - 1) / 2), one, color, marker)
    ax.axvline(0, color="gray", linewidth=0.8, zorder=1)
    ax.set_xscale("symlog", linthresh=_LINEAR, linscale=0.8)
    ax.set_xticks([-0.3, -0.1, -_LINEAR, 0, _LINEAR, 0.1, 0.3], minor=False)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel(f"{score}: difference")
  names = [
    re.sub(_UNSAID, "", gain.result.title)
    + ": "
    + re.sub(_UNSAID, "", gain.result.label)
    for gain in found[0]
  ]
  axes[0, 0].set_yticks(range(len(names)), names, fontsize=7)
  axes[0, 0].set_ylim(len(names) - 0.4, -0.6)
  for kind in kinds:
    color, marker, said = _MARKERS[kind]
    axes[0, 0].plot([], [], color=color, marker=marker, label=f"GAF - {said}")
  save(figure, path, axes[0, 0])


def _interval(axes, at, difference, color, marker):
  axes.errorbar(
    difference.mean,
    at,
    xerr=difference.margin,
    color=color,
    marker=marker,
    markersize=4 if difference.sign else 3,
    markerfacecolor=color if difference.sign else "white",
    linewidth=1,
  )


def areas(path: pathlib.Path, lines: Sequence[dict], signals: Sequence[str]) -> None:
  """Areas under ROC of wrong labels over training, a panel for each setting."""
  panels: dict[str, dict[int, list[dict]]] = {}
  for line in lines:
    steps = panels.setdefault(line["title"], {})
    steps.setdefault(int(line["step"]), []).append(line)
  columns = min(3, len(panels))
  shape = -(-len(panels) // columns), columns
  note = (
    "Which training labels are wrong: area under ROC of three signals of an example,"
    "\nin runs of the plain mean; mean of the seeds, band: one standard deviation"
  )
  figure, axes = _figure((4 * columns, 1 + 2.8 * shape[0]), note, *shape, sharey=True)
  for ax, (title, steps) in zip(axes.flat, panels.items()):
    for name, color in zip(signals, COLORS):
      values = [[float(line[name]) for line in seeds] for seeds in steps.values()]
      band(ax, [*steps], np.array(values).T, name, {"color": color})
    ax.axhline(0.5, color="gray", linewidth=0.8)
    ax.set_title(re.sub(r"(images|mlp), ", r"\1,\n", title), fontsize=7)
    ax.set_xlabel("step", fontsize=8)
  for ax in axes.flat[len(panels) :]:
    ax.set_axis_off()
  save(figure, path, axes[0, 0])
