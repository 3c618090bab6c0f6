"""Stream: one running mean of micro-gradients that come one at a time."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gaf_optax import (
  _combine,
  _gram,
  _inner_products,
  _jax_types,
  _mesh,
  _options,
  _state,
  _threshold,
  _tree,
  rules,
)


def check_options(tau, **options) -> _options.Options:
  """Checked options, without what needs all micro-gradients at once."""
  for name in ("axis_name", "stacked"):
    if options.get(name) is not None:
      raise ValueError(
        f"{name}={options[name]!r}: micro-gradients that come one at a time are"
        " filtered on the device that they are on. To filter across devices give"
        " the result to gaf(axis_name=...), or let each device stack its"
        " micro-gradients and use gaf(axis_name=..., stacked=True)."
      )
  if options.get("memory_decay") is not None:
    raise ValueError(
      f"memory_decay={options['memory_decay']!r} remembers how all pairs of"
      " micro-gradients compare, but streamed ones are compared with a running mean"
      " alone. Stack them and use gaf."
    )
  if _threshold.is_step_tau(tau):
    raise ValueError(
      f"tau {tau!r} is read off the distances of all micro-gradients of a step, but"
      " streamed ones show one after the other. Stack them and use gaf."
    )
  checked = _options.checked(tau, **options)
  if checked.anchor_decay is None and not isinstance(
    checked.rule, rules.SequentialRule
  ):
    raise ValueError(
      f"rule {checked.rule!r} has to see all micro-gradients at once. Streamed"
      " micro-gradients are compared with a running mean: use rules.sequential(),"
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
    mean: a `rules.RunningMean` `[m]`.
    num_in_mean: int32 `[m]`, how many were accepted.
    distance_sum: float32 `[m]`, over the micro-gradients that were compared.
    num_compared: int32 `[m]`, how many those are.
    num_pushed: int32 scalar.
    num_finite: int32 scalar, how many of those pushed are finite.
    each: the weights, `accepted` and distances `[m, k]` of a `rules.Decision`, where k
      is known; else None. A plain tuple, so that `optax.tree.get` finds them once.
  """

  means: Any
  embedded: Any
  plain: Any
  mean: rules.RunningMean
  num_in_mean: jax.Array
  distance_sum: jax.Array
  num_compared: jax.Array
  num_pushed: jax.Array
  num_finite: jax.Array
  each: tuple[jax.Array, jax.Array, jax.Array] | None


def start(
  params: Any, options: _options.Options, num_microbatches: int | None = None
) -> Stream:
  """An empty stream for micro-gradients shaped like the parameters."""
  leaves = _tree.flatten(params, None, options.groups, stacked=False)
  with_anchor = options.anchor_decay is not None
  with_embed = options.embed is not None and not with_anchor
  return _empty(
    params, leaves.arrays, leaves.layout, num_microbatches, with_embed, with_anchor
  )


def _empty(params, arrays, layout, k, with_embed=False, with_anchor=False):
  zeros = lambda: _tree.accumulators(params)
  m = layout.num_groups
  dtype = _jax_types.real_accumulator_dtype(x.dtype for x in arrays)
  counts = lambda *shape: jnp.zeros(shape, jnp.int32)
  numbers = lambda *shape: jnp.zeros(shape, jnp.float32)
  each = None
  if k is not None:
    nothing = jnp.full((m, k), _gram.NOTHING, jnp.float32)
    each = numbers(m, k), jnp.zeros((m, k), bool), nothing
  return Stream(
    means=zeros(),
    embedded=zeros() if with_embed else None,
    plain=zeros() if with_anchor else None,
    mean=rules.RunningMean(jnp.zeros((m,), dtype), jnp.zeros((m,), dtype), counts(m)),
    num_in_mean=counts(m),
    distance_sum=numbers(m),
    num_compared=counts(m),
    num_pushed=counts(),
    num_finite=counts(),
    each=each,
  )


