"""Flattens trees of micro-gradients, checks their shapes, and forms groups."""

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
  """Which leaves enter which decision; static and hashable.

  Attributes:
    paths: the paths of the floating-point and complex leaves.
    group_ids: the group of each leaf; `num_groups` if it enters no decision.
    num_groups: the number of decisions.
  """

  paths: tuple[Any, ...]
  group_ids: tuple[int, ...]
  num_groups: int


class Leaves(NamedTuple):
  """A flattened tree of micro-gradients.

  Attributes:
    arrays: the floating-point and complex leaves, in the order of the layout.
    layout: a `Layout`.
    k: the size of the micro-gradient axis; None without one.
    unflatten: maps one result per array to a tree, with zeros for integer leaves.
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
  per_device: bool = False,
) -> Leaves:
  """Flattens a tree with leaves `[k, *shape]` if stacked, else `[*shape]`.

  `params` has leaves `[*shape]`, or is None if unknown. `per_device`: whether each
  device of a mapped axis calls with its own tree. Raises for wrong shapes.
  """
  flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
  hint = _HINTS[stacked, per_device]
  if params is not None:
    _check_against_params(flat, tree, params, stacked, hint)
  k = _leading_size(flat, hint) if stacked and flat else None
  paths: list[Any] = []
  arrays: list[jax.Array] = []
  labels: list[Hashable] = []
  results: list[Any] = []
  for path, leaf in flat:
    dtype = _dtype(path, leaf)
    shape = leaf_shape(leaf)[1:] if stacked else leaf_shape(leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
      results.append(_zeros(shape, dtype))
      continue
    labels.append(_label(groups, path, jax.ShapeDtypeStruct(shape, dtype)))
    if _compat.is_unreduced(leaf):
      raise ValueError(
        f"micro-gradient leaf {leaf_name(path)} is unreduced: its sum over devices is"
        " still pending. Pass one gradient per microbatch, stacked or by axis_name. If"
        " it is one already, sum it: jax.sharding.reshard(grads, out_sharding)."
      )
    results.append(len(arrays))
    paths.append(path)
    arrays.append(jnp.asarray(leaf))
  found = dict.fromkeys(label for label in labels if label is not None)
  if arrays and not found:
    raise ValueError(
      "groups returned None for every leaf, so there is nothing to compare. Label at"
      " least one leaf."
    )
  ids = {label: number for number, label in enumerate(found)}
  group_ids = tuple(ids.get(label, len(ids)) for label in labels)

  def unflatten(values):
    leaves = [values[r] if isinstance(r, int) else r for r in results]
    return jax.tree.unflatten(treedef, leaves)

  return Leaves(arrays, Layout(tuple(paths), group_ids, len(ids)), k, unflatten)


def check_not_empty(tree: Any) -> None:
  """Raises for a tree without leaves and placeholders."""
  if not jax.tree.leaves(tree) and not _placeholders(tree):
    raise ValueError(
      "the tree of micro-gradients is empty: it has no leaf to compare. Was the"
      " right part of the parameters differentiated?"
    )


def check_num_groups(layout: Layout, expected: int) -> None:
  """Raises if micro-gradients and parameters have different groups."""
  if layout.num_groups != expected:
    raise ValueError(
      f"groups formed {layout.num_groups} groups of the micro-gradient's leaves, but"
      f" {expected} of the parameters' leaves in init. Is a leaf missing, or does the"
      " label depend on more than path, shape and dtype?"
    )


def accumulators(tree: Any) -> Any:
  """Zeros like the leaves, in dtypes for sums."""

  def zeros(path, leaf):
    dtype = _dtype(path, leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
      return _zeros(leaf_shape(leaf), dtype)
    return _compat.zeros_like(leaf, _compat.accumulator_dtype(dtype))

  return jax.tree_util.tree_map_with_path(zeros, tree)


def check_arrays(tree: Any) -> None:
  """Raises for a leaf that is neither an array nor a number."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    _dtype(path, leaf)


