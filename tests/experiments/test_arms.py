"""Arms: their names and roles, and what controls keep."""

import jax.numpy as jnp
import numpy as np
import pytest

import arms

pytestmark = pytest.mark.experiments


@pytest.mark.parametrize(
  "k, kinds, settings, expected",
  [
    (
      2,
      None,
      dict(tau=0.97),
      [
        ("sequential_tau0.97", "GAF tau 0.97"),
        ("sequential_tau0.97_random_steps", "random steps, as many as tau 0.97"),
      ],
    ),
    (
      2,
      None,
      dict(quantile=0.6, by_example=True, rule="nearest_neighbors", ema_decay=0.9),
      [
        (
          "by_example_nearest_neighbors_quantile0.6_ema",
          "GAF by example nearest_neighbors best 60%, weight EMA",
        ),
        (
          "by_example_nearest_neighbors_quantile0.6_ema_random_choice",
          "random choice, as much as by example nearest_neighbors best 60%, weight EMA",
        ),
        (
          "by_example_nearest_neighbors_quantile0.6_ema_smallest_loss",
          "smallest loss, as many as by example nearest_neighbors best 60%, weight EMA",
        ),
      ],
    ),
    (
      8,
      [],
      dict(adaptive=True, memory_decay=0.98, rule="majority"),
      [("majority_memory_0.98_adaptive", "GAF majority memory 0.98 adaptive")],
    ),
    (2, [], dict(target=0.1), [("sequential_target0.1", "GAF steered to 10%")]),
  ],
)
def test_names_of_gaf_and_its_controls(k, kinds, settings, expected):
  made = arms.gaf_arms(k, kinds, **settings)
  assert [(arm.name, arm.label) for arm in made] == expected
  assert [arm.role == "gaf" for arm in made] == [True] + [False] * (len(made) - 1)
  assert all(arm.imitates == made[0].name for arm in made[1:])


def test_roles():
  gaf, choice, steps = arms.gaf_arms(8, tau=0.9)
  (_, loss) = arms.gaf_arms(8, ["loss"], tau=0.9)
  roles = {
    "gaf": [gaf],
    "chance": [choice, steps],
    "rival": [arms.PLAIN, *arms.RIVALS, arms.GEOMETRIC_MEDIAN, loss],
    "ideal": [arms.CLEAN, arms.RIGHT],
  }
  assert {role: {arm.role for arm in some} for role, some in roles.items()} == {
    role: {role} for role in roles
  }
  memory, control = arms.gaf_arms(8, ["choice"], adaptive=True, memory_decay=0.9)
  assert memory.has_memory and not control.has_memory and not gaf.has_memory


def test_arms_share_a_program_if_only_data_differ():
  (low, *controls), (high, *_) = (arms.gaf_arms(8, tau=tau) for tau in (0.5, 0.9))
  # The plain mean is GAF with a tau of 2.
  assert low.compiled() == high.compiled() == arms.PLAIN.compiled()
  assert len({arm.compiled() for arm in (*controls, arms.RIGHT)}) == 1
  (_, loss) = arms.gaf_arms(8, ["loss"], tau=0.5)
  (_, averaged) = arms.gaf_arms(8, ["choice"], tau=0.5, ema_decay=0.9)
  programs = {arm.compiled() for arm in (low, controls[0], loss, averaged)}
  assert len(programs) == 4


def _traced(steps=120, k=6):
  rng = np.random.default_rng(0)
  accepted = rng.random((steps, k)) < rng.random((steps, 1))
  accepted[::7] = False
  return accepted, np.where(accepted, rng.random((steps, k)), 0).astype(np.float32)


def test_random_choice_keeps_as_many_with_the_same_weights():
  accepted, weights = _traced()
  chosen = arms.random_choice(accepted, weights, 1, 2)
  np.testing.assert_array_equal(chosen.accepted.sum(axis=1), accepted.sum(axis=1))
  np.testing.assert_array_equal(np.sort(chosen.weights), np.sort(weights))
  np.testing.assert_array_equal(chosen.weights > 0, chosen.accepted)
  assert np.mean(chosen.accepted != accepted) > 0.2
  again, other = (
    arms.random_choice(accepted, weights, *key) for key in ((1, 2), (1, 3))
  )
  np.testing.assert_array_equal(again.weights, chosen.weights)
  assert np.any(other.weights != chosen.weights)


def test_random_steps_take_as_many_of_each_fifty():
  accepted, _ = _traced()
  accepted[:50] &= np.arange(50)[:, None] % 5 == 0  # Fewer early on.
  chosen = arms.random_steps(accepted, 3)
  taken = chosen.accepted.any(axis=1)
  np.testing.assert_array_equal(
    chosen.accepted, taken[:, None] & np.ones((120, 6), bool)
  )
  np.testing.assert_array_equal(chosen.weights, chosen.accepted)
  for window in (slice(50), slice(50, 100), slice(100, 120)):
    assert taken[window].sum() == accepted[window].any(axis=1).sum()
  assert np.any(taken != accepted.any(axis=1))


def test_smallest_losses():
  losses = jnp.array([3.0, 1.0, 2.0, 0.5])
  for number, warming_up, expected in (
    (2, False, [0, 1, 0, 1]),
    (0, False, [0, 0, 0, 0]),
    (1, True, [1, 1, 1, 1]),
  ):
    chosen = arms.smallest_loss(losses, number, warming_up)
    np.testing.assert_array_equal(chosen.accepted, np.array(expected, bool))
    np.testing.assert_array_equal(chosen.weights, expected)


def test_what_each_control_is_given():
  accepted, weights = _traced()
  wrong = np.random.default_rng(1).random(accepted.shape) < 0.3
  of = lambda arm: arms.chosen_by(arm, accepted, weights, wrong, (5,))
  _, choice, steps = arms.gaf_arms(8, tau=0.9)
  (_, loss) = arms.gaf_arms(8, ["loss"], tau=0.9)
  assert of(arms.PLAIN) is None
  np.testing.assert_array_equal(of(arms.RIGHT).accepted, ~wrong)
  np.testing.assert_array_equal(of(loss).accepted, accepted)
  for arm, expected in (
    (choice, arms.random_choice(accepted, weights, 5)),
    (steps, arms.random_steps(accepted, 5)),
  ):
    np.testing.assert_array_equal(of(arm).accepted, expected.accepted)


def test_a_decision_that_is_already_taken():
  gram, valid = jnp.eye(3) + 1, jnp.array([True, True, False])
  chosen = arms.Chosen(jnp.array([False, True, True]), jnp.array([0.0, 0.5, 1.0]))
  decision = arms.already_decided(chosen)(gram, valid, 2.0)
  np.testing.assert_array_equal(decision.accepted, [False, True, False])
  np.testing.assert_array_equal(decision.weights, chosen.weights)
  # From the first one to the second: cosine 1/2.
  assert float(decision.distances[1]) == pytest.approx(0.5)
