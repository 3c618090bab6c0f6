"""By example: microbatches compared by a part of their gradients, in two passes."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gaf_optax import (
  _combine,
  _exchange,
  _gram,
  _inner_products,
  _jax_types,
  _mesh,
  _options,
  _state,
  _threshold,
  _tree,
  _validate,
  rules,
)


def example_weights(
  activations: jax.Array | Sequence[jax.Array],
  cotangents: jax.Array | Sequence[jax.Array],
  tau: float | jax.Array | rules.StepTau = 0.97,
  *,
  rule: rules.RuleFn | None = None,
) -> _state.Agreement:
  r"""Compares the examples of a batch by their gradients of one dense layer.

  For models whose examples cannot be separated (BatchNorm) and for losses that are
  written by hand. The gradient of example i's loss with respect to the kernel of a
  dense layer is the outer product of the layer's input :math:`a_i` and of the loss's
  cotangent :math:`d_i` at its output, and with respect to its bias :math:`d_i`. So
  their inner products are known without forming one of them:

  .. math:: G = (A A^\top + 1) \odot (D D^\top)

  Matrices of several layers are added up. Two products of `B^2 d` and `B^2 c`
  operations; the last layer usually says as much as all of them.

  Args:
    activations: the inputs `[B, d]` of a dense layer with a bias; or a sequence of
      them, one for each layer.
    cotangents: the gradients `[B, c]` of each example's own loss (not of the mean)
      with respect to the layer's outputs; or a sequence of them. For the softmax
      cross-entropy of logits they are `softmax(logits) - one_hot(labels)`.
    tau: the largest distance that is accepted, in [0, 2], traced or not; or a
      :func:`tau_quantile` or :func:`adaptive_tau`.
    rule: see :func:`gaf`; for examples of several classes
      `rules.nearest_neighbors(5)` fits, since an example agrees with its kind.

  Returns:
    An :class:`Agreement` of the B examples: the weighted mean of the examples' losses
    with its `weights` (which sum to 1) has the filtered gradient. No gradient flows
    through it.

  Raises:
    ValueError: for arrays that are not `[B, features]` with the same B of at least 2,
      different numbers of layers, and arguments outside their ranges.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from gaf_optax import example_weights, rules, tau_quantile
    >>> inputs = jnp.array([[1., 0.], [1., .1], [.9, 0.], [1., 0.]])
    >>> logits, labels = jnp.zeros((4, 2)), jnp.array([0, 0, 0, 1])
    >>> cotangents = jax.nn.softmax(logits) - jax.nn.one_hot(labels, 2)
    >>> rule = rules.nearest_neighbors(2)
    >>> example_weights(inputs, cotangents, tau_quantile(.75), rule=rule).accepted
    Array([ True,  True,  True, False], dtype=bool)
  """
  layers = _layers(activations, cotangents)
  if not _threshold.is_step_tau(tau):
    _validate.scalar(
      " A schedule or a target_accept_rate needs a state; pass the value itself.",
      tau=tau,
    )
  options = _options.checked(tau, rule=rule)
  step_tau: Any = tau if _threshold.is_step_tau(tau) else None
  return _of_layers(
    layers, options.threshold(0, None), rule=options.rule, step_tau=step_tau
  )


@functools.partial(jax.jit, static_argnames=("rule", "step_tau"))
def _of_layers(layers, threshold, *, rule, step_tau):
  gram, finite = _sum_of_layers([_layer_gram(a, d) for a, d in layers])
  return _decided(gram, finite, threshold, rule, step_tau)[1]


def _decided(gram, finite, threshold, rule, step_tau):
  """The weights `[k]` and the `Agreement`."""
  decision, _, _ = rules.decide_groups(rule, gram, finite, threshold, step_tau)
  decision = decision._replace(weights=_combine.normalized(decision.weights))
  outcome = _state.outcome(decision, finite, _gram.noise_scale(gram, finite))
  return decision.weights[0], _state.agreement(outcome)


def _layers(activations, cotangents):
  """Pairs of arrays `[B, features]`, checked, cut off from differentiation."""
  several = [isinstance(x, list | tuple) for x in (activations, cotangents)]
  if any(several) and not (all(several) and len(activations) == len(cotangents) > 0):
    raise ValueError(
      "activations and cotangents must be two arrays, or two sequences of one array for"
      f" each layer, got {_described(activations)} and {_described(cotangents)}."
    )
  layers = list(zip(activations, cotangents)) if any(several) else None
  layers = layers or [(activations, cotangents)]
  size = jnp.shape(layers[0][0])[:1]
  for pair in layers:
    for name, x in zip(("activations", "cotangents"), pair):
      shape = jnp.shape(x)
      if len(shape) != 2 or shape[:1] != size:
        raise ValueError(
          f"{name} must have the shape [B, features], with the same B in every array"
          f" ({size[0] if size else 'unknown'} in the first), got {shape}. A layer that"
          " is applied at several positions of an example has no such form; compare"
          " the layer after the pooling."
        )
  if size[0] < 2:
    raise ValueError("there is one example, and nothing to compare it with.")
  return jax.tree.map(lambda x: lax.stop_gradient(jnp.asarray(x)), layers)


def _described(value):
  if isinstance(value, list | tuple):
    return f"a sequence of {len(value)}"
  return f"an array of shape {jnp.shape(value)}"


def _layer_gram(activations, cotangents):
  """The `Gram` of one layer's per-example gradients, and which are finite."""
  ones = jnp.ones((activations.shape[0], 1), activations.dtype)
  inputs, finite_inputs = _inner_products.gram([(activations,), (ones,)], [0, 0], 1)
  outputs, finite_outputs = _inner_products.gram([(cotangents,)], [0], 1)
  finite = finite_inputs & finite_outputs
  products = inputs.products * outputs.products
  products = jnp.where(finite[:, None] & finite[None, :], products, 0)
  exponents = inputs.exponents + outputs.exponents
  return _gram.balanced(_gram.Gram(products, exponents)), finite


