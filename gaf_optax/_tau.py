"""The largest accepted distance, and how it changes over a run."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias, dataclass_transform

import jax
import jax.numpy as jnp

from gaf_optax import _validate

_HINT = (
  " It is a cosine distance: 0 is the same direction, 1 orthogonal, 2 opposite."
  " The paper uses 0.92 to 1.0."
)

# Maximum share of the mean similarity that adaptive_tau requires.
_MAX_SHARE = 7 / 8

Schedule: TypeAlias = Callable[[jax.Array], jax.typing.ArrayLike]


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def _pytree(cls):
  """A frozen dataclass whose only traced field is `value`."""
  cls = dataclasses.dataclass(frozen=True)(cls)
  static = [f.name for f in dataclasses.fields(cls) if f.name != "value"]
  return jax.tree_util.register_dataclass(cls, ["value"], static)


@_pytree
class Tau:
  """A number or schedule; a step calls `at`, then `from_distances`, then `after`.

  Attributes:
    value: tau of the step, a scalar array; before `at`, a number or schedule.
  """

  value: Any = dataclasses.field(default=None, kw_only=True, repr=False)

  def init(self) -> jax.Array | None:
    """The value carried in the state, a float32 scalar or None."""
    return None

  def at(self, carried: jax.Array | None, num_updates: jax.Array) -> "Tau":
    """Tau of a step before its distances are known."""
    value = self.value
    if callable(value):
      value = value(num_updates)
      _validate.in_interval(0, 2, " The schedule returned it." + _HINT, tau=value)
    return self.with_value(value)

  def from_distances(self, distances: Callable, valid: jax.Array) -> "Tau":
    """Tau of a step; `distances` maps a value of tau to `[k]`."""
    del distances, valid
    return self

  def after(self, num_accepted, num_valid) -> jax.Array | None:
    """The carried value after a step."""
    del num_accepted, num_valid
    return None

  def with_value(self, value) -> "Tau":
    return dataclasses.replace(self, value=jnp.asarray(value, float))


@_pytree
class _TargetAcceptRate(Tau):
  rate: float
  initial: float
  step_size: float
  minimum: float
  maximum: float

  def init(self):
    return jnp.array(self.initial, jnp.float32)

  def at(self, carried, num_updates):
    return self.with_value(carried)

  def after(self, num_accepted, num_valid):
    share = num_accepted / jnp.maximum(num_valid, 1).astype(num_accepted.dtype)
    moved = self.value.astype(jnp.float32) + self.step_size * (self.rate - share)
    moved = jnp.clip(moved, self.minimum, self.maximum)
    return jnp.where(num_valid > 0, moved, self.value).astype(jnp.float32)


@_pytree
class FromDistances(Tau):
  """A tau computed from a step's distances, which must not depend on tau."""

  def at(self, carried, num_updates):
    return self.with_value(2)

  def from_distances(self, distances, valid):
    distances = distances(self.value)
    known = valid & jnp.isfinite(distances)
    in_order = jnp.sort(jnp.where(known, distances, jnp.inf))
    return self.with_value(self.compute(in_order, jnp.sum(known), jnp.sum(valid)))

  def compute(self, in_order, num_known, num_valid):
    """Tau from sorted distances `[k]`; unknown distances are Inf."""
    raise NotImplementedError


@_pytree
class _TauQuantile(FromDistances):
  fraction: float

  def compute(self, in_order, num_known, num_valid):
    # In Python's double precision, so that 0.6 of 5 is 3.
    k = in_order.shape[0]
    numbers = [math.ceil(self.fraction * n - 1e-9) for n in range(k + 1)]
    number = jnp.asarray(numbers, jnp.int32)[num_valid]
    last = in_order[jnp.maximum(number - 1, 0)]
    return jnp.where(jnp.isfinite(last), last, 2)


@_pytree
class _AdaptiveTau(FromDistances):
  def compute(self, in_order, num_known, num_valid):
    half = (num_known + 1) // 2
    is_better_half = jnp.arange(in_order.shape[0]) < half
    total = jnp.sum(jnp.where(is_better_half, 1 - in_order, 0))
    similarity = total / jnp.maximum(half, 1).astype(total.dtype)
    share = 1 - jnp.sqrt(2 / jnp.maximum(num_known, 2).astype(total.dtype))
    share = jnp.minimum(share, _MAX_SHARE)
    return jnp.where(similarity > 0, 1 - share * similarity, 2)


def as_tau(tau: Any) -> Tau:
  """A `Tau` for a user's tau; raises for numbers outside [0, 2] and other types."""
  if isinstance(tau, Tau):
    return tau
  if not callable(tau):
    _validate.in_interval(0, 2, _HINT, tau=tau)
  return Tau(value=tau)


