"""Groups, the anchor, kinds of thresholds, and the counters of the state."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gaf_optax
import known_steps
import oracle
import reference_forms

every_form = pytest.mark.parametrize(
  "form", reference_forms.ALL.values(), ids=reference_forms.ALL
)


def case(seed=0, k=4):
  shapes = {"a": (5,), "b": (2, 3), "c": ()}
  return {
    name: jnp.asarray(known_steps.draw([seed, i], k, *shape), jnp.float32)
    for i, (name, shape) in enumerate(shapes.items())
  }


def alone(tree, names, tau):
  """The oracle's result for some of the leaves."""
  return oracle.gaf([tree[n] for n in names], tau)


@every_form
def test_leaf_groups_are_decisions_of_their_own(form):
  agreed = []
  for seed in range(6):
    tree = case(seed)
    filtered = form(tree, 0.6, groups="leaf")
    parts = {n: alone(tree, [n], 0.6) for n in tree}
    for n, part in parts.items():
      np.testing.assert_allclose(filtered.gradient[n], part.gradient[0], atol=1e-6)
      agreed.append(part.agreed)
    assert filtered.agreed == any(p.agreed for p in parts.values())
    counts = [p.accepted.sum() for p in parts.values()]
    assert filtered.accepted == pytest.approx(np.mean(counts))
    np.testing.assert_allclose(
      filtered.distances,
      # The first has nothing to compare with.
      [np.nan, *np.mean([p.distances[1:] for p in parts.values()], axis=0)],
      atol=1e-5,
    )
  assert set(agreed) == {True, False}


@every_form
def test_labels_join_leaves_and_none_excludes(form):
  tree = case(1)
  labels = {"a": "x", "b": None, "c": "x"}
  seen = {}

  def groups(path, leaf):
    seen[path[0].key] = (leaf.shape, leaf.dtype)
    return labels[path[0].key]

  filtered = form(tree, 0.4, groups=groups)
  part = alone(tree, ["a", "c"], 0.4)
  assert filtered.agreed == part.agreed
  np.testing.assert_allclose(filtered.gradient["a"], part.gradient[0], atol=1e-6)
  np.testing.assert_allclose(filtered.gradient["c"], part.gradient[1], atol=1e-6)
  np.testing.assert_allclose(filtered.gradient["b"], tree["b"].mean(0), atol=1e-6)
  # The parameter's shape, in every form.
  assert seen["b"] == ((2, 3), jnp.float32)


@every_form
def test_nan_in_one_group_or_an_excluded_leaf_rejects_the_micro_gradient(form):
  groups = lambda path, leaf: {"w": 0, "v": 1, "free": None}[path[0].key]
  tree = {
    "w": jnp.ones((4, 2)),
    "v": jnp.ones((4, 2)).at[1, 0].set(jnp.nan),
    "free": jnp.array([1.0, 2.0, jnp.inf, 4.0]),
  }
  filtered = form(tree, 0.97, groups=groups)
  assert filtered.nonfinite == 2 and filtered.agreed and filtered.accepted == 2
  np.testing.assert_allclose(filtered.gradient["v"], [1, 1], rtol=1e-6)
  np.testing.assert_allclose(filtered.gradient["free"], 2.5, rtol=1e-6)
  tree["w"] = tree["w"].at[3, 1].set(-jnp.inf)
  filtered = form(tree, 0.97, groups=groups)
  assert filtered.nonfinite == 3 and not filtered.agreed  # One finite one is left.
  np.testing.assert_array_equal(filtered.gradient["free"], 0)


@every_form
def test_groups_of_very_different_scales_decide_each_for_itself(form):
  tree = case(2)
  scaled = {"a": tree["a"] * 1e-14, "b": tree["b"] * 1e13, "c": tree["c"]}
  plain, filtered = (form(t, 0.6, groups="leaf") for t in (tree, scaled))
  assert filtered.accepted == plain.accepted
  np.testing.assert_allclose(filtered.distances, plain.distances, atol=1e-6)


