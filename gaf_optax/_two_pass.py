"""Two pass: microbatches compared by a part of their gradients, then differentiated."""

import dataclasses
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

# Values of the compared leaves up to which each microbatch gets a copy of them. That
# costs memory and time in proportion, and saves a forward pass, of which XLA shares
# nothing behind a normalization layer (a third of a ResNet's or transformer's step).
_COPIED = 1 << 16


# Why an option has no meaning with `compare`.
_NOT_WITH_COMPARE = {
  "stacked": "the microbatches of one call are always stacked",
  "groups": (
    "one weighted loss is differentiated for all parameters, so that there is one"
    " decision for all of them"
  ),
  "memory_decay": "there is no state to hold the memory; use gaf",
  "anchor_decay": "there is no state to hold the average; use gaf or multi_steps",
  "param_axes": "the compared leaves must be whole on every device",
}


def checked(tau, compare: Compare, **options) -> _options.Options:
  """Checked options of the two-pass form.

  Raises:
    ValueError: as `gaf`, and for what has no meaning there.
  """
  _validate.function(" A predicate (path, leaf) -> bool.", compare=compare)
  _options.refuse(options, _NOT_WITH_COMPARE, "compare")
  return _options.checked(tau, **options)


def two_pass(
  loss: Callable[[Any, Any], tuple[jax.Array, Any]],
  params: Any,
  batch: Any,
  num_microbatches: int,
  compare: Compare,
  microbatch_weights: jax.Array | None,
  options: _options.Options,
) -> tuple[jax.Array, Any, Any, _state.Agreement]:
  """Compares microbatches by some leaves' gradients, then differentiates once.

  The first backward pass forms the gradients of the compared leaves for each
  microbatch; the second is that of the weighted mean loss, over all parameters. Where
  the compared leaves are small, each microbatch gets a copy of them, and one forward
  pass serves both. Where they are large, the first has a forward pass of its own; how
  much of it the two share is up to XLA.

  Args:
    loss: `(params, microbatch) -> (scalar, aux)`.
    params: what is differentiated.
    batch: leaves `[k, ...]`.
    num_microbatches: k; of each replica, with axis names.
    compare: which leaves of `params` are compared.
    microbatch_weights: `[k]`, how much each microbatch counts; or None.
    options: of `checked`.

  Returns:
    The mean loss, aux leaves `[k, ...]`, the gradient, and an `Agreement` of all
    replicas' microbatches, whose arrays are those of this replica's, `[k]`.
  """
  names, k = options.axis_names, num_microbatches
  checking = frozenset(n for n in names if _compat.checks_replication(n))
  # Gradients of replicated parameters would be summed over the replicas.
  params = jax.tree.map(lambda x: _compat.as_varying(x, checking), params)
  leaves, treedef = jax.tree.flatten(params)
  selected = _selected(params, compare)
  own = [leaves[i] for i in selected]
  copied = selected if sum(jnp.size(x) for x in own) <= _COPIED else []

  # JAX maps no parameters over a mesh axis that they are sharded over.
  beside_batch = functools.partial(_mesh.beside, batch=jax.tree.leaves(batch))

  def one(shared, own, positions, microbatch):
    merged = _replaced(shared, positions, own)
    return loss(jax.tree.unflatten(treedef, merged), microbatch)

  def each(shared, copies):
    shared = beside_batch(shared)
    run = lambda copies, microbatch: one(shared, copies, copied, microbatch)
    return jax.vmap(run)(copies, batch)

  copies = [_mesh.copies(leaves[i], k, jax.tree.leaves(batch)) for i in copied]
  losses, backward, aux = jax.vjp(each, leaves, copies, has_aux=True)
  _check_losses(losses, k)
  typed = lambda x: _compat.typed_like(x, losses)
  cotangent = lambda x: _mesh.placed_like(typed(x), losses)
  if copied:
    _, stacks = backward(cotangent(jnp.ones_like(losses)))
  else:
    whole = beside_batch(leaves)
    alone = lambda own, microbatch: one(whole, own, selected, microbatch)[0]
    stacks = jax.vmap(jax.grad(alone), (None, 0))(beside_batch(own), batch)
  if microbatch_weights is not None:
    microbatch_weights = typed(_mesh.gathered(microbatch_weights))
  # Flat where they are made, since XLA's CPU compiler would make them once for each
  # shape in which they are read.
  stacks = [_tree.flat_rows(_mesh.gathered(x)) for x in stacks]
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
  # Before the branch, since XLA's CPU convolutions are slow within one.
  shared, _ = backward(cotangent(weights.astype(losses.dtype)))
  means = []
  if copied:
    found = _kernels.weighted_means(stacks, [0] * len(stacks), weights[None])
    means = [
      _mesh.placed_like(x.reshape(leaf.shape), leaf) for x, leaf in zip(found, own)
    ]
  grads = jax.tree.unflatten(treedef, _replaced(shared, copied, means))

  def without_bad():
    # A NaN times a weight of 0 is NaN in the backward pass: good ones stand in.
    rows = jnp.where(finite, jnp.arange(k), jnp.argmax(finite))
    good = jax.tree.map(lambda x: _mesh.placed_like(_mesh.gathered(x)[rows], x), batch)

    def total(params):
      whole = jax.tree.unflatten(treedef, beside_batch(jax.tree.leaves(params)))
      losses, _ = jax.vmap(loss, (None, 0))(whole, good)
      factors = cotangent(weights.astype(losses.dtype))
      return jnp.sum(jnp.where(factors != 0, factors * losses, 0))

    grads = jax.grad(total)(params)
    return jax.tree.map(lambda x: jnp.where(jnp.any(finite), x, 0), grads)

  grads = _compat.cond(jnp.all(finite), lambda: grads, without_bad)
  if names:
    grads = jax.tree.map(lambda x: lax.psum(x, names), grads)
  return mean_loss(losses, microbatch_weights, names), aux, grads, agreement


