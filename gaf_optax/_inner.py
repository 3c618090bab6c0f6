"""Runs the optimizer behind the filter, or skips it."""

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
      "`inner` contains a gaf, but its input is already filtered. Remove the gaf: pass"
      " only the optimizer, for instance optax.sgd(0.1)."
    )
  return state


def run_if(condition, inner, grads, inner_state, params, extra_args):
  """The update and state of `inner` if `condition`, else zeros and the old state."""

  def run():
    return inner.update(grads, inner_state, params, **extra_args)

  def skip():
    return optax.tree.zeros_like(jax.eval_shape(run)[0]), inner_state

  return _compat.cond(condition, run, skip)
