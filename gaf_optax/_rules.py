"""The classes behind `rules.py`, which decide from one Gram matrix."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from gaf_optax import _compat, _validate

# Maximum square of a sum that counts as zero, in epsilons of its terms' squares.
_CANCELLATION_EPS = 4


class Decision(NamedTuple):
  """The decision of a rule about k micro-gradients.

  The result of the step is `sum(weights * g) / sum(weights)`. The step agrees if any
  micro-gradient is accepted; otherwise the result is zero whatever the weights.

  Attributes:
    weights: float `[k]`, relative weights of the micro-gradients.
    accepted: bool `[k]`.
    distances: float `[k]`, compared with tau; NaN if there was nothing to compare.
  """

  weights: jax.Array
  accepted: jax.Array
  distances: jax.Array


class RuleFn(Protocol):
  """A rule: `(gram [k, k], valid [k] bool, tau) -> Decision`."""

  def __call__(self, gram: jax.Array, valid: jax.Array, tau: Any, /) -> Decision: ...


class Rows(NamedTuple):
  """The inputs of a decision about k micro-gradients.

  Attributes:
    gram: `[k, k]`, with rows and columns of zeros for those that are not valid.
    valid: bool `[k]`: finite, with a weight above 0.
    weights: `[k]`, relative `microbatch_weights`, or ones; 0 excludes.
    scales: `[k]`, the factors that limit the norms (`max_norm_ratio`).
    start: int32 scalar, the start of a sequence.
  """

  gram: jax.Array
  valid: jax.Array
  weights: jax.Array
  scales: jax.Array
  start: jax.Array | int


def distance(kind: str, ab, aa, bb, tau=None) -> jax.Array:
  """Distances in [0, 2] from inner products and squared norms, of any shape.

  1 if either vector is zero. Distances that differ from tau by rounding only are set to
  tau. `kind` is 'cosine' or 'euclidean'.
  """
  zero = (aa <= 0) | (bb <= 0)
  aa, bb = jnp.where(zero, 1, aa), jnp.where(zero, 1, bb)
  if kind == "cosine":
    # aa * bb could overflow. Dividing by aa gives exactly 1 for copies.
    similarity = ab / jnp.where(aa == bb, aa, jnp.sqrt(aa) * jnp.sqrt(bb))
  else:
    similarity = 2 * ab / (aa + bb)
  result = 1 - jnp.clip(jnp.where(zero, 0, similarity), -1, 1)
  return result if tau is None else _snap_to_tau(result, tau)


def scaled(gram: jax.Array) -> jax.Array:
  """The matrix `[k, k]`, scaled so that the largest norm is 1."""
  largest = jnp.max(jnp.diagonal(gram))
  factor = jnp.where(largest > 0, lax.rsqrt(jnp.where(largest > 0, largest, 1)), 1)
  return gram * factor * factor


def _snap_to_tau(distances, tau):
  tau = jnp.asarray(tau, distances.dtype)
  rounding = 8 * jnp.finfo(distances.dtype).eps
  return jnp.where(jnp.abs(distances - tau) <= rounding, tau, distances)


def _within(distances, tau):
  return distances <= jnp.asarray(tau, distances.dtype)


def _if_agreed(weights, accepted, distances):
  """The decision; accepts nothing if no two agree."""
  agreed = jnp.sum(accepted) > 1
  return Decision(jnp.where(agreed, weights, 0), accepted & agreed, distances)


@dataclasses.dataclass(frozen=True)
class Rule:
  """Base class of the rules."""

  distance: str = "cosine"
  softness: float = 0.0

  def __post_init__(self):
    _validate.one_of(("cosine", "euclidean"), distance=self.distance)
    _validate.in_interval(0, math.inf, open_end=True, softness=self.softness)
    self._make_float("softness")

  def _make_float(self, name):
    """Makes a number hashable and independent of JAX's dtypes."""
    value = getattr(self, name)
    if not _validate.is_concrete(value):
      raise ValueError(
        f"{name} must be known when the rule is created, got {value!r}. Create the rule"
        " outside of the function that is transformed."
      )
    object.__setattr__(self, name, float(value))

  def __call__(self, gram: jax.Array, valid: jax.Array, tau) -> Decision:
    gram, valid = jnp.asarray(gram), jnp.asarray(valid, bool)
    if not jnp.issubdtype(gram.dtype, jnp.floating):
      gram = gram.astype(jnp.float32)
    if gram.ndim != 2 or gram.shape != valid.shape * 2:
      raise ValueError(
        "a rule takes a Gram matrix [k, k] and valid [k], got shapes "
        f"{gram.shape} and {valid.shape}."
      )
    gram = jnp.where(valid[:, None] & valid[None, :], gram, 0)
    ones = jnp.ones(valid.shape, gram.dtype)
    return self.decide(Rows(gram, valid, ones, ones, 0), tau)

  def decide(self, rows: Rows, tau) -> Decision:
    raise NotImplementedError

  def soft_weights(self, distances, tau):
    """Weights in [0, 1] of micro-gradients at these distances."""
    if self.softness == 0:
      return _within(distances, tau).astype(distances.dtype)
    margin = jnp.asarray(tau, distances.dtype) - distances
    return jax.nn.sigmoid(margin / self.softness)


