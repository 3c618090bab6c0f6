"""Charts: what runs came to, as PNG."""

import pathlib

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

import report
from common import plots
from common.arms import CONTROLS
from common.tables import Difference

_MARKERS = {
  "plain": ("black", "o"),
  "choice": ("#0072B2", "s"),
  "steps": ("#D55E00", "D"),
  "loss": ("#009E73", "^"),
  "rival": ("#CC79A7", "v"),
}
_WRONG = "#D55E00"
_MEMORY_STEPS = (10, 100, 1_000)
_EXAMPLES_STEP = 200


def draw(path: pathlib.Path, figure, results, rows) -> None:
  """Writes the PNG of a `figures.Figure`.

  `results` are experiments and their summaries by arm, `rows` the lines of the metrics
  file.
  """
  DRAW[figure.draw](path, figure, results, rows)


def draw_part(path: pathlib.Path, experiment, rows) -> None:
  """Writes `PART_accuracy.png`, `PART_distance.png` and `PART_accept_rate.png`.

  Where sources are compared by their memory, also `PART_memory.png`, and where single
  examples are compared and some are mislabeled, `PART_examples.png`.
  """
  part = experiment.part
  png = lambda kind: path / f"{part.name}_{kind}.png"
  note = plots.spread_note(part)
  drawn, axes = _single(part, f"Test accuracy ({note})", "test accuracy")
  for arm in part.arms:
    _band(axes, rows, part, arm, "test_accuracy")
  plots.at_most_one(axes)
  plots.save(drawn, axes, png("accuracy"))
  title = f"Accepted share of the micro-gradients so far ({note})"
  drawn, axes = _single(part, title, "accept rate")
  axes.set_ylim(-0.02, 1.02)
  for arm in part.arms:
    # A control's rate ends where GAF's does by construction.
    if arm.imitates is None and not arm.clean:
      _band(axes, rows, part, arm, "accept_rate")
  plots.save(drawn, axes, png("accept_rate"))
  _distance(png("distance"), part, experiment.traces)
  if remembering := [arm for arm in part.arms if arm.is_gaf and arm.memory_decay]:
    _memory(png("memory"), experiment, remembering[-1])
  comparing = [arm for arm in part.arms if arm.is_gaf and arm.by_example]
  if comparing and experiment.schedules[0].mislabeled.any():
    _examples(png("examples"), experiment, comparing[-1])


def _single(part, what, ylabel):
  drawn = Figure(figsize=(10, 6.5), dpi=110, layout="constrained")
  axes = drawn.add_subplot()
  _dress(axes, part, f"{what}\n{part.title}", ylabel)
  return drawn, axes


def _dress(axes, part, title, ylabel):
  axes.set_title(title, fontsize=10)
  axes.set_xlabel("step")
  axes.set_ylabel(ylabel)
  axes.set_xlim(0, part.steps)
  axes.grid(alpha=0.3)


def _band(axes, rows, part, arm, field, label=None, style=None):
  """A curve of the metrics file, usually in the name and style of its arm."""
  steps, values = plots.curves(rows, part, arm, field)
  style = style or plots.styles(part)[arm.name]
  plots.band(axes, steps, values, label or arm.label, style)


def _rolling(axes, part, distance, width, label, style):
  steps = np.arange(1, part.steps + 1)
  rolling = plots.rolling(distance, width)
  axes.plot(steps, rolling, label=label, linewidth=1.2, **style)


