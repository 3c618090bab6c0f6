"""Transformations that run an inner one only on steps with agreement."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gaf_optax import _gaf, _inner, _options, _state, _tree, rules


class ApplyIfAgreedState(NamedTuple):
  """State of `apply_if_agreed`.

  Attributes:
    gaf_state: a `GafState`.
    inner_state: the state of the inner transformation.
  """

  gaf_state: _state.GafState
  inner_state: Any


def apply_if_agreed(
  inner: optax.GradientTransformation,
  tau: _options.Tau = 0.97,
  *,
  rule: rules.RuleFn | None = None,
  embed: _tree.Embed | None = None,
  axis_name: _options.AxisNames | None = None,
  param_axes: _options.ParamAxes = (),
  stacked: bool | None = None,
  groups: _options.Groups | None = None,
  anchor_decay: float | None = None,
  memory_decay: float | None = None,
  num_microbatches: int | None = None,
  max_norm_ratio: float | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Applies `gaf`, then `inner`; skips `inner` on steps without agreement.

  On steps without agreement the update is zero and the state of `inner` is unchanged,
  as in the paper.

  ==================  ==========================  =======================
  without agreement   `chain(gaf(), inner)`       `apply_if_agreed(inner)`
  ==================  ==========================  =======================
  momentum            decays, moves the weights   unchanged
  weight decay        continues                   pauses
  Adam's moments      decay                       unchanged
  Adam's counter      continues                   pauses
  schedules in inner  continue                    pause
  ==================  ==========================  =======================

  Args:
    inner: the transformation that takes the filtered gradient.
    tau: this and all other options are those of :func:`gaf`.

  Returns:
    A transformation like that of :func:`gaf`. It passes extra arguments other than
    `microbatch_weights` to `inner`.

  Raises:
    ValueError: as :func:`gaf`, and in `init` if `inner` contains a `gaf`.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from gaf_optax import apply_if_agreed
    >>> tx = apply_if_agreed(optax.adam(0.1), tau=0.97)
    >>> state = tx.init(jnp.zeros(2))
    >>> opposed = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
    >>> updates, state = tx.update(opposed, state)
    >>> print(updates, int(optax.tree.get(state, 'count')))
    [0. 0.] 0

  References:
    Chaubard et al., `Beyond Gradient Averaging in Parallel Optimization
    <https://arxiv.org/abs/2412.18052>`_, 2024, algorithm 1.
  """
  outer = _gaf.gaf(
    tau,
    rule=rule,
    embed=embed,
    axis_name=axis_name,
    param_axes=param_axes,
    stacked=stacked,
    groups=groups,
    anchor_decay=anchor_decay,
    memory_decay=memory_decay,
    num_microbatches=num_microbatches,
    max_norm_ratio=max_norm_ratio,
  )
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    return ApplyIfAgreedState(outer.init(params), _inner.init(inner, params))

  def update_fn(
    micro_grads, state, params=None, *, microbatch_weights=None, **extra_args
  ):
    _state.check_type(state, ApplyIfAgreedState)
    weights = {"microbatch_weights": microbatch_weights}
    grads, gaf_state = outer.update(
      micro_grads, state.gaf_state, params, **weights, **extra_args
    )
    updates, inner_state = _inner.run_if(
      gaf_state.ready, inner, grads, state.inner_state, params, extra_args
    )
    return updates, ApplyIfAgreedState(gaf_state, inner_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class ApplyIfNonzeroState(NamedTuple):
  """State of `apply_if_nonzero`.

  Attributes:
    skipped_steps: int32 scalar, steps with a gradient of zeros since `init`.
    inner_state: the state of the inner transformation.
  """

  skipped_steps: jax.Array
  inner_state: Any


def apply_if_nonzero(
  inner: optax.GradientTransformation, *, param_axes: Any = ()
) -> optax.GradientTransformationExtraArgs:
  """Skips `inner` on steps whose gradient is all zeros.

  For the gradients of :func:`value_and_grad`, which are exactly zero if no two
  micro-gradients agree. The update is then zero and the state of `inner` unchanged. It
  only needs the gradient, so it works in any training loop, for instance with Flax's
  `TrainState` or `nnx.Optimizer`.

  Args:
    inner: the transformation that takes the filtered gradient.
    param_axes: under `jax.shard_map` the mesh axis, or a tuple of axes, that shards the
      parameters. `inner` runs if any device's part of the gradient is not zero.

  Returns:
    A transformation whose state is an :class:`ApplyIfNonzeroState`. Passes extra
    arguments to `inner`.

  Raises:
    ValueError: if `inner` contains a `gaf`, which must come first.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from gaf_optax import apply_if_nonzero, value_and_grad
    >>> loss = lambda w, x: jnp.mean(x @ w)
    >>> tx = apply_if_nonzero(optax.adam(0.1))
    >>> w = jnp.zeros(2)
    >>> state = tx.init(w)
    >>> opposed = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
    >>> _, grads, agreement = value_and_grad(loss, num_microbatches=2)(w, opposed)
    >>> updates, state = tx.update(grads, state, w)
    >>> print(agreement.agreed, updates, state.skipped_steps)
    False [0. 0.] 1
  """
  inner = optax.with_extra_args_support(inner)
  names = _options.normalize_axis_names("param_axes", param_axes)

  def init_fn(params):
    inner_state = _inner.init(inner, params)
    return ApplyIfNonzeroState(jnp.zeros((), jnp.int32), inner_state)

  def update_fn(grads, state, params=None, **extra_args):
    _state.check_type(state, ApplyIfNonzeroState)
    leaves = [
      x for x in jax.tree.leaves(grads) if jnp.result_type(x) != jax.dtypes.float0
    ]
    nonzero = functools.reduce(
      jnp.logical_or, [jnp.any(x != 0) for x in leaves], jnp.zeros((), bool)
    )
    if names:
      nonzero = jax.lax.psum(nonzero.astype(jnp.int32), names) > 0
    updates, inner_state = _inner.run_if(
      nonzero, inner, grads, state.inner_state, params, extra_args
    )
    skipped = optax.safe_increment(state.skipped_steps)
    skipped = jnp.where(nonzero, state.skipped_steps, skipped)
    return updates, ApplyIfNonzeroState(skipped, inner_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
