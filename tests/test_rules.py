"""Rules alone, on Gram matrices."""

import jax
import jax.numpy as jnp
import numpy as np
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
