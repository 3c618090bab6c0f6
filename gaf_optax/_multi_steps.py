"""The filter for one micro-gradient per call, like `optax.MultiSteps`."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gaf_optax import (
  _compat,
  _inner,
  _mesh,
  _options,
  _state,
  _stream,
  _tau,
  _tree,
  _validate,
  rules,
)


class MultiStepsState(NamedTuple):
  """State of `multi_steps`; has all attributes of `optax.MultiStepsState`.

  Attributes:
    mini_step: int32 scalar, micro-gradients seen in this cycle, in
      [0, every_k_schedule).
    gaf_state: a `GafState` of the last finished cycle, whose `ready` is False
      within a cycle.
    inner_opt_state: the state of the inner transformation.
    stream: the running means and counts of this cycle.
  """

  mini_step: jax.Array
  gaf_state: _state.GafState
  inner_opt_state: Any
  stream: _stream.Stream

  @property
  def gradient_step(self) -> jax.Array:
    """int32 scalar, finished cycles, including those without agreement."""
    return self.gaf_state.num_updates

  @property
  def skip_state(self) -> tuple[()]:
    """Empty: there is no `should_skip_update_fn`."""
    return ()

  @property
  def acc_grads(self) -> Any:
    """The weighted mean of this cycle's accepted micro-gradients."""
    return self.stream.means


class MultiSteps(optax.GradientTransformationExtraArgs):
  """A transformation with the methods of `optax.MultiSteps`."""

  def has_updated(self, state: MultiStepsState) -> jax.Array:
    """Whether the last call ended a cycle with agreement, and so ran `inner`."""
    return jnp.asarray(state.gaf_state.ready)

  def gradient_transformation(self) -> optax.GradientTransformationExtraArgs:
    return self


