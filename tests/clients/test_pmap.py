"""pmap with Flax's TrainState and BatchNorm, as Flax's ImageNet example has it.

Statistics stay local in training and are averaged over the devices at the end.
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gaf_optax
from clients import toy_task

with warnings.catch_warnings():
  # The oldest supported Flax uses a name that the oldest supported JAX deprecates.
  warnings.simplefilter("ignore", DeprecationWarning)
  from flax import linen as nn
  from flax.training import train_state


class TrainState(train_state.TrainState):
  batch_stats: Any


class Network(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(toy_task.HIDDEN)(x)
    x = nn.tanh(nn.BatchNorm(use_running_average=False, momentum=0.9)(x))
    return nn.Dense(1)(x)


network = Network()


def variables():
  return network.init(jax.random.key(0), jnp.zeros((1, toy_task.FEATURES)))


def loss(params, batch_stats, x, y):
  inputs = {"params": params, "batch_stats": batch_stats}
  prediction, new = network.apply(inputs, x, mutable=["batch_stats"])
  return jnp.mean((prediction - y) ** 2), new["batch_stats"]


def train(tau):
  tx = toy_task.SGD
  if tau is not None:
    tx = optax.chain(gaf_optax.gaf(tau, axis_name="data"), toy_task.SGD)
  state = TrainState.create(apply_fn=network.apply, tx=tx, **variables())
  state = toy_task.copies(state)

  def train_step(state, x, y):
    of_params = jax.value_and_grad(loss, has_aux=True)
    (value, batch_stats), grads = of_params(state.params, state.batch_stats, x, y)
    if tau is None:
      grads = jax.lax.pmean(grads, "data")
    state = state.apply_gradients(grads=grads, batch_stats=batch_stats)
    return state, jax.lax.pmean(value, "data")

  train_step = jax.pmap(train_step, axis_name="data")
  losses, accepted = [], []
  for x, y in toy_task.batches():
    state, value = train_step(state, x, y)
    losses.append(toy_task.first(value))
    if tau is not None:
      found = gaf_optax.metrics(toy_task.first(state.opt_state))
      accepted.append(found["num_accepted"])
  mean_over_devices = jax.pmap(lambda s: jax.lax.pmean(s, "data"), axis_name="data")
  batch_stats = mean_over_devices(state.batch_stats)
  same = jax.device_get((state.params, state.opt_state, batch_stats))
  jax.tree.map(
    np.testing.assert_array_equal, same, toy_task.copies(toy_task.first(same))
  )
  return toy_task.Run(losses, toy_task.first((state.params, batch_stats)), accepted)


def stacked():
  """The same on one device, with separate statistics for each microbatch."""
  tx = optax.chain(gaf_optax.gaf(toy_task.tau), toy_task.SGD)
  start = variables()
  params, state = start["params"], tx.init(start["params"])
  stats = toy_task.copies(start["batch_stats"])

  @jax.jit
  def step(params, stats, state, x, y):
    each = jax.vmap(jax.value_and_grad(loss, has_aux=True), (None, 0, 0, 0))
    (values, stats), grads = each(params, stats, x, y)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), stats, state, jnp.mean(values)

  losses, accepted = [], []
  for batch in toy_task.batches():
    params, stats, state, value = step(params, stats, state, *batch)
    losses.append(value)
    accepted.append(gaf_optax.metrics(state)["num_accepted"])
  mean = jax.tree.map(lambda s: jnp.mean(s, axis=0), stats)
  return toy_task.Run(losses, (params, mean), accepted)


def test_as_the_mean_and_as_stacked_on_one_device():
  toy_task.assert_trains(train, stacked())
