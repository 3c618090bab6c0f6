"""Report: tables and sentences, computed from the metrics and traces of a run."""

import csv
import dataclasses
import io
import math
from typing import Any

import numpy as np
from scipy import stats

from storage import RunDirectory, write_whole

# Fewer values than this say next to nothing about their spread.
_FEWEST_SEEDS = 3


@dataclasses.dataclass(frozen=True)
class Summary:
  """What an arm came to; float arrays `[seeds]`.

  Attributes:
    best: the highest test accuracy of all evaluations.
    final: the test accuracy after the last step.
    accepted: the accepted share of all micro-gradients.
    updates: steps that changed the weights.
    from_wrong: the share of the accepted that came from wrong sources, NaN if
      nothing was accepted; None where no source is wrong.
  """

  best: np.ndarray
  final: np.ndarray
  accepted: np.ndarray
  updates: np.ndarray
  from_wrong: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Difference:
  """Paired differences over seeds.

  Attributes:
    mean: of the differences.
    spread: their standard deviation; None with too few seeds.
  """

  mean: float
  spread: float | None

  @classmethod
  def of(cls, ours: np.ndarray, theirs: np.ndarray) -> "Difference":
    """Of two arrays `[seeds]`."""
    paired = np.asarray(ours, float) - np.asarray(theirs, float)
    enough = len(paired) >= _FEWEST_SEEDS
    return cls(float(paired.mean()), float(paired.std(ddof=1)) if enough else None)

  @property
  def sign(self) -> int:
    """1 or -1 where the mean is larger than the spread, else 0."""
    if self.spread is None or abs(self.mean) <= self.spread:
      return 0
    return 1 if self.mean > 0 else -1

  def __str__(self):
    if self.spread is None:
      return f"{self.mean:+.3f}"
    return f"{self.mean:+.3f} ± {self.spread:.3f}"


def write(directory: RunDirectory, experiments: list[Any]) -> str:
  """Writes `results.md` and `results.csv`; returns the text of the former."""
  rows = directory.metrics()
  texts, table = [], []
  for experiment in experiments:
    part = experiment.part
    summaries = summarize(experiment, rows)
    texts.append(
      "\n".join(
        [
          f"## {part.title}",
          "",
          f"{part.num_microbatches} microbatches of {part.microbatch_size}"
          f"{_said_devices(part)}, {part.steps} steps; {_said_seeds(part.seeds)}.",
          "",
          results_table(part, summaries),
          "",
          comparison(part, summaries),
          "",
        ]
      )
    )
    for name, summary in summaries.items():
      for seed in range(part.seeds):
        table.append(
          {
            "part": part.name,
            "arm": name,
            "seed": seed,
            "best_accuracy": summary.best[seed],
            "final_accuracy": summary.final[seed],
            "accepted": summary.accepted[seed],
            "updates": summary.updates[seed],
          }
        )
  text = "\n".join(texts)
  write_whole(directory.path / "results.md", text)
  stream = io.StringIO()
  writer = csv.DictWriter(stream, table[0].keys(), lineterminator="\n")
  writer.writeheader()
  writer.writerows(table)
  write_whole(directory.path / "results.csv", stream.getvalue())
  return text


def _said_devices(part):
  if part.devices is None:
    return ""
  each = part.num_microbatches // part.devices
  return f", {each} on each of {part.devices} devices"


def _said_seeds(seeds):
  if seeds == 1:
    return "one seed"
  if seeds < _FEWEST_SEEDS:
    return f"mean over {seeds} seeds"
  return f"mean ± standard deviation over {seeds} seeds"


def summarize(experiment: Any, rows: list[dict]) -> dict[str, Summary]:
  """A `Summary` for each arm of a part, by name.

  Args:
    experiment: an `Experiment` that has run.
    rows: the lines of the metrics file.
  """
  part = experiment.part
  wrong = np.stack([schedule.wrong for schedule in experiment.schedules])
  summaries = {}
  for arm in part.arms:
    curves = [
      [
        row["test_accuracy"]
        for row in rows
        if (row["part"], row["arm"], row["seed"]) == (part.name, arm.name, seed)
      ]
      for seed in range(part.seeds)
    ]
    curves = np.array(curves)
    accepted = experiment.traces[arm.name].accepted
    number = accepted.sum(axis=(1, 2))
    from_wrong = None
    if part.wrong_sources and not arm.clean:
      share = (accepted & wrong).sum(axis=(1, 2)) / np.maximum(number, 1)
      from_wrong = np.where(number > 0, share, np.nan)
    summaries[arm.name] = Summary(
      best=curves.max(axis=1),
      final=curves[:, -1],
      accepted=accepted.mean(axis=(1, 2)),
      updates=accepted.any(axis=2).sum(axis=1),
      from_wrong=from_wrong,
    )
  return summaries


def results_table(part, summaries: dict[str, Summary]) -> str:
  """A Markdown table with a line for each arm."""
  header = ["", "best test accuracy", "final test accuracy", "accepted"]
  if part.wrong_sources:
    header.append("of these from wrong sources")
  lines = [header]
  for arm in part.arms:
    summary = summaries[arm.name]
    line = [
      arm.label,
      _spread(summary.best),
      _spread(summary.final),
      f"{summary.accepted.mean():.2f}",
    ]
    if part.wrong_sources:
      shares = summary.from_wrong
      line.append("" if shares is None else f"{shares.mean():.2f}")
    lines.append(line)
  return _aligned(lines)