class Mean(NamedTuple):
  """Scalar summary of the running mean of accepted micro-gradients.

  Attributes:
    weight: the sum of the weights.
    squares: the squared norm if terms were orthogonal; 0 before the first nonzero term.
  """

  weight: jax.Array
  squares: jax.Array


class Step(NamedTuple):
  """The decision about one micro-gradient: `mean <- (1 - share) mean + share g`.

  Attributes:
    share: in [0, 1].
    keep: existing weights are multiplied by it.
    weight: the weight of g.
    accepted: bool.
    distance: NaN if there was nothing to compare.
  """

  share: jax.Array
  keep: jax.Array
  weight: jax.Array
  accepted: jax.Array
  distance: jax.Array


@dataclasses.dataclass(frozen=True)
class Sequential(Rule):
  """Compares micro-gradients in turn with the running mean of those accepted.

  Attributes:
    keep: the factor of all weights, including the new one, at each acceptance.
  """

  keep: float = 1.0

  def step(self, mean: Mean, mm, mg, gg, tau, valid, weight, scale=1):
    """Compares g with the mean m by their inner products, of any batch shape."""
    cancelled = mm <= _CANCELLATION_EPS * jnp.finfo(mm.dtype).eps * mean.squares
    found = distance(self.distance, mg, jnp.where(cancelled, 0, mm), gg, tau)
    starts = (mean.squares == 0) & (gg > 0)
    own = jnp.where(valid, jnp.where(starts, 1, self.soft_weights(found, tau)), 0)
    total = mean.weight + own * weight
    share = own * weight / jnp.where(total > 0, total, 1)
    keep = jnp.where((mean.weight > 0) & (own > 0), self.keep, 1).astype(mm.dtype)
    squares = (1 - share) ** 2 * mean.squares + (share * scale) ** 2 * gg
    compared = valid & ~starts
    accepted = valid & (starts | _within(found, tau))
    step = Step(share, keep, keep * own, accepted, jnp.where(compared, found, jnp.nan))
    return Mean(keep * total, squares), step

  def decide(self, rows, tau):
    gram, k, dtype = rows.gram, rows.gram.shape[0], rows.gram.dtype
    terms = rows.weights * rows.scales

    def visit(carry, i):
      mean, weights, with_rows = carry  # with_rows [k] are <mean, g_j>
      divisor = jnp.where(mean.weight > 0, mean.weight, 1)
      mm = jnp.sum(weights * terms * with_rows) / divisor
      inputs = (rows.valid[i], rows.weights[i], rows.scales[i])
      mean, step = self.step(mean, mm, with_rows[i], gram[i, i], tau, *inputs)
      weights = (step.keep * weights).at[i].set(step.weight)
      with_rows = (1 - step.share) * with_rows + step.share * rows.scales[i] * gram[i]
      return (mean, weights, with_rows), (step.accepted, step.distance)

    zero, zeros = jnp.zeros((), dtype), jnp.zeros(k, dtype)
    carry = _compat.typed_like((Mean(zero, zero), zeros, zeros), (rows, tau))
    order = (rows.start + jnp.arange(k, dtype=jnp.int32)) % k
    (_, weights, _), found = lax.scan(visit, carry, order)
    # Back from the order of visits to the positions of the micro-gradients.
    place = (jnp.arange(k, dtype=jnp.int32) - rows.start) % k
    return _if_agreed(weights, *(x[place] for x in found))


