"""Rules alone, on Gram matrices."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gaf_optax
import oracle
from gaf_optax import rules

EVERY = {
  "sequential": rules.sequential(),
  "running_average": rules.running_average(),
  "leave_one_out": rules.leave_one_out(),
  "most_neighbors": rules.most_neighbors(),
  "min_neighbors": rules.min_neighbors(0.5),
}
# Each compiled once for all cases of a size.
COMPILED = {name: jax.jit(rule) for name, rule in EVERY.items()}


def gram_of(vectors):
  v = np.asarray(vectors, np.float64)
  return jnp.asarray(v @ v.T, jnp.float32)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("seed", range(4))
def test_a_rule_of_a_plain_gram_matrix_is_the_oracles(name, scale, seed):
  rng = np.random.default_rng(seed)
  v = scale * (rng.standard_normal((6, 8)) + rng.standard_normal(8))
  valid = np.arange(6) != seed
  matrix = gram_of(np.where(valid[:, None], v, 0))
  fraction = 0.5 if name == "min_neighbors" else None
  weights, accepted, distances, margin, _ = oracle.decide(
    name, v, valid, 0.6, fraction=fraction
  )
  assert margin > 1e-3, "the case is a tie"
  decision = COMPILED[name](matrix, jnp.asarray(valid), 0.6)
  np.testing.assert_array_equal(decision.accepted, accepted & (accepted.sum() > 1))
  np.testing.assert_allclose(decision.weights, weights * (accepted.sum() > 1))
  np.testing.assert_allclose(decision.distances, distances, atol=1e-5)


def test_running_average_weights():
  ones = jnp.ones((4, 4))
  decision = EVERY["running_average"](ones, jnp.ones(4, bool), 0.97)
  np.testing.assert_array_equal(decision.weights, [1 / 8, 1 / 8, 1 / 4, 1 / 2])


def test_sequential_compares_with_the_sum_so_far():
  # The third is within reach of the sum of the first two, but of neither alone.
  v = [[1, 1, 0], [1, 0, 1], [1, 0.2, 0.2]]
  decision = EVERY["sequential"](gram_of(v), jnp.ones(3, bool), 0.5)
  s = np.add(v[0], v[1])
  np.testing.assert_allclose(
    decision.distances, [np.nan, 0.5, oracle.distance(s, np.array(v[2]))], atol=1e-6
  )


@pytest.mark.parametrize("name", ["leave_one_out", "min_neighbors"])
def test_independent_of_order(name):
  rng = np.random.default_rng(5)
  v = rng.standard_normal((5, 6)) + 0.8
  order = rng.permutation(5)
  rule, valid = EVERY[name], jnp.ones(5, bool)
  plain, permuted = rule(gram_of(v), valid, 0.5), rule(gram_of(v[order]), valid, 0.5)
  assert 0 < plain.accepted.sum() < 5
  np.testing.assert_array_equal(plain.accepted[order], permuted.accepted)


def test_most_neighbors_survives_a_bad_first_one():
  good = np.random.default_rng(0).standard_normal((5, 20)) * 0.3 + 1
  v = np.concatenate([-good[:3], good])
  decision = EVERY["most_neighbors"](gram_of(v), jnp.ones(8, bool), 0.9)
  np.testing.assert_array_equal(decision.accepted, [False] * 3 + [True] * 5)
  sequential = EVERY["sequential"](gram_of(v), jnp.ones(8, bool), 0.9)
  np.testing.assert_array_equal(sequential.accepted, [True] * 3 + [False] * 5)


@pytest.mark.parametrize(
  "fraction, accepted",
  [(0.0, 5), (0.4, 5), (0.5, 3), (0.6, 3), (0.61, 0), (1.0, 0)],
)
def test_min_neighbors_counts_itself(fraction, accepted):
  # Three that agree and two others that agree: 3 of 5 is a share of 0.6.
  v = np.array([[1, 0], [1, 0.1], [1, -0.1], [0, 1], [0.1, 1]])
  decision = rules.min_neighbors(fraction)(gram_of(v), jnp.ones(5, bool), 0.5)
  want = np.arange(5) < accepted
  np.testing.assert_array_equal(decision.accepted, want)


def test_min_neighbors_of_one_alone_is_no_agreement():
  # On a star the centre has all others near it, and they have it alone.
  v = np.concatenate([np.ones((1, 4)), 2 * np.eye(4)])
  valid = jnp.ones(5, bool)
  assert rules.min_neighbors(0.4)(gram_of(v), valid, 0.6).accepted.all()
  assert not rules.min_neighbors(0.6)(gram_of(v), valid, 0.6).accepted.any()


def test_euclidean_rejects_on_length():
  v = np.array([[1.0, 0.0], [100.0, 0.0]])
  valid = jnp.ones(2, bool)
  assert rules.sequential()(gram_of(v), valid, 0.5).accepted.all()
  decision = rules.sequential("euclidean")(gram_of(v), valid, 0.5)
  assert not decision.accepted.any()
  np.testing.assert_allclose(decision.distances[1], 99**2 / (1 + 100**2), rtol=1e-5)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_distances_are_equal_for_equal_norms(distance):
  rng = np.random.default_rng(2)
  v = rng.standard_normal((2, 9))
  v /= np.linalg.norm(v, axis=1, keepdims=True)
  decision = rules.sequential(distance)(gram_of(v), jnp.ones(2, bool), 2.0)
  np.testing.assert_allclose(decision.distances[1], 1 - v[0] @ v[1], atol=1e-6)


def test_softness_goes_to_the_hard_threshold():
  rng = np.random.default_rng(3)
  matrix, valid = gram_of(rng.standard_normal((6, 9)) + 0.7), jnp.ones(6, bool)
  for make in (rules.sequential, rules.leave_one_out, rules.most_neighbors):
    hard = make()(matrix, valid, 0.6)
    soft = make(softness=1e-6)(matrix, valid, 0.6)
    np.testing.assert_allclose(soft.weights, hard.weights, atol=1e-6)
    np.testing.assert_array_equal(soft.accepted, hard.accepted)
    assert not hard.accepted.all()


def test_bad_arguments():
  for make in (
    lambda: rules.sequential("manhattan"),
    lambda: rules.leave_one_out(softness=-0.1),
    lambda: rules.most_neighbors(softness=float("nan")),
    lambda: rules.min_neighbors(1.5),
    lambda: rules.min_neighbors("half"),
  ):
    with pytest.raises(ValueError):
      make()
  with pytest.raises(ValueError, match=r"\(2, 3\)"):
    rules.sequential()(jnp.ones((2, 3)), jnp.ones(2, bool), 0.5)


class TestOwnRule:
  """A user's rule, as the contract calls it."""

  def test_sees_a_scaled_gram_matrix_and_validity(self):
    seen = {}

    def rule(gram, valid, tau):
      jax.debug.callback(
        lambda g, v, t: seen.update(gram=g, valid=v, tau=t), gram, valid, tau
      )
      k = valid.shape[0]
      return rules.Decision(jnp.ones(k), jnp.arange(k) > 0, jnp.zeros(k))

    v = np.array([[3e20, 0, 0], [np.nan, 1, 1], [0, 1e20, 0], [2e20, 1e20, 0]])
    tx = gaf_optax.gaf(0.4, rule=rule)
    gradient, state = tx.update(jnp.asarray(v, jnp.float32), tx.init(None))
    jax.effects_barrier()
    clean = np.where(np.isnan(v).any(1, keepdims=True), 0, v) / 3e20
    np.testing.assert_allclose(seen["gram"], clean @ clean.T, rtol=1e-5)
    np.testing.assert_array_equal(seen["valid"], [True, False, True, True])
    assert seen["tau"] == pytest.approx(0.4)
    # What it weighs and accepts of an invalid one does not leak.
    np.testing.assert_allclose(gradient, np.mean(v[[0, 2, 3]], axis=0), rtol=1e-6)
    assert float(gaf_optax.metrics(state)["num_accepted"]) == 2

  def test_one_of_its_choice_is_a_step_and_none_is_not(self):
    stack = jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])

    def choose(number):

      def rule(gram, valid, tau):
        one = jnp.arange(3) == number
        return one.astype(jnp.float32), one, jnp.zeros(3)  # a plain tuple will do

      return rule

    tx = gaf_optax.gaf(rule=choose(1))
    gradient, state = tx.update(stack, tx.init(None))
    np.testing.assert_array_equal(gradient, [0, 2])
    assert state.ready
    tx = gaf_optax.gaf(rule=choose(7))
    gradient, state = tx.update(stack, tx.init(None))
    np.testing.assert_array_equal(gradient, [0, 0])
    assert not state.ready

  def test_weights_are_relative(self):
    rule = lambda gram, valid, tau: (jnp.array([1.0, 3.0]), valid, jnp.zeros(2))
    tx = gaf_optax.gaf(rule=rule)
    gradient, _ = tx.update(jnp.array([[4.0], [8.0]]), tx.init(None))
    np.testing.assert_allclose(gradient, [7.0])

  def test_that_returns_something_else(self):
    for rule, words in (
      (lambda g, v, t: v, "Decision"),
      (lambda g, v, t: (v[:1], v, v), r"weights of shape \(1,\)"),
    ):
      with pytest.raises(ValueError, match=words):
        gaf_optax.gaf(rule=rule).update(jnp.ones((2, 3)), gaf_optax.gaf().init(None))

  def test_of_a_class_without_a_hash(self):
    class Krum:
      __hash__ = None

      def __call__(self, gram, valid, tau):
        return rules.leave_one_out()(gram, valid, tau)

    tx = gaf_optax.gaf(rule=Krum())
    gradient, _ = tx.update(jnp.ones((3, 2)), tx.init(None))
    np.testing.assert_array_equal(gradient, [1, 1])


