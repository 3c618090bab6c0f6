"""Inner products and weighted means of whole micro-gradients, for each platform.

`benchmarks/RESULTS.md` shows the gain of each platform's branch.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gaf_optax import _compat, _mesh, _tree

# Columns per block on CPU. XLA's CPU product copies long rows and sums their terms
# sequentially, so rounding errors grow with the block. With many rows XLA splits these
# sums, and products of many small blocks would need memory.
_BLOCK = 1 << (11 if jax.__version_info__ >= (0, 10) else 10)
_MANY_ROWS, _BLOCK_OF_MANY = 12, 1 << 12

# Leaves with at most `_MAX_SMALL` values are concatenated into bundles of at most
# `_MAX_BUNDLE`: copying them is faster than compiling a kernel for each.
_MAX_SMALL, _MAX_BUNDLE = 1 << 12, 1 << 16


class Stack(NamedTuple):
  """k micro-gradients, or slices of them, and the inner products that they enter.

  Attributes:
    arrays: `[k, *shape]`.
    group_ids: the group of each array, in [0, m]. Arrays of group m enter no product;
      only their finiteness is checked.
    num_groups: m.
    embed: an elementwise function with embed(0) = 0, applied before the products.
    shards: the devices that hold the other parts; all get the same products.
  """

  arrays: Sequence[jax.Array]
  group_ids: Sequence[int]
  num_groups: int = 1
  embed: _tree.Embed | None = None
  shards: _mesh.Shards = _mesh.UNSHARDED


def gram(stack: Stack) -> tuple[jax.Array, jax.Array]:
  """Gram matrices `[m, k, k]`, and which micro-gradients are finite, bool `[k]`.

  See `cleaned` for rows and columns of zeros.
  """
  k, dtype = stack.arrays[0].shape[0], _compat.real_accumulator_dtype(stack.arrays)
  products: list[list[jax.Array]] = [[] for _ in range(stack.num_groups)]
  # Squared norms of arrays that do not enter the products.
  finiteness_only = [jnp.zeros(k, dtype)]
  for i, (x,) in _bundles(stack):
    group = stack.group_ids[i]
    if stack.embed is not None or group == stack.num_groups:
      finiteness_only += [_squares(part, dtype) for part in _real_parts(x)]
    if group < stack.num_groups:
      parts = _real_parts(_embedded(x, stack.embed, dtype))
      total = sum(_products(part, dtype) for part in parts)
      products[group].append(stack.shards.once(total, i))
  total = jnp.stack([_sum(of_group) for of_group in products])
  # One reduction over the devices for both.
  sums = stack.shards.sum(jnp.concatenate([total.reshape(-1), _sum(finiteness_only)]))
  return cleaned(sums[:-k].reshape(total.shape), jnp.isfinite(sums[-k:]))


def cleaned(matrix: jax.Array, finite: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Zeros the rows and columns to ignore; also returns which rows are finite, `[k]`.

  A micro-gradient is not finite if its square overflows in any group. It counts as zero
  if its square is below the smallest normal number divided by float32's epsilon (a norm
  of 3e-16, with float64 of 4e-151).
  """
  squares = jnp.diagonal(matrix, axis1=1, axis2=2)
  finite = finite & jnp.all(jnp.isfinite(squares), axis=0)
  smallest = jnp.finfo(matrix.dtype).tiny / jnp.finfo(jnp.float32).eps
  kept = finite[None] & (squares >= smallest)
  return jnp.where(kept[:, :, None] & kept[:, None, :], matrix, 0), finite


def dots(vector: Sequence[jax.Array], stack: Stack) -> tuple[jax.Array, jax.Array]:
  """The squared norm `[m]` of a vector, and its inner products `[m, k]` with a stack.

  The vector has one array `[*shape]` for each of the stack.
  """
  dtype = _compat.real_accumulator_dtype(stack.arrays)
  products: list[list[jax.Array]] = [[] for _ in range(stack.num_groups)]
  for i, pair in _bundles(stack, [v[None] for v in vector]):
    group = stack.group_ids[i]
    if group < stack.num_groups:
      parts = zip(*(_real_parts(_embedded(y, stack.embed, dtype)) for y in pair))
      total = sum(_products_with(v, x, dtype) for x, v in parts)
      products[group].append(stack.shards.once(total, i))
  total = stack.shards.sum(jnp.stack([_sum(of_group) for of_group in products]))
  return total[:, 0], total[:, 1:]


