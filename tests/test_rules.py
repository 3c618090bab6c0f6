"""Rules, on Gram matrices."""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gaf_optax
import known_steps
import oracle
from gaf_optax import _decide, _tau, rules

# Rules with a threshold, and their options for the oracle.
OF_TAU = {
  "sequential": {},
  "running_average": {},
  "leave_one_out": {},
  "most_neighbors": {},
  "min_neighbors": {"fraction": 0.4},
  "majority": {},
  "nearest_neighbors": {"number": 2},
}
SOFT = ("sequential", "leave_one_out", "most_neighbors", "nearest_neighbors")

# Compiled once per rule and number of micro-gradients.
run = jax.jit(lambda gram, valid, tau, rule: rule(gram, valid, tau), static_argnums=3)


@functools.partial(jax.jit, static_argnames="rule")
def decide(rule, gram, valid, inputs):
  """Decides as `gaf` does, with inputs that rules do not receive."""
  return _decide.decide(rule, gram, valid, inputs)


def gram_of(vectors):
  v = np.asarray(vectors, np.float64)
  return jnp.asarray(v @ v.T, jnp.float32)


def of_vectors(rule, vectors, tau, valid=None):
  valid = np.ones(len(vectors), bool) if valid is None else valid
  matrix = gram_of(np.where(valid[:, None], vectors, 0))
  return run(matrix, jnp.asarray(valid), tau, rule)


def makes(name):
  """All variants of a rule, with the oracle's options."""
  for distance in ("cosine", "euclidean"):
    for softness in (0.0, 0.1) if name in SOFT else (0.0,):
      options = {"softness": softness} if name in SOFT else {}
      rule = getattr(rules, name)(**OF_TAU[name], distance=distance, **options)
      yield rule, {"kind": distance, "softness": softness, **OF_TAU[name]}


