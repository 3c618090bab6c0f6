"""Tau: a number, a schedule, steered over steps, or read off a step's distances."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from gaf_optax import _validate

_HINT = (
  " It is a cosine distance: 0 is the same direction, 1 orthogonal, 2 opposite;"
  " 0.92 to 1.0 is the useful range for most models."
)

# Of the better half's mean similarity, at most, that adaptive_tau asks for.
_LARGEST_SHARE = 7 / 8


@dataclasses.dataclass(frozen=True)
class TargetAcceptRate:
  """Made by `target_accept_rate`; given to `gaf` as `tau`."""

  rate: float
  initial: float
  step_size: float
  minimum: float
  maximum: float


def target_accept_rate(
  rate: float,
  *,
  initial: float = 0.97,
  step_size: float = 0.01,
  minimum: float = 0.0,
  maximum: float = 2.0,
) -> TargetAcceptRate:
  r"""A tau that is steered to accept a given share of the micro-gradients.

  After every step, with the share :math:`a_t` of that step's finite
  micro-gradients that were accepted,

  .. math::
    \tau_{t+1} = \operatorname{clip}(\tau_t + \eta (\text{rate} - a_t),
      \text{minimum}, \text{maximum})

  where :math:`\eta` is `step_size`. A step without any finite micro-gradient
  leaves tau as it is.

  Args:
    rate: the share to accept, in [0, 1].
    initial: tau at the first step, in [minimum, maximum].
    step_size: how far tau moves in a step that is wrong by 1, above 0.
    minimum: the lowest tau, in [0, 2].
    maximum: the highest tau, in [0, 2].

  Returns:
    An object for the argument `tau` of `gaf`, `apply_if_agreed` and
    `multi_steps`. The current value is `metrics(opt_state)['threshold']`.

  Raises:
    ValueError: if an argument is outside its range.

  Examples:
    >>> import optax
    >>> from gaf_optax import gaf, target_accept_rate
    >>> tx = optax.chain(gaf(target_accept_rate(0.1)), optax.sgd(0.1))
  """
  _validate.in_interval(0, 1, rate=rate)
  _validate.positive(step_size=step_size)
  _validate.in_interval(0, 2, _HINT, minimum=minimum, maximum=maximum)
  low, high = float(minimum), float(maximum)
  if low > high:
    raise ValueError(
      f"minimum must be at most maximum, got minimum {low} and maximum {high}."
    )
  _validate.in_interval(low, high, _HINT, initial=initial)
  return TargetAcceptRate(float(rate), float(initial), float(step_size), low, high)


@dataclasses.dataclass(frozen=True)
class TauQuantile:
  """Made by `tau_quantile`; given to `gaf` as `tau`."""

  fraction: float

  def of(self, distances: jax.Array, valid: jax.Array) -> jax.Array:
    """The distance of the last micro-gradient that is accepted."""
    k = valid.shape[0]
    # In double precision, as the caller wrote it: 0.6 of 5 is 3.
    numbers = [math.ceil(self.fraction * n - 1e-9) for n in range(k + 1)]
    number = jnp.asarray(numbers, jnp.int32)[jnp.sum(valid)]
    known = valid & jnp.isfinite(distances)
    in_order = jnp.sort(jnp.where(known, distances, jnp.inf))
    last = in_order[jnp.maximum(number - 1, 0)]
    return jnp.where(jnp.isfinite(last), last, 2)


@dataclasses.dataclass(frozen=True)
class AdaptiveTau:
  """Made by `adaptive_tau`; given to `gaf` as `tau`."""

  def of(self, distances: jax.Array, valid: jax.Array) -> jax.Array:
    """The distance at which the similarity is a share of the better half's mean."""
    known = valid & jnp.isfinite(distances)
    in_order = jnp.sort(jnp.where(known, distances, jnp.inf))
    n = jnp.sum(known)
    half = (n + 1) // 2
    better = jnp.arange(valid.shape[0]) < half
    total = jnp.sum(jnp.where(better, 1 - in_order, 0))
    dtype = total.dtype
    similarity = total / jnp.maximum(half, 1).astype(dtype)
    share = 1 - jnp.sqrt(2 / jnp.maximum(n, 2).astype(dtype))
    share = jnp.minimum(share, _LARGEST_SHARE)
    return jnp.where(similarity > 0, 1 - share * similarity, 2)


