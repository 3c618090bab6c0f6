"""Gram: inner products against NumPy float64, for every layout of the rows."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
from gaf_optax import _kernels


def dense(gram, group=0):
  """The true inner products, float64 (they may span 1e-60 to 1e60)."""
  scale = 2.0 ** np.asarray(gram.exponents[group], np.float64)
  scale = np.where(np.asarray(gram.exponents[group]) < -2000, 0, scale)
  return np.asarray(gram.products[group], np.float64) * scale[:, None] * scale


def skip_where_xla_has_no(dtype):
  if "xla_cpu_max_isa=SSE4_2" in os.environ.get("XLA_FLAGS", ""):
    if dtype in ("float16", "float8_e4m3fn"):  # The latter is converted by way of it.
      pytest.skip("XLA compiles no conversion to float16 without F16C")


def draw(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("size", [1, 17, 257, 20_000, 70_001])
@pytest.mark.parametrize("k", [1, 2, 5, 33])
def test_sizes_below_at_and_above_a_block(size, k):
  x = draw(0, k, size)
  gram, finite = jax.jit(lambda x: _kernels.gram([(x,)], [0], 1))(
    jnp.asarray(x, jnp.float32)
  )
  x = np.asarray(x, np.float32).astype(np.float64)
  np.testing.assert_allclose(dense(gram), x @ x.T, atol=2e-6 * size)
  assert finite.all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
@pytest.mark.parametrize("split", [[2], [1, 1], [1, 2], [4], [9]])
def test_few_long_rows(split, dtype):
  """Which may be added up by pairs: of blocks, and of any dtype."""
  x = draw(6, sum(split), 40_001) + draw(7, 40_001)
  if dtype == "complex64":
    x = x + 1j * draw(8, *x.shape)
  x = jnp.asarray(x).astype(dtype)
  blocks = tuple(jnp.split(x, np.cumsum(split)[:-1]))
  gram, finite = jax.jit(lambda blocks: _kernels.gram([blocks], [0], 1))(blocks)
  v = oracle.vectors([x])
  assert finite.all()
  np.testing.assert_allclose(dense(gram), v @ v.T, rtol=0, atol=5e-6 * (v @ v.T).max())


@pytest.mark.parametrize("kind", ["equal", "uniform"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("k, size", [(2, 1_000), (2, 300_007), (9, 1_000), (9, 40_001)])
def test_sums_of_positive_values_do_not_drift(k, size, dtype, kind):
  """Whose rounding errors may all point one way; on a CPU of any vector width."""
  skip_where_xla_has_no(dtype)
  # Of 0.7 in float16 and of 0.8083 in float32 errors are nearly the largest possible.
  values = {"equal": np.full((k, size), 0.8083), "uniform": abs(draw(9, k, size))}[kind]
  if dtype == "float16" and kind == "equal":
    values[:] = 0.7
  x = jnp.asarray(values).astype(dtype)
  gram, _ = jax.jit(lambda x: _kernels.gram([(x,)], [0], 1))(x)
  v = oracle.vectors([x])
  np.testing.assert_allclose(dense(gram), v @ v.T, rtol=2e-6)


def test_sums_over_many_leaves_do_not_drift():
  x = jnp.full((2, 8), 0.8083)
  one = _kernels.gram([(x,)], [0], 1)[0].products[0]
  total = _kernels._pairwise_sum([one] * 600)
  v = oracle.vectors([x] * 600)
  np.testing.assert_allclose(total, v @ v.T, rtol=2e-6)


@pytest.mark.parametrize("split", [(1, 1), (1, 4), (2, 3)])
@pytest.mark.parametrize("scale", [1.0, 1e25])
def test_rows_in_blocks(split, scale):
  """An anchor and a stack, or two vectors, are the rows of one matrix."""
  x = (scale * draw(1, sum(split), 3, 4)).astype(np.float32)
  blocks = tuple(jnp.asarray(b) for b in np.split(x, [split[0]]))
  gram, _ = _kernels.gram([blocks], [0], 1)
  v = oracle.vectors([x])
  np.testing.assert_allclose(dense(gram) / scale**2, v @ v.T / scale**2, atol=1e-5)


def test_blocks_of_different_dtypes():
  a, b = draw(2, 1, 50).astype(np.float32), draw(3, 3, 50)
  b = jnp.asarray(b).astype(jnp.bfloat16)
  gram, _ = _kernels.gram([(jnp.asarray(a), b)], [0], 1)
  v = np.concatenate([a, np.asarray(b, np.float32)]).astype(np.float64)
  np.testing.assert_allclose(dense(gram), v @ v.T, rtol=1e-5, atol=1e-5)


def test_groups_and_leaves_outside_them():
  leaves = [jnp.asarray(draw(s, 3, 4), jnp.float32) for s in range(4)]
  leaves[3] = leaves[3].at[1, 2].set(jnp.nan)
  gram, finite = _kernels.gram([(x,) for x in leaves], [0, 1, 0, 2], 2)
  np.testing.assert_array_equal(finite, [True, False, True])
  clean = [np.where(np.asarray(finite)[:, None], x, 0) for x in leaves]
  for group, members in enumerate([[0, 2], [1]]):
    v = oracle.vectors([clean[i] for i in members])
    np.testing.assert_allclose(dense(gram, group), v @ v.T, atol=1e-5)


@pytest.mark.parametrize("mapped", [False, True], ids=["alone", "vmap"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
@pytest.mark.parametrize("shape", [(), (1,), (17,), (5, 7), (1000,), (3, 4, 1500)])
def test_one_value_that_is_not_finite(shape, dtype, mapped):
  """Is found in a row of any length; XLA's maximum on CPU loses NaN in long ones."""
  values = [np.nan, -np.inf, np.inf, 1e19, -1e19]  # The square of the last overflows.
  place = np.random.default_rng(11).integers(max(1, np.prod(shape, dtype=int)))
  x = jnp.asarray(draw(10, len(values), *shape)).astype(dtype).reshape(len(values), -1)
  x = x.at[:, place].set(jnp.asarray(values, dtype)).reshape(-1, *shape)
  clean = jnp.ones_like(x)

  def finite(x, clean):
    compared = _kernels.gram([(x,), (clean,)], [0, 0], 1)[1]
    beside = _kernels.gram([(x,), (clean,)], [1, 0], 1)[1]
    return compared, beside

  if mapped:
    x, clean = jax.tree.map(lambda x: jnp.stack([x] * 8), (x, clean))
    finite = jax.vmap(finite)
  for found in jax.jit(finite)(x, clean):
    want = np.broadcast_to([False, False, False, True, True], found.shape)
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float8_e4m3fn"])
def test_both_forms_are_the_same(dtype):
  """The rescaled form, which one bad row calls for, keeps all other products."""
  skip_where_xla_has_no(dtype)
  x = jnp.asarray(draw(4, 4, 500)).astype(dtype)
  usual, _ = _kernels.gram([(x,)], [0], 1)
  bad = jnp.concatenate([x, jnp.full((1, 500), jnp.nan, dtype)])
  rescaled, finite = _kernels.gram([(bad,)], [0], 1)
  assert np.asarray(rescaled.exponents).any(), "the case took the usual form"
  np.testing.assert_array_equal(finite, [True] * 4 + [False])
  np.testing.assert_allclose(
    dense(rescaled)[:4, :4], dense(usual), rtol=1e-5, atol=1e-3
  )
  np.testing.assert_array_equal(dense(rescaled)[4], 0)