def check_not_stacked(extra_args: dict[str, Any], stack: Any) -> None:
  """Raises for extra arguments `value` or `grad` with a microbatch axis."""
  shapes = lambda tree: jax.tree.map(leaf_shape, tree)
  value, gradient = extra_args.get("value"), extra_args.get("grad")
  if value is not None and leaf_shape(value):
    found = f"value has shape {leaf_shape(value)}"
  elif gradient is not None and stack is not None and shapes(gradient) == shapes(stack):
    found = "grad has the shapes of the stacked micro-gradients"
  else:
    return
  raise ValueError(
    f"the extra argument {found}, but transformations after gaf take the value and"
    " gradient of one loss. For reduce_on_plateau pass value=losses.mean(). For a line"
    " search, filter first: value, grads, _ = gaf_optax.value_and_grad(loss, k, tau)"
    "(params, *batch), then apply_if_nonzero(optax.lbfgs()).update(grads, ...,"
    " value=value, grad=grads)."
  )


def check_average_shapes(averages: Any, leaves: Leaves) -> None:
  """Raises if a tree of averages in the state is not like the parameters."""
  found = dict(jax.tree_util.tree_leaves_with_path(averages))
  for path, array in zip(leaves.layout.paths, leaves.arrays):
    expected = array.shape if leaves.k is None else array.shape[1:]
    shape = found[path].shape if path in found else None
    if shape != expected:
      average = "no average" if shape is None else f"an average of shape {shape}"
      raise ValueError(
        f"the state has {average} for leaf {leaf_name(path)} of shape {expected}. Was"
        " init called with different parameters?"
      )


def select(tree: Any, layout: Layout) -> list[jax.Array]:
  """The leaves of a tree like the parameters, in the order of the layout."""
  found = dict(jax.tree_util.tree_leaves_with_path(tree))
  return [found[path] for path in layout.paths]


def replace(tree: Any, layout: Layout, values: list[jax.Array]) -> Any:
  """The tree with other values for the leaves in the layout."""
  new = dict(zip(layout.paths, values))
  return jax.tree_util.tree_map_with_path(lambda path, leaf: new.get(path, leaf), tree)


def leaf_shape(leaf: Any) -> tuple[int, ...]:
  return tuple(leaf.shape) if hasattr(leaf, "shape") else jnp.shape(leaf)


def flat_rows(x: jax.Array) -> jax.Array:
  """`[k, *shape]` as `[k, size]`."""
  return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _label(groups, path, leaf):
  """The label of a leaf's group; None if it enters no decision."""
  if groups is None:
    return "the whole tree"
  if groups == "leaf":
    return jax.tree_util.keystr(path)
  label = groups(path, leaf)
  if not isinstance(label, Hashable):
    raise ValueError(
      f"groups must return a hashable label or None, got {label!r} for leaf"
      f" {leaf_name(path)}."
    )
  return label


def _dtype(path, leaf):
  if getattr(leaf, "dtype", None) is not None:
    return leaf.dtype
  if not isinstance(leaf, bool | int | float | complex):
    raise ValueError(
      f"leaf {leaf_name(path)} is {leaf!r}, not an array. For an Equinox module, split"
      " it: params, static = eqx.partition(model, eqx.is_inexact_array), and call"
      " eqx.combine(params, static) in the loss."
    )
  return jnp.result_type(leaf)


def _zeros(shape, dtype):
  if dtype == jax.dtypes.float0:
    return np.zeros(shape, dtype)  # jax.numpy does not support float0.
  return jnp.zeros(shape, dtype)


def _placeholders(tree):
  """Paths of the `None`s and `optax.MaskedNode`s in a tree."""
  is_placeholder = lambda node: node is None or isinstance(node, optax.MaskedNode)
  flat = jax.tree_util.tree_leaves_with_path(tree, is_placeholder)
  return [path for path, node in flat if is_placeholder(node)]


