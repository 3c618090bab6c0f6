"""The forms of the filter, with one signature and one kind of result."""

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
  """Distances with NaN in place of -1, as in the oracle."""
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
  return stacked_steps([tree], tau, **options)[0]


def stacked_steps(trees, tau, microbatch_weights=None, **options):
  """Results of several updates; `nonfinite` counts over all of them so far."""
  tx = gaf_optax.gaf(tau, num_microbatches=size(trees[0]), **options)
  params = like_params(trees[0])
  state, results = tx.init(params), []
  for tree in trees:
    extra_args = {}
    if microbatch_weights is not None:
      extra_args["microbatch_weights"] = microbatch_weights
    gradient, state = tx.update(tree, state, params, **extra_args)
    results.append(read(gradient, state))
  return results


@functools.cache
def _streamed(k, options):

  @jax.jit
  def run(tau, tree, extra_args):
    tx = gaf_optax.multi_steps(
      optax.identity(), k, tau, num_microbatches=k, **dict(options)
    )
    params = like_params(tree)

    def one(state, inputs):
      micro_grad, extra_args = inputs
      gradient, state = tx.update(micro_grad, state, params, **extra_args)
      return state, gradient

    return jax.lax.scan(one, tx.init(params), (tree, extra_args))

  return run


def streamed(tree, tau, microbatch_weights=None, **options):
  run = _streamed(size(tree), tuple(sorted(options.items())))
  extra_args = {}
  if microbatch_weights is not None:
    extra_args["microbatch_weights"] = jnp.asarray(microbatch_weights)
  state, gradients = run(tau, tree, extra_args)
  for leaf in jax.tree.leaves(gradients):
    assert not np.any(np.asarray(leaf[:-1])), "an update within a cycle"
  return read(jax.tree.map(lambda x: x[-1], gradients), state)


@functools.cache
def _scanned(k, is_weighted, options):

  def loss(params, batch, weights):
    terms = jax.tree.map(
      lambda p, b: jnp.sum(p * b[0]).astype(jnp.float32), params, batch
    )
    return sum(jax.tree.leaves(terms))

  weigh = (lambda batch, weights: weights[0]) if is_weighted else None

  @jax.jit
  def run(tau, tree, weights):
    filtered = gaf_optax.value_and_grad(
      loss, k, tau, microbatch_weights=weigh, **dict(options)
    )
    return filtered(like_params(tree), tree, weights)

  return run


def scanned(tree, tau, microbatch_weights=None, **options):
  """`value_and_grad` of a linear function: its gradient is the microbatch."""
  is_weighted = microbatch_weights is not None
  weights = jnp.asarray(microbatch_weights if is_weighted else np.ones(size(tree)))
  run = _scanned(size(tree), is_weighted, tuple(sorted(options.items())))
  _, gradient, agreement = run(tau, tree, weights)
  return Filtered(
    gradient,
    bool(agreement.agreed),
    float(agreement.num_accepted),
    compared(agreement.distances),
    np.asarray(agreement.weights),
    int(agreement.nonfinite),
  )


ALL = {"stacked": stacked, "streamed": streamed, "scanned": scanned}
