"""jit on a mesh of Auto axes, with parameters sharded over the batch axis."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gaf_optax
from clients import toy_task

SPECS = {
  "hidden": {"kernel": P(None, "data"), "bias": P("data")},
  "out": {"kernel": P("data"), "bias": P()},
}


def train(tau):
  mesh = jax.make_mesh((toy_task.K,), ("data",), axis_types=(AxisType.Auto,))
  place = lambda tree, specs: jax.device_put(
    tree, jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
  )
  tx = toy_task.ADAM
  if tau is not None:
    gaf = gaf_optax.gaf(tau, param_axes="data")
    update = jax.shard_map(
      lambda grads, state: gaf.update(grads, state),
      mesh=mesh,
      in_specs=(jax.tree.map(lambda s: P(None, *s), SPECS), P()),
      out_specs=(SPECS, P()),
    )
    on_shards = optax.GradientTransformation(gaf.init, lambda g, s, p: update(g, s))
    tx = optax.chain(on_shards, toy_task.ADAM)

  @jax.jit
  def step(params, state, x, y):
    each = jax.vmap(jax.value_and_grad(toy_task.loss), (None, 0, 0))
    if tau is None:
      mean_loss = lambda p: jnp.mean(jax.vmap(toy_task.loss, (None, 0, 0))(p, x, y))
      value, grads = jax.value_and_grad(mean_loss)(params)
    else:
      value, grads = each(params, x, y)  # [k, *shape]
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, jnp.mean(value)

  params = place(toy_task.params(), SPECS)
  state, losses, accepted = tx.init(params), [], []
  for batch in toy_task.batches():
    batch = place(batch, (P("data"), P("data")))
    params, state, value = jax.block_until_ready(step(params, state, *batch))
    losses.append(value)
    if tau is not None:
      accepted.append(gaf_optax.metrics(state)["num_accepted"])
  # Each device holds an eighth of each matrix and of Adam's moments.
  for tree in (params, optax.tree.get(state, "mu")):
    kernel = tree["hidden"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // toy_task.K
  return toy_task.Run(losses, params, accepted)


def test_as_the_mean_and_as_stacked_on_one_device():
  toy_task.assert_trains(train, toy_task.wanted(toy_task.ADAM))