class LeaveOneOut(Rule):
  def decide(self, rows, tau):
    gram, valid, squares = rows.gram, rows.valid, jnp.diagonal(rows.gram)
    others = valid[None, :] & ~jnp.eye(valid.shape[0], dtype=bool)
    shares = jnp.where(others, rows.weights[None, :], 0)
    total = jnp.sum(shares, axis=1, keepdims=True)
    shares = rows.scales[None, :] * shares / jnp.where(total > 0, total, 1)
    with_rows = jnp.matmul(shares, gram, precision=lax.Precision.HIGHEST)
    mm = jnp.sum(with_rows * shares, axis=1)
    orthogonal = jnp.sum(shares**2 * squares[None, :], axis=1)
    cancelled = mm <= _CANCELLATION_EPS * jnp.finfo(gram.dtype).eps * orthogonal
    mm = jnp.where(cancelled, 0, mm)
    distances = distance(self.distance, jnp.diagonal(with_rows), mm, squares, tau)
    distances = jnp.where(valid & jnp.any(others, axis=1), distances, jnp.nan)
    weights = jnp.where(valid, self.soft_weights(distances, tau), 0)
    return _if_agreed(weights, _within(distances, tau), distances)


def _pairs(kind, rows, tau=None):
  """Distances of all pairs `[k, k]`: 0 to itself, NaN if either is not valid."""
  gram, valid, squares = rows.gram, rows.valid, jnp.diagonal(rows.gram)
  distances = distance(kind, gram, squares[:, None], squares[None, :], tau)
  distances = jnp.where(jnp.eye(valid.shape[0], dtype=bool), 0, distances)
  return jnp.where(valid[:, None] & valid[None, :], distances, jnp.nan)


class MostNeighbors(Rule):
  """Its distances depend on tau, since the center does."""

  def decide(self, rows, tau):
    pairs = _pairs(self.distance, rows, tau)
    center = jnp.argmax(jnp.sum(_within(pairs, tau), axis=1))
    distances = pairs[center]
    weights = jnp.where(rows.valid, self.soft_weights(distances, tau), 0)
    is_center = jnp.arange(distances.shape[0]) == center
    return _if_agreed(
      jnp.where(is_center & rows.valid, 1, weights),
      _within(distances, tau),
      jnp.where(is_center, jnp.nan, distances),
    )


@dataclasses.dataclass(frozen=True)
class MinNeighbors(Rule):
  fraction: float = 0.2

  def __post_init__(self):
    super().__post_init__()
    _validate.in_interval(0, 1, fraction=self.fraction)
    self._make_float("fraction")

  def needed(self, number: int) -> int:
    """How many of `number` micro-gradients must be within tau, including itself."""
    # In double precision, as the caller wrote it: 0.6 of 5 is 3.
    return max(2, math.ceil(self.fraction * number - 1e-9))

  def decide(self, rows, tau):
    k = rows.valid.shape[0]
    table = jnp.asarray([min(self.needed(n), k) - 1 for n in range(k + 1)])
    last = table[jnp.sum(rows.weights > 0)]
    # Accepted if tau is at least the distance to the last neighbor needed.
    in_order = jnp.sort(_pairs(self.distance, rows, tau), axis=1)
    distances = lax.dynamic_index_in_dim(in_order, last, 1, keepdims=False)
    accepted = _within(distances, tau)
    return _if_agreed(accepted.astype(distances.dtype), accepted, distances)


