"""Compares part of the gradients, then differentiates the weighted loss."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gaf_optax import (
  _compat,
  _decide,
  _exchange,
  _kernels,
  _mesh,
  _options,
  _state,
  _tree,
  _validate,
)
from gaf_optax._validate import leaf_name

# `(path, leaf) -> bool` on the parameters.
Compare = Callable[[Any, Any], bool]

# If the compared leaves have at most this many values, each microbatch gets its own
# copy. This costs memory but saves a second forward pass, which XLA does not share
# across a normalization layer (a third of a ResNet's or transformer's step).
_MAX_COPIED_VALUES = 1 << 16

# Why `compare` excludes an option.
_NOT_WITH_COMPARE = {
  "stacked": "the microbatches of one call are always stacked",
  "groups": "one weighted loss for all parameters allows one decision only",
  "memory_decay": "there is no state to hold the memory; use gaf",
  "anchor_decay": "there is no state to hold the average; use gaf or multi_steps",
  "param_axes": "the compared leaves must be whole on every device",
}


def validate(tau, compare: Compare, **options) -> _options.Options:
  _validate.function(" Pass a predicate (path, leaf) -> bool.", compare=compare)
  _options.refuse(options, _NOT_WITH_COMPARE, "compare")
  return _options.Options(tau, **options)


def two_pass(
  loss: Callable[[Any, Any], tuple[jax.Array, Any]],
  params: Any,
  batch: Any,
  num_microbatches: int,
  compare: Compare,
  microbatch_weights: jax.Array | None,
  options: _options.Options,
) -> tuple[jax.Array, Any, Any, _state.Agreement]:
  """Compares microbatches by the gradients of some leaves, then differentiates once.

  The first backward pass forms the compared leaves' gradients of each microbatch; the
  second differentiates the weighted mean loss. If the compared leaves are small, both
  share one forward pass. If not, sharing is up to XLA.

  Args:
    loss: `(params, microbatch) -> (scalar, aux)`.
    params: the arguments to differentiate with respect to.
    batch: leaves `[k, ...]`.
    num_microbatches: k, per device.
    compare: selects the compared leaves.
    microbatch_weights: `[k]` or None.
    options: from `validate`.

  Returns:
    The mean loss, aux leaves `[k, ...]`, the gradient, and an `Agreement` over all
    devices, with this device's arrays `[k]`.
  """
  _mesh.check_axes((), (), options)  # Raises for an unbound axis.
  names, k = options.axis_names, num_microbatches
  checking = frozenset(n for n in names if _compat.checks_replication(n))
  # Otherwise gradients of replicated parameters are summed over the devices.
  params = jax.tree.map(lambda x: _compat.as_varying(x, checking), params)
  leaves, treedef = jax.tree.flatten(params)
  selected = _selected(params, compare)
  own = [leaves[i] for i in selected]
  copied = selected if sum(jnp.size(x) for x in own) <= _MAX_COPIED_VALUES else []

  # `vmap` cannot map over a mesh axis that also shards the parameters.
  beside_batch = functools.partial(
    _mesh.gather_over_batch_axes, batch=jax.tree.leaves(batch)
  )

  def one(shared, own, positions, microbatch):
    merged = _replaced(shared, positions, own)
    return loss(jax.tree.unflatten(treedef, merged), microbatch)

  def each(shared, copies):
    shared = beside_batch(shared)
    run = lambda copies, microbatch: one(shared, copies, copied, microbatch)
    return jax.vmap(run)(copies, batch)

  copies = [
    _mesh.broadcast_per_microbatch(leaves[i], k, jax.tree.leaves(batch)) for i in copied
  ]
  losses, backward, aux = jax.vjp(each, leaves, copies, has_aux=True)
  _check_losses(losses, k)
  typed = lambda x: _compat.typed_like(x, losses)
  cotangent = lambda x: _mesh.reshard_like(typed(x), losses)
  if copied:
    _, stacks = backward(cotangent(jnp.ones_like(losses)))
  else:
    whole = beside_batch(leaves)
    alone = lambda own, microbatch: one(whole, own, selected, microbatch)[0]
    stacks = jax.vmap(jax.grad(alone), (None, 0))(beside_batch(own), batch)
  if microbatch_weights is not None:
    microbatch_weights = typed(_mesh.replicate(microbatch_weights))
  # Flat, because XLA for CPU recomputes them for each shape in which they are read.
  stacks = [_tree.flat_rows(_mesh.replicate(x)) for x in stacks]
  weights, finite, agreement = _compared(losses, stacks, microbatch_weights, options)
  if names:
    start = lax.axis_index(names) * k
    mine = lambda x: lax.dynamic_slice_in_dim(x, start, k)
    weights, finite = mine(weights), mine(finite)
    agreement = agreement._replace(
      accepted=mine(agreement.accepted),
      weights=mine(agreement.weights),
      distances=mine(agreement.distances),
    )
  # Not within `cond`, where XLA's CPU convolutions are slow.
  shared, _ = backward(cotangent(weights.astype(losses.dtype)))
  means = []
  if copied:
    compared = _kernels.Stack(stacks, [0] * len(stacks))
    found = _kernels.weighted_means(compared, weights[None])
    means = [
      _mesh.reshard_like(x.reshape(leaf.shape), leaf) for x, leaf in zip(found, own)
    ]
  grads = jax.tree.unflatten(treedef, _replaced(shared, copied, means))

  def without_nonfinite():
    # A NaN times a weight of 0 is NaN in the backward pass: use finite rows instead.
    rows = jnp.where(finite, jnp.arange(k), jnp.argmax(finite))
    finite_batch = jax.tree.map(
      lambda x: _mesh.reshard_like(_mesh.replicate(x)[rows], x), batch
    )

    def total(params):
      whole = jax.tree.unflatten(treedef, beside_batch(jax.tree.leaves(params)))
      losses, _ = jax.vmap(loss, (None, 0))(whole, finite_batch)
      factors = cotangent(weights.astype(losses.dtype))
      return jnp.sum(jnp.where(factors != 0, factors * losses, 0))

    grads = jax.grad(total)(params)
    return jax.tree.map(lambda x: jnp.where(jnp.any(finite), x, 0), grads)

  grads = _compat.cond(jnp.all(finite), lambda: grads, without_nonfinite)
  if names:
    grads = jax.tree.map(lambda x: lax.psum(x, names), grads)
  value = mean_loss(losses, microbatch_weights, names)
  return value, aux, *_zero_unless_finite(grads, agreement)


def _zero_unless_finite(grads, agreement):
  """Handles NaN and infinity in leaves that are not compared: nothing agrees."""
  inexact = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
  leaves = [x for x in jax.tree.leaves(grads) if inexact(x)]
  finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))
  zero = lambda x: jnp.where(finite, x, jnp.zeros_like(x))
  agreement = agreement._replace(
    agreed=agreement.agreed & finite,
    num_accepted=zero(agreement.num_accepted),
    accepted=agreement.accepted & finite,
    weights=zero(agreement.weights),
    nonfinite=jnp.maximum(agreement.nonfinite, jnp.where(finite, 0, 1)),
  )
  return jax.tree.map(lambda x: zero(x) if inexact(x) else x, grads), agreement


def mean_loss(losses, weights=None, names=()):
  """The weighted mean of losses `[k]` over all devices, ignoring weights of 0."""
  if weights is None:
    mean = jnp.mean(losses)
    return lax.pmean(mean, names) if names else mean
  total = jnp.sum(jnp.where(weights > 0, weights.astype(losses.dtype) * losses, 0))
  number = jnp.sum(weights).astype(losses.dtype)
  if names:
    total, number = lax.psum((total, number), names)
  return total / jnp.where(number > 0, number, 1)


def _replaced(leaves, positions, values):
  """The leaves with the values at these positions replaced."""
  places = dict(zip(positions, values))
  return [places.get(i, leaf) for i, leaf in enumerate(leaves)]


def _check_losses(losses, k):
  """Raises as `jax.grad` does, for the value of each microbatch."""
  if losses.shape != (k,) or not jnp.issubdtype(losses.dtype, jnp.floating):
    raise TypeError(
      "fun must return a real scalar (with has_aux, a pair of that and the auxiliary"
      f" output), got {losses.dtype}{list(losses.shape[1:])}."
    )


def _selected(params, compare):
  """The positions of the compared leaves."""
  flat = jax.tree_util.tree_flatten_with_path(params)[0]
  selected = [i for i, entry in enumerate(flat) if _is_selected(compare, *entry)]
  if not selected:
    raise ValueError(
      "compare selects no leaf of the parameters. Their paths are"
      f" {', '.join(leaf_name(path) for path, _ in flat[:5])}"
      f"{', ...' if len(flat) > 5 else ''}."
    )
  for i in selected:
    path, leaf = flat[i]
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
      raise ValueError(
        f"compare selects leaf {leaf_name(path)} of dtype {jnp.result_type(leaf)},"
        " which has no gradient to compare."
      )
  return selected


def _is_selected(compare, path, leaf):
  answer = compare(path, leaf)
  if not isinstance(answer, bool | np.bool_):
    raise ValueError(
      f"compare must return True or False, got {answer!r} for leaf {leaf_name(path)}."
    )
  return answer


def _compared(losses, stacks, weights, options):
  """Weights and finiteness `[n * k]` of all devices' microbatches, and the agreement.

  `losses` and `weights` (or None) are `[k]`, `stacks` gradients `[k, size]`.
  """
  leaves = _tree.flatten(stacks, None, None, stacked=True)
  spec = options.spec(leaves)
  spec = spec._replace(axes=spec.axes._replace(stacked=True))
  inputs = _decide.Inputs(
    tau=options.tau.at(None, jnp.zeros((), jnp.int32)),
    weights=_mesh.gather_weights(weights, leaves.k, options.axis_names),
    max_norm_ratio=options.max_norm_ratio,
  )
  return _by_rows(leaves.arrays, _mesh.replicate(losses), inputs, spec=spec)


@functools.partial(jax.jit, static_argnames="spec")
def _by_rows(arrays, losses, inputs, *, spec):
  # The losses belong to no group: only their finiteness counts.
  layout = spec.layout
  group_ids = (*layout.group_ids, layout.num_groups)
  spec = spec._replace(layout=layout._replace(group_ids=group_ids))
  gram, finite = _kernels.gram(_exchange.scatter([*arrays, losses], spec).stack)
  decided = _decide.decide(spec.rule, gram, finite, inputs)
  outcome = _state.outcome(decided, gram, has_norms=spec.embed is None)
  return decided.factors[0], finite, _state.agreement(outcome)
