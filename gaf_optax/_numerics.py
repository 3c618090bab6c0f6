"""Numerics: the dtypes of sums, exact powers of two, and distances."""

import jax
import jax.numpy as jnp

ZERO_EXPONENT = -100_000  # The exponent of a zero vector: below every other.


def accumulator_dtype(dtype) -> jnp.dtype:
  """The dtype in which sums over values of an inexact `dtype` are kept.

  At least 32 bits wide, and complex for complex values.
  """
  dtype = jnp.dtype(dtype)
  if jnp.issubdtype(dtype, jnp.complexfloating):
    return dtype
  return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def real_accumulator_dtype(dtypes) -> jnp.dtype:
  """The real dtype of inner products summed over leaves of several dtypes."""
  wide = any(jnp.dtype(d) in (jnp.float64, jnp.complex128) for d in dtypes)
  return jnp.dtype(jnp.float64 if wide else jnp.float32)


def power_of_two(exponent: jax.Array, dtype) -> jax.Array:
  """2**exponent, exactly, for int32 exponents of any size (0 below the range)."""
  info = jnp.finfo(dtype)
  result = jnp.ldexp(
    jnp.ones((), dtype), jnp.clip(exponent, info.minexp, info.maxexp - 1)
  )
  return jnp.where(exponent < info.minexp, 0, result).astype(dtype)


def typed_zero(tree) -> jax.Array:
  """A float32 zero of the replication type that all leaves have together.

  Under `jax.shard_map` the values that a loop or a branch starts from have to be
  typed as varying over the mesh axes that the data varies over. Adding this zero
  makes them so, and compiles to nothing.
  """
  empty = [
    jnp.ravel(leaf)[:0].real.astype(jnp.float32) for leaf in jax.tree.leaves(tree)
  ]
  return sum((jnp.sum(values) for values in empty), jnp.zeros((), jnp.float32))


def typed(tree, zero: jax.Array):
  """The tree, each leaf with the replication type of a `typed_zero` added."""
  return jax.tree.map(
    lambda x: x | (zero != 0) if x.dtype == bool else x + zero.astype(x.dtype), tree
  )


def without_overflow(mean: jax.Array) -> jax.Array:
  """A mean of finite values, which rounding alone can have carried to infinity."""
  if jnp.iscomplexobj(mean):
    return jax.lax.complex(without_overflow(mean.real), without_overflow(mean.imag))
  top = jnp.finfo(mean.dtype).max
  return jnp.clip(mean, -top, top)


def distance(kind: str, ab, aa, bb, *, tau=None, shift=0, cancelled=False) -> jax.Array:
  """Distance in [0, 2] of two vectors from their inner products.

  Args:
    kind: 'cosine', 1 - <a, b> / (|a| |b|), or 'euclidean',
      |a - b|^2 / (|a|^2 + |b|^2).
    ab: the inner products <a, b>; any shape.
    aa: the squared norms |a|^2, broadcastable to `ab`.
    bb: the squared norms |b|^2 likewise.
    tau: the threshold that the distances will be compared with. Those that differ
      from it by no more than rounding are it, so that equal means accepted.
    shift: int32; the true b is `2**shift` times the b of the inner products,
      measured in the units of a. Only the Euclidean distance depends on it.
    cancelled: bool; `a` is a sum that cancelled down to its rounding errors and
      counts as zero.

  Returns:
    The distances, 1 where either vector is zero.
  """
  zero = (aa <= 0) | (bb <= 0) | cancelled
  aa = jnp.where(zero, 1, aa)
  bb = jnp.where(zero, 1, bb)
  if kind == "cosine":
    similarity = ab / jnp.sqrt(aa * bb)
  else:
    ratio = power_of_two(jnp.asarray(shift), ab.dtype)
    inverse = power_of_two(-jnp.asarray(shift), ab.dtype)
    similarity = 2 * ab / (aa * inverse + bb * ratio)
  result = 1 - jnp.clip(jnp.where(zero, 0, similarity), -1, 1)
  if tau is None:
    return result
  tau = jnp.asarray(tau, result.dtype)
  rounding = 8 * jnp.finfo(result.dtype).eps
  return jnp.where(jnp.abs(result - tau) <= rounding, tau, result)
