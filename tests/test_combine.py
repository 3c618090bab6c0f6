"""Combine: weighted means that never touch a row of weight zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaf_optax import _combine


@pytest.mark.parametrize("k", [1, 2, 7, 8, 9, 16, 37])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (0,)])
def test_against_numpy(k, shape):
  rng = np.random.default_rng(k)
  x, w = rng.standard_normal((k, *shape)), rng.standard_normal(k)
  got = _combine.weighted_mean(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32))
  np.testing.assert_allclose(got, np.tensordot(w, x, 1), atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_of_weight_zero_do_not_leak(bad):
  x = np.ones((20, 3), np.float32)
  x[[0, 7, 8, 19]] = bad
  w = np.where(np.isfinite(x[:, 0]), 0.5, 0)
  got = jax.jit(_combine.weighted_mean)(jnp.asarray(x), jnp.asarray(w, jnp.float32))
  np.testing.assert_array_equal(got, [8, 8, 8])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_dtypes(dtype):
  x = jnp.full((32, 2), 3, dtype)
  got = _combine.weighted_mean(x, jnp.full((32,), 1 / 32, jnp.float32))
  assert got.dtype == dtype
  np.testing.assert_array_equal(got, np.full(2, 3, dtype))


def test_dtype_of_the_result_can_be_chosen():
  x = jnp.full((2, 2), 1 + 2**-7, jnp.bfloat16)
  got = _combine.weighted_mean(x, jnp.array([0.25, 0.75]), jnp.float32)
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got, np.full(2, 1 + 2**-7))


def test_normalized():
  w = jnp.array([[1.0, 3.0], [0.0, 0.0], [2.0, -1.0]])
  np.testing.assert_array_equal(_combine.normalized(w), [[0.25, 0.75], [0, 0], [2, -1]])


def test_rounding_does_not_overflow():
  top = np.finfo(np.float32).max
  w = _combine.normalized(jnp.ones(10))
  got = _combine.weighted_mean(jnp.full((10, 1), top), w)
  np.testing.assert_allclose(got, [top], rtol=1e-6)


@pytest.mark.usefixtures("compiled_as_users_do")
@pytest.mark.parametrize("k", [4, 32])
def test_needs_no_copy_of_the_micro_gradients(k):
  x = jnp.zeros((k, 512, 512))
  compiled = jax.jit(_combine.weighted_mean).lower(x, jnp.ones(k)).compile()
  assert compiled.memory_analysis().temp_size_in_bytes <= 1.1 * x.nbytes / k
