"""Kernels: inner products and weighted means of whole micro-gradients.

`benchmarks/RESULTS.md` shows the gain of each platform's branch.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gaf_optax import _compat, _mesh, _tree

# Columns per block on CPU. XLA's CPU product copies long rows and sums many terms
# sequentially, so the error of a squared norm grows with the block. With many rows XLA
# splits the sums itself, and the products of many small blocks need memory.
_BLOCK = 1 << (11 if jax.__version_info__ >= (0, 10) else 10)
_MANY_ROWS, _BLOCK_OF_MANY = 12, 1 << 12

# Leaves with at most `_MAX_SMALL` values are concatenated into bundles of at most
# `_MAX_BUNDLE`: copying them is faster than compiling a kernel for each.
_MAX_SMALL, _MAX_BUNDLE = 1 << 12, 1 << 16


def gram(
  leaves: Sequence[jax.Array],
  group_ids: Sequence[int],
  num_groups: int,
  embed: _tree.Embed | None = None,
  shards: _mesh.Shards = _mesh.UNSHARDED,
) -> tuple[jax.Array, jax.Array]:
  """The Gram matrix of each group, and which micro-gradients are finite.

  Args:
    leaves: arrays `[k, *shape]`.
    group_ids: the group of each leaf, in [0, num_groups]. Leaves of group `num_groups`
      enter no product; only their finiteness is checked.
    num_groups: m.
    embed: an elementwise function with embed(0) = 0, applied before the products.
    shards: which devices hold parts of the leaves; all get the same result.

  Returns:
    `[m, k, k]` and bool `[k]`, see `cleaned`.
  """
  k, dtype = leaves[0].shape[0], _compat.real_accumulator_dtype(leaves)
  products: list[list[jax.Array]] = [[] for _ in range(num_groups)]
  # Squared norms of arrays that do not enter the products.
  finiteness_only = [jnp.zeros(k, dtype)]
  for x, group, counts in _bundles(leaves, group_ids, shards):
    if embed is not None or group == num_groups:
      finiteness_only += [_squares(part, dtype) for part in _real_parts(x)]
    if group < num_groups:
      x = x if embed is None else _embedded(x, embed, dtype)
      found = sum(_products(part, dtype) for part in _real_parts(x))
      products[group].append(found if counts is None else jnp.where(counts, found, 0))
  total = jnp.stack([_sum(of_group) for of_group in products])
  # One reduction over the devices for both.
  sums = shards.sum(jnp.concatenate([total.reshape(-1), _sum(finiteness_only)]))
  return cleaned(sums[:-k].reshape(total.shape), jnp.isfinite(sums[-k:]))


def cleaned(matrix: jax.Array, finite: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Gram matrices `[m, k, k]` with zeros for what to ignore, and bool `[k]`: finite.

  A micro-gradient is not finite if its square overflows in any group. It counts as zero
  if its square is below the smallest normal number over float32's epsilon (a norm of
  3e-16, with float64 of 4e-151).
  """
  squares = jnp.diagonal(matrix, axis1=1, axis2=2)
  finite = finite & jnp.all(jnp.isfinite(squares), axis=0)
  smallest = jnp.finfo(matrix.dtype).tiny / jnp.finfo(jnp.float32).eps
  kept = finite[None] & (squares >= smallest)
  return jnp.where(kept[:, :, None] & kept[:, None, :], matrix, 0), finite


def dots(
  vector: Sequence[jax.Array],
  leaves: Sequence[jax.Array],
  group_ids: Sequence[int],
  num_groups: int,
  embed: _tree.Embed | None = None,
  shards: _mesh.Shards = _mesh.UNSHARDED,
) -> tuple[jax.Array, jax.Array]:
  """The squared norm `[m]` of `vector`, and its products `[m, k]` with k others.

  `vector` has leaves `[*shape]`; the other arguments are those of `gram`.
  """
  dtype = _compat.real_accumulator_dtype(leaves)
  products: list[list[jax.Array]] = [[] for _ in range(num_groups)]
  bundles = _bundles(leaves, group_ids, shards)
  vectors = _bundles([v[None] for v in vector], group_ids, shards, like=leaves)
  for (x, group, counts), (v, *_) in zip(bundles, vectors):
    if group < num_groups:
      if embed is not None:
        x, v = _embedded(x, embed, dtype), _embedded(v, embed, dtype)
      parts = zip(_real_parts(v), _real_parts(x))
      found = sum(_products_with(*both, dtype) for both in parts)
      products[group].append(found if counts is None else jnp.where(counts, found, 0))
  total = shards.sum(jnp.stack([_sum(of_group) for of_group in products]))
  return total[:, 0], total[:, 1:]


