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
from jax.sharding import PartitionSpec as P

from gaf_optax import _combine, _compat, _leaves

# Exchanges that a tree of one dtype is cut into. While one runs, its values are
# there up to three times, so that more of them need less memory at a time.
_BUCKETS = 4

# Values of an exchange, at least: smaller ones cost more time than they save memory.
_LEAST = 1 << 14

# Values of a leaf on one device up to which it is joined with others, and of what it
# is joined to: so many that `_combine` does not cut its loop into the parts again.
_SMALL, _JOINED = 1 << 12, _combine.SMALL


class Axes(NamedTuple):
  """Over which devices micro-gradients and parameters are spread; hashable.

  Attributes:
    members: names of the axes along which the micro-gradients lie; () where all
      are on this device.
    stacked: whether each member holds several, on a leading axis.
    params: names of the axes over which the parameters are sharded.
    replicated: for each leaf those of `params` that it is replicated over.
  """

  members: tuple[Hashable, ...] = ()
  stacked: bool = True
  params: tuple[Hashable, ...] = ()
  replicated: tuple[tuple[Hashable, ...], ...] = ()


class Spread(NamedTuple):
  """How inner products over rows are completed, where devices hold parts of them.

  Attributes:
    axes: names of the axes that sums go over.
    counted: for each leaf of rows None, or a bool scalar that is True on the one
      device of those holding the same values whose products count. () for None.
    real: for each leaf of rows None, or bool `[1, c]`: False for padding. () for
      None.
  """

  axes: tuple[Hashable, ...]
  counted: tuple[jax.Array | None, ...]
  real: tuple[jax.Array | None, ...]

  def sum(self, x: jax.Array) -> jax.Array:
    return lax.psum(x, self.axes) if self.axes else x

  def max(self, x: jax.Array) -> jax.Array:
    return lax.pmax(x, self.axes) if self.axes else x


# Everything is on this device.
HERE = Spread((), (), ())


class Rows(NamedTuple):
  """Micro-gradients as rows of leaves that this device holds.

  Attributes:
    leaves: arrays `[k, ...]`: whole leaves, or slices of several.
    members: for each the number of its group.
    spread: a `Spread`.
    own: from leaves shaped like the parameters, on every member the same, to one
      array like `leaves[i][0]` for each.
    join: from such arrays to leaves shaped like the parameters.
  """

  leaves: list[jax.Array]
  members: tuple[int, ...]
  spread: Spread
  own: Callable[[Sequence[jax.Array]], list[jax.Array]]
  join: Callable[[Sequence[jax.Array]], list[jax.Array]]


def size(axes: Axes) -> int:
  """How many members there are."""
  return math.prod(lax.axis_size(name) for name in axes.members)


def axes(
  arrays: Sequence[jax.Array],
  paths: Sequence[Any],
  members: tuple[Hashable, ...],
  stacked: bool,
  params: tuple[Hashable, ...],
  specs: Any,
) -> Axes:
  """The axes of a tree's leaves, checked against where the call is made.

  Args:
    arrays: the leaves of the micro-gradients.
    paths: where in the tree each is.
    members: `axis_name` as a tuple.
    stacked: whether the leaves have a micro-gradient axis in front.
    params: `param_axes` as a tuple.
    specs: a tree of `PartitionSpec` of the parameters, or None where types have to
      tell which leaves are replicated.

  Raises:
    ValueError: where a name is not an axis here, where the gradients have been
      summed over the members already, and where it cannot be known which leaves
      are replicated over `params`.
  """
  for argument, names in (("axis_name", members), ("param_axes", params)):
    for name in names:
      try:
        lax.axis_size(name)
      except NameError:
        raise ValueError(
          f"{argument} {name!r} is not an axis here. Call update inside jax.pmap,"
          " jax.shard_map or jax.vmap with an axis of this name; outside of them"
          " leave the argument out."
        ) from None
  for name in members:
    if _compat.checks_replication(name):
      for path, x in zip(paths, arrays):
        if name not in _compat.varying(x):
          raise ValueError(_summed(path, name))
  for path, x in zip(paths, arrays):
    partly = sum(_compat.explicit_spec(x), ()) if members else ()
    if partly:
      raise ValueError(
        f"micro-gradient leaf {_leaves.name(path)} is sharded over axis {partly[0]!r}"
        " of an Explicit mesh that this jax.shard_map does not map. Map that axis,"
        " too (axis_names), and give it as param_axes."
      )
  replicated = []
  for path, x in zip(paths, arrays):
    over = set(params)
    if specs is not None:
      over -= _names(specs, path)
    else:
      for name in params:
        if not _compat.checks_replication(name):
          raise ValueError(_unseen(name))
        if name in _compat.varying(x):
          over.discard(name)
    replicated.append(tuple(name for name in params if name in over))
  return Axes(members, stacked, params, tuple(replicated) if params else ())


def spec_axes(specs: Any) -> tuple[Hashable, ...]:
  """All axes that a tree of `PartitionSpec` names, in order."""
  flat = jax.tree.leaves(specs, is_leaf=lambda node: isinstance(node, P))
  return tuple(dict.fromkeys(name for spec in flat for name in _of_spec(spec)))


