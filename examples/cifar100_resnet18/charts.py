"""Charts: what the experiments that have names came to, as PNG."""

import pathlib

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

import plots
import report

_MARKERS = {
  "plain": ("black", "o"),
  "choice": ("#0072B2", "s"),
  "steps": ("#D55E00", "D"),
}
_AGAINST = {
  "plain": "GAF - plain mean",
  "choice": "GAF - random choice",
  "steps": "GAF - random steps",
}
_MEASURES = ("best", "final")


def draw(path: pathlib.Path, figure, results, rows) -> None:
  """Writes one PNG.

  Args:
    path: of the file.
    figure: a `figures.Figure`.
    results: experiments and their summaries by arm.
    rows: the lines of the metrics file.
  """
  DRAW[figure.draw](path, figure, results, rows)


def _curves(path, figure, results, rows):
  """A column for each part: distance, test accuracy and training loss."""
  drawn = Figure(figsize=(5.2 * max(len(results), 2), 9), dpi=110, layout="constrained")
  axes = drawn.subplots(3, len(results), squeeze=False, sharex="col", sharey="row")
  for column, (experiment, _) in enumerate(results):
    part = experiment.part
    styles = plots.styles(part)
    of_part = [row for row in rows if row["part"] == part.name]
    width = _rolling_width(part)
    steps = np.arange(1, part.steps + 1)
    for arm in part.arms:
      style = styles[arm.name]
      if arm.imitates is None:
        rolling = plots.rolling(experiment.traces[arm.name].distance, width)
        axes[0, column].plot(steps, rolling, label=arm.label, linewidth=1.2, **style)
      for line, field in ((1, "test_accuracy"), (2, "train_loss")):
        where, values = plots.curves(of_part, part, arm, field)
        plots.band(axes[line, column], where, values, arm.label, style)
    axes[0, column].axhline(1, color="gray", linewidth=0.8, zorder=1)
    axes[0, column].set_title(part.title, fontsize=9)
    axes[2, column].set_xlabel("step")
  said = ("cosine distance", "test accuracy", "training loss (labels as trained on)")
  for line, ylabel in enumerate(said):
    axes[line, 0].set_ylabel(ylabel)
  part = results[0][0].part
  drawn.suptitle(
    f"{figure.title}\n{plots.spread_note(part)}; distance: mean of the last"
    f" {_rolling_width(part)} steps",
    fontsize=10,
  )
  _finish(path, drawn, axes, axes[1, 0])


def _rolling_width(part):
  return max(1, min(100, part.steps // 20))


def _distances(path, figure, results, rows):
  """Distance and accuracy over the steps, a line for each part."""
  drawn = Figure(figsize=(8, 8), dpi=110, layout="constrained")
  axes = drawn.subplots(2, 1, squeeze=False, sharex=True)
  colors = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(results)))
  for color, (experiment, _) in zip(colors, results):
    part = experiment.part
    label = f"microbatches of {part.microbatch_size}"
    style = dict(color=color, linestyle="-")
    width = _rolling_width(part)
    rolling = plots.rolling(experiment.traces["plain"].distance, width)
    steps = np.arange(1, part.steps + 1)
    axes[0, 0].plot(steps, rolling, label=label, linewidth=1.2, **style)
    of_part = [row for row in rows if row["part"] == part.name]
    where, values = plots.curves(of_part, part, part.arm("plain"), "test_accuracy")
    plots.band(axes[1, 0], where, values, label, style)
  part = results[0][0].part
  axes[0, 0].axhline(1, color="gray", linewidth=0.8, zorder=1)
  axes[0, 0].set_ylabel("cosine distance")
  axes[1, 0].set_ylabel("test accuracy")
  axes[1, 0].set_xlabel("step")
  drawn.suptitle(
    f"{figure.title}\n{_shared(part)}, plain mean; {plots.spread_note(part)}",
    fontsize=10,
  )
  _finish(path, drawn, axes, axes[0, 0])


def _over_tau(path, figure, results, rows):
  """Accuracies and accepted share against tau, a colour for each part."""
  del rows
  drawn, axes = _panels(figure, results, "tau (2: plain mean, dotted)")
  for color, (experiment, summaries) in zip(plots.COLORS, results):
    part = experiment.part
    arms = [arm for arm in part.arms if arm.is_gaf]
    label = f"{part.label_noise:.0%} of the labels flipped"
    controls = [part.controls(arm.name)["steps"] for arm in arms]
    # At 2 all three are the same.
    plain = part.arm("plain")
    arms, controls = [*arms, plain], [*controls, plain]
    taus = [arm.tau for arm in arms]
    for ax, measure in zip(axes[:, 0], _MEASURES):
      _points(ax, taus, arms, summaries, measure, label, color, "-")
      said = f"random steps, {label}"
      _points(ax, taus, controls, summaries, measure, said, color, "--")
      level = getattr(summaries["plain"], measure).mean()
      ax.axhline(level, color=color, linestyle=":", linewidth=1.2)
    _points(axes[2, 0], taus, arms, summaries, "accepted", label, color, "-")
  for ax in axes[:2, 0]:
    _at_most_one(ax)
  _finish(path, drawn, axes, axes[0, 0])


