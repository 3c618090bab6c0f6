"""A 2 x 4 mesh of Explicit axes: replicas of shards (HSDP), four devices in each."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gaf_optax
from clients import toy_task

SPECS = {
  "hidden": {"kernel": P(None, "fsdp"), "bias": P("fsdp")},
  "out": {"kernel": P("fsdp"), "bias": P()},
}


def train(tau):
  mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Explicit,) * 2)
  sharding = lambda spec: NamedSharding(mesh, spec)
  tx = toy_task.ADAM if tau is None else optax.chain(gaf_optax.gaf(tau), toy_task.ADAM)

  def loss(params, x, y):
    gather = lambda leaf: jax.sharding.reshard(leaf, sharding(P()))
    return toy_task.loss(jax.tree.map(gather, params), x, y)

  @jax.jit
  def step(params, state, x, y):
    if tau is None:
      mean_loss = lambda p: jnp.mean(jax.vmap(loss, (None, 0, 0))(p, x, y))
      value, grads = jax.value_and_grad(mean_loss)(params)
    else:
      each = jax.vmap(jax.value_and_grad(loss), (None, 0, 0))
      value, grads = each(params, x, y)  # [k@data, *shape@fsdp]
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, jnp.mean(value)

  params = jax.device_put(toy_task.params(), jax.tree.map(sharding, SPECS))
  state, losses, accepted = tx.init(params), [], []
  for batch in toy_task.batches():
    batch = jax.device_put(batch, sharding(P("data", "fsdp")))
    params, state, value = jax.block_until_ready(step(params, state, *batch))
    losses.append(value)
    if tau is not None:
      accepted.append(gaf_optax.metrics(state)["num_accepted"])
  kernel = params["hidden"]["kernel"]
  assert kernel.addressable_shards[0].data.size == kernel.size // 4
  return toy_task.Run(losses, params, accepted)


def test_as_the_mean_and_as_stacked_on_one_device():
  toy_task.assert_trains(train, toy_task.wanted(toy_task.ADAM))