def _of_spec(spec):
  entries = [e if isinstance(e, tuple) else (e,) for e in spec]
  return [name for entry in entries for name in entry if name is not None]


def _names(specs, path):
  """Axes in the `PartitionSpec` of a leaf; the tree of specs may be a prefix."""
  flat, _ = jax.tree_util.tree_flatten_with_path(
    specs, is_leaf=lambda node: isinstance(node, P)
  )
  for prefix, spec in flat:
    if path[: len(prefix)] == prefix:
      return set(_of_spec(spec))
  raise ValueError(
    f"param_axes holds no PartitionSpec for leaf {_leaves.name(path)}. Give a tree of"
    " them like the parameters, or a prefix of it, as in_specs of jax.shard_map."
  )


def _summed(path, name):
  return (
    f"micro-gradient leaf {_leaves.name(path)} is the same on every member of axis"
    f" {name!r}: differentiating with respect to replicated parameters has already"
    " summed it over the axis, and every cosine distance would be 0. Make the"
    " parameters vary before jax.grad:"
    f" params = jax.lax.pcast(params, {name!r}, to='varying')."
  )


def _unseen(name):
  return (
    f"param_axes {name!r}: without the replication check of jax.shard_map gaf cannot"
    " see which leaves are replicated over it, to count them once. Give the"
    " PartitionSpecs of the parameters instead, param_axes=param_specs, or a prefix"
    f" of them: jax.P({name!r}) where every leaf is sharded over it."
  )


def spread(axes: Axes, others: int = 0) -> Spread:
  """Of leaves that are whole on this device but for `axes.params`.

  `others` are how many more leaves follow those of which `axes` speaks.
  """
  counted = tuple(_counted(names) for names in axes.replicated)
  return Spread(axes.params, counted + (None,) * others if counted else (), ())


def scatter(
  arrays: Sequence[jax.Array], members: Sequence[int], axes: Axes, embedded: bool
) -> Rows:
  """Hands each device its part of all micro-gradients.

  Args:
    arrays: leaves `[k, *shape]` if stacked, else `[*shape]`.
    members: for each leaf the number of its group.
    axes: an `Axes`.
    embedded: whether a function is applied to them: `spread.real` is wanted, and
      leaves that are all here are not joined.
  """
  if not axes.members:
    return _bundled(arrays, members, axes, embedded)

  n = size(axes)
  replicated = axes.replicated or ((),) * len(arrays)
  rows = [x if axes.stacked else x[None] for x in arrays]
  flat = [_flat(x) for x in rows]
  buckets = _plan(
    [x.shape[1] for x in flat],
    [(x.dtype, _compat.varying(x)) for x in flat],
    list(zip(members, replicated)),
    n,
  )
  parts = [part for bucket in buckets for part in bucket]

  def own(leaves):
    index = lax.axis_index(axes.members)
    flat = [_flat(x[None]) for x in leaves]
    return [
      lax.dynamic_index_in_dim(_cut(flat, part, n), index, 0, keepdims=False)[0]
      for part in parts
    ]

  def join(slices):
    slices = iter(slices)
    pieces: list[list[jax.Array]] = [[] for _ in rows]
    for bucket in buckets:
      values = jnp.concatenate([next(slices) for _ in bucket])
      if values.size:
        values = _compat.all_gather(values, axes.members)
      for part, whole in zip(bucket, _split(values.reshape(n, -1), bucket)):
        whole, start = whole.reshape(-1), 0
        for piece in part.pieces:
          stop = start + piece.stop - piece.start
          pieces[piece.leaf].append(whole[start:stop])
          start = stop
    return [
      jnp.concatenate(of_leaf).reshape(x.shape[1:]) for of_leaf, x in zip(pieces, rows)
    ]

  return Rows(
    _exchanged(flat, buckets, n, axes.members),
    tuple(part.member for part in parts),
    Spread(
      axes.members + axes.params,
      tuple(_counted(part.replicated) for part in parts),
      tuple(_real(p, n, axes.members) if embedded else None for p in parts),
    ),
    own,
    join,
  )


