"""Flax's DynamicScale: it must not average, since then there is nothing to filter."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gaf_optax
from clients import task

with warnings.catch_warnings():
  # The oldest Flax that is admitted reads a name that the oldest JAX has deprecated.
  warnings.simplefilter("ignore", DeprecationWarning)
  from flax.training import dynamic_scale, train_state

LOUD = 1, 3  # the step and the microbatch that overflow


class TrainState(train_state.TrainState):
  dynamic_scale: dynamic_scale.DynamicScale


def overflowing(value):
  data = [(x, y.copy()) for x, y in task.batches()]
  data[LOUD[0]][1][LOUD[1]] = value
  return data


def train(tau, how="pmap", data=None, averaged=False):
  """With `averaged` by the scaler, too; the plain form always is."""
  tx = task.SGD
  if tau is not None:
    tx = optax.chain(gaf_optax.gaf(tau, axis_name="data"), task.SGD)
  scale = dynamic_scale.DynamicScale(
    fin_steps=jnp.int32(0), scale=jnp.float32(2.0**16), growth_interval=3
  )
  state = TrainState.create(
    apply_fn=None, params=task.params(), tx=tx, dynamic_scale=scale
  )
  state = task.copies(state)

  def train_step(state, x, y):
    loss = lambda params: task.loss(params, x, y)
    if tau is None:
      of_params = state.dynamic_scale.value_and_grad(loss, axis_name="data")
    else:
      name = "data" if averaged else None
      of_params = state.dynamic_scale.value_and_grad(loss, axis_name=name)
    scaler, is_fin, value, grads = of_params(state.params)
    if tau is not None:  # Each device has a scaler of its own: the lowest of them.
      scaler = jax.lax.pmin(scaler, "data")
    new = state.apply_gradients(grads=grads)
    if tau is None:  # The filter drops what is not finite; the mean has to be left out.
      keep = lambda new, old: jnp.where(is_fin, new, old)
      new = new.replace(
        params=jax.tree.map(keep, new.params, state.params),
        opt_state=jax.tree.map(keep, new.opt_state, state.opt_state),
      )
    return new.replace(dynamic_scale=scaler), jax.lax.pmean(value, "data")

  wrap = {"pmap": jax.pmap, "vmap": lambda f, **kw: jax.jit(jax.vmap(f, **kw))}[how]
  train_step = wrap(train_step, axis_name="data")
  losses, accepted, scales = [], [], []
  for x, y in data or task.batches():
    state, value = train_step(state, x, y)
    losses.append(task.first(value))
    scales.append(np.unique(state.dynamic_scale.scale).tolist())
    if tau is not None:
      found = gaf_optax.metrics(task.first(state.opt_state))
      accepted.append(found["num_accepted"])
      copies = len(losses) if averaged else 0
      assert int(found["num_identical_steps"]) == copies
  return task.Run(losses, task.first(state.params), accepted), scales


def test_as_the_mean_and_as_stacked_on_one_device():
  scales = []

  def run(tau):
    result, found = train(tau)
    scales.append(found)
    return result

  task.assert_trains(run, task.wanted(task.SGD))
  # They grow after three finite steps, as one.
  assert scales[0] == scales[1] == [[2.0**16]] * 3 + [[2.0**17]]


def test_under_vmap():
  task.assert_same(train(task.tau, "vmap")[0], task.wanted(task.SGD))


def test_a_microbatch_that_overflows_is_dropped_and_lowers_the_scale():
  """It overflows by the scale; without one it is infinite to begin with."""
  run, scales = train(task.TAU, data=overflowing(1e36))
  assert scales == [[2.0**16], [2.0**15], [2.0**15], [2.0**15]]
  tx = optax.chain(gaf_optax.gaf(task.TAU), task.SGD)
  params = task.params()
  state = tx.init(params)
  step = task.stacked_step(tx)
  for x, y in overflowing(np.inf):
    params, state, _ = step(params, state, x, y)
  assert int(gaf_optax.metrics(state)["nonfinite"]) == 1
  task.assert_same(run._replace(losses=[]), task.Run([], params))
  np.testing.assert_array_equal(run.accepted, [6, 5, 6, 6])


def test_averaged_by_the_scaler_the_micro_gradients_are_copies():
  """The trap: axis_name averages, so that the filter does nothing; metrics tell."""
  run, _ = train(task.TAU, averaged=True)
  np.testing.assert_array_equal(run.accepted, [task.K] * task.STEPS)
  task.assert_same(run._replace(accepted=()), train(None)[0])
