"""The forms of the filter, called in one way, to hold them to one another."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gaf_optax


class Filtered(NamedTuple):
  gradient: Any
  agreed: bool
  accepted: float
  distances: np.ndarray  # [k]
  weights: np.ndarray  # [k]
  nonfinite: int


def size(tree):
  return jax.tree.leaves(tree)[0].shape[0]


def like_params(tree):
  return jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), tree)


def compared(distances):
  """Distances with NaN, as the oracle has it, for -1: nothing to compare."""
  distances = np.asarray(distances)
  return np.where(distances == -1, np.nan, distances)


def read(gradient, state):
  found = gaf_optax.metrics(state)
  gaf_state = [
    s
    for s in jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, gaf_optax.GafState))
    if isinstance(s, gaf_optax.GafState)
  ][0]
  return Filtered(
    gradient,
    bool(found["agreed"]),
    float(found["num_accepted"]),
    compared(gaf_state.distances),
    np.asarray(gaf_state.weights),
    int(found["nonfinite"]),
  )


def stacked(tree, tau, **options):
  tx = gaf_optax.gaf(tau, num_microbatches=size(tree), **options)
  params = like_params(tree)
  return read(*tx.update(tree, tx.init(params), params))


@functools.cache
def _streamed(k, options):

  @jax.jit
  def run(tau, tree):
    tx = gaf_optax.multi_steps(
      optax.identity(), k, tau, num_microbatches=k, **dict(options)
    )
    params = like_params(tree)

    def one(state, micro_grad):
      gradient, state = tx.update(micro_grad, state, params)
      return state, gradient

    return jax.lax.scan(one, tx.init(params), tree)

  return run


def streamed(tree, tau, **options):
  run = _streamed(size(tree), tuple(sorted(options.items())))
  state, gradients = run(tau, tree)
  for leaf in jax.tree.leaves(gradients):
    assert not np.any(np.asarray(leaf[:-1])), "an update within a cycle"
  return read(jax.tree.map(lambda x: x[-1], gradients), state)


@functools.cache
def _scanned(k, options):

  def loss(params, batch):
    terms = jax.tree.map(
      lambda p, b: jnp.sum(p * b[0]).astype(jnp.float32), params, batch
    )
    return sum(jax.tree.leaves(terms))

  @jax.jit
  def run(tau, tree):
    filtered = gaf_optax.value_and_grad(loss, k, tau, **dict(options))
    return filtered(like_params(tree), tree)

  return run


def scanned(tree, tau, **options):
  """`value_and_grad` of a linear function, whose gradient is the microbatch."""
  run = _scanned(size(tree), tuple(sorted(options.items())))
  _, gradient, agreement = run(tau, tree)
  return Filtered(
    gradient,
    bool(agreement.agreed),
    float(agreement.num_accepted),
    compared(agreement.distances),
    np.asarray(agreement.weights),
    int(agreement.nonfinite),
  )


ALL = {"stacked": stacked, "streamed": streamed, "scanned": scanned}
