"""Gram: k-sized mathematics: inner products kept in range, and distances from them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gaf_optax._jax_types import typed_like

__all__ = [
  "NOTHING",
  "ZERO_EXPONENT",
  "Gram",
  "balanced",
  "cosines",
  "distance",
  "from_matrix",
  "noise_scale",
  "noise_scale_of_sum",
  "power_of_two",
  "typed_like",
  "without_rounding",
]

ZERO_EXPONENT = -100_000  # The exponent of a zero vector: below every other.

# Stands for a distance or a noise scale where there was nothing to compare. Not NaN,
# since JAX_DEBUG_NANS reports any that compiled code returns; users read NaN.
NOTHING = -1.0


class Gram(NamedTuple):
  """Inner products of k vectors, kept in floating range.

  Vector i is `2**exponents[i]` times the vector that `products` was taken of, so
  that vectors of very different lengths keep their directions.

  Attributes:
    products: `[..., k, k]`; rows and columns of invalid vectors are zero.
    exponents: int32 `[..., k]`.
  """

  products: jax.Array
  exponents: jax.Array

  def last(self, k: int) -> "Gram":
    """Of the last k vectors alone."""
    return Gram(self.products[..., -k:, -k:], self.exponents[..., -k:])

  def scaled(self) -> jax.Array:
    """The Gram matrix scaled so that the largest norm is 1, `[..., k, k]`."""
    squares = jnp.diagonal(self.products, axis1=-2, axis2=-1)
    # Floor of log2 of each norm, so that the largest is found without overflow.
    magnitude = jnp.where(
      squares > 0,
      self.exponents + jnp.frexp(squares)[1] // 2,
      ZERO_EXPONENT,
    )
    top = jnp.max(magnitude, axis=-1, keepdims=True)
    unit = power_of_two(self.exponents - top, self.products.dtype)
    matrix = self.products * unit[..., :, None] * unit[..., None, :]
    largest = jnp.max(jnp.diagonal(matrix, axis1=-2, axis2=-1), axis=-1, keepdims=True)[
      ..., None
    ]
    return matrix / jnp.where(largest > 0, largest, 1)


def from_matrix(matrix: jax.Array, valid: jax.Array) -> Gram:
  """The `Gram` of a plain Gram matrix `[k, k]`; `valid` is bool `[k]`."""
  matrix = jnp.where(valid[:, None] & valid[None, :], matrix, 0)
  return balanced(Gram(matrix, jnp.zeros(valid.shape, jnp.int32)))


def balanced(gram: Gram) -> Gram:
  """The same inner products `[..., k, k]`, of vectors of norms in [1, 2), or 0."""
  squares = jnp.diagonal(gram.products, axis1=-2, axis2=-1)
  shift = jnp.where(squares > 0, jnp.frexp(squares)[1] // 2, 0)
  unit = power_of_two(-shift, gram.products.dtype)
  exponents = jnp.where(squares > 0, gram.exponents + shift, ZERO_EXPONENT)
  return Gram(gram.products * unit[..., :, None] * unit[..., None, :], exponents)


def power_of_two(exponent: jax.Array, dtype) -> jax.Array:
  """2**exponent, exactly, for int32 exponents of any size (0 below the range)."""
  info = jnp.finfo(dtype)
  result = jnp.ldexp(
    jnp.ones((), dtype), jnp.clip(exponent, info.minexp, info.maxexp - 1)
  )
  return jnp.where(exponent < info.minexp, 0, result).astype(dtype)


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
  return result if tau is None else without_rounding(result, tau)


def without_rounding(distances: jax.Array, tau) -> jax.Array:
  """The distances; those that differ from tau by no more than rounding are tau."""
  tau = jnp.asarray(tau, distances.dtype)
  rounding = 8 * jnp.finfo(distances.dtype).eps
  return jnp.where(jnp.abs(distances - tau) <= rounding, tau, distances)


def cosines(gram: Gram, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cosines of all pairs `[k, k]`, and which pairs are of valid vectors, not zero."""
  squares = jnp.diagonal(gram.products)
  nonzero = valid & (squares > 0)
  compared = nonzero[:, None] & nonzero[None, :]
  # The root of each, since their product could leave the range.
  norms = jnp.sqrt(jnp.where(nonzero, squares, 1))
  result = gram.products / norms[:, None] / norms[None, :]
  return jnp.where(compared, jnp.clip(result, -1, 1), 0), compared


def noise_scale(gram: Gram, valid: jax.Array) -> jax.Array:
  """The simple gradient noise scale in microbatches (arXiv 1812.06162, appendix A).

  Args:
    gram: a `Gram` of `[m, k, k]`, whose groups are added up.
    valid: bool `[k]`.

  Returns:
    float32 scalar: `(mean_i G_ii - m) / m`, with m the mean of the off-diagonal
    entries. Inf where m <= 0, `NOTHING` where fewer than two are valid.
  """
  dtype = gram.products.dtype
  top = jnp.max(jnp.where(valid, gram.exponents, ZERO_EXPONENT))
  unit = jnp.where(valid, power_of_two(gram.exponents - top, dtype), 0)
  matrix = jnp.sum(gram.products * unit[:, :, None] * unit[:, None, :], axis=0)
  return _noise_scale(jnp.trace(matrix), jnp.sum(matrix), jnp.sum(valid))


def noise_scale_of_sum(
  rows: Gram, valid: jax.Array, squared_sum: Callable[[jax.Array], jax.Array]
) -> jax.Array:
  """`noise_scale` from what is known without a Gram matrix.

  Args:
    rows: the squared norms `[m, k]` of the micro-gradients, and their exponents.
    valid: bool `[k]`.
    squared_sum: a function of factors `[k]` that returns the squared norm of the sum of
      the micro-gradients, each times its factor.
  """
  dtype = rows.products.dtype
  top = jnp.max(jnp.where(valid, rows.exponents, ZERO_EXPONENT))
  unit = power_of_two(rows.exponents - top, dtype)
  squares = jnp.where(valid, rows.products * unit**2, 0)
  total = squared_sum(jnp.where(valid, power_of_two(-top, dtype), 0))
  return _noise_scale(jnp.sum(squares), total, jnp.sum(valid))


def _noise_scale(trace, total, num_valid):
  """From the trace and the sum of all entries of a Gram matrix."""
  num_valid = num_valid.astype(trace.dtype)
  diagonal = trace / jnp.maximum(num_valid, 1)
  agreement = (total - trace) / jnp.maximum(num_valid * (num_valid - 1), 1)
  scale = (diagonal - agreement) / jnp.where(agreement > 0, agreement, 1)
  # Below 0 by rounding alone.
  scale = jnp.where(agreement > 0, jnp.maximum(scale, 0), jnp.inf)
  return jnp.where(num_valid > 1, scale, NOTHING).astype(jnp.float32)
