"""shard_map with the replication check, SGD with momentum."""

import jax
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import gaf_optax
from clients import task

SGD = optax.sgd(0.02, momentum=0.9)


def train(tau):
  mesh = jax.make_mesh((task.K,), ("data",), axis_types=(AxisType.Auto,))
  tx = SGD
  if tau is not None:
    tx = optax.chain(gaf_optax.gaf(tau, axis_name="data"), SGD)

  def step(params, state, x, y):
    if tau is None:
      mean_loss = lambda p: jax.lax.pmean(task.loss(p, x, y), "data")
      value, grads = jax.value_and_grad(mean_loss)(params)
    else:
      local = jax.lax.pcast(params, "data", to="varying")
      value, grads = jax.value_and_grad(task.loss)(local, x, y)
      value = jax.lax.pmean(value, "data")
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  specs = dict(in_specs=(P(), P(), P("data"), P("data")), out_specs=P())
  step = jax.jit(jax.shard_map(step, mesh=mesh, **specs))
  params = task.params()
  state, losses, accepted = tx.init(params), [], []
  for batch in task.batches():
    params, state, value = jax.block_until_ready(step(params, state, *task.whole(batch)))
    losses.append(value)
    if tau is not None:
      accepted.append(gaf_optax.metrics(state)["num_accepted"])
  return task.Run(losses, params, accepted)


def test_accepting_all_is_the_mean():
  task.assert_trains_as_the_mean(train)


def test_as_stacked_on_one_device():
  task.assert_same(train(task.TAU), task.stacked(task.loss, task.params(), SGD))
