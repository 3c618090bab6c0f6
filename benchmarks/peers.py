"""Peers: other packages' aggregators on the same micro-gradients, in PyTorch.

Needs `pip install -e '.[peers]'`. The authors' package filters pairs: it averages the
gradient so far and the next one if they agree. TorchJD's aggregators take one matrix
`[k, P]`; assembling it is not counted.
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import gradient_agreement_filtering as authors
import jax
import numpy as np
import torch
from torchjd import aggregation


def versions() -> str:
  """Names and versions of the packages."""
  names = ("torch", "gradient-agreement-filtering", "torchjd")
  return ", ".join(f"{name} {version(name)}" for name in names)


def programs(stack: dict[str, jax.Array], tau: float) -> dict[str, Callable[[], Any]]:
  """The timed functions, by name; `stack` has leaves `[k, *shape]`."""
  leaves = [torch.from_numpy(np.array(leaf)) for leaf in stack.values()]
  k = len(leaves[0])
  each = [[leaf[i].contiguous() for leaf in leaves] for i in range(k)]
  matrix = torch.cat([leaf.reshape(k, -1) for leaf in leaves], dim=1)
  found: dict[str, Callable[[], Any]] = {
    "mean in PyTorch, of lists": lambda: _mean(each),
    "`gradient-agreement-filtering`": lambda: filtered(each, tau),
  }
  aggregators = {
    "Mean": aggregation.Mean(),
    "UPGrad": aggregation.UPGrad(),
    "PCGrad": aggregation.PCGrad(),
    "MGDA": aggregation.MGDA(),
  }
  if k >= 5:
    aggregators["Krum"] = aggregation.Krum(n_byzantine=(k - 3) // 2)
    aggregators["TrimmedMean"] = aggregation.TrimmedMean(trim_number=k // 4)
  for name, aggregator in aggregators.items():
    found[f"TorchJD `{name}`"] = lambda aggregator=aggregator: aggregator(matrix)
  return found


def filtered(each: list[list[torch.Tensor]], tau: float) -> list[torch.Tensor] | None:
  """Micro-gradients through the authors' filter, called as in their `step_GAF`."""
  current, accepted = each[0], 1
  for other in each[1:]:
    merged, _ = authors._filter_gradients_cosine_sim(current, other, tau)
    if merged is not None:
      current, accepted = merged, accepted + 1
  return current if accepted > 1 else None


def _mean(each):
  return [sum(rows[1:], rows[0]) / len(rows) for rows in zip(*each)]
