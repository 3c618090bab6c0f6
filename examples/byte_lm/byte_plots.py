"""Plots: losses over the steps, what each arm gains, shards and documents, as PNG."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import byte_documents
from byte_text import KINDS
from common import plots
from common.experiment import Experiment
from common.tables import Difference

EVALUATIONS = 10
# By what an arm is in a comparison.
_ROLES = {
  "gaf": plots.COLORS[0],
  "rival": "black",
  "chance": plots.COLORS[1],
  "ideal": plots.COLORS[2],
}
_RIGHT, _WRONG = "0.7", plots.COLORS[1]


def curve(rows: list[dict], part, arm, field: str) -> np.ndarray:
  """Values `[seeds, EVALUATIONS]` of a field of an arm's lines."""
  return plots.curves(rows, part, arm, field)[1]


def draw(
  path: pathlib.Path,
  experiments: Sequence[Experiment],
  of_parts: list[tuple[Any, dict]],
  rows: list[dict],
) -> None:
  """Writes `validation_loss.png` and `differences.png`, a panel for each part.

  And, where they are compared, `sources.png` and `documents.png`.
  """
  parts = [part for part, _ in of_parts]
  seeds = "one seed" if parts[0].seeds == 1 else f"mean of {parts[0].seeds} seeds"
  around = "" if parts[0].seeds == 1 else ", band: smallest to largest"
  figure, panels = _panels(parts, f"Validation loss, {seeds}{around}")
  for axes, part in zip(panels, parts):
    _losses(axes, part, rows)
  plots.write(figure, path / "validation_loss.png")
  figure, panels = _panels(
    parts, "Final validation loss minus that of the plain mean, 95 % intervals"
  )
  for axes, (part, summaries) in zip(panels, of_parts):
    _differences(axes, part, summaries)
  plots.write(figure, path / "differences.png")
  shards = [part for part in parts if _memory_of(part)]
  if shards:
    title = "Agreement of each shard in the memory, all seeds; orange: the wrong one"
    figure, panels = _panels(shards, title)
    for axes, part in zip(panels, shards):
      one = next(one for one in experiments if one.part is part)
      _sources(axes, part, [s.wrong[0] for s in one.schedules], rows)
    plots.write(figure, path / "sources.png")
  for one in experiments:
    if one.part.name == "documents":
      _documents(path / "documents.png", one)


def _panels(parts, title):
  columns = min(2, len(parts))
  lines = -(-len(parts) // columns)
  size = (12, 1 + 3.8 * lines)
  figure = Figure(figsize=size, dpi=100, layout="constrained")
  figure.suptitle(title, fontsize=11)
  panels = list(figure.subplots(lines, columns, squeeze=False).ravel())
  for axes in panels[len(parts) :]:
    axes.remove()
  for axes, part in zip(panels, parts):
    axes.set_title(part.title.replace(": ", ":\n"), fontsize=10)
    axes.grid(alpha=0.3)
  return figure, panels


def _losses(axes, part, rows):
  shown = [arm for arm in part.arms if arm.is_gaf or arm.name in ("plain", "right")]
  highest, lowest = 0, np.inf
  for arm in shown:
    style, values = (
      plots.styles(part)[arm.name],
      curve(rows, part, arm, "validation_loss"),
    )
    steps = np.arange(1, EVALUATIONS + 1) * part.eval_every
    axes.plot(steps, values.mean(axis=0), label=arm.label, linewidth=1.4, **style)
    low, high = values.min(axis=0), values.max(axis=0)
    axes.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)
    # From a third of the steps on: the beginning is one steep fall in all arms.
    highest = max(highest, high[EVALUATIONS // 3 :].max())
    lowest = min(lowest, low.min())
  axes.set_xlim(0, part.steps)
  axes.set_ylim(lowest - 0.05, highest + 0.05)
  axes.set_xlabel("step")
  axes.set_ylabel("bits per byte")
  axes.legend(fontsize=8)


def _differences(axes, part, summaries):
  """A line for each arm but the plain mean, from the top."""
  plain = summaries[part.arm("plain")].final
  others = [arm for arm in part.arms if arm.name != "plain"]
  for i, arm in enumerate(others):
    found = Difference.of(summaries[arm].final, plain)
    axes.errorbar(
      found.mean, -i, xerr=found.margin, fmt="o", color=_ROLES[arm.role], capsize=3
    )
  axes.axvline(0, color="gray", linewidth=0.8, zorder=1)
  axes.set_yticks(
    [-i for i in range(len(others))],
    [arm.label.replace(", as ", ",\nas ") for arm in others],
  )
  axes.tick_params(axis="y", labelsize=7)
  axes.locator_params(axis="x", nbins=5)
  axes.set_xlabel("bits per byte, lower is better")


def _memory_of(part):
  return [arm for arm in part.arms if arm.memory_decay is not None and arm.is_gaf]


def _sources(axes, part, wrong, rows):
  (arm,) = _memory_of(part)
  steps = np.arange(1, EVALUATIONS + 1) * part.eval_every
  for i in range(part.num_microbatches):
    values = curve(rows, part, arm, f"source_{i + 1}/agreement")
    for seed, line in enumerate(values):
      bad = wrong[seed][i]
      style = dict(color=_WRONG if bad else _RIGHT, zorder=3 if bad else 2)
      axes.plot(steps, line, linewidth=1, **style)
  axes.axhline(0, color="gray", linewidth=0.8, zorder=1)
  axes.set_xlim(0, part.steps)
  axes.set_xlabel("step")
  axes.set_ylabel("cosine")


def _documents(path, one):
  """Distance against loss of the first seed's documents, by what is wrong with them."""
  arm, schedule = byte_documents.listed_arm(one.part), one.schedules[0]
  of = byte_documents.of_seed(one, arm, 0)
  figure = Figure(figsize=(8, 5.5), dpi=100, layout="constrained")
  axes = figure.subplots()
  for kind, color in enumerate((_RIGHT, *plots.COLORS[:3])):
    some = schedule.kinds == kind
    axes.scatter(
      of["loss"][some], of["distance"][some], s=14, color=color, label=KINDS[kind]
    )
  axes.set_title(f"Documents, seed 0, {arm.label}", fontsize=11)
  axes.set_xlabel("mean loss, less the mean of the step, in bits per byte")
  axes.set_ylabel("mean distance, less the mean of the step")
  axes.grid(alpha=0.3)
  axes.legend(title="targets", fontsize=9)
  plots.write(figure, path)