def weighted_means(
  leaves: Sequence[jax.Array],
  group_ids: Sequence[int],
  weights: jax.Array,
  dtypes: Sequence[Any] | None = None,
) -> list[jax.Array]:
  """Weighted sums `[*shape]` over the rows of leaves `[k, *shape]`.

  Rows of weight zero are excluded by a select, so their NaN does not spread.

  Args:
    leaves: arrays `[k, *shape]`.
    group_ids: the row of `weights` for each leaf.
    weights: `[groups, k]`; each row sums to 1 or is zero.
    dtypes: of the results; None for those of the leaves.
  """
  # Otherwise XLA recomputes the weights for every value of every leaf.
  rows = lax.optimization_barrier({group: weights[group] for group in set(group_ids)})
  results: list[jax.Array] = [jnp.zeros(())] * len(leaves)
  for bundle in _plan(leaves, group_ids, _mesh.UNSHARDED):
    x, first = _joined(leaves, bundle), bundle[0]
    dtype = _compat.accumulator_dtype(x.dtype)
    row = rows[group_ids[first]].astype(dtype)
    total = lax.platform_dependent(
      x,
      row,
      cpu=functools.partial(_mean_on_cpu, dtype=dtype),
      default=functools.partial(_mean, dtype=dtype),
    )
    ends = list(itertools.accumulate(_size(leaves[i]) for i in bundle))
    for i, part in zip(bundle, jnp.split(total, ends[:-1]) if ends[1:] else [total]):
      dtype = dtypes[i] if dtypes else leaves[i].dtype
      results[i] = part.reshape(leaves[i].shape[1:]).astype(dtype)
  return results


def _mean(x, weights, *, dtype):
  weights = weights.reshape(-1, *[1] * (x.ndim - 1))
  return jnp.sum(jnp.where(weights != 0, x.astype(dtype) * weights, 0), axis=0)


def _mean_on_cpu(x, weights, *, dtype):
  """The same in a loop over rows, because XLA for CPU does not fuse that sum."""
  x, wide = _compat.for_cpu_loop(x, dtype)

  def add(i, total):
    row = wide(lax.dynamic_index_in_dim(x, i, 0, keepdims=False))
    return total + jnp.where(weights[i] != 0, row * weights[i], 0)

  zeros = _compat.typed_like(jnp.zeros(x.shape[1:], dtype), (x, weights))
  return lax.fori_loop(0, x.shape[0], add, zeros)


def _products(x, dtype):
  """Inner products `[k, k]` of the rows of a real array `[k, *shape]`."""
  sums = functools.partial(_by_sums, dtype=dtype)
  if _mesh.is_sharded([x]):
    return sums(x, x)
  return lax.platform_dependent(
    x,
    cpu=lambda x: _by_blocks(lambda x: _dot(x, x), dtype, x),
    # Sums of bfloat16 products hold the stack in float32.
    tpu=functools.partial(_by_product, dtype=dtype)
    if x.dtype.itemsize < 4
    else lambda x: sums(x, x),
    default=lambda x: sums(x, x),
  )


def _products_with(vector, x, dtype):
  """Inner products `[1 + k]` of a vector `[1, *shape]` with itself and with rows."""

  def sums(*both):
    found = [_by_sums(both[0], other, dtype=dtype)[0] for other in both]
    return jnp.concatenate(found)

  def in_block(vector, x):
    return _dot(vector, jnp.concatenate([vector, x]))[0]

  if _mesh.is_sharded([vector, x]):
    return sums(vector, x)
  in_blocks = functools.partial(_by_blocks, in_block, dtype)
  return lax.platform_dependent(vector, x, cpu=in_blocks, default=sums)


