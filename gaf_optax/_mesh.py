"""Mesh: over which devices values are spread: axes, their checks, sums over them."""

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gaf_optax import _compat, _validate
from gaf_optax._validate import leaf_name

# For each dimension the names of the axes that it is sharded over.
_Spec = tuple[tuple[str, ...], ...]


class Axes(NamedTuple):
  """Over which devices micro-gradients and parameters are spread; hashable.

  Attributes:
    axis_names: names of the axes along which the micro-gradients lie; () where all
      are on this device.
    stacked: whether each replica holds several, on a leading axis.
    param_axes: names of the axes over which the parameters are sharded.
    replicated: for each leaf those of `param_axes` that it is replicated over.
  """

  axis_names: tuple[Hashable, ...] = ()
  stacked: bool = True
  param_axes: tuple[Hashable, ...] = ()
  replicated: tuple[tuple[Hashable, ...], ...] = ()

  def num_replicas(self) -> int:
    return math.prod(lax.axis_size(name) for name in self.axis_names)


class Shards(NamedTuple):
  """How inner products are completed where devices hold parts of the rows.

  Attributes:
    axis_names: names of the axes that sums go over.
    replicated: for each leaf names of axes over which devices hold the same values, so
      that one of them counts; () where there are none.
  """

  axis_names: tuple[Hashable, ...]
  replicated: tuple[tuple[Hashable, ...], ...]

  def sum(self, x: jax.Array) -> jax.Array:
    return lax.psum(x, self.axis_names) if self.axis_names else x

  def counts(self, leaf: int) -> jax.Array | None:
    """Whether this device's products of a leaf count, a bool scalar or None."""
    if not self.replicated or not self.replicated[leaf]:
      return None
    first = [lax.axis_index(name) == 0 for name in self.replicated[leaf]]
    return jnp.all(jnp.stack(first))


# Everything is on this device.
WHOLE = Shards((), ())


def shards(axes: Axes) -> Shards:
  """Of leaves that are whole on this device but for `axes.param_axes`."""
  return Shards(axes.param_axes, axes.replicated)


def axes(
  paths: Sequence[Any],
  arrays: Sequence[jax.Array],
  axis_names: tuple[Hashable, ...],
  stacked: bool,
  param_axes: tuple[Hashable, ...],
  param_specs: Any,
) -> Axes:
  """The axes of a tree's leaves, checked against where the call is made.

  Args:
    paths: where in the tree each leaf of the micro-gradients is.
    arrays: the leaves.
    axis_names: `axis_name` as a tuple.
    stacked: whether the leaves have a micro-gradient axis in front.
    param_axes: `param_axes` as a tuple.
    param_specs: a tree of `PartitionSpec` of the parameters, or None where types have
      to tell which leaves are replicated.

  Raises:
    ValueError: where a name is not an axis here, where the gradients have been
      summed over the replicas already, and where it cannot be known which leaves
      are replicated over `param_axes`.
  """
  named = list(zip(paths, arrays))
  _check_bound("axis_name", axis_names)
  _check_bound("param_axes", param_axes)
  for name in axis_names:
    if _compat.checks_replication(name):
      for path, x in named:
        if name not in _compat.varying(x):
          raise ValueError(_summed(path, name))
  for path, x in named if axis_names else ():
    unmapped = sum(_compat.explicit_spec(x), ())
    if unmapped:
      raise ValueError(
        f"micro-gradient leaf {leaf_name(path)} is sharded over axis {unmapped[0]!r}"
        " of an Explicit mesh that this jax.shard_map does not map. Map that axis,"
        " too (axis_names), and give it as param_axes."
      )
  replicated = tuple(_replicated(path, x, param_axes, param_specs) for path, x in named)
  return Axes(axis_names, stacked, param_axes, replicated if param_axes else ())


def spec_axes(specs: Any) -> tuple[Hashable, ...]:
  """All axes that a tree of `PartitionSpec` names, in order."""
  flat = jax.tree.leaves(specs, is_leaf=lambda node: isinstance(node, P))
  return tuple(dict.fromkeys(name for spec in flat for name in axes_of_spec(spec)))


def _check_bound(argument, names):
  for name in names:
    try:
      lax.axis_size(name)
    except NameError:
      raise ValueError(
        f"{argument} {name!r} is not an axis here. Call update inside jax.pmap,"
        " jax.shard_map or jax.vmap with an axis of this name; outside of them"
        " leave the argument out."
      ) from None


