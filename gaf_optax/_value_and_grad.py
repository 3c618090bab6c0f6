"""Differentiates a batch in microbatches and filters on the way."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gaf_optax import (
  _compat,
  _mesh,
  _options,
  _state,
  _stream,
  _tau,
  _tree,
  _two_pass,
  _validate,
  rules,
)


def value_and_grad(
  fun: Callable[..., Any],
  num_microbatches: int,
  tau: float | jax.Array | _tau.Tau = 0.97,
  *,
  argnums: int | Sequence[int] = 0,
  batch_argnums: int | Sequence[int] | None = None,
  has_aux: bool = False,
  compare: _two_pass.Compare | None = None,
  microbatch_weights: Callable[..., jax.typing.ArrayLike] | None = None,
  rule: rules.RuleFn | None = None,
  embed: _tree.Embed | None = None,
  axis_name: _options.AxisNames | None = None,
  param_axes: _options.ParamAxes = (),
  stacked: bool | None = None,
  groups: _options.Groups | None = None,
  anchor_decay: float | None = None,
  memory_decay: float | None = None,
  max_norm_ratio: float | None = None,
) -> Callable[..., tuple[Any, Any, _state.Agreement]]:
  """`jax.value_and_grad` over microbatches, with filtering.

  Splits the batch into k microbatches, visits them in a `jax.lax.scan`, and keeps one
  running mean of the micro-gradients that agree, so memory does not grow with k.
  Microbatch i has the rows i, i + k, i + 2k, ..., as in `optax.microbatching`, so a
  batch that is sharded over devices stays in place.

  With `compare` every rule works, in two passes. The first forms the gradients of the
  selected leaves, typically the last layer, for all microbatches at once (by
  `jax.vmap`) and compares them. The second differentiates the weighted mean loss, which
  gives exactly the weighted mean of the whole micro-gradients. The comparison does not
  see a NaN or an infinity outside the selected leaves; the gradient is then zero, as
  without agreement. Microbatches of one example are affordable. With c values in the
  selected leaves, comparing takes `2 k^2 c` operations and up to `4 k c` values of
  memory, plus k x k matrices.

  Args:
    fun: a function that returns a scalar, or with `has_aux` a scalar and auxiliary
      output.
    num_microbatches: k, at least 2 (1 with `axis_name`); must divide the batch size.
    tau: the largest accepted distance, in [0, 2]: a float or a scalar array, traced or
      not; with `compare` also :func:`tau_quantile` or :func:`adaptive_tau`.
    argnums: the positional arguments to differentiate with respect to.
    batch_argnums: the positional arguments that hold the batch, pytrees of arrays
      `[batch, ...]`; None for all except `argnums`. Keyword arguments that are arrays
      or trees of arrays also belong to the batch. A scalar typed PRNG key is split into
      one key per microbatch.
    has_aux: whether `fun` returns a pair.
    compare: None, or a predicate `(path, leaf) -> bool` on the parameters, where `path`
      is a JAX key path, that selects the compared leaves.
    microbatch_weights: None, or a function of one microbatch's batch arguments that
      returns a scalar, for instance its number of valid tokens. See :func:`gaf`.
    rule, embed, axis_name, param_axes, groups, max_norm_ratio: see :func:`gaf`. Without
      `compare` only `param_axes`, `groups` and the rules `rules.sequential()` and
      `rules.running_average()` are supported; with it any `rule`, `embed`,
      `max_norm_ratio` and `axis_name`. With `axis_name` each device splits its own
      batch, and all microbatches are compared. Every device gets the same value,
      gradient and agreement, whose arrays `[k]` are those of its own microbatches.
    stacked, anchor_decay, memory_decay: not supported.

  Returns:
    A function with the signature of `fun` that returns `(value, grads, agreement)`,
    or `((value, aux), grads, agreement)` with `has_aux`. `value` is the (weighted) mean
    over all microbatches. Leaves of `aux` are stacked `[k, ...]`. `grads` has the shape
    of the arguments and is zero if no two micro-gradients agree. `agreement` is an
    :class:`Agreement`.

  Raises:
    ValueError: for arguments outside their ranges and options that are not supported.
      The returned function raises it for a batch size that k does not divide or that
      differs between arguments. It also raises for a `compare` that selects no leaf or
      one without a gradient, or does not return a bool.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gaf_optax import value_and_grad
    >>> loss = lambda w, x, y: jnp.mean((x @ w - y) ** 2)
    >>> x, y = jnp.ones((8, 3)), jnp.ones(8)
    >>> value, grads, agreement = value_and_grad(
    ...     loss, num_microbatches=4)(jnp.zeros(3), x, y)
    >>> print(value, grads, agreement.num_accepted)
    1.0 [-2. -2. -2.] 4.0

  References:
    Chaubard et al., `Beyond Gradient Averaging in Parallel Optimization
    <https://arxiv.org/abs/2412.18052>`_, 2024, algorithm 1.
  """
  _validate.function(fun=fun)
  several_devices = compare is not None and axis_name is not None
  _validate.count(
    1 if several_devices else 2,
    " A step compares at least two micro-gradients.",
    num_microbatches=num_microbatches,
  )
  options = {
    "rule": rule,
    "embed": embed,
    "axis_name": axis_name,
    "param_axes": param_axes,
    "stacked": stacked,
    "groups": groups,
    "memory_decay": memory_decay,
    "anchor_decay": anchor_decay,
    "max_norm_ratio": max_norm_ratio,
  }
  tau = _tau.as_stateless_tau(tau)
  if compare is not None:
    checked = _two_pass.validate(tau, compare, **options)
  else:
    no_state = "there is no state to hold the average; use multi_steps or gaf"
    _options.refuse(options, {"anchor_decay": no_state}, "value_and_grad")
    checked = _options.validate_streamed(tau, **options)
  if microbatch_weights is not None:
    hint = " Pass a function of one microbatch's batch arguments."
    _validate.function(hint, microbatch_weights=microbatch_weights)
  wanted = _positions(argnums, "argnums")
  given = None
  if batch_argnums is not None:
    given = _positions(batch_argnums, "batch_argnums")
    _check_disjoint(wanted, given)
  k = int(num_microbatches)

  def filtered(*args, **kwargs):
    own = _from_start(wanted, len(args), "argnums")
    params: Any = tuple(args[i] for i in own)
    if not isinstance(argnums, Sequence):
      (params,) = params
    _tree.check_arrays(params)
    if given is None:
      positions = _others(own, len(args), kwargs)
    else:
      positions = _from_start(given, len(args), "batch_argnums")
      _check_disjoint(own, positions)
    batch, rebuild = _split(args, positions, kwargs, k, vmapped=compare is not None)

    def loss(params, microbatch):
      replaced = list(args)
      arguments, keywords = rebuild(microbatch)
      values = params if isinstance(argnums, Sequence) else (params,)
      for i, value in [*zip(own, values), *zip(positions, arguments)]:
        replaced[i] = value
      out = fun(*replaced, **{**kwargs, **keywords})
      return out if has_aux else (out, None)

    def weigh(microbatch):
      if microbatch_weights is None:
        return None
      arguments, keywords = rebuild(microbatch)
      found = microbatch_weights(*arguments, **keywords)
      return _validate.weights((), microbatch_weights=found)

    if compare is None:
      result = _one_by_one(loss, params, batch, k, weigh, checked)
    else:
      weights = jax.vmap(weigh)(batch)
      result = _two_pass.two_pass(loss, params, batch, k, compare, weights, checked)
    value, aux, grads, agreement = result
    return (value, aux) if has_aux else value, grads, agreement

  return filtered


def _one_by_one(loss, params, batch, k, weigh, options):
  """Value, aux `[k, ...]`, gradient and `Agreement`, in one scan over microbatches."""
  differentiate = jax.value_and_grad(loss, has_aux=True)
  tau = options.tau.at(None, jnp.zeros((), jnp.int32))

  def visit(stream, microbatch):
    (value, aux), grads = differentiate(params, microbatch)
    leaves = _tree.flatten(grads, params, options.groups, stacked=False)
    weight = weigh(microbatch)
    spec = options.spec(leaves)
    return _stream.push(stream, leaves.arrays, tau, weight, spec=spec), (
      value,
      aux,
      weight,
    )

  like = _tree.flatten(params, None, options.groups, stacked=False)
  empty = _compat.typed_like(_stream.start(params, options, k), params)
  stream, (values, aux, weights) = jax.lax.scan(visit, empty, batch)
  means, outcome = _stream.finish(stream, like.arrays, options.spec(like), 2)
  value = _two_pass.mean_loss(values, weights)
  return value, aux, like.unflatten(means), _state.agreement(outcome)


def _others(argnums, num_args, kwargs):
  """The positional arguments that are not differentiated."""
  others = tuple(i for i in range(num_args) if i not in argnums)
  if not others and not kwargs:
    raise ValueError(
      f"there is no batch among the {num_args} positional arguments: all of them are"
      " differentiated (argnums). Pass the batch after the parameters."
    )
  return others


def _positions(argnums, name):
  try:
    return (operator.index(argnums),)
  except TypeError:
    pass
  try:
    return tuple(operator.index(i) for i in argnums)
  except TypeError:
    raise ValueError(
      f"{name} must be an int or a sequence of ints, got {argnums!r}."
    ) from None


def _from_start(positions, num_args, name):
  """Positions of arguments, counted from the first."""
  for i in positions:
    if not -num_args <= i < num_args:
      raise ValueError(
        f"{name} names argument {i}, but there are {num_args} positional arguments."
        " Pass the parameters and the batch by position."
      )
  return tuple(i % num_args for i in positions)


def _check_disjoint(argnums, batch_argnums):
  both = set(argnums) & set(batch_argnums)
  if both:
    raise ValueError(f"argument {min(both)} is named in argnums and in batch_argnums.")


def _split(args, positions, kwargs, k, vmapped):
  """The batch as arrays `[k, batch // k, ...]`, and the inverse for one microbatch.

  Splits a PRNG key into one per microbatch. `vmapped`: see `_mesh.split_batch`.
  """
  arrays = lambda tree: [x for x in jax.tree.leaves(tree) if _is_array(x)]
  keywords = {name: value for name, value in kwargs.items() if arrays(value)}
  whole = [args[i] for i in positions], keywords
  flat, treedef = jax.tree_util.tree_flatten_with_path(whole)
  first = None
  batch: dict[int, Any] = {}
  for number, (path, leaf) in enumerate(flat):
    by_keyword = path[0].idx == 1
    if by_keyword and not _is_array(leaf):
      continue
    if _is_key(leaf) and not leaf.shape:
      batch[number] = jax.random.split(leaf, k)
      continue
    owner = path[1].key if by_keyword else positions[path[1].idx]
    rest = jax.tree_util.keystr(path[2:])
    shape = _tree.leaf_shape(leaf)
    name = f"batch argument {owner}{rest} has shape {shape}"
    key_hint = "" if shape or by_keyword else _NAME_THE_BATCH
    if shape == (2,) and getattr(leaf, "dtype", None) == jnp.uint32:
      key_hint = " Is it a PRNG key? Pass a typed one: jax.random.wrap_key_data(key)."
    if first is None and (not shape or shape[0] % k or not shape[0]):
      raise ValueError(
        f"{name}: its leading axis does not split into {k} microbatches of equal"
        f" size.{key_hint}{_CLOSE_OVER if by_keyword else ''}"
      )
    first = first or (shape[0], owner, rest, key_hint)
    if shape[:1] != first[:1]:
      hint = _CLOSE_OVER if by_keyword else _NAME_THE_BATCH
      hint = key_hint or first[3] or hint
      raise ValueError(
        f"{name}, but batch argument {first[1]}{first[2]} has {first[0]} rows.{hint}"
      )
    batch[number] = _mesh.split_batch(jnp.asarray(leaf), k, vmapped)
  if first is None and not batch:
    raise ValueError("there is no array among the batch arguments to split.")

  def rebuild(microbatch):
    leaves = [microbatch.get(number, leaf) for number, (_, leaf) in enumerate(flat)]
    return jax.tree.unflatten(treedef, leaves)

  return batch, rebuild


_NAME_THE_BATCH = " Is it part of the batch? If not, name the batch in batch_argnums."
_CLOSE_OVER = (
  " Keyword arrays are split like the batch. To give all microbatches the same array,"
  " close over it:"
  " value_and_grad(lambda params, x: fun(params, x, array), k)."
)


def _is_array(leaf):
  return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _is_key(leaf):
  """Whether a leaf is an array of typed PRNG keys."""
  return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