def weighted_means(
  stack: Stack, weights: jax.Array, dtypes: Sequence[Any] | None = None
) -> list[jax.Array]:
  """Weighted sums `[*shape]` over the k rows of each array.

  Rows of weight zero are excluded by a select, so their NaN does not spread.

  Args:
    stack: only its `arrays` and `group_ids` matter.
    weights: `[m + 1, k]`, the weights for each group; they sum to 1 or are all zero.
    dtypes: of the results; None for those of the arrays.
  """
  stack = stack._replace(shards=_mesh.UNSHARDED)
  groups = set(stack.group_ids)
  # Otherwise XLA recomputes the weights for every value of every array.
  rows = lax.optimization_barrier({group: weights[group] for group in groups})
  results: list[jax.Array] = [jnp.zeros(())] * len(stack.arrays)
  for indices in _bundle_indices(stack):
    x = _concatenated(stack.arrays, indices)
    dtype = _compat.accumulator_dtype(x.dtype)
    total = lax.platform_dependent(
      x,
      rows[stack.group_ids[indices[0]]].astype(dtype),
      cpu=functools.partial(_mean_on_cpu, dtype=dtype),
      default=functools.partial(_mean, dtype=dtype),
    )
    ends = list(itertools.accumulate(_size(stack.arrays[i]) for i in indices))
    parts = jnp.split(total, ends[:-1]) if ends[1:] else [total]
    for i, part in zip(indices, parts):
      dtype = dtypes[i] if dtypes else stack.arrays[i].dtype
      results[i] = part.reshape(stack.arrays[i].shape[1:]).astype(dtype)
  return results


def _mean(x, weights, *, dtype):
  weights = weights.reshape(-1, *[1] * (x.ndim - 1))
  return jnp.sum(jnp.where(weights != 0, x.astype(dtype) * weights, 0), axis=0)


def _mean_on_cpu(x, weights, *, dtype):
  """`_mean` in a loop over rows, because XLA for CPU does not fuse its sum."""
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
    # `sums` would hold a whole bfloat16 stack in float32.
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
  """`embed(x)`, with its shape checked; x without an `embed`."""
  if embed is None:
    return x
  result = jnp.asarray(embed(x))
  if result.shape != x.shape:
    raise ValueError(
      f"embed must be elementwise, but it turned an array of shape {x.shape} into one"
      f" of shape {result.shape}."
    )
  return result if jnp.issubdtype(result.dtype, jnp.inexact) else result.astype(dtype)


def _size(x):
  return math.prod(x.shape[1:])


def _bundles(stack, *others):
  """Yields each bundle's first index, and its arrays from the stack and `others`."""
  for indices in _bundle_indices(stack):
    yield indices[0], [_concatenated(x, indices) for x in (stack.arrays, *others)]


def _bundle_indices(stack):
  """The indices of the arrays in each bundle; a large array is its own bundle."""
  bundles: list[list[int]] = []
  open_bundles: dict[Any, tuple[list[int], int]] = {}
  for i, (x, group) in enumerate(zip(stack.arrays, stack.group_ids)):
    size = _size(x)
    if size > _MAX_SMALL or _mesh.is_sharded([x]):
      bundles.append([i])
      continue
    replicated = stack.shards.replicated[i : i + 1]
    kind = (x.dtype, _compat.varying(x), group, replicated)
    bundle, number = open_bundles.get(kind, ([], _MAX_BUNDLE + 1))
    if number + size > _MAX_BUNDLE:
      bundles.append(bundle := [])
      number = 0
    bundle.append(i)
    open_bundles[kind] = bundle, number + size
  return bundles


def _concatenated(arrays, indices):
  if len(indices) == 1:
    return arrays[indices[0]]
  return jnp.concatenate([_tree.flat_rows(arrays[i]) for i in indices], axis=1)
