"""Exchanges slices of micro-gradients: the two halves of a ring all-reduce."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gaf_optax import _compat, _kernels, _mesh, _options, _tree

# Approximate bytes per exchange, which needs up to three times its size in memory.
# Smaller ones are latency-bound. From _MANY_DEVICES on, XLA's TPU compiler turns an
# all-gather of up to 16 MiB into an all-reduce with twice the bytes.
_BUCKET = 4 << 20
_MANY_DEVICES, _BUCKET_OF_MANY = 32, 32 << 20

# Segments are padded to multiples of _LANES, large exchanges to those of _ALIGNMENT:
# XLA's TPU compiler also turns all-gathers of other widths into an all-reduce.
_LANES = 128
_ALIGNMENT = 8 * _LANES


class Slices(NamedTuple):
  """Slices of all micro-gradients, or whole leaves, on this device.

  Attributes:
    stack: a `Stack` of the slices.
    split: maps leaves shaped like the parameters, equal on all devices, to arrays like
      `stack.arrays[i][0]`.
    join: the inverse of `split`.
  """

  stack: _kernels.Stack
  split: Callable[[Sequence[jax.Array]], Sequence[jax.Array]]
  join: Callable[[Sequence[jax.Array]], Sequence[jax.Array]]


def scatter(arrays: Sequence[jax.Array], spec: _options.StepSpec) -> Slices:
  """Gives each device its slice of leaves `[k, *shape]`, or `[*shape]` unstacked."""
  (_, group_ids, num_groups), axes = spec.layout, spec.axes
  if not axes.axis_names:
    shards = axes.shards()
    stack = _kernels.Stack(arrays, group_ids, num_groups, spec.embed, shards)
    return Slices(stack, lambda x: x, lambda x: x)
  n, names = axes.num_devices(), axes.axis_names
  replicated = axes.replicated or ((),) * len(arrays)
  shapes = [x.shape[1:] if axes.stacked else x.shape for x in arrays]
  buckets = _buckets(arrays, shapes, list(zip(group_ids, replicated)), n)
  labels = [label for bucket in buckets for label, _ in bucket.segments]

  def exchange(bucket):
    stacks = [arrays[i] if axes.stacked else arrays[i][None] for i in bucket.indices]
    sent = _split_slices(stacks, bucket, n)
    received = _compat.all_to_all(sent, names) if sent.size else sent
    return received.reshape(n * received.shape[1], *received.shape[2:])

  def split(leaves):
    results, index = [], lax.axis_index(names)
    for bucket in buckets:
      slices = _split_slices([leaves[i][None] for i in bucket.indices], bucket, n)
      own = lax.dynamic_index_in_dim(slices, index, 0, keepdims=False)
      results += [x[0] for x in bucket.split_segments(own)]
    return results

  def join(slices):
    slices, results = iter(slices), {}
    for bucket in buckets:
      whole = jnp.concatenate([next(slices) for _ in bucket.segments])
      if whole.size:
        whole = _compat.all_gather(whole, names)
      whole = whole.reshape(n, whole.shape[0] // n, _LANES)
      starts = itertools.accumulate(bucket.widths, initial=0)
      for i, start, width in zip(bucket.indices, starts, bucket.widths):
        flat = _columns(whole, start, width).reshape(-1)
        results[i] = _unflatten_tiles(flat[: math.prod(shapes[i])], shapes[i])
    return [results[i] for i in range(len(arrays))]

  slices = [x for bucket in buckets for x in bucket.split_segments(exchange(bucket))]
  ids = [group for group, _ in labels]
  shards = _mesh.Shards(names + axes.param_axes, tuple(same for _, same in labels))
  stack = _kernels.Stack(slices, ids, num_groups, spec.embed, shards)
  return Slices(stack, split, join)


class _Bucket(NamedTuple):
  """One exchange: contiguous slices of leaves, sorted by group and replicated axes.

  Attributes:
    indices: of the leaves.
    widths: the padded widths of their slices.
    segments: the label (group, replicated axes) and number of tiles of each segment.
  """

  indices: list[int]
  widths: list[int]
  segments: list[tuple[tuple, int]]

  def split_segments(self, rows):
    """The columns `[k, tiles, 128]` of each segment."""
    ends = list(itertools.accumulate(tiles for _, tiles in self.segments))
    return jnp.split(rows, ends[:-1], axis=1) if ends[1:] else [rows]


def _buckets(arrays, shapes, labels, n) -> list[_Bucket]:
  """Splits leaves of the same dtype and varying axes into buckets, sorted by label.

  Slices of whole TPU tiles come first: copying them shifts no values within a tile.
  """
  sizes = [math.prod(shape) for shape in shapes]
  kinds = [(x.dtype, _compat.varying(x)) for x in arrays]
  order = {label: number for number, label in enumerate(dict.fromkeys(labels))}
  key = lambda i: (order[labels[i]], -(-sizes[i] // n) % _LANES > 0, -sizes[i])
  parts: list[list[int]] = []
  for kind in dict.fromkeys(kinds):
    indices = [i for i, other in enumerate(kinds) if other == kind]
    minimum = _BUCKET if n < _MANY_DEVICES else _BUCKET_OF_MANY
    # At most about 8 exchanges for large trees.
    limit = max(minimum // kind[0].itemsize, sum(sizes[i] for i in indices) // 8)
    total = math.inf
    for i in sorted(indices, key=key):
      if total + sizes[i] > limit:
        parts.append([])
        total = 0
      parts[-1].append(i)
      total += sizes[i]
  return [_bucket(part, sizes, labels, n) for part in parts]


def _bucket(indices, sizes, labels, n) -> _Bucket:
  """The bucket of these leaves, with padding at the end of each segment."""
  widths: list[int] = []
  segments = []
  for label, run in itertools.groupby(indices, key=lambda i: labels[i]):
    own = [-(-sizes[i] // n) for i in run]
    is_last = len(widths) + len(own) == len(indices)
    total = sum(widths + own)
    # Padding may add at most about one percent.
    aligned = is_last and total > 100 * _ALIGNMENT
    own[-1] += -total % (_ALIGNMENT if aligned else _LANES)
    segments.append((label, sum(own) // _LANES))
    widths += own
  return _Bucket(indices, widths, segments)


def _split_slices(stacks, bucket, n):
  """Slices of leaves `[k_local, *shape]` for n devices: `[n, k_local, tiles, 128]`."""
  tiles, pending = [], []
  for x, width in zip(stacks, bucket.widths):
    flat = _flatten_tiles(x)
    rows, size = flat.shape
    flat = jnp.pad(flat, ((0, 0), (0, n * width - size)))
    pending.append(jnp.swapaxes(flat.reshape(rows, n, width), 0, 1))
    if sum(x.shape[2] for x in pending) % _LANES == 0:
      joined = jnp.concatenate(pending, axis=2)
      tiles.append(joined.reshape(n, rows, joined.shape[2] // _LANES, _LANES))
      pending = []
  return jnp.concatenate(tiles, axis=2)


def _columns(tiles, start, width):
  """Columns of `[n, tiles * 128]`; whole tiles are returned as `[n, tiles, 128]`."""
  first, last = start // _LANES, -(-(start + width) // _LANES)
  part = tiles[:, first:last]
  if (last - first) * _LANES == width:
    return part
  start -= first * _LANES
  return _tree.flat_rows(part)[:, start : start + width]


def _flatten_tiles(x):
  """`[k, *shape]` as `[k, size]`, on TPU in the order of its 8 x 128 tiles."""
  tiled = _tiled_shape(x.shape[1:])
  if tiled is None:
    return _tree.flat_rows(x)
  in_tiles = lambda x: jnp.swapaxes(x.reshape(x.shape[0], *tiled), -3, -2)
  return lax.platform_dependent(
    x, tpu=lambda x: _tree.flat_rows(in_tiles(x)), default=_tree.flat_rows
  )


def _unflatten_tiles(flat, shape):
  """The inverse of `_flatten_tiles` for one row."""
  plain = lambda flat: flat.reshape(shape)
  tiled = _tiled_shape(shape)
  if tiled is None:
    return plain(flat)
  *outer, rows, eight, columns, lanes = tiled

  def from_tiles(flat):
    tiles = flat.reshape(*outer, rows, columns, eight, lanes)
    return plain(jnp.swapaxes(tiles, -3, -2))

  return lax.platform_dependent(flat, tpu=from_tiles, default=plain)


def _tiled_shape(shape):
  """`[..., rows / 8, 8, columns / 128, 128]`; None if tiles would not be whole."""
  if len(shape) < 2 or shape[-2] % 8 or shape[-1] % _LANES:
    return None
  *outer, rows, columns = shape
  return (*outer, rows // 8, 8, columns // _LANES, _LANES)
