"""The path of a gradient: scatter, gram, decide, weighted means, join."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gaf_optax import (
  _decide,
  _exchange,
  _kernels,
  _mesh,
  _options,
  _state,
  _tree,
)


class Filtered(NamedTuple):
  """The result of a step.

  Attributes:
    means: leaves `[*shape]`, the filtered means.
    plain_means: with an anchor the means of all finite micro-gradients, else None.
    decided: a `_decide.Decided`.
    gram: `[m, k, k]`.
  """

  means: Sequence[jax.Array]
  plain_means: Sequence[jax.Array] | None
  decided: Any
  gram: Any


@functools.partial(jax.jit, static_argnames="spec")
def step(
  arrays: Sequence[jax.Array],
  state: _state.GafState,
  inputs: _decide.Inputs,
  anchor_decay: Any,
  *,
  spec: _options.StepSpec,
) -> tuple[Sequence[jax.Array], _state.GafState]:
  """One step: filtered means and the new state. Jitted for calls outside of `jit`."""
  anchor = None if anchor_decay is None else _tree.select(state.anchor, spec.layout)
  on_mesh = not spec.axes.axis_names and _mesh.is_sharded(arrays)
  run = _on_explicit_mesh if on_mesh else filtered
  means, plain_means, decided, gram = run(arrays, anchor, inputs, spec)
  if plain_means is not None:
    state = _state.move_anchor(
      state, spec.layout, anchor_decay, plain_means, jnp.any(decided.valid)
    )
  outcome = _state.outcome(decided, gram, has_norms=spec.embed is None)
  state = _state.advance(state, decided.tau, outcome)
  return means, state._replace(memory=decided.memory)


def filtered(
  arrays: Sequence[jax.Array],
  anchor: Sequence[jax.Array] | None,
  inputs: _decide.Inputs,
  spec: _options.StepSpec,
) -> Filtered:
  """Filters leaves `[k, *shape]` (or `[*shape]` per device)."""
  stack, split, join = _exchange.scatter(arrays, spec)
  gram, finite = _kernels.gram(stack)
  anchor_products = None if anchor is None else _kernels.dots(split(anchor), stack)
  decided = _decide.decide(spec.rule, gram, finite, inputs, anchor_products)
  means = join(_kernels.weighted_means(stack, decided.factors))
  if anchor is None:
    return Filtered(means, None, decided, gram)
  of_dtype = {x.dtype: a.dtype for x, a in zip(arrays, anchor)}
  plain_means = _kernels.weighted_means(
    stack._replace(group_ids=[0] * len(stack.arrays)),
    decided.plain[None],
    [of_dtype[x.dtype] for x in stack.arrays],
  )
  return Filtered(means, join(plain_means), decided, gram)


def _on_explicit_mesh(arrays, anchor, inputs, spec):
  """`filtered` on every device's part of a stack on an Explicit mesh.

  The result has the sharding of the stack without its leading axis.
  """
  mesh, axes, stacked, single = _mesh.placement(arrays, spec.layout.paths)
  spec = spec._replace(axes=axes)
  out_specs: Any = Filtered(single, None, P(), P())
  if anchor is not None:
    out_specs = out_specs._replace(plain_means=single)
    own = [_mesh.explicit_partition(a) for a in anchor]
    anchor = _mesh.reshard(anchor, single, mesh)
  result = jax.shard_map(
    lambda arrays, anchor, inputs: filtered(arrays, anchor, inputs, spec),
    mesh=mesh,
    in_specs=(stacked, None if anchor is None else single, P()),
    out_specs=out_specs,
  )(_mesh.reshard(arrays, stacked, mesh), anchor, inputs)
  if anchor is None:
    return result
  plain_means = _mesh.reshard(result.plain_means or [], own, mesh)
  return result._replace(plain_means=plain_means)