def _sum_of_layers(layers):
  """The `Gram` `[1, k, k]` of gradients of all layers, and which are finite."""
  finite = jnp.all(jnp.stack([finite for _, finite in layers]), axis=0)
  top = jnp.max(jnp.stack([gram.exponents for gram, _ in layers]), axis=0)
  aligned = []
  for gram, _ in layers:
    unit = _gram.power_of_two(gram.exponents - top, gram.products.dtype)
    aligned.append(gram.products * unit[:, :, None] * unit[:, None, :])
  products = jnp.sum(jnp.stack(aligned), axis=0)
  products = jnp.where(finite[:, None] & finite[None, :], products, 0)
  return _gram.Gram(products, top), finite


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


def check_compared_options(tau, compare: Compare, **options) -> _options.Options:
  """Checked options of the two-pass form.

  Raises:
    ValueError: as `gaf`, and for what has no meaning there.
  """
  _validate.function(" A predicate (path, leaf) -> bool.", compare=compare)
  for name, reason in _NOT_WITH_COMPARE.items():
    if options.get(name) not in (None, ()):
      raise ValueError(f"{name}={options[name]!r} does not go with compare: {reason}.")
  return _options.checked(tau, **options)


def two_pass(
  loss: Callable[[Any, Any], tuple[jax.Array, Any]],
  params: Any,
  batch: Any,
  num_microbatches: int,
  compare: Compare,
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
    options: of `check_compared_options`.

  Returns:
    The mean loss, aux leaves `[k, ...]`, the gradient, and an `Agreement` of all
    replicas' microbatches, whose arrays are those of this replica's, `[k]`.
  """
  names, k = options.axis_names, num_microbatches
  checking = frozenset(n for n in names if _jax_types.checks_replication(n))
  # Gradients of replicated parameters would be summed over the replicas.
  params = jax.tree.map(lambda x: _jax_types.as_varying(x, checking), params)
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
  typed = lambda x: _jax_types.typed_like(x, losses)
  cotangent = lambda x: _mesh.placed_like(typed(x), losses)
  if copied:
    _, stacks = backward(cotangent(jnp.ones_like(losses)))
  else:
    whole = beside_batch(leaves)
    alone = lambda own, microbatch: one(whole, own, selected, microbatch)[0]
    stacks = jax.vmap(jax.grad(alone), (None, 0))(beside_batch(own), batch)
  weights, finite, agreement = _compared(losses, stacks, options)
  if names:
    start = lax.axis_index(names) * k
    mine = lambda x: lax.dynamic_slice_in_dim(x, start, k)
    weights, finite = mine(weights), mine(finite)
    agreement = agreement._replace(
      accepted=mine(agreement.accepted),
      weights=mine(agreement.weights),
      raw_distances=mine(agreement.raw_distances),
    )
  # Before the branch, since XLA's CPU convolutions are slow within one.
  shared, _ = backward(cotangent(weights.astype(losses.dtype)))
  means = []
  if copied:
    found = [_combine.weighted_mean(_mesh.gathered(x), weights) for x in stacks]
    means = [_mesh.placed_like(x, leaf) for x, leaf in zip(found, own)]
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

  grads = _jax_types.cond(jnp.all(finite), lambda: grads, without_bad)
  value = jnp.mean(losses)
  if names:
    grads = jax.tree.map(lambda x: lax.psum(x, names), grads)
    value = lax.pmean(value, names)
  return value, aux, grads, agreement


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
      f" {', '.join(_tree.name(path) for path, _ in flat[:5])}"
      f"{', ...' if len(flat) > 5 else ''}."
    )
  for i in selected:
    path, leaf = flat[i]
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
      raise ValueError(
        f"compare selects leaf {_tree.name(path)} of dtype {jnp.result_type(leaf)},"
        " which has no gradient to compare."
      )
  return selected


def _is_selected(compare, path, leaf):
  answer = compare(path, leaf)
  if not isinstance(answer, bool | np.bool_):
    raise ValueError(
      f"compare must return True or False, got {answer!r} for leaf {_tree.name(path)}."
    )
  return answer


def _compared(losses, stacks, options):
  """Weights and finiteness `[n * k]` of all replicas' microbatches, and the agreement.

  Args:
    losses: `[k]`.
    stacks: gradients `[k, *shape]` of the compared leaves.
    options: of `check_compared_options`.
  """
  stacked = dataclasses.replace(options, stacked=True)
  # Flat where they are made, since XLA's CPU compiler would make them once for the
  # products, which are of flat rows, and once for the branches.
  stacks = [_tree.flat_rows(_mesh.gathered(x)) for x in stacks]
  losses = _mesh.gathered(losses)
  leaves = _tree.flatten(stacks, None, None, stacked=True)
  plan = stacked.plan(leaves)
  return _by_rows(leaves.arrays, losses, options.threshold(0, None), plan=plan)


@functools.partial(jax.jit, static_argnames="plan")
def _by_rows(arrays, losses, threshold, *, plan):
  # The losses belong to no group: they have to be finite, and no more.
  group_ids = (*plan.layout.group_ids, plan.layout.num_groups)
  rows = _exchange.scatter(
    [*arrays, losses], group_ids, plan.axes, plan.embed is not None
  )
  gram, finite = _inner_products.gram(
    [(x,) for x in rows.leaves], rows.group_ids, 1, plan.embed, rows.shards
  )
  weights, agreement = _decided(gram, finite, threshold, plan.rule, plan.step_tau)
  return weights, finite, agreement