class Majority(MinNeighbors):
  def needed(self, number):
    return max(2, number // 2 + 1)


@dataclasses.dataclass(frozen=True)
class NearestNeighbors(Rule):
  number: int = 1

  def __post_init__(self):
    super().__post_init__()
    _validate.count(1, number=self.number)

  def decide(self, rows, tau):
    pairs, k = _pairs(self.distance, rows), rows.valid.shape[0]
    pairs = jnp.where(jnp.eye(k, dtype=bool) | jnp.isnan(pairs), jnp.inf, pairs)
    nearest = -lax.top_k(-pairs, min(self.number, k))[0]
    mean, number = _mean_of_known(nearest)
    mean = _snap_to_tau(mean, tau)
    distances = jnp.where(number > 0, mean, jnp.nan)
    weights = jnp.where(number > 0, self.soft_weights(mean, tau), 0)
    return _if_agreed(weights, _within(distances, tau), distances)


def _mean_of_known(values):
  """The mean over the last axis of the finite values, and their number."""
  finite = jnp.isfinite(values)
  number = jnp.sum(finite, axis=-1)
  total = jnp.sum(jnp.where(finite, values, 0), axis=-1)
  return total / jnp.maximum(number, 1).astype(total.dtype), number


@dataclasses.dataclass(frozen=True)
class MultiKrum(Rule):
  num_wrong: int = 0
  num_kept: int | None = None

  def __post_init__(self):
    _validate.count(0, num_wrong=self.num_wrong)
    if self.num_kept is not None:
      _validate.count(1, num_kept=self.num_kept)

  def decide(self, rows, tau):
    k, valid = rows.valid.shape[0], rows.valid
    if k < self.num_wrong + 3:
      raise ValueError(
        f"multi_krum(num_wrong={self.num_wrong}) compares each micro-gradient with its"
        f" k - num_wrong - 2 nearest others and needs at least {self.num_wrong + 3};"
        f" got k = {k}."
      )
    if self.num_kept is not None and self.num_kept > k:
      raise ValueError(
        f"num_kept is {self.num_kept}, but there are {k} micro-gradients."
      )
    num_kept = self.num_kept or jnp.sum(rows.weights > 0) - self.num_wrong
    gram = scaled(rows.gram)
    squares = jnp.diagonal(gram)
    # Half the squared distances, which are cosine distances for norms of 1.
    pairs = jnp.maximum((squares[:, None] + squares[None, :]) / 2 - gram, 0)
    others = valid[:, None] & valid[None, :] & ~jnp.eye(k, dtype=bool)
    pairs = jnp.sort(jnp.where(others, pairs, jnp.inf), axis=1)
    num_near = jnp.maximum(jnp.sum(valid) - self.num_wrong - 2, 1)
    near = (jnp.arange(k) < num_near)[None, :]
    scores, number = _mean_of_known(jnp.where(near, pairs, jnp.inf))
    # Ties go to the first.
    order = jnp.argsort(jnp.where(valid, scores, jnp.inf), stable=True)
    rank = jnp.zeros(k, order.dtype).at[order].set(jnp.arange(k, dtype=order.dtype))
    accepted = valid & (rank < num_kept)
    distances = jnp.where(valid & (number > 0), scores, jnp.nan)
    return Decision(accepted.astype(distances.dtype), accepted, distances)


@dataclasses.dataclass(frozen=True)
class GeometricMedian(Rule):
  num_iterations: int = 8

  def __post_init__(self):
    _validate.count(1, num_iterations=self.num_iterations)

  def decide(self, rows, tau):
    gram = scaled(rows.gram)
    squares, info = jnp.diagonal(gram), jnp.finfo(gram.dtype)
    dot = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    counted = rows.valid.astype(gram.dtype)

    def squared_distances(weights):
      """The distances, and their rounding errors."""
      with_rows, sizes = dot(gram, weights), dot(jnp.abs(gram), weights)
      distances = squares - 2 * with_rows + dot(weights, with_rows)
      rounding = 4 * info.eps * (squares + sizes + dot(weights, sizes))
      return jnp.maximum(distances, 0), jnp.maximum(rounding, info.tiny)

    def shares(inverse):
      total = jnp.sum(counted * inverse)
      return counted * inverse / jnp.where(total > 0, total, 1)

    inverse = jnp.ones_like(squares)
    for _ in range(self.num_iterations):
      # Squares below their rounding error carry no information.
      inverse = 1 / jnp.sqrt(jnp.maximum(*squared_distances(shares(inverse))))
    distances = squared_distances(shares(inverse))[0] / 2
    distances = jnp.where(rows.valid, distances, jnp.nan)
    weights = jnp.where(rows.valid, inverse, 0)
    weights /= jnp.maximum(jnp.sum(weights), info.tiny)
    return _if_agreed(weights, rows.valid, distances)


def against_anchor(square, products, rows: Rows, anchored, tau) -> Decision:
  """Compares with the anchor; accepts all until it is initialized.

  `square` is the squared norm of the anchor, `products` are its inner products `[k]`
  with the micro-gradients.
  """
  distances = distance("cosine", products, square, jnp.diagonal(rows.gram), tau)
  compared = rows.valid & anchored
  accepted = rows.valid & (_within(distances, tau) | ~anchored)
  distances = jnp.where(compared, distances, jnp.nan)
  return Decision(accepted.astype(distances.dtype), accepted, distances)