def test_ends_of_the_floating_range():
  info = np.finfo(np.float32)
  rows = np.array([[info.max, -info.max], [info.tiny, info.tiny], [1, 0], [0, 0]])
  gram, finite = _kernels.gram([(jnp.asarray(rows, jnp.float32),)], [0], 1)
  assert finite.all()
  np.testing.assert_allclose(dense(gram), rows @ rows.T, rtol=1e-6)


@pytest.mark.parametrize("spread", [0, 10, 25])
def test_scaled_matrix_has_largest_norm_1(spread):
  rows = draw(5, 4, 6) * 10.0 ** np.array([[-spread], [0], [spread], [1]])
  rows[1] = 0
  gram, _ = _kernels.gram([(jnp.asarray(rows, jnp.float32),)], [0], 1)
  matrix = np.asarray(jax.tree.map(lambda x: x[0], gram).scaled())
  unit = rows / np.linalg.norm(rows, axis=1).max()
  np.testing.assert_allclose(matrix, unit @ unit.T, atol=1e-6)
  assert matrix.max() == pytest.approx(1, abs=1e-6)


def test_all_zero():
  gram, finite = _kernels.gram([(jnp.zeros((3, 4)),)], [0], 1)
  np.testing.assert_array_equal(dense(gram), np.zeros((3, 3)))
  one = jax.tree.map(lambda x: x[0], gram)
  np.testing.assert_array_equal(one.scaled(), np.zeros((3, 3)))
  assert finite.all()


@pytest.mark.usefixtures("compiled_as_users_do")
def test_needs_no_copy_of_the_micro_gradients():
  """Temporary memory, read from the compiled program, of a stack of 8 MB."""
  x = jnp.zeros((8, 512, 512))
  run = jax.jit(lambda x: _kernels.gram([(x,)], [0], 1))
  compiled = run.lower(x).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 0.2 * x.nbytes