def _aligned(lines):
  """Markdown that can be read in a terminal too; the first line is the header."""
  widths = [max(map(len, column)) for column in zip(*lines)]
  lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
  return "\n".join(
    "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |"
    for line in lines
  )


def _spread(values):
  if len(values) < _FEWEST_SEEDS:
    return f"{values.mean():.3f}"
  return f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"


def comparison(part, summaries: dict[str, Summary]) -> str:
  """A Markdown table of paired differences and what they allow to conclude."""
  lines = [
    [
      "paired by seed",
      "final, against plain",
      "final, against random",
      "best, against plain",
      "best, against random",
    ]
  ]
  found: dict[str, dict[str, tuple[Difference, Difference]]] = {}
  for control in part.arms:
    if control.imitates is None:
      continue
    label = part.arm(control.imitates).label
    line = [label]
    for measure in ("final", "best"):
      ours, plain, random = (
        getattr(summaries[name], measure)
        for name in (control.imitates, "plain", control.name)
      )
      differences = Difference.of(ours, plain), Difference.of(ours, random)
      found.setdefault(measure, {})[label] = differences
      line += map(str, differences)
    lines.append(line)
  paragraphs = [_aligned(lines)]
  paragraphs += [
    conclusion(measure, part.seeds, differences)
    for measure, differences in found.items()
  ]
  if part.wrong_sources:
    paragraphs.append(_sources(part, summaries))
  if part.seeds >= _FEWEST_SEEDS:
    paragraphs.append(
      f"With {part.seeds} seeds chance alone makes about"
      f" {chance_of_exceeding(part.seeds):.0%} of differences larger than their"
      " spread where there is none; more --seeds make that fewer."
    )
  return "\n\n".join(paragraphs)


def chance_of_exceeding(seeds: int) -> float:
  """How often a mean exceeds the standard deviation of its values by chance.

  Of `seeds` normal values around zero, in either direction: the mean over the
  deviation, times the root of their number, is Student's t.
  """
  return float(2 * stats.t.sf(math.sqrt(seeds), seeds - 1))


def conclusion(
  measure: str,
  seeds: int,
  versus: dict[str, tuple[Difference, Difference]],
) -> str:
  """The sentence on one measure.

  Args:
    measure: 'final' or 'best'.
    seeds: how many there are.
    versus: by arm, its difference to the plain mean and to its random control.
  """
  start = f"{measure.capitalize()} accuracy: "
  if seeds < _FEWEST_SEEDS:
    number = "one seed gives" if seeds == 1 else f"{seeds} seeds give"
    return start + (
      f"{number} no spread to compare the differences with, so they allow no"
      " conclusion."
    )

  def having(signs):
    return [
      label
      for label, differences in versus.items()
      if tuple(d.sign for d in differences) == signs
    ]

  verdicts = (
    (
      (1, 1),
      "above the plain mean and above its random control too: which"
      " micro-gradients are left out matters",
    ),
    (
      (1, 0),
      "above the plain mean, but not told apart from its random control:"
      " how much is left out is enough to explain it",
    ),
    (
      (1, -1),
      "above the plain mean, but below its random control: leaving out as"
      " much at random does better",
    ),
    ((0, 1), "not told apart from the plain mean, though above its random control"),
    ((0, 0), "told apart neither from the plain mean nor from its random control"),
    ((0, -1), "not told apart from the plain mean, and below its random control"),
    (
      (-1, 1),
      "below the plain mean, though above its random control: it chooses"
      " well, but leaving out as much costs more",
    ),
    ((-1, 0), "below the plain mean, and not told apart from its random control"),
    ((-1, -1), "below the plain mean and below its random control"),
  )
  said = [
    f"{_listed(names)} {'is' if len(names) == 1 else 'are each'} {verdict}"
    for signs, verdict in verdicts
    if (names := having(signs))
  ]
  return start + (
    f"counting only differences larger than their spread over the {seeds} seeds, "
    + "; ".join(said)
    + "."
  )


def _sources(part, summaries):
  """The sentence on what was accepted, and on how much of the harm remains."""
  words = {1: "above", 0: "not told apart from", -1: "below"}
  found = []
  for control in part.arms:
    if control.imitates is None:
      continue
    ours = summaries[control.imitates]
    if np.isnan(ours.from_wrong).all():
      continue  # Nothing was accepted.
    gap = Difference.of(ours.final, summaries["clean"].final)
    verdict = "" if gap.spread is None else f" ({words[gap.sign]} it)"
    found.append(
      f"{np.nanmean(ours.from_wrong):.0%} of what"
      f" {part.arm(control.imitates).label} accepted, whose final accuracy is"
      f" {gap} against the plain mean with nothing wrong{verdict}"
    )
  share = part.wrong_sources / part.num_microbatches
  return (
    "; ".join([f"Wrong sources: they gave {share:.0%} of all micro-gradients", *found])
    + "."
  )


def _listed(names):
  return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
