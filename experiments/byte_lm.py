"""Byte language model with a wrong shard, or with single wrong documents.

`python experiments/byte_lm.py` trains a small transformer on the standard library's
source files; README.md beside this file describes the comparison.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

import byte_text
import charts
import report
import runs
from arms import GEOMETRIC_MEDIAN, PLAIN, RIGHT, RIVALS, Arm, Part, gaf_arms
from byte_text import KINDS
from byte_training import ByteTrainer
from shared import UserError

_EVALUATIONS = 10
_SHARDS, _WINDOWS = 8, 2  # Microbatches per step, and sequences in each
_EMA_DECAY, _SMOOTHING = 0.98, 0.1
_COMPARED = dict(by_example=True, rule="nearest_neighbors")
_SIGNALS = {"distances": "distance", "loss": "loss", "norms": "gradient norm"}


def _part(name: str, steps: int, seeds: int) -> Part:
  single = name == "documents"
  return Part(
    name=name,
    title=byte_text.PARTS[name],
    arms=tuple(_by_example() if single else _by_source(name)),
    wrong_sources=int(name in ("code-page", "shifted")),
    persistent=not single,
    microbatch_size=1 if single else _WINDOWS,
    num_microbatches=_SHARDS * _WINDOWS if single else _SHARDS,
    steps=steps,
    seeds=seeds,
    eval_every=steps // _EVALUATIONS,
  )


def _rivals(**settings) -> list[Arm]:
  smoothing, _, ema, _ = RIVALS
  changed = lambda arm, **more: dataclasses.replace(arm, **more, **settings)
  return [
    changed(PLAIN),
    changed(smoothing, label=f"label smoothing {_SMOOTHING}", smoothing=_SMOOTHING),
    changed(ema, label=f"weight EMA {_EMA_DECAY}", ema_decay=_EMA_DECAY),
  ]


def _by_source(name):
  memory = dict(memory_decay=0.98, rule="majority", adaptive=True)
  return [
    *_rivals(),
    GEOMETRIC_MEDIAN,
    *gaf_arms(_SHARDS, [], tau=1.0, rule="most_neighbors"),
    *gaf_arms(_SHARDS, ["choice", "loss"], **memory),
    *[RIGHT] * (name != "clean"),
  ]


def _by_example():
  # At tau 2 all are accepted, but distances are still computed.
  return [
    *_rivals(**_COMPARED),
    dataclasses.replace(GEOMETRIC_MEDIAN, by_example=True),
    *gaf_arms(2, quantile=1 - byte_text.WRONG_SHARE, **_COMPARED),
    *gaf_arms(2, [], adaptive=True, **_COMPARED),
    dataclasses.replace(RIGHT, by_example=True),
  ]


def summary(experiment: runs.Experiment, arm: Arm) -> dict[str, np.ndarray]:
  """Scores of an arm, `[seeds]`; losses in bits per byte.

  Validation losses: the final, the lowest, and the one at the lowest loss on held-out
  windows, which are as wrong as the training's. Shares: accepted; wrong among the
  accepted; steps taken.
  """
  accepted, curves = (
    experiment.traces[arm.name]["accepted"],
    experiment.curves[arm.name],
  )
  wrong = np.stack([schedule.wrong for schedule in experiment.schedules])
  validation, picked = curves["validation"], curves["held_out"].argmin(axis=1)
  number = accepted.sum(axis=(1, 2))
  return {
    "final": validation[:, -1],
    "best": validation.min(axis=1),
    "picked": np.take_along_axis(validation, picked[:, None], axis=1)[:, 0],
    "accepted": accepted.mean(axis=(1, 2)),
    "from_wrong": (accepted & wrong).sum(axis=(1, 2)) / np.maximum(number, 1),
    "taken": accepted.any(axis=2).mean(axis=1),
  }


def document_scores(signal: np.ndarray, documents: np.ndarray, number: int):
  """The mean of a signal over each document's sequences, NaN if never seen.

  The step's mean is subtracted, since loss and distance change during training.

  Args:
    signal: `[steps, k]`, NaN where it is missing.
    documents: int `[steps, k]`, which document each is from.
    number: of documents.
  """
  known = np.isfinite(signal)
  relative = signal - np.nanmean(signal, axis=1, keepdims=True, dtype=float)
  count = lambda weights: np.bincount(documents[known], weights, minlength=number)
  seen = count(None)
  return np.where(seen, count(relative[known]) / np.maximum(seen, 1), np.nan)


def areas(score: np.ndarray, kinds: np.ndarray) -> dict[str, float]:
  """Areas under ROC of scores `[documents]`: of all wrong ones, and of each kind."""
  found = {}
  for name, wrong in {
    "all wrong": kinds > 0,
    **{name: kinds == kind for kind, name in enumerate(KINDS) if kind},
  }.items():
    of = np.isfinite(score) & (wrong | (kinds == 0))
    both = len({*wrong[of]}) == 2
    found[name] = float(roc_auc_score(wrong[of], score[of])) if both else np.nan
  return found


def documents(experiment: runs.Experiment) -> list[dict[str, Any]]:
  """Areas under ROC of wrong documents, a line for each seed, arm and signal."""
  found = []
  for arm in experiment.part.arms:
    if not (arm.is_gaf or arm.name == "plain"):
      continue
    for field, signal in _SIGNALS.items():
      for seed, schedule in enumerate(experiment.schedules):
        values = experiment.traces[arm.name][field][seed]
        score = document_scores(values, schedule.documents[..., 0], len(schedule.kinds))
        names = {"signal": signal, "label": arm.label, "seed": seed}
        found.append(names | areas(score, schedule.kinds))
  return found


def sources(experiment: runs.Experiment, arm: Arm) -> str:
  """A Markdown table of `gaf_optax.sources` after the last step."""
  curves = experiment.curves[arm.name]
  wrong = np.stack([schedule.wrong[0] for schedule in experiment.schedules])
  lines = [["shards, after the last step", "agreement", "least", "most", "accepted"]]
  for name, chosen in (("right", ~wrong), ("wrong", wrong)):
    if chosen.any():
      agreement, rate = (
        np.stack([curves[f"source_{i + 1}/{x}"][:, -1] for i in range(_SHARDS)], axis=1)
        for x in ("agreement", "accept_rate")
      )
      of = agreement[chosen]
      numbers = of.mean(), of.min(), of.max(), rate[chosen].mean()
      lines.append([name, *(f"{number:.3f}" for number in numbers)])
  return report.aligned(lines)


def main(argv: list[str] | None = None) -> None:
  parser = runs.parser(__doc__.partition("\n")[0], "runs/byte-lm", "160", "5")
  parser.add_argument("--parts", nargs="+", choices=tuple(byte_text.PARTS))
  options = parser.parse_args(argv)
  steps, seeds = options.steps or 160, options.seeds or 5
  if steps % _EVALUATIONS:
    raise UserError(f"--steps {steps} is not a multiple of {_EVALUATIONS}.")
  names = [name for name in byte_text.PARTS if name in (options.parts or [name])]
  text = byte_text.load()
  trainer = ByteTrainer(text, steps, _SHARDS)
  experiments = [
    runs.Experiment(
      part,
      [byte_text.Schedule(text, part, seed) for seed in range(seeds)],
      lambda: trainer,
    )
    for part in (_part(name, steps, seeds) for name in names)
  ]
  out = options.out or pathlib.Path("runs", "byte-lm")
  asked = dict(parts=names, steps=steps, seeds=seeds, text=text.digest)
  runs.run_all(out, experiments, asked, options.resume)
  path = out / "byte-lm.csv"
  lines = [
    row
    for one in experiments
    for arm in one.part.arms
    for row in report.rows(one.part, arm, summary(one, arm))
  ]
  report.write_csv(path, lines)
  found = report.settings(path)
  charts.forest(path.with_suffix(".png"), "Byte language model, bits per byte", found)
  print(f"{text.description}. Scores are losses with a minus, in bits per byte.\n")
  print(report.table(found))
  for one in experiments:
    for arm in one.part.arms:
      if arm.has_memory:
        print(f"\n{one.part.title}:\n\n{sources(one, arm)}")
    if one.part.name == "documents":
      lines = documents(one)
      report.write_csv(out / "byte-lm-documents.csv", lines)
      print(f"\nArea under ROC of wrong documents:\n\n{documents_table(lines)}")
  print(f"The scores of all seeds and a picture are in {out}.")


def documents_table(lines: list[dict[str, Any]]) -> str:
  """A Markdown table of the means over the seeds of `documents`."""
  columns = ["all wrong", *KINDS[1:]]
  rows: dict[str, list[dict]] = {}
  for line in lines:
    rows.setdefault(f"{line['signal']}, {line['label']}", []).append(line)
  of = lambda seeds: [
    report.spread(np.array([line[name] for line in seeds])) for name in columns
  ]
  return report.aligned([["", *columns], *([k, *of(v)] for k, v in rows.items())])


if __name__ == "__main__":
  runs.main(main)
