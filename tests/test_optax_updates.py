"""The input of the optimizers after the filter, with and without agreement."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gaf_optax
import known_steps

# Optax's optimizers and schedules mix dtypes.
pytestmark = pytest.mark.usefixtures("standard_promotion")

OPTIMIZERS = {
  "nesterov": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
  "adam": lambda: optax.adam(0.1),
  "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
  "muon": lambda: optax.contrib.muon(0.1),
  "schedule_free_sgd": lambda: optax.contrib.schedule_free_sgd(0.1),
  "schedule": lambda: optax.sgd(optax.linear_schedule(1.0, 0.1, 5)),
}
# apply_if_agreed with states of all kinds; the other two run all optimizers alike.
PAIRS = [
  ("chain", "adam"),
  ("multi_steps", "adam"),
  *(("apply_if_agreed", optimizer) for optimizer in OPTIMIZERS),
]


@pytest.mark.parametrize("form, optimizer", PAIRS)
def test_the_optimizer_gets_the_mean_of_the_accepted(form, optimizer):
  """Several steps, compared with the optimizer alone on that mean."""
  kind = known_steps.FORMS[form]
  inner = OPTIMIZERS[optimizer]()
  tx = kind.make(inner)
  params = known_steps.params()
  state, plain_state = tx.init(params), inner.init(params)
  feed = jax.jit(lambda *args: kind.feed(tx, *args))
  for step in known_steps.sequence():
    before = known_steps.inner_state(form, state)
    updates, state = feed(step.micro_grads, state, params)
    after = known_steps.inner_state(form, state)
    assert int(known_steps.gaf_state(state).num_accepted) == len(step.accepted)
    if step.accepted or not kind.skips:
      expected, plain_state = inner.update(step.mean, plain_state, params)
      chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)
      chex.assert_trees_all_close(after, plain_state, rtol=1e-5, atol=1e-6)
    else:
      expected = jax.tree.map(jnp.zeros_like, params)
      chex.assert_trees_all_equal(updates, expected)
      chex.assert_trees_all_equal(after, before)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, plain_state)
    params = optax.apply_updates(params, updates)


@pytest.mark.parametrize(
  "form, dtype",
  [
    ("chain", "float16"),
    ("apply_if_agreed", "bfloat16"),
    ("multi_steps", "bfloat16"),
  ],
)
def test_half_precision_stays_half_precision(form, dtype):
  kind = known_steps.FORMS[form]
  inner = optax.sgd(0.5, momentum=0.5)
  tx = kind.make(inner)
  params = known_steps.params(dtype)
  state, plain_state = tx.init(params), inner.init(params)
  before = known_steps.describe(state)
  feed = jax.jit(lambda *args: kind.feed(tx, *args))
  for step in known_steps.sequence(("all", "bad", "none"), dtype=dtype):
    updates, state = feed(step.micro_grads, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    if step.accepted:
      expected, plain_state = inner.update(step.mean, plain_state)
      chex.assert_trees_all_close(updates, expected, rtol=1e-2)
  assert known_steps.describe(state) == before


def run_two_steps(tx):
  """Weights and state after a step with agreement and one without."""
  params = jnp.array([1.0, -2.0])
  agreeing = jnp.array([[1.0, 1.0], [1.0, 3.0]])
  state = tx.init(params)
  updates, state = tx.update(agreeing, state, params)
  params = optax.apply_updates(params, updates)
  between = params, state
  updates, state = tx.update(jnp.array([[1.0, 1.0], [-1.0, -1.0]]), state, params)
  return between, (optax.apply_updates(params, updates), state)


# The table in the docstring of apply_if_agreed, computed by hand.


def test_without_agreement_momentum_coasts_in_a_chain_and_stays_otherwise():
  inner = optax.sgd(1.0, momentum=0.5)
  (weights, _), (after, state) = run_two_steps(optax.chain(gaf_optax.gaf(0.97), inner))
  np.testing.assert_array_equal(weights, [0.0, -4.0])  # Minus the mean, [1, 2].
  np.testing.assert_array_equal(after, [-0.5, -5.0])  # Minus half of it again.
  np.testing.assert_array_equal(optax.tree.get(state, "trace"), [0.5, 1.0])

  (weights, _), (after, state) = run_two_steps(gaf_optax.apply_if_agreed(inner, 0.97))
  np.testing.assert_array_equal(weights, [0.0, -4.0])
  np.testing.assert_array_equal(after, weights)
  np.testing.assert_array_equal(optax.tree.get(state, "trace"), [1.0, 2.0])


def test_without_agreement_weight_decay_goes_on_in_a_chain_and_pauses_otherwise():
  inner = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(1.0))
  (weights, _), (after, _) = run_two_steps(optax.chain(gaf_optax.gaf(0.97), inner))
  np.testing.assert_array_equal(after, 0.5 * weights)
  (weights, _), (after, _) = run_two_steps(gaf_optax.apply_if_agreed(inner, 0.97))
  np.testing.assert_array_equal(after, weights)


def test_without_agreement_adam_goes_on_in_a_chain_and_stays_otherwise():
  inner = optax.adam(1.0, b1=0.5, b2=0.75)
  (_, _), (_, state) = run_two_steps(optax.chain(gaf_optax.gaf(0.97), inner))
  assert int(optax.tree.get(state, "count")) == 2
  np.testing.assert_array_equal(optax.tree.get(state, "mu"), [0.25, 0.5])
  np.testing.assert_array_equal(optax.tree.get(state, "nu"), [0.1875, 0.75])

  (_, _), (_, state) = run_two_steps(gaf_optax.apply_if_agreed(inner, 0.97))
  assert int(optax.tree.get(state, "count")) == 1
  np.testing.assert_array_equal(optax.tree.get(state, "mu"), [0.5, 1.0])
  np.testing.assert_array_equal(optax.tree.get(state, "nu"), [0.25, 1.0])


def test_without_agreement_a_schedule_goes_on_in_a_chain_and_pauses_otherwise():
  inner = optax.scale_by_schedule(lambda count: 1.0 + count)
  _, (_, state) = run_two_steps(optax.chain(gaf_optax.gaf(0.97), inner))
  assert int(optax.tree.get(state, "count")) == 2
  _, (_, state) = run_two_steps(gaf_optax.apply_if_agreed(inner, 0.97))
  assert int(optax.tree.get(state, "count")) == 1
