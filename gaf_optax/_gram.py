"""Gram: the inner products of micro-gradients, whatever their scale and dtype."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gaf_optax import _compat, _exchange, _numerics, _sharded

# Squared norms in this range are taken as computed: products of two of them, and
# sums of a few thousand, stay far from both ends of float32.
_ORDINARY = (1e-18, 1e18)

# Terms that are added up one after the other, at most, on a CPU of any vector width.
# The errors of equal terms all point one way and grow with their number: of 96 float32
# terms to at most 1.5e-6 of the sum.
_CHAIN = 96

# Values of all rows that one step of a blocked inner product reads: they fit in a
# second-level cache.
_BLOCK_VALUES = 1 << 17

# Chains in such a block, at most; a power of two.
_BLOCK_CHAINS = 32

# Values in a row from which on products of few rows are added up by pairs.
_LEAST_SIZE = 1 << 14

_HIGHEST = lax.Precision.HIGHEST


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

  def scaled(self) -> jax.Array:
    """The Gram matrix scaled so that the largest norm is 1, `[..., k, k]`."""
    squares = jnp.diagonal(self.products, axis1=-2, axis2=-1)
    # Floor of log2 of each norm, so that the largest is found without overflow.
    magnitude = jnp.where(
      squares > 0,
      self.exponents + jnp.frexp(squares)[1] // 2,
      _numerics.ZERO_EXPONENT,
    )
    top = jnp.max(magnitude, axis=-1, keepdims=True)
    unit = _numerics.power_of_two(self.exponents - top, self.products.dtype)
    matrix = self.products * unit[..., :, None] * unit[..., None, :]
    largest = jnp.max(jnp.diagonal(matrix, axis1=-2, axis2=-1), axis=-1, keepdims=True)[
      ..., None
    ]
    return matrix / jnp.where(largest > 0, largest, 1)


def from_matrix(matrix: jax.Array, valid: jax.Array) -> Gram:
  """The `Gram` of a plain Gram matrix `[k, k]`; `valid` is bool `[k]`."""
  matrix = jnp.where(valid[:, None] & valid[None, :], matrix, 0)
  squares = jnp.diagonal(matrix)
  exponents = jnp.where(
    squares > 0, jnp.frexp(squares)[1] // 2, _numerics.ZERO_EXPONENT
  )
  unit = _numerics.power_of_two(jnp.where(squares > 0, -exponents, 0), matrix.dtype)
  return Gram(matrix * unit[:, None] * unit[None, :], exponents)


def gram(
  leaves: Sequence[Sequence[jax.Array]],
  members: Sequence[int],
  num_groups: int,
  embed: Callable[[jax.Array], jax.Array] | None = None,
  spread: _exchange.Spread = _exchange.HERE,
) -> tuple[Gram, jax.Array]:
  """Inner products of the vectors whose pieces the leaves hold, by group.

  Reads every leaf once where the squared norms are in an ordinary range. Where a
  vector is not finite, zero, or so long or short that its square leaves the range
  of the accumulator, a second form runs, which scales each vector by a power of
  two first.

  Args:
    leaves: for each leaf its blocks of rows, arrays `[k_b, *shape]`; the blocks
      of a leaf together hold the k rows, in order.
    members: for each leaf the number of its group, in [0, num_groups]. Leaves of
      group `num_groups` take no part in the products, only in the second result.
    num_groups: how many groups there are.
    embed: an elementwise function, applied to each block before the products.
    spread: which devices hold parts of the leaves; all of them get one result.

  Returns:
    The `Gram` of each group (`[num_groups, k, k]` and `[num_groups, k]`), and
    bool `[k]`: whether all values of a row are finite, in every leaf.
  """
  k = sum(block.shape[0] for block in leaves[0])
  dtype = _numerics.real_accumulator_dtype(
    block.dtype for blocks in leaves for block in blocks
  )
  counted = spread.counted or (None,) * len(leaves)
  real = spread.real or (None,) * len(leaves)
  rows = [
    (_rows(blocks, embed, dtype, columns), member, counts)
    for blocks, member, counts, columns in zip(leaves, members, counted, real)
    if member < num_groups
  ]
  # What the products do not read has to be looked at for itself.
  unread = [
    part
    for blocks, member in zip(leaves, members)
    if member == num_groups or embed is not None
    for part in _rows(blocks, None, dtype)
  ]

  def products(scale=None):
    terms: list[list[jax.Array]] = [[] for _ in range(num_groups)]
    for leaf_rows, member, counts in rows:
      for part in leaf_rows:
        leaf_scale = None if scale is None else scale[member]
        found = _inner_products(part, dtype, leaf_scale)
        terms[member].append(found if counts is None else jnp.where(counts, found, 0))
    return jnp.stack([_pairwise_sum(of_group) for of_group in terms])

  def largest_values():
    found: list[list[jax.Array]] = [[] for _ in range(num_groups)]
    for leaf_rows, member, _ in rows:
      found[member] += [_largest(part, dtype) for part in leaf_rows]
    largest = jnp.stack([jnp.max(jnp.stack(x), axis=0) for x in found])
    # What a maximum over devices makes of NaN is up to the network.
    return spread.max(jnp.where(jnp.isfinite(largest), largest, jnp.inf))

  bad = jnp.zeros((k,), bool)
  for part in unread:
    bad |= ~jnp.isfinite(_largest(part, dtype))
  # One sum over the devices for both.
  sums = spread.sum(jnp.concatenate([products().reshape(-1), bad.astype(dtype)]))
  unread_finite = sums[-k:] == 0
  raw = sums[:-k].reshape(num_groups, k, k)
  squares = jnp.diagonal(raw, axis1=1, axis2=2)
  ordinary = jnp.all(unread_finite) & jnp.all(
    (squares >= _ORDINARY[0]) & (squares <= _ORDINARY[1])
  )

  # Two conditions for one reason: a branch's result is computed once, while within
  # one branch XLA would repeat the maximum over all leaves in each leaf's loop.
  largest = _compat.cond(
    ordinary, lambda: jnp.ones((num_groups, k), dtype), largest_values
  )
  valid = unread_finite & jnp.all(jnp.isfinite(largest), axis=0)

  def as_computed():
    exponents = jnp.zeros((num_groups, k), jnp.int32)
    return Gram(raw, exponents)

  def rescaled():
    info = jnp.finfo(dtype)
    exponents = jnp.frexp(jnp.where(valid, largest, 0))[1]
    exponents = jnp.clip(exponents, info.minexp, -info.minexp)
    scale = _numerics.power_of_two(-exponents, dtype)
    scaled = spread.sum(products(jnp.where(valid, scale, jnp.nan)))
    squares = jnp.diagonal(scaled, axis1=1, axis2=2)
    exponents = jnp.where(squares > 0, exponents, _numerics.ZERO_EXPONENT)
    return Gram(scaled, exponents.astype(jnp.int32))

  return _compat.cond(ordinary, as_computed, rescaled), valid


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
  options: dict[str, Any] = dict(members=[0] * len(pairs), num_groups=1)
  if _sharded.is_sharded([x for pair in pairs for x in pair]):
    both, valid = _sharded.gram(gram, pairs, **options)
  else:
    both, valid = gram(pairs, **options)
  n = both.products[0]
  result = _numerics.distance("cosine", n[0, 1], n[0, 0], n[1, 1])
  return jnp.where(jnp.all(valid), result, jnp.nan).astype(jnp.float32)


def _rows(blocks, embed, dtype, columns=None):
  """The blocks of a leaf as real matrices `[k_b, size]`: one tuple of blocks for
  real leaves, two (real and imaginary parts) for complex ones.

  Of what `embed` made, only `columns` (bool `[1, size]`) are real.
  """
  if embed is not None:
    blocks = [embedded(block, embed, dtype) for block in blocks]
    if columns is not None:
      blocks = [jnp.where(columns, block, 0) for block in blocks]
  flat = [x.reshape(x.shape[0], math.prod(x.shape[1:])) for x in blocks]
  if any(jnp.iscomplexobj(block) for block in flat):
    return [tuple(x.real for x in flat), tuple(x.imag for x in flat)]
  return [tuple(flat)]


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


def _largest(part, dtype):
  """The largest absolute value in each row `[k]`; NaN where there is a NaN."""
  # Not the maximum of abs(block), for which some versions of XLA copy the block.
  extremes = [
    jnp.maximum(jnp.max(block, axis=1, initial=0), -jnp.min(block, axis=1, initial=0))
    for block in part
  ]
  return jnp.concatenate([x.astype(dtype) for x in extremes])


def _inner_products(part, dtype, scale):
  """Inner products `[k, k]` of the rows that the blocks `[k_b, size]` hold.

  `scale` is None, or the factor of each row `[k]`, NaN for rows that count as
  zero.
  """
  if scale is not None:
    return _blocked(part, dtype, scale)
  return lax.platform_dependent(
    *part,
    # XLA's CPU products of long rows copy both operands and run far below the
    # memory's speed; in blocks that fit in the cache they do neither.
    cpu=lambda *part: (
      _by_pairs(part, dtype)
      if sum(x.shape[0] for x in part) <= _compat.FEW_ROWS
      and part[0].shape[1] >= _LEAST_SIZE
      else _blocked(part, dtype, None)
    ),
    default=lambda *part: _products(part, dtype),
  )


def _by_pairs(part, dtype):
  """`_inner_products` of few rows: for each pair one sum in each of some lanes.

  On CPU this runs at the memory's speed, which small matrix products do not.
  """
  lanes = _compat.LANES
  places = [(block, i) for block in part for i in range(block.shape[0])]
  pairs = [(i, j) for i in range(len(places)) for j in range(i, len(places))]
  size = part[0].shape[1]
  zero = _numerics.typed_zero(part)
  zeros = [_numerics.typed(jnp.zeros(lanes, dtype), zero) for _ in pairs]

  def add_chain(start, length, sums):
    def add(step, sums):
      rows = [
        lax.dynamic_slice(block, (i, start + step * lanes), (1, lanes))[0].astype(dtype)
        for block, i in places
      ]
      return [total + rows[i] * rows[j] for total, (i, j) in zip(sums, pairs)]

    chain = lax.fori_loop(0, length, add, zeros)
    return [_add(*total, x) for total, x in zip(sums, chain)]

  sums = [(x, x) for x in zeros]
  num_chains, rest = divmod(size // lanes, _CHAIN)
  if num_chains:
    step = _CHAIN * lanes
    sums = lax.fori_loop(
      0, num_chains, lambda i, sums: add_chain(i * step, _CHAIN, sums), sums
    )
  if rest:
    sums = add_chain(num_chains * _CHAIN * lanes, rest, sums)
  found = dict(zip(pairs, [_halved(total + lost) for total, lost in sums]))
  total = jnp.stack(
    [
      jnp.stack([found[min(i, j), max(i, j)] for j in range(len(places))])
      for i in range(len(places))
    ]
  )
  if size % lanes:
    total += _blocked([x[:, size // lanes * lanes :] for x in part], dtype, None)
  return total


def _blocked(part, dtype, scale):
  """`_inner_products`, a block of columns at a time, each of several chains."""
  rows, size = sum(block.shape[0] for block in part), part[0].shape[1]
  chains = _BLOCK_CHAINS
  while chains > 1 and chains * _CHAIN * rows > _BLOCK_VALUES:
    chains //= 2

  def block_products(start, chains, chain):
    columns = [
      lax.dynamic_slice_in_dim(x, start, chains * chain, 1).astype(dtype) for x in part
    ]
    if scale is not None:
      ends = list(itertools.accumulate(x.shape[0] for x in columns))
      factors = jnp.split(scale[:, None], ends[:-1])
      columns = [jnp.where(jnp.isnan(f), 0, x * f) for x, f in zip(columns, factors)]
    return _halved(
      _products([x.reshape(x.shape[0], chains, chain) for x in columns], dtype)
    )

  zero = _numerics.typed_zero((part, scale))
  none = _numerics.typed(jnp.zeros((rows, rows), dtype), zero)
  total, lost, start = none, none, 0
  while size - start >= _CHAIN:
    width = chains * _CHAIN
    num_blocks = (size - start) // width
    first = start
    step = lambda i, sums: _add(
      *sums, block_products(first + i * width, chains, _CHAIN)
    )
    if num_blocks > 1:
      total, lost = lax.fori_loop(0, num_blocks, step, (total, lost))
    elif num_blocks:
      total, lost = step(0, (total, lost))
    start += num_blocks * width
    chains = max(chains // 2, 1)
  if start < size:
    total, lost = _add(total, lost, block_products(start, 1, size - start))
  return total + lost


def _add(total, lost, x):
  """`total + x`, and what rounding has lost so far (Knuth's exact addition)."""
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


def _products(part, dtype):
  """Inner products of all rows of all blocks, by one matrix product a pair.

  `[k, k]` for blocks `[k_b, size]`, `[n, k, k]` for `[k_b, n, size]`.
  """
  batch = tuple(range(1, part[0].ndim - 1))
  last = (part[0].ndim - 1,)

  def dot(x, y):
    if x.dtype != y.dtype or x.dtype.itemsize < 2 or x.dtype == jnp.float64:
      x, y = x.astype(dtype), y.astype(dtype)
    return lax.dot_general(
      x,
      y,
      ((last, last), (batch, batch)),
      precision=_HIGHEST,
      preferred_element_type=dtype,
    )

  if len(part) == 1:
    return dot(part[0], part[0])
  return jnp.block(
    [
      [dot(x, y) if i <= j else dot(y, x).mT for j, y in enumerate(part)]
      for i, x in enumerate(part)
    ]
  )
