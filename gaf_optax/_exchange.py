"""Exchange: each device gets its slice of every micro-gradient, and slices join again.

The two halves of a ring all-reduce: an all-to-all costs a device what a
reduce-scatter does, and an all-gather completes the result. In between no device
holds more than one micro-gradient's worth of values.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gaf_optax import _compat, _mesh, _tree

# Bytes of an exchange, about: the values of one are there up to three times while it
# runs, and a smaller one takes mostly latency. Among many devices XLA's TPU compiler
# turns an all-gather to no more than 16 MiB into an all-reduce, of twice the bytes.
_BUCKET = 4 << 20
_MANY_DEVICES, _BUCKET_OF_MANY = 32, 32 << 20

# Values that an exchange is padded to a multiple of. XLA's TPU compiler turns an
# all-gather of other widths into an all-reduce, too; the latter need no reshape either.
_LANES = 128
_ALIGNMENT = 8 * _LANES


class Rows(NamedTuple):
  """Micro-gradients as rows of arrays that this device holds.

  Attributes:
    leaves: arrays `[k, ...]`: whole leaves, or slices of several.
    group_ids: for each the number of its group.
    shards: which devices hold the rest of each row.
    split: from leaves shaped like the parameters, on every replica the same, to one
      array like `leaves[i][0]` for each.
    join: from such arrays to leaves shaped like the parameters.
  """

  leaves: Sequence[jax.Array]
  group_ids: Sequence[int]
  shards: _mesh.Shards
  split: Callable[[Sequence[jax.Array]], Sequence[jax.Array]]
  join: Callable[[Sequence[jax.Array]], Sequence[jax.Array]]


def scatter(
  arrays: Sequence[jax.Array], group_ids: Sequence[int], axes: _mesh.Axes
) -> Rows:
  """Hands each device its slice of all micro-gradients.

  Args:
    arrays: leaves `[k, *shape]` if stacked, else `[*shape]`.
    group_ids: for each leaf the number of its group.
    axes: over which devices they are spread.
  """
  if not axes.axis_names:
    return Rows(arrays, group_ids, axes.shards(), lambda x: x, lambda x: x)
  n, names = axes.num_devices(), axes.axis_names
  replicated = axes.replicated or ((),) * len(arrays)
  shapes = [x.shape[1:] if axes.stacked else x.shape for x in arrays]
  buckets = _buckets(arrays, shapes, list(zip(group_ids, replicated)), n)
  segments = [s for bucket in buckets for s in bucket.segments]

  def exchanged(bucket):
    stacks = [arrays[i] if axes.stacked else arrays[i][None] for i in bucket.leaves]
    sent = _cut(stacks, bucket, n)
    received = _compat.all_to_all(sent, names) if sent.size else sent
    return received.reshape(n * received.shape[1], *received.shape[2:])

  def split(leaves):
    index = lax.axis_index(names)
    own = [_cut([leaves[i][None] for i in b.leaves], b, n) for b in buckets]
    own = [lax.dynamic_index_in_dim(x, index, 0, keepdims=False) for x in own]
    return [x[0] for bucket, rows in zip(buckets, own) for x in bucket.parts(rows)]

  def join(slices):
    slices, results = iter(slices), {}
    for bucket in buckets:
      whole = jnp.concatenate([next(slices) for _ in bucket.segments])
      if whole.size:
        whole = _compat.all_gather(whole, names)
      whole = whole.reshape(n, whole.shape[0] // n, _LANES)
      for i, start, width in bucket.columns():
        flat = _columns(whole, start, width).reshape(-1)
        results[i] = _unflat(flat[: math.prod(shapes[i])], shapes[i])
    return [results[i] for i in range(len(arrays))]

  return Rows(
    [x for bucket in buckets for x in bucket.parts(exchanged(bucket))],
    [label[0] for label, _ in segments],
    _mesh.Shards(names + axes.param_axes, tuple(label[1] for label, _ in segments)),
    split,
    join,
  )


class _Bucket(NamedTuple):
  """What one exchange hands over: slices of leaves, one behind the other.

  Attributes:
    leaves: the numbers of the leaves.
    widths: of each leaf's slices, padding included.
    segments: label (group, and axes that hold the same values) and number of tiles of
      each run of leaves with one label.
  """

  leaves: list[int]
  widths: list[int]
  segments: list[tuple[tuple, int]]

  def columns(self):
    """The number, start and width of each leaf's slice."""
    starts = itertools.accumulate(self.widths, initial=0)
    return zip(self.leaves, starts, self.widths)

  def parts(self, rows):
    """The columns `[k, tiles, 128]` of each segment."""
    ends = list(itertools.accumulate(tiles for _, tiles in self.segments))
    return jnp.split(rows, ends[:-1], axis=1) if ends[1:] else [rows]


