"""Combine: the weighted mean of stacked micro-gradients, without the rejected."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from gaf_optax import _jax_types, _tree

# Micro-gradients that one pass over the result adds up. XLA fuses a written-out sum
# into one loop that streams them; its reduction over a leading axis is slower.
_UNROLL = 8

# Values of a leaf up to which it is one matrix product: fewer instructions to compile,
# and a result that XLA computes once, where parts of it are used in many places.
SMALL = 1 << 14


def normalized(weights: jax.Array) -> jax.Array:
  """Weights `[..., k]` divided by their sum; all zero where the sum is."""
  total = jnp.sum(weights, axis=-1, keepdims=True)
  return jnp.where(total != 0, weights / jnp.where(total != 0, total, 1), 0)


def weighted_mean(leaf: jax.Array, weights: jax.Array, dtype=None) -> jax.Array:
  """Sum of `weights[i] * leaf[i]` over the rows whose weight is not zero.

  Rows of weight zero are left out by selection, so that a NaN in them stays there.

  Args:
    leaf: `[k, *shape]`, floating point or complex.
    weights: float `[k]`, of sum 1 or all zero.
    dtype: of the result; that of the leaf if None.

  Returns:
    `[*shape]`; the sum is kept in at least float32.
  """
  result_dtype = dtype or leaf.dtype
  dtype = _jax_types.accumulator_dtype(leaf.dtype)
  weights = weights.astype(jnp.finfo(dtype).dtype)
  total = lax.platform_dependent(
    leaf,
    weights,
    cpu=functools.partial(_weighted_sum_on_cpu, dtype=dtype),
    default=functools.partial(_weighted_sum, dtype=dtype),
  )
  return without_overflow(total).astype(result_dtype)


def _weighted_sum(leaf, weights, *, dtype):
  if len(leaf) <= _UNROLL:
    return _plus_terms(0, leaf, weights, 0, len(leaf), dtype)
  weights = weights.reshape(-1, *[1] * (leaf.ndim - 1))
  terms = jnp.where(weights != 0, scaled(leaf.astype(dtype), weights), 0)
  return jnp.sum(terms, axis=0)


def _weighted_sum_on_cpu(leaf, weights, *, dtype):
  k = leaf.shape[0]
  if math.prod(leaf.shape[1:]) <= SMALL:
    rows = _tree.flat_rows(leaf).astype(dtype)
    rows = jnp.where(weights[:, None] != 0, rows, 0)
    total = jnp.matmul(weights.astype(dtype), rows, precision=lax.Precision.HIGHEST)
    return total.reshape(leaf.shape[1:])

  def add_block(b, total):
    return _plus_terms(total, leaf, weights, b * _UNROLL, _UNROLL, dtype)

  total = _jax_types.typed_like(jnp.zeros(leaf.shape[1:], dtype), (leaf, weights))
  whole, rest = divmod(k, _UNROLL)
  if whole > 1:
    total = lax.fori_loop(0, whole, add_block, total)
  elif whole:
    total = add_block(0, total)
  return _plus_terms(total, leaf, weights, whole * _UNROLL, rest, dtype)


def _plus_terms(total, leaf, weights, start, number, dtype):
  """The total and the terms of `number` rows, written out."""
  for i in range(number):
    row = lax.dynamic_index_in_dim(leaf, start + i, 0, keepdims=False).astype(dtype)
    weight = lax.dynamic_index_in_dim(weights, start + i, 0, keepdims=False)
    total += jnp.where(weight != 0, scaled(row, weight), 0)
  return total


def scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
  """A real or complex array times a real factor, part by part."""
  if jnp.iscomplexobj(x):
    return lax.complex(scaled(x.real, factor), scaled(x.imag, factor))
  return x * factor.astype(x.dtype)


def without_overflow(mean: jax.Array) -> jax.Array:
  """A mean of finite values, which rounding alone can have carried to infinity."""
  if jnp.iscomplexobj(mean):
    return lax.complex(without_overflow(mean.real), without_overflow(mean.imag))
  top = jnp.finfo(mean.dtype).max
  return jnp.clip(mean, -top, top)