# The likely mistake if leaves have the shape of another form, by `stacked` and
# `per_device`.
_HINTS = {
  (True, False): (
    "Are these plain gradients, shaped like the parameters? gaf takes one gradient"
    " for each microbatch, stacked: jax.vmap(jax.grad(loss), (None, 0))(params,"
    " microbatches). For one micro-gradient per call use gaf_optax.multi_steps."
  ),
  (True, True): (
    "Is this one micro-gradient, shaped like the parameters? With stacked=True each"
    " device of axis_name holds several on a leading axis. For one per device, omit"
    " stacked."
  ),
  (False, False): (
    "Are these stacked micro-gradients? multi_steps takes one micro-gradient per call;"
    " gaf_optax.gaf takes the stack."
  ),
  (False, True): (
    "Are these stacked micro-gradients? With axis_name each device holds one, shaped"
    " like the parameters. For several per device pass stacked=True."
  ),
}


def _leading_size(flat, hint):
  """The size k of the micro-gradient axis, checked."""
  first_path, first_shape = flat[0][0], leaf_shape(flat[0][1])
  for path, leaf in flat:
    shape = leaf_shape(leaf)
    if not shape:
      raise ValueError(
        f"micro-gradient leaf {leaf_name(path)} has shape (): a scalar has no"
        f" micro-gradient axis. {hint}"
      )
    if shape[0] != first_shape[0]:
      raise ValueError(
        "all leaves of stacked micro-gradients must have the same leading axis k, but"
        f" leaf {leaf_name(first_path)} has shape {first_shape} and leaf"
        f" {leaf_name(path)} has shape {shape}. {hint}"
      )
  if first_shape[0] == 0:
    raise ValueError(
      f"micro-gradient leaf {leaf_name(first_path)} has shape {first_shape}: it holds"
      " no micro-gradients."
    )
  return first_shape[0]


def _check_against_params(flat, tree, params, stacked, hint):
  params = jax.tree_util.tree_leaves_with_path(params)
  expected = {path: leaf_shape(leaf) for path, leaf in params}
  for path, leaf in flat:
    shape = leaf_shape(leaf)
    if path not in expected:
      names = [leaf_name(path) for path in expected] or ["no leaves"]
      more = f" and {len(names) - 5} more" if len(names) > 5 else ""
      raise ValueError(
        f"micro-gradient leaf {leaf_name(path)} of shape {shape} has no counterpart"
        f" among the parameters, which have {', '.join(names[:5])}{more}. Do params and"
        " gradients belong to the same model?"
      )
    want = ("k", *expected[path]) if stacked else expected[path]
    if len(shape) != len(want) or shape[int(stacked) :] != expected[path]:
      raise ValueError(
        f"micro-gradient leaf {leaf_name(path)} has shape {shape}, expected {want} for"
        f" a parameter of shape {expected[path]}."
        f" {_likely_mistake(shape, expected[path], stacked, hint)}"
      )
  present = {path for path, _ in flat}
  masked = _placeholders(tree)
  for path in expected:
    if path not in present and not any(path[: len(m)] == m for m in masked):
      raise ValueError(
        f"parameter {leaf_name(path)} of shape {expected[path]} has no micro-gradient."
        " Do params and gradients belong to the same model?"
      )


def _likely_mistake(shape, expected, stacked, hint):
  if not stacked:
    same_model = "Do params and gradients belong to the same model?"
    return hint if shape[1:] == expected else same_model
  flattened = len(shape) == len(expected) == 1
  optax_flatten = (
    "optax.flatten around gaf also flattens the micro-gradient axis: put it inside the"
    " chain, after gaf."
  )
  if shape == expected:
    return f"{hint} ({optax_flatten})" if flattened else hint
  if flattened:
    return optax_flatten
  return "The micro-gradient axis comes first, then the shape of the parameter."
