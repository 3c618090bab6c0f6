"""Kernels: what passes over whole micro-gradients: products, and the weighted mean.

`benchmarks/RESULTS.md` has what each platform's branch gains.
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

# Columns of a CPU's block. XLA's CPU product of long rows copies them, and adds up many
# terms one after the other: the error of a squared norm grows with the block. With many
# rows XLA cuts the sums itself, and the products of many small blocks take memory.
_BLOCK = 1 << (11 if jax.__version_info__ >= (0, 10) else 10)
_MANY_ROWS, _BLOCK_OF_MANY = 12, 1 << 12

# Values of a leaf up to which it is joined with others, and of what it is joined to.
# Compiling a kernel for each small leaf takes longer than copying its values.
_SMALL, _BUNDLE = 1 << 12, 1 << 16


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
    group_ids: for each leaf the number of its group, in [0, num_groups]. Leaves of
      group `num_groups` are in no product, only searched for NaN and Inf.
    num_groups: m.
    embed: an elementwise function with embed(0) = 0, applied before the products.
    shards: which devices hold parts of the leaves; all of them get one result.

  Returns:
    `[m, k, k]` and bool `[k]`, see `cleaned`.
  """
  k, dtype = leaves[0].shape[0], _compat.real_accumulator_dtype(leaves)
  products: list[list[jax.Array]] = [[] for _ in range(num_groups)]
  unread = [jnp.zeros(k, dtype)]  # Squared norms of what is in no product.
  for x, group, counts in _bundles(leaves, group_ids, shards):
    if embed is not None or group == num_groups:
      unread += [_squares(part, dtype) for part in _real_parts(x)]
    if group < num_groups:
      x = x if embed is None else _embedded(x, embed, dtype)
      found = sum(_products(part, dtype) for part in _real_parts(x))
      products[group].append(found if counts is None else jnp.where(counts, found, 0))
  total = jnp.stack([_sum(of_group) for of_group in products])
  # One sum over the devices for both.
  sums = shards.sum(jnp.concatenate([total.reshape(-1), _sum(unread)]))
  return cleaned(sums[:-k].reshape(total.shape), jnp.isfinite(sums[-k:]))


def cleaned(matrix: jax.Array, finite: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Gram matrices `[m, k, k]` without what counts as not finite or as zero.

  Not finite is a micro-gradient whose square overflows in any group; zero is one whose
  square is below the smallest normal number over float32's epsilon (a norm of 3e-16,
  with float64 of 4e-151). Returns the matrices, with rows and columns of zeros for
  both, and bool `[k]`.
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
  """The squared norm `[m]` of a vector, and its products `[m, k]` with k others.

  Args:
    vector: for each leaf an array `[*shape]`.
    leaves: arrays `[k, *shape]`; they and the rest as in `gram`.
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
  """For each leaf `[k, *shape]` the sum of its rows times their weights, `[*shape]`.

  Rows of weight zero are left out by selection, so that a NaN in them stays there.

  Args:
    leaves: arrays `[k, *shape]`.
    group_ids: for each leaf the row of `weights` that is its own.
    weights: `[groups, k]`, each row of sum 1 or all zero.
    dtypes: of the results; those of the leaves if None.
  """
  # Or XLA would compute the weights again for every value of every leaf.
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
  """The same in a loop over rows, since XLA for CPU does not fuse that sum."""
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
    # Sums of bfloat16 products would hold the stack in float32.
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
  """One pass: a product of all pairs of rows that XLA does not store, and its sum."""
  product = x.astype(dtype)[:, None] * y.astype(dtype)[None]
  return jnp.sum(product, axis=tuple(range(2, product.ndim)))


def _by_product(x, *, dtype):
  axes = tuple(range(1, x.ndim))
  return lax.dot_general(x, x, ((axes, axes), ((), ())), preferred_element_type=dtype)


def _by_blocks(products, dtype, *arrays):
  """The sum of a function of blocks of columns, which are of `dtype`."""
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
  """`embed` of an array, of an inexact dtype, its shape checked."""
  result = jnp.asarray(embed(x))
  if result.shape != x.shape:
    raise ValueError(
      "embed must be elementwise, that is, keep the shape of each leaf; it "
      f"turned a leaf of shape {x.shape} into {result.shape}."
    )
  return result if jnp.issubdtype(result.dtype, jnp.inexact) else result.astype(dtype)


def _size(x):
  return math.prod(x.shape[1:])


def _bundles(leaves, group_ids, shards, like=None):
  """Leaves and bundles of small ones: arrays, their groups, and whether they count."""
  for bundle in _plan(leaves if like is None else like, group_ids, shards):
    i = bundle[0]
    yield _joined(leaves, bundle), group_ids[i], shards.is_primary(i)


def _plan(leaves, group_ids, shards):
  """The numbers of the leaves in each bundle."""
  bundles: list[list[int]] = []
  open_bundles: dict[Any, tuple[list[int], int]] = {}
  for i, x in enumerate(leaves):
    size = _size(x)
    if size > _SMALL or _mesh.is_sharded([x]):
      bundles.append([i])
      continue
    replicated = shards.replicated[i : i + 1]
    kind = (x.dtype, _compat.varying(x), group_ids[i], replicated)
    bundle, number = open_bundles.get(kind, ([], _BUNDLE + 1))
    if number + size > _BUNDLE:
      bundles.append(bundle := [])
      number = 0
    bundle.append(i)
    open_bundles[kind] = bundle, number + size
  return bundles


def _joined(leaves, bundle):
  if len(bundle) == 1:
    return leaves[bundle[0]]
  return jnp.concatenate([_tree.flat_rows(leaves[i]) for i in bundle], axis=1)
