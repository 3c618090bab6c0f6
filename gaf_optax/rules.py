"""Rules: which micro-gradients agree, decided from their Gram matrix alone.

A rule is a callable `(gram [k, k], valid [k] bool, tau) -> Decision`. The functions of
this module make rules, for `gaf(rule=...)`.
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

  The result is the mean of those that joined, if there are at least two. It
  depends on the order of the micro-gradients; in `gaf` the one to start with moves on
  by one with every update.

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
  return _rules.Sequential(distance, softness)


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
  return _rules.Sequential(distance, keep=0.5)


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
  return _rules.LeaveOneOut(distance, softness)


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
  return _rules.MostNeighbors(distance, softness)


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
  return _rules.MinNeighbors(distance, fraction=fraction)


def majority(distance: str = "cosine") -> Rule:
  """All micro-gradients that agree with more than half, themselves counted.

  :func:`min_neighbors` with a needed number of `max(2, k // 2 + 1)`.

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
  return _rules.NearestNeighbors(distance, softness, number=number)


def multi_krum(num_wrong: int, num_kept: int | None = None) -> Rule:
  r"""Multi-Krum: the mean of the micro-gradients that lie closest to their neighbours.

  Each is scored by the sum of its squared distances to its :math:`k - f - 2` nearest
  others, where f is `num_wrong`; the `num_kept` with the smallest scores are averaged.
  Independent of the order but for ties, which go to the first. tau takes no part.


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
  return _rules.MultiKrum(num_wrong=num_wrong, num_kept=num_kept)


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
  return _rules.GeometricMedian(num_iterations=num_iterations)
