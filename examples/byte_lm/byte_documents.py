"""Documents: which are far from the others, and whether those are the wrong ones."""

import pathlib

import numpy as np
from sklearn.metrics import roc_auc_score

from byte_text import KINDS
from common.experiment import Experiment
from common.storage import write_whole
from common.tables import aligned, spread, write_csv

SIGNALS = {"distances": "distance", "loss": "loss", "norms": "gradient norm"}
_LISTED = 20


def scores(signal: np.ndarray, documents: np.ndarray, number: int) -> np.ndarray:
  """The mean of a signal over each document's sequences, NaN of those never seen.

  Less the mean of its step, since loss and distance change in the course of training.

  Args:
    signal: `[steps, k]`, NaN where it is not known.
    documents: int `[steps, k]`, which one each is of.
    number: of documents.
  """
  known = np.isfinite(signal)
  relative = signal - np.nanmean(signal, axis=1, keepdims=True, dtype=float)
  count = lambda weights: np.bincount(documents[known], weights, minlength=number)
  seen = count(None)
  return np.where(seen, count(relative[known]) / np.maximum(seen, 1), np.nan)


def areas(score: np.ndarray, kinds: np.ndarray) -> list[float]:
  """Areas under ROC of scores `[documents]`: of all wrong ones, and of each kind."""
  found = []
  for wrong in (kinds > 0, *(kinds == kind for kind in range(1, len(KINDS)))):
    of = np.isfinite(score) & (wrong | (kinds == 0))
    both = len({*wrong[of]}) == 2
    found.append(roc_auc_score(wrong[of], score[of]) if both else np.nan)
  return found


def write(path: pathlib.Path, one: Experiment) -> list[str]:
  """Writes `documents.csv` and, of the first seed, `documents.md`; tables of areas."""
  listed = listed_arm(one.part)
  watched = [arm for arm in one.part.arms if arm.is_gaf or arm.name == "plain"]
  lines = [["area under ROC, by mean", "all wrong", *KINDS[1:], "wrong among worst"]]
  table: list[dict] = []
  for arm in watched:
    found = [of_seed(one, arm, seed) for seed in range(one.part.seeds)]
    for name in found[0]:
      each = [areas(of[name], s.kinds) for of, s in zip(found, one.schedules)]
      worst = [precision(of[name], s.kinds) for of, s in zip(found, one.schedules)]
      columns = [*np.array(each).T, np.array(worst)]
      lines.append([f"{name}, {arm.label}", *map(spread, columns)])
    if arm == listed:
      for seed, (of, schedule) in enumerate(zip(found, one.schedules)):
        table += _lines(of, schedule, seed)
  write_csv(path / "documents.csv", table)
  first = [line for line in table if line["seed"] == 0 and line["seen"]]
  write_whole(path / "documents.md", _listing(first, listed))
  return [aligned(lines)]


def listed_arm(part):
  """The arm whose distances the list of documents is made of: the first of GAF."""
  return next(arm for arm in part.arms if arm.is_gaf)


def of_seed(one, arm, seed):
  """The scores of an arm's documents by what they are made of."""
  trace, schedule = one.traces[arm.name], one.schedules[seed]
  of = lambda name: scores(
    getattr(trace, name)[seed], schedule.documents[..., 0], len(schedule.kinds)
  )
  return {said: of(name) for name, said in SIGNALS.items()}


def precision(score: np.ndarray, kinds: np.ndarray) -> float:
  """The wrong share of the documents with the highest scores, as many as are wrong."""
  seen = np.isfinite(score)
  worst = np.argsort(-score[seen], kind="stable")[: (kinds[seen] > 0).sum()]
  return float((kinds[seen][worst] > 0).mean())


def _lines(of, schedule, seed):
  seen = np.bincount(schedule.documents.ravel(), minlength=len(schedule.kinds))
  return [
    {"seed": seed, "document": name, "targets": KINDS[schedule.kinds[i]]}
    | {"seen": int(seen[i])}
    | {said: round(float(score[i]), 4) for said, score in of.items()}
    for i, name in enumerate(schedule.names)
  ]


def _listing(lines, arm):
  """Markdown of the documents that are farthest and nearest."""
  ordered = sorted(lines, key=lambda line: -line["distance"])
  found = [
    f"Seed 0, {arm.label}: the {len(lines)} documents that were seen, by the mean"
    " distance of their sequences, less the mean of the step."
  ]
  for title, some in (
    ("farthest", ordered[:_LISTED]),
    ("nearest", ordered[: -_LISTED - 1 : -1]),
  ):
    wrong = sum(line["targets"] != KINDS[0] for line in some)
    found.append(f"The {len(some)} {title}, of which {wrong} are wrong:")
    table = [["document", "targets", "seen", "distance", "loss"]]
    table += [
      [line["document"], line["targets"], str(line["seen"])]
      + [f"{line[name]:+.3f}" for name in ("distance", "loss")]
      for line in some
    ]
    found.append(aligned(table))
  return "\n\n".join(found) + "\n"
