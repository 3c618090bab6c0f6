"""Inner: the optimizer behind the filter, which runs on some steps only."""

import jax
import optax

from gaf_optax import _compat, _state


def init(inner, params):
  """The state of the inner transformation.

  Raises:
    ValueError: if it contains a filter.
  """
  state = inner.init(params)
  if _state.find(state):
    raise ValueError(
      "`inner` contains a gaf, but its input is already filtered. Remove the gaf, as in"
      " apply_if_agreed(optax.sgd(0.1), tau)."
    )
  return state


def run_if(condition, inner, grads, inner_state, params, extra_args):
  """The update and state of `inner` if `condition`, else zeros and the old state."""

  def run():
    return inner.update(grads, inner_state, params, **extra_args)

  def leave():
    return optax.tree.zeros_like(jax.eval_shape(run)[0]), inner_state

  return _compat.cond(condition, run, leave)
