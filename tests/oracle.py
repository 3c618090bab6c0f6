"""GAF in NumPy float64, written from the paper's algorithm on flat vectors.

Independent of the library: no Gram matrix, no scaling, no JAX.
"""

from typing import NamedTuple

import numpy as np


class Result(NamedTuple):
  gradient: list  # float64 or complex128, one array per leaf
  agreed: bool
  accepted: np.ndarray  # bool [k]
  weights: np.ndarray  # [k], with sum 1, or all 0
  distances: np.ndarray  # [k], NaN without a comparison
  finite: np.ndarray  # bool [k]
  margin: float  # between tau and the distance closest to it
  # Minimum of |sum|^2 / sum of |term|^2 over the compared sums. If small, the sums
  # cancelled, and rounding of the terms is magnified by its inverse.
  condition: float


def wide(x):
  x = np.asarray(x)
  return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def vectors(leaves, embed=None):
  """Each micro-gradient as one real vector: [k, n] float64."""
  parts = []
  for leaf in leaves:
    leaf = wide(leaf)
    leaf = leaf if embed is None else embed(leaf)
    flat = leaf.reshape(leaf.shape[0], -1)
    parts += [flat.real, flat.imag] if np.iscomplexobj(flat) else [flat]
  return np.concatenate(parts, axis=1)


def distance(a, b, kind="cosine"):
  length_a, length_b = np.linalg.norm(a), np.linalg.norm(b)
  if length_a == 0 or length_b == 0:
    return 1.0
  if kind == "cosine":
    return 1 - np.dot(a / length_a, b / length_b)
  top = max(length_a, length_b)
  a, b = a / top, b / top
  return np.sum((a - b) ** 2) / (np.sum(a**2) + np.sum(b**2))


def conditioning(terms):
  squares = np.sum([np.sum(t**2) for t in terms])
  return np.sum(np.sum(terms, axis=0) ** 2) / squares if squares else 1.0


def soft(d, tau, softness):
  if softness == 0:
    return float(d <= tau)
  return 1 / (1 + np.exp(-(tau - d) / softness))


def norm_scales(v, finite, ratio):
  """Factors `[k]` that limit norms to `ratio` times the median norm."""
  norms = np.where(finite, np.linalg.norm(v, axis=1), 0)
  if ratio is None or not norms.any():
    return np.ones(len(v))
  limit = ratio * np.median(norms[norms > 0])
  return np.where(norms > limit, limit / np.where(norms > 0, norms, 1), 1)


def decide(
  rule,
  v,
  finite,
  tau,
  kind="cosine",
  softness=0.0,
  fraction=None,
  number=None,
  start=0,
  microbatch_weights=None,
  max_norm_ratio=None,
):
  """(weights, accepted, distances, margin, condition), before two have to agree.

  The sequence starts at `start`, but never with a zero. Microbatches of weight 0 are
  skipped. The weights do not include the microbatch weights yet.
  """
  k = len(v)
  counts = np.ones(k) if microbatch_weights is None else microbatch_weights
  num_present = np.sum(counts > 0)
  finite = finite & (counts > 0)
  terms = (counts * norm_scales(v, finite, max_norm_ratio))[:, None] * v
  weights, distances = np.zeros(k), np.full(k, np.nan)
  accepted = np.zeros(k, bool)
  margin, condition = np.inf, 1.0
  if rule in ("sequential", "running_average"):
    s, total, started = np.zeros(v.shape[1]), 0.0, False
    for i in np.roll(np.arange(k), -start):
      if not finite[i]:
        continue
      starts = not started and v[i].any()
      d = distance(s / total if total else s, v[i], kind)
      if not starts:
        distances[i] = d
        condition = min(condition, conditioning(weights[:, None] * terms))
        margin = min(margin, abs(d - tau))
      accepted[i], started = starts or d <= tau, started or starts
      w = 1.0 if starts else soft(d, tau, softness)
      if rule == "sequential":
        s, total, weights[i] = s + w * terms[i], total + w * counts[i], w
      elif accepted[i] and not total:
        s, total, weights[i] = terms[i].copy(), counts[i], 1.0
      elif accepted[i]:
        s, total = (s + terms[i]) / 2, (total + counts[i]) / 2
        weights /= 2
        weights[i] = 0.5
  elif rule == "leave_one_out":
    for i in np.flatnonzero(finite):
      others = [j for j in np.flatnonzero(finite) if j != i]
      if others:
        condition = min(condition, conditioning(terms[others]))
        mean = terms[others].sum(axis=0) / counts[others].sum()
        d = distance(mean, v[i], kind)
        distances[i], accepted[i], weights[i] = d, d <= tau, soft(d, tau, softness)
        margin = min(margin, abs(d - tau))
  elif rule == "nearest_neighbors":
    distances = nearest_neighbors(v, finite, number, kind)
    for i in np.flatnonzero(np.isfinite(distances)):
      accepted[i], weights[i] = distances[i] <= tau, soft(distances[i], tau, softness)
      margin = min(margin, abs(distances[i] - tau))
  else:
    pairs = np.full((k, k), np.inf)
    for i in np.flatnonzero(finite):
      for j in np.flatnonzero(finite):
        pairs[i, j] = 0 if i == j else distance(v[i], v[j], kind)
        if i != j:
          margin = min(margin, abs(pairs[i, j] - tau))
    counts_near = (pairs <= tau).sum(1)
    if rule == "most_neighbors":
      center = int(np.argmax(counts_near))
      if finite[center]:
        distances = np.where(finite, pairs[center], np.nan)
        accepted = pairs[center] <= tau
        weights = np.array(
          [soft(d, tau, softness) if f else 0 for d, f in zip(pairs[center], finite)]
        )
        weights[center], distances[center] = 1, np.nan
    else:
      assert rule in ("min_neighbors", "majority")
      # More than half, or a fraction, of the valid ones.
      share = num_present // 2 + 1 if rule == "majority" else fraction * num_present
      needed = int(np.ceil(max(2, share) - 1e-9))
      accepted = finite & (counts_near >= needed)
      weights = accepted.astype(float)
      if needed <= k:
        nearest = np.sort(pairs, axis=1)[:, needed - 1]
        distances = np.where(np.isfinite(nearest), nearest, np.nan)
  return weights, accepted, distances, margin, condition