def draw(seed, k=9, n=20):
  """Vectors of which two thirds have a common part."""
  rng = np.random.default_rng(seed)
  common = (np.arange(k)[:, None] % 3 != 0) * rng.standard_normal(n)
  return rng.standard_normal((k, n)) * rng.uniform(0.5, 2, (k, 1)) + common


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("number", [1, 3, 20])
@pytest.mark.parametrize("scale", [1e-15, 1.0])
def test_nearest_neighbors_is_the_oracle(distance, number, scale):
  v, valid = draw(number), np.arange(9) != 4
  matrix = gram_of(np.where(valid[:, None], scale * v, 0))
  want = oracle.nearest_neighbors(v, valid, number, distance)
  tau = np.nanmedian(want) + 1e-3
  rule = rules.nearest_neighbors(number, distance)
  decision = rule(matrix, jnp.asarray(valid), tau)
  np.testing.assert_allclose(decision.distances, want, atol=1e-5)
  np.testing.assert_array_equal(decision.accepted, want <= tau)
  np.testing.assert_array_equal(decision.weights, want <= tau)
  soft = rules.nearest_neighbors(number, distance, softness=0.1)
  weights = soft(matrix, jnp.asarray(valid), tau).weights
  sigmoid = np.where(valid, 1 / (1 + np.exp(-(tau - want) / 0.1)), 0)
  np.testing.assert_allclose(weights, sigmoid, atol=1e-4)


