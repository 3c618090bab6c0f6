"""Stream: one running mean of micro-gradients that come one at a time."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gaf_optax import (
  _compat,
  _kernels,
  _mesh,
  _options,
  _rules,
  _state,
  _tree,
)


class Stream(NamedTuple):
  """What is kept of the micro-gradients of a cycle so far; m groups.

  Attributes:
    means: like the parameters, the weighted mean of what each leaf's group
      accepted.
    plain: with an anchor, the mean of all that are valid, else None.
    mean: a `Mean` of arrays `[m]`.
    plain_weight: scalar, the sum of the weights of all that are valid.
    num_in_mean: int32 `[m]`, how many were accepted.
    distance_sum: float32 `[m]`, over the micro-gradients that were compared.
    num_compared: int32 `[m]`, how many those are.
    num_pushed: int32 scalar.
    num_present: int32 scalar, how many of those have a weight above 0.
    num_valid: int32 scalar, how many of those are finite.
    each: the weights, `accepted` and distances `[m, k]` of a `Decision`, where k is
      known; else None. A plain tuple, so that `optax.tree.get` finds them once.
  """

  means: Any
  plain: Any
  mean: _rules.Mean
  plain_weight: jax.Array
  num_in_mean: jax.Array
  distance_sum: jax.Array
  num_compared: jax.Array
  num_pushed: jax.Array
  num_present: jax.Array
  num_valid: jax.Array
  each: tuple[jax.Array, jax.Array, jax.Array] | None


def start(
  params: Any, options: _options.Options, num_microbatches: int | None = None
) -> Stream:
  """An empty stream for micro-gradients shaped like the parameters."""
  leaves = _tree.flatten(params, None, options.groups, stacked=False)
  m, k = leaves.layout.num_groups, num_microbatches
  dtype = _compat.real_accumulator_dtype(leaves.arrays)
  counts = lambda *shape: jnp.zeros(shape, jnp.int32)
  numbers = lambda *shape: jnp.zeros(shape, jnp.float32)
  each = None
  if k is not None:
    each = numbers(m, k), jnp.zeros((m, k), bool), _state.nothing(m, k)
  return Stream(
    means=_tree.accumulators(params),
    plain=None if options.anchor_decay is None else _tree.accumulators(params),
    mean=_rules.Mean(jnp.zeros((m,), dtype), jnp.zeros((m,), dtype)),
    plain_weight=jnp.zeros((), dtype),
    num_in_mean=counts(m),
    distance_sum=numbers(m),
    num_compared=counts(m),
    num_pushed=counts(),
    num_present=counts(),
    num_valid=counts(),
    each=each,
  )


@functools.partial(jax.jit, static_argnames="plan")
def push(
  stream: Stream,
  arrays: Sequence[jax.Array],
  tau: jax.Array,
  weight: jax.Array | None = None,
  anchor: Sequence[jax.Array] | None = None,
  anchored: jax.Array | None = None,
  *,
  plan: _options.Plan,
) -> Stream:
  """Compares a micro-gradient with the running mean, or the anchor, and takes it up."""
  layout, dtype = plan.layout, stream.plain_weight.dtype
  where = (layout.group_ids, layout.num_groups, None, _mesh.shards(plan.axes))
  rows = [x[None] for x in arrays]
  gram, (finite,) = _kernels.gram(rows, *where)
  against = _tree.pick(stream.means, layout) if anchor is None else anchor
  square, products = _kernels.dots(against, rows, *where)
  products = jnp.where(finite, products, 0)
  weight = jnp.ones((), dtype) if weight is None else weight.astype(dtype)
  valid = finite & (weight > 0)
  if anchor is None:
    pair = (square, products[:, 0], gram[:, 0, 0])
    mean, step = plan.rule.step(stream.mean, *pair, tau, valid, weight)
  else:
    mean, step = _against_anchor(
      stream.mean, square, products, gram, tau, valid, weight, anchored
    )

  # One more slot at the end: the mean of all that are valid, which leaves of no group
  # have and which moves the anchor.
  plain_weight = stream.plain_weight + jnp.where(valid, weight, 0)
  plain = weight / jnp.where(plain_weight > 0, plain_weight, 1)
  shares = jnp.append(step.share, jnp.where(valid, plain, 0))

  def taken_up(tree, group_ids):
    if tree is None:
      return None
    found = zip(_tree.pick(tree, layout), arrays, group_ids)
    mixed = [_mixed(mean, value, shares[group]) for mean, value, group in found]
    return _tree.put(tree, layout, mixed)

  compared = jnp.isfinite(step.distance)
  distance = jnp.where(compared, step.distance, 0).astype(jnp.float32)
  count = lambda number, flag: number + flag.astype(jnp.int32)
  return Stream(
    means=taken_up(stream.means, layout.group_ids),
    plain=taken_up(stream.plain, (layout.num_groups,) * len(arrays)),
    mean=mean,
    plain_weight=plain_weight,
    num_in_mean=count(stream.num_in_mean, step.accepted),
    distance_sum=stream.distance_sum + distance,
    num_compared=count(stream.num_compared, compared),
    num_pushed=stream.num_pushed + 1,
    num_present=count(stream.num_present, weight > 0),
    num_valid=count(stream.num_valid, valid),
    each=_recorded(stream, step),
  )


def _against_anchor(mean, square, products, gram, tau, valid, weight, anchored):
  """As the `step` of a sequential rule, but compared with the anchor."""

  def decide(square, products, gram):
    ones = jnp.ones_like(products)
    rows = _rules.Rows(gram, valid[None], ones, ones, 0)
    return _rules.against_anchor(square, products, rows, anchored, tau)

  decision = jax.vmap(decide)(square, products, gram)
  accepted, distance = decision.accepted[:, 0], decision.distances[:, 0]
  own = accepted.astype(weight.dtype)
  total = mean.weight + own * weight
  share = own * weight / jnp.where(total > 0, total, 1)
  step = _rules.Step(share, jnp.ones_like(share), own, accepted, distance)
  return mean._replace(weight=total), step


def _recorded(stream, step):
  """What is kept of each micro-gradient, with this one's."""
  if stream.each is None:
    return None
  i = stream.num_pushed
  weights, accepted, distances = stream.each
  share = step.share.astype(jnp.float32)
  return (
    (weights * (1 - share)[:, None]).at[:, i].set(share),
    accepted.at[:, i].set(step.accepted),
    distances.at[:, i].set(_state.or_nothing(step.distance)),
  )


