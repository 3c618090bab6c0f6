"""Scores of all seeds as CSV, and GAF's gains over chance and rivals."""

import csv
import dataclasses
import io
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from runs import write_whole

# Fewer values than this hardly determine their spread.
FEWEST_SEEDS = 3
SCORES = ("final", "picked")
# Signals that separate wrong examples from right ones.
SIGNALS = ("distance", "loss", "gradient norm")
# Files whose scores are losses.
_LOSSES = ("byte-lm",)


@dataclasses.dataclass(frozen=True)
class Difference:
  """The mean of paired differences over seeds.

  Attributes:
    mean: of the differences.
    margin: half the width of its 95 % interval by Student's t; None with few seeds.
  """

  mean: float
  margin: float | None

  @classmethod
  def of(cls, ours: np.ndarray, theirs: np.ndarray | float = 0.0) -> "Difference":
    """The difference of arrays `[seeds]`."""
    paired = np.asarray(ours, float) - theirs
    if len(paired) < FEWEST_SEEDS:
      return cls(float(paired.mean()), None)
    margin = stats.t.ppf(0.975, len(paired) - 1) * stats.sem(paired)
    return cls(float(paired.mean()), float(margin))

  @property
  def sign(self) -> int:
    """1 or -1 if the interval is on one side of zero, else 0."""
    if self.margin is None or abs(self.mean) <= self.margin:
      return 0
    return 1 if self.mean > 0 else -1

  def __str__(self):
    """In bold if significant."""
    if self.margin is None:
      return f"{self.mean:+.3f}"
    said = f"{self.mean:+.3f} ± {self.margin:.3f}"
    return f"**{said}**" if self.sign else said


@dataclasses.dataclass(frozen=True)
class Result:
  """Scores of an arm in one setting.

  Attributes:
    part, title: name of the setting, for files and for people.
    arm, label: name of the arm, likewise.
    role: 'gaf', 'rival', 'chance' or 'ideal'; see `arms.Arm`.
    imitates: name of the arm that this one is a control of, or ''.
    scores: by column, `[seeds]`; higher is better. NaN if missing.
  """

  part: str
  title: str
  arm: str
  label: str
  role: str
  imitates: str
  scores: dict[str, np.ndarray]

  def mean(self, column: str) -> float:
    values = self.scores.get(column, np.array([np.nan]))
    return float(np.mean(values))


Setting = dict[str, Result]  # By arm


def rows(part: Any, arm: Any, summary: dict[str, np.ndarray | None]) -> list[dict]:
  """A line of CSV for each seed of an arm; `summary` has arrays `[seeds]`."""
  return [
    {"part": part.name, "title": part.title, "arm": arm.name, "label": arm.label}
    | {"role": arm.role, "imitates": arm.imitates or "", "seed": seed}
    | {k: "" if values is None else values[seed] for k, values in summary.items()}
    for seed in range(part.seeds)
  ]


def write_csv(path: pathlib.Path, lines: Sequence[dict[str, Any]]) -> None:
  """Writes lines that have the same keys."""
  stream = io.StringIO()
  writer = csv.DictWriter(stream, lines[0].keys(), lineterminator="\n")
  writer.writeheader()
  writer.writerows(lines)
  write_whole(path, stream.getvalue().encode())


def read_csv(path: pathlib.Path) -> list[dict[str, str]]:
  with open(path, encoding="utf-8", newline="") as file:
    return list(csv.DictReader(file))


def settings(path: pathlib.Path) -> list[Setting]:
  """All settings of a file of results."""
  found: dict[str, dict[str, list[dict]]] = {}
  for line in read_csv(path):
    found.setdefault(line["part"], {}).setdefault(line["arm"], []).append(line)
  sign = -1 if path.stem in _LOSSES else 1
  names = [field.name for field in dataclasses.fields(Result)][:-1]

  def result(lines):
    scores = {
      name: np.array([float(line[name] or "nan") for line in lines])
      for name in lines[0].keys() - {*names, "seed", "claim"}
    }
    for name in scores.keys() & {*SCORES, "best"}:
      scores[name] *= sign
    return Result(*(lines[0][name] for name in names), scores)

  return [{arm: result(of) for arm, of in arms.items()} for arms in found.values()]


@dataclasses.dataclass(frozen=True)
class Gain:
  """The gain of a GAF arm in one score.

  Attributes:
    result: of the arm.
    plain: over the plain mean.
    chance: over the better of its random controls; None without a control.
    rival: over the rival with the highest mean, which a user cannot know.
    best: the label of that rival.
  """

  result: Result
  plain: Difference
  chance: Difference | None
  rival: Difference
  best: str

  @property
  def verdict(self) -> str:
    """'beats' chance and rival significantly, 'loses' to one of them, or 'ties'."""
    signs = self.chance.sign, self.rival.sign
    return "loses" if -1 in signs else "beats" if signs == (1, 1) else "ties"


def gains(setting: Setting, score: str) -> list[Gain]:
  """The gains of all GAF arms of a setting."""
  best = lambda some: max(some, key=lambda one: one.mean(score), default=None)
  plain = next(iter(setting.values()))
  rival = best([one for one in setting.values() if one.role == "rival"])
  found = []
  for ours in setting.values():
    if ours.role != "gaf":
      continue
    chance = best(
      [
        one
        for one in setting.values()
        if one.role == "chance" and one.imitates == ours.arm
      ]
    )
    less = lambda one: one and Difference.of(ours.scores[score], one.scores[score])
    found.append(Gain(ours, less(plain), less(chance), less(rival), short(rival.label)))
  return found


def short(label: str) -> str:
  """The label of an arm without the imitated arm, but with a share that it is told."""
  what, _, imitated = label.partition(", as m")
  if told := re.search(r"best (\S+%)", imitated):
    what += f" of {told[1]}"
  return what + ", weight EMA" * imitated.endswith(", weight EMA")


def table(found: Sequence[Setting]) -> str:
  """A Markdown table: every arm except chance, and the gains of the GAF arms."""
  header = ["", "accepted", "of these wrong"]
  for score in SCORES:
    header += [score, "- plain mean", "- chance", "- best rival"]
  lines = [header]
  for setting in found:
    title = next(iter(setting.values())).title
    lines.append([f"**{title}**", *[""] * (len(header) - 1)])
    by_score = {
      score: {gain.result.arm: gain for gain in gains(setting, score)}
      for score in SCORES
    }
    for one in setting.values():
      if one.role == "chance":
        continue
      line = [one.label, *(_share(one.mean(x)) for x in ("accepted", "from_wrong"))]
      for score in SCORES:
        line.append(spread(one.scores[score]))
        gain = by_score[score].get(one.arm)
        line += [""] * 3 if gain is None else _said(gain)
      lines.append(line)
  return aligned(lines)


def _said(gain):
  return [str(gain.plain), str(gain.chance or ""), f"{gain.rival} ({gain.best})"]


def _share(value):
  return "" if np.isnan(value) else f"{value:.2f}"


def spread(values: np.ndarray) -> str:
  """Mean and standard deviation of `[seeds]`."""
  if len(values) < FEWEST_SEEDS:
    return f"{values.mean():.3f}"
  return f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"


def aligned(lines: list[list[str]]) -> str:
  """Markdown that is also readable in a terminal; the first line is the header."""
  widths = [max(map(len, column)) for column in zip(*lines)]
  lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
  return "\n".join(
    "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |"
    for line in lines
  )