def tau_quantile(fraction: float) -> TauQuantile:
  """A tau that accepts a given fraction of every step's micro-gradients.

  Accepts the `ceil(fraction * n)` of the n finite micro-gradients that have the
  smallest distances, and those that tie with the last of them. For rules whose
  distances do not depend on tau: all but the sequential ones and `most_neighbors`,
  which raise a ValueError with it. For streamed forms it is none, since they see one
  distance after the other.

  Args:
    fraction: in (0, 1].

  Returns:
    An object for the argument `tau` of `gaf` and `apply_if_agreed`. The threshold of
    the last step is `metrics(opt_state)['threshold']`.

  Raises:
    ValueError: if the fraction is outside its range.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gaf_optax import gaf, metrics, rules, tau_quantile
    >>> tx = gaf(tau_quantile(0.5), rule=rules.leave_one_out())
    >>> rows = jnp.array([[1., 0.], [1., 1.], [0., 1.], [-1., 0.]])
    >>> _, state = tx.update(rows, tx.init(jnp.zeros(2)))
    >>> float(metrics(state)['num_accepted'])
    2.0
  """
  _validate.positive(fraction=fraction)
  _validate.in_interval(0, 1, fraction=fraction)
  return TauQuantile(float(fraction))


def adaptive_tau() -> AdaptiveTau:
  r"""A tau that is read off each step's distances, with no number to choose.

  With the similarities :math:`1 - d_i` of the n finite micro-gradients of a step,
  accepts those that are at least a share of the mean of their better half (the half
  with the smallest distances, rounded up), the share being

  .. math:: \min\left(1 - \sqrt{2 / n},\ 7 / 8\right)

  which is a half for 8 and seven eighths from 128 on, since the more there are, the
  smaller a difference is evidence. Accepts all where that mean is not above 0: nothing
  agrees with anything, so there is no evidence against anyone. It follows the
  similarities as they shrink in the course of training, where a fixed tau ends by
  dropping what is right. For the rules that :func:`tau_quantile` works with; made for
  `rules.min_neighbors(0.6)` on the memory of sources that persist (`memory_decay` of
  :func:`gaf`), and for `rules.nearest_neighbors(5)` on single examples.

  Returns:
    An object for the argument `tau` of `gaf`, `apply_if_agreed`, `example_weights` and,
    with `compare`, `value_and_grad`. The threshold of the last step is
    `metrics(opt_state)['threshold']`.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gaf_optax import adaptive_tau, gaf, rules
    >>> tx = gaf(adaptive_tau(), rule=rules.min_neighbors(0.6), num_microbatches=4)
    >>> rows = jnp.array([[1., 0.], [1., .1], [.9, 0.], [-1., 1.]])
    >>> _, state = tx.update(rows, tx.init(jnp.zeros(2)))
    >>> state.accepted
    Array([ True,  True,  True, False], dtype=bool)
  """
  return AdaptiveTau()


def is_step_tau(tau) -> bool:
  """Whether tau is read off the distances of each step."""
  return isinstance(tau, TauQuantile | AdaptiveTau)


def check(tau) -> None:
  """Raises for a tau that can be seen to be wrong before the first step."""
  known = isinstance(tau, TargetAcceptRate) or is_step_tau(tau)
  if not callable(tau) and not known:
    _validate.in_interval(0, 2, _HINT, tau=tau)


def value(tau, num_updates, steered) -> jax.Array:
  """Tau of a step, a scalar array of the widest float dtype that is enabled.

  Args:
    tau: as the user gave it.
    num_updates: int32 scalar, the number of updates before this one.
    steered: the steered value from the state, None unless tau is steered.
  """
  if is_step_tau(tau):
    tau = 2.0  # Until the distances are known.
  elif isinstance(tau, TargetAcceptRate):
    tau = tau.initial if steered is None else steered
  elif callable(tau):
    tau = tau(num_updates)
    _validate.in_interval(0, 2, " It is what the schedule gave." + _HINT, tau=tau)
  return jnp.asarray(tau, float)


def steer(tau, current: jax.Array, accepted, finite) -> jax.Array | None:
  """The next step's tau, float32, for a steered tau; None for others."""
  if not isinstance(tau, TargetAcceptRate):
    return None
  share = accepted / jnp.maximum(finite, 1).astype(accepted.dtype)
  moved = current + tau.step_size * (tau.rate - share)
  moved = jnp.clip(moved, tau.minimum, tau.maximum)
  return jnp.where(finite > 0, moved, current).astype(jnp.float32)
