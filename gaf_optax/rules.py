"""Rules, which decide from a Gram matrix which micro-gradients agree.

A rule is a callable `(gram [k, k], valid [k] bool, tau) -> Decision`. The functions of
this module return rules for `gaf(rule=...)`.
"""

from gaf_optax import _rules
from gaf_optax._rules import Decision, Rule, RuleFn

__all__ = [
  "Decision",
  "RuleFn",
  "geometric_median",
  "leave_one_out",
  "majority",
  "min_neighbors",
  "most_neighbors",
  "multi_krum",
  "nearest_neighbors",
  "running_average",
  "sequential",
]


def sequential(distance: str = "cosine", softness: float = 0.0) -> Rule:
  r"""The algorithm of the paper, and the default rule.

  The first micro-gradient that is finite and not zero starts a sum; each later one
  joins it if it is within tau of the sum so far:

  .. math::
    d_i = 1 - \frac{\langle s, g_i \rangle}{|s| |g_i|}, \qquad
    s \leftarrow s + g_i \text{ if } d_i \le \tau

  The result is the mean of those that joined, if there are at least two. It depends on
  the order of the micro-gradients; in `gaf` the start moves by one with every update.

  Args:
    distance: 'cosine', or 'euclidean' for
      :math:`|a - b|^2 / (|a|^2 + |b|^2)`, which is also in [0, 2], equals the cosine
      distance for vectors of equal norms, and also rejects on length. It compares with
      the mean of those that joined instead of their sum.
    softness: 0 for a hard decision. Above 0 a micro-gradient's weight is
      `sigmoid((tau - d) / softness)` (the first keeps weight 1), the result is the
      weighted mean, and accepted means a weight of at least 1/2.

  Returns:
    A rule `(gram [k, k], valid [k], tau) -> Decision`.

  Raises:
    ValueError: for an unknown distance or a negative softness.

  References:
    Chaubard et al., `Beyond Gradient Averaging in Parallel Optimization
    <https://arxiv.org/abs/2412.18052>`_, 2024, algorithm 1.
  """
  return _rules.Sequential(distance, softness)