def _bundled(arrays, members, axes, embedded):
  """Stacks `[k, *shape]` that are all here: small leaves lie behind one another.

  A leaf's own loops and calls would take longer, to compile and to run, than copying
  its few values.
  """
  replicated = axes.replicated or ((),) * len(arrays)
  found: list[list[int]] = []
  open_bundles: dict[Any, tuple[list[int] | None, int]] = {}
  for i, x in enumerate(arrays):
    size = math.prod(x.shape[1:])
    if embedded or size > _SMALL or any(_compat.explicit_spec(x)):
      found.append([i])
      continue
    label = (x.dtype, _compat.varying(x), members[i], replicated[i])
    of, values = open_bundles.get(label, (None, 0))
    if of is None or values + size > _JOINED:
      found.append(of := [])
      values = 0
    of.append(i)
    open_bundles[label] = of, values + size

  def bundle(leaves, first):
    """Joins leaves of each bundle, but for their axes before `first`."""
    flat = lambda x: x.reshape(*x.shape[:first], math.prod(x.shape[first:]))
    return [
      leaves[of[0]]
      if len(of) == 1
      else jnp.concatenate([flat(leaves[i]) for i in of], axis=first)
      for of in found
    ]

  def join(values):
    results: dict[int, jax.Array] = {}
    for of, value in zip(found, values):
      shapes = [arrays[i].shape[1:] for i in of]
      ends = list(itertools.accumulate(math.prod(shape) for shape in shapes))
      parts = jnp.split(value, ends[:-1]) if len(of) > 1 else [value]
      results |= {i: x.reshape(s) for i, x, s in zip(of, parts, shapes)}
    return [results[i] for i in range(len(arrays))]

  counted = tuple(_counted(replicated[of[0]]) for of in found) if axes.params else ()
  return Rows(
    bundle(arrays, 1),
    tuple(members[of[0]] for of in found),
    Spread(axes.params, counted, ()),
    lambda leaves: bundle(leaves, 0),
    join,
  )


class _Piece(NamedTuple):
  """Values `[start, stop)` of a flattened leaf."""

  leaf: int
  start: int
  stop: int


class _Part(NamedTuple):
  """Values of one group that are cut into n slices of `width`, the last padded."""

  member: int
  replicated: tuple[Hashable, ...]
  pieces: tuple[_Piece, ...]
  width: int


def _plan(sizes, kinds, labels, n) -> list[list[_Part]]:
  """What is exchanged together: buckets of parts.

  Leaves of one kind (dtype and type) and one label (group, and axes that they are
  replicated over) lie behind one another, and are padded at the end alone. So the
  number of exchanges does not depend on the number of leaves.
  """
  buckets = []
  values = max(-(-sum(sizes) // _BUCKETS), _LEAST)
  limit = -(-values // n) * n
  for kind in dict.fromkeys(kinds):
    bucket: list[_Part] = []
    room = limit
    of_kind = [i for i, other in enumerate(kinds) if other == kind]
    for label in dict.fromkeys(labels[i] for i in of_kind):
      leaves = [i for i in of_kind if labels[i] == label]
      end = sum(sizes[i] for i in leaves)
      start = 0
      while True:
        stop = min(start + room, end)
        width = -(-(stop - start) // n)
        pieces = _pieces(leaves, sizes, start, stop)
        bucket.append(_Part(label[0], label[1], pieces, width))
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


def _pieces(leaves, sizes, start, stop) -> tuple[_Piece, ...]:
  """Where values `[start, stop)` of leaves that lie behind one another are."""
  found = []
  first = 0
  for leaf in leaves:
    low, high = max(start - first, 0), min(stop - first, sizes[leaf])
    if low < high:
      found.append(_Piece(leaf, low, high))
    elif not sizes[leaf] and not start:  # Once, so that it comes back.
      found.append(_Piece(leaf, 0, 0))
    first += sizes[leaf]
  return tuple(found)


def _flat(x):
  return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _cut(flat, part, n):
  """The slices of a part, `[n, k_local, width]`."""
  columns = [flat[p.leaf][:, p.start : p.stop] for p in part.pieces]
  rows, dtype = columns[0].shape[0], columns[0].dtype
  padding = n * part.width - sum(x.shape[1] for x in columns)
  if padding:
    columns.append(jnp.zeros((rows, padding), dtype))
  whole = jnp.concatenate(columns, axis=1).reshape(rows, n, part.width)
  return jnp.swapaxes(whole, 0, 1)


def _exchanged(flat, buckets, n, names):
  """This member's slices of all parts, `[k, width]` each."""
  received: list[jax.Array] = []
  before = None
  for bucket in buckets:
    leaves = {piece.leaf for part in bucket for piece in part.pieces}
    sent = {i: flat[i] for i in leaves}
    if (
      before is not None
      and before.dtype == flat[min(leaves)].dtype
      and (_compat.varying(before) == _compat.varying(flat[min(leaves)]))
    ):
      # One bucket after the other, so that only one is there in several copies.
      sent, before = lax.optimization_barrier((sent, before))
    slices = jnp.concatenate([_cut(sent, part, n) for part in bucket], axis=2)
    if slices.size:
      slices = lax.optimization_barrier(_compat.all_to_all(slices, names))
    before = slices.reshape(n * slices.shape[1], slices.shape[2])
    received += _split(before, bucket)
  return received


def _split(columns, bucket):
  """`[..., c]` to the columns of each part of a bucket."""
  ends = list(itertools.accumulate(part.width for part in bucket))
  return jnp.split(columns, ends[:-1], axis=-1)


def _real(part, n, names):
  """Which columns of this member's slice of a part hold values, bool `[1, width]`."""
  length = sum(piece.stop - piece.start for piece in part.pieces)
  position = lax.axis_index(names) * part.width + jnp.arange(part.width)
  return (position < length)[None]


def _counted(replicated):
  """Whether this device's products count, of devices that hold the same values."""
  if not replicated:
    return None
  first = [lax.axis_index(name) == 0 for name in replicated]
  return jnp.all(jnp.stack(first))
