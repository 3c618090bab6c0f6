"""Inner: the transformation behind the filter, which is run only on some steps."""

import jax
import optax

from gaf_optax import _compat, _state


def init(inner, params):
  """The state of a transformation that gets filtered gradients.

  Raises:
    ValueError: if it filters, too.
  """
  state = inner.init(params)
  if _state.find(state):
    raise ValueError(
      "inner has a gaf in it, but what it gets is filtered already. Leave the gaf out:"
      " apply_if_agreed(optax.sgd(0.1), tau), for instance."
    )
  return state


def run_if(condition, inner, grads, inner_state, params, extra_args):
  """The update and state of `inner`, or zeros and the old state."""

  def run():
    return inner.update(grads, inner_state, params, **extra_args)

  def leave():
    return optax.tree.zeros_like(jax.eval_shape(run)[0]), inner_state

  return _compat.cond(condition, run, leave)
