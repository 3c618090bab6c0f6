"""`example_weights` against per-example gradients in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gaf_optax
import oracle
import reference_forms
from gaf_optax import rules


def layers_of(seed, batch=12, widths=((5, 3), (3, 4)), scale=1.0):
  """Inputs and cotangents of each layer, for two kinds of examples."""
  rng = np.random.default_rng(seed)
  kind = np.arange(batch) % 2
  layers = []
  for d, c in widths:
    activations = (
      rng.standard_normal((batch, d)) + 2 * rng.standard_normal((2, d))[kind]
    )
    cotangents = rng.standard_normal((batch, c)) + 2 * rng.standard_normal((2, c))[kind]
    layers.append((activations, scale * cotangents))
  return layers


def gradients(layers):
  """`[B, n]` float64: kernel and bias gradients of all layers, one row per example."""
  rows = []
  for a, d in layers:
    a, d = oracle.wide(a), oracle.wide(d)
    rows += [(a[:, :, None] * d[:, None, :]).reshape(len(a), -1), d]
  return np.concatenate(rows, axis=1)


def weights(layers, tau, **options):
  activations, cotangents = zip(*layers)
  return gaf_optax.example_weights(list(activations), list(cotangents), tau, **options)


# Rules and numbers of layers interact only through a matrix `[B, B]`.
@pytest.mark.parametrize(
  "name, num_layers, dtype",
  [
    ("sequential", 2, "float32"),
    ("leave_one_out", 1, "bfloat16"),
    ("min_neighbors", 2, "bfloat16"),
  ],
)
def test_is_the_oracle_on_the_gradients(name, num_layers, dtype):
  arguments = {"fraction": 0.4} if name == "min_neighbors" else {}
  rule = getattr(rules, name)(**arguments)
  for scale in (1e-14, 1.0, 1e12):
    layers = layers_of(0, scale=scale)[:num_layers]
    layers = [tuple(jnp.asarray(x).astype(dtype) for x in pair) for pair in layers]
    v = gradients(layers)
    finite = np.ones(len(v), bool)
    want, accepted, distances, margin, _ = oracle.decide(
      name, v, finite, 0.7, **arguments
    )
    assert margin > 1e-4 and 1 < accepted.sum() < len(v)
    got = weights(layers, 0.7, rule=rule)
    np.testing.assert_array_equal(got.accepted, accepted)
    np.testing.assert_allclose(
      reference_forms.compared(got.distances), distances, atol=2e-5
    )
    np.testing.assert_allclose(got.weights, want / want.sum(), atol=1e-6)
    assert got.agreed and float(got.num_accepted) == accepted.sum()
    assert int(got.nonfinite) == 0


def test_an_example_that_is_not_finite_has_weight_0():
  layers = [tuple(jnp.asarray(x, jnp.float32) for x in pair) for pair in layers_of(1)]
  for bad in (np.nan, np.inf, 1e25):
    for where in (0, 1):
      pair = list(layers[1])
      pair[where] = pair[where].at[3, 1].set(bad)
      got = weights([layers[0], tuple(pair)], 2.0, rule=rules.leave_one_out())
      assert int(got.nonfinite) == 1 and not got.accepted[3]
      assert got.distances[3] == -1
      np.testing.assert_allclose(got.weights, np.where(np.arange(12) == 3, 0, 1 / 11))


def test_an_example_without_a_gradient_is_at_distance_1():
  (a, d), _ = layers_of(2)
  got = gaf_optax.example_weights(
    jnp.asarray(a, jnp.float32),
    jnp.asarray(d, jnp.float32).at[0].set(0),
    0.9,
    rule=rules.nearest_neighbors(3),
  )
  assert float(got.distances[0]) == 1 and not got.accepted[0]


def test_the_weighted_loss_has_the_filtered_gradient():
  """In the compared layer; and no gradient flows through the weights."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((16, 5)), jnp.float32)
  y = jnp.asarray(rng.integers(0, 3, 16))
  params = {
    "w": jnp.asarray(rng.standard_normal((5, 3)), jnp.float32),
    "b": jnp.ones(3),
  }
  rule = rules.nearest_neighbors(3)

  def losses(params, x, y):
    logits = x @ params["w"] + params["b"][None]
    each = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return each, jax.nn.softmax(logits) - jax.nn.one_hot(y, 3)

  def weighted(params):
    each, cotangents = losses(params, x, y)
    found = gaf_optax.example_weights(x, cotangents, 0.7, rule=rule)
    return jnp.sum(found.weights * each)

  one = lambda p, x, y: losses(p, x[None], y[None])[0][0]
  stack = jax.jit(jax.vmap(jax.grad(one), (None, 0, 0)))(params, x, y)
  tx = gaf_optax.gaf(0.7, rule=rule, num_microbatches=16)
  want, state = tx.update(stack, tx.init(params), params)
  assert 1 < state.accepted.sum() < 16
  got = jax.jit(jax.grad(weighted))(params)
  for name in params:
    np.testing.assert_allclose(got[name], want[name], atol=2e-6)


def test_tau_quantile_and_adaptive_tau():
  layers = [tuple(jnp.asarray(x, jnp.float32) for x in pair) for pair in layers_of(3)]
  rule = rules.nearest_neighbors(3)
  half = weights(layers, gaf_optax.tau_quantile(0.5), rule=rule)
  assert int(half.accepted.sum()) == 6
  kept, dropped = (half.distances[x] for x in (half.accepted, ~half.accepted))
  assert kept.max() < dropped.min()
  adaptive = weights(layers, gaf_optax.adaptive_tau(), rule=rule)
  tau = oracle.adaptive_threshold(np.asarray(adaptive.distances, np.float64))
  np.testing.assert_array_equal(adaptive.accepted, adaptive.distances <= tau)


def test_errors_of_shape():
  for activations, cotangents, message in [
    (jnp.ones((4, 3)), jnp.ones((5, 3)), r"cotangents must have the shape \[B, feat"),
    (jnp.ones((4, 2, 3)), jnp.ones((4, 3)), "activations must have the shape"),
    ([jnp.ones((4, 3))], jnp.ones((4, 3)), "two sequences of one array for each layer"),
    ([jnp.ones((4, 3))], [jnp.ones((4, 3))] * 2, "a sequence of 1 and a sequence of 2"),
    (jnp.ones((1, 3)), jnp.ones((1, 3)), "at least 2 examples to compare, got 1"),
  ]:
    with pytest.raises(ValueError, match=message):
      gaf_optax.example_weights(activations, cotangents)


def test_errors_of_options():
  for tau, rule, message in [
    (3.0, None, r"tau must be in \[0, 2\]"),
    (optax.constant_schedule(0.9), None, "needs a state"),
    (gaf_optax.tau_quantile(0.5), None, "depend on tau themselves"),
  ]:
    with pytest.raises(ValueError, match=message):
      gaf_optax.example_weights(jnp.ones((4, 3)), jnp.ones((4, 2)), tau, rule=rule)
