"""PPO with epochs and minibatches in scans, vmapped over seeds, as in PureJaxRL.

Advantages are normalised before value_and_grad splits a minibatch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gaf_optax
import oracle
from clients import toy_task

UPDATES, EPOCHS, MINIBATCHES, ROWS, K = 2, 2, 2, 64, 8
ACTIONS, HIDDEN, SEEDS = 4, 16, 2
TAU = 0.8
ADAM = optax.adam(0.02)


def init(key):
  sizes = (toy_task.FEATURES, HIDDEN), (HIDDEN, ACTIONS), (HIDDEN, 1)
  keys = jax.random.split(key, len(sizes))
  leaves = [jax.random.normal(key, size) / 2 for key, size in zip(keys, sizes)]
  return dict(zip(("hidden", "actor", "critic"), leaves))


def network(params, observations):
  hidden = jnp.tanh(observations @ params["hidden"])
  return jax.nn.log_softmax(hidden @ params["actor"]), hidden @ params["critic"][:, 0]


def of_action(log_probs, action):
  return jnp.take_along_axis(log_probs, action[:, None], axis=1)[:, 0]


def rollout(params, key):
  observations_key, action_key = jax.random.split(key)
  size = MINIBATCHES * ROWS
  observations = jax.random.normal(observations_key, (size, toy_task.FEATURES))
  log_probs, value = network(params, observations)
  action = jax.random.categorical(action_key, log_probs)
  reward = jnp.where(action == 0, 1.0, 0.0) + observations[:, 0] / 2
  return {
    "observations": observations,
    "action": action,
    "log_prob": of_action(log_probs, action),
    "advantage": reward - value,
    "target": reward,
  }


def normalised(batch):
  advantage = batch["advantage"]
  advantage = (advantage - jnp.mean(advantage)) / (jnp.std(advantage) + 1e-8)
  return {**batch, "advantage": advantage}


def loss(params, batch):
  log_probs, value = network(params, batch["observations"])
  ratio = jnp.exp(of_action(log_probs, batch["action"]) - batch["log_prob"])
  advantage = batch["advantage"]
  gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
  return jnp.mean(0.5 * (value - batch["target"]) ** 2 - gain)


def train(key, tau=None):
  """Final parameters and, for each step, the minibatch, the loss and num_accepted."""
  tx = ADAM if tau is None else gaf_optax.apply_if_nonzero(ADAM)

  def step(carry, minibatch):
    params, state = carry
    minibatch = normalised(minibatch)
    if tau is None:
      (value, grads), number = jax.value_and_grad(loss)(params, minibatch), None
    else:
      filtered = gaf_optax.value_and_grad(loss, K, tau)
      value, grads, agreement = filtered(params, minibatch)
      number = agreement.num_accepted
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), (minibatch, value, number)

  def update(carry, key):
    rollout_key, epochs_key = jax.random.split(key)
    data = rollout(carry[0], rollout_key)

    def epoch(carry, key):
      order = jax.random.permutation(key, MINIBATCHES * ROWS)
      shuffle = lambda x: x[order].reshape(MINIBATCHES, ROWS, *x.shape[1:])
      return jax.lax.scan(step, carry, jax.tree.map(shuffle, data))

    return jax.lax.scan(epoch, carry, jax.random.split(epochs_key, EPOCHS))

  params, keys = init(key), jax.random.split(key, UPDATES)
  (params, _), log = jax.lax.scan(update, (params, tx.init(params)), keys)
  return params, jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), log)


def over_seeds(tau):
  keys = jax.random.split(jax.random.key(3), SEEDS)
  run = jax.jit(jax.vmap(functools.partial(train, tau=tau)))
  return *jax.device_get(run(keys)), jax.vmap(init)(keys)


def test_accepting_all_is_the_mean():
  plain, (_, plain_values, _), start = over_seeds(None)
  params, (_, values, accepted), _ = over_seeds(2.0)
  toy_task.assert_same(toy_task.Run(values, params), toy_task.Run(plain_values, plain))
  assert np.all(accepted == K) and toy_task.relative_difference(plain, start) > 0.1


def test_as_stacked_on_one_device():
  """Replays the minibatches: microbatches are stacked, and NumPy filters them."""
  params, (minibatches, _, accepted), start = over_seeds(TAU)
  in_turn = lambda x: np.swapaxes(x.reshape(-1, K, *x.shape[1:]), 0, 1)
  of_each = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))
  for seed in range(SEEDS):
    trained, own = (jax.tree.map(lambda x: x[seed], tree) for tree in (params, start))
    state = ADAM.init(own)
    for step, number in enumerate(accepted[seed]):
      stacked = jax.tree.map(lambda x: in_turn(x[seed, step]), minibatches)
      grads, treedef = jax.tree.flatten(of_each(own, stacked))
      wanted = oracle.gaf([np.asarray(g) for g in grads], TAU)
      assert wanted.margin > 1e-3 and np.sum(wanted.accepted) == number
      mean = treedef.unflatten([jnp.float32(g) for g in wanted.gradient])
      updates, state = ADAM.update(mean, state)
      own = optax.apply_updates(own, updates)
    toy_task.assert_same(toy_task.Run([], trained), toy_task.Run([], own))
  assert 1 < np.min(accepted) < np.max(accepted) == K


def test_normalised_within_each_microbatch_it_is_another_loss():
  """The trap: PureJaxRL normalises inside the loss function."""
  params = init(jax.random.key(0))
  data = rollout(params, jax.random.key(1))
  within = lambda params, batch: loss(params, normalised(batch))
  filtered = lambda loss: jax.jit(gaf_optax.value_and_grad(loss, K, 2.0))
  wanted = jax.jit(jax.grad(within))(params, data)
  _, before, _ = filtered(loss)(params, normalised(data))
  _, inside, _ = filtered(within)(params, data)
  assert toy_task.relative_difference(before, wanted) < 1e-5
  found = toy_task.relative_difference(inside["actor"], wanted["actor"])
  assert found == pytest.approx(0.226, abs=0.001)
