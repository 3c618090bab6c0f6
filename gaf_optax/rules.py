"""Rules: which micro-gradients agree, decided from their Gram matrix alone.

A rule is a callable `(gram [k, k], valid [k] bool, tau) -> Decision`. The rules of
this module are made by lowercase factories and given to `gaf(rule=...)`.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from gaf_optax import _gram, _validate

# A sum counts as zero where it has cancelled down to rounding: where its squared length
# is at most this many machine epsilons of the sum of its terms' squares.
_CANCELLED = 4

__all__ = [
  "Decision",
  "RuleFn",
  "geometric_median",
  "leave_one_out",
  "min_neighbors",
  "most_neighbors",
  "multi_krum",
  "nearest_neighbors",
  "running_average",
  "sequential",
]


class Decision(NamedTuple):
  """What a rule decides about k micro-gradients.

  The result of the step is the weighted mean, `sum(weights * g) / sum(weights)`.
  The step has agreed when any micro-gradient is accepted; where none is, the
  result is zero whatever the weights.

  Attributes:
    weights: float `[k]`, relative weights of the micro-gradients.
    accepted: bool `[k]`.
    distances: float `[k]`, what was compared with tau; NaN where there was
      nothing to compare.
  """

  weights: jax.Array
  accepted: jax.Array
  distances: jax.Array


class StepTau(Protocol):
  """A tau that is read off the distances of a step; hashable."""

  def of(self, distances: jax.Array, valid: jax.Array) -> jax.Array:
    """The threshold, from distances `[k]` (NaN where unknown) and bool `[k]`."""
    ...


class RuleFn(Protocol):
  """What `gaf` takes as `rule`: `(gram [k, k], valid [k] bool, tau) -> Decision`."""

  def __call__(self, gram: jax.Array, valid: jax.Array, tau: Any, /) -> Decision:
    """Decides about k micro-gradients."""
    ...


@dataclasses.dataclass(frozen=True)
class Rule:
  """A rule of this module.

  `decide` works on a `Gram`, which spans more orders of magnitude than a plain
  matrix of floats does; calling the rule with a plain matrix is the same decision.
  """

  distance: str = "cosine"
  softness: float = 0.0

  def __post_init__(self):
    _validate.one_of(("cosine", "euclidean"), distance=self.distance)
    _validate.non_negative(softness=self.softness)

  def __call__(self, gram: jax.Array, valid: jax.Array, tau) -> Decision:
    gram = jnp.asarray(gram)
    if not jnp.issubdtype(gram.dtype, jnp.floating):
      gram = gram.astype(jnp.float32)
    valid = jnp.asarray(valid, bool)
    if gram.ndim != 2 or gram.shape != valid.shape * 2:
      raise ValueError(
        "a rule takes a Gram matrix [k, k] and valid [k], got shapes "
        f"{gram.shape} and {valid.shape}."
      )
    return self.decide(_gram.from_matrix(gram, valid), valid, tau)

  def decide(self, gram: _gram.Gram, valid: jax.Array, tau) -> Decision:
    raise NotImplementedError

  def _accepts(self, distances, tau):
    return distances <= jnp.asarray(tau, distances.dtype)

  def _weights(self, distances, tau):
    """Weights in [0, 1] of micro-gradients at these distances."""
    if self.softness == 0:
      return self._accepts(distances, tau).astype(distances.dtype)
    margin = jnp.asarray(tau, distances.dtype) - distances
    return jax.nn.sigmoid(margin / self.softness)


class RunningMean(NamedTuple):
  """What a sequential rule knows of the mean of what it accepted, but for the vector.

  Attributes:
    total_weight: the sum of the weights of what is in it, 0 while it is empty.
    squares: its squared length if its terms were orthogonal, in units of
      `4**exponent`. A mean much shorter than that has cancelled.
    exponent: int32.
  """

  total_weight: jax.Array
  squares: jax.Array
  exponent: jax.Array


class Pair(NamedTuple):
  """Inner products of the running mean m and one micro-gradient g.

  Attributes:
    mm, mg, gg: |m|^2, <m, g> and |g|^2 of vectors that the true ones are
      `2**m_exponent` and `2**g_exponent` times.
    m_exponent, g_exponent: int32.
  """

  mm: jax.Array
  mg: jax.Array
  gg: jax.Array
  m_exponent: jax.Array
  g_exponent: jax.Array


class Step(NamedTuple):
  """What becomes of one micro-gradient: `m <- keep * m + add * g`.

  Attributes:
    keep, add: shares in [0, 1]. `m` and `g` with a share of 0 are left out.
    factor, weight: the same as weights: those of the terms so far are multiplied by
      `factor`, that of g is `weight`.
    accepted: bool.
    distance: NaN where there was nothing to compare.
  """

  keep: jax.Array
  add: jax.Array
  factor: jax.Array
  weight: jax.Array
  accepted: jax.Array
  distance: jax.Array


class SequentialRule(Rule):
  """A rule that sees one micro-gradient after the other and keeps one running mean.

  Only these rules work on streamed micro-gradients. It is closed: `sequential` and
  `running_average` are all there are; a rule of your own is a callable that sees the
  Gram matrix.
  """

  def _merge(self, distance, tau, first):
    """`(factor, weight, accepted)` of a micro-gradient at `distance`, see `Step`.

    `first` is True while the sum is empty.
    """
    raise NotImplementedError

  def step(
    self, mean: RunningMean, pair: Pair, valid: jax.Array, tau
  ) -> tuple[RunningMean, Step]:
    """Compares one micro-gradient with the running mean, which takes it up.

    The one decision of all forms, on a stack and streamed; any batch shape.
    """
    dtype = pair.mm.dtype
    first = mean.total_weight == 0
    unit = _gram.power_of_two(mean.exponent - pair.m_exponent, dtype)
    squares = jnp.where(mean.squares > 0, mean.squares * unit**2, 0)
    distance = _gram.distance(
      self.distance,
      pair.mg,
      pair.mm,
      pair.gg,
      tau=tau,
      shift=pair.g_exponent - pair.m_exponent,
      cancelled=pair.mm <= _CANCELLED * jnp.finfo(dtype).eps * squares,
    )
    factor, weight, accepted = self._merge(distance, tau, first)
    factor = jnp.where(valid, factor, 1).astype(dtype)
    weight = jnp.where(valid, weight, 0).astype(dtype)
    before = factor * mean.total_weight
    total = before + weight
    divisor = jnp.where(total > 0, total, 1)
    keep, add = before / divisor, weight / divisor

    top = jnp.maximum(mean.exponent, pair.g_exponent)
    exponent = jnp.where(add > 0, top, mean.exponent)
    a = keep * _gram.power_of_two(mean.exponent - exponent, dtype)
    b = add * _gram.power_of_two(pair.g_exponent - exponent, dtype)
    squares = a**2 * mean.squares + b**2 * pair.gg
    distance = jnp.where(valid & ~first, distance, jnp.nan)
    step = Step(keep, add, factor, weight, accepted & valid, distance)
    return RunningMean(total, squares, exponent), step

  def decide(self, gram, valid, tau):
    k, dtype = valid.shape[0], gram.products.dtype

    def visit(carry, i):
      mean, vector = carry
      row, exponent = gram.products[i], gram.exponents[i]
      pair = Pair(
        vector.squared_norm, vector.with_rows[i], row[i], mean.exponent, exponent
      )
      mean, step = self.step(mean, pair, valid[i], tau)
      a = step.keep * _gram.power_of_two(pair.m_exponent - mean.exponent, dtype)
      b = step.add * _gram.power_of_two(exponent - mean.exponent, dtype)
      vector = _MeanByRows(
        weights=(step.factor * vector.weights).at[i].set(step.weight),
        with_rows=a * vector.with_rows + b * row,
        squared_norm=a**2 * pair.mm + 2 * a * b * pair.mg + b**2 * pair.gg,
      )
      return (mean, vector), (step.accepted, step.distance)

    zero = jnp.zeros((), dtype)
    empty = (
      RunningMean(zero, zero, jnp.full((), _gram.ZERO_EXPONENT, jnp.int32)),
      _MeanByRows(jnp.zeros((k,), dtype), jnp.zeros((k,), dtype), zero),
    )
    empty = _gram.typed_like(empty, (gram, valid, tau))
    (_, vector), (accepted, distances) = jax.lax.scan(
      visit, empty, jnp.arange(k), unroll=min(k, 4)
    )
    return _if_agreed(vector.weights, accepted, distances)


class _MeanByRows(NamedTuple):
  """The vector of a running mean, known by its inner products alone."""

  weights: jax.Array  # [k], of its terms, not normalized
  with_rows: jax.Array  # [k], <m, g_j>
  squared_norm: jax.Array


def _if_agreed(weights, accepted, distances):
  """The decision with nothing accepted where no two agree."""
  agreed = jnp.sum(accepted) > 1
  return Decision(jnp.where(agreed, weights, 0), accepted & agreed, distances)


class _Sequential(SequentialRule):
  def _merge(self, distance, tau, first):
    weight = jnp.where(first, 1, self._weights(distance, tau))
    return 1, weight, first | self._accepts(distance, tau)


class _RunningAverage(SequentialRule):
  def _merge(self, distance, tau, first):
    accepted = first | self._accepts(distance, tau)
    half = jnp.where(accepted, 0.5, 0)
    return 1 - half, jnp.where(first, 1, half), accepted


class _LeaveOneOut(Rule):
  def decide(self, gram, valid, tau):
    dtype = gram.products.dtype
    others = valid[None, :] & ~jnp.eye(valid.shape[0], dtype=bool)
    # The units of each sum of others: its largest term.
    top = jnp.max(
      jnp.where(others, gram.exponents[None, :], _gram.ZERO_EXPONENT), axis=1
    )
    shares = jnp.where(
      others,
      _gram.power_of_two(gram.exponents[None, :] - top[:, None], dtype),
      0,
    )
    number = jnp.sum(others, axis=1)
    shares /= jnp.maximum(number, 1)[:, None].astype(dtype)
    with_rows = jnp.matmul(shares, gram.products, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.diagonal(gram.products)
    norm2 = jnp.sum(with_rows * shares, axis=1)
    orthogonal = jnp.sum(shares**2 * squares[None, :], axis=1)
    distances = _gram.distance(
      self.distance,
      jnp.diagonal(with_rows),
      norm2,
      squares,
      tau=tau,
      shift=gram.exponents - top,
      cancelled=norm2 <= _CANCELLED * jnp.finfo(dtype).eps * orthogonal,
    )
    distances = jnp.where(valid & (number > 0), distances, jnp.nan)
    weights = jnp.where(valid, self._weights(distances, tau), 0)
    return _if_agreed(weights, self._accepts(distances, tau), distances)


def _pairwise(kind, gram, valid, tau=None):
  """Distances of all pairs `[k, k]`: 0 to itself, NaN to an invalid one."""
  squares = jnp.diagonal(gram.products)
  distances = _gram.distance(
    kind,
    gram.products,
    squares[:, None],
    squares[None, :],
    tau=tau,
    shift=gram.exponents[None, :] - gram.exponents[:, None],
  )
  distances = jnp.where(jnp.eye(valid.shape[0], dtype=bool), 0, distances)
  return jnp.where(valid[:, None] & valid[None, :], distances, jnp.nan)


class MostNeighborsRule(Rule):
  """Made by `most_neighbors`, whose distances depend on tau: it picks the centre."""

  def decide(self, gram, valid, tau):
    pairs = _pairwise(self.distance, gram, valid, tau)
    center = jnp.argmax(jnp.sum(self._accepts(pairs, tau), axis=1))
    distances = pairs[center]
    weights = jnp.where(valid, self._weights(distances, tau), 0)
    is_center = jnp.arange(valid.shape[0]) == center
    return _if_agreed(
      jnp.where(is_center & valid, 1, weights),
      self._accepts(distances, tau),
      jnp.where(is_center, jnp.nan, distances),
    )


@dataclasses.dataclass(frozen=True)
class _MinNeighbors(Rule):
  fraction: float = 0.2

  def __post_init__(self):
    super().__post_init__()
    _validate.in_interval(0, 1, fraction=self.fraction)

  def decide(self, gram, valid, tau):
    k = valid.shape[0]
    # k * fraction in double precision, as the caller wrote it: 0.6 of 5 is 3.
    needed = min(max(2, math.ceil(self.fraction * k - 1e-9)), k)
    pairs = _pairwise(self.distance, gram, valid, tau)
    # Accepted at every tau from the distance of its last needed neighbour on.
    distances = jnp.sort(pairs, axis=1)[:, needed - 1]
    accepted = self._accepts(distances, tau)
    return _if_agreed(accepted.astype(distances.dtype), accepted, distances)


@dataclasses.dataclass(frozen=True)
class _NearestNeighbors(Rule):
  number: int = 1

  def __post_init__(self):
    super().__post_init__()
    _validate.count(1, number=self.number)

  def decide(self, gram, valid, tau):
    k = valid.shape[0]
    pairs = _pairwise(self.distance, gram, valid)
    others = ~jnp.eye(k, dtype=bool) & valid[:, None] & valid[None, :]
    pairs = jnp.where(others, pairs, jnp.inf)
    nearest = -jax.lax.top_k(-pairs, min(self.number, k))[0]
    found = jnp.isfinite(nearest)
    number = jnp.sum(found, axis=1)
    total = jnp.sum(jnp.where(found, nearest, 0), axis=1)
    mean = total / jnp.maximum(number, 1).astype(total.dtype)
    mean = _gram.without_rounding(mean, tau)
    distances = jnp.where(number > 0, mean, jnp.nan)
    weights = jnp.where(number > 0, self._weights(mean, tau), 0)
    return _if_agreed(weights, self._accepts(distances, tau), distances)


def _squared_distances(gram, valid):
  """Half the squared distances of all pairs `[k, k]`, in units of the largest norm.

  Of vectors of norm 1 they are the cosine distances.
  """
  matrix = gram.scaled()
  squares = jnp.diagonal(matrix)
  half = (squares[:, None] + squares[None, :]) / 2 - matrix
  return jnp.where(valid[:, None] & valid[None, :], jnp.maximum(half, 0), jnp.inf)


@dataclasses.dataclass(frozen=True)
class _MultiKrum(Rule):
  num_wrong: int = 0
  num_kept: int | None = None

  def __post_init__(self):
    super().__post_init__()
    _validate.count(0, num_wrong=self.num_wrong)
    if self.num_kept is not None:
      _validate.count(1, num_kept=self.num_kept)

  def decide(self, gram, valid, tau):
    k = valid.shape[0]
    if k < self.num_wrong + 3:
      raise ValueError(
        f"multi_krum(num_wrong={self.num_wrong}) compares each micro-gradient with its"
        f" k - num_wrong - 2 nearest others and needs at least {self.num_wrong + 3};"
        f" got k = {k}."
      )
    num_kept = k - self.num_wrong if self.num_kept is None else self.num_kept
    if num_kept > k:
      raise ValueError(f"num_kept is {num_kept}, but there are {k} micro-gradients.")
    pairs = _squared_distances(gram, valid)
    pairs = jnp.sort(jnp.where(jnp.eye(k, dtype=bool), jnp.inf, pairs), axis=1)
    num_near = jnp.maximum(jnp.sum(valid) - self.num_wrong - 2, 1)
    near = (jnp.arange(k) < num_near)[None, :] & jnp.isfinite(pairs)
    number = jnp.sum(near, axis=1)
    total = jnp.sum(jnp.where(near, pairs, 0), axis=1)
    scores = total / jnp.maximum(number, 1).astype(total.dtype)
    # Ranks, of which ties go to the first.
    order = jnp.argsort(jnp.where(valid, scores, jnp.inf), stable=True)
    rank = jnp.zeros(k, order.dtype).at[order].set(jnp.arange(k, dtype=order.dtype))
    accepted = valid & (rank < num_kept)
    distances = jnp.where(valid & (number > 0), scores, jnp.nan)
    return Decision(accepted.astype(distances.dtype), accepted, distances)


@dataclasses.dataclass(frozen=True)
class _GeometricMedian(Rule):
  num_iterations: int = 8

  def __post_init__(self):
    super().__post_init__()
    _validate.count(1, num_iterations=self.num_iterations)

  def decide(self, gram, valid, tau):
    matrix = gram.scaled()
    squares = jnp.diagonal(matrix)
    info = jnp.finfo(matrix.dtype)

    def squared_distances(weights):
      """And what is rounding of each: of its terms, however long another vector is."""
      dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
      with_rows, sizes = dot(matrix, weights), dot(jnp.abs(matrix), weights)
      distances = squares - 2 * with_rows + dot(weights, with_rows)
      rounding = 4 * info.eps * (squares + sizes + dot(weights, sizes))
      return jnp.maximum(distances, 0), jnp.maximum(rounding, info.tiny)

    def normalized(weights):
      weights = jnp.where(valid, weights, 0)
      total = jnp.sum(weights)
      return weights / jnp.where(total > 0, total, 1)

    weights = normalized(jnp.ones_like(squares))
    for _ in range(self.num_iterations):
      # Squares below their rounding tell nothing of how near a vector is.
      weights = normalized(1 / jnp.sqrt(jnp.maximum(*squared_distances(weights))))
    distances = jnp.where(valid, squared_distances(weights)[0] / 2, jnp.nan)
    return _if_agreed(weights, valid, distances)


def sequential(distance: str = "cosine", softness: float = 0.0) -> Rule:
  r"""The algorithm of the paper, and the default rule.

  The first finite micro-gradient starts a sum; each later one joins it if it is
  within tau of the sum so far:

  .. math::
    d_i = 1 - \frac{\langle s, g_i \rangle}{|s| |g_i|}, \qquad
    s \leftarrow s + g_i \text{ if } d_i \le \tau

  The result is the mean of those that joined, if there are at least two. It
  depends on the order of the micro-gradients.

  Args:
    distance: 'cosine', or 'euclidean' for
      :math:`|a - b|^2 / (|a|^2 + |b|^2)`, which is also in [0, 2], equals the
      cosine distance for vectors of equal norms, and rejects on length too. It
      compares with the mean of those that joined instead of their sum.
    softness: 0 for the hard threshold. Above 0 a micro-gradient's weight is
      `sigmoid((tau - d) / softness)` (the first keeps weight 1), the result is
      the weighted mean, and accepted means a weight of at least 1/2.

  Returns:
    A rule `(gram [k, k], valid [k], tau) -> Decision`.

  Raises:
    ValueError: for an unknown distance or a negative softness.

  References:
    Chaubard et al., `Beyond Gradient Averaging in Parallel Optimization
    <https://arxiv.org/abs/2412.18052>`_, 2024, algorithm 1.
  """
  return _Sequential(distance, softness)


def running_average(distance: str = "cosine") -> Rule:
  r"""What the paper's PyTorch package does: later micro-gradients weigh more.

  As :func:`sequential`, but with :math:`s \leftarrow (s + g_i) / 2`: four
  accepted micro-gradients weigh 1/8, 1/8, 1/4 and 1/2.

  Args:
    distance: 'cosine' or 'euclidean', see :func:`sequential`.

  Returns:
    A rule `(gram [k, k], valid [k], tau) -> Decision`.

  Raises:
    ValueError: for an unknown distance.

  References:
    PyTorch package `gradient-agreement-filtering
    <https://pypi.org/project/gradient-agreement-filtering/>`_ 0.1.3.
  """
  return _RunningAverage(distance)


def leave_one_out(distance: str = "cosine", softness: float = 0.0) -> Rule:
  """Each micro-gradient against the sum of all the others.

  Independent of the order. The result is the mean of those within tau of the
  others, if there are at least two.

  Args:
    distance: 'cosine' or 'euclidean', see :func:`sequential`; the Euclidean one
      compares with the mean of the others instead of their sum.
    softness: see :func:`sequential`.

  Returns:
    A rule `(gram [k, k], valid [k], tau) -> Decision`.

  Raises:
    ValueError: for an unknown distance or a negative softness.
  """
  return _LeaveOneOut(distance, softness)


def most_neighbors(distance: str = "cosine", softness: float = 0.0) -> Rule:
  """The micro-gradient with the most others within tau of it, and those.

  Ties go to the first; nothing else depends on the order. The distances are those
  from the centre (whose own is NaN), and with a softness above 0 so are the weights.
  It finds the largest group that agrees even where the first micro-gradient is a bad
  one.

  Args:
    distance: 'cosine' or 'euclidean', see :func:`sequential`.
    softness: see :func:`sequential`; the centre keeps weight 1.

  Returns:
    A rule `(gram [k, k], valid [k], tau) -> Decision`.

  Raises:
    ValueError: for an unknown distance or a negative softness.

  References:
    `accept_max_neighbors` of the PyTorch package `GAF-microbatch-pytorch
    <https://pypi.org/project/GAF-microbatch-pytorch/>`_ 0.0.5, which compares
    with `<` where this accepts equality too.
  """
  return MostNeighborsRule(distance, softness)


def min_neighbors(fraction: float, distance: str = "cosine") -> Rule:
  """All micro-gradients that have enough others within tau of them.

  Accepts those with at least `max(2, fraction * k)` within tau, themselves
  counted. Independent of the order. The distance reported for each is the one to
  the last neighbour that it needs, so that it is accepted from that tau on.

  Args:
    fraction: the share of the k micro-gradients that must be near, in [0, 1].
    distance: 'cosine' or 'euclidean', see :func:`sequential`.

  Returns:
    A rule `(gram [k, k], valid [k], tau) -> Decision`.

  Raises:
    ValueError: for an unknown distance or a fraction outside [0, 1].

  References:
    `accept_min_neighbors` of the PyTorch package `GAF-microbatch-pytorch
    <https://pypi.org/project/GAF-microbatch-pytorch/>`_ 0.0.5, which compares
    with `<` where this accepts equality too.
  """
  return _MinNeighbors(distance, fraction=fraction)


def nearest_neighbors(
  number: int, distance: str = "cosine", softness: float = 0.0
) -> Rule:
  """All micro-gradients whose nearest others are near.

  The distance of each is the mean of those to its `number` nearest others (to all
  valid others, if there are fewer); it is accepted up to tau. Independent of the
  order. For many micro-gradients of few examples, where agreement is within kinds:
  those of one class agree with each other, and hardly with the sum of all.

  Args:
    number: how many others, at least 1.
    distance: 'cosine' or 'euclidean', see :func:`sequential`.
    softness: see :func:`sequential`.

  Returns:
    A rule `(gram [k, k], valid [k], tau) -> Decision`.

  Raises:
    ValueError: for a number below 1, an unknown distance or a negative softness.
  """
  return _NearestNeighbors(distance, softness, number=number)


def multi_krum(num_wrong: int, num_kept: int | None = None) -> Rule:
  r"""Multi-Krum: the mean of the micro-gradients that lie closest to their neighbours.

  Each is scored by the sum of its squared distances to its :math:`k - f - 2` nearest
  others, where f is `num_wrong`; the `num_kept` with the smallest scores are averaged.
  Independent of the order but for ties, which go to the first. tau takes no part.
  Micro-gradients that are not finite are left out, of k too.

  Args:
    num_wrong: how many micro-gradients may be wrong, at least 0.
    num_kept: how many are averaged, at least 1; `k - num_wrong` if None. 1 is Krum.

  Returns:
    A rule `(gram [k, k], valid [k], tau) -> Decision`. Its distances are half the mean
    squared distances to those others, in units of the largest norm: in [0, 2], and
    cosine distances for vectors of equal norms.

  Raises:
    ValueError: for numbers outside their ranges; when it decides, for k below
      `num_wrong + 3` and for `num_kept` above k.

  References:
    Blanchard et al., `Machine Learning with Adversaries: Byzantine Tolerant Gradient
    Descent <https://proceedings.neurips.cc/paper/2017/hash/f4b9ec30ad9f68f89b29639786cb62ef-Abstract.html>`_,
    2017.
  """
  return _MultiKrum(num_wrong=num_wrong, num_kept=num_kept)


def geometric_median(num_iterations: int = 8) -> Rule:
  """The point with the smallest sum of distances to all finite micro-gradients.

  Weiszfeld's iteration, on weights alone: from the mean on, each micro-gradient weighs
  the inverse of its distance from the last point. All finite ones are accepted, with
  these weights. Independent of the order. tau takes no part.

  The mean is a start that outliers pull away, and with f of k far from the others each
  iteration takes back a factor of about `(k - f) / f`. Eight are enough where none is
  more than some ten times as long as the others; the page "Comparison with other
  aggregators" of the documentation has figures.

  Args:
    num_iterations: at least 1; the more, the longer wrong micro-gradients may be.

  Returns:
    A rule `(gram [k, k], valid [k], tau) -> Decision`. Its distances are half the
    squared distances to the median, in units of the largest norm.

  Raises:
    ValueError: for a number of iterations below 1.

  References:
    Pillutla et al., `Robust Aggregation for Federated Learning
    <https://arxiv.org/abs/1912.13445>`_, 2019, algorithm 2.
  """
  return _GeometricMedian(num_iterations=num_iterations)


class AnchorRule(Rule):
  """Compares with row 0, an average of past steps; accepts all while it holds none.

  Takes a Gram matrix `[k + 1, k + 1]` and `valid [k + 1]`, whose first entry says
  whether the average holds a step, and decides about the k others.
  """

  def decide(self, gram, valid, tau):
    anchored, valid = valid[0], valid[1:]
    squares = jnp.diagonal(gram.products)
    distances = _gram.distance(
      "cosine", gram.products[0, 1:], squares[0], squares[1:], tau=tau
    )
    accepted = valid & (self._accepts(distances, tau) | ~anchored)
    return Decision(
      accepted.astype(distances.dtype),
      accepted,
      jnp.where(valid & anchored, distances, jnp.nan),
    )


class Memory(NamedTuple):
  """The running mean of the cosines of all pairs, for each of m groups.

  Attributes:
    mean: float32 `[m, k, k]`, in [-1, 1]; 0 for a pair that was never compared.
    weight: float32 `[m, k, k]`, the weight of the steps in the mean; 0 for such a pair.
  """

  mean: jax.Array
  weight: jax.Array


@dataclasses.dataclass(frozen=True)
class RememberingRule:
  """A rule that decides on the running mean of the cosines of all steps."""

  rule: RuleFn

  def init(self, num_groups: int, num_microbatches: int) -> Memory:
    zeros = lambda: jnp.zeros((num_groups, *(num_microbatches,) * 2), jnp.float32)
    return Memory(zeros(), zeros())

  def decide(self, gram, valid, tau, step_tau, memory, decay):
    cosines, compared = _gram.cosines(gram, valid)
    weight = jnp.where(compared, decay * memory.weight + 1, memory.weight)
    step = (cosines - memory.mean) / jnp.where(compared, weight, 1)
    mean = jnp.where(compared, memory.mean + step, memory.mean)
    memory = Memory(mean.astype(jnp.float32), weight.astype(jnp.float32))
    gram = _remembered(memory.mean, valid)
    return *_decide(self.rule, gram, valid, tau, step_tau), memory


def _remembered(mean, valid):
  """The Gram matrix that a rule sees instead of a step's."""
  matrix = jnp.where(jnp.eye(valid.shape[0], dtype=bool), 1, mean)
  return _gram.from_matrix(matrix, valid)


