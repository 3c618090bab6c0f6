"""Tables: paired differences over seeds, and Markdown and CSV files of results."""

import csv
import dataclasses
import io
import math
import pathlib
from typing import Any

import numpy as np
from scipy import stats

from common.storage import write_whole

# Fewer values than this say next to nothing about their spread.
FEWEST_SEEDS = 3


@dataclasses.dataclass(frozen=True)
class Difference:
  """Paired differences over seeds."""

  mean: float  # Of the differences
  # Half the width of its 95 % confidence interval, by Student's t; None with too few
  # seeds.
  margin: float | None

  @classmethod
  def of(cls, ours: np.ndarray, theirs: np.ndarray) -> "Difference":
    """Of two arrays `[seeds]`."""
    paired = np.asarray(ours, float) - np.asarray(theirs, float)
    n = len(paired)
    if n < FEWEST_SEEDS:
      return cls(float(paired.mean()), None)
    margin = stats.t.ppf(0.975, n - 1) * paired.std(ddof=1) / math.sqrt(n)
    return cls(float(paired.mean()), float(margin))

  @property
  def sign(self) -> int:
    """1 or -1 where the interval is on one side of zero, else 0."""
    if self.margin is None or abs(self.mean) <= self.margin:
      return 0
    return 1 if self.mean > 0 else -1

  def __str__(self):
    if self.margin is None:
      return f"{self.mean:+.3f}"
    return f"{self.mean:+.3f} ± {self.margin:.3f}"

  @property
  def marked(self) -> str:
    """In bold where it is significant."""
    return f"**{self}**" if self.sign else str(self)


def spread(values: np.ndarray) -> str:
  """Mean and standard deviation of `[seeds]`."""
  if len(values) < FEWEST_SEEDS:
    return f"{values.mean():.3f}"
  return f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"


def aligned(lines: list[list[str]]) -> str:
  """Markdown that can be read in a terminal too; the first line is the header."""
  widths = [max(map(len, column)) for column in zip(*lines)]
  lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
  return "\n".join(
    "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |"
    for line in lines
  )


def seed_rows(part: Any, arm: Any, summary: Any) -> list[dict[str, Any]]:
  """A dict for each seed of an arm: which it is, and the fields of its summary.

  `summary` is a dataclass of arrays `[seeds]`; None is written as nothing.
  """
  return [
    {"part": part.name, "title": part.title, "arm": arm.name, "label": arm.label}
    | {"role": arm.role, "imitates": arm.imitates or "", "seed": seed}
    | {
      name: "" if values is None else values[seed]
      for name, values in vars(summary).items()
    }
    for seed in range(part.seeds)
  ]


def write_results(path: pathlib.Path, text: str, table: list[dict[str, Any]]) -> str:
  """Writes `results.md` and, with a line for each dict, `results.csv`; the text."""
  write_whole(path / "results.md", text)
  write_csv(path / "results.csv", table)
  return text


def write_csv(path: pathlib.Path, table: list[dict[str, Any]]) -> None:
  """Writes a line for each dict, whose keys are all the same."""
  stream = io.StringIO()
  writer = csv.DictWriter(stream, table[0].keys(), lineterminator="\n")
  writer.writeheader()
  writer.writerows(table)
  write_whole(path, stream.getvalue())