def filter_rows(
  arrays: Sequence[jax.Array],
  group_ids: tuple[int, ...],
  threshold: jax.Array,
  plan: _options.Plan,
) -> tuple[list[jax.Array], rules.Decision, "Pushed"]:
  """Filters stacked leaves `[k, *shape]` by pushing one row after the other.

  Args:
    arrays: the leaves.
    group_ids: for each the number of its group.
    threshold: tau.
    plan: of the leaves of the tree, which these are made of.

  Returns:
    The means, the decision `[m, k]`, and a `Pushed` of arrays `[k, ...]`.
  """
  first = [x[0] for x in arrays]
  paths = tuple((jax.tree_util.SequenceKey(i),) for i in range(len(arrays)))
  layout = _tree.Layout(paths, group_ids, plan.layout.num_groups)
  plan = plan._replace(layout=layout)
  empty = _empty(first, first, layout, arrays[0].shape[0])
  empty = _jax_types.typed_like(empty, (arrays, threshold))
  stream, pushed = jax.lax.scan(
    lambda stream, row: push(stream, row, threshold, plan=plan), empty, list(arrays)
  )
  means, decision = finish(stream, first, layout, min_accepted=2)
  return means, decision, pushed


class Pushed(NamedTuple):
  """What was seen of one micro-gradient.

  Attributes:
    finite: bool scalar.
    squares: `[m]`, the squared norm in each group, in units of `4**exponents`.
    exponents: int32 `[m]`.
  """

  finite: jax.Array
  squares: jax.Array
  exponents: jax.Array


@functools.partial(jax.jit, static_argnames="plan")
def push(
  stream: Stream,
  arrays: Sequence[jax.Array],
  threshold: jax.Array,
  anchor: Sequence[jax.Array] | None = None,
  anchored: jax.Array | None = None,
  *,
  plan: _options.Plan,
) -> tuple[Stream, Pushed]:
  """Compares a micro-gradient with the running mean, or the anchor, and takes it up."""
  layout, dtype = plan.layout, stream.mean.total_weight.dtype
  embedded = arrays
  if anchor is not None:
    gram, finite = _pair(anchor, arrays, (), plan, plan.embed)
    mean, step = _against_anchor(stream.mean, gram, finite, threshold, anchored, plan)
  else:
    if plan.embed is not None:
      embedded = [_inner_products.embedded(x, plan.embed, dtype) for x in arrays]
    kept = stream.means if plan.embed is None else stream.embedded
    unread = () if plan.embed is None else arrays
    gram, finite = _pair(_tree.pick(kept, layout), embedded, unread, plan, None)
    products, exponents = gram
    pair = rules.Pair(
      products[:, 0, 0],
      products[:, 0, 1],
      products[:, 1, 1],
      exponents[:, 0],
      exponents[:, 1],
    )
    mean, step = plan.rule.step(stream.mean, pair, finite, threshold)

  # One more slot at the end: the mean of all finite ones, which leaves of no group
  # have and which moves the anchor.
  number = stream.num_finite.astype(dtype)
  share = jnp.where(finite, 1 / (number + 1), 0)
  keeps, adds = jnp.append(step.keep, 1 - share), jnp.append(step.add, share)

  def taken_up(tree, values, group_ids):
    if tree is None:
      return None
    mixed = [
      _mixed(mean, keeps[g], value, adds[g])
      for mean, value, g in zip(_tree.pick(tree, layout), values, group_ids)
    ]
    return _tree.put(tree, layout, mixed)

  all_plain = (layout.num_groups,) * len(layout.group_ids)
  compared = jnp.isfinite(step.distance)
  distance = jnp.where(compared, step.distance, 0).astype(jnp.float32)
  stream = Stream(
    means=taken_up(stream.means, arrays, layout.group_ids),
    embedded=taken_up(stream.embedded, embedded, layout.group_ids),
    plain=taken_up(stream.plain, arrays, all_plain),
    mean=mean,
    num_in_mean=stream.num_in_mean + step.accepted.astype(jnp.int32),
    distance_sum=stream.distance_sum + distance,
    num_compared=stream.num_compared + compared.astype(jnp.int32),
    num_pushed=stream.num_pushed + 1,
    num_finite=stream.num_finite + finite.astype(jnp.int32),
    each=_recorded(stream, step),
  )
  return stream, Pushed(finite, gram.products[:, 1, 1], gram.exponents[:, 1])