def cases():
  """Vectors `[6, 8]` of equal or different scales, and which of them are valid."""
  for seed in range(8):
    v = known_steps.draw(seed, 6, 8)
    v *= np.random.default_rng(seed).uniform(0.3, 3, (6, 1))
    v[3] *= -1
    if seed % 4 == 1:
      v[[0, 4]] = 0
    if seed % 4 == 3:
      v[seed // 2] = v[5]
    scales = [1, 1e-15, 1e14, 10.0 ** np.array([[-14], [0], [14], [-7], [7], [0]])]
    yield scales[seed % 4] * v, (np.arange(6) != seed // 2) | (seed < 4)


def as_oracle(decision, expected, error=1e-5):
  """Compares weights (of any sum), accepted and distances; False for a tie."""
  weights, accepted, distances, margin, condition = expected
  error /= condition
  if margin < error or error > 0.01:
    return False
  agreed = accepted.sum() > 1
  np.testing.assert_array_equal(decision.accepted, accepted & agreed)
  np.testing.assert_allclose(decision.distances, distances, rtol=0, atol=error)
  weights = np.where(agreed, weights, 0)
  np.testing.assert_allclose(decision.weights, weights, rtol=0, atol=10 * error)
  return True


@pytest.mark.parametrize("name", OF_TAU)
def test_a_rule_of_a_plain_gram_matrix_is_the_oracles(name):
  # The next test has all variants.
  for rule, options in list(makes(name))[:1]:
    decided = num_accepted = 0
    for v, valid in cases():
      for tau in (0.2, 0.6, 0.97, 1.0, 2.0):
        expected = oracle.decide(name, v, valid, tau, **options)
        decided += as_oracle(of_vectors(rule, v, tau, valid), expected)
        num_accepted += expected[1].sum()
    # With tau 1, the distances of exactly 1 from zeros are ties.
    assert decided >= 25 and 40 < num_accepted < 180


@pytest.mark.parametrize("name", OF_TAU)
def test_microbatch_weights_norm_ratio_and_start_are_the_oracles(name):
  for rule, options in makes(name):
    decided, differ = 0, set()
    for seed, (v, valid) in enumerate(cases()):
      rng = np.random.default_rng(seed)
      counts = rng.integers(1, 9, 6) * 1.0
      counts[rng.integers(0, 6, seed % 3)] = 0
      for tau, ratio, start in [(0.6, 1.0, 0), (1.2, 2.0, 4), (0.9, np.inf, 2)]:
        own = dict(microbatch_weights=counts, max_norm_ratio=ratio)
        if name in ("sequential", "running_average"):
          own["start"] = start
        expected = oracle.decide(name, v, valid, tau, **options, **own)
        weights, accepted, *_ = expected
        agreed, share = accepted.sum() > 1, weights * counts
        share = share / share.sum() if agreed else 0 * share
        inputs = _decide.Inputs(
          _tau.Tau(value=jnp.float32(tau)), jnp.asarray(counts), start, ratio
        )
        matrix = gram_of(np.where(valid[:, None], v, 0))[None]
        got = decide(rule, matrix, jnp.asarray(valid), inputs)
        decision = jax.tree.map(lambda x: x[0], got.decision)
        if not as_oracle(decision, (share, *expected[1:]), 2e-5):
          continue
        decided += 1
        scales = oracle.norm_scales(v, valid & (counts > 0), ratio)
        np.testing.assert_allclose(got.factors[0], share * scales, atol=1e-3)
        np.testing.assert_array_equal(got.valid, valid & (counts > 0))
        plain = oracle.decide(name, v, valid, tau, **options)
        differ.add(np.array_equal(plain[1], accepted))
    assert decided >= 12 and differ == {True, False}


def test_running_average_weights():
  decision = of_vectors(rules.running_average(), np.ones((4, 2)), 0.97)
  np.testing.assert_array_equal(decision.weights, [1 / 8, 1 / 8, 1 / 4, 1 / 2])


def test_sequential_compares_with_the_sum_so_far():
  # The third is within tau of the sum of the first two, but of neither of them.
  v = [[1, 1, 0], [1, 0, 1], [1, 0.2, 0.2]]
  decision = of_vectors(rules.sequential(), v, 0.5)
  s = np.add(v[0], v[1])
  np.testing.assert_allclose(
    decision.distances, [np.nan, 0.5, oracle.distance(s, np.array(v[2]))], atol=1e-6
  )


def test_independent_of_order():
  order = np.random.default_rng(5).permutation(6)
  for name in ("leave_one_out", "min_neighbors", "majority", "nearest_neighbors"):
    for (rule, _), seed in zip(makes(name), range(2)):
      v = known_steps.draw(seed, 6, 8)
      v[3] *= -1
      plain, permuted = of_vectors(rule, v, 0.5), of_vectors(rule, v[order], 0.5)
      assert 0 < plain.accepted.sum() < 6
      np.testing.assert_array_equal(plain.accepted[order], permuted.accepted)


def test_most_neighbors_survives_a_bad_first_one():
  good = np.random.default_rng(0).standard_normal((4, 20)) * 0.3 + 1
  v = np.concatenate([-good[:2], good])
  decision = of_vectors(rules.most_neighbors(), v, 0.9)
  np.testing.assert_array_equal(decision.accepted, [False] * 2 + [True] * 4)
  sequential = of_vectors(rules.sequential(), v, 0.9)
  np.testing.assert_array_equal(sequential.accepted, [True] * 2 + [False] * 4)


def test_min_neighbors_counts_itself():
  # Two clusters, of three and two: 3 of 5 is a share of 0.6.
  v = np.array([[1, 0], [1, 0.1], [1, -0.1], [0, 1], [0.1, 1]])
  for rule, accepted in [
    (rules.min_neighbors(0.0), 5),
    (rules.min_neighbors(0.4), 5),
    (rules.min_neighbors(0.5), 3),
    (rules.min_neighbors(0.6), 3),
    (rules.majority(), 3),
    (rules.min_neighbors(0.61), 0),
    (rules.min_neighbors(1.0), 0),
  ]:
    decision = of_vectors(rule, v, 0.5)
    np.testing.assert_array_equal(decision.accepted, np.arange(5) < accepted)


def test_majority_is_more_than_half():
  """Half of an even number is not enough."""
  v = np.repeat(np.eye(2), 2, axis=0)
  assert of_vectors(rules.min_neighbors(0.5), v, 0.5).accepted.all()
  assert not of_vectors(rules.majority(), v, 0.5).accepted.any()
  v = np.concatenate([v, [[1, 0]]])
  decision = of_vectors(rules.majority(), v, 0.5)
  np.testing.assert_array_equal(decision.accepted, [True, True, False, False, True])


def test_min_neighbors_of_one_alone_is_no_agreement():
  # A star: the center is near all others, and they are near the center only.
  v = np.concatenate([np.ones((1, 4)), 2 * np.eye(4)])
  assert of_vectors(rules.min_neighbors(0.4), v, 0.6).accepted.all()
  assert not of_vectors(rules.min_neighbors(0.6), v, 0.6).accepted.any()


def test_euclidean_rejects_on_length():
  v = np.array([[1.0, 0.0], [100.0, 0.0]])
  assert of_vectors(rules.sequential(), v, 0.5).accepted.all()
  decision = of_vectors(rules.sequential("euclidean"), v, 0.5)
  assert not decision.accepted.any()
  np.testing.assert_allclose(decision.distances[1], 99**2 / (1 + 100**2), rtol=1e-5)


def test_distances_are_equal_for_equal_norms():
  v = known_steps.draw(2, 2, 9)
  v /= np.linalg.norm(v, axis=1, keepdims=True)
  for distance in ("cosine", "euclidean"):
    decision = of_vectors(rules.sequential(distance), v, 2.0)
    np.testing.assert_allclose(decision.distances[1], 1 - v[0] @ v[1], atol=1e-6)


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
  """A user's rule, with the contract's signature."""

  def test_sees_a_scaled_gram_matrix_and_validity(self):
    seen = {}

    def rule(gram, valid, tau):
      jax.debug.callback(
        lambda g, v, t: seen.update(gram=g, valid=v, tau=t), gram, valid, tau
      )
      k = valid.shape[0]
      return rules.Decision(jnp.ones(k), jnp.arange(k) > 0, jnp.zeros(k))

    v = np.array([[3e14, 0, 0], [np.nan, 1, 1], [0, 1e14, 0], [2e14, 1e14, 0]])
    tx = gaf_optax.gaf(0.4, rule=rule)
    gradient, state = tx.update(jnp.asarray(v, jnp.float32), tx.init(None))
    jax.effects_barrier()
    clean = np.where(np.isnan(v).any(1, keepdims=True), 0, v) / 3e14
    np.testing.assert_allclose(seen["gram"], clean @ clean.T, rtol=1e-5)
    np.testing.assert_array_equal(seen["valid"], [True, False, True, True])
    assert seen["tau"] == pytest.approx(0.4)
    # The rule's weight and acceptance of an invalid one have no effect.
    np.testing.assert_allclose(gradient, np.mean(v[[0, 2, 3]], axis=0), rtol=1e-6)
    assert float(gaf_optax.metrics(state)["num_accepted"]) == 2

  def test_one_of_its_choice_is_a_step_and_none_is_not(self):
    stack = jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])

    def choose(number):

      def rule(gram, valid, tau):
        one = jnp.arange(3) == number
        return one.astype(jnp.float32), one, jnp.zeros(3)  # A plain tuple is enough.

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
  """Vectors, two thirds of them with a common part."""
  rng = np.random.default_rng(seed)
  common = (np.arange(k)[:, None] % 3 != 0) * rng.standard_normal(n)
  return rng.standard_normal((k, n)) * rng.uniform(0.5, 2, (k, 1)) + common


