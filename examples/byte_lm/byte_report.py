"""Report: tables of what came out, from the traces of all runs."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

import byte_plots
from byte_text import CONTEXT
from common.arms import Arm, Part
from common.experiment import Experiment
from common.tables import FEWEST_SEEDS, Difference, aligned, spread, write_results


@dataclasses.dataclass(frozen=True)
class Summary:
  """What an arm came to; float64 arrays `[seeds]`, losses in bits per byte."""

  best: np.ndarray  # The lowest validation loss of all evaluations
  final: np.ndarray  # The validation loss after the last step
  training: np.ndarray  # The mean loss in the last tenth of the steps, of right sources
  accepted: np.ndarray  # The accepted share of all micro-gradients
  from_wrong: np.ndarray  # The share of the accepted that came from wrong sources
  taken: np.ndarray  # The share of the steps in which any were accepted
  first_distance: np.ndarray  # The mean distance in the first tenth of the steps
  last_distance: np.ndarray  # The mean distance in the last tenth
  largest_mean: np.ndarray  # The largest mean distance of a step
  largest: np.ndarray  # The largest distance of a micro-gradient

  @classmethod
  def of(cls, trace, wrong: np.ndarray, validation: np.ndarray) -> "Summary":
    """Of a `byte_training.Trace`, wrong `[seeds, steps, k]`, losses `[seeds, n]`."""
    seeds = zip(trace.loss, trace.distances, trace.accepted, wrong, validation)
    return cls(*np.array([_numbers(*seed) for seed in seeds], float).T)


def _numbers(loss, distances, accepted, wrong, validation):
  tenth = len(accepted) // 10
  return (
    validation.min(),
    validation[-1],
    loss[-tenth:][~wrong[-tenth:]].mean(dtype=float),
    accepted.mean(),
    (accepted & wrong).sum() / max(1, accepted.sum()),
    accepted.any(axis=1).mean(),
    np.nanmean(distances[:tenth], dtype=float),
    np.nanmean(distances[-tenth:], dtype=float),
    np.nanmean(distances, axis=1).max(),
    np.nanmax(distances),
  )


def write(
  path: pathlib.Path, text: str, experiments: Sequence[Experiment], rows: list[dict]
) -> str:
  """Writes `results.md`, `results.csv` and the plots; returns the text of the first.

  `text` describes the text, `rows` are the lines of the metrics file.
  """
  found = [_sizes(experiments[0].part, text)]
  lines = []
  for one in experiments:
    part = one.part
    wrong = np.stack([schedule.wrong for schedule in one.schedules])
    summaries = {
      arm: Summary.of(
        one.traces[arm.name],
        wrong & (not arm.clean),
        byte_plots.losses(rows, part, arm),
      )
      for arm in part.arms
    }
    found += [
      f"## {part.title[0].upper() + part.title[1:]}",
      results_table(part, summaries),
      differences_table(part, summaries),
      distances_table(summaries),
    ]
    lines += [
      {"part": part.name, "arm": arm.label, "seed": seed}
      | {name: values[seed] for name, values in vars(summary).items()}
      for arm, summary in summaries.items()
      for seed in range(part.seeds)
    ]
  byte_plots.draw(path, experiments, rows)
  return write_results(path, "\n\n".join(found) + "\n", lines)


def _sizes(part, text):
  seeds = "one seed" if part.seeds == 1 else f"{part.seeds} seeds"
  deviation = ", mean ± standard deviation" if part.seeds >= FEWEST_SEEDS else ""
  return (
    f"{text}. {part.num_microbatches} microbatches of {part.microbatch_size} x"
    f" {CONTEXT} bytes in each of {part.steps} steps, {seeds}{deviation}. Losses in"
    " bits per byte, lower is better. Differences are paired by seed, ± half of their"
    " 95 % confidence interval, bold where it excludes zero. Distances: their means"
    " over a tenth of the steps; the largest of all seeds."
  )


def results_table(part: Part, summaries: dict[Arm, Summary]) -> str:
  """A Markdown table with a line for each arm."""
  wrong = bool(part.wrong_sources)
  header = ["", "best validation loss", "final validation loss", "training loss"]
  lines = [[*header, "accepted", *["of these wrong"] * wrong, "steps taken"]]
  for arm, summary in summaries.items():
    line = [arm.label, *map(spread, (summary.best, summary.final, summary.training))]
    line.append(f"{summary.accepted.mean():.2f}")
    if wrong:
      line.append("" if arm.clean else f"{summary.from_wrong.mean():.2f}")
    lines.append([*line, f"{summary.taken.mean():.3f}"])
  return aligned(lines)


def differences_table(part: Part, summaries: dict[Arm, Summary]) -> str:
  """A Markdown table of what each GAF arm has before the others."""
  spared = [arm for arm in summaries if arm.clean]
  names = ["plain", "random choice", *["nothing wrong"] * len(spared)]
  measures = ("final", "best")
  lines = [["paired by seed", *(f"{m}, against {n}" for m in measures for n in names)]]
  for arm, summary in summaries.items():
    if arm.is_gaf:
      others = [part.arm("plain"), part.controls(arm.name)["choice"], *spared]
      lines.append([arm.label])
      for measure in measures:
        ours = getattr(summary, measure)
        theirs = [getattr(summaries[other], measure) for other in others]
        lines[-1] += [Difference.of(ours, other).marked for other in theirs]
  return aligned(lines)


def distances_table(summaries: dict[Arm, Summary]) -> str:
  """A Markdown table of cosine distances over training; controls have the plain's."""
  lines = [["cosine distance", "first tenth", "last tenth"]]
  lines[0] += ["largest mean of a step", "largest of a micro-gradient"]
  for arm, summary in summaries.items():
    if arm.imitates is None:
      line = [arm.label, *map(spread, (summary.first_distance, summary.last_distance))]
      line += [f"{summary.largest_mean.max():.3f}", f"{summary.largest.max():.3f}"]
      lines.append(line)
  return aligned(lines)
