"""`value_and_grad(compare=...)` against whole per-microbatch gradients, in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import device_mappings
import gaf_optax
import oracle
import reference_forms
from gaf_optax import _two_pass, rules

BATCH = 24


def network(dtype="float32"):
  rng = np.random.default_rng(0)
  shapes = {"body": {"w": (5, 7), "b": (7,)}, "head": {"w": (7, 3), "b": (3,)}}
  draw = lambda shape: jnp.asarray(rng.standard_normal(shape)).astype(dtype)
  return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def batch(dtype="float32", size=BATCH):
  rng = np.random.default_rng(1)
  y = rng.integers(0, 3, size)
  x = rng.standard_normal((size, 5)) + 2 * rng.standard_normal((3, 5))[y]
  y = np.where(np.arange(size) % 4 == 0, (y + 1) % 3, y)
  return jnp.asarray(x).astype(dtype), jnp.asarray(y)


def loss(params, x, y):
  body, head = params["body"], params["head"]
  hidden = jnp.tanh(x @ body["w"] + body["b"][None])
  logits = (hidden @ head["w"] + head["b"][None]).astype(jnp.float32)
  each = -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1)[:, 0]
  return jnp.mean(each), hidden


def head(path, leaf):
  return path[0].key == "head"


def stack(params, x, y, k):
  split = lambda a: jnp.stack([a[i::k] for i in range(k)])
  one = jax.grad(lambda *args: loss(*args)[0])
  return jax.vmap(one, (None, 0, 0))(params, split(x), split(y))


@pytest.fixture(params=["copies", "no copies"])
def either_way(request, monkeypatch):
  """Once with and once without a copy of the compared leaves for each microbatch."""
  if request.param == "no copies":
    monkeypatch.setattr(_two_pass, "_MAX_COPIED_VALUES", 0)


RULES = {
  "leave_one_out": (rules.leave_one_out(), 1.0, {}),
  "most_neighbors": (rules.most_neighbors(softness=0.1), 0.7, {"softness": 0.1}),
}


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("name, k", [("leave_one_out", BATCH), ("most_neighbors", 6)])
def test_the_gradient_is_the_weighted_mean_of_whole_micro_gradients(name, k):
  rule, tau, options = RULES[name]
  params, (x, y) = network(), batch()
  run = gaf_optax.value_and_grad(loss, k, tau, rule=rule, compare=head, has_aux=True)
  (value, aux), grads, agreement = jax.jit(run)(params, x, y)
  micro = stack(params, x, y, k)
  v = oracle.vectors(jax.tree.leaves(micro["head"]))
  weights, accepted, distances, margin, _ = oracle.decide(
    name, v, np.ones(k, bool), tau, **options
  )
  assert margin > 1e-5 and 1 < accepted.sum() < k
  np.testing.assert_array_equal(agreement.accepted, accepted)
  np.testing.assert_allclose(
    reference_forms.compared(agreement.distances), distances, atol=1e-5
  )
  share = weights / weights.sum()
  np.testing.assert_allclose(agreement.weights, share, atol=1e-5)
  want = jax.tree.map(lambda g: np.tensordot(share, oracle.wide(g), 1), micro)
  chex.assert_trees_all_close(grads, want, atol=1e-5)
  chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
  chex.assert_shape(aux, (k, BATCH // k, 7))
  assert float(value) == pytest.approx(float(loss(params, x, y)[0]), rel=1e-5)


def test_everything_compared_is_the_stacked_form():
  params, (x, y) = network(), batch()
  rule = rules.nearest_neighbors(3)
  tau = gaf_optax.tau_quantile(0.5)
  run = gaf_optax.value_and_grad(
    loss, 8, tau, rule=rule, compare=lambda path, leaf: True, has_aux=True
  )
  _, grads, agreement = jax.jit(run)(params, x, y)
  tx = gaf_optax.gaf(tau, rule=rule, num_microbatches=8)
  want, state = jax.jit(tx.update)(stack(params, x, y, 8), tx.init(params))
  chex.assert_trees_all_close(grads, want, atol=1e-5)
  np.testing.assert_array_equal(agreement.accepted, state.accepted)
  assert float(agreement.num_accepted) == 4


@pytest.mark.parametrize(
  "where, either_way",
  [("input", "copies"), ("loss", "no copies")],
  indirect=["either_way"],
)
def test_a_bad_microbatch_never_comes_back(where, either_way):
  """Through the inputs, or through the loss while the compared gradient is finite."""
  params, (x, y) = network(), batch()
  if where == "input":
    x = x.at[5, 2].set(jnp.nan)

  def risky(params, x, y):
    value, aux = loss(params, x, y)
    if where == "loss":  # Infinite for one example, without a gradient.
      value += jax.lax.stop_gradient(
        jnp.where(jnp.all(x == batch()[0][5][None]), jnp.inf, 0)
      )
    return value, aux

  run = gaf_optax.value_and_grad(
    risky, BATCH, 2.0, rule=rules.leave_one_out(), compare=head, has_aux=True
  )
  _, grads, agreement = jax.jit(run)(params, x, y)
  assert int(agreement.nonfinite) == 1 and float(agreement.weights[5]) == 0
  kept = np.arange(BATCH) != 5
  micro = stack(params, x[kept], y[kept], BATCH - 1)
  want = jax.tree.map(lambda g: g.mean(axis=0), micro)
  chex.assert_trees_all_close(grads, want, atol=1e-6)


def test_a_nan_outside_the_compared_leaves_is_no_agreement():
  # The derivative of sqrt(|x a|) with respect to a is NaN for x = 0.
  fun = lambda w, x: jnp.mean(w["b"] * jnp.sqrt(jnp.abs(x * w["a"])))
  run = jax.jit(
    gaf_optax.value_and_grad(fun, 4, 2.0, compare=lambda path, leaf: path[0].key == "b")
  )
  params, x = {"a": jnp.ones(()), "b": jnp.ones(())}, jnp.array([1.0, 4.0, 2.0, 3.0])
  _, grads, agreement = run(params, x)
  np.testing.assert_allclose(grads["a"], np.mean(np.sqrt(x)) / 2, rtol=1e-6)
  assert agreement.agreed and agreement.nonfinite == 0
  value, grads, agreement = run(params, x.at[1].set(0.0))
  assert grads == {"a": 0, "b": 0} and np.isfinite(value)
  assert not agreement.agreed and agreement.nonfinite == 1
  assert agreement.num_accepted == 0 and not agreement.accepted.any()
  np.testing.assert_array_equal(agreement.weights, np.zeros(4))


def test_all_bad_is_zero():
  params, (x, y) = network(), batch()
  run = gaf_optax.value_and_grad(loss, 4, compare=head, has_aux=True)
  _, grads, agreement = jax.jit(run)(params, x * jnp.nan, y)
  chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, params))
  assert not agreement.agreed and int(agreement.nonfinite) == 4


def test_half_precision():
  params, (x, y) = network("bfloat16"), batch("bfloat16")
  run = gaf_optax.value_and_grad(loss, 8, 2.0, compare=head, has_aux=True)
  _, grads, _ = jax.jit(run)(params, x, y)
  chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
  want = jax.tree.map(
    lambda g: oracle.wide(g.astype(jnp.float32)).mean(axis=0), stack(params, x, y, 8)
  )
  got = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
  chex.assert_trees_all_close(got, want, atol=2e-2)


# test_across.py tests the mappings themselves.
@pytest.mark.parametrize(
  "mapping, local_k, copied",
  [((AxisType.Auto, True), 3, False), ((AxisType.Auto, False), 1, True)],
  ids=["checked", "unchecked"],
)
def test_across_devices_it_is_the_whole_batch(mapping, local_k, copied, monkeypatch):
  if not copied:
    monkeypatch.setattr(_two_pass, "_MAX_COPIED_VALUES", 0)
  params, (x, y) = network(), batch()
  n = device_mappings.N
  options = dict(rule=rules.leave_one_out(), compare=head, has_aux=True)
  whole = gaf_optax.value_and_grad(loss, n * local_k, 0.9, **options)
  (value, _), want, expected = jax.jit(whole)(params, x, y)
  assert 1 < int(expected.accepted.sum()) < n * local_k
  run = gaf_optax.value_and_grad(loss, local_k, 0.9, axis_name="data", **options)

  def local(rows):
    (value, _), grads, agreement = run(params, rows["x"], rows["y"])
    return value, grads, agreement

  # The microbatches of each device are contiguous in the whole batch.
  own = lambda a: (
    a.reshape(-1, n, local_k, *a.shape[1:]).swapaxes(0, 1).reshape(n, -1, *a.shape[1:])
  )
  split = {"x": own(x), "y": own(y)}
  got_value, grads, agreement = device_mappings.mapped(local, split, mapping)
  np.testing.assert_allclose(got_value, np.full(n, value), rtol=1e-5)
  for got, leaf in zip(jax.tree.leaves(grads), jax.tree.leaves(want)):
    for one in got:
      np.testing.assert_allclose(one, leaf, atol=1e-5)
  np.testing.assert_array_equal(agreement.accepted.reshape(-1), expected.accepted)
  np.testing.assert_allclose(agreement.weights.reshape(-1), expected.weights, atol=1e-6)
  np.testing.assert_array_equal(agreement.num_accepted, [expected.num_accepted] * n)


def test_errors():
  params, (x, y) = network(), batch()
  for options, message in [
    ({"compare": lambda path, leaf: False}, r"selects no leaf.*\['body'\]\['b'\]"),
    ({"compare": "head"}, "compare must be callable"),
    ({"compare": lambda path, leaf: None}, r"True or False, got None for leaf \['body"),
    ({"compare": head, "axis_name": "data"}, "axis_name 'data' is not an axis"),
    (
      {"compare": head, "groups": "leaf"},
      "groups='leaf' is not supported .* one decision",
    ),
    (
      {"compare": head, "anchor_decay": 0.9},
      "anchor_decay=0.9 is not supported .* no state",
    ),
    (
      {"compare": head, "memory_decay": 0.9},
      "memory_decay=0.9 is not supported .* no state",
    ),
    (
      {"compare": head, "stacked": True},
      "stacked=True is not supported .* always stacked",
    ),
    ({"compare": head, "param_axes": "model"}, "must be whole on every device"),
    ({"rule": rules.leave_one_out()}, "needs all micro-gradients at once"),
    ({"tau": gaf_optax.tau_quantile(0.5)}, "Stack them and use gaf"),
  ]:
    with pytest.raises(ValueError, match=message):
      gaf_optax.value_and_grad(loss, 4, has_aux=True, **options)(params, x, y)


def test_integer_leaves_cannot_be_compared():
  params = {"w": jnp.ones(2), "n": jnp.arange(2)}
  run = gaf_optax.value_and_grad(
    lambda p, x: jnp.sum(p["w"] * x), 2, compare=lambda path, leaf: path[0].key == "n"
  )
  with pytest.raises(ValueError, match=r"leaf \['n'\] of dtype int32"):
    run(params, jnp.ones((2, 2)))


def test_the_loss_is_a_real_scalar():
  for value, message in [(jnp.ones(2), r"float32\[2\]"), (jnp.int32(1), r"int32\[\]")]:
    run = gaf_optax.value_and_grad(
      lambda w, x: value, 2, compare=lambda path, leaf: True
    )
    with pytest.raises(TypeError, match="must return a real scalar.*" + message):
      run(jnp.ones(2), jnp.ones((2, 2)))


@pytest.mark.usefixtures("compiled_as_users_do")
def test_what_an_mlp_costs():
  """Operations in the compiled program, relative to a step on the whole batch.

  At most 1.15 times as many, plus the Gram product. The compiler counts one iteration
  of a loop, and so only a part of this product. It also counts the branch for
  non-finite microbatches, which is another step.
  """
  size = 256
  num_inputs, width, num_classes = 784, 1024, 10
  shapes = [(num_inputs, width), (width, width), (width, num_classes)]
  params = [jnp.ones(shape) for shape in shapes]
  x, y = jnp.ones((size, num_inputs)), jnp.zeros(size, jnp.int32)

  def loss(params, x, y):
    for w in params[:-1]:
      x = jnp.maximum(x @ w, 0)
    logits = jax.nn.log_softmax(x @ params[-1])
    return -jnp.mean(jnp.take_along_axis(logits, y[:, None], 1))

  run = gaf_optax.value_and_grad(
    loss,
    size,
    gaf_optax.tau_quantile(0.5),
    rule=rules.nearest_neighbors(5),
    compare=lambda path, leaf: path[0].idx == 2,
  )
  plain, ours = (
    jax.jit(f).lower(params, x, y).compile() for f in (jax.value_and_grad(loss), run)
  )
  num_compared = width * num_classes
  operations = plain.cost_analysis()["flops"]
  branch, product = operations, 2 * size**2 * num_compared
  assert ours.cost_analysis()["flops"] <= 1.15 * operations + branch + product
  beside = plain.memory_analysis().temp_size_in_bytes
  stack = 4 * size * num_compared
  # The copies, their gradients, and the blocks of the Gram product.
  assert ours.memory_analysis().temp_size_in_bytes <= beside + 2.25 * stack


@pytest.mark.usefixtures("compiled_as_users_do")
def test_one_forward_pass_behind_a_normalization():
  """As many matrix products as a step, plus those for the compared gradients."""
  x, y = jnp.ones((8, 4)), jnp.zeros((8, 1))
  params = {"a": jnp.ones((4, 64)), "b": jnp.ones((64, 64)), "head": jnp.ones((64, 1))}

  def loss(params, x, y):
    for name in "ab":
      x = x @ params[name]
      x = (x - jnp.mean(x, 1, keepdims=True)) / jnp.std(x, 1, keepdims=True)
      x = jnp.tanh(x)
    return jnp.mean((x @ params["head"] - y) ** 2)

  run = gaf_optax.value_and_grad(
    loss, 8, compare=lambda path, leaf: path[0].key == "head"
  )
  forward = "tensor<8x1x4xf32>, tensor<4x64xf32>"
  text = jax.jit(run).lower(params, x, y).as_text()
  # One, and one in the branch for non-finite microbatches.
  assert text.count(forward) == 2