class TestAnchor:
  def run(self, stacks, tau, decay, **options):
    tx = gaf_optax.gaf(tau, anchor_decay=decay, **options)
    state, results = tx.init(jnp.zeros(stacks[0].shape[1:])), []
    for stack in stacks:
      gradient, state = tx.update(stack, state)
      results.append((np.asarray(gradient), state))
    return results

  @pytest.mark.parametrize("k", [1, 3])
  def test_against_numpy(self, k):
    rng = np.random.default_rng(7)
    stacks = [rng.standard_normal((k, 6)) + 0.5 for _ in range(12)]
    stacks[4][0] = np.nan  # In one step.
    stacks[0] = stacks[0] * np.nan  # A first step without a finite one.
    for decay in (0.0, 0.5, 0.99):
      anchor, total, counts = np.zeros(6), 0, []
      results = self.run(
        [jnp.asarray(s, jnp.float32) for s in stacks], 0.7, decay, num_microbatches=k
      )
      for s, (gradient, state) in zip(stacks, results):
        finite = np.isfinite(s).all(1)
        d = np.array([oracle.distance(anchor, g) for g in np.nan_to_num(s)])
        accepted = finite & ((d <= 0.7) | (total == 0))
        want = s[accepted].mean(0) if accepted.any() else np.zeros(6)
        np.testing.assert_allclose(gradient, want, atol=1e-6)
        np.testing.assert_array_equal(state.accepted, accepted)
        distances = np.where(finite & (total > 0), d, -1)
        np.testing.assert_allclose(state.distances, distances, atol=1e-5)
        assert bool(state.ready) == accepted.any()
        counts.append(accepted.sum())
        if finite.any():
          anchor = decay * anchor + (1 - decay) * s[finite].mean(0)
          total += 1
      assert 0 in counts[1:] and k in counts

  def test_cannot_get_stuck(self):
    """The average follows the micro-gradients even while all of them are rejected."""
    one = jnp.array([[1.0, 0.0]])
    ready = [bool(s.ready) for _, s in self.run([one] + [-one] * 6, 0.9, 0.5)]
    assert ready == [True, False] + [True] * 5

  def test_streamed_and_stacked_are_the_same(self):
    k, params = 3, jnp.zeros(5)
    options = dict(anchor_decay=0.8, num_microbatches=k)
    streamed = gaf_optax.multi_steps(optax.sgd(1.0), k, 0.6, **options)
    stacked = gaf_optax.apply_if_agreed(optax.sgd(1.0), 0.6, **options)
    a, b = streamed.init(params), stacked.init(params)
    rng = np.random.default_rng(3)
    update = jax.jit(streamed.update)
    for step in range(6):
      stack = jnp.asarray(rng.standard_normal((k, 5)) + 0.3, jnp.float32)
      if step == 2:
        stack = stack.at[1].set(jnp.inf)
      for g in stack:
        emitted, a = update(g, a)
      updates, b = stacked.update(stack, b)
      np.testing.assert_allclose(emitted, updates, atol=1e-6)
      # Streamed forms compare no pairs, so they have no noise scale.
      known = b.gaf_state._replace(noise_scale=a.gaf_state.noise_scale)
      chex.assert_trees_all_close(a.gaf_state, known, atol=1e-6)

  def test_is_kept_in_float32_for_bfloat16(self):
    tx = gaf_optax.gaf(anchor_decay=0.9)
    assert tx.init(jnp.zeros(3, jnp.bfloat16)).anchor.dtype == jnp.float32


@pytest.mark.usefixtures("standard_promotion")
class TestThreshold:
  def test_schedule_is_called_with_the_number_of_updates_seen(self):
    tx = gaf_optax.gaf(lambda n: 0.1 * n)
    state = tx.init(jnp.zeros(2))
    for n in range(4):
      _, state = tx.update(jnp.ones((2, 2)), state)
      np.testing.assert_allclose(state.threshold, 0.1 * n, rtol=1e-6)

  def test_target_accept_rate_by_hand(self):
    tau = gaf_optax.target_accept_rate(
      0.25, initial=1.0, step_size=0.1, minimum=0.9, maximum=1.05
    )
    tx = gaf_optax.gaf(tau)
    state = tx.init(jnp.zeros(2))
    np.testing.assert_allclose(gaf_optax.metrics(state)["threshold"], 1.0)
    agree = jnp.array([[1.0, 0], [1, 0]])
    oppose = jnp.array([[1.0, 0], [-1, 0]])
    nothing = jnp.full((2, 2), jnp.nan)
    one_of_two = jnp.array([[1.0, 0], [1, 0], [-1, 0], [jnp.nan, 0]])
    used = []
    for stack in (agree, agree, nothing, oppose, one_of_two, oppose, oppose, agree):
      _, state = tx.update(stack, state)
      used.append(float(gaf_optax.metrics(state)["threshold"]))
    want, t = [], 1.0
    for share in (1, 1, None, 0, 2 / 3, 0, 0, 1):
      want.append(t)
      if share is not None:
        t = np.clip(t + 0.1 * (0.25 - share), 0.9, 1.05)
    np.testing.assert_allclose(used, want, rtol=1e-6)

  def test_finds_the_threshold_that_accepts_the_wanted_share(self):
    rng = np.random.default_rng(0)
    tau = gaf_optax.target_accept_rate(0.3, initial=0.5, step_size=0.02)
    tx = gaf_optax.gaf(tau, rule=gaf_optax.rules.leave_one_out())
    stacks = jnp.asarray(rng.standard_normal((1500, 4, 20)) + 0.2, jnp.float32)
    step = lambda s, g: (tx.update(g, s)[1],) * 2
    _, states = jax.lax.scan(step, tx.init(jnp.zeros(20)), stacks)
    late = np.asarray(states.num_accepted)[500:].mean() / 4
    assert late == pytest.approx(0.3, abs=0.03)

  def test_tau_may_be_a_numpy_or_jax_scalar(self):
    for tau in (np.float64(0.5), np.array(0.5), jnp.array(0.5), 1):
      gaf_optax.gaf(tau).update(jnp.ones((2, 2)), gaf_optax.gaf(tau).init(None))


