"""A run that is saved in the middle resumes bit for bit."""

import copy
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization

import gaf_optax
import known_steps

# Created anew for each run, as in a restarted process.
RUNS = {
  "chain": lambda: optax.chain(
    gaf_optax.gaf(0.9, anchor_decay=0.5, num_microbatches=known_steps.K),
    optax.adamw(0.1),
  ),
  "memory": lambda: optax.chain(
    gaf_optax.gaf(
      gaf_optax.adaptive_tau(),
      rule=gaf_optax.rules.min_neighbors(0.6),
      groups="leaf",
      memory_decay=0.9,
      num_microbatches=known_steps.K,
    ),
    optax.sgd(0.1, momentum=0.9),
  ),
  "apply_if_agreed": lambda: gaf_optax.apply_if_agreed(
    optax.adam(0.1), gaf_optax.target_accept_rate(0.3), groups="leaf"
  ),
  # The run is saved after three of the five micro-gradients of a cycle.
  "multi_steps": lambda: gaf_optax.multi_steps(
    optax.adam(0.1), 5, 0.9, anchor_decay=0.5, num_microbatches=5
  ),
}
SHAPES = {"kernel": (3, 2), "bias": (2,)}
SAVED, END = 8, 17


def micro_grads(number, stacked):
  rng = np.random.default_rng(number)
  leading = (known_steps.K,) if stacked else ()
  grads = {
    name: rng.normal(size=(*leading, *shape)) + 0.3 for name, shape in SHAPES.items()
  }
  # Some NaNs, so that the counters are not zero.
  if number % 4 == 1:
    grads["bias"][..., 0] = np.nan
  return {
    "kernel": jnp.asarray(grads["kernel"], jnp.float32),
    "bias": jnp.asarray(grads["bias"], jnp.bfloat16),
  }


def initial_params():
  return {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2, jnp.bfloat16)}


def train(name, carry, start):
  """Parameters and state at SAVED and at END, from a newly compiled program."""
  tx = RUNS[name]()

  @jax.jit
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params, state = carry
  saved = None
  for number in range(start, END):
    if number == SAVED:
      saved = params, state
    grads = micro_grads(number, stacked="multi_steps" not in name)
    params, state = step(params, state, grads)
  return saved, (params, state)


def begin(name):
  params = initial_params()
  return params, RUNS[name]().init(params)


def through_orbax(name, saved, tmp_path):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "run", saved)
    checkpointer.wait_until_finished()
  # The restored tree is given by shapes only.
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
    jax.eval_shape(lambda: begin(name)),
  )
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(tmp_path / "run", target)


def through_pickle(name, saved, tmp_path):
  return pickle.loads(pickle.dumps(saved))


def through_flax(name, saved, tmp_path):
  return serialization.from_bytes(begin(name), serialization.to_bytes(saved))


def through_copy(name, saved, tmp_path):
  return copy.deepcopy(saved)


WAYS = {
  "orbax": through_orbax,
  "pickle": through_pickle,
  "flax": through_flax,
  "deepcopy": through_copy,
}


@pytest.fixture(scope="module", autouse=True)
def strict_promotion():
  """Off for this module: Optax's Adam mixes dtypes."""


@pytest.fixture(scope="module", params=RUNS)
def run(request):
  """The name, the state saved in the middle, and the end of an uninterrupted run."""
  name = request.param
  return name, *train(name, begin(name), 0)


def test_a_restored_run_goes_on_bit_for_bit(run, tmp_path):
  name, saved, end = run
  start = begin(name)
  for way, through in WAYS.items():
    restored = through(name, saved, tmp_path)
    assert jax.tree.structure(restored) == jax.tree.structure(start), way
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, start)
    chex.assert_trees_all_equal(restored, saved)
  restored = through_orbax(name, saved, tmp_path / "again")
  chex.assert_trees_all_equal(train(name, restored, SAVED)[1], end)
  if "multi_steps" in name:
    assert int(restored[1].mini_step) == 3
  assert not np.array_equal(end[0]["kernel"], saved[0]["kernel"])
