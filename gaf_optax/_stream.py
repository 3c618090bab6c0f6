"""Stream: one running mean of micro-gradients that come one at a time."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gaf_optax import (
  _exchange,
  _gram,
  _leaves,
  _numerics,
  _options,
  _sharded,
  _state,
  rules,
)


def streamed_options(tau, **options) -> _options.Options:
  """Checked options, without what needs all micro-gradients at once."""
  for name in ("axis_name", "stacked"):
    if options.get(name) is not None:
      raise ValueError(
        f"{name}={options[name]!r}: micro-gradients that come one at a time are"
        " filtered on the device that they are on. To filter across devices give"
        " the result to gaf(axis_name=...), or let each device stack its"
        " micro-gradients and use gaf(axis_name=..., stacked=True)."
      )
  checked = _options.checked(tau, **options)
  if checked.anchor_decay is None and not isinstance(
    checked.rule, rules.SequentialRule
  ):
    raise ValueError(
      f"rule {checked.rule!r} has to see all micro-gradients at once. Streamed"
      " micro-gradients are compared with a running sum: use rules.sequential(),"
      " rules.running_average() or anchor_decay, or stack them and use gaf."
    )
  return checked


class Stream(NamedTuple):
  """What is kept of the micro-gradients of a cycle so far; m groups.

  Attributes:
    means: like the parameters, the weighted mean of what each leaf's group
      accepted.
    embedded: with `embed`, the same of the embedded leaves, else None.
    plain: with an anchor, the mean of all finite ones, else None.
    total: `[m]`, the sums of the weights.
    num_accepted: int32 `[m]`.
    distance_sum: float32 `[m]`, over the micro-gradients that were compared.
    compared: int32 `[m]`, how many those are.
    seen: int32 scalar.
    finite: int32 scalar, how many of those seen are finite.
  """

  means: Any
  embedded: Any
  plain: Any
  total: jax.Array
  num_accepted: jax.Array
  distance_sum: jax.Array
  compared: jax.Array
  seen: jax.Array
  finite: jax.Array


class Comparison(NamedTuple):
  """What was found of one micro-gradient: `[m]` by group, and a bool scalar."""

  accepted: jax.Array
  distances: jax.Array
  finite: jax.Array


def axes(leaves: _leaves.Leaves, options: _options.Options) -> _exchange.Axes:
  """Over which devices the parameters of a micro-gradient are spread."""
  return _exchange.axes(
    leaves.arrays,
    leaves.layout.paths,
    (),
    False,
    options.param_axes,
    options.param_specs,
  )


def start(params: Any, options: _options.Options) -> Stream:
  """An empty stream for micro-gradients shaped like the parameters."""
  leaves = _leaves.read(params, None, options.groups, stacked=False)
  with_anchor = options.anchor_decay is not None
  with_embed = options.embed is not None and not with_anchor
  return _empty(params, leaves.arrays, leaves.layout, with_embed, with_anchor)


def _empty(params, arrays, layout, with_embed=False, with_anchor=False):
  zeros = lambda: _leaves.accumulators(params)
  m = layout.num_groups
  dtype = _numerics.real_accumulator_dtype(x.dtype for x in arrays)
  return Stream(
    means=zeros(),
    embedded=zeros() if with_embed else None,
    plain=zeros() if with_anchor else None,
    total=jnp.zeros((m,), dtype),
    num_accepted=jnp.zeros((m,), jnp.int32),
    distance_sum=jnp.zeros((m,), jnp.float32),
    compared=jnp.zeros((m,), jnp.int32),
    seen=jnp.zeros((), jnp.int32),
    finite=jnp.zeros((), jnp.int32),
  )


def in_turn(
  arrays: Sequence[jax.Array],
  threshold: jax.Array,
  *,
  rule: rules.SequentialRule,
  members: tuple[int, ...],
  num_groups: int,
) -> tuple[list[jax.Array], None, jax.Array, jax.Array, jax.Array]:
  """Filters stacked leaves `[k, *shape]` by pushing one row after the other.

  `members` are the numbers of their groups. Returns what `_transform._filtered`
  does.
  """
  first = [x[0] for x in arrays]
  paths = tuple((jax.tree_util.SequenceKey(i),) for i in range(len(arrays)))
  layout = _leaves.Layout(paths, members, num_groups)
  empty = _numerics.typed(
    _empty(first, first, layout), _numerics.typed_zero((arrays, threshold))
  )
  stream, found = jax.lax.scan(
    lambda stream, row: push(
      stream,
      row,
      threshold,
      rule=rule,
      embed=None,
      layout=layout,
      axes=_exchange.Axes(),
    ),
    empty,
    list(arrays),
  )
  means, agreed = finish(stream, first, layout, 2)
  accepted = found.accepted.T & agreed[:, None]
  return means, None, accepted, found.distances.T, found.finite


@functools.partial(jax.jit, static_argnames=("rule", "embed", "layout", "axes"))
def push(
  stream: Stream,
  arrays: Sequence[jax.Array],
  threshold: jax.Array,
  anchor: Sequence[jax.Array] | None = None,
  anchored: jax.Array | None = None,
  *,
  rule: Any,
  embed: Any,
  layout: _leaves.Layout,
  axes: _exchange.Axes,
) -> tuple[Stream, Comparison]:
  """Compares one micro-gradient with the stream, or the anchor, and takes it up."""
  dtype = stream.total.dtype
  if anchor is not None:
    gram, finite = _pair(anchor, arrays, layout, embed, axes)
    pair_valid = jnp.ones((1,), bool)
    decision = rules.decide_groups(None, gram, pair_valid, threshold, anchored)
    distances, accepted = decision.distances[:, 0], decision.accepted[:, 0]
    keep, add = 1, accepted
  else:
    values = arrays
    if embed is not None:
      values = [_gram.embedded(x, embed, dtype) for x in arrays]
    kept = stream.means if embed is None else stream.embedded
    means = _leaves.pick(kept, layout)
    unread = () if embed is None else arrays
    gram, finite = _pair(means, values, layout, None, axes, unread)
    first = stream.total == 0
    distances = _numerics.distance(
      rule.distance,
      gram.products[:, 0, 1],
      gram.products[:, 0, 0],
      gram.products[:, 1, 1],
      tau=threshold,
      shift=gram.exponents[:, 1] - gram.exponents[:, 0],
    )
    keep, add, accepted = rule.merge(distances, threshold, first)
    distances = jnp.where(first, jnp.nan, distances)
  accepted &= finite
  distances = jnp.where(finite, distances, jnp.nan)
  before = jnp.where(finite, keep, 1).astype(dtype) * stream.total
  add = jnp.where(finite, add, 0).astype(dtype)
  total = before + add

  # One more slot at the end: the mean of all finite ones, which leaves of no group
  # have and which moves the anchor.
  number = stream.finite.astype(dtype)
  after = jnp.append(total, number + finite)
  after = jnp.where(after > 0, after, 1)
  keeps = jnp.append(before, number) / after
  adds = jnp.append(add, finite.astype(dtype)) / after

  def taken_up(tree, values, members):
    mixed = [
      _mixed(mean, keeps[g], value, adds[g])
      for mean, value, g in zip(_leaves.pick(tree, layout), values, members)
    ]
    return _leaves.put(tree, layout, mixed)

  members = layout.members
  all_plain = (layout.num_groups,) * len(members)
  compared = jnp.isfinite(distances)
  stream = Stream(
    means=taken_up(stream.means, arrays, members),
    embedded=None
    if stream.embedded is None
    else taken_up(stream.embedded, values, members),
    plain=None if stream.plain is None else taken_up(stream.plain, arrays, all_plain),
    total=total,
    num_accepted=stream.num_accepted + accepted,
    distance_sum=stream.distance_sum
    + jnp.where(compared, distances, 0).astype(jnp.float32),
    compared=stream.compared + compared,
    seen=stream.seen + 1,
    finite=stream.finite + finite,
  )
  return stream, Comparison(accepted, distances.astype(jnp.float32), finite)


def _pair(left, right, layout, embed, axes, unread=()):
  """The Gram of two vectors, and whether the second is finite.

  `unread` are the leaves of the second as they were before an embedding.
  """
  pairs = [(a[None], b[None]) for a, b in zip(left, right)]
  pairs += [(jnp.zeros_like(x)[None], x[None]) for x in unread]
  options = dict(
    members=layout.members + (layout.num_groups,) * len(unread),
    num_groups=layout.num_groups,
    embed=embed,
  )
  if _sharded.is_sharded([x for pair in pairs for x in pair]):
    gram, finite = _sharded.gram(_gram.gram, pairs, **options)
  else:
    spread = _exchange.spread(axes, len(unread))
    gram, finite = _gram.gram(pairs, spread=spread, **options)
  return gram, finite[1]


def _mixed(mean, keep, value, add):
  """`keep * mean + add * value`, without a value that is not taken up."""
  real = jnp.finfo(mean.dtype).dtype
  value = jnp.where(add != 0, value.astype(mean.dtype), 0)
  mixed = keep.astype(real) * mean + add.astype(real) * value
  return _numerics.without_overflow(mixed)


def finish(
  stream: Stream,
  arrays: Sequence[jax.Array],
  layout: _leaves.Layout,
  least: int,
) -> tuple[list[jax.Array], jax.Array]:
  """The result of a cycle, of the dtypes of `arrays`, and bool `[m]`: who agreed.

  `least` is how many micro-gradients have to be accepted.
  """
  agreed = stream.num_accepted >= least
  slots = jnp.append(agreed, True)
  results = [
    jnp.where(slots[g], mean, 0).astype(x.dtype)
    for mean, x, g in zip(_leaves.pick(stream.means, layout), arrays, layout.members)
  ]
  return results, agreed


def outcome(stream, agreed, distances, accepted):
  """The outcome of a cycle; the last two `[m, k]`, or None where not kept."""
  compared = jnp.maximum(stream.compared, 1)
  mean = jnp.where(stream.compared > 0, stream.distance_sum / compared, jnp.nan)
  member_distances = member_accepted = None
  if distances is not None:
    member_distances = _state.nanmean(distances, axis=0)
    member_accepted = jnp.any(accepted & agreed[:, None], axis=0)
  return _state.Outcome(
    jnp.any(agreed),
    jnp.mean(jnp.where(agreed, stream.num_accepted, 0).astype(jnp.float32)),
    _state.nanmean(mean),
    stream.seen,
    stream.seen - stream.finite,
    member_distances,
    member_accepted,
  )
