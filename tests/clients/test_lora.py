"""Fine-tuning: LoRA in Flax NNX, and a backbone frozen by Optax's labels or masks."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gaf_optax
from clients import toy_task

with warnings.catch_warnings():
  # The oldest supported Flax uses a name that the oldest supported JAX deprecates.
  warnings.simplefilter("ignore", DeprecationWarning)
  from flax import nnx


class Network(nnx.Module):
  def __init__(self, rngs):
    hidden = nnx.Linear(toy_task.FEATURES, toy_task.HIDDEN, rngs=rngs)
    self.hidden = nnx.LoRA(
      toy_task.FEATURES, 2, toy_task.HIDDEN, base_module=hidden, rngs=rngs
    )
    self.out = nnx.LoRALinear(toy_task.HIDDEN, 1, lora_rank=1, rngs=rngs)

  def __call__(self, x):
    return self.out(nnx.tanh(self.hidden(x)))


def loss_fn(model, x, y):
  return jnp.mean((model(x) - y) ** 2)


def functional(model):
  """The loss as a function of the LoRA parameters, and these parameters."""
  graph, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
  return lambda p, x, y: loss_fn(nnx.merge(graph, p, rest, copy=True), x, y), lora


def train_lora(tau):
  model = Network(nnx.Rngs(4))
  before = jax.device_get(nnx.state(model, nnx.Not(nnx.LoRAParam)))
  tx = toy_task.SGD if tau is None else gaf_optax.apply_if_nonzero(toy_task.SGD)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)

  @nnx.jit
  def train_step(model, optimizer, x, y):
    if tau is None:
      of_lora = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))
      value, grads = of_lora(model, x, y)
      number = None
    else:
      loss, lora = functional(model)
      filtered = gaf_optax.value_and_grad(loss, toy_task.K, tau(optimizer.step[...]))
      value, grads, agreement = filtered(lora, x, y)
      number = agreement.num_accepted
    optimizer.update(model, grads)
    return value, number

  losses, accepted = [], []
  for batch in toy_task.batches():
    value, number = train_step(model, optimizer, *toy_task.interleaved(batch))
    losses.append(value)
    accepted += [] if tau is None else [number]
  after = nnx.state(model, nnx.Not(nnx.LoRAParam))
  jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(after))
  return toy_task.Run(losses, nnx.state(model, nnx.LoRAParam), accepted)


def test_lora_as_the_mean_and_as_stacked_on_one_device():
  wanted = toy_task.stacked(*functional(Network(nnx.Rngs(4))), toy_task.SGD)
  toy_task.assert_trains(train_lora, wanted)


FREEZE = {
  "partition": lambda tx: optax.partition(
    {"head": tx, "backbone": optax.set_to_zero()},
    lambda params: {name: name for name in params},
  ),
  "masked": lambda tx: optax.chain(
    optax.masked(tx, {"backbone": False, "head": True}),
    optax.masked(optax.set_to_zero(), {"backbone": True, "head": False}),
  ),
}


def head_alone(path, leaf):
  return "head" if path[0].key == "head" else None


def domains():
  """`[K, ROWS, K]`; microbatch i belongs to domain i and only has input i."""
  rng = np.random.default_rng(0)
  size = 1 + 0.1 * rng.normal(size=(toy_task.STEPS, toy_task.K, toy_task.ROWS, 1))
  y = 1 + 0.1 * rng.normal(size=size.shape)
  y[toy_task.ALL_STEPS :, toy_task.WRONG] *= -5
  x = size * np.eye(toy_task.K)[:, None]
  return [*zip(x.astype(np.float32), y.astype(np.float32))]


def tuned_loss(params, x, y):
  features = jnp.tanh(x @ params["backbone"])
  return jnp.mean((features @ params["head"] - y) ** 2)


def tune(freeze, groups=None, plain_without=None):
  """Trains the head; the plain form drops the microbatches `plain_without`."""
  rng = np.random.default_rng(1)
  backbone = 0.1 + 0.01 * rng.normal(size=(toy_task.K, toy_task.HIDDEN))
  # Large, so that the backbone's gradient is longer than the head's.
  head = 2 * np.sign(rng.normal(size=(toy_task.HIDDEN, 1)))
  params = start = {"backbone": np.float32(backbone), "head": np.float32(head)}
  tx = FREEZE[freeze](toy_task.SGD)
  if plain_without is None:
    tx = optax.chain(gaf_optax.gaf(toy_task.TAU, groups=groups), tx)

  @jax.jit
  def step(params, state, x, y):
    grads = jax.vmap(jax.grad(tuned_loss), (None, 0, 0))(params, x, y)
    if plain_without is not None:
      grads = jax.tree.map(lambda g: jnp.mean(g, axis=0), grads)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state, accepted = tx.init(params), []
  for i, (x, y) in enumerate(domains()):
    if i >= toy_task.ALL_STEPS and plain_without:
      x, y = np.delete(x, plain_without, 0), np.delete(y, plain_without, 0)
    params, state = step(params, state, x, y)
    if plain_without is None:
      accepted.append(int(gaf_optax.metrics(state)["num_accepted"]))
  np.testing.assert_array_equal(params["backbone"], start["backbone"])
  return toy_task.Run([], params, accepted)


@pytest.mark.parametrize("freeze", FREEZE)
def test_a_frozen_backbone_does_not_decide(freeze):
  run = tune(freeze, head_alone)
  assert (
    run.accepted
    == [toy_task.K] * toy_task.ALL_STEPS + [toy_task.K - len(toy_task.WRONG)] * 2
  )
  toy_task.assert_same(run, tune(freeze, plain_without=toy_task.WRONG))


def test_without_groups_it_outvotes_the_head():
  """The trap: the unused gradients of the backbone also enter the comparison."""
  assert tune("partition").accepted == [0] * toy_task.STEPS