def test_nearest_neighbors_are_all_valid_others_where_there_are_fewer():
  v, valid = draw(1), np.arange(9) != 4
  want = oracle.nearest_neighbors(v, valid, 20)
  decision = of_vectors(rules.nearest_neighbors(20), v, 1.0, valid)
  np.testing.assert_allclose(decision.distances, want, atol=1e-5)


def test_nearest_neighbors_of_one_valid_have_nothing_to_compare():
  valid = np.array([True, False, False])
  decision = of_vectors(rules.nearest_neighbors(2), np.eye(3), 2.0, valid)
  assert not decision.accepted.any() and np.isnan(decision.distances).all()


SCALES = (1e-15, 1.0, 1e14)


def test_multi_krum_keeps_the_smallest_scores():
  for num_wrong, num_kept in [(0, None), (2, None), (3, 1), (6, 9)]:
    v = draw(num_wrong)
    scores = oracle.krum_scores(v, num_wrong)
    kept = np.argsort(scores)[: 9 - num_wrong if num_kept is None else num_kept]
    want = scores / (9 - num_wrong - 2) / 2 / (v**2).sum(1).max()
    for scale in SCALES:
      decision = of_vectors(rules.multi_krum(num_wrong, num_kept), scale * v, 0.0)
      np.testing.assert_array_equal(np.flatnonzero(decision.accepted), np.sort(kept))
      np.testing.assert_array_equal(decision.weights, decision.accepted)
      np.testing.assert_allclose(decision.distances, want, rtol=1e-4)


