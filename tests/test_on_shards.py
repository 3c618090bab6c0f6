"""`on_shards`: every form gives the same on a mesh of Auto axes as on one device."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import device_mappings
import gaf_optax

with warnings.catch_warnings():
  # The oldest supported Flax uses a name that the oldest supported JAX deprecates.
  warnings.simplefilter("ignore", DeprecationWarning)
  from flax import linen as nn

SHAPES = {"w": (8, 3), "v": {"b": (16,), "s": ()}}
SPECS = {"w": P("data"), "v": {"b": P("data"), "s": P()}}
K = 4


def tree(seed, *lead):
  shape = lambda node: isinstance(node, tuple)
  counter = iter(range(seed, seed + 9))
  rng = np.random.default_rng
  draw = lambda s: jnp.asarray(
    rng(next(counter)).standard_normal((*lead, *s)), jnp.float32
  )
  return jax.tree.map(draw, SHAPES, is_leaf=shape)


def stacks():
  """Two steps with a common direction, and one micro-gradient against it."""
  common = tree(50)
  signs = np.array([1, 1, -1, 1], np.float32)
  side = lambda x: jnp.asarray(signs.reshape(-1, *[1] * x.ndim))
  return [
    jax.tree.map(lambda c, x: side(c) * 3 * c[None] + x, common, tree(seed, K))
    for seed in (0, 20)
  ]


def of_shapes(shapes):
  n = 8
  return jax.tree.map(
    lambda x: P("data") if x.ndim and x.shape[0] % n == 0 else P(), shapes
  )


FORMS = {
  "gaf": lambda **axes: gaf_optax.gaf(0.9, num_microbatches=K, **axes),
  "memory": lambda **axes: gaf_optax.gaf(
    0.9, num_microbatches=K, memory_decay=0.5, max_norm_ratio=1.2, **axes
  ),
  "anchor": lambda **axes: gaf_optax.gaf(0.9, anchor_decay=0.5, **axes),
  "apply_if_agreed": lambda **axes: gaf_optax.apply_if_agreed(
    optax.sgd(0.1, 0.9), 0.9, groups="leaf", **axes
  ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("specs", [SPECS, of_shapes], ids=["tree", "function"])
def test_stacks(form, specs):
  mesh, params = device_mappings.mesh(), tree(90)
  plain = FORMS[form]()
  tx = gaf_optax.on_shards(FORMS[form](param_axes=SPECS), mesh, specs)
  place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  sharded = jax.tree.map(place, params, SPECS)
  want_state, state = plain.init(params), tx.init(sharded)
  weights = [1.0, 2.0, 1.0, 0.0]
  for stack in stacks():
    want, want_state = jax.jit(plain.update)(
      stack, want_state, params, microbatch_weights=weights
    )
    got, state = jax.jit(tx.update)(stack, state, sharded, microbatch_weights=weights)
    for a, b in zip(jax.tree.leaves((got, state)), jax.tree.leaves((want, want_state))):
      np.testing.assert_allclose(a, b, atol=1e-5)
    assert got["w"].sharding.spec == P("data")


@pytest.mark.parametrize("boxed", [False, True], ids=["plain", "boxed"])
def test_micro_gradients_over_one_axis_and_parameters_over_another(boxed):
  """Tensor parallelism; the tree contains Flax's boxes of `nn.with_partitioning`."""
  mesh = jax.make_mesh(
    (K, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  specs = {"w": P("model"), "v": {"b": P("model"), "s": P()}}
  options = dict(num_microbatches=K, memory_decay=0.5, rule=gaf_optax.rules.majority())
  plain = optax.chain(gaf_optax.gaf(0.9, **options), optax.sgd(0.1, 0.9))
  tx = optax.chain(
    gaf_optax.on_shards(
      gaf_optax.gaf(0.9, axis_name="data", stacked=True, param_axes="model", **options),
      mesh,
      specs,
      lead=("data",),
    ),
    optax.sgd(0.1, 0.9),
  )

  def place(tree, *lead):
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, P(*lead, *spec)))
    placed = jax.tree.map(put, tree, specs)
    if not boxed:
      return placed
    box = lambda x, spec: nn.Partitioned(x, tuple(spec))
    return jax.tree.map(box, placed, specs)

  params = tree(90)
  sharded = place(params)
  want_state, state = plain.init(params), tx.init(sharded)
  for stack in stacks():
    want, want_state = jax.jit(plain.update)(stack, want_state, params)
    got, state = jax.jit(tx.update)(place(stack, "data"), state, sharded)
    for a, b in zip(jax.tree.leaves((got, state)), jax.tree.leaves((want, want_state))):
      np.testing.assert_allclose(a, b, atol=1e-5)
  assert not bool(jnp.all(state[0].accepted))


def test_one_at_a_time_and_a_prefix():
  mesh = device_mappings.mesh()
  params = {"w": jnp.zeros((8, 3)), "b": None}
  make = lambda **axes: gaf_optax.multi_steps(optax.sgd(1.0), 2, 0.9, **axes)
  tx = gaf_optax.on_shards(make(param_axes="data"), mesh, P("data"), lead=())
  plain, (stack, _) = make(), stacks()
  rows = [{"w": stack["w"][i], "b": None} for i in (0, 1)]
  want_state, state = plain.init(params), tx.init(params)
  for row in rows:
    want, want_state = plain.update(row, want_state, params)
    got, state = jax.jit(tx.update)(row, state)
  np.testing.assert_allclose(got["w"], want["w"], rtol=1e-5)
  assert np.any(want["w"]) and got["b"] is None


def test_errors():
  mesh, tx = device_mappings.mesh(), gaf_optax.gaf(0.9, param_axes="data")
  params = tree(0)
  for bad, words in [
    ({"w": P("data")}, r"specs holds no PartitionSpec for leaf \['v'\]"),
    ({"w": P("model"), "v": P()}, "must be one of 'data', got 'model'"),
    ({"w": "data", "v": P()}, r"must hold PartitionSpecs, got 'data' at \['w'\]"),
  ]:
    wrong = gaf_optax.on_shards(tx, mesh, bad)
    with pytest.raises(ValueError, match=words):
      wrong.update(tree(0, K), wrong.init(params), params)
  with pytest.raises(ValueError, match="mesh must be"):
    gaf_optax.on_shards(tx, "data", P())
  with pytest.raises(ValueError, match="lead must be a tuple"):
    gaf_optax.on_shards(tx, mesh, P(), lead=None)
