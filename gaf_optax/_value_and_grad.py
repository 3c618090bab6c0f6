"""Value and grad: the filter on microbatches, while a batch is differentiated."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from gaf_optax import (
  _by_example,
  _gaf,
  _jax_types,
  _mesh,
  _options,
  _state,
  _stream,
  _threshold,
  _tree,
  _validate,
  rules,
)


@_options.shown(_gaf.gaf, _options.BatchOptions)
def value_and_grad(
  fun: Callable[..., Any],
  num_microbatches: int,
  tau: float | jax.Array | rules.StepTau = 0.97,
  *,
  argnums: int | Sequence[int] = 0,
  batch_argnums: int | Sequence[int] | None = None,
  has_aux: bool = False,
  compare: _by_example.Compare | None = None,
  **options: Unpack[_options.BatchOptions],
) -> Callable[..., tuple[Any, Any, _state.Agreement]]:
  """`jax.value_and_grad` over microbatches, filtered while it goes.

  Splits the batch into k microbatches of consecutive rows, visits one after the
  other in a `jax.lax.scan`, and keeps one running mean of the micro-gradients that
  agree (with `embed` a second one), so that memory does not grow with k.

  With `compare` there are two passes and every rule works: the gradients of the leaves
  that it selects, typically the last layer's, are formed for each microbatch at once
  (by `jax.vmap`) and compared; the weights so found go into one backward pass of the
  weighted mean loss. The gradient is exactly the weighted mean of the whole
  micro-gradients; only the comparison looks at a part. So microbatches of one example
  are affordable. For c values of the compared leaves, comparing takes `2 k^2 c`
  operations, and memory grows by up to four times `k c` values.

  Args:
    fun: a function whose value is a scalar, or a pair of one and auxiliary output
      with `has_aux`.
    num_microbatches: k, at least 2 (1 with `axis_name`); divides the leading axis of
      the batch.
    tau: the largest distance that is accepted, in [0, 2]: a float or a scalar
      array, traced or not; with `compare` also a :func:`tau_quantile` or
      :func:`adaptive_tau`.
    argnums: which positional arguments to differentiate with respect to.
    batch_argnums: which positional arguments hold the batch: pytrees of arrays
      `[batch, ...]`; all but those of `argnums` if None. A typed PRNG key among them,
      a scalar, is split into one for each microbatch.
    has_aux: whether `fun` returns a pair.
    compare: None, or a predicate `(path, leaf) -> bool` on the parameters, where `path`
      is a JAX key path: which leaves' gradients are compared.
    **options: see :func:`gaf`. Without `compare`: `rule` (`rules.sequential()` or
      `rules.running_average()`), `embed`, `param_axes` and `groups`. With it: any
      `rule`, `embed`, and `axis_name`: each replica splits its own batch, all
      microbatches are compared with each other, and every replica gets the value and
      gradient of the whole and the agreement's arrays of its own microbatches.

  Returns:
    A function with the signature of `fun` that returns `(value, grads, agreement)`,
    or `((value, aux), grads, agreement)` with `has_aux`. `value` is the mean over
    all microbatches, leaves of `aux` are stacked `[k, ...]`, `grads` is like the
    arguments, zero where no two micro-gradients agree, and `agreement` is an
    :class:`Agreement`.

  Raises:
    ValueError: for arguments outside their ranges, for a rule that has to see all
      micro-gradients at once, and for `anchor_decay`, since there is no state to
      hold the average (:func:`multi_steps` has one). The returned function raises
      it for a batch whose leading axis k does not divide, and for a `compare` that
      selects no leaf, or one without a gradient, or that does not return a bool.

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
  several_replicas = compare is not None and options.get("axis_name") is not None
  _validate.count(
    1 if several_replicas else 2,
    " One micro-gradient alone has nothing to compare with.",
    num_microbatches=num_microbatches,
  )
  if compare is not None:
    checked = _by_example.check_compared_options(tau, compare, **options)
  else:
    checked = _check_streamed(tau, **options)
  if not _threshold.is_step_tau(tau):
    _validate.scalar(
      " A schedule or a target_accept_rate needs a state; pass the value itself.",
      tau=tau,
    )
  wanted_args = _positions(argnums, "argnums")
  batch_args = None
  if batch_argnums is not None:
    batch_args = _positions(batch_argnums, "batch_argnums")
    both = set(batch_args) & set(wanted_args)
    if both:
      raise ValueError(
        f"argument {min(both)} is named in argnums and in batch_argnums."
      )
  k = int(num_microbatches)

  def filtered(*args, **kwargs):
    params: Any = tuple(args[i] for i in wanted_args)
    if not isinstance(argnums, Sequence):
      (params,) = params
    positions = batch_args
    if positions is None:
      positions = _others(wanted_args, len(args))
    batch = _split(args, positions, k, at_once=compare is not None)

    def loss(params, microbatch):
      own = list(args)
      values = params if isinstance(argnums, Sequence) else (params,)
      for i, value in [*zip(wanted_args, values), *zip(positions, microbatch)]:
        own[i] = value
      out = fun(*own, **kwargs)
      return out if has_aux else (out, None)

    if compare is None:
      result = _one_by_one(loss, params, batch, k, checked)
    else:
      result = _by_example.two_pass(loss, params, batch, k, compare, checked)
    value, aux, grads, agreement = result
    return (value, aux) if has_aux else value, grads, agreement

  return filtered