def test_multi_krum_leaves_out_what_is_not_finite_and_its_number():
  v = draw(5)
  valid = np.arange(9) != 1
  decision = of_vectors(rules.multi_krum(2), v, 0.97, valid)
  order = np.argsort(oracle.krum_scores(v[valid], 2))[:7]
  want = np.flatnonzero(valid)[np.sort(order)]
  np.testing.assert_array_equal(np.flatnonzero(decision.accepted), want)


def test_multi_krum_ties_go_to_the_first():
  decision = of_vectors(rules.multi_krum(1, 2), np.ones((5, 5)), 0.97)
  assert decision.accepted.tolist() == [True, True, False, False, False]


def test_geometric_median_is_weiszfelds_on_the_vectors():
  v = draw(7)
  v[0] *= 1e3
  valid = np.arange(9) != 5
  want = oracle.geometric_median(v[valid], 12)
  mean = v[valid].mean(axis=0)
  assert np.linalg.norm(mean - want) > 10 * np.linalg.norm(want)
  for scale in SCALES:
    scaled = scale / np.linalg.norm(v[0]) * v if scale > 1 else scale * v
    decision = of_vectors(rules.geometric_median(12), scaled, 0.0, valid)
    np.testing.assert_array_equal(decision.accepted, valid)
    got = np.asarray(decision.weights, np.float64) @ v
    assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)


def test_errors_of_the_new_rules():
  for make, message in [
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
  ]:
    with pytest.raises(ValueError, match=message):
      make()


def test_a_softness_of_any_kind_of_number():
  x, weights = jnp.asarray(draw(5, k=4), jnp.float32), jnp.array([1.0, 9, 1, 1])
  distances = {}
  for softness in (0.1, np.float64(0.1), np.array(0.1), jnp.float32(0.1)):
    rule = rules.leave_one_out(softness=softness)
    tx = gaf_optax.gaf(0.9, rule=rule, num_microbatches=4)
    _, state = tx.update(x, tx.init(x[0]), microbatch_weights=weights)
    distances[repr(softness)] = state.distances
  for found in distances.values():
    np.testing.assert_allclose(found, distances["0.1"], rtol=1e-6)
  with pytest.raises(ValueError, match="softness must be known when the rule"):
    jax.jit(
      lambda softness: rules.sequential(softness=softness)(x @ x.T, x[:, 0] > 9, 1)
    )(0.1)