def _squares(x, dtype):
  """Squared norms `[k]` of the rows of a real array."""
  plain = lambda x: jnp.sum(x.astype(dtype) ** 2, axis=tuple(range(1, x.ndim)))
  if _mesh.is_sharded([x]):
    return plain(x)
  in_blocks = functools.partial(_by_blocks, plain, dtype)
  return lax.platform_dependent(x, cpu=in_blocks, default=plain)


def _by_sums(x, y, *, dtype):
  """Products of all pairs of rows, summed; XLA fuses this into one pass."""
  product = x.astype(dtype)[:, None] * y.astype(dtype)[None]
  return jnp.sum(product, axis=tuple(range(2, product.ndim)))


def _by_product(x, *, dtype):
  axes = tuple(range(1, x.ndim))
  return lax.dot_general(x, x, ((axes, axes), ((), ())), preferred_element_type=dtype)


def _by_blocks(products, dtype, *arrays):
  """The sum of `products` over blocks of columns, converted to `dtype`."""
  flat = [_tree.flat_rows(x) for x in arrays]
  width = _BLOCK if flat[-1].shape[0] < _MANY_ROWS else _BLOCK_OF_MANY
  whole, rest = divmod(flat[0].shape[1], width)
  if flat[0].shape[1] <= width:
    return products(*(x.astype(dtype) for x in flat))
  held = [_compat.for_cpu_loop(x, dtype) for x in flat]

  def block(i):
    cut = lambda x: lax.dynamic_slice_in_dim(x, i * width, width, 1)
    return products(*(wide(cut(x)) for x, wide in held))

  total = jnp.sum(lax.map(block, jnp.arange(whole)), axis=0)
  if rest:
    total += products(*(x[:, whole * width :].astype(dtype) for x in flat))
  return total


def _dot(x, y):
  axes = ((1,), (1,))
  return lax.dot_general(x, y, (axes, ((), ())), precision=lax.Precision.HIGHEST)


def _sum(terms):
  return terms[0] if len(terms) == 1 else jnp.sum(jnp.stack(terms), axis=0)


def _real_parts(x):
  return [x.real, x.imag] if jnp.iscomplexobj(x) else [x]


def _embedded(x, embed, dtype):
  """`embed(x)`, with its shape checked."""
  result = jnp.asarray(embed(x))
  if result.shape != x.shape:
    raise ValueError(
      "embed must be elementwise and keep the shape of each leaf; it turned a leaf of"
      f" shape {x.shape} into {result.shape}."
    )
  return result if jnp.issubdtype(result.dtype, jnp.inexact) else result.astype(dtype)


def _size(x):
  return math.prod(x.shape[1:])


def _bundles(leaves, group_ids, shards, like=None):
  """Large leaves and bundles of small ones: array, group, and whether it counts."""
  for bundle in _plan(leaves if like is None else like, group_ids, shards):
    i = bundle[0]
    yield _joined(leaves, bundle), group_ids[i], shards.is_primary(i)


def _plan(leaves, group_ids, shards):
  """The positions of the leaves in each bundle."""
  bundles: list[list[int]] = []
  open_bundles: dict[Any, tuple[list[int], int]] = {}
  for i, x in enumerate(leaves):
    size = _size(x)
    if size > _MAX_SMALL or _mesh.is_sharded([x]):
      bundles.append([i])
      continue
    replicated = shards.replicated[i : i + 1]
    kind = (x.dtype, _compat.varying(x), group_ids[i], replicated)
    bundle, number = open_bundles.get(kind, ([], _MAX_BUNDLE + 1))
    if number + size > _MAX_BUNDLE:
      bundles.append(bundle := [])
      number = 0
    bundle.append(i)
    open_bundles[kind] = bundle, number + size
  return bundles


def _joined(leaves, bundle):
  if len(bundle) == 1:
    return leaves[bundle[0]]
  return jnp.concatenate([_tree.flat_rows(leaves[i]) for i in bundle], axis=1)
