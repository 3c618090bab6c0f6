"""An optimizer that is skipped on steps whose gradient is all zeros."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import device_mappings
import gaf_optax
import known_steps

# Optax's optimizers mix dtypes.
pytestmark = pytest.mark.usefixtures("standard_promotion")

PARAMS = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}
ADAMW = optax.adamw(0.1, weight_decay=0.1)


def gradient(seed):
  rng = np.random.default_rng(seed)
  draw = lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype)
  return jax.tree.map(draw, PARAMS)


def zeros():
  return jax.tree.map(jnp.zeros_like, PARAMS)


@pytest.mark.parametrize("jitted", [False, True])
def test_is_inner_where_something_is_not_zero(jitted):
  tx = gaf_optax.apply_if_nonzero(ADAMW)
  update = jax.jit(tx.update) if jitted else tx.update
  state, wanted_state = tx.init(PARAMS), ADAMW.init(PARAMS)
  one = zeros()
  one["b"] = one["b"].at[2].set(-1e-30)  # A single value is enough.
  for grads in (gradient(0), one, gradient(1)):
    updates, state = update(grads, state, PARAMS)
    wanted, wanted_state = ADAMW.update(grads, wanted_state, PARAMS)
    chex.assert_trees_all_close(updates, wanted, rtol=1e-6)
    chex.assert_trees_all_close(state.inner_state, wanted_state, rtol=1e-6)
  assert int(state.skipped_steps) == 0
  assert int(optax.tree.get(state, "count")) == 3


@pytest.mark.parametrize("jitted", [False, True])
def test_zeros_leave_the_state_of_inner_alone_and_are_counted(jitted):
  tx = gaf_optax.apply_if_nonzero(ADAMW)
  update = jax.jit(tx.update) if jitted else tx.update
  _, state = update(gradient(0), tx.init(PARAMS), PARAMS)
  negative = jax.tree.map(jnp.negative, zeros())  # -0 is zero.
  for number, grads in enumerate((zeros(), negative, zeros()), 1):
    before = state.inner_state
    updates, state = update(grads, state, PARAMS)
    chex.assert_trees_all_equal(updates, zeros())  # Also no weight decay.
    chex.assert_trees_all_equal(state.inner_state, before)
    assert int(state.skipped_steps) == number
  _, state = update(gradient(1), state, PARAMS)
  assert int(state.skipped_steps) == 3
  assert int(optax.tree.get(state, "count")) == 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_not_zero(value):
  """`inner` receives it."""
  tx = gaf_optax.apply_if_nonzero(optax.sgd(1.0))
  grads = zeros()
  grads["b"] = grads["b"].at[0].set(value)
  updates, state = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS)
  np.testing.assert_array_equal(updates["b"], [-value, 0, 0])
  assert int(state.skipped_steps) == 0


def test_extra_arguments_go_to_inner():
  inner = optax.GradientTransformationExtraArgs(
    optax.init_empty_state,
    lambda g, s, p, *, by: (jax.tree.map(lambda x: by * x, g), s),
  )
  tx = gaf_optax.apply_if_nonzero(inner)
  updates, _ = tx.update(gradient(0), tx.init(PARAMS), PARAMS, by=3.0)
  chex.assert_trees_all_close(updates, jax.tree.map(lambda g: 3 * g, gradient(0)))


class TestOtherLeaves:
  params = {"w": jnp.ones(2), "n": jnp.arange(3), "none": None}

  def run(self, grads):
    """An optimizer that only updates the floating-point leaves."""
    is_float = jax.tree.map(
      lambda p: jnp.issubdtype(p.dtype, jnp.floating), self.params
    )
    tx = gaf_optax.apply_if_nonzero(optax.masked(optax.adam(0.1), is_float))
    return jax.jit(tx.update)(grads, tx.init(self.params), self.params)

  @pytest.mark.parametrize("value", [0.0, 1.0])
  def test_float0(self, value):
    loss = lambda params, x: jnp.sum(params["w"] * x)
    grads = jax.grad(loss, allow_int=True)(self.params, jnp.full(2, value))
    assert grads["n"].dtype == jax.dtypes.float0
    updates, state = self.run(grads)
    assert int(state.skipped_steps) == (value == 0)
    assert int(optax.tree.get(state, "count")) == (value != 0)
    assert np.any(updates["w"]) == (value != 0)
    assert updates["none"] is None and updates["n"].shape == (3,)

  @pytest.mark.parametrize("w, n, runs", [(0, 0, 0), (1, 0, 1), (0, 1, 1)])
  def test_integers(self, w, n, runs):
    grads = {"w": jnp.full(2, float(w)), "n": jnp.full(3, n), "none": None}
    updates, state = self.run(grads)
    assert int(optax.tree.get(state, "count")) == runs
    assert int(state.skipped_steps) == 1 - runs
    np.testing.assert_array_equal(updates["n"], grads["n"])


@pytest.mark.parametrize("check", [True, False])
def test_inner_runs_on_all_devices_where_one_has_something(check):
  """Only one device has a nonzero gradient of the sharded parameters, or none has."""
  inner = optax.sgd(1.0, momentum=0.5)
  tx = gaf_optax.apply_if_nonzero(inner, param_axes="data")
  params = {"sharded": jnp.zeros((device_mappings.N, 2)), "whole": jnp.zeros(3)}
  specs = {"sharded": P("data"), "whole": P()}
  state = tx.init(params)
  state_specs = optax.tree_map_params(
    tx, lambda _, s: s, state, specs, transform_non_params=lambda _: P()
  )
  update = jax.jit(
    jax.shard_map(
      tx.update,
      mesh=device_mappings.mesh(),
      in_specs=(specs, state_specs),
      out_specs=(specs, state_specs),
      check_vma=check,
    )
  )
  start = {"sharded": jnp.ones((device_mappings.N, 2)), "whole": jnp.zeros(3)}
  one = {
    "sharded": jnp.zeros((device_mappings.N, 2)).at[5, 1].set(2.0),
    "whole": jnp.zeros(3),
  }
  none = jax.tree.map(jnp.zeros_like, params)
  wanted_state = inner.init(params)
  for number, grads in enumerate((start, one, none)):
    updates, state = jax.block_until_ready(update(grads, state))
    if grads is none:
      wanted = none
    else:  # Momentum changes all of them.
      wanted, wanted_state = inner.update(grads, wanted_state)
    chex.assert_trees_all_equal(updates, wanted)
    chex.assert_trees_all_equal(state.inner_state, wanted_state)
    assert int(state.skipped_steps) == (number == 2)


def test_excluded_leaves_are_zero_on_a_step_without_agreement():
  """Otherwise their plain mean would run an optimizer that must not change."""
  agreeing, opposed = known_steps.make("all", 0), known_steps.make("none", 1)
  loss = lambda p, rows: sum(jnp.vdot(p[name], rows[name][0]) for name in p)
  groups = lambda path, leaf: None if path[0].key == "b" else "decides"
  filtered = jax.jit(
    gaf_optax.value_and_grad(loss, known_steps.K, known_steps.TAU, groups=groups)
  )
  tx = gaf_optax.apply_if_nonzero(ADAMW)
  params = known_steps.params()
  state = tx.init(params)
  for step, number in ((agreeing, 1), (opposed, 1), (agreeing, 2)):
    _, grads, _ = filtered(params, step.micro_grads)
    updates, state = tx.update(grads, state, params)
    chex.assert_trees_all_close(grads, step.mean, rtol=1e-6)
    assert int(optax.tree.get(state, "count")) == number
    assert np.any(updates["b"]) == bool(step.accepted)
  assert int(state.skipped_steps) == 1


def test_as_apply_if_agreed_on_the_same_micro_gradients():
  """`value_and_grad` of a linear loss: the batch's rows are the micro-gradients."""
  stacked = gaf_optax.apply_if_agreed(ADAMW, known_steps.TAU)
  streamed = gaf_optax.apply_if_nonzero(ADAMW)
  loss = lambda p, rows: sum(
    jnp.vdot(p[name], jnp.mean(rows[name], axis=0)) for name in p
  )
  params = known_steps.params()
  state, streamed_state = stacked.init(params), streamed.init(params)
  filtered = jax.jit(gaf_optax.value_and_grad(loss, known_steps.K, known_steps.TAU))
  skipped = 0
  for i, step in enumerate(known_steps.sequence()):
    micro_grads = known_steps.in_order(step.micro_grads, i)
    updates, state = jax.jit(stacked.update)(micro_grads, state, params)
    _, grads, _ = filtered(params, step.micro_grads)
    found, streamed_state = jax.jit(streamed.update)(grads, streamed_state, params)
    chex.assert_trees_all_close(found, updates, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(
      streamed_state.inner_state, state.inner_state, rtol=1e-5, atol=1e-6
    )
    skipped += not step.accepted
    assert int(streamed_state.skipped_steps) == skipped
    params = optax.apply_updates(params, updates)
  assert 0 < skipped < len(known_steps.MIXED)
  assert int(gaf_optax.metrics(state)["skipped_steps"]) == skipped
