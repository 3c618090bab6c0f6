"""Parity with PyTorch packages, on recorded results.

`parity/make_cases.py` records two implementations of GAF in `parity/cases.json`.
`parity/make_aggregator_cases.py` records two packages with Krum and the geometric
median in `parity/aggregators.json`. The scripts give the versions.
"""

import functools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gaf_optax
import oracle
from gaf_optax import rules

# Optax's optimizers and schedules mix dtypes.
pytestmark = pytest.mark.usefixtures("standard_promotion")


def recorded(name):
  return json.loads(
    pathlib.Path(__file__).with_name("parity").joinpath(name).read_text()
  )


CASES, AGGREGATORS = recorded("cases.json"), recorded("aggregators.json")
# Counterparts of the torch.optim optimizers in parity/make_cases.py.
OPTIMIZERS = {
  "sgd": optax.sgd(0.1),
  # torch adds the decay to the gradient before the momentum.
  "momentum_decay": optax.chain(
    optax.add_decayed_weights(0.05), optax.sgd(0.1, momentum=0.9)
  ),
  "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
  "adam": optax.adam(0.1, b1=0.8, b2=0.95, eps=0.1),
  "adamw": optax.adamw(0.1, b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.05),
}
STRATEGIES = {
  "accept_max_neighbors": lambda fraction: rules.most_neighbors(),
  "accept_min_neighbors": rules.min_neighbors,
}


def as_tree(flat):
  """The last axis of an array as parameters of the recorded model."""
  flat = np.asarray(flat, np.float32)
  sizes = np.cumsum([np.prod(shape) for shape in CASES["shapes"].values()])
  pieces = np.split(flat, sizes[:-1], axis=-1)
  return {
    name: jnp.asarray(piece.reshape(*flat.shape[:-1], *shape))
    for (name, shape), piece in zip(CASES["shapes"].items(), pieces)
  }


def assert_weights(params, recorded, atol=2e-6):
  expected = as_tree(recorded)
  chex.assert_trees_all_equal_shapes_and_dtypes(params, expected)
  chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=atol)


@functools.cache
def step_of(optimizer):
  """One step with `running_average`, compiled once for all thresholds."""

  @jax.jit
  def step(tau, params, state, micro_grads):
    tx = gaf_optax.apply_if_agreed(
      OPTIMIZERS[optimizer], tau, rule=rules.running_average()
    )
    updates, state = tx.update(micro_grads, state, params)
    return optax.apply_updates(params, updates), state

  return step


decide = jax.jit(
  lambda gram, tau, rule: rule(gram, jnp.ones(gram.shape[:1], bool), tau),
  static_argnums=2,
)


def of_rows(rule, rows, tau=0.97, scale=1.0):
  """The mean of recorded rows under a rule, and which rows it accepts."""
  rows = np.array(rows)
  gram = jnp.asarray(scale**2 * (rows @ rows.T), jnp.float32)
  weights, accepted, _ = decide(gram, tau, rule)
  weights = np.asarray(weights, np.float64)
  return weights @ rows / max(weights.sum(), 1e-9), accepted.tolist()


def case_id(case):
  if "optimizer" in case:
    return f"{case['optimizer']}-{len(case['micro_grads'][0])}-{case['tau']}"
  return (
    f"{case['kind']}-{len(case['micro_grads'])}-{case['strategy'][7:10]}"
    f"-{case['fraction']}-{case['threshold']}"
  )


@pytest.mark.parametrize("case", CASES["authors"], ids=case_id)
def test_running_average_gives_the_weights_of_step_gaf(case):
  step, tau = step_of(case["optimizer"]), jnp.float32(case["tau"])
  params = as_tree(case["initial"])
  state = gaf_optax.apply_if_agreed(OPTIMIZERS[case["optimizer"]]).init(params)
  steps = zip(case["micro_grads"], case["agreed_count"], case["weights"])
  for number, (rows, agreed, weights) in enumerate(steps):
    before, inner_before = params, state.inner_state
    # Each update starts the sequence one place further on.
    rows = np.roll(rows, number, axis=0)
    params, state = step(tau, params, state, as_tree(rows))
    assert_weights(params, weights)
    found = gaf_optax.metrics(state)
    # The package counts the micro-gradients that joined the first.
    assert float(found["num_accepted"]) == (agreed + 1 if agreed else 0)
    if not agreed:
      chex.assert_trees_all_equal(params, before)
      chex.assert_trees_all_equal(state.inner_state, inner_before)
  if case["optimizer"].startswith("adam"):
    taken = sum(agreed > 0 for agreed in case["agreed_count"])
    assert int(optax.tree.get(state, "count")) == taken


@pytest.mark.parametrize("case", CASES["authors"][3:8:4], ids=case_id)
def test_multi_steps_gives_the_weights_of_step_gaf(case):
  k = len(case["micro_grads"][0])
  tx = gaf_optax.multi_steps(
    OPTIMIZERS[case["optimizer"]], k, case["tau"], rule=rules.running_average()
  )

  @jax.jit
  def cycle(params, state, rows):
    def one(carry, micro_grad):
      params, state = carry
      updates, state = tx.update(micro_grad, state, params)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(one, (params, state), rows)[0]

  params = as_tree(case["initial"])
  state = tx.init(params)
  for rows, weights in zip(case["micro_grads"], case["weights"]):
    params, state = cycle(params, state, as_tree(rows))
    assert_weights(params, weights)