def _buckets(arrays, shapes, labels, n) -> list[_Bucket]:
  """Which leaves are exchanged together: of one dtype and type, those of a label first.

  Leaves whose slices are whole tiles of a TPU come first: they are copied without
  shifting values within a tile.
  """
  sizes = [math.prod(shape) for shape in shapes]
  kinds = [(x.dtype, _compat.varying(x)) for x in arrays]
  order = {label: number for number, label in enumerate(dict.fromkeys(labels))}
  buckets = []
  for kind in dict.fromkeys(kinds):
    leaves = [i for i, other in enumerate(kinds) if other == kind]
    least = _BUCKET if n < _MANY_DEVICES else _BUCKET_OF_MANY
    # At most some 8 exchanges, however large the tree.
    limit = max(least // kind[0].itemsize, sum(sizes[i] for i in leaves) // 8)
    held: list[int] = []
    number = 0
    place = lambda i: (order[labels[i]], -(-sizes[i] // n) % _LANES > 0, -sizes[i])
    for i in sorted(leaves, key=place):
      if held and number + sizes[i] > limit:
        buckets.append(_bucket(held, sizes, labels, n))
        held, number = [], 0
      held.append(i)
      number += sizes[i]
    buckets.append(_bucket(held, sizes, labels, n))
  return buckets


def _bucket(leaves, sizes, labels, n) -> _Bucket:
  widths: list[int] = []
  segments = []
  for label, run in itertools.groupby(leaves, key=lambda i: labels[i]):
    own = [-(-sizes[i] // n) for i in run]
    is_last = len(widths) + len(own) == len(leaves)
    total = sum(widths + own)
    # Where that adds less than a hundredth.
    aligned = is_last and total > 100 * _ALIGNMENT
    own[-1] += -total % (_ALIGNMENT if aligned else _LANES)
    segments.append((label, sum(own) // _LANES))
    widths += own
  return _Bucket(leaves, widths, segments)


def _cut(stacks, bucket, n):
  """The slices of a bucket's leaves `[k_local, *shape]`: `[n, k_local, tiles, 128]`."""
  tiles, pending = [], []
  for x, width in zip(stacks, bucket.widths):
    flat = _flat(x)
    rows, size = flat.shape
    flat = jnp.pad(flat, ((0, 0), (0, n * width - size)))
    pending.append(jnp.swapaxes(flat.reshape(rows, n, width), 0, 1))
    if sum(x.shape[2] for x in pending) % _LANES == 0:
      joined = jnp.concatenate(pending, axis=2)
      tiles.append(joined.reshape(n, rows, joined.shape[2] // _LANES, _LANES))
      pending = []
  return jnp.concatenate(tiles, axis=2)


def _columns(tiles, start, width):
  """Columns of `[n, tiles, 128]` for each n, in tiles if they are whole ones."""
  first, last = start // _LANES, -(-(start + width) // _LANES)
  part = tiles[:, first:last]
  if (last - first) * _LANES == width:
    return part
  start -= first * _LANES
  return _tree.flat_rows(part)[:, start : start + width]


def _flat(x):
  """Rows `[k, *shape]` as `[k, size]`, on TPU in the order of its tiles."""
  flat = _tree.flat_rows
  if not _has_whole_tiles(x.shape[1:]):
    return flat(x)
  in_tiles = lambda x: flat(jnp.swapaxes(x.reshape(_tiled_shape(x.shape)), -3, -2))
  return lax.platform_dependent(x, tpu=in_tiles, default=flat)


def _unflat(flat, shape):
  """The array `[*shape]` that `_flat` made a row of."""
  plain = lambda flat: flat.reshape(shape)
  if not _has_whole_tiles(shape):
    return plain(flat)
  *outer, rows, eight, columns, lanes = _tiled_shape(shape)

  def from_tiles(flat):
    tiles = flat.reshape(*outer, rows, columns, eight, lanes)
    return plain(jnp.swapaxes(tiles, -3, -2))

  return lax.platform_dependent(flat, tpu=from_tiles, default=plain)


def _has_whole_tiles(shape):
  """Whether a TPU keeps an array in whole tiles of 8 x 128 values, not interleaved."""
  return len(shape) > 1 and shape[-2] % 8 == 0 and shape[-1] % _LANES == 0


def _tiled_shape(shape):
  *outer, rows, columns = shape
  return (*outer, rows // 8, 8, columns // _LANES, _LANES)
