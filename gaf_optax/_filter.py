"""Filter: the path of a gradient: rows, gram, rule, combine, join."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from gaf_optax import (
  _combine,
  _exchange,
  _gram,
  _inner_products,
  _mesh,
  _options,
  _state,
  _stream,
  _tree,
  rules,
)


class Inputs(NamedTuple):
  """What a step needs besides the micro-gradients, all of it traced.

  Attributes:
    threshold: tau, a scalar.
    anchor: with an anchor its leaves, in the order of the layout; else None.
    anchored: bool scalar, whether it holds a step; None without.
    memory: what the rule remembers, or None.
    memory_decay: a scalar, or None.
  """

  threshold: jax.Array
  anchor: list[jax.Array] | None = None
  anchored: jax.Array | None = None
  memory: Any = None
  memory_decay: Any = None


class Filtered(NamedTuple):
  """What the filter makes of a step's micro-gradients.

  Attributes:
    means: leaves `[*shape]`, the weighted means.
    plain_means: with an anchor the means of all finite ones, else None.
    decision: a `rules.Decision` `[m, k]` by group, its weights normalized.
    tau: the threshold, a scalar; the mean over the groups.
    finite: bool `[k]`.
    noise_scale: float32 scalar.
    memory: what the rule remembers now, or None.
  """

  means: list[jax.Array]
  plain_means: list[jax.Array] | None
  decision: Any
  tau: Any
  finite: Any
  noise_scale: Any
  memory: Any


@functools.partial(jax.jit, static_argnames="plan")
def step(
  arrays: Sequence[jax.Array],
  state: _state.GafState,
  threshold: jax.Array,
  anchor_decay: Any,
  memory_decay: Any,
  *,
  plan: _options.Plan,
) -> tuple[list[jax.Array], _state.GafState]:
  """Leaves of micro-gradients and the state to filtered means and the state.

  Compiled as one, so that a call outside `jit` costs no more than it has to.
  """
  anchor = None if anchor_decay is None else _tree.pick(state.anchor, plan.layout)
  inputs = Inputs(threshold, anchor, state.anchored, state.memory, memory_decay)
  if not plan.axes.axis_names and _mesh.is_sharded(arrays):
    result = _on_explicit_mesh(arrays, inputs, plan)
  else:
    result = filtered(arrays, inputs, plan)
  if anchor is not None:
    state = _state.move_anchor(
      state, plan.layout, anchor_decay, result.plain_means, jnp.any(result.finite)
    )
  outcome = _state.outcome(result.decision, result.finite, result.noise_scale)
  state = _state.advance(state, plan.steering, result.tau, outcome)
  return result.means, state._replace(memory=result.memory)


def filtered(
  arrays: Sequence[jax.Array], inputs: Inputs, plan: _options.Plan
) -> Filtered:
  """The path of a gradient, from leaves `[k, *shape]` (or `[*shape]` per replica)."""
  group_ids, num_groups = plan.layout.group_ids, plan.layout.num_groups
  rows = _exchange.scatter(arrays, group_ids, plan.axes, plan.embed is not None)
  k = rows.leaves[0].shape[0]

  def all_at_once(leaves, inputs):
    blocks = _with_anchor(leaves, rows, inputs.anchor)
    gram, valid = _inner_products.gram(
      blocks, rows.group_ids, num_groups, plan.embed, rows.shards
    )
    finite, noise_scale = valid[-k:], _gram.noise_scale(gram.last(k), valid[-k:])
    if inputs.anchor is not None:
      valid = valid.at[0].set(inputs.anchored)
    decision, taus, memory = rules.decide_groups(
      plan.rule,
      gram,
      valid,
      inputs.threshold,
      plan.step_tau,
      inputs.memory,
      inputs.memory_decay,
    )
    decision = decision._replace(weights=_combine.normalized(decision.weights))
    plain = _combine.normalized(finite.astype(decision.weights.dtype))
    # Leaves of no group get the plain mean. Behind the barrier, or XLA would compute
    # the weights again for every value of every leaf.
    weights = jnp.concatenate([decision.weights, plain[None]])
    weights = lax.optimization_barrier(weights)
    means = [
      _combine.weighted_mean(x, weights[group])
      for x, group in zip(leaves, rows.group_ids)
    ]
    plain_means = _plain_means(leaves, plain, arrays, inputs.anchor)
    tau = jnp.mean(taus)
    return Filtered(means, plain_means, decision, tau, finite, noise_scale, memory)

  if _is_faster_one_by_one(k, plan):
    result = _one_by_one_on_cpu(all_at_once, rows, inputs, plan)
  else:
    result = all_at_once(rows.leaves, inputs)
  plain_means = result.plain_means and rows.join(result.plain_means)
  return result._replace(means=rows.join(result.means), plain_means=plain_means)


def _with_anchor(leaves, rows, anchor):
  """For each leaf its blocks of rows: the anchor first, if there is one."""
  if anchor is None:
    return [(x,) for x in leaves]
  return [(a[None], x) for a, x in zip(rows.split(anchor), leaves)]


def _plain_means(leaves, weights, arrays, anchor):
  """The means that move an anchor, of its dtypes."""
  if anchor is None:
    return None
  dtypes = {x.dtype: a.dtype for x, a in zip(arrays, anchor)}
  return [_combine.weighted_mean(x, weights, dtypes[x.dtype]) for x in leaves]


# From so many micro-gradients on, a running mean (k P products) is faster on CPU than
# the Gram matrix (k^2 P); benchmarks/RESULTS.md has both. Not measured elsewhere.
_MIN_ONE_BY_ONE = 32


def _is_faster_one_by_one(k, plan):
  return (
    k >= _MIN_ONE_BY_ONE
    and isinstance(plan.rule, rules.SequentialRule)
    and plan.embed is None
    and not (plan.axes.axis_names or plan.axes.param_axes)
  )


def _one_by_one_on_cpu(all_at_once, rows, inputs, plan):
  """On CPU the rows pushed into a stream one after the other; elsewhere at once."""

  def one_by_one(leaves, inputs):
    shapes = [x.shape[1:] for x in leaves]
    leaves = [_tree.flat_rows(x) for x in leaves]
    means, decision, pushed = _stream.filter_rows(
      leaves, rows.group_ids, inputs.threshold, plan
    )
    means = [x.reshape(shape) for x, shape in zip(means, shapes)]
    compared = [x for x, g in zip(leaves, rows.group_ids) if g < plan.layout.num_groups]
    noise_scale = _gram.noise_scale_of_sum(
      _gram.Gram(pushed.squares.T, pushed.exponents.T),
      pushed.finite,
      lambda factors: _inner_products.squared_sum(compared, factors),
    )
    tau = inputs.threshold
    return Filtered(means, None, decision, tau, pushed.finite, noise_scale, None)

  return lax.platform_dependent(
    rows.leaves, inputs, cpu=one_by_one, default=all_at_once
  )


def _on_explicit_mesh(arrays, inputs, plan):
  """`filtered`, called by each device on its part; the rest is the same on all.

  The leaves of the result are sharded as those of the stack, without the leading axis.
  """
  placement = _mesh.placement(arrays, plan.layout.paths)
  plan = plan._replace(axes=placement.axes)
  mesh: Any = placement.mesh
  single: Any = placement.single
  here: Any = P()
  in_specs: Any = Inputs(here, None, here, here, here)
  out_specs: Any = Filtered(single, None, here, here, here, here, here)
  if inputs.anchor is not None:
    in_specs = in_specs._replace(anchor=single)
    out_specs = out_specs._replace(plain_means=single)
    own = [_mesh.explicit_partition(a) for a in inputs.anchor]
    inputs = inputs._replace(anchor=_mesh.reshard(inputs.anchor, single, mesh))
  result = jax.shard_map(
    lambda arrays, inputs: filtered(arrays, inputs, plan),
    mesh=mesh,
    in_specs=(placement.stacked, in_specs),
    out_specs=out_specs,
  )(_mesh.reshard(arrays, placement.stacked, mesh), inputs)
  if inputs.anchor is None:
    return result
  plain_means = _mesh.reshard(result.plain_means or [], own, mesh)
  return result._replace(plain_means=plain_means)
