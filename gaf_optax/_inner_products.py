"""Inner products: what passes over whole micro-gradients to make their Gram matrix.

On CPU accuracy does not depend on the width of its vectors: few terms are added up one
after the other, the rest exactly or by halves.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gaf_optax import _gram, _jax_types, _mesh, _tree

# Squared norms in this range are taken as computed: products of two of them, and
# sums of a few thousand, stay far from both ends of float32.
_ORDINARY = (1e-18, 1e18)

# Terms that are added up one after the other, at most. The errors of equal terms all
# point one way and grow with their number: of 96 to at most 1.5e-6 of a float32 sum,
# and of 16 such sums to 0.3e-6 more.
_CHAIN = 96

# Values of all rows that one step of a blocked inner product reads: they fit in a
# second-level cache.
_BLOCK_VALUES = 1 << 17

# Chains in such a block, at most. They are one batched product, which XLA's CPU
# compiler makes fast for few rows alone; from _MANY_ROWS on, a product each, and a
# quarter as many.
_BLOCK_CHAINS = 16
_MANY_ROWS = 32

# Values in a row from which on products of few rows are added up by pairs. Up to
# _FEW_ROWS XLA's CPU compiler turns these sums, kept in so many lanes each, into a loop
# that is faster than matrix products. With jax 0.12 that is so up to 9 rows, but
# compiling 8 takes half a second per leaf.
_LONG_ROW = 1 << 14
_FEW_ROWS, _LANES = (4, 128) if jax.__version_info__ >= (0, 12) else (3, 512)

# Rows up to which sums of pairs of them are fast on an accelerator: 8 micro-gradients
# and an anchor.
_FEW_ROWS_IN_SUMS = 9

# For each leaf its blocks of rows `[k_b, *shape]`, which together are the k rows.
Blocks = Sequence[Sequence[jax.Array]]
Embed = Callable[[jax.Array], jax.Array]


def gram(
  leaves: Blocks,
  group_ids: Sequence[int],
  num_groups: int,
  embed: Embed | None = None,
  shards: _mesh.Shards = _mesh.WHOLE,
) -> tuple[_gram.Gram, jax.Array]:
  """Inner products of the vectors whose pieces the leaves hold, by group.

  Reads every leaf once where the squared norms are in an ordinary range. Where a
  vector is not finite, zero, or so long or short that its square leaves the range
  of the accumulator, a second form runs, which scales each vector by a power of
  two first.

  Args:
    leaves: for each leaf its blocks of rows, arrays `[k_b, *shape]`; the blocks
      of a leaf together hold the k rows, in order. Leaves that are sharded over an
      Explicit mesh are read where they are.
    group_ids: for each leaf the number of its group, in [0, num_groups]. Leaves of
      group `num_groups` take no part in the products, only in the second result.
    num_groups: how many groups there are.
    embed: an elementwise function, applied to each block before the products.
    shards: which devices hold parts of the leaves; all of them get one result.

  Returns:
    The `Gram` of each group (`[num_groups, k, k]` and `[num_groups, k]`), and
    bool `[k]`: whether all values of a row are finite, in every leaf.
  """
  if _mesh.is_sharded([block for blocks in leaves for block in blocks]):
    per_shard = lambda leaves, shards: gram(
      leaves, group_ids, num_groups, embed, shards
    )
    return _mesh.reduce_shards(per_shard, leaves)
  local = _Local(leaves, group_ids, num_groups, embed, shards)
  k, dtype = local.k, local.dtype

  # One sum over the devices for both.
  bad = local.unread_nonfinite().astype(dtype)
  sums = shards.sum(jnp.concatenate([local.products().reshape(-1), bad]))
  products, unread_finite = sums[:-k].reshape(num_groups, k, k), sums[-k:] == 0
  squares = jnp.diagonal(products, axis1=1, axis2=2)
  ordinary = jnp.all(unread_finite) & jnp.all(
    (squares >= _ORDINARY[0]) & (squares <= _ORDINARY[1])
  )

  # Two conditions for one reason: a branch's result is computed once, while within
  # one branch XLA would repeat the maximum over all leaves in each leaf's loop.
  largest = _jax_types.cond(
    ordinary, lambda: jnp.ones((num_groups, k), dtype), local.largest_values
  )
  # Not from the squares: one that overflows is NaN where the lost parts are added up.
  valid = unread_finite & jnp.all(jnp.isfinite(largest), axis=0)

  def as_computed():
    return _gram.Gram(products, jnp.zeros((num_groups, k), jnp.int32))

  def rescaled():
    return local.rescaled(jnp.where(valid, largest, 0), valid)

  return _jax_types.cond(ordinary, as_computed, rescaled), valid


class _Local:
  """The leaves as real matrices on this device, and what is read off them.

  `rows` are the matrices that the products are of; `unread` those of whose values the
  products tell nothing: leaves of no group, and what an embedding was made of.
  """

  def __init__(self, leaves, group_ids, num_groups, embed, shards):
    self.k = sum(block.shape[0] for block in leaves[0])
    self.dtype = _jax_types.real_accumulator_dtype(
      block.dtype for blocks in leaves for block in blocks
    )
    self.num_groups, self.shards = num_groups, shards
    primary = shards.primary or (None,) * len(leaves)
    unpadded = shards.unpadded or (None,) * len(leaves)
    self.rows = [
      (matrix, group, counts)
      for blocks, group, counts, columns in zip(leaves, group_ids, primary, unpadded)
      if group < num_groups
      for matrix in _real_matrices(blocks, embed, self.dtype, columns)
    ]
    self.unread = [
      matrix
      for blocks, group in zip(leaves, group_ids)
      if group == num_groups or embed is not None
      for matrix in _real_matrices(blocks, None, self.dtype)
    ]

  def products(self, scale=None):
    """The part of the products `[m, k, k]` that this device's values make.

    `scale` is None, or the factor of each row `[m, k]`, NaN for rows that count as
    zero.
    """
    terms: list[list[jax.Array]] = [[] for _ in range(self.num_groups)]
    scales = None if scale is None else [scale[group] for _, group, _ in self.rows]
    found = _products([matrix for matrix, _, _ in self.rows], self.dtype, scales)
    for x, (_, group, counts) in zip(found, self.rows):
      terms[group].append(x if counts is None else jnp.where(counts, x, 0))
    return jnp.stack([_pairwise_sum(of_group) for of_group in terms])

  def largest_values(self):
    """The largest absolute values `[m, k]`, on all devices; Inf where not finite."""
    found: list[list[jax.Array]] = [[] for _ in range(self.num_groups)]
    for matrix, group, _ in self.rows:
      found[group].append(_largest(matrix, self.dtype))
    return self.shards.max(jnp.stack([jnp.max(jnp.stack(x), axis=0) for x in found]))

  def unread_nonfinite(self):
    """Bool `[k]`: whether a row of what the products do not read is not finite."""
    bad = jnp.zeros((self.k,), bool)
    for matrix in self.unread:
      bad |= ~jnp.isfinite(_largest(matrix, self.dtype))
    return bad

  def rescaled(self, largest, valid):
    """The `Gram` of rows scaled so that their largest values are near 1."""
    info = jnp.finfo(self.dtype)
    exponents = jnp.clip(jnp.frexp(largest)[1], info.minexp, -info.minexp)
    scale = _gram.power_of_two(-exponents, self.dtype)
    products = self.shards.sum(self.products(jnp.where(valid, scale, jnp.nan)))
    squares = jnp.diagonal(products, axis1=1, axis2=2)
    exponents = jnp.where(squares > 0, exponents, _gram.ZERO_EXPONENT)
    return _gram.Gram(products, exponents.astype(jnp.int32))


def squared_sum(leaves: Sequence[jax.Array], factors: jax.Array) -> jax.Array:
  """The squared norm of `sum_i factors[i] * row_i`, without forming that sum.

  Args:
    leaves: arrays `[k, *shape]`, which together hold the rows.
    factors: `[k]`; rows with a factor of 0 are left out.
  """
  dtype = factors.dtype
  matrices = [m for x in leaves for (m,) in _real_matrices((x,), None, dtype)]

  def block(matrix, start, width):
    rows = lax.dynamic_slice_in_dim(matrix, start, width, 1).astype(dtype)
    rows = jnp.where(factors[:, None] != 0, rows * factors[:, None], 0)
    return jnp.sum(jnp.sum(rows, axis=0) ** 2)

  def of_matrix(matrix):
    matrix = _tree.flat_rows(matrix)
    width = max(_BLOCK_VALUES // matrix.shape[0], _CHAIN)
    whole, rest = divmod(matrix.shape[1], width)
    total = _jax_types.typed_like(jnp.zeros((), dtype), (matrix, factors))
    add = lambda i, total: total + block(matrix, i * width, width)
    if whole:
      total = lax.fori_loop(0, whole, add, total)
    return total + block(matrix, whole * width, rest) if rest else total

  return _pairwise_sum([of_matrix(matrix) for matrix in matrices])


def cosine_distance(a: Any, b: Any) -> jax.Array:
  r"""Cosine distance of two pytrees, each taken as one long vector.

  .. math::
    d(a, b) = 1 - \frac{\langle a, b \rangle}{|a| |b|}

  Inner products accumulate in at least float32 and neither overflow nor
  underflow; of complex leaves the real part of the Hermitian product is taken.
  Leaves that are not floating point or complex take no part.

  Args:
    a: a pytree of arrays.
    b: a pytree of the same structure and shapes.

  Returns:
    float32 scalar in [0, 2]: 0 for the same direction, 1 for orthogonal vectors
    or if either is zero, 2 for opposite ones; NaN if either is not finite.

  Raises:
    ValueError: if the structures or the shapes differ.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gaf_optax import cosine_distance
    >>> a = {'w': jnp.array([1.0, 0.0]), 'b': jnp.array(0.0)}
    >>> b = {'w': jnp.array([0.0, 2.0]), 'b': jnp.array(0.0)}
    >>> float(cosine_distance(a, b))
    1.0

  References:
    Chaubard et al., `Beyond Gradient Averaging in Parallel Optimization
    <https://arxiv.org/abs/2412.18052>`_, 2024, equation 1.
  """
  structures: list[Any] = [jax.tree.structure(tree) for tree in (a, b)]
  if structures[0] != structures[1]:
    raise ValueError(
      "cosine_distance compares two pytrees of one structure, got "
      f"{structures[0]} and {structures[1]}."
    )
  pairs = []
  paths = jax.tree_util.tree_flatten_with_path(a)[0]
  for (path, x), y in zip(paths, jax.tree.leaves(b)):
    if jnp.shape(x) != jnp.shape(y):
      raise ValueError(
        "cosine_distance compares leaves of one shape, got "
        f"{jnp.shape(x)} and {jnp.shape(y)} at leaf "
        f"{jax.tree_util.keystr(path) or '(the whole tree)'}."
      )
    if jnp.issubdtype(jnp.result_type(x), jnp.inexact):
      pairs.append((jnp.asarray(x)[None], jnp.asarray(y)[None]))
  if not pairs:
    raise ValueError(
      "cosine_distance found no floating-point or complex leaf to compare."
    )
  # Products that overflow are NaN until they are computed again, rescaled.
  with jax.debug_nans(False):
    both, valid = gram(pairs, [0] * len(pairs), num_groups=1)
  n = both.products[0]
  result = _gram.distance("cosine", n[0, 1], n[0, 0], n[1, 1])
  return jnp.where(jnp.all(valid), result, jnp.nan).astype(jnp.float32)


def _real_matrices(blocks, embed, dtype, columns=None):
  """The rows of a leaf as real matrices, each a tuple of blocks `[k_b, *shape]`.

  One for a real leaf, two (real and imaginary parts) for a complex one. Of what
  `embed` made, `columns` (bool `[1, size]`) are kept; the others are padding. Blocks
  keep their shape: on TPU another one would be a copy.
  """
  if embed is not None:
    blocks = [embedded(block, embed, dtype) for block in blocks]
    if columns is not None:
      blocks = [jnp.where(columns, block, 0) for block in blocks]
  if any(jnp.iscomplexobj(block) for block in blocks):
    return [tuple(x.real for x in blocks), tuple(x.imag for x in blocks)]
  return [tuple(blocks)]


def embedded(block, embed, dtype):
  """`embed` of an array, of an inexact dtype, its shape checked."""
  result = jnp.asarray(embed(block))
  if result.shape != block.shape:
    raise ValueError(
      "embed must be elementwise, that is, keep the shape of each leaf; it "
      f"turned a leaf of shape {block.shape} into {result.shape}."
    )
  if not jnp.issubdtype(result.dtype, jnp.inexact):
    result = result.astype(dtype)
  return result


def _largest(matrix, dtype):
  """The largest absolute value in each row `[k]`; Inf where one is not finite."""
  of_block = functools.partial(
    lax.platform_dependent,
    cpu=functools.partial(_largest_on_cpu, dtype=dtype),
    default=functools.partial(_largest_or_inf, dtype=dtype),
  )
  return jnp.concatenate([of_block(block) for block in matrix])


def _largest_or_inf(block, *, dtype):
  axes = _inner_axes(block)
  # Not the maximum of abs(block), for which some versions of XLA copy the block.
  high, low = (f(block, axis=axes, initial=0) for f in (jnp.max, jnp.min))
  # What a maximum makes of NaN is up to the compiler, and so a sum looks for it.
  wide = block.astype(dtype)
  finite = jnp.sum(wide - wide, axis=axes) == 0
  return jnp.where(finite, jnp.maximum(high, -low).astype(dtype), jnp.inf)


def _largest_on_cpu(block, *, dtype):
  if block.dtype.itemsize < 4:
    return _largest_or_inf(block, dtype=dtype)
  # Older XLA for CPU would copy the block for a sum of anything but its values. The
  # bits of absolute values are in their order, with Inf and NaN above all others.
  bits_dtype = jnp.dtype(f"int{8 * block.dtype.itemsize}")
  no_sign = np.array(jnp.iinfo(bits_dtype).max, bits_dtype)
  bits = lambda x: lax.bitcast_convert_type(x, bits_dtype) & no_sign
  larger = lambda x, y: lax.bitcast_convert_type(lax.max(bits(x), bits(y)), block.dtype)
  zero = np.zeros((), block.dtype)
  # Of an axis of length one XLA leaves the value as it is.
  result = jnp.abs(lax.reduce(block, zero, larger, _inner_axes(block))).astype(dtype)
  return jnp.where(jnp.isnan(result), jnp.inf, result)


def _inner_axes(block):
  return tuple(range(1, block.ndim))


def _products(matrices, dtype, scales):
  """Inner products `[k, k]` of the rows of each matrix.

  `scales` is None, or for each matrix the factor of each row `[k]`, NaN for rows that
  count as zero.
  """

  def typed(products):
    """With types that both branches agree on."""

    def run(matrices, scales):
      found = products(matrices, scales, dtype=dtype)
      return _jax_types.typed_like(found, (matrices, scales))

    return run

  return lax.platform_dependent(
    matrices, scales, cpu=typed(_on_cpu), tpu=typed(_on_tpu), default=typed(_on_gpu)
  )


def _on_tpu(matrices, scales, *, dtype):
  return _on_accelerator(matrices, scales, dtype, _is_faster_by_sums_on_tpu)


def _on_gpu(matrices, scales, *, dtype):
  # Of rows of other lengths it would make padded copies.
  by_sums = lambda matrix: math.prod(matrix[0].shape[1:]) % 8 > 0
  return _on_accelerator(matrices, scales, dtype, by_sums)


def _on_accelerator(matrices, scales, dtype, are_few_faster_by_sums):
  if scales is not None:
    return _row_by_row(matrices, scales, dtype)

  def by_sums(matrix):
    num_rows = sum(block.shape[0] for block in matrix)
    few = num_rows <= _FEW_ROWS_IN_SUMS
    return num_rows == 2 or (few and are_few_faster_by_sums(matrix))

  return [
    (_sums_of_pairs if by_sums(matrix) else _products_of_blocks)(matrix, dtype)
    for matrix in matrices
  ]


def _is_faster_by_sums_on_tpu(matrix):
  """Whether sums over products of two rows beat a matrix product.

  One of many values in full float32 precision takes XLA seconds to compile, and more
  time to run where its rows are whole tiles. Where they are not (k is among the tile's
  own axes, or the last axis is not half a tile), taking rows apart takes longer.
  """
  shape = matrix[0].shape[1:]
  in_tiles = len(shape) > 1 and shape[-1] % 64 == 0
  exact = all(block.dtype.itemsize < 4 for block in matrix)
  return math.prod(shape) >= _LONG_ROW and in_tiles and not exact


@functools.partial(jax.jit, static_argnames="dtype")  # Traced once for each shape.
def _sums_of_pairs(matrix, dtype):
  """Inner products of few rows, for each pair a sum: XLA makes them in one pass."""
  rows = [x[i].astype(dtype) for x in matrix for i in range(x.shape[0])]
  found = {
    (i, j): jnp.sum(rows[i] * rows[j])
    for i in range(len(rows))
    for j in range(i, len(rows))
  }
  return _symmetric(found, len(rows))


def _symmetric(found, k):
  """A matrix `[k, k]` from a scalar for each `(i, j)`, i <= j."""
  return jnp.stack(
    [jnp.stack([found[min(i, j), max(i, j)] for j in range(k)]) for i in range(k)]
  )


def _products_of_blocks(matrix, dtype):
  def product(x, y):
    if 1 not in (x.shape[0], y.shape[0]):
      return _dot(x, y, dtype)
    # A matrix product with a single row would copy both on TPU.
    products = jnp.sum(x.astype(dtype) * y.astype(dtype), axis=_inner_axes(x))
    return products.reshape(x.shape[0], y.shape[0])

  return _of_all_pairs(matrix, product)


def _row_by_row(matrices, scales, dtype):
  """Products of rows times their factors, in one loop over the rows of all matrices.

  It reads every matrix k times, but copies nothing and is compiled once.
  """

  def scaled(x, factors):
    factors = factors.reshape(-1, *[1] * (x.ndim - 1))
    return jnp.where(jnp.isnan(factors), 0, x.astype(dtype) * factors)

  def with_all(block, i):
    """Products `[k]` of row i of a block of each matrix with all of its rows."""
    found = []
    for matrix, scale in zip(matrices, scales):
      factors = _by_block(scale, matrix)
      one = lambda x: lax.dynamic_slice_in_dim(x, i, 1)
      row = scaled(one(matrix[block]), one(factors[block]))
      products = [
        jnp.sum(scaled(x, f) * row, axis=_inner_axes(x))
        for x, f in zip(matrix, factors)
      ]
      found.append(jnp.concatenate(products))
    return found

  blocks = [
    lax.map(functools.partial(with_all, b), jnp.arange(x.shape[0]))
    for b, x in enumerate(matrices[0])
  ]
  return [jnp.concatenate(of_matrix) for of_matrix in zip(*blocks)]


def _by_block(scale, matrix):
  ends = list(itertools.accumulate(x.shape[0] for x in matrix))
  return jnp.split(scale, ends[:-1])


def _on_cpu(matrices, scales, *, dtype):
  # XLA's CPU products of long rows copy both operands and run far below the memory's
  # speed; in blocks that fit in the cache they do neither.
  found = []
  for matrix, scale in zip(matrices, scales or [None] * len(matrices)):
    matrix = [_tree.flat_rows(x) for x in matrix]
    few = sum(block.shape[0] for block in matrix) <= _FEW_ROWS
    if few and scale is None and matrix[0].shape[1] >= _LONG_ROW:
      found.append(_by_pairs(matrix, dtype))
    else:
      found.append(_blocked(matrix, dtype, scale))
  return found


def _by_pairs(matrix, dtype):
  """`_products` of few rows: for each pair one sum in each of some lanes.

  On CPU this runs at the memory's speed, which small matrix products do not.
  """
  lanes = _LANES
  places = [(block, i) for block in matrix for i in range(block.shape[0])]
  pairs = [(i, j) for i in range(len(places)) for j in range(i, len(places))]
  size = matrix[0].shape[1]
  zeros = _jax_types.typed_like([jnp.zeros(lanes, dtype) for _ in pairs], matrix)

  def add(step, sums):
    rows = [
      lax.dynamic_slice(block, (i, step * lanes), (1, lanes))[0].astype(dtype)
      for block, i in places
    ]
    return [total + rows[i] * rows[j] for total, (i, j) in zip(sums, pairs)]

  def add_chain(c, sums):
    end = jnp.minimum((c + 1) * _CHAIN, num_steps)
    chain = lax.fori_loop(c * _CHAIN, end, add, zeros)
    return [_add(total, x) for total, x in zip(sums, chain)]

  num_steps = size // lanes
  if num_steps <= _CHAIN:
    sums = [(x, jnp.zeros_like(x)) for x in lax.fori_loop(0, num_steps, add, zeros)]
  else:
    num_chains = -(-num_steps // _CHAIN)
    sums = lax.fori_loop(0, num_chains, add_chain, [(x, x) for x in zeros])
  found = dict(zip(pairs, [_halved(total + lost) for total, lost in sums]))
  total = _symmetric(found, len(places))
  if size % lanes:
    total += _blocked([x[:, size // lanes * lanes :] for x in matrix], dtype, None)
  return total


def _blocked(matrix, dtype, scale):
  """`_products`, a block of columns at a time, each of several chains."""
  num_rows, size = sum(block.shape[0] for block in matrix), matrix[0].shape[1]
  many = num_rows >= _MANY_ROWS
  chains = _BLOCK_CHAINS // 4 if many else _BLOCK_CHAINS
  while chains > 1 and chains * _CHAIN * num_rows > _BLOCK_VALUES:
    chains //= 2
  width = chains * _CHAIN

  def block_products(start, width):
    columns = [
      lax.dynamic_slice_in_dim(x, start, width, 1).astype(dtype) for x in matrix
    ]
    if scale is not None:
      factors = [f[:, None] for f in _by_block(scale, columns)]
      columns = [jnp.where(jnp.isnan(f), 0, x * f) for x, f in zip(columns, factors)]
    if width <= _CHAIN:
      return _dots(columns, dtype)
    if many:
      starts = range(0, width, _CHAIN)
      return _pairwise_sum(
        [_dots([x[:, i : i + _CHAIN] for x in columns], dtype) for i in starts]
      )
    padding = ((0, 0), (0, -width % _CHAIN))
    by_chain = [jnp.pad(x, padding).reshape(x.shape[0], -1, _CHAIN) for x in columns]
    return jnp.sum(_dots(by_chain, dtype, by_chain=True), axis=0)

  num_blocks, rest = divmod(size, width)
  zeros = _jax_types.typed_like(jnp.zeros((num_rows,) * 2, dtype), (matrix, scale))
  if num_blocks > 1:
    add_block = lambda i, sums: _add(sums, block_products(i * width, width))
    total, lost = lax.fori_loop(0, num_blocks, add_block, (zeros, zeros))
    total += lost
  else:
    total = block_products(0, width) if num_blocks else zeros
  if rest:
    total += block_products(num_blocks * width, rest)
  return total


def _add(sums, x):
  """The sum so far and what rounding has lost of it, after x (Knuth's exact sum)."""
  total, lost = sums
  result = total + x
  added = result - total
  return result, lost + ((total - (result - added)) + (x - added))


def _halved(x):
  """The sum over the first axis, of 2**n terms, in n additions."""
  while x.shape[0] > 1:
    half = x.shape[0] // 2
    x = x[:half] + x[half:]
  return x[0]


def _pairwise_sum(terms):
  """The sum of a list of arrays, whose rounding grows with log2 of their number."""
  while len(terms) > 1:
    rest = terms[-1:] if len(terms) % 2 else []
    terms = [a + b for a, b in zip(terms[::2], terms[1::2])] + rest
  return terms[0]


def _of_all_pairs(matrix, product):
  """Inner products of all rows of all blocks, from a function of two blocks."""
  if len(matrix) == 1:
    return product(matrix[0], matrix[0])
  return jnp.block(
    [
      [product(x, y) if i <= j else product(y, x).mT for j, y in enumerate(matrix)]
      for i, x in enumerate(matrix)
    ]
  )


def _dots(matrix, dtype, by_chain=False):
  """Inner products `[k, k]` of the rows of blocks `[k_b, *shape]`.

  With `by_chain` of blocks `[k_b, n, size]` those of each of n parts, `[n, k, k]`.
  """
  dot = functools.partial(_dot, dtype=dtype, by_chain=by_chain)
  return _of_all_pairs(matrix, dot)


def _dot(x, y, dtype, by_chain=False):
  if x.dtype != y.dtype or x.dtype.itemsize < 2 or x.dtype == jnp.float64:
    x, y = x.astype(dtype), y.astype(dtype)
  batch = (1,) if by_chain else ()
  summed = (2,) if by_chain else _inner_axes(x)
  return lax.dot_general(
    x,
    y,
    ((summed, summed), (batch, batch)),
    precision=lax.Precision.HIGHEST,
    preferred_element_type=dtype,
  )
