"""Exchange: each device gets its slice of every micro-gradient, and slices join again.

The two halves of a ring all-reduce: an all-to-all costs a device what a
reduce-scatter does, and an all-gather completes the result. In between no device
holds more than one micro-gradient's worth of values.
"""

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gaf_optax import _combine, _jax_types, _mesh, _tree

# Exchanges that a tree of one dtype is cut into, at most. While one runs, its values
# are there up to three times, so that more of them need less memory at a time.
_NUM_BUCKETS = 8

# Bytes of an exchange, about, at least: a smaller one takes mostly latency. Among many
# devices XLA's TPU compiler turns an all-gather to no more than 16 MiB into an
# all-reduce, which sends twice the bytes.
_MIN_BUCKET = 4 << 20
_MANY_DEVICES, _MIN_BUCKET_OF_MANY = 32, 32 << 20

# Values that the slices of an exchange are padded to multiples of. XLA's TPU compiler
# turns an all-gather of other widths into an all-reduce, which sends twice the bytes;
# multiples of the first need no reshape either, and are taken where they add no more
# than 1/400.
_LANES = 128
_ALIGNMENTS = (8 * _LANES, _LANES)

# Values of a leaf on one device up to which it is joined with others, and of what it
# is joined to: so many that `_combine` does not cut its loop into the parts again.
_SMALL, _BUNDLE = 1 << 12, _combine.SMALL


class Rows(NamedTuple):
  """Micro-gradients as rows of leaves that this device holds.

  Attributes:
    leaves: arrays `[k, ...]`: whole leaves, or slices of several.
    group_ids: for each the number of its group.
    shards: which devices hold the rest of each row.
    split: from leaves shaped like the parameters, on every replica the same, to one
      array like `leaves[i][0]` for each.
    join: from such arrays to leaves shaped like the parameters.
  """

  leaves: list[jax.Array]
  group_ids: tuple[int, ...]
  shards: _mesh.Shards
  split: Callable[[Sequence[jax.Array]], list[jax.Array]]
  join: Callable[[Sequence[jax.Array]], list[jax.Array]]


