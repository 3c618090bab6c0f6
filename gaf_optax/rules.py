"""Rules: which micro-gradients agree, decided from their Gram matrix alone.

A rule is a callable `(gram [k, k], valid [k] bool, tau) -> Decision`. The rules of
this module are made by lowercase factories and given to `gaf(rule=...)`.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gaf_optax import _gram, _numerics, _validate

__all__ = [
  "Decision",
  "leave_one_out",
  "min_neighbors",
  "most_neighbors",
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


class SequentialRule(Rule):
  """A rule that sees one micro-gradient after the other and keeps one vector s.

  Only these rules work on streamed micro-gradients. A subclass says in `merge`
  how s takes up the next micro-gradient: `s <- keep * s + add * g`.
  """

  def merge(self, distance, tau, first):
    """`(keep, add, accepted)` for a micro-gradient at `distance` from s.

    `first` is True while s holds nothing yet.
    """
    raise NotImplementedError

  def decide(self, gram, valid, tau):
    k, dtype = valid.shape[0], gram.products.dtype
    power = lambda exponent: _numerics.power_of_two(exponent, dtype)

    def visit(carry, i):
      s = carry
      row, exponent = gram.products[i], gram.exponents[i]
      norm2 = row[i]
      first = s.total == 0
      total = jnp.where(first, 1, s.total)
      distance = _numerics.distance(
        self.distance,
        s.with_rows[i] / total,
        s.norm2 / total**2,
        norm2,
        tau=tau,
        shift=exponent - s.exponent,
        # Rounding in a sum of squares that cancelled.
        cancelled=s.norm2 <= 4 * jnp.finfo(dtype).eps * s.squares,
      )
      keep, add, accepted = self.merge(distance, tau, first)
      keep = jnp.where(valid[i], keep, 1).astype(dtype)
      add = jnp.where(valid[i], add, 0).astype(dtype)
      top = jnp.where(add > 0, jnp.maximum(s.exponent, exponent), s.exponent)
      a = keep * power(s.exponent - top)
      b = add * power(exponent - top)
      merged = _Running(
        exponent=top,
        total=keep * s.total + add,
        weights=(keep * s.weights).at[i].set(add),
        with_rows=a * s.with_rows + b * row,
        norm2=a * a * s.norm2 + 2 * a * b * s.with_rows[i] + b * b * norm2,
        squares=a * a * s.squares + b * b * norm2,
      )
      compared = valid[i] & ~first
      return merged, (accepted & valid[i], jnp.where(compared, distance, jnp.nan))

    nothing = _Running(
      exponent=jnp.full((), _numerics.ZERO_EXPONENT, jnp.int32),
      total=jnp.zeros((), dtype),
      weights=jnp.zeros((k,), dtype),
      with_rows=jnp.zeros((k,), dtype),
      norm2=jnp.zeros((), dtype),
      squares=jnp.zeros((), dtype),
    )
    nothing = _numerics.typed(nothing, _numerics.typed_zero((gram, valid, tau)))
    last, (accepted, distances) = jax.lax.scan(
      visit, nothing, jnp.arange(k), unroll=min(k, 4)
    )
    return _settled(last.weights, accepted, distances)


class _Running(NamedTuple):
  """The vector s of a sequential rule, known by its inner products alone.

  s is `2**exponent` times the vector that `with_rows` and `norm2` speak of.
  """

  exponent: jax.Array
  total: jax.Array  # the sum of the weights
  weights: jax.Array  # [k]
  with_rows: jax.Array  # [k], <s, g_j>
  norm2: jax.Array  # |s|^2
  squares: jax.Array  # |s|^2 as if the terms were orthogonal


def _settled(weights, accepted, distances):
  """The decision with nothing accepted where no two agree."""
  agreed = jnp.sum(accepted) > 1
  return Decision(jnp.where(agreed, weights, 0), accepted & agreed, distances)


class _Sequential(SequentialRule):
  def merge(self, distance, tau, first):
    weight = jnp.where(first, 1, self._weights(distance, tau))
    return 1, weight, first | self._accepts(distance, tau)


class _RunningAverage(SequentialRule):
  def merge(self, distance, tau, first):
    accepted = first | self._accepts(distance, tau)
    half = jnp.where(accepted, 0.5, 0)
    return 1 - half, jnp.where(first, 1, half), accepted


class _LeaveOneOut(Rule):
  def decide(self, gram, valid, tau):
    dtype = gram.products.dtype
    others = valid[None, :] & ~jnp.eye(valid.shape[0], dtype=bool)
    # The units of each sum of others: its largest term.
    top = jnp.max(
      jnp.where(others, gram.exponents[None, :], _numerics.ZERO_EXPONENT), axis=1
    )
    shares = jnp.where(
      others,
      _numerics.power_of_two(gram.exponents[None, :] - top[:, None], dtype),
      0,
    )
    number = jnp.sum(others, axis=1)
    shares /= jnp.maximum(number, 1)[:, None].astype(dtype)
    with_rows = jnp.matmul(shares, gram.products, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.diagonal(gram.products)
    norm2 = jnp.sum(with_rows * shares, axis=1)
    orthogonal = jnp.sum(shares**2 * squares[None, :], axis=1)
    distances = _numerics.distance(
      self.distance,
      jnp.diagonal(with_rows),
      norm2,
      squares,
      tau=tau,
      shift=gram.exponents - top,
      cancelled=norm2 <= 4 * jnp.finfo(dtype).eps * orthogonal,
    )
    distances = jnp.where(valid & (number > 0), distances, jnp.nan)
    weights = jnp.where(valid, self._weights(distances, tau), 0)
    return _settled(weights, self._accepts(distances, tau), distances)


def _pairwise(kind, gram, valid, tau):
  """Distances of all pairs `[k, k]`: 0 to itself, NaN to an invalid one."""
  squares = jnp.diagonal(gram.products)
  distances = _numerics.distance(
    kind,
    gram.products,
    squares[:, None],
    squares[None, :],
    tau=tau,
    shift=gram.exponents[None, :] - gram.exponents[:, None],
  )
  distances = jnp.where(jnp.eye(valid.shape[0], dtype=bool), 0, distances)
  return jnp.where(valid[:, None] & valid[None, :], distances, jnp.nan)


class _MostNeighbors(Rule):
  def decide(self, gram, valid, tau):
    pairs = _pairwise(self.distance, gram, valid, tau)
    center = jnp.argmax(jnp.sum(self._accepts(pairs, tau), axis=1))
    distances = pairs[center]
    weights = jnp.where(valid, self._weights(distances, tau), 0)
    is_center = jnp.arange(valid.shape[0]) == center
    return _settled(
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
    return _settled(accepted.astype(distances.dtype), accepted, distances)


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

  Of several with equally many the first is the centre. The distances are those
  from the centre (whose own is NaN), and with a softness above 0 so are the
  weights. The order matters for ties alone. It finds the largest group that
  agrees even where the first micro-gradient is a bad one.

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
  return _MostNeighbors(distance, softness)


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


def decide_groups(rule, gram, valid, tau, anchored=None) -> Decision:
  """The decision of every group: arrays `[m, k]`, weights zero without agreement.

  Args:
    rule: a rule or any callable like one; None to compare with an anchor, which is
      row 0 of the Gram matrices.
    gram: a `Gram` of `[m, k, k]`, or `[m, k + 1, k + 1]` with an anchor.
    valid: bool `[k]`.
    tau: the threshold, a scalar.
    anchored: bool scalar, whether the anchor holds anything yet.
  """

  def decide(group: _gram.Gram) -> Decision:
    if rule is None:
      return _against_anchor(group, valid, tau, anchored)
    if isinstance(rule, Rule):
      return rule.decide(group, valid, tau)
    return _checked(rule, rule(group.scaled(), valid, tau), valid)

  decision = jax.vmap(decide)(gram)
  agreed = jnp.any(decision.accepted, axis=1, keepdims=True)
  return decision._replace(weights=jnp.where(agreed, decision.weights, 0))


def _against_anchor(gram, valid, tau, anchored):
  """Compares with row 0; accepts all while the anchor holds nothing."""
  squares = jnp.diagonal(gram.products)
  distances = _numerics.distance(
    "cosine", gram.products[0, 1:], squares[0], squares[1:], tau=tau
  )
  within = distances <= jnp.asarray(tau, distances.dtype)
  accepted = valid & (within | ~anchored)
  return Decision(
    accepted.astype(distances.dtype),
    accepted,
    jnp.where(valid & anchored, distances, jnp.nan),
  )


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