def _replicated(path, x, param_axes, param_specs):
  """The names in `param_axes` that a leaf is replicated over."""
  if param_specs is not None:
    sharded = frozenset(axes_of_spec(spec_at(param_specs, path, "param_axes")))
  else:
    for name in param_axes:
      if not _compat.checks_replication(name):
        raise ValueError(_unseen(name))
    sharded = _compat.varying(x)
  return tuple(name for name in param_axes if name not in sharded)


def axes_of_spec(spec: P) -> list[str]:
  """All axes that a `PartitionSpec` names."""
  entries = [e if isinstance(e, tuple) else (e,) for e in spec]
  return [name for entry in entries for name in entry if name is not None]


def spec_at(specs: Any, path: Any, argument: str) -> P:
  """The `PartitionSpec` of a leaf; the tree of specs may be a prefix."""
  flat, _ = jax.tree_util.tree_flatten_with_path(
    specs, is_leaf=lambda node: isinstance(node, P)
  )
  for prefix, spec in flat:
    if path[: len(prefix)] == prefix:
      return spec
  raise ValueError(
    f"{argument} holds no PartitionSpec for leaf {leaf_name(path)}. Give a tree of"
    " them like the parameters, or a prefix of it, as in_specs of jax.shard_map."
  )


def _summed(path, name):
  return (
    f"micro-gradient leaf {leaf_name(path)} is the same on every replica of axis"
    f" {name!r}: differentiating with respect to replicated parameters has already"
    " summed it over the axis, and every cosine distance would be 0. Make the"
    " parameters vary before jax.grad:"
    f" params = jax.lax.pcast(params, {name!r}, to='varying')."
  )


def _unseen(name):
  return (
    f"param_axes {name!r}: without the replication check of jax.shard_map gaf cannot"
    " see which leaves are replicated over it, to count them once. Give the"
    " PartitionSpecs of the parameters instead, param_axes=param_specs, or a prefix"
    f" of them: jax.P({name!r}) where every leaf is sharded over it."
  )


# Arrays that are spread over an Explicit mesh, as their types say.


class Placement(NamedTuple):
  """Where stacked leaves `[k, *shape]` lie on an Explicit mesh.

  Attributes:
    mesh: the mesh.
    axes: what the axes of the mesh are to the leaves.
    stacked: for each leaf the `PartitionSpec` of its stack.
    single: for each leaf that of its result, without the leading axis.
  """

  mesh: Any
  axes: Axes
  stacked: list[P]
  single: list[P]


def is_sharded(arrays: Sequence[jax.Array]) -> bool:
  """Whether the type of any array says that it is sharded over an Explicit mesh."""
  return any(any(_compat.explicit_spec(x)) for x in arrays)


def placement(arrays: Sequence[jax.Array], paths: Sequence[Any]) -> Placement:
  """Where stacked leaves lie, checked.

  Raises:
    ValueError: if the leading axes are sharded differently, or other dimensions
      over the same mesh axes.
  """
  specs = [_compat.explicit_spec(x) for x in arrays]
  leading = _leading(specs, paths)
  inner = [spec[1:] for spec in specs]
  axes = _axes_of(leading, inner)
  both = set(leading) & set(axes.param_axes)
  if both:
    path = next(p for p, spec in zip(paths, inner) if both & {*sum(spec, ())})
    raise ValueError(
      f"the stack of micro-gradients is sharded over mesh axis {min(both)!r}, and so"
      f" is a dimension of leaf {leaf_name(path)}. Use one mesh axis for the"
      " micro-gradients and another one for the parameters."
    )
  stacked = [_partition((leading, *spec)) for spec in inner]
  return Placement(_mesh(arrays), axes, stacked, [_partition(spec) for spec in inner])


def reshard(leaves: Sequence[jax.Array], specs: Sequence[P], mesh) -> list[jax.Array]:
  """The leaves, sharded over an Explicit mesh as the specs say."""
  return [
    jax.sharding.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(leaves, specs)
  ]