def nearest_neighbors(v, finite, number, kind="cosine"):
  """Mean distance `[k]` to the nearest others, NaN without any."""
  distances = np.full(len(v), np.nan)
  for i in np.flatnonzero(finite):
    others = [distance(v[i], v[j], kind) for j in np.flatnonzero(finite) if j != i]
    if others:
      distances[i] = np.mean(sorted(others)[:number])
  return distances


def krum_scores(v, num_wrong):
  """Sum of squared distances to the n - f - 2 nearest others, as in the paper."""
  n = len(v)
  pairs = ((v[:, None] - v[None]) ** 2).sum(-1)
  return np.array(
    [np.sort(np.delete(pairs[i], i))[: n - num_wrong - 2].sum() for i in range(n)]
  )


def geometric_median(v, num_iterations):
  """Weiszfeld's iteration on the vectors, starting at their mean."""
  point = v.mean(axis=0)
  for _ in range(num_iterations):
    inverse = 1 / np.maximum(np.linalg.norm(v - point, axis=1), 1e-9)
    point = inverse @ v / inverse.sum()
  return point


def gaf(
  leaves,
  tau,
  rule="sequential",
  embed=None,
  microbatch_weights=None,
  max_norm_ratio=None,
  **options,
):
  """The filtered mean of stacked leaves `[k, *shape]`, in one group."""
  leaves = [wide(x) for x in leaves]
  k = leaves[0].shape[0]
  counts = np.ones(k)
  if microbatch_weights is not None:
    counts = np.asarray(microbatch_weights, np.float64)
  finite = np.array([all(np.isfinite(x[i]).all() for x in leaves) for i in range(k)])
  clean = [np.where(finite.reshape((k,) + (1,) * (x.ndim - 1)), x, 0) for x in leaves]
  v = vectors(clean, embed)
  weights, accepted, distances, margin, condition = decide(
    rule,
    v,
    finite,
    tau,
    microbatch_weights=counts,
    max_norm_ratio=max_norm_ratio,
    **options,
  )
  agreed = accepted.sum() > 1
  if not agreed:
    accepted, weights = np.zeros(k, bool), np.zeros(k)
  share = weights * counts / np.sum(weights * counts) if agreed else weights
  factors = share * norm_scales(v, finite & (counts > 0), max_norm_ratio)
  gradient = [
    sum(w * x[i] for i, w in enumerate(factors) if w) + np.zeros(x.shape[1:])
    for x in clean
  ]
  return Result(
    gradient, bool(agreed), accepted, share, distances, finite, margin, condition
  )


def noise_scale(leaves):
  """Trace of the covariance over the squared mean, both unbiased."""
  v = vectors(leaves)
  v = v[np.isfinite(v).all(axis=1)]
  v = v / np.abs(v).max()
  k = len(v)
  noise = np.sum((v - v.mean(axis=0)) ** 2) / (k - 1)
  signal = np.sum(v.mean(axis=0) ** 2) - noise / k
  return noise / signal if signal > 0 else np.inf


def remember(steps, decay):
  """Mean cosine and weight `[k, k]` of each pair over steps of vectors `[k, n]`."""
  k = len(steps[0])
  mean, weight = np.zeros((k, k)), np.zeros((k, k))
  for v in steps:
    for i in range(k):
      for j in range(k):
        a, b = v[i].astype(np.float64), v[j].astype(np.float64)
        if np.isfinite(a).all() and np.isfinite(b).all() and a.any() and b.any():
          cosine = 1 - distance(a, b)
          weight[i, j] = decay * weight[i, j] + 1
          mean[i, j] += (cosine - mean[i, j]) / weight[i, j]
  return mean, weight


def adaptive_threshold(distances):
  """The threshold of `adaptive_tau` for finite distances `[n]`."""
  n = len(distances)
  similarity = (1 - np.sort(distances)[: (n + 1) // 2]).mean()
  share = min(1 - np.sqrt(2 / n), 7 / 8) if n > 1 else 0
  return 1 - share * similarity if similarity > 0 else 2


def majority(mean, weight):
  """Cosine of each source to its (k // 2)-th nearest other, and its number of steps."""
  k = len(mean)
  agreement, num_steps = np.full(k, np.nan), np.zeros(k)
  for i in range(k):
    others = [j for j in range(k) if j != i]
    num_steps[i] = np.mean(weight[i, others])
    if weight[i, others].any():
      agreement[i] = sorted(mean[i, others], reverse=True)[k // 2 - 1]
  return agreement, num_steps
