"""The stateless loop of Keras 3 on JAX: lists of variables, and a Keras optimizer."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gaf_optax
from clients import toy_task

os.environ["KERAS_BACKEND"] = "jax"
keras = pytest.importorskip("keras")

NAMES = [(layer, kind) for layer in ("hidden", "out") for kind in ("kernel", "bias")]


def network(*between):
  keras.utils.set_random_seed(0)
  layers = keras.layers
  hidden = layers.Dense(toy_task.HIDDEN, activation="tanh")
  inputs = layers.Input((toy_task.FEATURES,))
  return keras.Sequential([inputs, hidden, *between, layers.Dense(1)])


def loss_of(model):
  def compute_loss(trainable, non_trainable, x, y):
    prediction, non_trainable = model.stateless_call(
      trainable, non_trainable, x, training=True
    )
    return jnp.mean((prediction - y) ** 2), non_trainable

  return compute_loss


def values(variables):
  return [v.value for v in variables]


def combined(stack):
  """The mean of statistics over the microbatches, and the first counter and seed."""
  floating = jnp.issubdtype(stack.dtype, jnp.floating)
  return jnp.mean(stack, axis=0) if floating else stack[0]


@functools.cache
def trainer(filtered):
  model = network()
  optimizer = keras.optimizers.SGD(0.02, momentum=0.9)  # As toy_task.SGD.
  optimizer.build(model.trainable_variables)
  compute_loss = loss_of(model)

  @jax.jit
  def step(state, tau, x, y):
    trainable, non_trainable, variables = state
    if filtered:
      of_batch = gaf_optax.value_and_grad(
        compute_loss, toy_task.K, tau, has_aux=True, batch_argnums=(2, 3)
      )
      (value, stacks), grads, agreement = of_batch(trainable, non_trainable, x, y)
      non_trainable = jax.tree.map(combined, stacks)
      agreed, number = agreement.agreed, agreement.num_accepted
    else:
      of_batch = jax.value_and_grad(compute_loss, has_aux=True)
      (value, non_trainable), grads = of_batch(trainable, non_trainable, x, y)
      agreed, number = True, None
    new = optimizer.stateless_apply(variables, grads, trainable)
    # Without agreement, momentum would still move the parameters.
    keep = lambda new, old: jnp.where(agreed, new, old)
    trainable, variables = jax.tree.map(keep, new, (trainable, variables))
    return (trainable, non_trainable, variables), value, number

  start = toy_task.params()
  trainable = [start[layer][kind] for layer, kind in NAMES]
  rest = values(model.non_trainable_variables), values(optimizer.variables)
  return step, (trainable, *rest)


def train(tau):
  step, state = trainer(tau is not None)
  losses, accepted = [], []
  for i, batch in enumerate(toy_task.batches()):
    now = 2.0 if tau is None else tau(i)
    state, value, number = step(state, now, *toy_task.interleaved(batch))
    losses.append(value)
    accepted += [] if tau is None else [number]
  trained = {"hidden": {}, "out": {}}
  for (layer, kind), value in zip(NAMES, state[0]):
    trained[layer][kind] = value
  return toy_task.Run(losses, trained, accepted)


def test_as_the_mean_and_as_stacked_on_one_device():
  toy_task.assert_trains(train, toy_task.wanted(toy_task.SGD))


def test_a_step_without_agreement_leaves_everything_as_it_was():
  step, state = trainer(True)
  x, y = toy_task.batches()[0]
  state, *_ = step(state, toy_task.TAU, *toy_task.interleaved((x, y)))
  # All but the first have the negative targets of the first.
  same, other = (np.stack([a[0]] * toy_task.K) for a in (x, -y))
  other[0] = y[0]
  after, _, number = step(state, toy_task.TAU, *toy_task.interleaved((same, other)))
  assert int(number) == 0
  jax.tree.map(np.testing.assert_array_equal, after, state)


def test_statistics_and_seeds():
  """Auxiliary outputs are stacked; all microbatches share one seed in the state."""
  layers = keras.layers
  model = network(layers.BatchNormalization(momentum=0.9), layers.Dropout(0.5))
  compute_loss = loss_of(model)
  trainable, start = (
    values(v) for v in (model.trainable_variables, model.non_trainable_variables)
  )

  def with_key(trainable, non_trainable, x, y, key):
    is_seed = lambda value: value.dtype == jnp.uint32
    seed = jax.random.key_data(key)
    own = [seed if is_seed(value) else value for value in non_trainable]
    return compute_loss(trainable, own, x, y)

  x, y = (np.stack([a[0]] * toy_task.K) for a in toy_task.batches()[0])
  arguments = trainable, start, *toy_task.interleaved((x, y))
  filtered = functools.partial(gaf_optax.value_and_grad, has_aux=True)
  one_mask = jax.jit(filtered(compute_loss, toy_task.K, 2.0, batch_argnums=(2, 3)))
  (_, stacks), _, agreement = one_mask(*arguments)
  np.testing.assert_allclose(agreement.distances[1:], 0, atol=1e-6)
  _, once = jax.jit(compute_loss)(trainable, start, x[0], y[0])
  for found, wanted in zip(map(combined, stacks), once):
    assert found.dtype == wanted.dtype
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
  masks = jax.jit(filtered(with_key, toy_task.K, 2.0, batch_argnums=(2, 3, 4)))
  _, _, agreement = masks(*arguments, jax.random.key(0))
  assert np.min(agreement.distances[1:]) > 0.01