def split_rows(x: jax.Array, k: int, at_once: bool) -> jax.Array:
  """Rows `[batch, ...]` as `[k, batch // k, ...]`; microbatch i has rows i, i + k, ...

  So rows that are sharded over devices stay where they are. On an Explicit mesh whose
  devices do not divide the rows of a microbatch, with `at_once` the k of them are
  sharded instead.

  Raises:
    ValueError: if the devices divide neither.
  """
  shape = (x.shape[0] // k, k, *x.shape[1:])
  spec = _compat.explicit_spec(x)
  if not any(spec):
    return jnp.swapaxes(jnp.reshape(x, shape), 0, 1)
  mesh = _mesh([x])
  number = math.prod(mesh.shape[name] for name in spec[0])
  of_rows = shape[0] % number == 0
  if not of_rows and not (at_once and k % number == 0):
    raise ValueError(
      f"a batch of {x.shape[0]} rows is sharded over {number} devices (mesh axes"
      f" {spec[0]}), which do not divide its {k} microbatches of {shape[0]} rows each."
    )
  rows = spec[0] if of_rows else ()
  if not of_rows:
    (x,) = reshard([x], [_partition(((), *spec[1:]))], mesh)
  sharding = NamedSharding(mesh, _partition((rows, (), *spec[1:])))
  result = jnp.swapaxes(jnp.reshape(x, shape, out_sharding=sharding), 0, 1)
  leading = ((), rows) if of_rows else (spec[0], ())
  return reshard([result], [_partition((*leading, *spec[1:]))], mesh)[0]


def copies(x: jax.Array, k: int, batch: Sequence[jax.Array]) -> jax.Array:
  """The array k times, `[k, *shape]`, sharded as the k microbatches of a batch."""
  result = jnp.broadcast_to(gathered(x)[None], (k, *x.shape))
  leading = [_compat.explicit_spec(leaf)[0] for leaf in batch]
  if not any(leading):
    return result
  spec = _partition((max(leading), *[()] * x.ndim))
  return jax.sharding.reshard(result, NamedSharding(_mesh(batch), spec))


def beside(leaves: Sequence[Any], batch: Sequence[jax.Array]) -> list[Any]:
  """The leaves, gathered over the mesh axes that the microbatches are sharded over."""
  taken = {name for x in batch for name in _compat.explicit_spec(x)[0]}

  def free(x):
    spec = _compat.explicit_spec(x)
    if not taken & {*sum(spec, ())}:
      return x
    rest = _partition(tuple(tuple(n for n in e if n not in taken) for e in spec))
    return jax.sharding.reshard(x, NamedSharding(_mesh([x]), rest))

  return [free(x) for x in leaves]


def placed_like(x: jax.Array, like: jax.Array) -> jax.Array:
  """An array of the same shape, sharded over an Explicit mesh as the other one is."""
  if not is_sharded([x, like]):
    return x
  spec = explicit_partition(like)
  return jax.sharding.reshard(x, NamedSharding(_mesh([x, like]), spec))


def gathered(x: jax.Array) -> jax.Array:
  """The array, whole on every device of an Explicit mesh."""
  if not is_sharded([x]):
    return x
  return jax.sharding.reshard(x, NamedSharding(_mesh([x]), P()))


def gathered_weights(weights: Any, k: int | None, axis_names) -> jax.Array | None:
  """`microbatch_weights` of all replicas, `[n * k]`, checked.

  Args:
    weights: this replica's, `[k]`, or a scalar where k is None; or None.
    k: how many micro-gradients this replica has on a leading axis, or None.
    axis_names: the axes along which the others lie.
  """
  if weights is None:
    return None
  shape = () if k is None else (k,)
  weights = gathered(_validate.weights(shape, microbatch_weights=weights))
  if not axis_names:
    return weights
  return _compat.all_gather(jnp.atleast_1d(weights), axis_names)


def explicit_partition(x: jax.Array) -> P:
  """The `PartitionSpec` of an array on an Explicit mesh."""
  return _partition(_compat.explicit_spec(x))


def _axes_of(leading, inner: Sequence[_Spec]) -> Axes:
  params = tuple(dict.fromkeys(name for spec in inner for name in sum(spec, ())))
  replicated = tuple(
    tuple(name for name in params if name not in sum(spec, ())) for spec in inner
  )
  return Axes(leading, True, params, replicated)


def _mesh(arrays):
  return next(
    jax.typeof(x).sharding.mesh for x in arrays if any(_compat.explicit_spec(x))
  )


def _leading(specs: Sequence[_Spec], paths) -> tuple[str, ...]:
  """The mesh axes that the micro-gradient axis of every leaf is sharded over."""
  found = {spec[0]: path for spec, path in zip(specs, paths) if spec[0]}
  if len(found) > 1:
    (first, path), (second, other) = list(found.items())[:2]
    raise ValueError(
      "the micro-gradient axis must be sharded over the same mesh axes in every"
      f" leaf, but it is over {first} in leaf {leaf_name(path)} and over {second}"
      f" in leaf {leaf_name(other)}."
    )
  return next(iter(found), ())


def _partition(spec: _Spec) -> P:
  return P(*(names or None for names in spec))