def test_nearest_neighbors_of_one_valid_have_nothing_to_compare():
  decision = rules.nearest_neighbors(2)(jnp.eye(3), jnp.array([True, False, False]), 2)
  assert not decision.accepted.any() and np.isnan(decision.distances).all()


@pytest.mark.parametrize("num_wrong, num_kept", [(0, None), (2, None), (3, 1), (6, 9)])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_multi_krum_keeps_the_smallest_scores(num_wrong, num_kept, scale):
  v = draw(num_wrong)
  scores = oracle.krum_scores(v, num_wrong)
  kept = np.argsort(scores)[: 9 - num_wrong if num_kept is None else num_kept]
  rule = rules.multi_krum(num_wrong, num_kept)
  decision = rule(gram_of(scale * v), jnp.ones(9, bool), 0.0)
  np.testing.assert_array_equal(np.flatnonzero(decision.accepted), np.sort(kept))
  np.testing.assert_array_equal(decision.weights, decision.accepted)
  largest = (v**2).sum(1).max()
  want = scores / (9 - num_wrong - 2) / 2 / largest
  np.testing.assert_allclose(decision.distances, want, rtol=1e-4)


def test_multi_krum_leaves_out_what_is_not_finite_and_its_number():
  v = draw(5)
  valid = np.arange(9) != 1
  matrix = gram_of(np.where(valid[:, None], v, 0))
  decision = rules.multi_krum(2)(matrix, jnp.asarray(valid), 0.97)
  order = np.argsort(oracle.krum_scores(v[valid], 2))[:7]
  want = np.flatnonzero(valid)[np.sort(order)]
  np.testing.assert_array_equal(np.flatnonzero(decision.accepted), want)