def running_average(distance: str = "cosine") -> Rule:
  r"""The rule of the paper's PyTorch package: later micro-gradients weigh more.

  Like :func:`sequential`, but with :math:`s \leftarrow (s + g_i) / 2`: four
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
  return _rules.Sequential(distance, keep=0.5)


def leave_one_out(distance: str = "cosine", softness: float = 0.0) -> Rule:
  """Compares each micro-gradient with the sum of all the others.

  Independent of the order. The result is the mean of those within tau, if there are at
  least two.

  Args:
    distance: 'cosine' or 'euclidean', see :func:`sequential`; 'euclidean' compares with
      the mean of the others instead of their sum.
    softness: see :func:`sequential`.

  Returns:
    A rule `(gram [k, k], valid [k], tau) -> Decision`.

  Raises:
    ValueError: for an unknown distance or a negative softness.
  """
  return _rules.LeaveOneOut(distance, softness)


def most_neighbors(distance: str = "cosine", softness: float = 0.0) -> Rule:
  """Accepts the micro-gradient with the most neighbors within tau, and its neighbors.

  Ties go to the first; otherwise independent of the order. Distances (and with a
  softness above 0 the weights) are relative to this micro-gradient, whose own distance
  is NaN.

  Args:
    distance: 'cosine' or 'euclidean', see :func:`sequential`.
    softness: see :func:`sequential`; this micro-gradient keeps weight 1.

  Returns:
    A rule `(gram [k, k], valid [k], tau) -> Decision`.

  Raises:
    ValueError: for an unknown distance or a negative softness.

  References:
    `accept_max_neighbors` of the PyTorch package `GAF-microbatch-pytorch
    <https://pypi.org/project/GAF-microbatch-pytorch/>`_ 0.0.5, which compares
    with `<`; this rule accepts equality.
  """
  return _rules.MostNeighbors(distance, softness)


def min_neighbors(fraction: float, distance: str = "cosine") -> Rule:
  """Accepts all micro-gradients with enough neighbors within tau.

  Each needs at least `max(2, fraction * k)` within tau, including itself. Independent
  of the order. The distance of each is to the last neighbor that it needs.

  Args:
    fraction: the fraction of the k micro-gradients that must be within tau, in [0, 1].
    distance: 'cosine' or 'euclidean', see :func:`sequential`.

  Returns:
    A rule `(gram [k, k], valid [k], tau) -> Decision`.

  Raises:
    ValueError: for an unknown distance or a fraction outside [0, 1].

  References:
    `accept_min_neighbors` of the PyTorch package `GAF-microbatch-pytorch
    <https://pypi.org/project/GAF-microbatch-pytorch/>`_ 0.0.5, which compares
    with `<`; this rule accepts equality.
  """
  return _rules.MinNeighbors(distance, fraction=fraction)


def majority(distance: str = "cosine") -> Rule:
  """Accepts all micro-gradients with more than half of the k within tau.

  :func:`min_neighbors` with `max(2, k // 2 + 1)` in place of `max(2, fraction * k)`.

  Args:
    distance: 'cosine' or 'euclidean', see :func:`sequential`.

  Returns:
    A rule `(gram [k, k], valid [k], tau) -> Decision`.

  Raises:
    ValueError: for an unknown distance.
  """
  return _rules.Majority(distance)


def nearest_neighbors(
  number: int, distance: str = "cosine", softness: float = 0.0
) -> Rule:
  """Accepts all micro-gradients whose nearest neighbors are within tau on average.

  The distance of each is the mean distance to its `number` nearest others (or to all
  valid others, if there are fewer). Independent of the order. Designed for many
  micro-gradients of few examples each, which agree within a class but hardly overall.

  Args:
    number: the number of neighbors, at least 1.
    distance: 'cosine' or 'euclidean', see :func:`sequential`.
    softness: see :func:`sequential`.

  Returns:
    A rule `(gram [k, k], valid [k], tau) -> Decision`.

  Raises:
    ValueError: for a number below 1, an unknown distance or a negative softness.
  """
  return _rules.NearestNeighbors(distance, softness, number=number)


def multi_krum(num_wrong: int, num_kept: int | None = None) -> Rule:
  r"""Multi-Krum: the mean of the micro-gradients that lie closest to their neighbors.

  The score of each is the sum of the squared distances to its :math:`k - f - 2` nearest
  others, where f is `num_wrong`. The `num_kept` with the smallest scores are averaged.
  Independent of the order, except that ties go to the first. `tau` is ignored.

  Args:
    num_wrong: how many micro-gradients may be wrong, at least 0.
    num_kept: how many to average, at least 1; None for `k - num_wrong`. 1 is Krum.

  Returns:
    A rule `(gram [k, k], valid [k], tau) -> Decision`. Its distances are half the mean
    squared distances to these neighbors, relative to the largest norm: in [0, 2], and
    cosine distances for vectors of equal norms.

  Raises:
    ValueError: for numbers outside their ranges; the rule raises it for k below
      `num_wrong + 3` and for `num_kept` above k.

  References:
    Blanchard et al., `Machine Learning with Adversaries: Byzantine Tolerant Gradient
    Descent
    <https://proceedings.neurips.cc/paper/2017/hash/f4b9ec30ad9f68f89b29639786cb62ef-Abstract.html>`_,
    2017.
  """
  return _rules.MultiKrum(num_wrong=num_wrong, num_kept=num_kept)


def geometric_median(num_iterations: int = 8) -> Rule:
  """The point with the smallest sum of distances to all finite micro-gradients.

  Weiszfeld's iteration on weights: it starts at the mean, and each micro-gradient gets
  the inverse of its distance from the last point as weight. Accepts all finite
  micro-gradients, with these weights. Independent of the order. `tau` is ignored.

  If f of k are far from the others, each iteration reduces their pull on the result by
  a factor of about `(k - f) / f`. Eight are enough if none is more than about ten times
  as long as the others (see "Comparison with other aggregators").

  Args:
    num_iterations: at least 1; longer outliers need more.

  Returns:
    A rule `(gram [k, k], valid [k], tau) -> Decision`. Its distances are half the
    squared distances to the median, relative to the largest norm.

  Raises:
    ValueError: for a number of iterations below 1.

  References:
    Pillutla et al., `Robust Aggregation for Federated Learning
    <https://arxiv.org/abs/1912.13445>`_, 2019, algorithm 2.
  """
  return _rules.GeometricMedian(num_iterations=num_iterations)
