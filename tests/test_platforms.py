"""The branches for TPU and GPU, run on the CPU against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import device_mappings
import gaf_optax
import oracle
import reference_forms
from gaf_optax import _exchange

TAU = 0.8
BAD = {0: np.nan, 1: np.inf, 2: 0.0, 3: 1e15, 4: 1e-15}


@pytest.fixture(params=["tpu", "cuda"])
def platform(request, monkeypatch):
  def branch(*args, default=None, **by_platform):
    return by_platform.get(request.param, default)(*args)

  monkeypatch.setattr(jax.lax, "platform_dependent", branch)
  jax.clear_caches()  # Drops functions that were traced for the CPU.
  yield request.param
  jax.clear_caches()


def bad_stack(k, shapes, seed=0):
  tree = device_mappings.stack(k, shapes, seed)
  with np.errstate(over="ignore", invalid="ignore"):
    for x in tree.values():
      for i, factor in BAD.items():
        x[i] *= np.asarray(factor, x.dtype)
  return tree


def assert_is_oracle(found, tree, **options):
  gradient, state = found
  want = oracle.gaf(list(tree.values()), TAU, **options)
  assert want.margin > 1e-5 and want.agreed
  np.testing.assert_array_equal(state.accepted, want.accepted)
  found = reference_forms.compared(state.distances)
  np.testing.assert_allclose(found, want.distances, atol=1e-5)
  for name, y in zip(tree, want.gradient):
    x = gradient[name]
    assert x.dtype == tree[name].dtype and x.shape == y.shape
    scale = max(np.max(np.abs(y), initial=0), 1)
    atol = 2e-2 if x.dtype == jnp.bfloat16 else 2e-6
    np.testing.assert_allclose(oracle.wide(x) / scale, y / scale, atol=atol)


def test_stacks(platform):
  """Leaves of whole tiles, half tiles and neither; short and empty leaves.

  The second filter has an elementwise function that hides infinities.
  """
  shapes = {
    "tiles": (2, 16, 128),
    "half": (3, 96, 64),
    "odd": (33, 131),
    "short": (5, 7),
    "scalar": (),
    "empty": (0, 3),
    "half_precision": ((33, 128), jnp.bfloat16),
  }
  k = 9
  tree = bad_stack(k, shapes | {"complex": ((4, 8, 128), np.complex64)})
  real = {name: x for name, x in tree.items() if name != "complex"}

  @jax.jit
  def run(tree):
    plain = gaf_optax.gaf(TAU, num_microbatches=k)
    signs = gaf_optax.gaf(TAU, num_microbatches=k, embed=jnp.sign)
    params = device_mappings.params_of(tree)
    real = {name: x for name, x in tree.items() if name != "complex"}
    return plain.update(tree, plain.init(params)), signs.update(
      real, signs.init({name: params[name] for name in real})
    )

  plain, signs = run(tree)
  assert_is_oracle(plain, tree)
  assert_is_oracle(signs, real, embed=np.sign)


def test_an_anchor(platform):
  """Two steps, so that the anchor is not empty."""
  k = 6
  shapes = {"long": (130, 131), "short": (5, 7)}
  trees = [device_mappings.stack(k, shapes), bad_stack(k, shapes)]
  tx = gaf_optax.gaf(TAU, anchor_decay=0.5, num_microbatches=k)
  state = tx.init(device_mappings.params_of(trees[0]))
  update = jax.jit(tx.update)
  for tree in trees:
    gradient, state = update(tree, state)
  first = [oracle.wide(x).mean(0) for x in trees[0].values()]
  v = oracle.vectors([x[None] for x in first])[0]
  rows = oracle.vectors(list(trees[1].values()))
  with np.errstate(invalid="ignore"):
    distances = [oracle.distance(v, row) for row in rows]
  expected = np.where(np.isfinite(rows).all(1), distances, -1)
  assert 0 <= np.min(expected[2:]) < 0.5  # Random vectors would be near 1.
  np.testing.assert_allclose(state.distances, expected, atol=1e-5)
  assert np.isfinite(gradient["long"]).all()


def test_across_devices(platform, monkeypatch):
  """Several exchanges, on TPU in the order of its tiles."""
  monkeypatch.setattr(_exchange, "_BUCKET", 80_000)
  shapes = {
    "tiles": (16, 256),
    "large": (3, 64, 128),
    "odd": (11, 13),
    "half_precision": ((24, 384), jnp.bfloat16),
  }
  tree = bad_stack(8, shapes, seed=3)
  tx = gaf_optax.gaf(TAU, axis_name="data", num_microbatches=8)
  run = lambda mine: tx.update(mine, tx.init(jax.tree.map(jnp.zeros_like, mine)))
  found = device_mappings.mapped(run, tree, (AxisType.Auto, True))
  assert_is_oracle(jax.tree.map(lambda x: x[0], found), tree)