def scatter(
  arrays: Sequence[jax.Array],
  group_ids: Sequence[int],
  axes: _mesh.Axes,
  embedded: bool,
) -> Rows:
  """Hands each device its slice of all micro-gradients.

  Args:
    arrays: leaves `[k, *shape]` if stacked, else `[*shape]`.
    group_ids: for each leaf the number of its group.
    axes: a `_mesh.Axes`.
    embedded: whether a function is applied to them: `shards.unpadded` is wanted, and
      leaves that are all here are not joined.
  """
  if not axes.axis_names:
    return _bundled(arrays, group_ids, axes, embedded)

  n = axes.num_replicas()
  replicated = axes.replicated or ((),) * len(arrays)
  rows = [x if axes.stacked else x[None] for x in arrays]
  flat = [_flat(x) for x in rows]
  buckets = _plan(
    [x.shape[1] for x in flat],
    [(x.dtype, _jax_types.varying(x)) for x in flat],
    list(zip(group_ids, replicated)),
    n,
  )
  segments = [segment for bucket in buckets for segment in bucket]

  def split(leaves):
    index = lax.axis_index(axes.axis_names)
    flat = [_flat(x[None]) for x in leaves]
    return [
      _in_tiles(lax.dynamic_index_in_dim(_cut(flat, segment, n), index, 0, False)[0])
      for segment in segments
    ]

  def join(slices):
    slices = iter(slices)
    values: list[list[jax.Array]] = [[] for _ in rows]
    for bucket in buckets:
      gathered = _one_behind_the_other([next(slices) for _ in bucket], 0)
      if gathered.size:
        gathered = _jax_types.all_gather(gathered, axes.axis_names)
      whole_bucket = gathered.reshape(n, gathered.shape[0] // n, *gathered.shape[1:])
      for segment, whole in zip(bucket, _by_segment(whole_bucket, bucket)):
        whole, start = whole.reshape(-1), 0
        for span in segment.spans:
          stop = start + span.stop - span.start
          values[span.leaf].append(whole[start:stop])
          start = stop
    return [
      _unflat(jnp.concatenate(of_leaf), x.shape[1:]) for of_leaf, x in zip(values, rows)
    ]

  return Rows(
    _exchanged(flat, buckets, n, axes.axis_names),
    tuple(segment.group_id for segment in segments),
    _mesh.Shards(
      axes.axis_names + axes.param_axes,
      tuple(_mesh.primary(segment.replicated) for segment in segments),
      tuple(_unpadded(s, n, axes.axis_names) if embedded else None for s in segments),
    ),
    split,
    join,
  )


def _bundled(arrays, group_ids, axes, embedded):
  """Stacks `[k, *shape]` that are all here: small leaves lie behind one another.

  A leaf's own loops and calls would take longer, to compile and to run, than copying
  its few values.
  """
  replicated = axes.replicated or ((),) * len(arrays)
  bundles: list[list[int]] = []  # The numbers of the leaves in each.
  open_bundles: dict[Any, tuple[list[int] | None, int]] = {}
  for i, x in enumerate(arrays):
    size = math.prod(x.shape[1:])
    if embedded or size > _SMALL or any(_jax_types.explicit_spec(x)):
      bundles.append([i])
      continue
    kind = (x.dtype, _jax_types.varying(x), group_ids[i], replicated[i])
    bundle, num_values = open_bundles.get(kind, (None, 0))
    if bundle is None or num_values + size > _BUNDLE:
      bundles.append(bundle := [])
      num_values = 0
    bundle.append(i)
    open_bundles[kind] = bundle, num_values + size

  def bundled(leaves, first):
    """The leaves of each bundle joined, but for their axes before `first`."""
    flat = lambda x: x.reshape(*x.shape[:first], math.prod(x.shape[first:]))
    return [
      leaves[bundle[0]]
      if len(bundle) == 1
      else jnp.concatenate([flat(leaves[i]) for i in bundle], axis=first)
      for bundle in bundles
    ]

  def join(values):
    results: dict[int, jax.Array] = {}
    for bundle, value in zip(bundles, values):
      shapes = [arrays[i].shape[1:] for i in bundle]
      ends = list(itertools.accumulate(math.prod(shape) for shape in shapes))
      leaves = jnp.split(value, ends[:-1]) if len(bundle) > 1 else [value]
      results |= {i: x.reshape(s) for i, x, s in zip(bundle, leaves, shapes)}
    return [results[i] for i in range(len(arrays))]

  flags = tuple(_mesh.primary(replicated[bundle[0]]) for bundle in bundles)
  return Rows(
    bundled(arrays, 1),
    tuple(group_ids[bundle[0]] for bundle in bundles),
    _mesh.Shards(axes.param_axes, flags if axes.param_axes else (), ()),
    lambda leaves: bundled(leaves, 0),
    join,
  )


class _Span(NamedTuple):
  """Values `[start, stop)` of a flattened leaf."""

  leaf: int
  start: int
  stop: int


class _Segment(NamedTuple):
  """Values of one group that are cut into n slices of `width`, the last padded."""

  group_id: int
  replicated: tuple[Hashable, ...]
  spans: tuple[_Span, ...]
  width: int


def _plan(sizes, kinds, labels, n) -> list[list[_Segment]]:
  """What is exchanged together: buckets of segments.

  Leaves of one kind (dtype and type) and one label (group, and axes that they are
  replicated over) lie behind one another, and are padded at the end alone. So the
  number of exchanges does not depend on the number of leaves.
  """
  buckets = []
  for kind in dict.fromkeys(kinds):
    of_kind = [i for i, other in enumerate(kinds) if other == kind]
    num_values = sum(sizes[i] for i in of_kind)
    min_bucket = _MIN_BUCKET if n < _MANY_DEVICES else _MIN_BUCKET_OF_MANY
    num_buckets = round(num_values * kind[0].itemsize / min_bucket)
    num_buckets = min(max(num_buckets, 1), _NUM_BUCKETS)
    limit = max(-(-num_values // num_buckets), 1)
    by_label: list[dict[Any, list[_Span]]] = [{} for _ in range(num_buckets)]
    start = 0
    for label in dict.fromkeys(labels[i] for i in of_kind):
      # Large leaves first: what lies before them is mostly whole tiles of a TPU, so
      # that they are copied without shifting values within a tile.
      leaves = [i for i in of_kind if labels[i] == label]
      for leaf in sorted(leaves, key=lambda i: -sizes[i]):
        for span in _pieces(leaf, sizes[leaf], limit):
          stop = start + span.stop - span.start
          bucket = by_label[min((start + stop) // (2 * limit), num_buckets - 1)]
          bucket.setdefault(label, []).append(span)
          start = stop
    buckets += [_segments(bucket, n) for bucket in by_label if bucket]
  return buckets


def _pieces(leaf, size, limit) -> list[_Span]:
  """A leaf in equal pieces of no more than about `limit` values, mostly one."""
  number = max(-(-size // limit), 1)
  length = -(-size // number)
  if number > 1:
    length = -(-length // _ALIGNMENTS[0]) * _ALIGNMENTS[0]
  starts = range(0, size, length) if size else [0]
  return [_Span(leaf, start, min(start + length, size)) for start in starts]


def _segments(by_label, n) -> list[_Segment]:
  """A bucket: its segments, the last one so wide that the bucket is aligned.

  Those that are whole tiles come first.
  """
  found = []
  for (group_id, replicated), spans in by_label.items():
    width = _aligned(-(-sum(span.stop - span.start for span in spans) // n), False)
    found.append(_Segment(group_id, replicated, tuple(spans), width))
  *others, last = sorted(found, key=lambda segment: segment.width % _LANES > 0)
  total = sum(segment.width for segment in others)
  width = _aligned(total + last.width, True) - total
  return [*others, last._replace(width=width)]


def _aligned(width, always) -> int:
  """The width with as much padding as is worth it; with `always` at least some."""
  for unit in _ALIGNMENTS:
    padded = -(-width // unit) * unit
    if 400 * (padded - width) <= width:
      return padded
  return padded if always else width


def _flat(x):
  """Rows `[k, *shape]` as `[k, size]`, in the order that costs least to make."""
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
  """Whether a TPU keeps an array in whole tiles of 8 x 128 values.

  In the order of its tiles it is flat without being copied.
  """
  return len(shape) > 1 and shape[-2] % 8 == 0 and shape[-1] % _LANES == 0


def _tiled_shape(shape):
  *outer, rows, columns = shape
  return (*outer, rows // 8, 8, columns // _LANES, _LANES)


def _cut(flat, segment, n):
  """The slices of a segment, `[n, k_local, width]`."""
  columns = [flat[s.leaf][:, s.start : s.stop] for s in segment.spans]
  rows, dtype = columns[0].shape[0], columns[0].dtype
  padding = n * segment.width - sum(x.shape[1] for x in columns)
  if padding:
    columns.append(jnp.zeros((rows, padding), dtype))
  if rows == 1:
    whole = jnp.concatenate([x.reshape(-1) for x in columns])
    return whole.reshape(n, 1, segment.width)
  whole = jnp.concatenate(columns, axis=1).reshape(rows, n, segment.width)
  return jnp.swapaxes(whole, 0, 1)


def _exchanged(flat, buckets, n, names):
  """This replica's slices of all segments, `[k, width]` each, in tiles."""
  received: list[jax.Array] = []
  before = None
  for bucket in buckets:
    leaves = {span.leaf for segment in bucket for span in segment.spans}
    sent = {i: flat[i] for i in leaves}
    if (
      before is not None
      and before.dtype == flat[min(leaves)].dtype
      and (_jax_types.varying(before) == _jax_types.varying(flat[min(leaves)]))
    ):
      # One bucket after the other, so that only one is there in several copies.
      sent, before = lax.optimization_barrier((sent, before))
    cut = [_in_tiles(_cut(sent, segment, n)) for segment in bucket]
    slices = _one_behind_the_other(cut, 2)
    if slices.size:
      slices = lax.optimization_barrier(_jax_types.all_to_all(slices, names))
    before = slices.reshape(n * slices.shape[1], *slices.shape[2:])
    received += _by_segment(before, bucket)
  return received


def _in_tiles(x):
  """`[..., c]` as `[..., c / 128, 128]` if that is possible.

  On TPU each row of such an array is by itself, while the rows of `[k, c]` are
  interleaved.
  """
  if x.shape[-1] % _LANES:
    return x
  return x.reshape(*x.shape[:-1], x.shape[-1] // _LANES, _LANES)


def _one_behind_the_other(slices, axis):
  """Slices `[..., c / 128, 128]`, then those `[..., c]`, joined in tiles."""
  in_tiles = [x for x in slices if x.ndim == axis + 2]
  flat = [x for x in slices if x.ndim == axis + 1]
  if flat:
    in_tiles.append(_in_tiles(jnp.concatenate(flat, axis)))
  return jnp.concatenate(in_tiles, axis)


def _by_segment(columns, bucket):
  """The columns of each segment, in tiles, of `[r, c / 128, 128]`."""
  found, start = [], 0
  for segment in bucket:
    stop = start + segment.width
    first, last = start // _LANES, -(-stop // _LANES)
    part = columns[:, first:last]
    if segment.width != (last - first) * _LANES:
      flat = _tree.flat_rows(part)
      part = flat[:, start - first * _LANES : stop - first * _LANES]
    found.append(part)
    start = stop
  return found


def _unpadded(segment, n, names):
  """Which columns of this replica's slice hold values, bool `[1, width]`."""
  length = sum(span.stop - span.start for span in segment.spans)
  position = lax.axis_index(names) * segment.width + jnp.arange(segment.width)
  return _in_tiles((position < length)[None])
