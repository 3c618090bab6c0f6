"""Report: tables of what came out, from the traces of all runs."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

import byte_documents
import byte_plots
from byte_text import CONTEXT
from common.arms import Arm, Part
from common.experiment import Experiment
from common.tables import (
  FEWEST_SEEDS,
  Difference,
  aligned,
  seed_rows,
  spread,
  write_results,
)

_MEASURES = ("final", "best", "picked")
_LOSSES = ("validation", "held_out")


@dataclasses.dataclass(frozen=True)
class Summary:
  """What an arm came to; float64 arrays `[seeds]`, losses in bits per byte."""

  final: np.ndarray  # The validation loss after the last step
  best: np.ndarray  # The lowest validation loss of all evaluations
  picked: np.ndarray  # The validation loss where that on the held-out data is lowest
  accepted: np.ndarray  # The accepted share of all micro-gradients
  from_wrong: np.ndarray  # The share of the accepted that came from wrong documents
  taken: np.ndarray  # The share of the steps in which any were accepted

  @classmethod
  def of(
    cls,
    accepted: np.ndarray,
    wrong: np.ndarray,
    validation: np.ndarray,
    held_out: np.ndarray,
  ) -> "Summary":
    """Of masks `[seeds, steps, k]` and losses `[seeds, evaluations]`."""
    picked = np.argmin(held_out, axis=1)[:, None]
    number = accepted.sum(axis=(1, 2))
    return cls(
      final=validation[:, -1],
      best=validation.min(axis=1),
      picked=np.take_along_axis(validation, picked, axis=1)[:, 0],
      accepted=accepted.mean(axis=(1, 2)),
      from_wrong=(accepted & wrong).sum(axis=(1, 2)) / np.maximum(number, 1),
      taken=accepted.any(axis=2).mean(axis=1),
    )


def write(
  path: pathlib.Path, text: str, experiments: Sequence[Experiment], rows: list[dict]
) -> str:
  """Writes `results.md`, `results.csv` and the plots; returns the text of the first.

  Where single documents are wrong, `documents.md` and `documents.csv` too. `text`
  describes the text, `rows` are the lines of the metrics file.
  """
  found, lines, of_parts = [_sizes(experiments[0].part, text)], [], []
  for one in experiments:
    part = one.part
    wrong = np.stack([schedule.wrong for schedule in one.schedules])
    summaries = {
      arm: Summary.of(
        one.traces[arm.name].accepted,
        wrong,
        *(byte_plots.curve(rows, part, arm, f"{of}_loss") for of in _LOSSES),
      )
      for arm in part.arms
    }
    of_parts.append((part, summaries))
    found += [f"## {_capitalized(part.title)}", results_table(part, summaries)]
    found += [
      differences_table(arm, part, summaries) for arm in part.arms if arm.is_gaf
    ]
    found += [
      sources_table(part, arm, wrong[:, 0], rows)
      for arm in part.arms
      if arm.memory_decay is not None and not arm.imitates
    ]
    if part.name == "documents":
      found += byte_documents.write(path, one)
    for arm, summary in summaries.items():
      lines += seed_rows(part, arm, summary)
  byte_plots.draw(path, experiments, of_parts, rows)
  return write_results(path, "\n\n".join(found) + "\n", lines)


def _capitalized(title):
  return title[0].upper() + title[1:]


def _sizes(part, text):
  seeds = "one seed" if part.seeds == 1 else f"{part.seeds} seeds"
  deviation = ", mean ± standard deviation" if part.seeds >= FEWEST_SEEDS else ""
  size = part.num_microbatches * part.microbatch_size
  return (
    f"{text}. {size} windows of {CONTEXT} bytes in each of {part.steps} steps,"
    f" {seeds}{deviation}. Losses in bits per byte, lower is better: final, best of"
    f" {byte_plots.EVALUATIONS} evaluations, and at the one picked by held-out windows"
    " that are as wrong as the training's. Differences are paired by seed, ± half of"
    " their 95 % confidence interval, bold where it excludes zero."
  )


def results_table(part: Part, summaries: dict[Arm, Summary]) -> str:
  """A Markdown table with a line for each arm."""
  wrong = part.name != "clean"
  header = ["", *_MEASURES, "accepted", *["of these wrong"] * wrong, "steps taken"]
  lines = [header]
  for arm, summary in summaries.items():
    line = [arm.label, *(spread(getattr(summary, name)) for name in _MEASURES)]
    line.append(f"{summary.accepted.mean():.2f}")
    if wrong:
      line.append(f"{summary.from_wrong.mean():.3f}")
    lines.append([*line, f"{summary.taken.mean():.3f}"])
  return aligned(lines)


def differences_table(arm: Arm, part: Part, summaries: dict[Arm, Summary]) -> str:
  """A Markdown table of what a GAF arm has before the others, its own controls too."""
  lines = [[f"{arm.label}, minus", *_MEASURES]]
  for other in part.arms:
    if other.imitates in (None, arm.name, "plain") and other != arm:
      pairs = [
        [getattr(summaries[one], name) for one in (arm, other)] for name in _MEASURES
      ]
      lines.append([other.label, *(Difference.of(*pair).marked for pair in pairs)])
  return aligned(lines)


def sources_table(part: Part, arm: Arm, wrong: np.ndarray, rows: list[dict]) -> str:
  """A Markdown table of `gaf_optax.sources` after the last step.

  `wrong` `[seeds, k]` says which they are.
  """
  sources = range(1, part.num_microbatches + 1)
  last = lambda field: byte_plots.curve(rows, part, arm, field)[:, -1]
  columns = [
    np.stack([last(f"source_{i}/{name}") for i in sources], axis=1)
    for name in ("agreement", "accept_rate")
  ]  # [seeds, k] each
  lines = [["shards, after the last step", "agreement", "least", "most", "accepted"]]
  for name, chosen in (("right", ~wrong), ("wrong", wrong)):
    if chosen.any():
      agreement, rate = (column[chosen] for column in columns)
      numbers = agreement.mean(), agreement.min(), agreement.max(), rate.mean()
      lines.append([name, *(f"{number:.3f}" for number in numbers)])
  return aligned(lines)
