"""`microbatch_weights` and `max_norm_ratio`, in all forms that support them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import device_mappings
import gaf_optax
import known_steps
import oracle
import reference_forms
from gaf_optax import rules

every_form = pytest.mark.parametrize(
  "form", reference_forms.ALL.values(), ids=reference_forms.ALL
)
K = 5
WEIGHTS = np.array([3.0, 1, 4, 1, 5])


def tree(seed, k=K):
  """Leaves `[k, *shape]`; the last but one opposes the others."""
  draw = lambda i, *shape: known_steps.draw([seed, i], k, *shape, common=1.5)
  leaves = {"a": draw(0, 4, 2), "b": draw(1, 3)}
  for x in leaves.values():
    x[-2] *= -1
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), leaves)


def assert_oracle(filtered, leaves, tau, **options):
  want = oracle.gaf(list(leaves.values()), tau, **options)
  assert want.margin > 1e-4
  assert filtered.accepted == want.accepted.sum()
  np.testing.assert_allclose(filtered.distances, want.distances, atol=1e-5)
  np.testing.assert_allclose(filtered.weights, want.weights, atol=1e-6)
  for got, expected in zip(filtered.gradient.values(), want.gradient):
    np.testing.assert_allclose(got, expected, atol=1e-5)
  return want


@every_form
def test_a_weight_of_0_is_as_if_it_were_not_there(form):
  """For any micro-gradient; it also changes no counter."""
  leaves = tree(0)
  for place in (0, 2, 4):
    kept = np.arange(K) != place
    weights = np.where(kept, WEIGHTS, 0)
    rest = oracle.gaf([x[kept] for x in leaves.values()], 0.8)
    for inside in (1.0, 0.0, np.nan, 1e25):
      odd = jax.tree.map(lambda x: x.at[place].mul(inside), leaves)
      filtered = form(odd, 0.8, microbatch_weights=weights)
      assert filtered.accepted == rest.accepted.sum() and filtered.nonfinite == 0
      assert np.isnan(filtered.distances[place]) and filtered.weights[place] == 0
      want = oracle.gaf(
        [np.asarray(x)[kept] for x in leaves.values()],
        0.8,
        microbatch_weights=weights[kept],
      )
      np.testing.assert_allclose(filtered.weights[kept], want.weights, atol=1e-6)
      for got, expected in zip(filtered.gradient.values(), want.gradient):
        np.testing.assert_allclose(got, expected, atol=1e-5)


@every_form
def test_the_mean_has_the_weights_on_any_scale(form):
  leaves = tree(1)
  for scale in (1e-20, 1.0, 1e20):
    filtered = form(leaves, 2.0, microbatch_weights=scale * WEIGHTS)
    assert filtered.accepted == K
    np.testing.assert_allclose(filtered.weights, WEIGHTS / WEIGHTS.sum(), rtol=1e-5)
    for got, x in zip(filtered.gradient.values(), leaves.values()):
      want = np.average(oracle.wide(x), axis=0, weights=WEIGHTS)
      np.testing.assert_allclose(got, want, atol=1e-5)


@every_form
def test_the_sum_that_is_compared_with_has_the_weights(form):
  """A large weight pulls the sum towards its micro-gradient."""
  rows = np.array([[1.0, 0, 0], [1, 1, 0], [-0.2, 1, 0], [9, 9, 9], [9, 9, 9]])
  leaves = {"a": jnp.zeros((K, 4, 2)), "b": jnp.asarray(rows, jnp.float32)}
  for weights, accepted in [([1, 1, 1], 2), ([1, 1e3, 1], 3), ([1e3, 1, 1], 2)]:
    weights = np.array([*weights, 0, 0], np.float64)
    filtered = form(leaves, 0.7, microbatch_weights=weights)
    assert filtered.accepted == accepted
    s = weights[0] * rows[0] + weights[1] * rows[1]
    want = oracle.distance(s, rows[2])
    np.testing.assert_allclose(filtered.distances[2], want, atol=1e-5)


@every_form
def test_all_weights_of_0_do_not_agree(form):
  filtered = form(tree(2), 2.0, microbatch_weights=np.zeros(K))
  assert not filtered.agreed and filtered.nonfinite == 0
  chex.assert_trees_all_equal(
    filtered.gradient, jax.tree.map(jnp.zeros_like, filtered.gradient)
  )


@every_form
def test_leaves_without_a_label_have_the_weighted_mean_of_all(form):
  leaves = tree(3)
  weights = np.array([3.0, 0, 4, 1, 5])
  groups = lambda path, leaf: None if path[0].key == "b" else 0
  filtered = form(leaves, 0.8, microbatch_weights=weights, groups=groups)
  part = oracle.gaf([leaves["a"]], 0.8, microbatch_weights=weights)
  assert part.agreed and part.accepted.sum() < 4
  np.testing.assert_allclose(filtered.gradient["a"], part.gradient[0], atol=1e-5)
  want = np.average(oracle.wide(leaves["b"]), axis=0, weights=weights)
  np.testing.assert_allclose(filtered.gradient["b"], want, atol=1e-5)


def test_a_rule_of_the_users_does_not_see_them():
  """Its weights are multiplied by them; weight 0 makes a micro-gradient invalid."""

  def rule(gram, valid, tau):
    return rules.Decision(jnp.array([1.0, 2, 3]), jnp.ones(3, bool), jnp.diagonal(gram))

  tx = gaf_optax.gaf(rule=rule, num_microbatches=3)
  rows = jnp.array([[4.0], [8.0], [2.0]])
  gradient, state = tx.update(
    rows, tx.init(jnp.zeros(1)), microbatch_weights=jnp.array([5.0, 1, 0])
  )
  np.testing.assert_allclose(state.distances, [0.25, 1, 0], atol=1e-6)
  assert state.accepted.tolist() == [True, True, False]
  np.testing.assert_allclose(gradient, [(5 * 4 + 2 * 8) / 7], rtol=1e-6)


def test_an_anchor_moves_by_the_weighted_mean():
  tx = gaf_optax.gaf(0.9, anchor_decay=0.5, num_microbatches=3)
  stream = gaf_optax.multi_steps(optax.identity(), 3, 0.9, anchor_decay=0.5)
  rows = jnp.array([[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]])
  weights = jnp.array([1.0, 3.0, 0.0])
  state, streamed = tx.init(jnp.zeros(2)), stream.init(jnp.zeros(2))
  push = jax.jit(stream.update)
  for want in ([0.125, 0.375], [0.1875, 0.5625]):
    gradient, state = tx.update(rows, state, microbatch_weights=weights)
    for row, weight in zip(rows, weights):
      emitted, streamed = push(row, streamed, microbatch_weights=weight)
    np.testing.assert_allclose(state.anchor, want, rtol=1e-6)
    np.testing.assert_allclose(streamed.gaf_state.anchor, want, rtol=1e-6)
    np.testing.assert_allclose(emitted, gradient, rtol=1e-6)
  # In the second step [1, 0] was too far from the anchor, with a cosine of 0.32.
  assert state.accepted.tolist() == [True, True, False]


def test_apply_if_agreed_passes_them_to_its_filter():
  tx = gaf_optax.apply_if_agreed(optax.sgd(1.0), 2.0, num_microbatches=2)
  updates, state = jax.jit(tx.update)(
    jnp.array([[4.0], [8.0]]),
    tx.init(jnp.zeros(1)),
    microbatch_weights=jnp.array([3.0, 1.0]),
  )
  np.testing.assert_allclose(updates, [-5.0])
  np.testing.assert_allclose(state.gaf_state.weights, [0.75, 0.25])


@pytest.mark.parametrize("stacked", [False, True], ids=["one", "stacked"])
def test_across_devices(stacked):
  """A scalar on each device, or `[k_local]`."""
  k = device_mappings.N * (2 if stacked else 1)
  leaves = tree(4, k)
  weights = np.random.default_rng(0).integers(0, 4, k).astype(np.float32)
  weights[-2] = 2  # The one that opposes the others.
  local = lambda x: x.reshape(device_mappings.N, 2, *x.shape[1:]) if stacked else x
  tx = gaf_optax.gaf(
    0.8,
    axis_name="data",
    stacked=stacked or None,
    num_microbatches=k,
    max_norm_ratio=1.1,
  )

  def step(inputs):
    params = reference_forms.like_params(leaves)
    gradient, state = tx.update(
      inputs["leaves"], tx.init(params), params, microbatch_weights=inputs["weights"]
    )
    return gradient, state.accepted, state.weights

  inputs = {"leaves": jax.tree.map(local, leaves), "weights": local(weights)}
  gradient, accepted, shares = device_mappings.mapped(
    step, inputs, device_mappings.ALL[2]
  )
  want = oracle.gaf(
    list(leaves.values()), 0.8, microbatch_weights=weights, max_norm_ratio=1.1
  )
  assert want.margin > 1e-4 and 2 < want.accepted.sum() < np.sum(weights > 0)
  for device in (0, 5):
    np.testing.assert_array_equal(accepted[device], want.accepted)
    np.testing.assert_allclose(shares[device], want.weights, atol=1e-6)
    for got, expected in zip(gradient.values(), want.gradient):
      np.testing.assert_allclose(got[device], expected, atol=1e-5)


class TestValueAndGrad:
  """Losses per token: each microbatch's loss is a mean over its valid tokens."""

  @staticmethod
  def loss(w, x, mask):
    return jnp.sum(mask * (w - x) ** 2) / jnp.sum(mask)

  def test_at_tau_2_it_is_the_token_mean_of_the_whole_batch(self):
    x = jnp.arange(1.0, 9).reshape(2, 4)
    mask = jnp.array([[1.0, 1, 1, 1], [1, 0, 0, 0]])
    want = jax.value_and_grad(self.loss)(jnp.float32(0), x, mask)
    tokens = lambda x, mask: jnp.sum(mask)
    for options in ({}, {"compare": lambda path, leaf: True}):
      run = gaf_optax.value_and_grad(
        self.loss, 2, 2.0, microbatch_weights=tokens, **options
      )
      value, grad, agreement = jax.jit(run)(jnp.float32(0), x, mask)
      np.testing.assert_allclose((value, grad), want, rtol=1e-6)
      np.testing.assert_allclose(agreement.weights, [0.8, 0.2], rtol=1e-6)
      plain = gaf_optax.value_and_grad(self.loss, 2, 2.0, **options)
      _, grad, _ = jax.jit(plain)(jnp.float32(0), x, mask)
      np.testing.assert_allclose(grad, -7.5)

  def test_an_empty_microbatch_and_a_rejected_one(self):
    """The empty one gives 0 / 0 = NaN, which is excluded from value and gradient."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, 3)) + 2
    x[2::4] *= -1  # The third of four microbatches.
    mask = rng.integers(0, 2, (12, 1)).astype(np.float64)
    mask[1::4] = 0
    mask[[0, 2, 3]] = 1
    loss = lambda w, x, mask: jnp.sum(mask * (w[None] - x) ** 2) / jnp.sum(mask)
    counts = np.array([mask[i::4].sum() for i in range(4)])
    w = jnp.zeros(3)
    sums = np.array([-2 * (mask[i::4] * x[i::4]).sum(0) for i in range(4)])
    losses = np.array([(mask[i::4] * x[i::4] ** 2).sum() for i in range(4)])
    keyword = {"mask": jnp.asarray(mask, jnp.float32)}
    for options in ({}, {"compare": lambda path, leaf: True}):
      run = gaf_optax.value_and_grad(
        loss, 4, 0.9, microbatch_weights=lambda x, mask: jnp.sum(mask), **options
      )
      value, grad, agreement = jax.jit(run)(w, jnp.asarray(x, jnp.float32), **keyword)
      assert agreement.accepted.tolist() == [True, False, False, True]
      assert int(agreement.nonfinite) == 0
      np.testing.assert_allclose(value, losses.sum() / counts.sum(), rtol=1e-5)
      want = sums[[0, 3]].sum(0) / counts[[0, 3]].sum()
      np.testing.assert_allclose(grad, want, rtol=1e-5)

  def test_errors(self):
    with pytest.raises(ValueError, match="microbatch_weights must be callable"):
      gaf_optax.value_and_grad(self.loss, 2, microbatch_weights=jnp.ones(2))
    x, mask = jnp.ones((2, 4)), jnp.ones((2, 4))
    run = gaf_optax.value_and_grad(
      self.loss, 2, microbatch_weights=lambda x, mask: mask[0]
    )
    with pytest.raises(ValueError, match=r"must have shape \(\),.* got \(4,\)"):
      run(jnp.float32(0), x, mask)


class TestErrors:
  def update(self, weights, stack=None, **options):
    tx = gaf_optax.gaf(2.0, **options)
    stack = jnp.ones((3, 2)) if stack is None else stack
    return tx.update(stack, tx.init(jnp.zeros(2)), microbatch_weights=weights)[0]

  def test_of_values_where_they_are_known(self):
    for bad in (-1.0, np.nan, np.inf):
      for make in (np.array, jnp.array):
        with pytest.raises(ValueError, match="must be finite and at least 0, got"):
          self.update(make([1.0, bad, 1.0]))
      tx = gaf_optax.multi_steps(optax.sgd(1.0), 2)
      with pytest.raises(ValueError, match="must be finite and at least 0, got"):
        tx.update(jnp.ones(2), tx.init(jnp.zeros(2)), microbatch_weights=bad)

  def test_traced_ones_count_as_0(self):
    rows = jnp.array([[1.0, 0], [5.0, 0], [2.0, 0]])
    run = jax.jit(lambda weights: self.update(weights, rows))
    for bad in (-1.0, np.nan, np.inf):
      np.testing.assert_allclose(run(jnp.array([1.0, bad, 1.0])), [1.5, 0])

  def test_of_shape(self):
    for weights in (jnp.ones(2), jnp.ones((3, 1)), 1.0):
      with pytest.raises(ValueError, match=r"must have shape \(3,\)"):
        self.update(weights)
    tx = gaf_optax.multi_steps(optax.sgd(1.0), 2)
    with pytest.raises(ValueError, match=r"must have shape \(\)"):
      tx.update(jnp.ones(2), tx.init(jnp.zeros(2)), microbatch_weights=jnp.ones(2))


class TestMaxNormRatio:
  def test_what_is_too_long_counts_as_scaled_down(self):
    """To this multiple of the median norm of nonzero finite ones, in each group."""
    leaves = tree(5)
    scales = jnp.array([1.0, 100.0, 1.0, 1.0, 0.0])
    leaves = jax.tree.map(lambda x: x * scales.reshape(-1, *[1] * (x.ndim - 1)), leaves)
    for ratio in (1.0, 1.5, 1e3):
      options = {"max_norm_ratio": ratio}
      filtered = reference_forms.stacked(leaves, 1.2, **options)
      want = assert_oracle(filtered, leaves, 1.2, **options)
      assert want.accepted[1]
      by_leaf = reference_forms.stacked(leaves, 1.2, groups="leaf", **options)
      for name, x in leaves.items():
        part = oracle.gaf([x], 1.2, **options)
        np.testing.assert_allclose(
          by_leaf.gradient[name], part.gradient[0], rtol=1e-5, atol=1e-5
        )

  def test_of_an_even_number_the_median_is_between_the_two_in_the_middle(self):
    rows = jnp.array([[1.0, 0], [2, 0], [6, 0], [100, 0], [0, 0], [jnp.nan, 0]])
    filtered = reference_forms.stacked({"w": rows}, 0.5, max_norm_ratio=1.0)
    # The median of 1, 2, 6 and 100 is 4.
    np.testing.assert_allclose(filtered.gradient["w"], [(1 + 2 + 4 + 4) / 4, 0])
    np.testing.assert_allclose(filtered.weights, [0.25] * 4 + [0, 0])

  def test_a_memory_does_not_hide_lengths(self):
    tx = gaf_optax.gaf(
      0.5,
      memory_decay=0.5,
      num_microbatches=3,
      max_norm_ratio=2.0,
      rule=rules.majority(),
    )
    rows = jnp.array([[1.0, 0], [1, 0], [100, 0]])
    gradient, _ = tx.update(rows, tx.init(jnp.zeros(2)))
    np.testing.assert_allclose(gradient, [4 / 3, 0], rtol=1e-6)
