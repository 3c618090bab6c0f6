"""Multi steps: the filter on one micro-gradient a call, as an Optax transformation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gaf_optax import (
  _compat,
  _leaves,
  _options,
  _state,
  _stream,
  _threshold,
  _transform,
  _validate,
)


class MultiStepsState(NamedTuple):
  """State of `multi_steps`.

  Attributes:
    mini_step: int32 scalar, micro-gradients seen in this cycle, in [0, every_k).
    gaf_state: a `GafState` of the last finished cycle, whose `ready` is False
      within a cycle.
    inner_state: the state of the inner transformation.
    stream: the running mean of this cycle.
    cycle_distances: float32 `[m, k]` of this cycle with `num_microbatches`, or
      None.
    cycle_accepted: bool `[m, k]` likewise.
  """

  mini_step: jax.Array
  gaf_state: _state.GafState
  inner_state: Any
  stream: _stream.Stream
  cycle_distances: jax.Array | None
  cycle_accepted: jax.Array | None


@_options.spelled_out(_transform.gaf)
def multi_steps(
  inner: optax.GradientTransformation,
  every_k: int | Callable[[jax.Array], jax.Array],
  tau: Any = 0.97,
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  """Takes one micro-gradient a call and runs `inner` on every k-th, if they agree.

  The drop-in for `optax.MultiSteps`: calls before the k-th of a cycle emit zero
  updates, the k-th emits the update of `inner` for the filtered mean of the k
  micro-gradients. One running mean is kept, whatever k is (with `embed` a second
  one, with `anchor_decay` the moving average and a second one). A rejected
  micro-gradient uses up its slot. A cycle without agreement emits zeros and leaves
  the state of `inner` as it was.

  Args:
    inner: the transformation that takes the filtered gradient.
    every_k: micro-gradients in a cycle, at least 2 (1 with an anchor), or a
      function from the number of finished cycles to it.
    tau: see :func:`gaf`; a schedule is called with the number of finished cycles.
    **options: `rule` (`rules.sequential()` or `rules.running_average()`),
      `embed`, `groups`, `anchor_decay` and `num_microbatches`, see :func:`gaf`.

  Returns:
    A transformation whose `update(micro_grad, state, params=None)` takes and
    returns leaves shaped like the parameters. Extra arguments go to `inner`.
    :func:`metrics` reads its state and speaks of the last finished cycle.

  Raises:
    ValueError: for arguments outside their ranges, and for a rule that has to see
      all micro-gradients at once.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from gaf_optax import multi_steps
    >>> tx = multi_steps(optax.sgd(1.0), every_k=2)
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
  checked = _stream.streamed_options(tau, **options)
  least = 1 if checked.anchor_decay is not None else 2
  if not callable(every_k):
    _validate.count(least, every_k=every_k)
    if checked.num_microbatches not in (None, every_k):
      raise ValueError(
        f"num_microbatches is {checked.num_microbatches}, but every_k is {every_k}."
      )
  elif checked.num_microbatches is not None:
    raise ValueError(
      "num_microbatches needs a fixed every_k, since it sets the shape of the"
      f" state; got the function {every_k!r}."
    )
  inner = optax.with_extra_args_support(inner)
  target = tau if isinstance(tau, _threshold.TargetAcceptRate) else None

  def fresh(params):
    stream = _stream.start(params, checked)
    if checked.num_microbatches is None:
      return stream, None, None
    shape = (stream.total.shape[0], checked.num_microbatches)
    return (
      stream,
      jnp.full(shape, jnp.nan, jnp.float32),
      jnp.zeros(shape, bool),
    )

  def init_fn(params):
    stream, distances, accepted = fresh(params)
    return MultiStepsState(
      mini_step=jnp.zeros((), jnp.int32),
      gaf_state=_state.init(
        params, tau, checked.anchor_decay, checked.num_microbatches
      ),
      inner_state=inner.init(params),
      stream=stream,
      cycle_distances=distances,
      cycle_accepted=accepted,
    )

  def update_fn(micro_grad, state, params=None, **extra_args):
    gaf_state = state.gaf_state
    _leaves.check_not_empty(micro_grad)
    like = state.stream.means if params is None else params
    leaves = _leaves.read(micro_grad, like, checked.groups, stacked=False)
    if not leaves.arrays:
      return leaves.rebuild([]), state
    if (leaves.layout.num_groups,) != state.stream.total.shape:
      raise ValueError(
        f"groups made {leaves.layout.num_groups} groups of the micro-gradient's"
        f" leaves, but {state.stream.total.shape[0]} of the parameters' leaves at"
        " init. Is a leaf missing, or does the label depend on more than path,"
        " shape and dtype?"
      )
    threshold = _threshold.value(tau, gaf_state.num_updates, gaf_state.steered)
    anchor = None
    if checked.anchor_decay is not None:
      anchor = _leaves.pick(gaf_state.anchor, leaves.layout)
    stream, found = _stream.push(
      state.stream,
      leaves.arrays,
      threshold,
      anchor,
      gaf_state.anchored,
      rule=checked.rule,
      embed=checked.embed,
      layout=leaves.layout,
      axes=_stream.axes(leaves, checked),
    )
    distances, accepted = state.cycle_distances, state.cycle_accepted
    if distances is not None:
      distances = distances.at[:, state.mini_step].set(found.distances)
      accepted = accepted.at[:, state.mini_step].set(found.accepted)
    k = every_k(gaf_state.num_updates) if callable(every_k) else every_k

    def end_of_cycle():
      means, agreed = _stream.finish(stream, leaves.arrays, leaves.layout, least)
      step = _stream.outcome(stream, agreed, distances, accepted)
      new_state = gaf_state
      if checked.anchor_decay is not None:
        new_state = _state.move_anchor(
          gaf_state,
          leaves.layout,
          checked.anchor_decay,
          _leaves.pick(stream.plain, leaves.layout),
          stream.finite > 0,
        )
      new_state = _state.advance(new_state, target, threshold, step)
      updates, inner_state = _transform.run_if(
        step.agreed,
        inner,
        leaves.rebuild(means),
        state.inner_state,
        params,
        extra_args,
      )
      return updates, MultiStepsState(
        jnp.zeros((), jnp.int32),
        new_state,
        inner_state,
        jax.tree.map(jnp.zeros_like, state.stream),
        distances,
        accepted,
      )

    def within_cycle():
      updates = optax.tree.zeros_like(jax.eval_shape(end_of_cycle)[0])
      return updates, MultiStepsState(
        state.mini_step + 1,
        # Nothing is ready for what may follow, until the end of the cycle.
        gaf_state._replace(ready=jnp.zeros((), bool)),
        state.inner_state,
        stream,
        distances,
        accepted,
      )

    return _compat.cond(state.mini_step + 1 >= k, end_of_cycle, within_cycle)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
