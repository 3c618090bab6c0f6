"""What a CPU, a TPU and a GPU run, run here: their branches, against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import across
import forms
import gaf_optax
import oracle
from gaf_optax import _exchange, rules

TAU = 0.8
BAD = {0: jnp.nan, 1: jnp.inf, 2: 0.0, 3: 1e25, 4: 1e-25}


@pytest.fixture(params=["cpu", "tpu", "cuda"])
def platform(request, monkeypatch):
  def branch(*args, default=None, **by_platform):
    return by_platform.get(request.param, default)(*args)

  monkeypatch.setattr(jax.lax, "platform_dependent", branch)
  jax.clear_caches()  # Functions that have been traced for the CPU.
  yield request.param
  jax.clear_caches()


def stack(k, seed=0, bad=False, shapes=None):
  """Long leaves of whole tiles, of half tiles and of neither; short and empty ones."""
  shapes = shapes or {
    "tiles": ((2, 64, 128), jnp.float32),
    "half": ((3, 96, 64), jnp.float32),
    "odd": ((130, 131), jnp.float32),
    "short": ((5, 7), jnp.float32),
    "scalar": ((), jnp.float32),
    "empty": ((0, 3), jnp.float32),
    "half_precision": ((33, 128), jnp.bfloat16),
    "complex": ((4, 8, 128), jnp.complex64),
  }
  rng = np.random.default_rng(seed)

  def leaf(shape, dtype):
    draw = lambda *s: rng.standard_normal(s)
    x = draw(k, *shape) + draw(*shape)
    if dtype == jnp.complex64:
      x = x + 1j * (draw(k, *shape) + draw(*shape))
    return jnp.asarray(x, dtype)

  tree = {name: leaf(*kind) for name, kind in shapes.items()}
  if bad:
    for i, factor in BAD.items():
      tree = jax.tree.map(lambda x: x.at[i].mul(factor), tree)
  return tree


def assert_is_oracle(gradient, state, tree, tau=TAU, **options):
  want = oracle.gaf(list(tree.values()), tau, **options)
  assert want.margin > 1e-5
  np.testing.assert_array_equal(state.accepted, want.accepted)
  np.testing.assert_allclose(state.distances, want.distances, atol=1e-5)
  for name, y in zip(tree, want.gradient):
    x = gradient[name]
    assert x.dtype == tree[name].dtype
    scale = max(np.max(np.abs(y), initial=0), 1)
    atol = 2e-2 if x.dtype == jnp.bfloat16 else 2e-6
    np.testing.assert_allclose(oracle.wide(x) / scale, y / scale, atol=atol)


def update(tree, **options):
  k = len(jax.tree.leaves(tree)[0])
  tx = gaf_optax.gaf(TAU, num_microbatches=k, **options)
  params = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), tree)
  return jax.jit(tx.update)(tree, tx.init(params))


@pytest.mark.parametrize("k, bad", [(2, False), (8, False), (8, True), (12, True)])
def test_a_stack(platform, k, bad):
  tree = stack(k, seed=k, bad=bad)
  assert_is_oracle(*update(tree), tree)


def test_many_rows(platform):
  tree = stack(40, shapes={"w": ((64, 128), jnp.float32), "b": ((9,), jnp.float32)})
  assert_is_oracle(*update(tree), tree)


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("k", [6, 12])
def test_an_anchor(platform, k, bad):
  """Its row is a block of its own; two steps, so that there is something in it."""
  trees = [stack(k), stack(k, bad=bad)]
  for tree in trees:
    del tree["half_precision"]  # As the anchor of such a leaf is, too.
  options = dict(anchor_decay=0.5, num_microbatches=k)
  tx = gaf_optax.gaf(TAU, **options)
  params = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), trees[0])
  state = tx.init(params)
  for tree in trees:
    gradient, state = jax.jit(tx.update)(tree, state)
  first = [oracle.wide(x).mean(0) for x in jax.tree.leaves(trees[0])]
  v = oracle.vectors([x[None] for x in first])[0]
  rows = oracle.vectors(jax.tree.leaves(trees[1]))
  with np.errstate(invalid="ignore"):
    distances = [oracle.distance(v, row) for row in rows]
  expected = np.where(np.isfinite(rows).all(1), distances, np.nan)
  assert np.nanmin(expected) < 0.5  # Random vectors would all be at about 1.
  np.testing.assert_allclose(state.distances, expected, atol=1e-5)
  assert np.isfinite(jax.tree.leaves(gradient)[0]).all()


@pytest.mark.parametrize("form", [forms.streamed, forms.scanned])
def test_streamed(platform, form):
  tree = stack(6, seed=5, bad=True)
  del tree["complex"]  # The loss of the form is linear and real.
  result = form(tree, TAU)
  want = oracle.gaf(list(tree.values()), TAU)
  np.testing.assert_allclose(result.weights.ravel(), want.weights, atol=1e-6)
  np.testing.assert_allclose(result.distances.ravel(), want.distances, atol=1e-5)


@pytest.mark.parametrize("how", ["vmap", (AxisType.Auto, True)], ids=across.name)
def test_a_small_tree_across_devices(platform, how):
  """Its slices are a single tile, in which XLA's maximum over two axes lost a NaN."""
  shapes = {"w": ((5, 7), jnp.float32), "b": ((17,), jnp.float32)}
  tree = stack(8, seed=1, bad=True, shapes=shapes)
  tx = gaf_optax.gaf(TAU, axis_name="data", num_microbatches=8)
  run = lambda mine: tx.update(mine, tx.init(jax.tree.map(jnp.zeros_like, mine)))
  gradient, state = jax.tree.map(lambda x: x[0], across.mapped(run, tree, how))
  assert_is_oracle(gradient, state, tree)


@pytest.mark.parametrize("groups", [None, "leaf"])
@pytest.mark.parametrize("how", ["vmap", (AxisType.Auto, True)], ids=across.name)
@pytest.mark.parametrize("bad", [False, True])
def test_across_devices(platform, how, groups, bad, monkeypatch):
  """In the order of tiles on TPU, in several parts, one leaf cut into two."""
  monkeypatch.setattr(_exchange, "_MIN_BUCKET", 20_000)
  shapes = {
    "tiles": ((16, 256), jnp.float32),
    "large": ((128, 128), jnp.float32),
    "odd": ((11, 13), jnp.float32),
    "half_precision": ((24, 384), jnp.bfloat16),
  }
  tree = stack(8, seed=3, bad=bad, shapes=shapes)
  tx = gaf_optax.gaf(
    TAU,
    axis_name="data",
    groups=groups,
    rule=rules.most_neighbors(),
    num_microbatches=8,
  )

  def run(micro_grads):
    params = jax.tree.map(jnp.zeros_like, micro_grads)
    return tx.update(micro_grads, tx.init(params), params)

  gradient, state = jax.tree.map(lambda x: x[0], across.mapped(run, tree, how))
  if groups is None:
    assert_is_oracle(gradient, state, tree, rule="most_neighbors")
    return
  for name, x in tree.items():
    want = oracle.gaf([x], TAU, rule="most_neighbors").gradient[0]
    scale = max(np.max(np.abs(want)), 1)
    atol = 2e-2 if x.dtype == jnp.bfloat16 else 2e-6
    np.testing.assert_allclose(
      oracle.wide(gradient[name]) / scale, want / scale, atol=atol
    )
