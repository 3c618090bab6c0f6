"""Training steps with a known outcome, and the three transformations.

Micro-gradients are quarters of small integers, so the mean of the accepted ones is
exact in every dtype and in any order of summation.
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

# The four micro-gradients of each kind of step: '+' is the common direction plus a
# little noise, '-' its opposite, 'n' the common direction with a NaN. The distance from
# a '+' to a '-' is near 2.
KINDS = {
  "all": "++++",
  "half": "+-+-",
  "none": "+---",
  "bad": "n++-",
  "lost": "nnnn",
}
MIXED = ("all", "half", "none", "none", "bad", "lost", "half", "all")


def draw(seed, k, *shape, common=1.0):
  """`[k, *shape]`, float64: normal noise plus `common` times a shared normal part."""
  rng = np.random.default_rng(seed)
  return rng.standard_normal((k, *shape)) + common * rng.standard_normal(shape)


class Step(NamedTuple):
  micro_grads: Any  # leaves [K, *shape]
  accepted: tuple[int, ...]
  mean: Any  # NumPy leaves [*shape], the mean of the accepted ones, or zeros


def make(kind, seed, dtype=np.float32, shapes=None):
  """One step, with its mean computed in NumPy."""
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
  """A transformation, and a function that feeds it the micro-gradients of a step."""

  make: Callable[..., optax.GradientTransformationExtraArgs]
  feed: Callable[..., Any]
  skips: bool  # `inner`, on a step without agreement


def _chain(inner, tau=TAU, **options):
  return optax.chain(gaf_optax.gaf(tau, **options), inner)


def _multi_steps(inner, tau=TAU, **options):
  return gaf_optax.multi_steps(inner, K, tau, **options)


def _apply_if_agreed(inner, tau=TAU, **options):
  return gaf_optax.apply_if_agreed(inner, tau, **options)


def in_order(micro_grads, step):
  """Rolls a stack so that update number `step` visits the rows in their order."""
  return jax.tree.map(lambda x: jnp.roll(x, step, axis=0), micro_grads)


def _feed_stack(tx, micro_grads, state, params=None, **extra_args):
  micro_grads = in_order(micro_grads, gaf_state(state).num_updates)
  return tx.update(micro_grads, state, params, **extra_args)


def _feed_one_by_one(tx, micro_grads, state, params=None, **extra_args):
  def one(state, micro_grad):
    updates, state = tx.update(micro_grad, state, params, **extra_args)
    return state, updates

  state, updates = jax.lax.scan(one, state, micro_grads)
  # A sum, so that an update before the end of the cycle is noticed.
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
  """Shapes, dtypes and weak types of a tree."""
  return jax.tree.map(
    lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False)), tree
  )
