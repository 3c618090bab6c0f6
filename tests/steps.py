"""Training steps whose outcome is known by construction, and the three transformations.

The micro-gradients of a step are quarters of small integers, so that the mean of the
accepted ones is exact in every dtype and the same by any order of summation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gaf_optax

K = 4
TAU = 0.9
SHAPES = {"w": (4, 3), "b": (3,)}

# For each kind of step, what becomes of its four micro-gradients: '+' is the common
# direction with a little noise, '-' against it, 'n' the common direction with a NaN.
# After a '+' every '-' is at a distance near 2.
KINDS = {
  "all": "++++",
  "half": "+-+-",
  "none": "+---",
  "bad": "n++-",
  "lost": "nnnn",
}
MIXED = ("all", "half", "none", "none", "bad", "lost", "half", "all")


def draw(seed, k, *shape, common=1.0):
  """`[k, *shape]`, float64: normal values, and `common` times a part that all have."""
  rng = np.random.default_rng(seed)
  return rng.standard_normal((k, *shape)) + common * rng.standard_normal(shape)


class Step(NamedTuple):
  micro_grads: Any  # leaves [K, *shape]
  accepted: tuple[int, ...]
  mean: Any  # NumPy leaves [*shape], of those accepted; zeros where none is


def make(kind, seed, dtype=np.float32, shapes=None):
  """One step. NumPy alone decides its mean."""
  rng = np.random.default_rng(seed)
  fates = KINDS[kind]
  accepted = tuple(i for i, fate in enumerate(fates) if fate == "+")
  accepted = accepted if len(accepted) > 1 else ()
  leaves, means = {}, {}
  for name, shape in (SHAPES if shapes is None else shapes).items():
    common = rng.choice([-8, -4, 4, 8], shape)
    rows = common + rng.integers(-1, 2, (K, *shape)) / 4
    for i, fate in enumerate(fates):
      if fate == "-":
        rows[i] *= -1
      elif fate == "n":
        rows[i].flat[0] = np.nan
    mean = np.mean(rows[list(accepted)], axis=0) if accepted else np.zeros(shape)
    leaves[name] = jnp.asarray(rows, dtype)
    means[name] = mean.astype(dtype)
  return Step(leaves, accepted, means)


def sequence(kinds=MIXED, **options):
  return [make(kind, seed, **options) for seed, kind in enumerate(kinds)]


def params(dtype=np.float32, shapes=None):
  rng = np.random.default_rng(99)
  return {
    name: jnp.asarray(rng.integers(-4, 5, shape) / 4, dtype)
    for name, shape in (SHAPES if shapes is None else shapes).items()
  }


class Form(NamedTuple):
  """One of the transformations, with how a step's micro-gradients are fed to it."""

  make: Callable[..., optax.GradientTransformationExtraArgs]
  feed: Callable[..., Any]
  skips: bool  # Whether `inner` is left as it was on a step without agreement.


def _chain(inner, tau=TAU, **options):
  return optax.chain(gaf_optax.gaf(tau, **options), inner)


def _multi_steps(inner, tau=TAU, **options):
  return gaf_optax.multi_steps(inner, K, tau, **options)


def _apply_if_agreed(inner, tau=TAU, **options):
  return gaf_optax.apply_if_agreed(inner, tau, **options)


def in_order(micro_grads, step):
  """Rows of a stack, turned so that update number `step` visits them in their order."""
  return jax.tree.map(lambda x: jnp.roll(x, step, axis=0), micro_grads)


def _feed_stack(tx, micro_grads, state, params=None, **extra_args):
  micro_grads = in_order(micro_grads, gaf_state(state).num_updates)
  return tx.update(micro_grads, state, params, **extra_args)


def _feed_one_by_one(tx, micro_grads, state, params=None, **extra_args):
  def one(state, micro_grad):
    updates, state = tx.update(micro_grad, state, params, **extra_args)
    return state, updates

  state, updates = jax.lax.scan(one, state, micro_grads)
  # Added up, so that an update before the end of the cycle does not go unnoticed.
  return jax.tree.map(lambda x: jnp.sum(x, 0, x.dtype), updates), state


FORMS = {
  "chain": Form(_chain, _feed_stack, False),
  "apply_if_agreed": Form(_apply_if_agreed, _feed_stack, True),
  "multi_steps": Form(_multi_steps, _feed_one_by_one, True),
}


def gaf_state(state):
  is_state = lambda node: isinstance(node, gaf_optax.GafState)
  found = filter(is_state, jax.tree.leaves(state, is_leaf=is_state))
  return next(found)


def inner_state(name, state):
  if name == "chain":
    return state[1]
  return state.inner_opt_state if name == "multi_steps" else state.inner_state


def describe(tree):
  """Shapes, dtypes and weak types, in the tree's own structure."""
  return jax.tree.map(
    lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False)), tree
  )
