"""Tree: takes a tree of micro-gradients apart, checks shapes, sorts into groups."""

import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gaf_optax import _compat
from gaf_optax._validate import leaf_name

Embed = Callable[[jax.Array], jax.Array]
GroupsFn = Callable[[Any, jax.ShapeDtypeStruct], Hashable]


class Layout(NamedTuple):
  """Which leaves take part in which decision; hashable, known when tracing.

  Attributes:
    paths: where in the tree each floating-point or complex leaf is.
    group_ids: the number of its group for each; `num_groups` for those that take
      part in no decision.
    num_groups: how many decisions there are.
  """

  paths: tuple[Any, ...]
  group_ids: tuple[int, ...]
  num_groups: int


class Leaves(NamedTuple):
  """A tree of micro-gradients, taken apart.

  Attributes:
    arrays: the floating-point and complex leaves, in the order of the layout.
    layout: a `Layout`.
    k: the number of micro-gradients on the leading axis, None without one.
    unflatten: puts one result for each of `arrays` back into the tree, with zeros
      for integer leaves.
  """

  arrays: list[jax.Array]
  layout: Layout
  k: int | None
  unflatten: Callable[[list[jax.Array]], Any]


def flatten(
  tree: Any,
  params: Any,
  groups: str | GroupsFn | None,
  *,
  stacked: bool,
  per_replica: bool = False,
) -> Leaves:
  """Takes a tree of micro-gradients apart.

  Args:
    tree: leaves `[k, *shape]` if stacked, else `[*shape]`.
    params: the parameters with leaves `[*shape]`, or None where not known.
    groups: None, 'leaf' or a function, see `gaf`.
    stacked: whether the leaves have a micro-gradient axis in front.
    per_replica: whether each replica of a mapped axis calls with its own.

  Raises:
    ValueError: naming the leaf whose shape is wrong.
  """
  flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
  hint = _HINTS[stacked, per_replica]
  _check_against_params(flat, tree, params, stacked, hint)
  k = _leading_size(flat, hint) if stacked and flat else None

  paths: list[Any] = []
  arrays: list[jax.Array] = []
  leaf_labels: list[Hashable] = []
  results: list[Any] = []
  labels: dict[Hashable, int] = {}
  for path, leaf in flat:
    dtype = _dtype(path, leaf)
    shape = leaf_shape(leaf)[1:] if stacked else leaf_shape(leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
      results.append(_zeros(shape, dtype))
      continue
    label = _label(groups, path, jax.ShapeDtypeStruct(shape, dtype))
    if label is not _EXCLUDED:
      labels.setdefault(label, len(labels))
    leaf_labels.append(label)
    if _compat.is_unreduced(leaf):
      raise ValueError(
        f"micro-gradient leaf {leaf_name(path)} is unreduced, a sum over devices that"
        " has yet to be made. Give gaf one gradient for each microbatch, stacked or by"
        " axis_name; jax.sharding.reshard(grads, out_sharding) makes the sum."
      )
    results.append(len(arrays))
    paths.append(path)
    arrays.append(jnp.asarray(leaf))
  if arrays and not labels:
    raise ValueError(
      "groups gave every leaf the label None, which takes part in no decision:"
      " there is nothing to compare. Label at least one leaf."
    )
  group_ids = tuple(labels.get(label, len(labels)) for label in leaf_labels)

  def unflatten(values):
    leaves = [values[r] if isinstance(r, int) else r for r in results]
    return jax.tree.unflatten(treedef, leaves)

  layout = Layout(tuple(paths), group_ids, len(labels))
  return Leaves(arrays, layout, k, unflatten)


def check_not_empty(tree: Any) -> None:
  """Raises for a tree without a leaf and without a placeholder for one."""
  if not jax.tree.leaves(tree) and not _placeholders(tree):
    raise ValueError(
      "the tree of micro-gradients is empty: it has no leaf to compare. Was the"
      " right part of the parameters differentiated?"
    )


def check_num_groups(layout: Layout, expected: int) -> None:
  """Raises where the micro-gradients' leaves make other groups than the parameters'."""
  if layout.num_groups != expected:
    raise ValueError(
      f"groups made {layout.num_groups} groups of the micro-gradient's leaves, but"
      f" {expected} of the parameters' leaves at init. Is a leaf missing, or does the"
      " label depend on more than path, shape and dtype?"
    )


def accumulators(tree: Any) -> Any:
  """Zeros like the leaves, wide enough to keep sums of such values."""

  def zeros(path, leaf):
    dtype = _dtype(path, leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
      return _zeros(leaf_shape(leaf), dtype)
    return _compat.zeros_like(leaf, _compat.accumulator_dtype(dtype))

  return jax.tree_util.tree_map_with_path(zeros, tree)


def check_arrays(tree: Any) -> None:
  """Raises for a leaf that is not an array or a number."""
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    _dtype(path, leaf)


def check_not_stacked(extra_args: dict[str, Any], stack: Any) -> None:
  """Raises for a `value` or `grad` that has a microbatch axis, as line searches get."""
  shapes = lambda tree: jax.tree.map(leaf_shape, tree)
  value = extra_args.get("value")
  gradient = extra_args.get("grad")
  name = None
  if value is not None and leaf_shape(value):
    name, found = "value", f"shape {leaf_shape(value)}"
  elif gradient is not None and stack is not None and shapes(gradient) == shapes(stack):
    name, found = "grad", "the stacked micro-gradients"
  if name is not None:
    raise ValueError(
      f"the extra argument {name} has {found}, but the transformations behind gaf take"
      " the value and the gradient of one loss. For reduce_on_plateau give"
      " value=losses.mean(). For a line search filter first: value, grads, _ ="
      " gaf_optax.value_and_grad(loss, k, tau)(params, *batch), then"
      " apply_if_nonzero(optax.lbfgs()).update(grads, ..., value=value, grad=grads)."
    )


def check_kept(tree: Any, leaves: Leaves) -> None:
  """Raises where a tree that the state keeps is not like the parameters."""
  kept = dict(jax.tree_util.tree_flatten_with_path(tree)[0])
  for path, array in zip(leaves.layout.paths, leaves.arrays):
    expected = array.shape if leaves.k is None else array.shape[1:]
    if path not in kept or kept[path].shape != expected:
      found = "nothing" if path not in kept else f"one of shape {kept[path].shape}"
      raise ValueError(
        f"the state keeps an average of shape {expected} for leaf {leaf_name(path)},"
        f" but {found} was found. Did init get other parameters?"
      )


def pick(tree: Any, layout: Layout) -> list[jax.Array]:
  """The leaves of a tree like the parameters that are in the layout, in order."""
  found = dict(jax.tree_util.tree_flatten_with_path(tree)[0])
  return [found[path] for path in layout.paths]


def put(tree: Any, layout: Layout, values: list[jax.Array]) -> Any:
  """The tree with the leaves that are in the layout replaced."""
  replaced = dict(zip(layout.paths, values))
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: replaced.get(path, leaf), tree
  )


def leaf_shape(leaf: Any) -> tuple[int, ...]:
  return tuple(leaf.shape) if hasattr(leaf, "shape") else jnp.shape(leaf)


def flat_rows(x: jax.Array) -> jax.Array:
  """`[k, *shape]` as `[k, size]`."""
  return x.reshape(x.shape[0], math.prod(x.shape[1:]))


_EXCLUDED = object()
_WHOLE = object()


def _label(groups, path, leaf):
  if groups is None:
    return _WHOLE
  if groups == "leaf":
    return jax.tree_util.keystr(path)
  label = groups(path, leaf)
  if label is None:
    return _EXCLUDED
  if not isinstance(label, Hashable):
    raise ValueError(
      f"groups must return a hashable label or None, got {label!r} for leaf"
      f" {leaf_name(path)}."
    )
  return label


def _dtype(path, leaf):
  dtype = getattr(leaf, "dtype", None)
  if dtype is not None:
    return dtype
  if not isinstance(leaf, (bool, int, float, complex)):
    raise ValueError(
      f"leaf {leaf_name(path)} is {leaf!r}, not an array. Was a whole Equinox module"
      " passed? Split it: params, static = eqx.partition(model, eqx.is_inexact_array),"
      " and call eqx.combine(params, static) in the loss."
    )
  return jnp.result_type(leaf)


def _zeros(shape, dtype):
  if dtype == jax.dtypes.float0:
    return np.zeros(shape, dtype)  # jax.numpy has no arrays of this dtype.
  return jnp.zeros(shape, dtype)


def _is_placeholder(node):
  return node is None or isinstance(node, optax.MaskedNode)


def _placeholders(tree):
  """Paths of the `None`s and `optax.MaskedNode`s in a tree."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_placeholder)
  return [path for path, node in flat if _is_placeholder(node)]


# The likely mistake where leaves have the shape that they would have in the other
# form, by `stacked` and `per_replica`.
_HINTS = {
  (True, False): (
    "Are these plain gradients, shaped like the parameters? gaf takes one gradient"
    " for each microbatch, stacked: jax.vmap(jax.grad(loss), (None, 0))(params,"
    " microbatches). For one micro-gradient per call use gaf_optax.multi_steps."
  ),
  (True, True): (
    "Is this one micro-gradient, shaped like the parameters? With stacked=True each"
    " replica of axis_name holds several on a leading axis; for one on each replica"
    " leave stacked out."
  ),
  (False, False): (
    "Are these stacked micro-gradients? The streamed form takes one"
    " micro-gradient per call; gaf_optax.gaf takes the stack."
  ),
  (False, True): (
    "Are these stacked micro-gradients? With axis_name each replica holds one,"
    " shaped like the parameters; for several on each give stacked=True."
  ),
}


def _leading_size(flat, hint):
  sizes = [(path, leaf_shape(leaf), leaf_shape(leaf)[:1]) for path, leaf in flat]
  for path, shape, leading in sizes:
    if not leading:
      raise ValueError(
        f"micro-gradient leaf {leaf_name(path)} has shape {shape}: a scalar has no"
        f" micro-gradient axis in front. {hint}"
      )
  first_path, first_shape, first = sizes[0]
  for path, shape, leading in sizes:
    if leading != first:
      raise ValueError(
        "the leaves of stacked micro-gradients must have the same leading axis"
        f" [k, ...], but leaf {leaf_name(first_path)} has shape {first_shape} and"
        f" leaf {leaf_name(path)} has shape {shape}. {hint}"
      )
  if first[0] == 0:
    raise ValueError(
      f"micro-gradient leaf {leaf_name(first_path)} has shape {first_shape}: there"
      " are no micro-gradients in it."
    )
  return first[0]


def _check_against_params(flat, tree, params, stacked, hint):
  if params is None:
    return
  expected = {
    path: leaf_shape(p) for path, p in jax.tree_util.tree_flatten_with_path(params)[0]
  }
  for path, leaf in flat:
    shape = leaf_shape(leaf)
    if path not in expected:
      raise ValueError(
        f"micro-gradient leaf {leaf_name(path)} of shape {shape} has no counterpart"
        f" among the parameters, which have {_listed(expected)}. Are params and"
        " gradients of the same model?"
      )
    if (shape[1:] if stacked and shape else shape) == expected[path] and (
      shape or not stacked
    ):
      continue
    raise ValueError(
      f"micro-gradient leaf {leaf_name(path)} has shape {shape}, its parameter has"
      f" shape {expected[path]}; expected"
      f" {('k', *expected[path]) if stacked else expected[path]}."
      f" {_likely_mistake(shape, expected[path], stacked, hint)}"
    )
  present = {path for path, _ in flat}
  missing = [path for path in expected if path not in present]
  if missing:
    masked = _placeholders(tree)
    for path in missing:
      if not any(path[: len(m)] == m for m in masked):
        raise ValueError(
          f"parameter {leaf_name(path)} of shape {expected[path]} has no"
          " micro-gradient. Are params and gradients of the same model?"
        )


def _likely_mistake(shape, expected, stacked, hint):
  if not stacked:
    if shape[1:] == expected:
      return hint
    return "Are params and gradients of the same model?"
  if shape == expected:
    if len(shape) == 1:
      return hint + (
        " (optax.flatten around gaf flattens the micro-gradient axis away, too:"
        " put it inside the chain, after gaf.)"
      )
    return hint
  if len(shape) == len(expected) == 1:
    return (
      "optax.flatten around gaf flattens the micro-gradient axis away: put it"
      " inside the chain, after gaf."
    )
  return "The micro-gradient axis comes first, then the shape of the parameter."


def _listed(paths, limit=5):
  names = [leaf_name(path) for path in paths]
  more = f" and {len(names) - limit} more" if len(names) > limit else ""
  return ", ".join(names[:limit]) + more if names else "no leaves"
