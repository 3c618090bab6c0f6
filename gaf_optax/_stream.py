"""A running mean of micro-gradients that arrive one at a time."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gaf_optax import (
  _compat,
  _exchange,
  _kernels,
  _options,
  _rules,
  _state,
  _tau,
  _tree,
)


class Stream(NamedTuple):
  """The running means and counts of a cycle; m groups.

  No field has the name of a `GafState` field, since `optax.tree.get` would find both.

  Attributes:
    means: like the parameters, the weighted mean of the accepted micro-gradients.
    plain: with an anchor the mean of all valid micro-gradients, else None.
    mean: a `Mean` of arrays `[m]`.
    plain_weight: scalar, the sum of the weights in `plain`.
    num_added: int32 `[m]`, the number of accepted micro-gradients.
    distance_sum: float32 `[m]`, the sum of the known distances.
    num_compared: int32 `[m]`, the number of known distances.
    num_arrived: int32 scalar, the number of micro-gradients so far.
    num_present: int32 scalar, the number with a weight above 0.
    num_valid: int32 scalar, the number that are also finite.
    per_microbatch: weights, `accepted` and distances `[m, k]` if k is known, else None.
  """

  means: Any
  plain: Any
  mean: _rules.Mean
  plain_weight: jax.Array
  num_added: jax.Array
  distance_sum: jax.Array
  num_compared: jax.Array
  num_arrived: jax.Array
  num_present: jax.Array
  num_valid: jax.Array
  per_microbatch: tuple[jax.Array, jax.Array, jax.Array] | None


def start(
  params: Any, options: _options.Options, num_microbatches: int | None = None
) -> Stream:
  leaves = _tree.flatten(params, None, options.groups, stacked=False)
  m, k = leaves.layout.num_groups, num_microbatches
  dtype = _compat.real_accumulator_dtype(leaves.arrays)
  counts = lambda *shape: jnp.zeros(shape, jnp.int32)
  numbers = lambda *shape: jnp.zeros(shape, jnp.float32)
  each = None
  if k is not None:
    each = numbers(m, k), jnp.zeros((m, k), bool), _state.missing(m, k)
  return Stream(
    means=_tree.accumulators(params),
    plain=None if options.anchor_decay is None else _tree.accumulators(params),
    mean=_rules.Mean(jnp.zeros((m,), dtype), jnp.zeros((m,), dtype)),
    plain_weight=jnp.zeros((), dtype),
    num_added=counts(m),
    distance_sum=numbers(m),
    num_compared=counts(m),
    num_arrived=counts(),
    num_present=counts(),
    num_valid=counts(),
    per_microbatch=each,
  )


@functools.partial(jax.jit, static_argnames="spec")
def push(
  stream: Stream,
  arrays: Sequence[jax.Array],
  tau: _tau.Tau,
  weight: jax.Array | None = None,
  anchor: Sequence[jax.Array] | None = None,
  anchored: jax.Array | None = None,
  *,
  spec: _options.StepSpec,
) -> Stream:
  """Compares a micro-gradient with the running mean or anchor; adds it if accepted."""
  layout, dtype = spec.layout, stream.plain_weight.dtype
  stack = _stack(arrays, spec)
  gram, (finite,) = _kernels.gram(stack)
  against = _tree.select(stream.means, layout) if anchor is None else anchor
  square, products = _kernels.dots(against, stack)
  products = jnp.where(finite, products, 0)
  weight = jnp.ones((), dtype) if weight is None else weight.astype(dtype)
  valid = finite & (weight > 0)
  if anchor is None:
    pair = (square, products[:, 0], gram[:, 0, 0])
    mean, step = spec.rule.step(stream.mean, *pair, tau.value, valid, weight)
  else:
    mean, step = _against_anchor(
      stream.mean, square, products, gram, tau.value, valid, weight, anchored
    )

  # The last entry is for the plain mean, which ungrouped leaves and the anchor use.
  plain_weight = stream.plain_weight + jnp.where(valid, weight, 0)
  plain = weight / jnp.where(plain_weight > 0, plain_weight, 1)
  shares = jnp.append(step.share, jnp.where(valid, plain, 0))

  def accumulated(tree, group_ids):
    if tree is None:
      return None
    found = zip(_tree.select(tree, layout), arrays, group_ids)
    mixed = [_lerp(mean, value, shares[group]) for mean, value, group in found]
    return _tree.replace(tree, layout, mixed)

  compared = jnp.isfinite(step.distance)
  distance = jnp.where(compared, step.distance, 0).astype(jnp.float32)
  count = lambda number, flag: number + flag.astype(jnp.int32)
  return Stream(
    means=accumulated(stream.means, layout.group_ids),
    plain=accumulated(stream.plain, (layout.num_groups,) * len(arrays)),
    mean=mean,
    plain_weight=plain_weight,
    num_added=count(stream.num_added, step.accepted),
    distance_sum=stream.distance_sum + distance,
    num_compared=count(stream.num_compared, compared),
    num_arrived=stream.num_arrived + 1,
    num_present=count(stream.num_present, weight > 0),
    num_valid=count(stream.num_valid, valid),
    per_microbatch=_recorded(stream, step),
  )


def _against_anchor(mean, square, products, gram, tau, valid, weight, anchored):
  """Like `step` of a sequential rule, but compares with the anchor."""

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
  """Adds a step to `Stream.per_microbatch`."""
  if stream.per_microbatch is None:
    return None
  i = stream.num_arrived
  weights, accepted, distances = stream.per_microbatch
  share = step.share.astype(jnp.float32)
  return (
    (weights * (1 - share)[:, None]).at[:, i].set(share),
    accepted.at[:, i].set(step.accepted),
    distances.at[:, i].set(_state.nan_to_missing(step.distance)),
  )


def _stack(arrays, spec):
  """A stack of one micro-gradient with leaves `[*shape]`."""
  return _exchange.scatter([x[None] for x in arrays], spec).stack


def _lerp(mean, value, share):
  """`(1 - share) * mean + share * value`; a value with share 0 may be NaN."""
  value = jnp.where(share != 0, value.astype(mean.dtype), 0)
  return (1 - share).astype(mean.dtype) * mean + share.astype(mean.dtype) * value


def finish(
  stream: Stream,
  arrays: Sequence[jax.Array],
  spec: _options.StepSpec,
  min_accepted: int,
) -> tuple[list[jax.Array], _state.Outcome]:
  """The filtered mean of a cycle, in the dtypes of `arrays`, and its outcome.

  A group needs at least `min_accepted` accepted micro-gradients.
  """
  layout = spec.layout
  agreed = stream.num_added >= min_accepted
  slots = jnp.append(agreed, jnp.any(agreed))
  found = _tree.select(stream.means, layout)
  means = [jnp.where(slots[g], x, 0) for x, g in zip(found, layout.group_ids)]
  square, _ = _kernels.gram(_stack(found, spec))
  mean_distance = stream.distance_sum / jnp.maximum(stream.num_compared, 1).astype(
    jnp.float32
  )
  mean_distance = _state.mean_known(
    jnp.where(stream.num_compared > 0, mean_distance, _state.MISSING)
  )
  decision = None
  if stream.per_microbatch is not None:
    weights, accepted, distances = stream.per_microbatch
    weights = jnp.where(agreed[:, None], weights, 0)
    decision = _rules.Decision(weights, accepted & agreed[:, None], distances)
    decision = _state.mean_over_groups(decision)
  outcome = _state.Outcome(
    agreed=jnp.any(agreed),
    num_accepted=jnp.mean(jnp.where(agreed, stream.num_added, 0).astype(jnp.float32)),
    mean_distance=mean_distance,
    num_seen=stream.num_present,
    nonfinite=stream.num_present - stream.num_valid,
    identical=_state.are_identical(mean_distance),
    noise_scale=_state.missing(),
    grad_norm=jnp.sqrt(jnp.sum(jnp.where(agreed, square[:, 0, 0], 0))).astype(
      jnp.float32
    ),
    per_microbatch=decision,
  )
  return [mean.astype(x.dtype) for mean, x in zip(means, arrays)], outcome
