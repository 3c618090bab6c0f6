"""shard_map with the replication check, toy_task.SGD with momentum."""

import jax
import numpy as np
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import gaf_optax
from clients import toy_task


def train(tau):
  mesh = jax.make_mesh((toy_task.K,), ("data",), axis_types=(AxisType.Auto,))
  tx = toy_task.SGD
  if tau is not None:
    tx = optax.chain(gaf_optax.gaf(tau, axis_name="data"), toy_task.SGD)

  def step(params, state, x, y):
    if tau is None:
      mean_loss = lambda p: jax.lax.pmean(toy_task.loss(p, x, y), "data")
      value, grads = jax.value_and_grad(mean_loss)(params)
    else:
      local = jax.lax.pcast(params, "data", to="varying")
      value, grads = jax.value_and_grad(toy_task.loss)(local, x, y)
      value = jax.lax.pmean(value, "data")
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  specs = dict(in_specs=(P(), P(), P("data"), P("data")), out_specs=P())
  step = jax.jit(jax.shard_map(step, mesh=mesh, **specs))
  params = toy_task.params()
  state, losses, accepted = tx.init(params), [], []
  for batch in toy_task.batches():
    params, state, value = jax.block_until_ready(
      step(params, state, *toy_task.whole(batch))
    )
    losses.append(value)
    if tau is not None:
      accepted.append(gaf_optax.metrics(state)["num_accepted"])
  return toy_task.Run(losses, params, accepted)


def test_as_the_mean_and_as_stacked_on_one_device():
  toy_task.assert_trains(train, toy_task.wanted(toy_task.SGD))


def test_a_mean_left_in_the_loss_divides_the_result():
  """The trap: the gradient of pmean is each device's, divided by their number."""
  mesh = jax.make_mesh((toy_task.K,), ("data",), axis_types=(AxisType.Auto,))
  tx = gaf_optax.gaf(toy_task.TAU, axis_name="data")

  def filtered(averaged):
    def local(params, x, y):
      own = jax.lax.pcast(params, "data", to="varying")
      mean = lambda value: jax.lax.pmean(value, "data") if averaged else value
      grads = jax.grad(lambda p: mean(toy_task.loss(p, x, y)))(own)
      return tx.update(grads, tx.init(params), params)[0]

    specs = dict(in_specs=(P(), P("data"), P("data")), out_specs=P())
    run = jax.jit(jax.shard_map(local, mesh=mesh, **specs))
    return jax.device_get(
      run(toy_task.params(), *toy_task.whole(toy_task.batches()[0]))
    )

  eighth = jax.tree.map(lambda g: g / toy_task.K, filtered(False))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    filtered(True),
    eighth,
  )