def as_stateless_tau(tau: Any) -> Tau:
  """`as_tau` for forms without a state."""
  if callable(tau) or isinstance(tau, _TargetAcceptRate):
    raise ValueError(
      f"tau must be a number here, got {tau!r}: a schedule or a target_accept_rate"
      " needs a state. Pass the value instead."
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
  r"""A tau that adapts until a given share of the micro-gradients is accepted.

  After every step, given the share :math:`a_t` of that step's finite micro-gradients
  that were accepted,

  .. math::
    \tau_{t+1} = \operatorname{clip}(\tau_t + \eta (\text{rate} - a_t),
      \text{minimum}, \text{maximum})

  where :math:`\eta` is `step_size`. A step without finite micro-gradients does not
  change tau.

  Args:
    rate: the share to accept, in [0, 1].
    initial: tau of the first step, in [minimum, maximum].
    step_size: the change of tau per unit of `rate - a_t`, above 0.
    minimum: the lowest tau, in [0, 2].
    maximum: the highest tau, in [0, 2].

  Returns:
    A `tau` for `gaf`, `apply_if_agreed` or `multi_steps`. `metrics(opt_state)` returns
    its value as `threshold`.

  Raises:
    ValueError: for an argument outside its range.

  Examples:
    >>> import optax
    >>> from gaf_optax import gaf, target_accept_rate
    >>> tx = optax.chain(gaf(target_accept_rate(0.1)), optax.sgd(0.1))
  """
  _validate.in_interval(0, 1, rate=rate)
  _validate.in_interval(
    0, math.inf, open_start=True, open_end=True, step_size=step_size
  )
  _validate.in_interval(0, 2, _HINT, minimum=minimum, maximum=maximum)
  low, high = float(minimum), float(maximum)
  if low > high:
    raise ValueError(
      f"minimum must be at most maximum, got minimum {low} and maximum {high}."
    )
  _validate.in_interval(low, high, " The bounds are minimum, maximum.", initial=initial)
  return _TargetAcceptRate(float(rate), float(initial), float(step_size), low, high)


def tau_quantile(fraction: float) -> Tau:
  """A tau that accepts a given fraction of each step's micro-gradients.

  Accepts the `ceil(fraction * n)` smallest distances of the n finite micro-gradients,
  including ties. Rules whose distances depend on tau (the sequential rules and
  `most_neighbors`), `multi_steps`, and `value_and_grad` without `compare` raise a
  ValueError.

  Args:
    fraction: in (0, 1].

  Returns:
    A `tau` for `gaf`, `apply_if_agreed`, `example_weights` or, with `compare`,
    `value_and_grad`.

  Raises:
    ValueError: for a fraction outside its range.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gaf_optax import gaf, metrics, rules, tau_quantile
    >>> tx = gaf(tau_quantile(0.5), rule=rules.leave_one_out())
    >>> rows = jnp.array([[1., 0.], [1., 1.], [0., 1.], [-1., 0.]])
    >>> _, state = tx.update(rows, tx.init(jnp.zeros(2)))
    >>> float(metrics(state)['num_accepted'])
    2.0
  """
  _validate.in_interval(0, 1, open_start=True, fraction=fraction)
  return _TauQuantile(float(fraction))


def adaptive_tau() -> Tau:
  r"""A tau computed from each step's distances, without parameters.

  The similarity of a micro-gradient is 1 minus its distance. Takes the mean similarity
  of the better half (rounded up) of the n finite micro-gradients. Accepts similarities
  of at least this share of that mean:

  .. math:: \min\left(1 - \sqrt{2 / n},\ 7 / 8\right)

  The share is 1/2 for n = 8 and 7/8 from n = 128, since small differences are evidence
  only among many micro-gradients. If the mean is not above 0, there is no agreement to
  compare against, so nothing is rejected. Tau follows the similarities as they shrink
  during training, while a fixed tau eventually drops correct micro-gradients.

  Works with the same rules as :func:`tau_quantile`. Designed for
  `rules.majority()` on the memory of persistent sources (`memory_decay` of
  :func:`gaf`), and for `rules.nearest_neighbors(5)` on single examples.

  Returns:
    A `tau` for `gaf`, `apply_if_agreed`, `example_weights` or, with `compare`,
    `value_and_grad`.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gaf_optax import adaptive_tau, gaf, rules
    >>> tx = gaf(adaptive_tau(), rule=rules.majority(), num_microbatches=4)
    >>> rows = jnp.array([[1., 0.], [1., .1], [.9, 0.], [-1., 1.]])
    >>> _, state = tx.update(rows, tx.init(jnp.zeros(2)))
    >>> state.accepted
    Array([ True,  True,  True, False], dtype=bool)
  """
  return _AdaptiveTau()