def _mixed(mean, value, share):
  """`(1 - share) * mean + share * value`, without a value that is not taken up."""
  value = jnp.where(share != 0, value.astype(mean.dtype), 0)
  return (1 - share).astype(mean.dtype) * mean + share.astype(mean.dtype) * value


def finish(
  stream: Stream,
  arrays: Sequence[jax.Array],
  plan: _options.Plan,
  min_accepted: int,
) -> tuple[list[jax.Array], _state.Outcome]:
  """The result of a cycle, of the dtypes of `arrays`, and its outcome.

  `min_accepted` is how many micro-gradients have to be accepted.
  """
  layout = plan.layout
  agreed = stream.num_in_mean >= min_accepted
  slots = jnp.append(agreed, jnp.any(agreed))
  found = _tree.pick(stream.means, layout)
  means = [jnp.where(slots[g], x, 0) for x, g in zip(found, layout.group_ids)]
  square, _ = _kernels.gram(
    [x[None] for x in found],
    layout.group_ids,
    layout.num_groups,
    None,
    _mesh.shards(plan.axes),
  )
  mean_distance = stream.distance_sum / jnp.maximum(stream.num_compared, 1).astype(
    jnp.float32
  )
  mean_distance = _state.mean_known(
    jnp.where(stream.num_compared > 0, mean_distance, _state.NOTHING)
  )
  decision = None
  if stream.each is not None:
    weights, accepted, distances = stream.each
    weights = jnp.where(agreed[:, None], weights, 0)
    decision = _rules.Decision(weights, accepted & agreed[:, None], distances)
    decision = _state.over_groups(decision)
  outcome = _state.Outcome(
    agreed=jnp.any(agreed),
    num_accepted=jnp.mean(jnp.where(agreed, stream.num_in_mean, 0).astype(jnp.float32)),
    mean_distance=mean_distance,
    num_seen=stream.num_present,
    nonfinite=stream.num_present - stream.num_valid,
    identical=_state.are_copies(mean_distance),
    noise_scale=_state.nothing(),
    grad_norm=jnp.sqrt(jnp.sum(jnp.where(agreed, square[:, 0, 0], 0))).astype(
      jnp.float32
    ),
    each=decision,
  )
  return [mean.astype(x.dtype) for mean, x in zip(means, arrays)], outcome
