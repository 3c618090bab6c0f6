"""Training loops: a state of constant structure, and a varying tau."""

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

# With these options, the state uses all fields that the three forms share.
OPTIONS = {
  "tau": gaf_optax.target_accept_rate(0.5),
  "groups": "leaf",
  "anchor_decay": 0.5,
  "num_microbatches": known_steps.K,
}


@pytest.fixture(params=known_steps.FORMS)
def form(request):
  return known_steps.FORMS[request.param]


# For tests of the filter, which two of the forms share.
@pytest.fixture(params=["chain", "multi_steps"])
def filter_form(request):
  return known_steps.FORMS[request.param]


def buffers(tree):
  return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)]


def test_a_loop_of_compiled_steps_is_a_scan(form):
  """The loop donates the state and compiles once; the scan contains a cond.

  All three require a state with constant structure, dtypes and weak types.
  """
  tx = form.make(optax.adam(0.1), **OPTIONS)
  sequence = known_steps.sequence()
  wanted = [True, True, False, True, True, True, False, True]
  traces = []

  def step(state, params, micro_grads):
    traces.append(None)
    updates, state = form.feed(tx, micro_grads, state, params)
    return state, optax.apply_updates(params, updates)

  params = known_steps.params()
  state = tx.init(params)
  first = known_steps.describe(state)
  compiled = jax.jit(step, donate_argnums=0)
  for one, want in zip(sequence, wanted):
    if want:
      # A buffer that occurs twice cannot be donated.
      assert len(set(buffers(state))) == len(buffers(state))
      donated = known_steps.gaf_state(state).num_updates
      state, params = compiled(state, params, one.micro_grads)
      assert donated.is_deleted()
      assert known_steps.describe(state) == first
  assert len(traces) == compiled._cache_size() == 1

  def visit(carry, x):
    want, micro_grads = x
    return jax.lax.cond(want, lambda: step(*carry, micro_grads), lambda: carry), None

  stacked = jax.tree.map(lambda *x: jnp.stack(x), *(s.micro_grads for s in sequence))
  start = tx.init(known_steps.params()), known_steps.params()
  scanned, _ = jax.jit(lambda c, xs: jax.lax.scan(visit, c, xs))(
    start, (jnp.array(wanted), stacked)
  )
  assert known_steps.describe(scanned[0]) == first
  chex.assert_trees_all_equal_shapes_and_dtypes(scanned, (state, params))
  chex.assert_trees_all_close(scanned, (state, params), rtol=1e-5, atol=1e-6)


def test_the_state_of_a_step_outside_jit_keeps_its_form(form):
  tx = form.make(optax.sgd(0.1, momentum=0.9), **OPTIONS)
  params, one = known_steps.params(), known_steps.make("all", 1)
  before = tx.init(params)
  _, state = form.feed(tx, one.micro_grads, before, params)
  assert known_steps.describe(state) == known_steps.describe(before)
  assert len(set(buffers(state))) == len(buffers(state))


def test_init_can_be_traced_and_its_shapes_asked_for(form):
  tx = form.make(optax.adam(0.1), **OPTIONS)
  params = known_steps.params()
  state = tx.init(params)
  abstract = jax.eval_shape(tx.init, params)
  assert known_steps.describe(abstract) == known_steps.describe(state)
  # The shapes of the parameters are enough.
  shapes = jax.eval_shape(lambda: params)
  chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, shapes), state)
  chex.assert_trees_all_equal(jax.jit(tx.init)(params), state)


@pytest.mark.parametrize("decay", [None, 0.5])
def test_params_are_not_needed(form, decay):
  tx = form.make(optax.sgd(1.0), anchor_decay=decay)
  one = known_steps.make("all", 1)
  updates, _ = form.feed(tx, one.micro_grads, tx.init(known_steps.params()))
  chex.assert_trees_all_close(updates, jax.tree.map(lambda x: -x, one.mean), rtol=1e-6)