def test_multi_krum_ties_go_to_the_first():
  decision = rules.multi_krum(1, 2)(jnp.ones((5, 5)), jnp.ones(5, bool), 0.97)
  assert decision.accepted.tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_geometric_median_is_weiszfelds_on_the_vectors(scale):
  v = draw(7)
  v[0] *= 1e3
  valid = np.arange(9) != 5
  matrix = gram_of(np.where(valid[:, None], scale * v, 0))
  decision = rules.geometric_median(12)(matrix, jnp.asarray(valid), 0.0)
  np.testing.assert_array_equal(decision.accepted, valid)
  got = np.asarray(decision.weights, np.float64) @ v
  want = oracle.geometric_median(v[valid], 12)
  assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)
  mean = v[valid].mean(axis=0)
  assert np.linalg.norm(mean - want) > 10 * np.linalg.norm(want)


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: rules.nearest_neighbors(0), "number must be at least 1"),
    (lambda: rules.multi_krum(-1), "num_wrong must be at least 0"),
    (lambda: rules.multi_krum(1, 0), "num_kept must be at least 1"),
    (lambda: rules.geometric_median(0), "num_iterations must be at least 1"),
    (
      lambda: rules.multi_krum(3)(jnp.eye(5), jnp.ones(5, bool), 1.0),
      "needs at least 6; got k = 5",
    ),
    (
      lambda: rules.multi_krum(0, 6)(jnp.eye(5), jnp.ones(5, bool), 1.0),
      "num_kept is 6, but there are 5",
    ),
  ],
)
def test_errors_of_the_new_rules(make, message):
  with pytest.raises(ValueError, match=message):
    make()


QUANTILE_RULES = {
  "leave_one_out": rules.leave_one_out(),
  "min_neighbors": rules.min_neighbors(0.4),
  "nearest_neighbors": rules.nearest_neighbors(3),
  "callable": lambda gram, valid, tau: rules.leave_one_out()(gram, valid, tau),
}


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("name", sorted(QUANTILE_RULES))
def test_tau_quantile_accepts_the_fraction(name, fraction):
  v = draw(8, k=10)
  rows = jnp.asarray(v, jnp.float32).at[2, 0].set(jnp.nan)
  tx = gaf_optax.gaf(
    gaf_optax.tau_quantile(fraction), rule=QUANTILE_RULES[name], num_microbatches=10
  )
  _, state = jax.jit(tx.update)(rows, tx.init(jnp.zeros(20)))
  number = int(np.ceil(fraction * 9 - 1e-9))
  distances = np.asarray(state.distances)
  order = np.sort(distances[np.isfinite(distances)])
  want = distances <= order[number - 1]
  np.testing.assert_array_equal(state.accepted, want & (want.sum() > 1))
  assert float(state.threshold) == pytest.approx(order[number - 1], abs=1e-6)


def test_tau_quantile_accepts_ties():
  rows = jnp.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
  tx = gaf_optax.gaf(gaf_optax.tau_quantile(0.5), rule=rules.nearest_neighbors(2))
  _, state = tx.update(rows, tx.init(jnp.zeros(2)))
  assert int(state.num_accepted) == 3