def _distance(path, part, traces):
  arms = [arm for arm in part.arms if arm.imitates is None]
  width = max(1, min(100, part.steps // 10))
  columns = 2 if len(arms) in (2, 4) else 3
  lines = -(-len(arms) // columns)
  drawn = Figure(figsize=(10, 4.5 + 2.2 * lines), dpi=110, layout="constrained")
  grid = drawn.add_gridspec(lines + 1, columns, height_ratios=[2] + [1] * lines)
  together = drawn.add_subplot(grid[0, :])
  title = (
    f"Cosine distance between micro-gradients, mean of the last {width} steps and"
    f" of {part.seeds} seed{'s' * (part.seeds > 1)}; below: each step of seed 0 and"
    f" its rolling mean\n{part.title}"
  )
  _dress(together, part, title, "cosine distance")
  first = None
  for place, arm in enumerate(arms):
    distance, style = traces[arm.name].distance, plots.styles(part)[arm.name]
    single = drawn.add_subplot(
      grid[1 + place // columns, place % columns], sharex=first, sharey=first
    )
    first = first or single
    _dress(single, part, arm.label, "")
    single.title.set_fontsize(8)
    steps = np.arange(1, part.steps + 1)
    single.plot(steps, distance[0], linewidth=0.4, alpha=0.4, color=style["color"])
    _rolling(single, part, distance[:1], width, arm.label, style)
    plots.orthogonal(single)
    _rolling(together, part, distance, width, arm.label, style)
  plots.orthogonal(together)
  plots.save(drawn, together, path)


def _memory(path, experiment, arm):
  """The mean cosines of seed 0 at some steps, wrong sources last."""
  part, trace = experiment.part, experiment.traces[arm.name]
  wrong = experiment.schedules[0].wrong.all(axis=0)  # In every step.
  order = np.argsort(wrong, kind="stable")
  steps = [step for step in _MEMORY_STEPS if step <= part.steps] or [part.steps]
  drawn = Figure(figsize=(1 + 3.4 * len(steps), 4.6), dpi=110, layout="constrained")
  axes = drawn.subplots(1, len(steps), squeeze=False)[0]
  shown = [trace.memory[0, step - 1][np.ix_(order, order)] for step in steps]
  off_diagonal = [np.abs(one[~np.eye(len(one), dtype=bool)]).max() for one in shown]
  for ax, step, cosines, largest in zip(axes, steps, shown, off_diagonal):
    # Each has a scale of its own, since cosines shrink as training goes on.
    limit = max(float(largest), 1e-3)
    colors = np.where(np.eye(len(cosines), dtype=bool), np.nan, cosines)
    image = ax.imshow(colors.astype(float), cmap="RdBu", vmin=-limit, vmax=limit)
    accepted = trace.accepted[0, step - 1][order]
    names = [f"{source + 1}" + " wrong" * bool(wrong[source]) for source in order]
    marked = [f"{name} {'+' if kept else '-'}" for name, kept in zip(names, accepted)]
    ax.set_yticks(range(len(names)), marked, fontsize=8)
    ax.set_xticks(range(len(names)), [f"{source + 1}" for source in order], fontsize=8)
    for tick, source in zip(ax.get_yticklabels(), order):
      tick.set_color(_WRONG if wrong[source] else "black")
    ax.set_title(f"after {step:,} steps", fontsize=9)
    drawn.colorbar(image, ax=ax, location="bottom", shrink=0.85)
  drawn.suptitle(
    f"Memory: mean cosine between sources, seed 0; + accepted, - not ({arm.label})\n"
    f"{part.title}",
    fontsize=10,
  )
  plots.write(drawn, path)


def _examples(path, experiment, arm):
  """The cosines of one batch of seed 0, by label, and what GAF makes of them."""
  part, schedule = experiment.part, experiment.schedules[0]
  step = min(_EXAMPLES_STEP, part.steps - 1)
  learner = experiment.learner_at(arm, 0, step)
  batches = schedule.batches(step, step + 1, clean=False)
  cosines = experiment.trainer.cosines(learner, batches)
  labels = batches.labels.ravel()
  wrong = schedule.mislabeled[batches.indices.ravel()]
  accepted = experiment.traces[arm.name].accepted[0, step]
  order = np.lexsort((wrong, labels))
  drawn = Figure(figsize=(9, 8.6), dpi=110, layout="constrained")
  ax, below = drawn.subplots(2, 1, height_ratios=[24, 1], sharex=True)
  image = ax.imshow(cosines[np.ix_(order, order)], cmap="RdBu", vmin=-1, vmax=1)
  first = [int(np.argmax(labels[order] == c)) for c in np.unique(labels)]
  for place in first[1:]:
    ax.axhline(place - 0.5, color="black", linewidth=0.5)
    ax.axvline(place - 0.5, color="black", linewidth=0.5)
  middles = [(a + b - 1) / 2 for a, b in zip(first, [*first[1:], len(labels)])]
  ax.set_yticks(middles, [f"{c}" for c in np.unique(labels)])
  ax.set_ylabel("label as trained on")
  ax.set_xticks([])
  places = np.arange(len(labels))
  marks = ((wrong, _WRONG, "mislabeled"), (accepted, "black", "accepted"))
  for row, (chosen, color, _) in enumerate(marks):
    below.eventplot(
      places[chosen[order]], lineoffsets=-row, linelengths=0.7, color=color
    )
  below.set_yticks([0, -1], [name for *_, name in marks], fontsize=8)
  below.set_xticks([])
  below.set_xlabel(arm.label, fontsize=8)
  for side in below.spines.values():
    side.set_visible(False)
  ax.set_xlim(-0.5, len(labels) - 0.5)
  ax.set_ylim(len(labels) - 0.5, -0.5)
  drawn.colorbar(image, ax=ax, shrink=0.6, label="cosine of last-layer gradients")
  drawn.suptitle(
    f"The {len(labels)} examples of one batch by label, the mislabeled ones of each"
    f" label last; seed 0, after {step} steps\n{part.title}",
    fontsize=10,
  )
  plots.write(drawn, path)


def _figure(size, figure, note, *shape, dpi=110, **shared):
  """A figure and its axes, titled."""
  drawn = Figure(figsize=size, dpi=dpi, layout="constrained")
  drawn.suptitle(f"{figure.title}{note}", fontsize=10)
  axes = drawn.subplots(*shape, squeeze=False, **shared)
  for ax in axes.flat:
    ax.grid(alpha=0.3)
  return drawn, axes


def _rolling_width(part):
  return max(1, min(100, part.steps // 20))


def _curves(path, figure, results, rows):
  """A column for each part: distance, test accuracy and training loss."""
  part = results[0][0].part
  note = (
    f"\n{plots.spread_note(part)}; distance: mean of the last {_rolling_width(part)}"
    " steps"
  )
  size = (5.2 * max(len(results), 2), 9)
  shared = dict(sharex="col", sharey="row")
  drawn, axes = _figure(size, figure, note, 3, len(results), **shared)
  for column, (experiment, _) in zip(axes.T, results):
    part = experiment.part
    for arm in part.arms:
      if arm.imitates is None:
        distance, style = experiment.traces[arm.name].distance, plots.styles(part)
        width = _rolling_width(part)
        _rolling(column[0], part, distance, width, arm.label, style[arm.name])
      _band(column[1], rows, part, arm, "test_accuracy")
      _band(column[2], rows, part, arm, "train_loss")
    plots.orthogonal(column[0])
    column[0].set_title(part.title, fontsize=9)
    column[2].set_xlabel("step")
  said = ("cosine distance", "test accuracy", "training loss (labels as trained on)")
  for ax, ylabel in zip(axes[:, 0], said):
    ax.set_ylabel(ylabel)
  plots.save(drawn, axes[1, 0], path)


def _distances(path, figure, results, rows):
  """Distance and accuracy over the steps, a line for each part."""
  part = results[0][0].part
  note = f"\n{_shared(part)}, plain mean; {plots.spread_note(part)}"
  drawn, axes = _figure((8, 8), figure, note, 2, 1, sharex=True)
  above, below = axes[:, 0]
  colors = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(results)))
  for color, (experiment, _) in zip(colors, results):
    part = experiment.part
    label = f"microbatches of {part.microbatch_size}"
    style, distance = (
      dict(color=color, linestyle="-"),
      experiment.traces["plain"].distance,
    )
    _rolling(above, part, distance, _rolling_width(part), label, style)
    _band(below, rows, part, part.arm("plain"), "test_accuracy", label, style)
  plots.orthogonal(above)
  above.set_ylabel("cosine distance")
  below.set_ylabel("test accuracy")
  below.set_xlabel("step")
  plots.save(drawn, above, path)


def _shared(part):
  """What all parts of a chart have in common: data and model."""
  return f"{part.dataset}, {part.model}"


def _over_tau(path, figure, results, rows):
  """Accuracies and accepted share against tau, a colour for each part."""
  del rows
  drawn, axes = _panels(figure, results, "tau (2: plain mean, dotted)")
  for color, (experiment, summaries) in zip(plots.COLORS, results):
    part = experiment.part
    # At 2 all three are the same.
    plain = part.arm("plain")
    arms = [*(arm for arm in part.arms if arm.is_gaf), plain]
    controls = [part.controls(arm.name).get("steps", plain) for arm in arms]
    label = f"{part.label_noise:.0%} of the labels flipped"
    taus = [arm.tau for arm in arms]

    def points(ax, measure, arms, label, linestyle):
      arrays = [getattr(summaries[arm.name], measure) for arm in arms]
      _error_bars(ax, taus, arrays, label, color=color, linestyle=linestyle)

    for ax, measure in zip(axes, report.MEASURES):
      points(ax, measure, arms, label, "-")
      points(ax, measure, controls, f"random steps, {label}", "--")
      level = getattr(summaries["plain"], measure).mean()
      ax.axhline(level, color=color, linestyle=":", linewidth=1.2)
    points(axes[-1], "accepted", arms, label, "-")
  for ax in axes[:-1]:
    plots.at_most_one(ax)
  plots.save(drawn, axes[0], path)


def _over_x(path, figure, results, rows):
  """Accuracies and accepted share against a number of the part, a line for each arm."""
  del rows
  names = {
    "microbatch_size": "microbatch size, images",
    "label_noise": "flipped labels",
  }
  drawn, axes = _panels(figure, results, names[figure.x])
  first = results[0][0].part
  styles = plots.styles(first)
  x = [getattr(experiment.part, figure.x) for experiment, _ in results]
  for arm in first.arms:
    shown = list(report.MEASURES) + ["accepted"] * arm.is_gaf
    for ax, measure in zip(axes, shown):
      arrays = [getattr(summaries[arm.name], measure) for _, summaries in results]
      _error_bars(ax, x, arrays, arm.label, **styles[arm.name])
  for ax in axes[:-1]:
    plots.at_most_one(ax)
  if figure.x == "microbatch_size":
    axes[-1].set_xscale("log")
    axes[-1].set_xticks(x, [str(n) for n in x])
    axes[-1].minorticks_off()
  plots.save(drawn, axes[0], path)


def _panels(figure, results, xlabel):
  """An axis for each measure and for the accepted share."""
  part = results[0][0].part
  note = (
    f"\n{_shared(part)}; mean of {part.seeds} seeds, bars: 95 % confidence interval of"
    " each mean"
  )
  drawn, axes = _figure((8, 13), figure, note, 4, 1, sharex=True)
  said = (*(f"{name} test accuracy" for name in report.MEASURES), "accepted share")
  for ax, ylabel in zip(axes[:, 0], said):
    ax.set_ylabel(ylabel)
  axes[-1, 0].set_xlabel(xlabel)
  axes[-1, 0].set_ylim(-0.02, 1.02)
  return drawn, axes[:, 0]


def _error_bars(ax, x, arrays, label, **style):
  ax.errorbar(
    x,
    [values.mean() for values in arrays],
    yerr=[
      Difference.of(values, np.zeros(len(values))).margin or 0 for values in arrays
    ],
    label=label,
    linewidth=1.2,
    elinewidth=0.7,
    capsize=2,
    marker="o",
    markersize=3,
    **style,
  )


def _forest(path, figure, results, rows):
  """Differences with their intervals: a block for each part, a line for each arm."""
  del rows
  parts = [(experiment.part, summaries) for experiment, summaries in results]
  number = sum(arm.is_gaf for part, _ in parts for arm in part.arms)
  note = (
    f" (accepted share in brackets)\nmean of {parts[0][0].seeds} paired seeds and its"
    " 95 % confidence interval; hollow: not significant"
  )
  size = (12, 2.5 + 0.3 * number + 0.35 * len(parts))
  drawn, axes = _figure(size, figure, note, 1, 2, dpi=100, sharey=True)
  left, right = axes[0]
  right.patch.set_visible(False)
  at, ticks, labels = 0.0, [], []
  any_rivals = any(arm.role == "rival" for part, _ in parts for arm in part.arms[1:])
  for part, summaries in parts:
    at += 1.2
    place = dict(xycoords=("axes fraction", "data"), va="center")
    bold = dict(fontsize=min(8, 1_000 / len(part.title)), fontweight="bold")
    heading = left.annotate(part.title, (0, at), **place, **bold)
    heading.set_in_layout(False)  # A long one goes on over the other axes.
    for arm in filter(lambda arm: arm.is_gaf, part.arms):
      at += 1
      ticks.append(at)
      labels.append(f"{arm.label} ({summaries[arm.name].accepted.mean():.0%})")
      for ax, measure in ((left, "final"), (right, "picked")):
        plain, shown = report.differences(part, arm, summaries, measure)
        if any_rivals:
          shown["rival"] = report.against_best_rival(part, arm, summaries, measure)[1]
        for row, (kind, one) in enumerate({"plain": plain, **shown}.items()):
          plots.interval(ax, at + 0.2 * (row - 1), one, *_MARKERS[kind])
  for ax, said in ((left, "final"), (right, "picked")):
    ax.axvline(0, color="gray", linewidth=0.8, zorder=1)
    ax.locator_params("x", nbins=7)
    ax.set_xlabel(f"difference of the test accuracy, {said}")
  left.set_yticks(ticks, labels, fontsize=7)
  left.set_ylim(at + 0.8, 0.4)
  used = {arm.control for part, _ in parts for arm in part.arms}
  names = {"plain": "plain mean", "rival": "best rival", **report.NAMES}
  kinds = [kind for kind in CONTROLS if kind in used] + ["rival"] * any_rivals
  for kind in ("plain", *kinds):
    (color, marker), name = _MARKERS[kind], names[kind]
    left.plot([], [], color=color, marker=marker, label=f"GAF - {name}")
  plots.save(drawn, left, path)


DRAW = {
  "curves": _curves,
  "distances": _distances,
  "over_tau": _over_tau,
  "over_x": _over_x,
  "forest": _forest,
}
