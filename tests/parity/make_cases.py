"""Records the two PyTorch implementations of GAF.

The packages are `gradient-agreement-filtering` 0.1.3, by the authors of the paper, and
`GAF-microbatch-pytorch` 0.0.5. `test_parity.py` compares `gaf_optax` with the record,
`cases.json`. Run by hand, in a separate environment, and never in CI:

    python -m venv /tmp/parity
    /tmp/parity/bin/pip install numpy
    /tmp/parity/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu
    /tmp/parity/bin/pip install gradient-agreement-filtering==0.1.3
    /tmp/parity/bin/pip install GAF-microbatch-pytorch==0.0.5
    /tmp/parity/bin/python tests/parity/make_cases.py

All inputs are float32. Except in the equality cases, all distances differ from tau by
at least 1e-4, so that rounding does not matter.
"""

import importlib.metadata
import json
import math
import pathlib

import gradient_agreement_filtering as authors
import numpy as np
import torch
from GAF_microbatch_pytorch import GAF as sample_gaf

OUTPUT = pathlib.Path(__file__).with_name("cases.json")
MARGIN = 1e-4
SHAPES = {"w": (2, 3), "b": (3,)}
SIZE = sum(math.prod(shape) for shape in SHAPES.values())

OPTIMIZERS = {
  "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
  "momentum_decay": lambda p: torch.optim.SGD(
    p, lr=0.1, momentum=0.9, weight_decay=0.05
  ),
  "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
  # An epsilon that is large relative to the gradients shows where it is added.
  "adam": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.95), eps=0.1),
  "adamw": lambda p: torch.optim.AdamW(
    p, lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.05
  ),
}


class Linear(torch.nn.Module):
  """A model whose gradient is its input: the output is <weights, input>."""

  def __init__(self, weights):
    super().__init__()
    sizes = [math.prod(shape) for shape in SHAPES.values()]
    pieces = torch.tensor(weights).split(sizes)
    for (name, shape), piece in zip(SHAPES.items(), pieces):
      self.register_parameter(name, torch.nn.Parameter(piece.reshape(shape)))

  def forward(self, rows):
    return (rows @ self.flat()).unsqueeze(1)

  def flat(self):
    return torch.cat([p.reshape(-1) for p in self.parameters()])


def short(array):
  """Nested lists of the shortest decimals that give the float32 values back."""
  array = np.asarray(array, np.float32)
  if array.ndim:
    return [short(row) for row in array]
  return float(str(array))


def cosine_distances(rows):
  rows = np.asarray(rows, np.float64)
  unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
  return 1 - unit @ unit.T


def micro_gradients(rng, kind, k):
  """Float32 `[k, SIZE]`."""
  noise = rng.normal(size=(k, SIZE))
  if kind == "random":
    rows = noise
  elif kind == "agree":
    rows = rng.normal(size=SIZE) + 0.7 * noise
  elif kind == "opposed":  # No two agree: each sum points away from the next one.
    direction = rng.normal(size=SIZE)
    rows = [direction] + [-direction + 0.1 * row for row in noise[1:]]
  elif kind == "outlier":  # The last but one points in the opposite direction.
    rows = rng.normal(size=SIZE) + 0.5 * noise
    rows[-2] *= -3
  elif kind == "lengths":  # One direction, and lengths over six orders of magnitude.
    scale = 10.0 ** rng.integers(-3, 4, size=(k, 1))
    rows = scale * (rng.normal(size=SIZE) + 0.3 * noise)
  else:
    raise ValueError(kind)
  return np.asarray(rows, np.float32)


def run_authors(optimizer, tau, steps, weights):
  """Weights and the number that agreed after each step of `step_GAF`."""
  model = Linear(weights)
  opt = OPTIMIZERS[optimizer](model.parameters())
  history, agreed = [], []
  for rows in steps:
    dataset = torch.utils.data.TensorDataset(
      torch.tensor(rows), torch.zeros(len(rows), dtype=torch.long)
    )
    result = authors.step_GAF(
      model,
      opt,
      lambda outputs, labels: outputs.sum(),
      [torch.utils.data.Subset(dataset, [i]) for i in range(len(rows))],
      wandb=False,
      verbose=False,
      cos_distance_thresh=tau,
    )
    history.append(model.flat().detach().numpy().copy())
    agreed.append(result["agreed_count"])
  return history, agreed


def margin_of_running_average(rows, tau):
  """Smallest difference from tau in the comparisons of the running average."""
  rows = np.asarray(rows, np.float64)
  current, nearest = rows[0], np.inf
  for row in rows[1:]:
    cosine = current @ row / np.linalg.norm(current) / np.linalg.norm(row)
    nearest = min(nearest, abs(1 - cosine - tau))
    if 1 - cosine <= tau:
      current = (current + row) / 2
  return nearest


