"""A small task for all trainers here, with its model and the expected results.

A script is a function `train(tau)` that returns a `Run`. `tau` is a schedule, or None
for the plain form, which averages gradients.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gaf_optax

K, ROWS, FEATURES, HIDDEN, STEPS = 8, 8, 8, 16, 4
TAU = 0.97  # Rejects only the wrong ones, as `stacked` asserts.
ALL_STEPS = 2  # accept everything
SGD = optax.sgd(0.02, momentum=0.9)
ADAM = optax.adam(0.03, eps=1.0)  # Large, so that the length of a gradient matters.
# Microbatches with negated targets; no step starts its sequence with one of them.
WRONG = (5, 7)


class Run(NamedTuple):
  losses: Any  # Mean over the microbatches, per step.
  params: Any
  accepted: Any = ()  # Per step, if there is a filter.


@functools.cache
def batches():
  """Inputs `[K, ROWS, FEATURES]` and targets `[K, ROWS, 1]` of each step."""
  rng = np.random.default_rng(0)
  x = 1 + rng.normal(size=(STEPS, K, ROWS, FEATURES))
  y = 1 + x @ np.linspace(0.1, 0.2, FEATURES)[:, None]
  y[:, WRONG] *= -1
  return [*zip(x.astype(np.float32), y.astype(np.float32))]


def whole(batch):
  """A loader's batch: the microbatches, concatenated."""
  return tuple(a.reshape(-1, a.shape[-1]) for a in batch)


def interleaved(batch):
  """A batch for `value_and_grad`: microbatch i has the rows i, i + K, ..."""
  return whole(tuple(np.swapaxes(a, 0, 1) for a in batch))


def tau(step):
  """Accepts everything in the first steps, as the plain form does."""
  return jnp.where(step < ALL_STEPS, 2.0, TAU)


def params():
  rng = np.random.default_rng(1)
  normal = lambda *shape: rng.normal(size=shape) / 4
  tree = {
    "hidden": {"kernel": normal(FEATURES, HIDDEN), "bias": np.zeros(HIDDEN)},
    "out": {"kernel": normal(HIDDEN, 1), "bias": np.zeros(1)},
  }
  return jax.device_put(jax.tree.map(np.float32, tree))


def loss(params, x, y):
  hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
  prediction = hidden @ params["out"]["kernel"] + params["out"]["bias"]
  return jnp.mean((prediction - y) ** 2)


def stacked_step(tx, loss=loss):
  """A step of the stacked form; returns parameters, state and mean loss."""

  @jax.jit
  def step(params, state, x, y):
    values, grads = jax.vmap(jax.value_and_grad(loss), (None, 0, 0))(params, x, y)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, jnp.mean(values)

  return step


def stacked(loss, params, inner):
  """A `Run` of the stacked form on one device, with `inner` after the filter."""
  tx = optax.chain(gaf_optax.gaf(tau, num_microbatches=K), inner)
  step = stacked_step(tx, loss)
  state, losses, accepted = tx.init(params), [], []
  for i, (x, y) in enumerate(batches()):
    params, state, value = step(params, state, x, y)
    # Far from tau, so that rounding does not matter; some are rejected, but not all.
    assert np.min(np.abs(state[0].distances - TAU)) > 1e-3
    rejected = set() if i < ALL_STEPS else set(WRONG)
    assert set(np.flatnonzero(~state[0].accepted)) == rejected
    losses.append(value)
    accepted.append(state[0].num_accepted)
  return Run(losses, params, accepted)


@functools.cache
def wanted(inner):
  """The expected `Run` of trainers of this model."""
  return stacked(loss, params(), inner)


def first(tree):
  """One of the devices' copies."""
  return jax.tree.map(lambda leaf: leaf[0], jax.device_get(tree))


def copies(tree):
  """A copy per device."""
  return jax.tree.map(lambda leaf: np.stack([leaf] * K), jax.device_get(tree))


def relative_difference(tree, wanted):
  """Norm of the difference of two trees, relative to the second."""
  flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
  wanted = flat(wanted).astype(np.float64)
  return np.linalg.norm(flat(tree) - wanted) / np.linalg.norm(wanted)


def assert_same(run, wanted):
  """Two runs are the same up to rounding."""
  np.testing.assert_allclose(run.losses, wanted.losses, rtol=1e-4)
  assert jax.tree.structure(run.params) == jax.tree.structure(wanted.params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    run.params,
    wanted.params,
  )
  if run.accepted and wanted.accepted:
    np.testing.assert_array_equal(run.accepted, wanted.accepted)


def assert_trains(train, wanted=None):
  """A script equals its plain form while tau accepts everything.

  In all steps it equals `wanted`, a `Run` of the stacked form on one device.
  """
  plain, run = train(None), train(tau)
  # Also the next loss, which depends on the parameters after these steps.
  same = ALL_STEPS + 1
  np.testing.assert_allclose(run.losses[:same], plain.losses[:same], rtol=1e-4)
  assert abs(plain.losses[same - 1] - plain.losses[0]) > 1e-2
  later = [K - len(WRONG)] * (STEPS - ALL_STEPS)
  np.testing.assert_array_equal(run.accepted, [K] * ALL_STEPS + later)
  if wanted is not None:
    assert_same(run, wanted)