def _check_streamed(tau, **options):
  if options.get("anchor_decay") is not None:
    raise ValueError(
      "value_and_grad keeps no state from one call to the next, so anchor_decay"
      f"={options['anchor_decay']!r} has nowhere to keep its average. Use"
      " multi_steps or gaf."
    )
  return _stream.check_options(tau, **options)


def _one_by_one(loss, params, batch, k, options):
  """Value, aux `[k, ...]`, gradient and `Agreement`, in one scan over microbatches."""
  differentiate = jax.value_and_grad(loss, has_aux=True)
  threshold = options.threshold(0, None)

  def visit(stream, microbatch):
    out, grads = differentiate(params, microbatch)
    leaves = _tree.flatten(grads, params, options.groups, stacked=False)
    plan = options.plan(leaves)
    stream, _ = _stream.push(stream, leaves.arrays, threshold, plan=plan)
    return stream, out

  like = _tree.flatten(params, None, options.groups, stacked=False)
  empty = _jax_types.typed_like(_stream.start(params, options, k), params)
  stream, (values, aux) = jax.lax.scan(visit, empty, batch)
  means, decision = _stream.finish(stream, like.arrays, like.layout, 2)
  agreement = _state.agreement(_stream.outcome(stream, decision, 2))
  return jnp.mean(values, axis=0), aux, like.unflatten(means), agreement


def _others(argnums, num_args):
  """The positional arguments that are not differentiated."""
  wanted = {i % num_args for i in argnums if -num_args <= i < num_args}
  others = tuple(i for i in range(num_args) if i not in wanted)
  if not others:
    raise ValueError(
      f"there is no batch among the {num_args} positional arguments: all of them are"
      " differentiated (argnums). Pass the batch by position, after the parameters."
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


def _split(args, positions, k, at_once):
  """The batch arguments, leaves `[k, batch // k, ...]`, a key for each microbatch.

  On an Explicit mesh the microbatches are sharded over the devices that the batch is
  sharded over: each of them, or `at_once` the k of them, where n devices divide k.
  """
  first = None

  def split(path, leaf, argument):
    nonlocal first
    if _is_key(leaf) and not leaf.shape:
      return jax.random.split(leaf, k)
    shape = _tree.leaf_shape(leaf)
    name = f"batch argument {argument}{jax.tree_util.keystr(path)} has shape {shape}"
    if not shape or shape[0] % k or not shape[0]:
      hint = ""
      if shape == (2,) and leaf.dtype == jnp.uint32:
        hint = " Is it a PRNG key? One of jax.random.key is split, not of PRNGKey."
      raise ValueError(
        f"{name}: its leading axis does not split into {k} microbatches of equal"
        f" size.{hint}"
      )
    first = first or (shape[0], argument, path)
    if shape[0] != first[0]:
      raise ValueError(
        f"{name}, but batch argument {first[1]}{jax.tree_util.keystr(first[2])} has"
        f" {first[0]} rows. All of batch_argnums are split alike; name there only what"
        " has a row for each example."
      )
    return _mesh.split_rows(leaf, k, at_once)

  batch = []
  for i in positions:
    if not -len(args) <= i < len(args):
      raise ValueError(
        f"batch_argnums names argument {i}, but there are {len(args)} positional"
        " arguments. Batch arguments are passed by position."
      )
    of_argument = functools.partial(split, argument=i)
    batch.append(jax.tree_util.tree_map_with_path(of_argument, args[i]))
  return batch


def _is_key(leaf):
  """Whether a leaf is an array of typed PRNG keys."""
  return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
