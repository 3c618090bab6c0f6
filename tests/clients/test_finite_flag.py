"""A loss scale adjusted by a finite flag, as in loops with jmp, and a logged norm.

The plain form computes both from the averaged gradient, which no longer exists.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import gaf_optax
from clients import toy_task

STEP, MICROBATCH = 1, 3  # the microbatch whose gradient overflows
SCALE = np.float32(2**10)


def overflowing(value):
  data = [(x, y.copy()) for x, y in toy_task.batches()]
  data[STEP][1][MICROBATCH] = value
  return data


def on_devices(step, mapping):
  """Maps `step(carry, x, y)` over a batch `[K, ...]`; the carry is replicated."""
  if mapping == "pmap":
    return jax.pmap(step, axis_name="data")
  mesh = jax.make_mesh((toy_task.K,), ("data",), axis_types=(AxisType.Auto,))
  specs = dict(in_specs=(P(), P("data"), P("data")), out_specs=P())
  local = lambda carry, x, y: step(carry, x[0], y[0])
  return jax.jit(jax.shard_map(local, mesh=mesh, **specs))


@functools.cache
def trainer(filtered, mapping, combine, skip):
  gaf = gaf_optax.gaf(toy_task.tau, axis_name="data")
  tx = optax.chain(gaf, toy_task.SGD) if filtered else toy_task.SGD

  def step(carry, x, y):
    params, state, scale = carry
    local = jax.lax.pcast(params, "data", to="varying") if mapping != "pmap" else params
    scaled = lambda params: scale * toy_task.loss(params, x, y)
    value, grads = jax.value_and_grad(scaled)(local)
    grads = jax.tree.map(lambda g: g / scale, grads)
    if not filtered:
      grads = jax.lax.pmean(grads, "data")
    finite = jnp.array([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads)])
    finite = jnp.all(finite)
    if filtered and combine:
      finite = jax.lax.pmin(finite.astype(int), "data") == 1
    updates, new_state = tx.update(grads, state, params)
    new = optax.apply_updates(params, updates), new_state
    if skip:
      keep = lambda new, old: jnp.where(finite, new, old)
      new = jax.tree.map(keep, new, (params, state))
    new_scale = jnp.where(finite, 2 * scale, scale / 2)
    return (*new, new_scale), jax.lax.pmean(value / scale, "data")

  return tx, on_devices(step, mapping)


def train(tau, mapping="pmap", combine=True, skip=True, data=None):
  """Without `combine`, each device uses its own flag.

  Without `skip`, the flag only adjusts the scale; the filter drops the micro-gradient.
  """
  tx, step = trainer(tau is not None, mapping, combine, skip)
  carry = toy_task.params(), tx.init(toy_task.params()), SCALE
  carry = toy_task.copies(carry) if mapping == "pmap" else carry
  losses, accepted = [], []
  for batch in data or toy_task.batches():
    carry, value = jax.block_until_ready(step(carry, *batch))
    found = carry, value
    (params, state, _), value = toy_task.first(found) if mapping == "pmap" else found
    losses.append(value)
    if tau is not None:
      accepted.append(gaf_optax.metrics(state)["num_accepted"])
  return toy_task.Run(losses, params, accepted), jax.device_get(carry)


@pytest.mark.parametrize("mapping", ["pmap", "shard_map"])
def test_as_the_mean_and_as_stacked_on_one_device(mapping):
  toy_task.assert_trains(
    lambda tau: train(tau, mapping)[0], toy_task.wanted(toy_task.SGD)
  )


def test_an_overflow_on_one_device():
  data = overflowing(1e36)  # The scale makes it overflow.
  plain, (*_, scale) = train(None, data=data)
  assert set(scale) == {SCALE * 2 / 2 * 2 * 2}
  for skip, stacked_data in ((True, toy_task.batches()), (False, overflowing(np.inf))):
    run, carry = train(toy_task.tau, skip=skip, data=data)
    jax.tree.map(
      np.testing.assert_array_equal, carry, toy_task.copies(toy_task.first(carry))
    )
    np.testing.assert_array_equal(carry[-1], scale)
    # With `skip` the whole step is skipped; otherwise the filter drops one microbatch.
    tx = optax.chain(gaf_optax.gaf(toy_task.tau), toy_task.SGD)
    params, step = toy_task.params(), toy_task.stacked_step(tx)
    state = tx.init(params)
    for i, batch in enumerate(stacked_data):
      if not (skip and i == STEP):
        params, state, _ = step(params, state, *batch)
    toy_task.assert_same(run._replace(losses=[]), toy_task.Run([], params))
    same = np.allclose(run.losses[STEP + 1], plain.losses[STEP + 1], rtol=1e-4)
    assert same == skip


def test_without_the_fix_the_devices_drift():
  """The trap: one device skips a step that the others take, without an error."""
  _, (params, _, scale) = train(toy_task.tau, combine=False, data=overflowing(1e36))
  assert len(set(scale)) == 2
  assert max(np.max(np.ptp(leaf, axis=0)) for leaf in jax.tree.leaves(params)) > 0.01


def test_the_replication_check_of_shard_map_sees_it():
  with pytest.raises(ValueError, match="out_specs"):
    train(toy_task.tau, "shard_map", combine=False)


def test_a_norm_is_that_of_the_filtered_gradient():
  tx = gaf_optax.gaf(toy_task.TAU, axis_name="data")

  @functools.partial(jax.pmap, axis_name="data")
  def norms(params, x, y):
    grads = jax.grad(toy_task.loss)(params, x, y)
    filtered, state = tx.update(grads, tx.init(params), params)
    logged = gaf_optax.metrics(state)["grad_norm"]
    return optax.tree.norm(grads), optax.tree.norm(filtered), logged

  x, y = toy_task.batches()[0]
  own, *others = norms(toy_task.copies(toy_task.params()), x, y)
  right = toy_task.whole([np.delete(a, toy_task.WRONG, axis=0) for a in (x, y)])
  wanted = optax.tree.norm(jax.jit(jax.grad(toy_task.loss))(toy_task.params(), *right))
  np.testing.assert_allclose(others, np.full((2, toy_task.K), wanted), rtol=1e-5)
  assert np.ptp(own) > 0.1 * wanted  # The trap: each device clips by its own norm.