@pytest.mark.parametrize(
  "case", CASES["authors_equality"], ids=lambda case: str(case["tau"])
)
def test_a_distance_equal_to_tau_is_accepted_as_by_step_gaf(case):
  assert case["agreed_count"] == 1
  params = as_tree(case["initial"])
  state = gaf_optax.apply_if_agreed(OPTIMIZERS["sgd"]).init(params)
  step, tau = step_of("sgd"), jnp.float32(case["tau"])
  params, state = step(tau, params, state, as_tree(case["micro_grads"]))
  assert float(gaf_optax.metrics(state)["num_accepted"]) == 2
  assert_weights(params, case["weights"])


def test_four_accepted_weigh_an_eighth_an_eighth_a_quarter_and_a_half():
  # From the package's pairwise average of the four unit vectors.
  assert CASES["authors_shares"] == [1 / 8, 1 / 8, 1 / 4, 1 / 2]
  tx = gaf_optax.gaf(2.0, rule=rules.running_average())
  mean, _ = tx.update(jnp.eye(4), tx.init(jnp.zeros(4)))
  np.testing.assert_array_equal(mean, CASES["authors_shares"])


@pytest.mark.parametrize("case", CASES["samples"], ids=case_id)
def test_neighbour_rules_accept_what_the_per_sample_package_accepts(case):
  rule = STRATEGIES[case["strategy"]](case["fraction"])
  mean, accepted = of_rows(rule, case["micro_grads"], case["threshold"])
  assert accepted == case["accepted"]
  # The package scales the accepted rows by batch / accepted, so the recorded mean over
  # the batch is the mean of the accepted rows.
  longest = np.max(np.linalg.norm(case["micro_grads"], axis=1))
  np.testing.assert_allclose(mean, case["mean"], rtol=1e-5, atol=1e-6 * longest)


def test_equality_is_accepted_where_the_per_sample_package_compares_with_less():
  case = CASES["samples_equality"]
  # The first two are at distance 1, the threshold, from all others.
  assert case["accepted"] == [False, False, True, True]
  rule = rules.most_neighbors()
  mean, accepted = of_rows(rule, case["micro_grads"], case["threshold"])
  assert accepted == [True] * 4
  np.testing.assert_allclose(mean, np.mean(case["micro_grads"], axis=0), rtol=1e-6)


def kind_and_number(case):
  return f"{case['kind']}-{len(case['rows'])}"


@pytest.mark.parametrize("case", AGGREGATORS["krum"], ids=kind_and_number)
def test_multi_krum_gives_what_byzfl_gives_with_one_more_wrong(case):
  """byzfl sums n - f - 1 distances; the paper has n - f - 2."""
  k, num_wrong = len(case["rows"]), case["num_wrong"]
  largest = np.abs(case["rows"]).max()
  for name, num_kept in [("byzfl_krum", 1), ("byzfl_multi_krum", k - num_wrong)]:
    rule = rules.multi_krum(num_wrong - 1, num_kept)
    result, _ = of_rows(rule, case["rows"], scale=2.0 ** case["scale"])
    np.testing.assert_allclose(result, case[name], atol=1e-6 * largest)


@pytest.mark.parametrize("case", AGGREGATORS["krum"], ids=kind_and_number)
def test_multi_krum_keeps_what_torchjd_keeps(case):
  """torchjd sums distances; in these cases, squared distances give the same result."""
  num_wrong = case["num_wrong"]
  for num_kept, name in [(1, "torchjd_krum"), (None, "torchjd_multi_krum")]:
    rule = rules.multi_krum(num_wrong, num_kept)
    _, accepted = of_rows(rule, case["rows"], scale=2.0 ** case["scale"])
    assert np.flatnonzero(accepted).tolist() == case[name]


def test_multi_krum_is_the_papers_where_the_packages_are_not():
  """Squared distances to the n - f - 2 nearest others, from the coordinates."""
  case = AGGREGATORS["krum_differing"]
  rows, num_wrong = np.array(case["rows"]), case["num_wrong"]
  num_kept = len(rows) - num_wrong
  result, accepted = of_rows(rules.multi_krum(num_wrong), rows)
  accepted = np.flatnonzero(accepted).tolist()
  assert accepted == sorted(np.argsort(oracle.krum_scores(rows, num_wrong))[:num_kept])
  assert accepted != case["torchjd_multi_krum"]
  assert np.abs(result - case["byzfl_multi_krum"]).max() > 0.01
  # The definitions of the two packages.
  apart = np.sort(np.linalg.norm(rows[:, None] - rows[None], axis=2), axis=1)[:, 1:]
  distances = apart[:, : num_kept - 2].sum(1)
  assert case["torchjd_multi_krum"] == sorted(np.argsort(distances)[:num_kept])
  one_more = (apart[:, : num_kept - 1] ** 2).sum(1)
  mean = rows[np.argsort(one_more)[:num_kept]].mean(0)
  np.testing.assert_allclose(case["byzfl_multi_krum"], mean, atol=1e-6)


@pytest.mark.parametrize("case", AGGREGATORS["geometric_median"], ids=kind_and_number)
def test_geometric_median_is_byzfls(case):
  """After as many iterations from the mean, and at convergence."""
  rows = np.array(case["rows"])
  apart = np.median(np.linalg.norm(rows - np.array(case["converged"]), axis=1))
  for num_iterations, name in [(8, "after_8"), (30, "converged")]:
    if name == "converged" and kind_and_number(case) == "lengths-8":
      continue  # It takes a hundred iterations.
    result, _ = of_rows(rules.geometric_median(num_iterations), rows)
    assert np.linalg.norm(result - case[name]) < 1e-5 * apart
