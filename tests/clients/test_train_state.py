"""Flax's TrainState on a batch, split into microbatches by value_and_grad."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gaf_optax
from clients import toy_task

with warnings.catch_warnings():
  # The oldest supported Flax uses a name that the oldest supported JAX deprecates.
  warnings.simplefilter("ignore", DeprecationWarning)
  from flax.training import train_state


def create(tau):
  tx = toy_task.ADAM if tau is None else gaf_optax.apply_if_nonzero(toy_task.ADAM)
  return train_state.TrainState.create(apply_fn=None, params=toy_task.params(), tx=tx)


def step_of(tau):
  @jax.jit
  def train_step(state, x, y):
    if tau is None:
      value, grads = jax.value_and_grad(toy_task.loss)(state.params, x, y)
      number = None
    else:
      of_params = gaf_optax.value_and_grad(toy_task.loss, toy_task.K, tau(state.step))
      value, grads, agreement = of_params(state.params, x, y)
      number = agreement.num_accepted
    return state.apply_gradients(grads=grads), value, number

  return train_step


def train(tau):
  state, train_step = create(tau), step_of(tau)
  losses, accepted = [], []
  for batch in toy_task.batches():
    state, value, number = train_step(state, *toy_task.interleaved(batch))
    losses.append(value)
    accepted += [] if tau is None else [number]
  return toy_task.Run(losses, state.params, accepted)


def test_as_the_mean_and_as_stacked_on_one_device():
  toy_task.assert_trains(train, toy_task.wanted(toy_task.ADAM))


def test_a_step_without_agreement_leaves_everything_as_it_was():
  state, train_step = create(toy_task.tau), step_of(lambda step: toy_task.TAU)
  x, y = toy_task.batches()[0]
  state, _, _ = train_step(state, *toy_task.interleaved((x, y)))
  # All but the first have the negative targets of the first.
  same, other = (np.stack([a[0]] * toy_task.K) for a in (x, -y))
  other[0] = y[0]
  after, _, number = train_step(state, *toy_task.interleaved((same, other)))
  assert int(number) == 0 and int(after.step) == 2
  before, kept = (s.opt_state.inner_state for s in (state, after))
  assert int(optax.tree.get(before, "count")) == 1
  for a, b in zip(
    jax.tree.leaves((state.params, before)), jax.tree.leaves((after.params, kept))
  ):
    np.testing.assert_array_equal(a, b)
  assert int(after.opt_state.skipped_steps) == 1
  again, _, _ = train_step(after, *toy_task.interleaved((x, y)))
  assert int(optax.tree.get(again.opt_state, "count")) == 2
  assert jnp.any(again.params["out"]["bias"] != after.params["out"]["bias"])
