"""`sources` and accept rates against the oracle."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gaf_optax
import known_steps
import oracle
from gaf_optax import rules

DECAY, NUM_STEPS = 0.9, 15
OPTIONS = {"rule": rules.min_neighbors(0.6), "memory_decay": DECAY}


def trees(k):
  """Leaves `[NUM_STEPS, k, *shape]`; the last source is never finite."""
  rng = np.random.default_rng(k)
  rows = rng.standard_normal((NUM_STEPS, k, 10))
  rows[:, : k - 2] += rng.standard_normal(10)
  rows[:, -1, 0] = np.nan
  rows[3, 1, 7], rows[5, 0], rows[6] = np.inf, 0, np.nan
  rows = jnp.asarray(rows, jnp.float32)
  return {"a": rows[..., :6].reshape(NUM_STEPS, k, 2, 3), "b": rows[..., 6:]}


def begin(tx, stack):
  return tx.init(jax.tree.map(lambda x: jnp.zeros(x.shape[2:], x.dtype), stack))


def scanned(tx, stack, state=None):
  """The final state, and which sources each step accepted, `[NUM_STEPS, k]`."""

  @jax.jit
  def run(state, stack):
    def one(state, tree):
      _, state = tx.update(tree, state)
      return state, known_steps.gaf_state(state).accepted

    return jax.lax.scan(one, state, stack)

  return run(begin(tx, stack) if state is None else state, stack)


@pytest.mark.parametrize("k, groups", [(2, None), (5, "leaf"), (8, None)])
def test_the_table_is_the_oracles(k, groups):
  stack = trees(k)
  tx = optax.chain(
    gaf_optax.gaf(0.8, groups=groups, num_microbatches=k, **OPTIONS), optax.sgd(0.1)
  )
  state, accepted = scanned(tx, stack)
  table = jax.jit(gaf_optax.sources)(state)
  assert sorted(table) == ["accept_rate", "agreement", "num_steps"]
  chex.assert_shape(list(table.values()), (k,))
  assert {x.dtype.name for x in table.values()} == {"float32"}

  by_step = [oracle.vectors([x[t] for x in stack.values()]) for t in range(NUM_STEPS)]
  finite = [np.isfinite(v).all(axis=1, keepdims=True) for v in by_step]
  parts = [slice(None)] if groups is None else [slice(0, 6), slice(6, None)]
  found = [
    oracle.majority(
      *oracle.remember(
        [np.where(ok, v[:, part], np.nan) for ok, v in zip(finite, by_step)], DECAY
      )
    )
    for part in parts
  ]
  agreement, num_steps = np.mean(found, axis=0)
  never = k if k == 2 else 1  # Of two sources, the other had nothing to compare with.
  assert np.isnan(agreement).sum() == never
  np.testing.assert_allclose(table["agreement"], agreement, atol=2e-5)
  np.testing.assert_allclose(table["num_steps"], num_steps, rtol=1e-5)
  np.testing.assert_allclose(table["accept_rate"], np.mean(accepted, 0), rtol=1e-5)
  assert k == 2 or 0 < table["accept_rate"][0] < 1


@pytest.mark.parametrize("k", [7, 8])
def test_the_agreement_is_what_min_neighbors_decides_on(k):
  """In a step with finite sources, where more than half must agree."""
  rows = jnp.asarray(np.random.default_rng(k).standard_normal((k, 3)), jnp.float32)
  tau = gaf_optax.adaptive_tau()
  options = dict(OPTIONS, rule=rules.min_neighbors((k // 2 + 1) / k))
  tx = gaf_optax.gaf(tau, num_microbatches=k, **options)
  _, state = tx.update(rows, tx.init(jnp.zeros(3)))
  table = jax.jit(gaf_optax.sources)(state)
  np.testing.assert_allclose(table["agreement"], 1 - state.distances, atol=1e-6)
  # adaptive_tau uses the same values.
  want = oracle.adaptive_threshold(1 - np.asarray(table["agreement"], np.float64))
  np.testing.assert_allclose(state.threshold, want, rtol=1e-6)


def test_before_the_first_step():
  tx = gaf_optax.gaf(num_microbatches=3, **OPTIONS)
  table = jax.jit(gaf_optax.sources)(tx.init(jnp.zeros(2)))
  assert np.isnan(table["agreement"]).all()
  assert not table["accept_rate"].any() and not table["num_steps"].any()


def test_it_goes_on_after_a_checkpoint():
  """NumPy arrays restore the same table, and the same end of the run."""
  k = 5
  stack = trees(k)
  tx = gaf_optax.apply_if_agreed(optax.sgd(0.1), 0.8, num_microbatches=k, **OPTIONS)
  end, _ = scanned(tx, stack)
  middle, _ = scanned(tx, jax.tree.map(lambda x: x[:7], stack))
  saved = jax.tree.map(np.asarray, middle)
  chex.assert_trees_all_equal(gaf_optax.sources(saved), gaf_optax.sources(middle))
  restored = jax.tree.map(jnp.asarray, saved)
  resumed, _ = scanned(tx, jax.tree.map(lambda x: x[7:], stack), restored)
  chex.assert_trees_all_equal(resumed, end)
  # Skipped steps count, and there is at least one.
  assert 0 < int(end.gaf_state.skipped_steps) < NUM_STEPS
  assert int(end.gaf_state.num_updates) == NUM_STEPS


@pytest.mark.parametrize("name", known_steps.FORMS)
def test_the_share_of_steps_in_which_each_was_accepted(name):
  """In every form, with and without a memory; exactly 1 if always accepted."""
  kinds = ("all", "half", "all", "none", "bad", "lost", "half")
  sequence = known_steps.sequence(kinds)
  form = known_steps.FORMS[name]
  tx = form.make(optax.identity(), num_microbatches=known_steps.K)
  state = tx.init(known_steps.params())
  feed = jax.jit(lambda grads, state: form.feed(tx, grads, state))
  accepted = np.zeros((len(kinds), known_steps.K))
  for t, step in enumerate(sequence):
    before = known_steps.describe(state)
    _, state = feed(step.micro_grads, state)
    # `feed` rolls a stack by one more place in each update.
    places = 0 if name == "multi_steps" else t
    assert known_steps.describe(state) == before
    accepted[t, [(i + places) % known_steps.K for i in step.accepted]] = 1
    rates = known_steps.gaf_state(state).accept_rates
    np.testing.assert_allclose(rates, accepted[: t + 1].mean(0), rtol=1e-6)
  assert len(set(rates.tolist())) > 1
  always = known_steps.sequence(["all"] * 3)
  state = tx.init(known_steps.params())
  for step in always:
    _, state = feed(step.micro_grads, state)
  np.testing.assert_array_equal(known_steps.gaf_state(state).accept_rates, 1)


def test_without_a_memory_it_says_what_to_give():
  for tx in (
    gaf_optax.gaf(num_microbatches=4),
    gaf_optax.gaf(anchor_decay=0.9),
    gaf_optax.multi_steps(optax.sgd(0.1), 4, num_microbatches=4),
  ):
    with pytest.raises(ValueError, match=r"memory_decay=0.98, num_microbatches=k"):
      gaf_optax.sources(tx.init(jnp.zeros(2)))


def test_other_errors():
  with pytest.raises(ValueError, match="there is no GafState"):
    gaf_optax.sources(optax.sgd(0.1).init(jnp.zeros(2)))
  state = gaf_optax.gaf(num_microbatches=4, **OPTIONS).init(jnp.zeros(2))
  with pytest.raises(ValueError, match="there are 2 GafStates"):
    gaf_optax.sources((state, state))
  of_all = jax.tree.map(lambda x: jnp.stack([x] * 8), state)
  with pytest.raises(ValueError, match=r"state of one device.*\(8, 1, 4, 4\)"):
    gaf_optax.sources(of_all)