def authors_cases():
  kinds = ["agree", "random", "opposed", "outlier", "opposed", "lengths", "random"]
  cases = []
  for number, (optimizer, k, tau) in enumerate(
    [
      ("sgd", 2, 0.97),
      ("sgd", 8, 0.5),
      ("momentum_decay", 2, 0.9),
      ("momentum_decay", 4, 0.97),
      ("momentum_decay", 8, 1.1),
      ("nesterov", 3, 0.97),
      ("adam", 2, 0.92),
      ("adam", 4, 0.97),
      ("adam", 5, 2.0),
      ("adamw", 6, 0.8),
    ]
  ):
    rng = np.random.default_rng(number)
    steps = []
    for kind in kinds:
      rows = micro_gradients(rng, kind, k)
      while margin_of_running_average(rows, tau) < MARGIN:
        rows = micro_gradients(rng, kind, k)
      steps.append(rows)
    weights = rng.normal(size=SIZE).astype(np.float32)
    history, agreed = run_authors(optimizer, tau, steps, weights)
    cases.append(
      {
        "optimizer": optimizer,
        "tau": tau,
        "initial": short(weights),
        "micro_grads": short(steps),
        "agreed_count": agreed,
        "weights": short(history),
      }
    )
  return cases


def authors_equality_cases():
  """Two micro-gradients at a distance of exactly tau."""
  cases = []
  for tau, first, second in [
    (0.0, [2, 0, 0, 0], [1, 0, 0, 0]),
    (0.5, [1, 1, 1, 1], [1, 1, 1, -1]),
    (1.0, [1, 0, 0, 0], [0, 1, 0, 0]),
    (1.5, [1, 1, 1, 1], [-1, -1, -1, 1]),
    (2.0, [1, 0, 0, 0], [-2, 0, 0, 0]),
  ]:
    rows = np.zeros((2, SIZE), np.float32)
    rows[:, :4] = [first, second]
    weights = np.ones(SIZE, np.float32)
    history, agreed = run_authors("sgd", tau, [rows], weights)
    cases.append(
      {
        "tau": tau,
        "micro_grads": short(rows),
        "initial": short(weights),
        "agreed_count": agreed[0],
        "weights": short(history[0]),
      }
    )
  return cases


def authors_shares():
  """Weights of four accepted micro-gradients, by the package's pairwise function."""
  rows = torch.eye(4)
  current = [rows[0]]
  for row in rows[1:]:
    current, _ = authors._filter_gradients_cosine_sim(current, [row], 2.0)
  return short(current[0])


def run_samples(rows, threshold, strategy, fraction):
  """The rows that the second package keeps, and the mean over its batch."""
  kept = sample_gaf.filter_gradients_by_agreement(
    torch.tensor(rows).clone(),  # The package modifies its input.
    threshold,
    strategy,
    fraction,
  ).numpy()
  return [bool(row.any()) for row in kept], short(kept.mean(0))


def clusters(rng, sizes):
  """Groups of rows about orthogonal directions, in shuffled order."""
  axes = np.linalg.qr(rng.normal(size=(SIZE, len(sizes))))[0].T
  rows = np.repeat(axes, sizes, axis=0) * rng.uniform(0.5, 2, (sum(sizes), 1))
  return rng.permutation(rows + 0.05 * rng.normal(size=rows.shape))


def sample_cases():
  rng = np.random.default_rng(100)
  batches = [
    (kind, tau, micro_gradients, k)
    for k in (2, 4, 8)
    for kind, tau in [
      ("random", 0.6),
      ("random", 0.97),
      ("agree", 0.4),
      ("opposed", 0.9),
      ("outlier", 0.97),
      ("lengths", 0.2),
    ]
  ] + [
    (f"clusters {sizes}", 0.5, lambda rng, *_, s=sizes: clusters(rng, s), 0)
    for sizes in [(3, 2), (2, 2), (1, 4, 3), (5, 1, 1, 1), (1, 1, 1, 1)]
  ]
  cases = []
  for kind, threshold, make, k in batches:
    while True:
      rows = np.asarray(make(rng, kind, k), np.float32)
      if np.min(np.abs(cosine_distances(rows) - threshold)) > MARGIN:
        break
    for strategy, fraction in [
      ("accept_max_neighbors", 0.2),
      ("accept_min_neighbors", 0.2),
      ("accept_min_neighbors", 0.5),
    ]:
      accepted, mean = run_samples(rows, threshold, strategy, fraction)
      cases.append(
        {
          "kind": kind,
          "strategy": strategy,
          "fraction": fraction,
          "threshold": threshold,
          "micro_grads": short(rows),
          "accepted": accepted,
          "mean": mean,
        }
      )
  return cases


def sample_equality_case():
  """Orthogonal pairs at threshold 1, which the comparison with `<` excludes."""
  rows = np.eye(4, SIZE, dtype=np.float32)
  rows[3] = rows[2]
  accepted, mean = run_samples(rows, 1.0, "accept_max_neighbors", 0.2)
  return {
    "threshold": 1.0,
    "micro_grads": short(rows),
    "accepted": accepted,
    "mean": mean,
  }


def main():
  packages = ("gradient-agreement-filtering", "GAF-microbatch-pytorch", "torch")
  record = {
    "versions": {name: importlib.metadata.version(name) for name in packages},
    "shapes": SHAPES,
    "authors": authors_cases(),
    "authors_equality": authors_equality_cases(),
    "authors_shares": authors_shares(),
    "samples": sample_cases(),
    "samples_equality": sample_equality_case(),
  }
  OUTPUT.write_text(json.dumps(record, separators=(",", ":")) + "\n")
  print(f"wrote {OUTPUT}, {OUTPUT.stat().st_size:,} bytes")


if __name__ == "__main__":
  main()
