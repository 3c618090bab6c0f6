"""Tau: a number, a schedule, or steered to a share of accepted micro-gradients."""

import dataclasses

import jax
import jax.numpy as jnp

from gaf_optax import _validate

_HINT = (
  " It is a cosine distance: 0 is the same direction, 1 orthogonal, 2 opposite;"
  " 0.92 to 1.0 is the useful range for most models."
)


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


def check(tau) -> None:
  """Raises for a tau that can be seen to be wrong before the first step."""
  if not callable(tau) and not isinstance(tau, TargetAcceptRate):
    _validate.in_interval(0, 2, _HINT, tau=tau)


def value(tau, num_updates, steered) -> jax.Array:
  """Tau of a step, a scalar array of the widest float dtype that is enabled.

  Args:
    tau: as the user gave it.
    num_updates: int32 scalar, the number of updates before this one.
    steered: the steered value from the state, None unless tau is steered.
  """
  if isinstance(tau, TargetAcceptRate):
    tau = tau.initial if steered is None else steered
  elif callable(tau):
    tau = tau(num_updates)
    _validate.in_interval(0, 2, " It is what the schedule gave." + _HINT, tau=tau)
  return jnp.asarray(tau, float)


def steer(tau, current: jax.Array, accepted, finite) -> jax.Array | None:
  """The next step's tau, float32, for a steered tau; None for others."""
  if not isinstance(tau, TargetAcceptRate):
    return None
  share = accepted / jnp.maximum(finite, 1)
  moved = current + tau.step_size * (tau.rate - share)
  moved = jnp.clip(moved, tau.minimum, tau.maximum)
  return jnp.where(finite > 0, moved, current).astype(jnp.float32)