def test_options_in_double_precision(x64):
  x = jnp.asarray(draw(5, k=4), jnp.float32)

  def results(number):
    for options in (
      {"rule": rules.sequential(softness=number)},
      {"anchor_decay": number},
      {"memory_decay": number, "num_microbatches": 4},
    ):
      tx = gaf_optax.gaf(0.9, **options)
      state = tx.init(x[0])
      for _ in range(2):
        updates, state = tx.update(x, state)
      assert state.num_updates == 2
      yield updates, state

  found, expected = list(results(np.float64(0.5))), list(results(0.5))
  assert len(found) == 3
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_tau_quantile_accepts_the_fraction():
  v, valid = draw(8, k=10), np.arange(10) != 2
  matrix = gram_of(np.where(valid[:, None], v, 0))[None]
  for rule, fraction in [
    (rules.leave_one_out(), 0.05),
    (rules.leave_one_out(), 0.3),
    (rules.min_neighbors(0.4), 0.6),
    (rules.nearest_neighbors(3), 0.3),
    (rules.nearest_neighbors(3), 1.0),
    (lambda gram, valid, tau: rules.leave_one_out()(gram, valid, tau), 0.6),
  ]:
    tau = gaf_optax.tau_quantile(fraction)
    inputs = _decide.Inputs(tau.at(None, 0))
    got = decide(rule, matrix, jnp.asarray(valid), inputs)
    distances = np.asarray(got.decision.distances[0])
    last = np.sort(distances[valid])[int(np.ceil(fraction * 9 - 1e-9)) - 1]
    want = valid & (distances <= last)
    assert want.sum() < 9 or fraction == 1
    np.testing.assert_array_equal(got.decision.accepted[0], want & (want.sum() > 1))
    assert float(got.tau.value) == pytest.approx(last, abs=1e-6)


def test_tau_quantile_accepts_ties():
  rows = jnp.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
  tx = gaf_optax.gaf(gaf_optax.tau_quantile(0.5), rule=rules.nearest_neighbors(2))
  _, state = tx.update(rows, tx.init(jnp.zeros(2)))
  assert int(state.num_accepted) == 3


def test_a_tau_of_each_group():
  """Each group has its own threshold; the state has their mean."""
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


def test_adaptive_tau_cuts_where_there_are_two_sorts_only():
  rng = np.random.default_rng(0)
  common = rng.standard_normal(200)
  noise = rng.standard_normal((8, 200))
  of_sort = {
    "all agree": noise + common,
    "three wrong": noise + common * (np.arange(8)[:, None] < 5),
    "nothing agrees": np.linalg.qr(noise.T)[0].T,
  }
  for rule in (rules.min_neighbors(0.5), rules.nearest_neighbors(3)):
    accepted = {}
    for name, rows in of_sort.items():
      tx = gaf_optax.gaf(gaf_optax.adaptive_tau(), rule=rule, num_microbatches=8)
      _, state = tx.update(jnp.asarray(rows, jnp.float32), tx.init(jnp.zeros(200)))
      accepted[name] = state.accepted.tolist()
    assert accepted["all agree"] == accepted["nothing agrees"] == [True] * 8
    assert accepted["three wrong"] == [True] * 5 + [False] * 3


@jax.jit
def adaptive(distances, valid):
  tau = gaf_optax.adaptive_tau().at(None, 0)
  return tau.from_distances(lambda tau: distances, valid).value


@hypothesis.given(
  st.lists(st.floats(0, 2, width=32) | st.just(math.nan), min_size=2, max_size=40)
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_adaptive_tau_is_that_of_the_oracle(values):
  distances = np.full(40, np.nan, np.float32)  # So that all lengths share one program.
  distances[: len(values)] = values
  valid = np.isfinite(distances)
  tau = adaptive(jnp.asarray(distances), jnp.asarray(valid))
  if not valid.any():
    assert tau == 2
    return
  want = oracle.adaptive_threshold(distances[valid].astype(np.float64))
  # If the mean similarity is 0, rounding decides between 1 and 2.
  either = sorted([float(tau), want]) == pytest.approx([1, 2], abs=1e-5)
  assert float(tau) == pytest.approx(want, abs=1e-5) or either


def test_a_tau_of_the_distances_needs_distances_without_tau():
  for tau in (gaf_optax.tau_quantile(0.5), gaf_optax.adaptive_tau()):
    for rule in (rules.sequential(), rules.running_average(), rules.most_neighbors()):
      with pytest.raises(ValueError, match="depend on tau themselves"):
        gaf_optax.gaf(tau, rule=rule)


def test_streams_have_no_tau_of_the_distances():
  with pytest.raises(ValueError, match="Stack them and use gaf"):
    gaf_optax.multi_steps(
      optax.sgd(0.1), 2, gaf_optax.tau_quantile(0.5), anchor_decay=0
    )
  for wrong in (0.0, 1.1, float("nan")):
    with pytest.raises(ValueError, match="fraction must be"):
      gaf_optax.tau_quantile(wrong)