def multi_steps(
  inner: optax.GradientTransformation,
  every_k_schedule: int | _tau.Schedule,
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
) -> MultiSteps:
  """A drop-in replacement for `optax.MultiSteps`, with filtering.

  Takes one micro-gradient per call. The k-th call of a cycle emits the update of
  `inner` for the filtered mean of the k micro-gradients; the others emit zeros. The
  state holds one running mean for any k (with `anchor_decay` also a second one and the
  moving average). Rejected micro-gradients count toward k. A cycle without agreement
  emits zeros and does not change the state of `inner`.

  Args:
    inner: the transformation that takes the filtered gradient.
    every_k_schedule: the number of micro-gradients in a cycle, at least 2 (1 with an
      anchor), or a function of the number of finished cycles that returns it. Shorter
      cycles never agree.
    tau: see :func:`gaf`; a schedule is called with the number of finished cycles.
    rule: `rules.sequential()` (the default) or `rules.running_average()`.
    param_axes, groups, anchor_decay, num_microbatches: see :func:`gaf`.
    embed, axis_name, stacked, memory_decay, max_norm_ratio: not supported.

  Returns:
    A transformation whose `update(micro_grad, state, params=None)` takes and returns
    leaves shaped like the parameters. The extra argument `microbatch_weights` is a
    scalar, see :func:`gaf`; others go to `inner`. :func:`metrics` describes the last
    finished cycle. As with `optax.MultiSteps`, `has_updated(state)` tells whether the
    last call ran `inner`, and the state has `mini_step`, `gradient_step` (finished
    cycles), `inner_opt_state` and `acc_grads`.

  Raises:
    ValueError: for arguments outside their ranges, options that are not supported, and
      a rule that needs all micro-gradients at once; in `init` for a `gaf` in `inner`.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from gaf_optax import multi_steps
    >>> tx = multi_steps(optax.sgd(1.0), every_k_schedule=2)
    >>> state = tx.init(jnp.zeros(2))
    >>> updates, state = tx.update(jnp.array([2.0, 0.0]), state)
    >>> print(updates)
    [0. 0.]
    >>> updates, state = tx.update(jnp.array([2.0, 2.0]), state)
    >>> print(updates)
    [-2. -1.]

  References:
    Chaubard et al., `Beyond Gradient Averaging in Parallel Optimization
    <https://arxiv.org/abs/2412.18052>`_, 2024, algorithm 1.
  """
  checked = _options.validate_streamed(
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
  k = checked.num_microbatches
  hint = " A cycle needs two micro-gradients to compare, or one with anchor_decay."
  if not callable(every_k_schedule):
    _validate.count(checked.min_accepted, hint, every_k_schedule=every_k_schedule)
    if k not in (None, every_k_schedule):
      raise ValueError(
        f"num_microbatches is {k}, but every_k_schedule is {every_k_schedule}."
      )
  elif k is not None:
    raise ValueError(
      "num_microbatches sets the shape of the state, so every_k_schedule must be an"
      f" int, got the function {every_k_schedule!r}. To keep it, omit num_microbatches."
    )
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    return MultiStepsState(
      mini_step=jnp.zeros((), jnp.int32),
      gaf_state=_state.init(params, checked),
      inner_opt_state=_inner.init(inner, params),
      stream=_stream.start(params, checked, k),
    )

  def update_fn(
    micro_grad, state, params=None, *, microbatch_weights=None, **extra_args
  ):
    _state.check_type(state, MultiStepsState)
    gaf_state = state.gaf_state
    _state.check(gaf_state, checked)
    _tree.check_not_empty(micro_grad)
    like = state.stream.means if params is None else params
    leaves = _tree.flatten(micro_grad, like, checked.groups, stacked=False)
    if not leaves.arrays:
      return leaves.unflatten([]), state
    layout = leaves.layout
    _tree.check_average_shapes(state.stream.means, leaves)
    _tree.check_num_groups(layout, state.stream.num_added.shape[0])
    spec = checked.spec(leaves)
    tau = checked.tau.at(gaf_state.steered, gaf_state.num_updates)
    weight = _mesh.gather_weights(microbatch_weights, None, ())
    has_anchor = checked.anchor_decay is not None
    anchor = _tree.select(gaf_state.anchor, layout) if has_anchor else None
    stream = _stream.push(
      state.stream, leaves.arrays, tau, weight, anchor, gaf_state.anchored, spec=spec
    )

    def end_of_cycle():
      means, outcome = _stream.finish(stream, leaves.arrays, spec, checked.min_accepted)
      new_state = gaf_state
      if has_anchor:
        plain = _tree.select(stream.plain, layout)
        new_state = _state.move_anchor(
          gaf_state, layout, checked.anchor_decay, plain, stream.num_valid > 0
        )
      new_state = _state.advance(new_state, tau, outcome)
      grads = leaves.unflatten(means)
      updates, inner_state = _inner.run_if(
        outcome.agreed, inner, grads, state.inner_opt_state, params, extra_args
      )
      # As optax.MultiSteps does: gradients of a wider dtype would widen the moments,
      # and a scan needs fixed types.
      inner_state = jax.tree.map(_cast_like, inner_state, state.inner_opt_state)
      empty = jax.tree.map(jnp.zeros_like, state.stream)
      zero = jnp.zeros((), jnp.int32)
      return updates, MultiStepsState(zero, new_state, inner_state, empty)

    def within_cycle():
      updates = optax.tree.zeros_like(jax.eval_shape(end_of_cycle)[0])
      # If `ready`, `aggregating.process` would run its postprocessor within the cycle.
      waiting = gaf_state._replace(ready=jnp.zeros((), bool))
      return updates, MultiStepsState(
        state.mini_step + 1, waiting, state.inner_opt_state, stream
      )

    every_k: Any = every_k_schedule
    if callable(every_k):
      every_k = every_k(gaf_state.num_updates)
      if not isinstance(every_k, jax.Array):
        _validate.in_interval(
          checked.min_accepted, math.inf, hint, every_k_schedule=every_k
        )
    return _compat.cond(state.mini_step + 1 >= every_k, end_of_cycle, within_cycle)

  return MultiSteps(init_fn, update_fn)


def _cast_like(new, old):
  return new if new.dtype == old.dtype else new.astype(old.dtype)