def mean_loss(losses, weights=None, names=()):
  """The mean of losses `[k]`, of all replicas; those of weight 0 are left out."""
  if weights is None:
    mean = jnp.mean(losses)
    return lax.pmean(mean, names) if names else mean
  total = jnp.sum(jnp.where(weights > 0, weights.astype(losses.dtype) * losses, 0))
  number = jnp.sum(weights).astype(losses.dtype)
  if names:
    total, number = lax.psum((total, number), names)
  return total / jnp.where(number > 0, number, 1)


def _replaced(leaves, positions, values):
  """The leaves, with other values in some places."""
  places = dict(zip(positions, values))
  return [places.get(i, leaf) for i, leaf in enumerate(leaves)]


def _check_losses(losses, k):
  """What `jax.grad` asks of a function's value, of each microbatch's."""
  if losses.shape != (k,) or not jnp.issubdtype(losses.dtype, jnp.floating):
    raise TypeError(
      "fun must return a real scalar (with has_aux a pair of one and the auxiliary"
      f" output), got {losses.dtype}{list(losses.shape[1:])}."
    )


def _selected(params, compare):
  """The positions of the compared leaves among all."""
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
  """Weights and finiteness `[n * k]` of all replicas' microbatches, and the agreement.

  Args:
    losses: `[k]`.
    stacks: gradients `[k, size]` of the compared leaves.
    weights: `[k]` or None.
    options: of `checked`.
  """
  stacked = dataclasses.replace(options, stacked=True)
  leaves = _tree.flatten(stacks, None, None, stacked=True)
  plan = stacked.plan(leaves)
  inputs = _decide.Inputs(
    tau=options.tau.at(None, jnp.zeros((), jnp.int32)),
    weights=_mesh.gathered_weights(weights, leaves.k, options.axis_names),
    max_norm_ratio=options.max_norm_ratio,
  )
  return _by_rows(leaves.arrays, _mesh.gathered(losses), inputs, plan=plan)


@functools.partial(jax.jit, static_argnames="plan")
def _by_rows(arrays, losses, inputs, *, plan):
  # The losses belong to no group: they have to be finite, and no more.
  group_ids = (*plan.layout.group_ids, plan.layout.num_groups)
  rows = _exchange.scatter([*arrays, losses], group_ids, plan.axes)
  gram, finite = _kernels.gram(rows.leaves, rows.group_ids, 1, plan.embed, rows.shards)
  decided = _decide.decide(plan.rule, plan.tau, gram, finite, inputs)
  outcome = _state.outcome(decided, gram, knows_norms=plan.embed is None)
  return decided.factors[0], finite, _state.agreement(outcome)
