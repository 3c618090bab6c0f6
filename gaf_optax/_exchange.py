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

from gaf_optax import _combine, _jax_types, _mesh

# Exchanges that a tree of one dtype is cut into. While one runs, its values are
# there up to three times, so that more of them need less memory at a time.
_NUM_BUCKETS = 4

# Values of an exchange, at least: smaller ones cost more time than they save memory.
_MIN_BUCKET = 1 << 14

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
      lax.dynamic_index_in_dim(_cut(flat, segment, n), index, 0, keepdims=False)[0]
      for segment in segments
    ]

  def join(slices):
    slices = iter(slices)
    values: list[list[jax.Array]] = [[] for _ in rows]
    for bucket in buckets:
      gathered = jnp.concatenate([next(slices) for _ in bucket])
      if gathered.size:
        gathered = _jax_types.all_gather(gathered, axes.axis_names)
      for segment, whole in zip(bucket, _by_segment(gathered.reshape(n, -1), bucket)):
        whole, start = whole.reshape(-1), 0
        for span in segment.spans:
          stop = start + span.stop - span.start
          values[span.leaf].append(whole[start:stop])
          start = stop
    return [
      jnp.concatenate(of_leaf).reshape(x.shape[1:]) for of_leaf, x in zip(values, rows)
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
  num_values = max(-(-sum(sizes) // _NUM_BUCKETS), _MIN_BUCKET)
  limit = -(-num_values // n) * n
  for kind in dict.fromkeys(kinds):
    bucket: list[_Segment] = []
    room = limit
    of_kind = [i for i, other in enumerate(kinds) if other == kind]
    for label in dict.fromkeys(labels[i] for i in of_kind):
      leaves = [i for i in of_kind if labels[i] == label]
      end = sum(sizes[i] for i in leaves)
      start = 0
      while True:
        stop = min(start + room, end)
        width = -(-(stop - start) // n)
        spans = _spans(leaves, sizes, start, stop)
        bucket.append(_Segment(label[0], label[1], spans, width))
        room -= width * n
        start = stop
        if not room:
          buckets.append(bucket)
          bucket, room = [], limit
        if start == end:
          break
    if bucket:
      buckets.append(bucket)
  return buckets


def _spans(leaves, sizes, start, stop) -> tuple[_Span, ...]:
  """Where values `[start, stop)` of leaves that lie behind one another are."""
  spans = []
  first = 0
  for leaf in leaves:
    low, high = max(start - first, 0), min(stop - first, sizes[leaf])
    if low < high:
      spans.append(_Span(leaf, low, high))
    elif not sizes[leaf] and not start:  # Once, so that it comes back.
      spans.append(_Span(leaf, 0, 0))
    first += sizes[leaf]
  return tuple(spans)


def _flat(x):
  return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _cut(flat, segment, n):
  """The slices of a segment, `[n, k_local, width]`."""
  columns = [flat[s.leaf][:, s.start : s.stop] for s in segment.spans]
  rows, dtype = columns[0].shape[0], columns[0].dtype
  padding = n * segment.width - sum(x.shape[1] for x in columns)
  if padding:
    columns.append(jnp.zeros((rows, padding), dtype))
  whole = jnp.concatenate(columns, axis=1).reshape(rows, n, segment.width)
  return jnp.swapaxes(whole, 0, 1)


def _exchanged(flat, buckets, n, names):
  """This replica's slices of all segments, `[k, width]` each."""
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
    slices = jnp.concatenate([_cut(sent, segment, n) for segment in bucket], axis=2)
    if slices.size:
      slices = lax.optimization_barrier(_jax_types.all_to_all(slices, names))
    before = slices.reshape(n * slices.shape[1], slices.shape[2])
    received += _by_segment(before, bucket)
  return received


def _by_segment(columns, bucket):
  """`[..., c]` to the columns of each segment of a bucket."""
  ends = list(itertools.accumulate(segment.width for segment in bucket))
  return jnp.split(columns, ends[:-1], axis=-1)


def _unpadded(segment, n, names):
  """Which columns of this replica's slice hold values, bool `[1, width]`."""
  length = sum(span.stop - span.start for span in segment.spans)
  position = lax.axis_index(names) * segment.width + jnp.arange(segment.width)
  return (position < length)[None]
