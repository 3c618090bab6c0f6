"""Plots: colours, bands and files that the figures of all examples share."""

import os
import pathlib

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Told apart with any colour vision (Okabe and Ito); black is the plain mean.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")

# Of labels in a legend, as many characters as fit three times into a line.
_SHORT = 45
# Of the simple rivals, which are grey.
_DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
# By control.
_LINES = {"steps": "--", "choice": "-.", "loss": ":", "right": "--"}


def styles(part) -> dict[str, dict]:
  """Line styles by arm: GAF in colours, its controls broken in them, rivals grey."""
  colors, dashes = (iter(one * len(part.arms)) for one in (COLORS, _DASHES))
  found: dict[str, dict] = {}
  for arm in part.arms:
    if arm.imitates is not None:
      linestyle = _LINES[arm.control]
      style = dict(color=found[arm.imitates]["color"], linestyle=linestyle)
    elif arm.is_gaf:
      style = dict(color=next(colors), linestyle="-")
    elif arm.role == "rival" and arm.name != "plain":
      style = dict(color="0.55", linestyle=next(dashes))
    else:
      style = dict(color="black", linestyle=":" if arm.clean else "-")
    found[arm.name] = style
  return found


def curves(rows, part, arm, field):
  """Steps `[n]` and values `[seeds, n]` of one field of the metrics file."""
  key = part.name, arm.name
  of_arm = [row for row in rows if (row["part"], row["arm"]) == key]
  steps = [row["step"] for row in of_arm if row["seed"] == 0]
  values = np.array([row[field] for row in of_arm], float)
  return np.array(steps), values.reshape(len(steps), part.seeds).T


def band(axes, steps, values, label, style):
  """The mean of `[seeds, n]`, and one standard deviation around it."""
  mean = values.mean(axis=0)
  axes.plot(steps, mean, label=label, linewidth=1.5, **style)
  if len(values) > 1:
    spread = values.std(axis=0, ddof=1)
    around = dict(color=style["color"], alpha=0.1, linewidth=0)
    axes.fill_between(steps, mean - spread, mean + spread, **around)


def interval(axes, at: float, difference, color: str, marker: str) -> None:
  """A `tables.Difference` at a height; hollow where it is not significant."""
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


def spread_note(part) -> str:
  if part.seeds == 1:
    return "one seed"
  return f"mean of {part.seeds} seeds, band: one standard deviation"


def orthogonal(axes) -> None:
  """A line at the distance 1."""
  axes.axhline(1, color="gray", linewidth=0.8, zorder=1)


def at_most_one(axes) -> None:
  """Takes off what of a band or bar leaves the range of a share."""
  axes.set_ylim(max(0, axes.get_ylim()[0]), min(1, axes.get_ylim()[1]))


def rolling(values: np.ndarray, width: int) -> np.ndarray:
  """Mean `[steps]` of the finite values of the last `width` steps and all seeds.

  NaN where there is none; `values` are `[seeds, steps]`.
  """
  finite = np.isfinite(values)
  total = np.cumsum(np.where(finite, values, 0).sum(axis=0, dtype=float))
  number = np.cumsum(finite.sum(axis=0))
  total[width:] -= total[:-width].copy()
  number[width:] -= number[:-width].copy()
  return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def save(figure: Figure, axes, path: pathlib.Path) -> None:
  """Writes a PNG with the legend of `axes` below, where it takes nothing from them."""
  handles, labels = axes.get_legend_handles_labels()
  longest = max(map(len, labels), default=0)
  figure.legend(
    handles,
    labels,
    loc="outside lower center",
    ncols=3 if longest <= _SHORT else 2,
    fontsize=8,
    frameon=False,
  )
  write(figure, path)


def write(figure: Figure, path: pathlib.Path) -> None:
  """Writes a PNG, whole or not at all."""
  partial = path.with_name(f".{path.name}.partial")
  FigureCanvasAgg(figure)
  figure.savefig(partial, format="png")
  os.replace(partial, path)