@pytest.mark.usefixtures("standard_promotion")
class TestMetrics:
  def test_counts_over_a_run(self):
    tx = optax.named_chain(("filter", gaf_optax.gaf(0.5)), ("step", optax.adam(0.1)))
    state = tx.init(jnp.zeros(2))
    agree = jnp.array([[1.0, 0], [1, 0], [0, 1]])
    oppose = jnp.array([[1.0, 0], [-1, 0], [0, 1]])
    broken = jnp.array([[1.0, jnp.inf], [1, 0], [1, 0]])
    for stack in (agree, oppose, broken, oppose):
      _, state = tx.update(stack, state)
    found = gaf_optax.metrics(state)
    assert {n: v.shape for n, v in found.items()} == dict.fromkeys(found, ())
    assert float(found["num_accepted"]) == 0
    assert int(found["num_microbatches"]) == 3
    assert float(found["accept_rate"]) == pytest.approx(4 / 12)
    assert float(found["mean_distance"]) == pytest.approx(1.5)
    assert float(found["threshold"]) == pytest.approx(0.5)
    assert not found["agreed"]
    assert int(found["skipped_steps"]) == 2
    assert int(found["nonfinite"]) == 1

  def test_accept_rate_of_a_long_run_does_not_drift(self):
    """A float32 count would stop at 2**24."""
    tx = gaf_optax.gaf(0.5)
    state = tx.init(jnp.zeros(1))
    big = jnp.float32(3e9)
    state = state._replace(num_seen_total=big, accept_rate=jnp.float32(0.5))
    for _ in range(20):
      _, state = tx.update(jnp.arange(1.0, 5.0)[:, None], state)
    assert float(state.accept_rate) == pytest.approx(0.5, abs=1e-6)
    counts = state._replace(
      nonfinite=jnp.int32(2**31 - 1), skipped_steps=jnp.int32(2**31 - 1)
    )
    _, state = tx.update(jnp.full((4, 1), jnp.nan), counts)
    assert int(state.nonfinite) == int(state.skipped_steps) == 2**31 - 1


class TestCosineDistance:
  def test_against_numpy(self):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 50))
    distance = jax.jit(gaf_optax.cosine_distance)
    for scale in (1e-15, 1e-7, 1.0, 1e14):
      tree = lambda v: {
        "x": jnp.asarray(scale * v[:20], jnp.float32),
        "y": jnp.asarray(v[20:].reshape(3, 10) * scale, jnp.float32),
      }
      got = distance(tree(a), tree(b))
      assert got.dtype == jnp.float32 and got.shape == ()
      np.testing.assert_allclose(got, oracle.distance(a, b), atol=1e-6)
      assert distance(tree(a), tree(a)) == 0
      assert distance(tree(a), tree(-a)) == 2

  def test_edges(self):
    d = gaf_optax.cosine_distance
    assert float(d(jnp.zeros(3), jnp.ones(3))) == 1
    assert float(d(jnp.zeros(3), jnp.zeros(3))) == 1
    assert np.isnan(d(jnp.array([jnp.nan, 1]), jnp.ones(2)))
    assert float(d({"a": 1.0, "i": 3}, {"a": 2.0, "i": 4})) == 0
    one, mixed = jnp.array([1.0]), jnp.array([1 + 1j])
    for a, b in ((one, mixed), (mixed, one)):  # Each keeps its imaginary part.
      assert float(d(a, b)) == pytest.approx(1 - 0.5**0.5)
    fine, coarse = jnp.array([1.0, 2**-9]), jnp.array([1.0, 0], jnp.bfloat16)
    assert float(d(coarse, fine)) == float(d(fine, coarse)) > 0
    number = {"a": one, "i": 3}, {"a": -one, "i": 0.5}
    assert float(d(*number)) == float(d(*number[::-1])) == 2
    with pytest.raises(ValueError, match="the same tree structure"):
      d({"a": jnp.ones(2)}, {"b": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\) at leaf \['a'\]"):
      d({"a": jnp.ones(2)}, {"a": jnp.ones(3)})
    with pytest.raises(ValueError, match="no floating"):
      d({"a": jnp.arange(2)}, {"a": jnp.arange(2)})