def _over_x(path, figure, results, rows):
  """Accuracies and accepted share against a number of the part, a line for each arm."""
  del rows
  names = {
    "microbatch_size": "microbatch size, images",
    "label_noise": "flipped labels",
  }
  drawn, axes = _panels(figure, results, f"{names[figure.x]}")
  first = results[0][0].part
  styles = plots.styles(first)
  x = [figure.x_of(experiment.part, first.arms[0]) for experiment, _ in results]
  for arm in first.arms:
    values = [summaries[arm.name] for _, summaries in results]
    shown = _MEASURES if arm.imitates else (*_MEASURES, "accepted")
    for ax, measure in zip(axes[:, 0], shown):
      arrays = [getattr(value, measure) for value in values]
      _error_bars(ax, x, arrays, arm.label, **styles[arm.name])
  for ax in axes[:2, 0]:
    _at_most_one(ax)
  if figure.x == "microbatch_size":
    axes[2, 0].set_xscale("log")
    axes[2, 0].set_xticks(x, [str(n) for n in x])
    axes[2, 0].minorticks_off()
  _finish(path, drawn, axes, axes[0, 0])


def _panels(figure, results, xlabel):
  drawn = Figure(figsize=(8, 11), dpi=110, layout="constrained")
  axes = drawn.subplots(3, 1, squeeze=False, sharex=True)
  said = ("best test accuracy", "final test accuracy", "accepted share")
  for ax, ylabel in zip(axes[:, 0], said):
    ax.set_ylabel(ylabel)
  axes[2, 0].set_xlabel(xlabel)
  axes[2, 0].set_ylim(-0.02, 1.02)
  part = results[0][0].part
  drawn.suptitle(
    f"{figure.title}\n{_shared(part)}; mean of {part.seeds} seeds, bars: 95 %"
    " confidence interval of each mean",
    fontsize=10,
  )
  return drawn, axes


def _shared(part):
  """What all parts of a chart have in common: data and model."""
  return f"{part.dataset}, {part.model}"


def _points(ax, x, arms, summaries, measure, label, color, linestyle):
  arrays = [getattr(summaries[arm.name], measure) for arm in arms]
  _error_bars(ax, x, arrays, label, color=color, linestyle=linestyle)


def _error_bars(ax, x, arrays, label, **style):
  mean = [values.mean() for values in arrays]
  ax.errorbar(
    x,
    mean,
    yerr=[_margin(values) for values in arrays],
    label=label,
    linewidth=1.2,
    elinewidth=0.7,
    capsize=2,
    marker="o",
    markersize=3,
    **style,
  )


def _at_most_one(ax):
  ax.set_ylim(max(0, ax.get_ylim()[0]), min(1, ax.get_ylim()[1]))


def _margin(values):
  return report.Difference.of(values, np.zeros_like(values, float)).margin or 0.0


def _forest(path, figure, results, rows):
  """Differences with their intervals: a block for each part, a line for each arm."""
  del rows
  lines = [
    (experiment.part, summaries, arm)
    for experiment, summaries in results
    for arm in experiment.part.arms
    if arm.is_gaf
  ]
  height = 2.5 + 0.3 * len(lines) + 0.35 * len(results)
  drawn = Figure(figsize=(12, height), dpi=100, layout="constrained")
  axes = drawn.subplots(1, 2, squeeze=False, sharey=True)
  axes[0, 1].patch.set_visible(False)
  at, ticks, labels = 0.0, [], []
  before = None
  for part, summaries, arm in lines:
    if part is not before:
      at += 1.2
      heading = axes[0, 0].annotate(
        part.title,
        (0, at),
        xycoords=("axes fraction", "data"),
        fontsize=8,
        fontweight="bold",
        va="center",
      )
      heading.set_in_layout(False)  # A long one goes on over the other axes.
      before = part
    at += 1
    ticks.append(at)
    labels.append(f"{arm.label} ({summaries[arm.name].accepted.mean():.0%})")
    for ax, measure in zip(axes[0], ("final", "best")):
      plain, controls = report.differences(part, arm, summaries, measure)
      for place, (kind, difference) in enumerate({"plain": plain, **controls}.items()):
        color, marker = _MARKERS[kind]
        ax.errorbar(
          difference.mean,
          at + 0.22 * (place - 1),
          xerr=difference.margin,
          color=color,
          marker=marker,
          markersize=4 if difference.sign else 3,
          markerfacecolor=color if difference.sign else "white",
          linewidth=1,
        )
  for ax, measure in zip(axes[0], ("final", "best")):
    ax.axvline(0, color="gray", linewidth=0.8, zorder=1)
    ax.set_xlabel(f"difference of the {measure} test accuracy")
  axes[0, 0].set_yticks(ticks, labels, fontsize=7)
  axes[0, 0].set_ylim(at + 0.8, 0.4)
  kinds = [
    "plain",
    *(k for k in report.CONTROLS if any(k in p.controls(a.name) for p, _, a in lines)),
  ]
  for kind in kinds:
    color, marker = _MARKERS[kind]
    axes[0, 0].plot([], [], color=color, marker=marker, label=_AGAINST[kind])
  part = lines[0][0]
  drawn.suptitle(
    f"{figure.title} (accepted share in brackets)\nmean of {part.seeds} paired seeds"
    " and its 95 % confidence interval; hollow: none",
    fontsize=10,
  )
  _finish(path, drawn, axes, axes[0, 0])


def _finish(path, drawn, axes, legend):
  for ax in axes.flat:
    ax.grid(alpha=0.3)
  plots.save(drawn, legend, path)


DRAW = {
  "curves": _curves,
  "distances": _distances,
  "over_tau": _over_tau,
  "over_x": _over_x,
  "forest": _forest,
}
