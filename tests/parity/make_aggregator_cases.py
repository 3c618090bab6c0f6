"""Records Krum and the geometric median of two PyTorch packages.

The packages are `byzfl` 0.0.11 and `torchjd` 0.18.0. `test_parity.py` compares
`rules.multi_krum` and `rules.geometric_median` with the record, `aggregators.json`. Run
by hand, in a separate environment, and never in CI:

    python -m venv /tmp/aggregators
    /tmp/aggregators/bin/pip install byzfl==0.0.11 torchjd==0.18.0
    /tmp/aggregators/bin/python tests/parity/make_aggregator_cases.py

Recorded rows have three decimals, and are multiplied by a power of two before use. The
scores of the last kept and the first dropped row differ by more than 1e-3, relatively,
so that rounding does not matter.
"""

import importlib.metadata
import json
import pathlib

import byzfl
import numpy as np
import torch
from torchjd.aggregation import KrumWeighting

OUTPUT = pathlib.Path(__file__).with_name("aggregators.json")
SIZE, MARGIN = 6, 1e-3


def make(rng, kind, k, num_wrong):
  """Rows `[k, SIZE]`, the wrong ones first."""
  rows = rng.normal(size=SIZE) + 0.5 * rng.normal(size=(k, SIZE))
  if kind == "noise":
    rows = rng.normal(size=(k, SIZE))
  elif kind == "opposed":
    rows[:num_wrong] *= -3
  elif kind == "outliers":  # Far away, in different directions.
    rows[:num_wrong] = 1000 * rng.normal(size=(num_wrong, SIZE))
  elif kind == "together":  # Far away, and near each other.
    rows[:num_wrong] = 20 * rng.normal(size=SIZE) + 0.01 * rows[:num_wrong]
  elif kind == "lengths":
    rows *= rng.choice([0.1, 1, 10], size=(k, 1))
  return np.round(rows, 3)


def scores(rows, num_near, power):
  """Sums of a power of the distances to the nearest others."""
  apart = np.linalg.norm(rows[:, None] - rows[None], axis=2) ** power
  return np.sort(apart, axis=1)[:, 1 : num_near + 1].sum(1)


def kept(scores, number):
  return sorted(np.argsort(scores)[:number].tolist())


def is_clear(scores, number):
  inside, outside = np.sort(scores)[number - 1 : number + 1]
  return outside - inside > MARGIN * outside


def short(vector):
  return [float(f"{x:.9g}") for x in vector]


def krum_case(rng, kind, k, num_wrong, scale, differs=False):
  """A case; with `differs`, the paper keeps other rows than both packages."""
  while True:
    rows = make(rng, kind, k, num_wrong)
    number = k - num_wrong
    paper = scores(rows, k - num_wrong - 2, power=2)
    one_more = scores(rows, k - num_wrong - 1, power=2)
    unsquared = scores(rows, k - num_wrong - 2, power=1)
    numbers = (1, number)
    if not all(is_clear(s, n) for s in (paper, one_more, unsquared) for n in numbers):
      continue
    by_definition = [kept(s, number) for s in (paper, one_more, unsquared)]
    if differs:
      if by_definition[0] not in by_definition[1:]:
        break
    elif all(kept(paper, n) == kept(unsquared, n) for n in numbers):
      break
  vectors = rows * 2.0**scale
  gramian = torch.tensor(vectors @ vectors.T)
  weights = [KrumWeighting(num_wrong, n)(gramian).numpy() for n in numbers]
  return {
    "kind": kind,
    "num_wrong": num_wrong,
    "scale": scale,
    "rows": rows.tolist(),
    "byzfl_krum": short(byzfl.Krum(num_wrong)(vectors) / 2.0**scale),
    "byzfl_multi_krum": short(byzfl.MultiKrum(num_wrong)(vectors) / 2.0**scale),
    "torchjd_krum": np.flatnonzero(weights[0]).tolist(),
    "torchjd_multi_krum": np.flatnonzero(weights[1]).tolist(),
  }


def median_case(rng, kind, k, num_wrong):
  """Starts at the mean of the rows; byzfl starts at zero."""
  rows = make(rng, kind, k, num_wrong)
  center = rows.mean(0)
  median = lambda number: byzfl.GeometricMedian(nu=1e-9, T=number)(rows - center)
  result = median(5000)
  # It has converged.
  assert np.linalg.norm(result - median(4000)) < 1e-12 * np.linalg.norm(rows)
  return {
    "kind": kind,
    "num_wrong": num_wrong,
    "rows": rows.tolist(),
    "after_8": short(median(8) + center),
    "converged": short(result + center),
  }


def main():
  rng = np.random.default_rng(0)
  krum = [
    krum_case(rng, kind, k, num_wrong, scale)
    for k, num_wrong, scale in [(8, 2, -30), (11, 3, 30)]
    for kind in ("noise", "opposed", "outliers", "together", "lengths")
  ]
  differing = krum_case(rng, "noise", 8, 2, 0, differs=True)
  medians = [
    median_case(rng, kind, k, num_wrong)
    for k, num_wrong in [(8, 2), (11, 4)]
    for kind in ("noise", "opposed", "outliers", "together", "lengths")
  ]
  packages = ("byzfl", "torchjd", "torch")
  record = {
    "versions": {name: importlib.metadata.version(name) for name in packages},
    "krum": krum,
    "krum_differing": differing,
    "geometric_median": medians,
  }
  OUTPUT.write_text(json.dumps(record, separators=(",", ":")) + "\n")
  print(f"wrote {OUTPUT}, {OUTPUT.stat().st_size:,} bytes")


if __name__ == "__main__":
  main()