def _against_anchor(mean, gram, finite, threshold, anchored, plan):
  """As the `step` of a sequential rule, but compared with the anchor."""
  valid = jnp.stack([jnp.asarray(anchored, bool), finite])
  decision, _, _ = rules.decide_groups(plan.rule, gram, valid, threshold)
  accepted, distance = decision.accepted[:, 0], decision.distances[:, 0]
  weight = accepted.astype(mean.total_weight.dtype)
  total = mean.total_weight + weight
  add = weight / jnp.where(total > 0, total, 1)
  keep = jnp.where(mean.total_weight > 0, 1 - add, 0)
  step = rules.Step(keep, add, jnp.ones_like(add), weight, accepted, distance)
  return mean._replace(total_weight=total), step


def _recorded(stream, step):
  """What is kept of each micro-gradient, with this one's."""
  if stream.each is None:
    return None
  i = stream.num_pushed
  weights, accepted, distances = stream.each
  weights = weights * step.keep[:, None].astype(jnp.float32)
  return (
    weights.at[:, i].set(step.add.astype(jnp.float32)),
    accepted.at[:, i].set(step.accepted),
    distances.at[:, i].set(_state.or_nothing(step.distance)),
  )


def _pair(left, right, unread, plan, embed):
  """The Gram of two vectors, and whether the second is finite.

  `unread` are the leaves of the second as they were before an embedding.
  """
  layout = plan.layout
  pairs = [(a[None], b[None]) for a, b in zip(left, right)]
  pairs += [(jnp.zeros_like(x)[None], x[None]) for x in unread]
  gram, finite = _inner_products.gram(
    pairs,
    layout.group_ids + (layout.num_groups,) * len(unread),
    layout.num_groups,
    embed,
    _mesh.shards(plan.axes, len(unread)),
  )
  return gram, finite[1]


def _mixed(mean, keep, value, add):
  """`keep * mean + add * value`, without a value that is not taken up."""
  value = jnp.where(add != 0, value.astype(mean.dtype), 0)
  mixed = _combine.scaled(mean, keep) + _combine.scaled(value, add)
  return _combine.without_overflow(mixed)


def finish(
  stream: Stream,
  arrays: Sequence[jax.Array],
  layout: _tree.Layout,
  min_accepted: int,
) -> tuple[list[jax.Array], Any]:
  """The result of a cycle, of the dtypes of `arrays`, and the decision `[m, k]`.

  `min_accepted` is how many micro-gradients have to be accepted. The decision is None
  where the stream has no record of it.
  """
  agreed = _agreed(stream, min_accepted)
  slots = jnp.append(agreed, True)
  results = [
    jnp.where(slots[g], mean, 0).astype(x.dtype)
    for mean, x, g in zip(_tree.pick(stream.means, layout), arrays, layout.group_ids)
  ]
  if stream.each is None:
    return results, None
  weights, accepted, distances = stream.each
  return results, rules.Decision(
    jnp.where(agreed[:, None], weights, 0), accepted & agreed[:, None], distances
  )


def _agreed(stream, min_accepted):
  return stream.num_in_mean >= min_accepted


def outcome(
  stream: Stream, decision: rules.Decision | None, min_accepted: int
) -> _state.Outcome:
  """The outcome of a cycle, with the decision that `finish` gave."""
  agreed = _agreed(stream, min_accepted)
  mean = jnp.where(
    stream.num_compared > 0,
    stream.distance_sum / jnp.maximum(stream.num_compared, 1).astype(jnp.float32),
    _gram.NOTHING,
  )
  mean_distance = _state.mean_known(mean)
  return _state.Outcome(
    agreed=jnp.any(agreed),
    num_accepted=jnp.mean(jnp.where(agreed, stream.num_in_mean, 0).astype(jnp.float32)),
    mean_distance=mean_distance,
    num_seen=stream.num_pushed,
    nonfinite=stream.num_pushed - stream.num_finite,
    identical=_state.are_copies(mean_distance),
    noise_scale=jnp.full((), _gram.NOTHING, jnp.float32),
    each=None if decision is None else _state.over_groups(decision),
  )
