"""Flax's DynamicScale, which must not average before the filter."""

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
  from flax.training import dynamic_scale, train_state

LOUD = 1, 3  # the overflowing step and microbatch


class TrainState(train_state.TrainState):
  dynamic_scale: dynamic_scale.DynamicScale


def overflowing(value):
  data = [(x, y.copy()) for x, y in toy_task.batches()]
  data[LOUD[0]][1][LOUD[1]] = value
  return data


def train(tau, mapping="pmap", data=None, averaged=False):
  """With `averaged`, the scaler averages the gradients, as always in the plain form."""
  tx = toy_task.SGD
  if tau is not None:
    tx = optax.chain(gaf_optax.gaf(tau, axis_name="data"), toy_task.SGD)
  scale = dynamic_scale.DynamicScale(
    fin_steps=jnp.int32(0), scale=jnp.float32(2.0**16), growth_interval=3
  )
  state = TrainState.create(
    apply_fn=None, params=toy_task.params(), tx=tx, dynamic_scale=scale
  )
  state = toy_task.copies(state)

  def train_step(state, x, y):
    loss = lambda params: toy_task.loss(params, x, y)
    if tau is None:
      of_params = state.dynamic_scale.value_and_grad(loss, axis_name="data")
    else:
      name = "data" if averaged else None
      of_params = state.dynamic_scale.value_and_grad(loss, axis_name=name)
    scaler, is_fin, value, grads = of_params(state.params)
    if tau is not None:  # Each device has a scaler; use the lowest.
      scaler = jax.lax.pmin(scaler, "data")
    new = state.apply_gradients(grads=grads)
    if tau is None:  # Unlike the filter, the mean must skip non-finite steps.
      keep = lambda new, old: jnp.where(is_fin, new, old)
      new = new.replace(
        params=jax.tree.map(keep, new.params, state.params),
        opt_state=jax.tree.map(keep, new.opt_state, state.opt_state),
      )
    return new.replace(dynamic_scale=scaler), jax.lax.pmean(value, "data")

  wrap = {"pmap": jax.pmap, "vmap": lambda f, **kw: jax.jit(jax.vmap(f, **kw))}[mapping]
  train_step = wrap(train_step, axis_name="data")
  losses, accepted, scales = [], [], []
  for x, y in data or toy_task.batches():
    state, value = train_step(state, x, y)
    losses.append(toy_task.first(value))
    scales.append(np.unique(state.dynamic_scale.scale).tolist())
    if tau is not None:
      found = gaf_optax.metrics(toy_task.first(state.opt_state))
      accepted.append(found["num_accepted"])
      copies = len(losses) if averaged else 0
      assert int(found["num_identical_steps"]) == copies
  return toy_task.Run(losses, toy_task.first(state.params), accepted), scales


def test_as_the_mean_and_as_stacked_on_one_device():
  scales = []

  def run(tau):
    result, found = train(tau)
    scales.append(found)
    return result

  toy_task.assert_trains(run, toy_task.wanted(toy_task.SGD))
  # The scales grow after three finite steps, on all devices alike.
  assert scales[0] == scales[1] == [[2.0**16]] * 3 + [[2.0**17]]


def test_under_vmap():
  toy_task.assert_same(train(toy_task.tau, "vmap")[0], toy_task.wanted(toy_task.SGD))


def test_a_microbatch_that_overflows_is_dropped_and_lowers_the_scale():
  """The scale makes it overflow; on one device without a scale, it starts infinite."""
  run, scales = train(toy_task.TAU, data=overflowing(1e36))
  assert scales == [[2.0**16], [2.0**15], [2.0**15], [2.0**15]]
  tx = optax.chain(gaf_optax.gaf(toy_task.TAU), toy_task.SGD)
  params = toy_task.params()
  state = tx.init(params)
  step = toy_task.stacked_step(tx)
  for x, y in overflowing(np.inf):
    params, state, _ = step(params, state, x, y)
  assert int(gaf_optax.metrics(state)["nonfinite"]) == 1
  toy_task.assert_same(run._replace(losses=[]), toy_task.Run([], params))
  np.testing.assert_array_equal(run.accepted, [6, 5, 6, 6])


def test_averaged_by_the_scaler_the_micro_gradients_are_copies():
  """The trap: axis_name averages, so the filter does nothing; the metrics show it."""
  run, _ = train(toy_task.TAU, averaged=True)
  np.testing.assert_array_equal(run.accepted, [toy_task.K] * toy_task.STEPS)
  toy_task.assert_same(run._replace(accepted=()), train(None)[0])