def majority(memory: Memory) -> tuple[jax.Array, jax.Array]:
  """For each source its cosine to the majority `[m, k]`, and its steps `[m, k]`.

  The cosine is that of `min_neighbors` where more than half are needed, NaN for a
  source that was never compared; the steps are the mean weight of its pairs.
  """
  k = memory.mean.shape[-1]
  rule = _MinNeighbors(fraction=(k // 2 + 1) / k)
  valid = jnp.ones(k, bool)
  distances = jax.vmap(
    lambda mean: rule.decide(_remembered(mean, valid), valid, 2).distances
  )(jnp.asarray(memory.mean))
  weight = jnp.where(jnp.eye(k, dtype=bool), 0, memory.weight)
  num_steps = jnp.sum(weight, axis=-1) / max(k - 1, 1)
  return jnp.where(num_steps > 0, 1 - distances, jnp.nan), num_steps


def decide_groups(
  rule: RuleFn | RememberingRule,
  gram: _gram.Gram,
  valid: jax.Array,
  tau: jax.Array,
  step_tau: StepTau | None = None,
  memory: Any = None,
  decay: Any = None,
) -> tuple[Decision, jax.Array, Any]:
  """The decision of every group: arrays `[m, k]`, weights zero without agreement.

  A rule that remembers has an `init` that makes the memory of all groups, and its
  `decide` takes and returns that of one. Nothing else knows what it remembers.

  Args:
    rule: a rule or any callable like one, or one that remembers.
    gram: a `Gram` of `[m, k, k]`; of one row more with an anchor.
    valid: bool `[k]`; one entry more with an anchor.
    tau: the threshold, a scalar.
    step_tau: reads the threshold off each group's distances instead.
    memory: what the rule remembers; None for a rule that does not.
    decay: how much of it stays in a step, a scalar in [0, 1); or None.

  Returns:
    The decision, the threshold `[m]` of each group, and the new memory.
  """

  def decide(group: _gram.Gram, memory):
    if isinstance(rule, RememberingRule):
      return rule.decide(group, valid, tau, step_tau, memory, decay)
    return *_decide(rule, group, valid, tau, step_tau), memory

  decision, tau, memory = jax.vmap(decide)(gram, memory)
  agreed = jnp.any(decision.accepted, axis=1, keepdims=True)
  weights = jnp.where(agreed, decision.weights, 0)
  return decision._replace(weights=weights), tau, memory


def _decide(rule, gram, valid, tau, step_tau):
  """The decision of one group by a rule of this module or a user's, and its tau."""

  def at(tau):
    if isinstance(rule, Rule):
      return rule.decide(gram, valid, tau)
    return _checked(rule, rule(gram.scaled(), valid, tau), valid)

  if step_tau is not None:
    # Distances that do not depend on tau.
    distances = at(jnp.full_like(tau, 2)).distances
    tau = step_tau.of(distances, valid[-distances.shape[0] :]).astype(tau.dtype)
  return at(tau), tau


def _checked(rule, decision, valid):
  """A user's rule's decision, its shapes checked, nothing invalid in it."""
  try:
    weights, accepted, distances = decision
  except (TypeError, ValueError):
    raise ValueError(
      f"rule {rule!r} must return a Decision(weights, accepted, distances), got"
      f" {decision!r}."
    ) from None
  arrays = {"weights": weights, "accepted": accepted, "distances": distances}
  for name, array in arrays.items():
    if jnp.shape(array) != valid.shape:
      raise ValueError(
        f"rule {rule!r} returned {name} of shape {jnp.shape(array)} for"
        f" {valid.shape[0]} micro-gradients, expected {valid.shape}."
      )
  return Decision(
    jnp.where(valid, jnp.asarray(weights, float), 0),
    jnp.asarray(accepted, bool) & valid,
    jnp.asarray(distances, float),
  )
