"""Report: tables of what came out, from the records of all runs."""

import csv
import dataclasses
import io
import math
import pathlib

import numpy as np
from scipy import stats

import byte_plots
from byte_arms import Arm
from byte_runs import Plan, Records, write_whole
from byte_text import CONTEXT, PARTS

# Fewer values than this say next to nothing about their spread.
_FEWEST_SEEDS = 3


@dataclasses.dataclass(frozen=True)
class Summary:
  """What an arm came to; float64 arrays `[seeds]`, losses in bits per byte.

  Attributes:
    best: the lowest validation loss of all evaluations.
    final: the validation loss after the last step.
    training: the mean loss in the last tenth of the steps, of right sources.
    accepted: the accepted share of all micro-gradients.
    from_wrong: the share of the accepted that came from wrong sources.
    taken: the share of the steps in which any were accepted.
    first_distance: the mean distance in the first tenth of the steps.
    last_distance: the mean distance in the last tenth.
    largest_mean: the largest mean distance of a step.
    largest: the largest distance of a micro-gradient.
  """

  best: np.ndarray
  final: np.ndarray
  training: np.ndarray
  accepted: np.ndarray
  from_wrong: np.ndarray
  taken: np.ndarray
  first_distance: np.ndarray
  last_distance: np.ndarray
  largest_mean: np.ndarray
  largest: np.ndarray

  @classmethod
  def of(cls, records: list[dict[str, np.ndarray]]) -> "Summary":
    """Of the records of all seeds, see `byte_runs.Records`."""
    return cls(*np.array([_numbers(record) for record in records], float).T)


def _numbers(record):
  accepted, wrong, distances = (
    record[name] for name in ("accepted", "wrong", "distances")
  )
  tenth = len(accepted) // 10
  return (
    record["validation"].min(),
    record["validation"][-1],
    record["loss"][-tenth:][~wrong[-tenth:]].mean(dtype=float),
    accepted.mean(),
    (accepted & wrong).sum() / max(1, accepted.sum()),
    accepted.any(axis=1).mean(),
    np.nanmean(distances[:tenth], dtype=float),
    np.nanmean(distances[-tenth:], dtype=float),
    np.nanmean(distances, axis=1).max(),
    np.nanmax(distances),
  )


def write(path: pathlib.Path, plan: Plan, text: str, records: Records) -> str:
  """Writes `results.md`, `results.csv` and the plots; returns the text of the first.

  Args:
    path: of the output directory.
    plan: what was run.
    text: description of the text.
    records: of all runs.
  """
  found = [_sizes(plan, text)]
  lines = []
  for part, arms in plan.arms().items():
    summaries = {
      arm: Summary.of(
        [records[arm.part or part, arm.name, seed] for seed in range(plan.seeds)]
      )
      for arm in arms
    }
    found += [
      f"## {PARTS[part][0].upper() + PARTS[part][1:]}",
      results_table(part, summaries),
      differences_table(summaries),
      distances_table(summaries),
    ]
    lines += [
      {"part": part, "arm": arm.label, "seed": seed}
      | {name: values[seed] for name, values in vars(summary).items()}
      for arm, summary in summaries.items()
      for seed in range(plan.seeds)
    ]
  said = "\n\n".join(found) + "\n"
  write_whole(path / "results.md", said.encode())
  stream = io.StringIO()
  writer = csv.DictWriter(stream, lines[0], lineterminator="\n")
  writer.writeheader()
  writer.writerows(lines)
  write_whole(path / "results.csv", stream.getvalue().encode())
  byte_plots.draw(path, plan, records)
  return said


def _sizes(plan, text):
  seeds = "one seed" if plan.seeds == 1 else f"{plan.seeds} seeds"
  spread = ", mean ± standard deviation" if plan.seeds >= _FEWEST_SEEDS else ""
  return (
    f"{text}. {plan.num_microbatches} microbatches of {plan.microbatch_size} x"
    f" {CONTEXT} bytes in each of {plan.steps} steps, {seeds}{spread}. Losses in bits"
    " per byte, lower is better. Differences are paired by seed, ± half of their 95 %"
    " confidence interval, bold where it leaves out zero. Distances: their means over"
    " a tenth of the steps; the largest of all seeds."
  )


def results_table(part: str, summaries: dict[Arm, Summary]) -> str:
  """A Markdown table with a line for each arm."""
  header = ["", "best validation loss", "final validation loss", "training loss"]
  header += ["accepted", *["of these wrong"] * (part != "clean"), "steps taken"]
  lines = [header]
  for arm, summary in summaries.items():
    line = [arm.label, *map(_spread, (summary.best, summary.final, summary.training))]
    line.append(f"{summary.accepted.mean():.2f}")
    if part != "clean":
      line.append("" if arm.part else f"{summary.from_wrong.mean():.2f}")
    lines.append([*line, f"{summary.taken.mean():.3f}"])
  return _markdown(lines)


def differences_table(summaries: dict[Arm, Summary]) -> str:
  """A Markdown table of what each GAF arm has before the others."""
  by_name = {arm.name: summary for arm, summary in summaries.items() if not arm.part}
  spared = [summary for arm, summary in summaries.items() if arm.part]
  controls = {
    arm.imitates.name: summary for arm, summary in summaries.items() if arm.imitates
  }
  names = ["plain", "random choice", *["nothing wrong"] * len(spared)]
  measures = ("final", "best")
  lines = [["paired by seed", *(f"{m}, against {n}" for m in measures for n in names)]]
  for arm, summary in summaries.items():
    if arm.is_gaf:
      others = [by_name["plain"], controls[arm.name], *spared]
      lines.append([arm.label])
      for measure in measures:
        ours = getattr(summary, measure)
        lines[-1] += [difference(ours, getattr(o, measure)) for o in others]
  return _markdown(lines)


def distances_table(summaries: dict[Arm, Summary]) -> str:
  """A Markdown table of cosine distances over training; controls have the plain's."""
  lines = [["cosine distance", "first tenth", "last tenth"]]
  lines[0] += ["largest mean of a step", "largest of a micro-gradient"]
  for arm, summary in summaries.items():
    if arm.imitates is None:
      line = [
        arm.label,
        _spread(summary.first_distance),
        _spread(summary.last_distance),
      ]
      line += [f"{summary.largest_mean.max():.3f}", f"{summary.largest.max():.3f}"]
      lines.append(line)
  return _markdown(lines)


def difference(ours: np.ndarray, theirs: np.ndarray) -> str:
  """Mean of paired differences `[seeds]` ± half of its 95 % t-interval."""
  paired = ours - theirs
  n = len(paired)
  if n < _FEWEST_SEEDS:
    return f"{paired.mean():+.3f}"
  margin = stats.t.ppf(0.975, n - 1) * paired.std(ddof=1) / math.sqrt(n)
  said = f"{paired.mean():+.3f} ± {margin:.3f}"
  return f"**{said}**" if abs(paired.mean()) > margin else said


def _spread(values):
  if len(values) < _FEWEST_SEEDS:
    return f"{values.mean():.3f}"
  return f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"


def _markdown(lines):
  lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)
