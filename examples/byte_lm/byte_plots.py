"""Plots: validation loss and cosine distance over the steps, as PNG."""

import pathlib

import numpy as np
from matplotlib.figure import Figure

from byte_runs import EVALUATIONS, Plan, Records
from byte_text import PARTS

# Told apart with any colour vision (Okabe and Ito); black is the plain mean.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")


def draw(path: pathlib.Path, plan: Plan, records: Records) -> None:
  """Writes `validation_loss.png` and `cosine_distance.png`, a panel for each part."""
  seeds = "one seed" if plan.seeds == 1 else f"mean of {plan.seeds} seeds"
  band = "" if plan.seeds == 1 else ", band: smallest to largest"
  losses = np.stack([record["validation"] for record in records.values()])
  # From a fifth of the steps on: the beginning is one steep fall in all arms.
  highest = losses[:, EVALUATIONS // 5 :].max()
  _panels(
    path / "validation_loss.png",
    plan,
    f"Validation loss, {seeds}{band}",
    "bits per byte",
    (losses.min() - 0.05, highest + 0.05),
    lambda axes, part, arms: _losses(axes, plan, part, arms, records),
  )
  _panels(
    path / "cosine_distance.png",
    plan,
    f"Cosine distance of micro-gradients, mean of each {_width(plan)} steps, {seeds};"
    " grey: smallest to largest of a micro-gradient, plain mean",
    "cosine distance",
    (0, 2),
    lambda axes, part, arms: _distances(axes, plan, part, arms, records),
  )


def _panels(path, plan, title, ylabel, ylim, fill):
  parts = plan.arms()
  figure = Figure(figsize=(5 * max(2, len(parts)), 5.5), dpi=100, layout="constrained")
  figure.suptitle(title, fontsize=11)
  panels = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
  for axes, (part, arms) in zip(panels, parts.items()):
    fill(axes, part, arms)
    axes.set_title(PARTS[part].replace(": ", ":\n"), fontsize=10)
    axes.set_xlabel("step")
    axes.set_xlim(0, plan.steps)
    axes.grid(alpha=0.3)
  panels[0].set_ylabel(ylabel)
  panels[0].set_ylim(ylim)
  # The last panel has every kind of line; below all, it takes nothing from curves.
  figure.legend(
    *panels[-1].get_legend_handles_labels(),
    loc="outside lower center",
    ncols=3,
    fontsize=9,
    frameon=False,
  )
  partial = path.with_name(f".{path.name}.partial")
  figure.savefig(partial, format="png")
  partial.replace(path)


def _styles(arms):
  """By name: GAF in colours, its controls dashed in the same, plain means black."""
  colors = iter(_COLORS * len(arms))
  styles = {}
  for arm in arms:
    if arm.imitates:
      styles[arm.label] = dict(styles[arm.imitates.label], linestyle="--")
    elif arm.is_gaf:
      styles[arm.label] = dict(color=next(colors), linestyle="-")
    else:
      styles[arm.label] = dict(color="black", linestyle=":" if arm.part else "-")
  return styles


def _stacked(records, plan, part, arm, field):
  """`[seeds, ...]` of one field."""
  return np.stack(
    [records[arm.part or part, arm.name, seed][field] for seed in range(plan.seeds)]
  )


def _losses(axes, plan, part, arms, records):
  steps = np.arange(1, EVALUATIONS + 1) * _width(plan)
  for arm, style in zip(arms, _styles(arms).values()):
    values = _stacked(records, plan, part, arm, "validation")
    axes.plot(steps, values.mean(axis=0), label=arm.label, linewidth=1.4, **style)
    if not arm.imitates:  # A control's band lies on that of its arm.
      low, high = values.min(axis=0), values.max(axis=0)
      axes.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _width(plan):
  return plan.steps // EVALUATIONS


def _distances(axes, plan, part, arms, records):
  middles = (np.arange(EVALUATIONS) + 0.5) * _width(plan)
  for arm, style in zip(arms, _styles(arms).values()):
    if arm.imitates or arm.part:
      continue
    values = _stacked(records, plan, part, arm, "distances")
    # By stretch of steps: [seeds, stretches, all in it].
    values = values.reshape(plan.seeds, EVALUATIONS, -1)
    if not arm.is_gaf:
      low, high = np.nanmin(values, axis=(0, 2)), np.nanmax(values, axis=(0, 2))
      axes.fill_between(middles, low, high, color="0.9")
    mean = np.nanmean(values, axis=(0, 2))
    axes.plot(middles, mean, label=arm.label, linewidth=1.4, **style)
  axes.axhline(1, color="gray", linewidth=0.8, zorder=1)