def test_under_vmap_each_replica_decides_for_itself(filter_form):
  tx = filter_form.make(optax.sgd(1.0))
  ones = [known_steps.make(kind, i) for i, kind in enumerate(("all", "none", "half"))]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *(one.micro_grads for one in ones))
  state = tx.init(known_steps.params())
  feed = jax.jit(jax.vmap(lambda g: filter_form.feed(tx, g, state)))
  updates, states = feed(stacked)
  assert known_steps.gaf_state(states).ready.tolist() == [True, False, True]
  for i, one in enumerate(ones):
    chex.assert_trees_all_close(
      jax.tree.map(lambda x: x[i], updates),
      jax.tree.map(lambda x: -x, one.mean),
      rtol=1e-6,
    )


def test_a_schedule_is_called_with_the_number_of_updates_seen(filter_form):
  cosine = 0.25
  rows = np.zeros((known_steps.K, 2))
  rows[:, 0], rows[1:, 0], rows[1:, 1] = 1, cosine, np.sqrt(1 - cosine**2)
  micro_grads = jnp.asarray(rows)  # The first is at distance 0.75 from the others.
  # A different value for each count, exact in float32.
  tx = filter_form.make(optax.sgd(1.0), tau=lambda count: 0.5 + count / 8)
  state = tx.init(jnp.zeros(2))
  feed = jax.jit(lambda g, s: filter_form.feed(tx, g, s))
  # init reports the threshold of the first step.
  used, agreed = [float(gaf_optax.metrics(state)["threshold"])], []
  for _ in range(4):
    _, state = feed(micro_grads, state)
    found = gaf_optax.metrics(state)
    used.append(float(found["threshold"]))
    agreed.append(int(found["num_accepted"]))
  assert used == [0.5, 0.5, 0.625, 0.75, 0.875]
  assert agreed[:2] == [0, 0] and agreed[3] == known_steps.K


def test_a_steered_tau_follows_its_equation_in_its_bounds(filter_form):
  target = gaf_optax.target_accept_rate(
    0.5, initial=0.75, step_size=0.3, minimum=0.5, maximum=1.0
  )
  tx = filter_form.make(optax.sgd(1.0), tau=target)
  state = tx.init(known_steps.params())
  feed = jax.jit(lambda g, s: filter_form.feed(tx, g, s))
  # Accepted share of the finite micro-gradients, None without any.
  shares = {"all": 1.0, "none": 0.0, "half": 0.5, "bad": 2 / 3, "lost": None}
  kinds = ["lost", "half", "all", "all", "bad", "lost"] + ["none"] * 4 + ["bad"]
  tau, bounds_met = 0.75, set()
  for seed, kind in enumerate(kinds):
    _, state = feed(known_steps.make(kind, seed).micro_grads, state)
    assert float(gaf_optax.metrics(state)["threshold"]) == pytest.approx(tau)
    if shares[kind] is not None:
      wanted = tau + 0.3 * (0.5 - shares[kind])
      tau = min(max(wanted, 0.5), 1.0)
      bounds_met |= {tau} if tau != wanted else set()
    assert float(known_steps.gaf_state(state).steered) == pytest.approx(tau)
  assert bounds_met == {0.5, 1.0}


def test_a_steered_tau_comes_to_the_rate_that_was_asked_for():
  rng = np.random.default_rng(0)
  tx = gaf_optax.gaf(gaf_optax.target_accept_rate(0.6, initial=0.3, step_size=0.05))

  @jax.jit
  def run(state, micro_grads):
    def one(state, rows):
      _, state = tx.update(rows, state)
      found = gaf_optax.metrics(state)
      return state, found["num_accepted"] / found["num_microbatches"]

    return jax.lax.scan(one, state, micro_grads)[1]

  micro_grads = rng.normal(size=(600, 8, 6)) + 0.3
  shares = run(tx.init(jnp.zeros(6)), jnp.asarray(micro_grads, jnp.float32))
  assert np.mean(shares[:10]) < 0.4
  assert np.mean(shares[200:]) == pytest.approx(0.6, abs=0.05)