def test_a_tau_of_each_group():
  """Each group's own threshold; the state has their mean."""
  rows = {
    "a": jnp.asarray(draw(1), jnp.float32),
    "b": jnp.asarray(draw(2), jnp.float32),
  }
  params = {"a": jnp.zeros(20), "b": jnp.zeros(20)}
  options = dict(rule=rules.leave_one_out(), num_microbatches=9)
  tau = gaf_optax.tau_quantile(0.5)
  both = gaf_optax.gaf(tau, groups="leaf", **options)
  gradient, state = both.update(rows, both.init(params), params)
  thresholds = []
  for name in rows:
    one = gaf_optax.gaf(tau, **options)
    want, alone = one.update(rows[name], one.init(params[name]))
    np.testing.assert_allclose(gradient[name], want, atol=1e-6)
    thresholds.append(float(alone.threshold))
  assert float(state.threshold) == pytest.approx(np.mean(thresholds), abs=1e-6)


def test_tau_quantile_with_an_anchor_and_with_a_memory():
  v = jnp.asarray(draw(3), jnp.float32)
  tau = gaf_optax.tau_quantile(0.5)
  for options in (
    {"anchor_decay": 0.9},
    {"memory_decay": 0.9, "rule": rules.min_neighbors(0.5)},
  ):
    tx = gaf_optax.gaf(tau, num_microbatches=9, **options)
    state = tx.init(jnp.zeros(20))
    for _ in range(2):
      _, state = tx.update(v, state)
    assert int(state.num_accepted) == 5


@pytest.mark.parametrize("rule", [rules.min_neighbors(0.5), rules.nearest_neighbors(3)])
def test_adaptive_tau_cuts_where_there_are_two_sorts_only(rule):
  rng = np.random.default_rng(0)
  common = rng.standard_normal(200)
  noise = rng.standard_normal((8, 200))
  of_sort = {
    "all agree": noise + common,
    "three wrong": noise + common * (np.arange(8)[:, None] < 5),
    "nothing agrees": np.linalg.qr(noise.T)[0].T,
  }
  accepted = {}
  for name, rows in of_sort.items():
    tx = gaf_optax.gaf(gaf_optax.adaptive_tau(), rule=rule, num_microbatches=8)
    _, state = tx.update(jnp.asarray(rows, jnp.float32), tx.init(jnp.zeros(200)))
    accepted[name] = state.accepted.tolist()
  assert accepted["all agree"] == accepted["nothing agrees"] == [True] * 8
  assert accepted["three wrong"] == [True] * 5 + [False] * 3


@hypothesis.given(
  st.lists(st.floats(0, 2, width=32) | st.just(math.nan), min_size=2, max_size=40)
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_adaptive_tau_is_that_of_the_oracle(values):
  distances = np.array(values, np.float32)
  valid = np.isfinite(distances)
  tau = gaf_optax.adaptive_tau().of(jnp.asarray(distances), jnp.asarray(valid))
  if not valid.any():
    assert tau == 2
    return
  want = oracle.adaptive_threshold(distances[valid].astype(np.float64))
  # Where the mean similarity is 0, rounding decides which of the two it is.
  either = sorted([float(tau), want]) == pytest.approx([1, 2], abs=1e-5)
  assert float(tau) == pytest.approx(want, abs=1e-5) or either


@pytest.mark.parametrize("tau", [gaf_optax.tau_quantile(0.5), gaf_optax.adaptive_tau()])
@pytest.mark.parametrize("name", ["sequential", "running_average", "most_neighbors"])
def test_a_tau_of_the_distances_needs_distances_without_tau(tau, name):
  with pytest.raises(ValueError, match="depend on tau themselves"):
    gaf_optax.gaf(tau, rule=getattr(rules, name)())


def test_streams_have_no_tau_of_the_distances():
  with pytest.raises(ValueError, match="Stack them and use gaf"):
    gaf_optax.multi_steps(
      optax.sgd(0.1), 2, gaf_optax.tau_quantile(0.5), anchor_decay=0
    )
  for wrong in (0.0, 1.1, float("nan")):
    with pytest.raises(ValueError, match="fraction must be"):
      gaf_optax.tau_quantile(wrong)
