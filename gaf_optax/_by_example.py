"""By example: microbatches compared by a part of their gradients, in two passes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gaf_optax import (
  _combine,
  _exchange,
  _gram,
  _inner_products,
  _jax_types,
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
  gram, finite = _sum_of_layers([_layer_gram(a, d) for a, d in layers])
  threshold = options.threshold(0, None)
  step_tau: Any = tau if _threshold.is_step_tau(tau) else None
  decision, _, _ = rules.decide_groups(options.rule, gram, finite, threshold, step_tau)
  decision = decision._replace(weights=_combine.normalized(decision.weights))
  noise_scale = _gram.noise_scale(gram, finite)
  return _state.agreement(_state.outcome(decision, finite, noise_scale))


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


def check_compared_options(tau, compare: Compare, **options) -> _options.Options:
  """Checked options of the two-pass form.

  Raises:
    ValueError: as `gaf`, and for what has no meaning there.
  """
  _validate.function(" A predicate (path, leaf) -> bool.", compare=compare)
  for name in ("stacked", "groups", "memory_decay", "anchor_decay"):
    if options.get(name) is not None:
      raise ValueError(
        f"{name}={options[name]!r} does not go with compare: there is one decision for"
        " all parameters, on the microbatches of one call."
      )
  if options.get("param_axes", ()) != ():
    raise ValueError(
      f"param_axes={options['param_axes']!r} does not go with compare: the compared"
      " leaves must be whole on every device."
    )
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

  The first pass forms the gradients of the compared leaves for each microbatch. The
  second is one backward pass of the weighted mean loss over all parameters; XLA shares
  the forward passes.

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
  selected, merge = _selected(params, compare)

  def of_selected(selected, microbatch):
    return loss(merge(selected), microbatch)[0]

  losses, stacks = jax.vmap(jax.value_and_grad(of_selected), (None, 0))(selected, batch)
  weights, finite, agreement = _compared(losses, stacks, options)
  if names:
    start = lax.axis_index(names) * k
    own = lambda x: lax.dynamic_slice_in_dim(x, start, k)
    weights, finite = own(weights), own(finite)
    each = {n: own(getattr(agreement, n)) for n in rules.Decision._fields}
    agreement = agreement._replace(**each)

  def total(params, batch):
    losses, aux = jax.vmap(loss, (None, 0))(params, batch)
    terms = jnp.where(weights != 0, weights.astype(losses.dtype) * losses, 0)
    return jnp.sum(terms), (jnp.mean(losses), aux)

  grads, (value, aux) = jax.grad(total, has_aux=True)(params, batch)

  def without_bad():
    # A NaN times a weight of 0 is NaN in the backward pass: good ones stand in.
    rows = jnp.where(finite, jnp.arange(k), jnp.argmax(finite))
    good = jax.tree.map(lambda x: x[rows], batch)
    grads, _ = jax.grad(total, has_aux=True)(params, good)
    return jax.tree.map(lambda x: jnp.where(jnp.any(finite), x, 0), grads)

  grads = _jax_types.cond(jnp.all(finite), lambda: grads, without_bad)
  if names:
    grads = jax.tree.map(lambda x: lax.psum(x, names), grads)
    value = lax.pmean(value, names)
  return value, aux, grads, agreement


def _selected(params, compare):
  """The compared leaves, and a function that puts others in their place."""
  flat, treedef = jax.tree_util.tree_flatten_with_path(params)
  selected = [i for i, (path, leaf) in enumerate(flat) if compare(path, leaf)]
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

  def merge(values):
    leaves = [leaf for _, leaf in flat]
    for i, value in zip(selected, values):
      leaves[i] = value
    return jax.tree.unflatten(treedef, leaves)

  return [flat[i][1] for i in selected], merge


def _compared(losses, stacks, options):
  """Weights and finiteness `[n * k]` of all replicas' microbatches, and the agreement.

  Args:
    losses: `[k]`.
    stacks: gradients `[k, *shape]` of the compared leaves.
    options: of `check_compared_options`.
  """
  stacked = dataclasses.replace(options, stacked=True)
  leaves = _tree.flatten(stacks, None, None, stacked=True)
  plan = stacked.plan(leaves)
  # The losses belong to no group: they have to be finite, and no more.
  group_ids = (*plan.layout.group_ids, plan.layout.num_groups)
  rows = _exchange.scatter(
    [*leaves.arrays, losses], group_ids, plan.axes, plan.embed is not None
  )
  gram, finite = _inner_products.gram(
    [(x,) for x in rows.leaves], rows.group_ids, 1, plan.embed, rows.shards
  )
  threshold = options.threshold(0, None)
  decision, _, _ = rules.decide_groups(
    plan.rule, gram, finite, threshold, plan.step_tau
  )
  decision = decision._replace(weights=_combine.normalized(decision.weights))
  outcome = _state.outcome(decision, finite, _gram.noise_scale(gram, finite))
  return decision.weights[0], finite, _state.agreement(outcome)
