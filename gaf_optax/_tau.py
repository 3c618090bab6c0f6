"""Tau: the largest distance that is accepted, over the life of a run.

Each kind of tau is an object that owns its life: `init`, `at`, `of`, `after`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from gaf_optax import _validate

_HINT = (
  " It is a cosine distance: 0 is the same direction, 1 orthogonal, 2 opposite;"
  " 0.92 to 1.0 is the useful range for most models."
)

# Of the better half's mean similarity, at most, that adaptive_tau asks for.
_LARGEST_SHARE = 7 / 8

Schedule: TypeAlias = Callable[[jax.Array], jax.typing.ArrayLike]


@dataclasses.dataclass(frozen=True)
class Tau:
  """How tau moves; without its value, so that it is hashable.

  Attributes:
    uses_distances: whether it is read off the distances of a step, which must not
      depend on tau.
    needs_state: whether it depends on the steps before.
  """

  uses_distances = False
  needs_state = False

  def static(self) -> "Tau":
    """What `of` and `after` need, hashable."""
    return self

  def init(self) -> jax.Array | None:
    """What the state carries from step to step, a float32 scalar or None."""
    return None

  def at(self, carried: jax.Array | None, num_updates: jax.Array) -> jax.Array:
    """Tau of a step before its distances are known, a scalar."""
    raise NotImplementedError

  def of(
    self,
    tau: jax.Array,
    distances: Callable[[jax.Array], jax.Array],
    valid: jax.Array,
  ) -> jax.Array:
    """Tau of a step.

    Args:
      tau: what `at` gave.
      distances: the distances `[k]`, NaN where unknown, as a function of tau.
      valid: bool `[k]`.
    """
    del distances, valid
    return tau

  def after(self, tau: jax.Array, num_accepted, num_finite) -> jax.Array | None:
    """What the state carries after a step with this tau."""
    del tau, num_accepted, num_finite
    return None


@dataclasses.dataclass(frozen=True)
class _Fixed(Tau):
  value: Any

  def static(self):
    return Tau()

  def at(self, carried, num_updates):
    return jnp.asarray(self.value, float)


@dataclasses.dataclass(frozen=True)
class _Scheduled(Tau):
  schedule: Schedule
  needs_state = True

  def static(self):
    return Tau()

  def at(self, carried, num_updates):
    tau = self.schedule(num_updates)
    _validate.in_interval(0, 2, " It is what the schedule gave." + _HINT, tau=tau)
    return jnp.asarray(tau, float)


@dataclasses.dataclass(frozen=True)
class _TargetAcceptRate(Tau):
  rate: float
  initial: float
  step_size: float
  minimum: float
  maximum: float
  needs_state = True

  def init(self):
    return jnp.array(self.initial, jnp.float32)

  def at(self, carried, num_updates):
    return jnp.asarray(carried, float)

  def after(self, tau, num_accepted, num_finite):
    share = num_accepted / jnp.maximum(num_finite, 1).astype(num_accepted.dtype)
    moved = tau.astype(jnp.float32) + self.step_size * (self.rate - share)
    moved = jnp.clip(moved, self.minimum, self.maximum)
    return jnp.where(num_finite > 0, moved, tau).astype(jnp.float32)


class _OfDistances(Tau):
  uses_distances = True

  def at(self, carried, num_updates):
    return jnp.asarray(2.0, float)

  def of(self, tau, distances, valid):
    return self.read(distances(jnp.full_like(tau, 2)), valid).astype(tau.dtype)

  def read(self, distances, valid):
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class _TauQuantile(_OfDistances):
  fraction: float

  def read(self, distances, valid):
    # In double precision, as the caller wrote it: 0.6 of 5 is 3.
    numbers = [math.ceil(self.fraction * n - 1e-9) for n in range(valid.shape[0] + 1)]
    number = jnp.asarray(numbers, jnp.int32)[jnp.sum(valid)]
    known = valid & jnp.isfinite(distances)
    in_order = jnp.sort(jnp.where(known, distances, jnp.inf))
    last = in_order[jnp.maximum(number - 1, 0)]
    return jnp.where(jnp.isfinite(last), last, 2)


@dataclasses.dataclass(frozen=True)
class _AdaptiveTau(_OfDistances):
  def read(self, distances, valid):
    known = valid & jnp.isfinite(distances)
    in_order = jnp.sort(jnp.where(known, distances, jnp.inf))
    n = jnp.sum(known)
    half = (n + 1) // 2
    better = jnp.arange(valid.shape[0]) < half
    total = jnp.sum(jnp.where(better, 1 - in_order, 0))
    similarity = total / jnp.maximum(half, 1).astype(total.dtype)
    share = 1 - jnp.sqrt(2 / jnp.maximum(n, 2).astype(total.dtype))
    share = jnp.minimum(share, _LARGEST_SHARE)
    return jnp.where(similarity > 0, 1 - share * similarity, 2)


def as_tau(tau: Any) -> Tau:
  """The object for what a user gave as tau.

  Raises:
    ValueError: for a number outside [0, 2], or what is no tau.
  """
  if isinstance(tau, Tau):
    return tau
  if callable(tau):
    return _Scheduled(tau)
  _validate.in_interval(0, 2, _HINT, tau=tau)
  return _Fixed(tau)


def as_stateless_tau(tau: Any) -> Tau:
  """The same for forms that keep nothing from one call to the next."""
  if callable(tau) or getattr(tau, "needs_state", False):
    raise ValueError(
      f"tau must be a number here, got {tau!r}: a schedule or a target_accept_rate"
      " needs a state. Pass the value itself."
    )
  return as_tau(tau)


def target_accept_rate(
  rate: float,
  *,
  initial: float = 0.97,
  step_size: float = 0.01,
  minimum: float = 0.0,
  maximum: float = 2.0,
) -> Tau:
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
    What to pass as `tau` to `gaf`, `apply_if_agreed` or `multi_steps`. The current
    value is `metrics(opt_state)['threshold']`.

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
  return _TargetAcceptRate(float(rate), float(initial), float(step_size), low, high)


def tau_quantile(fraction: float) -> Tau:
  """A tau that accepts a given fraction of every step's micro-gradients.

  Accepts the `ceil(fraction * n)` of the n finite micro-gradients that have the
  smallest distances, and those that tie with the last of them. For rules whose
  distances do not depend on tau: all but the sequential ones and `most_neighbors`,
  which raise a ValueError with it. Streamed forms
  refuse it: they see one distance at a time.

  Args:
    fraction: in (0, 1].

  Returns:
    What to pass as `tau` to `gaf` or `apply_if_agreed`. The last step's value is
    `metrics(opt_state)['threshold']`.

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
  return _TauQuantile(float(fraction))


def adaptive_tau() -> Tau:
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
    What to pass as `tau` to `gaf`, `apply_if_agreed`, `example_weights` or, with
    `compare`, `value_and_grad`. The last step's value is
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
  return _AdaptiveTau()
