"""Kernels: inner products and weighted means against NumPy float64."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gaf_optax
import known_steps
import oracle
from gaf_optax import _kernels

EPS = np.finfo(np.float32).eps

# XLA cannot compile float16 conversions for CPUs without F16C, which .ci/run tests.
HAS_FLOAT16 = "xla_cpu_max_isa=SSE4_2" not in os.environ.get("XLA_FLAGS", "")
FLOAT16 = pytest.param(
  "float16", marks=pytest.mark.skipif(not HAS_FLOAT16, reason="no float16 without F16C")
)


def apart(leaves):
  """The Gram matrix of each leaf, and which rows are finite."""
  return _kernels.gram(_kernels.Stack(leaves, range(len(leaves)), len(leaves)))


def of_vectors(v):
  v = np.where(np.isfinite(v).all(1, keepdims=True), v, 0)
  return v @ v.T


@pytest.mark.parametrize("k", [1, 5, 33])
def test_sizes_below_at_and_above_a_block(k):
  block = _kernels._BLOCK
  sizes = [1, 17, 257, block - 1, block, 2 * block - 1, 2 * block, 4 * block + 1]
  leaves = [
    jnp.asarray(known_steps.draw(n, k, n, common=0.3), jnp.float32) for n in sizes
  ]
  grams, finite = jax.jit(apart)(leaves)
  assert finite.all()
  for gram, x in zip(grams, leaves):
    want = of_vectors(oracle.vectors([x]))
    np.testing.assert_allclose(gram, want, rtol=0, atol=1e-5 * want.max())


SHAPES = [(), (1,), (17,), (5, 7), (1000,), (3, 4, 1500)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", FLOAT16, "complex64"])
def test_shapes_dtypes_and_groups(dtype):
  """Small leaves are joined within their group; one group is not compared."""
  rng = np.random.default_rng(0)
  leaves = [known_steps.draw(i, 4, *shape) for i, shape in enumerate(2 * SHAPES)]
  if dtype == "complex64":
    leaves = [x + 1j * rng.standard_normal(x.shape) for x in leaves]
  leaves = [jnp.asarray(x).astype(dtype) for x in leaves]
  group_ids = rng.permutation([0, 1, 2] * 4)
  grams, finite = jax.jit(lambda x: _kernels.gram(_kernels.Stack(x, group_ids, 2)))(
    leaves
  )
  assert finite.all() and grams.dtype == jnp.float32
  for group, gram in enumerate(grams):
    v = oracle.vectors([x for x, g in zip(leaves, group_ids) if g == group])
    want = of_vectors(v)
    np.testing.assert_allclose(gram, want, rtol=0, atol=1e-6 * want.max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_one_value_that_is_not_finite(dtype):
  """It is found in leaves of any length, with and without a group, also under vmap."""
  values = [np.nan, -np.inf, np.inf, 1e18, 3e19]  # The square of 3e19 overflows.
  want = [False, False, False, True, False]
  clean = [jnp.ones((len(values), *shape), dtype) for shape in 2 * SHAPES]
  # The second half has no group.
  ids = [0] * len(SHAPES) + [1] * len(SHAPES)
  run = lambda leaves: _kernels.gram(_kernels.Stack(leaves, ids))
  # One leaf at a time has the values, at a random place.
  run, mapped = jax.jit(run), jax.jit(jax.vmap(run))
  rng, cases = np.random.default_rng(11), []
  for i, x in enumerate(clean):
    flat = x.reshape(len(values), -1)
    flat = flat.at[:, rng.integers(flat.shape[1])].set(jnp.asarray(values, dtype))
    leaves = [*clean[:i], flat.reshape(x.shape), *clean[i + 1 :]]
    gram, finite = run(leaves)
    np.testing.assert_array_equal(finite, want)
    assert np.isfinite(gram).all() and not gram[0, ~finite].any()
    cases.append(leaves)
  if dtype == "float32":
    gram, finite = mapped(jax.tree.map(lambda *x: jnp.stack(x), *cases))
    np.testing.assert_array_equal(finite, [want] * len(cases))
    assert np.isfinite(gram).all()


def test_what_counts_as_not_finite_and_as_zero():
  """By the diagonal: infinite in any group, or too small in its own."""
  info = np.finfo(np.float32)
  least = float(info.tiny / info.eps)
  square = np.array([[1, 4, least, least / 2, 0, 1], [1, np.inf, 1, 1, 1, np.nan]])
  root = np.sqrt(np.nan_to_num(square, posinf=9, nan=9))
  matrix = (root[:, :, None] * root[:, None, :]).astype(np.float32)
  for one, diagonal in zip(matrix, square):
    np.fill_diagonal(one, diagonal)
  matrix[0, 2, 2] = np.float32(least)
  found, finite = _kernels.cleaned(jnp.asarray(matrix), jnp.arange(6) != 0)
  np.testing.assert_array_equal(finite, [False, False, True, True, True, False])
  kept = np.array([[0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0]], bool)
  want = np.where(kept[:, :, None] & kept[:, None, :], matrix, 0)
  np.testing.assert_array_equal(found, want)


def long_rows(size):
  """Equal, uniform and normal values: rounding errors of one sign, and of both."""
  rng = np.random.default_rng(size)
  uniform, normal = (
    f(size, dtype=np.float32) for f in (rng.random, rng.standard_normal)
  )
  return np.stack([np.full(size, 0.8083, np.float32), uniform, normal])


@pytest.mark.usefixtures("compiled_as_users_do")
def test_squared_norms_of_long_rows_do_not_drift():
  """A relative error of at most 2e-5, for any signs and sizes."""
  rows = [long_rows(size) for size in (1_000, 30_000, 3_000_000)]
  kinds = [("float32", 0.8083), ("bfloat16", 0.8083), ("float16", 0.7)]
  for dtype, equal in kinds if HAS_FLOAT16 else kinds[:2]:
    for x in rows:
      x[0] = equal  # A value with nearly the largest rounding error in this dtype.
    leaves = [jnp.asarray(x).astype(dtype) for x in rows]
    grams, _ = jax.jit(apart).lower(leaves).compile()(leaves)
    for gram, x in zip(grams, leaves):
      for square, row in zip(np.diagonal(gram), x):
        row = np.asarray(row).astype(np.float64)
        np.testing.assert_allclose(square, np.dot(row, row), rtol=2e-5)


@pytest.mark.usefixtures("compiled_as_users_do")
def test_cosines_of_equal_and_opposite_rows_are_exact():
  """Up to 8 epsilons, which decisions treat as rounding."""
  leaves = []
  for dtype in ("float32", "bfloat16"):
    for size in (3, 1_000, 5_000, 300_007):
      _, uniform, normal = jnp.asarray(long_rows(size)).astype(dtype)
      leaves.append(jnp.stack([normal, normal, -normal, uniform, -uniform, uniform]))
  grams, _ = jax.jit(apart).lower(leaves).compile()(leaves)
  sign = np.array([1, 1, -1, 1, -1, 1])
  for gram in np.asarray(grams, np.float64):
    norms = np.sqrt(np.diagonal(gram))
    cosines = gram / norms / norms[:, None]
    for part in (slice(3), slice(3, 6)):
      want = np.outer(sign[part], sign[part])
      np.testing.assert_allclose(cosines[part, part], want, rtol=0, atol=8 * EPS)


def test_an_embedding_comes_before_the_products():
  x = jnp.asarray(known_steps.draw(0, 3, 40), jnp.float32)
  leaves = [x, x.at[1, 2].set(jnp.inf)[:, :5]]
  run = jax.jit(
    lambda leaves: _kernels.gram(_kernels.Stack(leaves, [0, 0], 1, jnp.sign))
  )
  grams, finite = run(leaves)
  v = np.sign(np.concatenate(leaves, axis=1, dtype=np.float64))
  v[1] = 0  # The sign of infinity is finite, but the row is not.
  np.testing.assert_array_equal(finite, [True, False, True])
  np.testing.assert_allclose(grams[0], v @ v.T)


def test_products_of_a_vector_and_rows():
  """The vector's dtype differs, as an anchor's does; with groups and blocks."""
  sizes = [3, 5_000, 1, 40, 300]
  group_ids = [0, 1, 1, 0, 2]
  vector = [jnp.asarray(known_steps.draw(n, 1, n)[0], jnp.float32) for n in sizes]
  rows = [jnp.asarray(known_steps.draw(n + 1, 3, n)) for n in sizes]
  rows = [x.astype("bfloat16" if i % 2 else "float32") for i, x in enumerate(rows)]
  run = jax.jit(lambda v, x: _kernels.dots(v, _kernels.Stack(x, group_ids, 2)))
  squares, products = run(vector, rows)
  for group in range(2):
    own = [i for i, g in enumerate(group_ids) if g == group]
    v = oracle.vectors([vector[i][None] for i in own])[0]
    x = oracle.vectors([rows[i] for i in own])
    np.testing.assert_allclose(squares[group], v @ v, rtol=1e-5)
    np.testing.assert_allclose(products[group], x @ v, rtol=0, atol=1e-5 * (v @ v))


MEAN_SHAPES = [(), (5,), (3, 4), (0,), (5000,), (7, 1000), (2,)]


@functools.partial(jax.jit, static_argnums=(1, 3))
def mean(arrays, group_ids, weights, dtypes=None):
  return _kernels.weighted_means(_kernels.Stack(arrays, group_ids), weights, dtypes)


@pytest.mark.parametrize("k", [1, 2, 37])
def test_weighted_means(k):
  """Two groups, and weights of either sign."""
  group_ids = (0, 0, 1, 1, 0, 1, 1)
  weights = known_steps.draw(k, 2, k)
  leaves = [known_steps.draw(i, k, *shape) for i, shape in enumerate(MEAN_SHAPES)]
  arrays = [jnp.asarray(x, jnp.float32) for x in leaves]
  means = mean(arrays, group_ids, jnp.asarray(weights, jnp.float32))
  for found, x, group in zip(means, leaves, group_ids):
    assert found.shape == x.shape[1:]
    np.testing.assert_allclose(found, np.tensordot(weights[group], x, 1), atol=2e-5)


@pytest.mark.parametrize("dtype", [FLOAT16, "bfloat16", "float32", "complex64"])
def test_weighted_means_keep_dtypes_and_leave_out_rows_of_weight_0(dtype):
  step = {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(dtype, 2.0**-20)
  weights = (
    jnp.full((1, 20), 1 / 16, jnp.float32).at[0, jnp.array([0, 7, 8, 19])].set(0)
  )
  for bad in (0, np.nan, np.inf):
    leaves = []
    for shape in MEAN_SHAPES:
      x = jnp.full((20, *shape), 1 + step, dtype)
      leaves.append(
        jnp.where(
          (weights[0] == 0).reshape(-1, *[1] * len(shape)), jnp.asarray(bad, dtype), x
        )
      )
    for found, x in zip(mean(leaves, (0,) * len(leaves), weights), leaves):
      assert found.dtype == dtype and found.shape == x.shape[1:]
      np.testing.assert_array_equal(found, np.full(found.shape, 1 + step, dtype))


def test_dtype_of_a_mean_can_be_chosen():
  x = jnp.full((2, 2), 1 + 2**-7, jnp.bfloat16)
  (got,) = mean([x], (0,), jnp.array([[0.25, 0.75]]), (np.dtype("float32"),))
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got, np.full(2, 1 + 2**-7))


@pytest.mark.usefixtures("compiled_as_users_do")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_temporary_memory_is_one_gradient(dtype):
  """In float32, in which means are summed; from the compiled program."""
  k, shapes = 8, {"a": (256, 512), "b": (100, 300), "c": (512,)}
  params = {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}
  stack = {name: jnp.zeros((k, *shape), dtype) for name, shape in shapes.items()}
  tx = gaf_optax.gaf()
  compiled = jax.jit(tx.update).lower(stack, tx.init(params), params).compile()
  size = 4 * sum(x.size for x in params.values())
  most = 1.2 * size
  if dtype == "bfloat16" and jax.__version_info__ < (0, 11):
    most += k * size  # The bits of the stack, for each of two loops.
  assert compiled.memory_analysis().temp_size_in_bytes <= most
