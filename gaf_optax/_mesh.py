"""How arrays are spread over devices: axes, their checks, and sums over them."""

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

# For each dimension, the names of the axes that it is sharded over.
_Spec = tuple[tuple[str, ...], ...]


class Axes(NamedTuple):
  """The axes that micro-gradients and parameters are spread over; hashable.

  Attributes:
    axis_names: axes of the micro-gradients; () if all are on this device.
    stacked: whether each device has a leading micro-gradient axis.
    param_axes: axes that the parameters are sharded over.
    replicated: for each leaf, the `param_axes` that it is replicated over.
  """

  axis_names: tuple[Hashable, ...] = ()
  stacked: bool = True
  param_axes: tuple[Hashable, ...] = ()
  replicated: tuple[tuple[Hashable, ...], ...] = ()

  def num_devices(self) -> int:
    return math.prod(lax.axis_size(name) for name in self.axis_names)

  def shards(self) -> "Shards":
    """`Shards` for leaves that are sharded only over `param_axes`."""
    return Shards(self.param_axes, self.replicated)


class Shards(NamedTuple):
  """How to sum inner products over devices that hold parts of the leaves.

  Attributes:
    sum_axes: axes to sum over.
    replicated: for each leaf, the axes that it is replicated over; () if none is.
  """

  sum_axes: tuple[Hashable, ...]
  replicated: tuple[tuple[Hashable, ...], ...]

  def sum(self, x: jax.Array) -> jax.Array:
    return lax.psum(x, self.sum_axes) if self.sum_axes else x

  def once(self, x: jax.Array, leaf: int) -> jax.Array:
    """x on one of the devices that replicate the leaf, zeros on the others."""
    if not self.replicated or not self.replicated[leaf]:
      return x
    first = [lax.axis_index(name) == 0 for name in self.replicated[leaf]]
    return jnp.where(jnp.all(jnp.stack(first)), x, 0)


UNSHARDED = Shards((), ())


def check_axes(paths: Sequence[Any], arrays: Sequence[jax.Array], options: Any) -> Axes:
  """The `Axes` of leaves; raises if they do not fit the mapped axes or the mesh."""
  axis_names, param_axes = options.axis_names, options.param_axes
  for name in axis_names + param_axes:
    try:
      lax.axis_size(name)
    except NameError:
      argument = "axis_name" if name in axis_names else "param_axes"
      raise ValueError(
        f"{argument} {name!r} is not an axis here. Run the step inside jax.pmap,"
        f" jax.shard_map or jax.vmap with an axis of this name, or omit {argument}."
      ) from None
  for path, x in zip(paths, arrays) if axis_names else ():
    for name in axis_names:
      if _compat.checks_replication(name) and name not in _compat.varying(x):
        raise ValueError(
          f"micro-gradient leaf {leaf_name(path)} is equal on all devices of axis"
          f" {name!r}: gradients of replicated parameters are already summed over the"
          " axis, so every distance would be 0. Make the parameters vary before"
          f" jax.grad: params = jax.lax.pcast(params, {name!r}, to='varying')."
        )
    unmapped = sum(_compat.explicit_spec(x), ())
    if unmapped:
      raise ValueError(
        f"micro-gradient leaf {leaf_name(path)} is sharded over axis {unmapped[0]!r},"
        " an Explicit mesh axis that this jax.shard_map does not map. Add the axis to"
        " its axis_names= and pass it as param_axes."
      )
  if not param_axes:
    return Axes(axis_names, options.stacked)
  if options.param_specs is None:
    for name in param_axes:
      if not _compat.checks_replication(name):
        raise ValueError(
          f"param_axes {name!r}: without the replication check of jax.shard_map, gaf"
          " cannot see which leaves are replicated over this axis. Pass the"
          " parameters' PartitionSpecs instead, param_axes=param_specs, or a prefix:"
          f" jax.P({name!r}) if every leaf is sharded over the axis."
        )

  def replicated(path, x):
    sharded: Any = _compat.varying(x)
    if options.param_specs is not None:
      sharded = spec_axes(spec_at(options.param_specs, path, "param_axes"))
    return tuple(name for name in param_axes if name not in sharded)

  of_leaves = tuple(replicated(path, x) for path, x in zip(paths, arrays))
  return Axes(axis_names, options.stacked, param_axes, of_leaves)


def is_spec(node: Any) -> bool:
  return isinstance(node, P)


def spec_axes(specs: Any) -> tuple[Hashable, ...]:
  """All axes in a tree of `PartitionSpec`, in order."""
  entries = [
    entry for spec in jax.tree.leaves(specs, is_leaf=is_spec) for entry in spec
  ]
  names = [e if isinstance(e, tuple) else (e,) for e in entries if e is not None]
  return tuple(dict.fromkeys(sum(names, ())))


def spec_at(specs: Any, path: Any, argument: str) -> P:
  """The `PartitionSpec` of a leaf; `specs` is a tree of them or a prefix of it."""
  for prefix, spec in jax.tree_util.tree_leaves_with_path(specs, is_spec):
    if path[: len(prefix)] == prefix:
      return spec
  raise ValueError(
    f"{argument} holds no PartitionSpec for leaf {leaf_name(path)}. Pass a tree of"
    " PartitionSpecs like the parameters, or a prefix, as for in_specs."
  )


# Arrays on an Explicit mesh, where the sharding is part of the type.


def is_sharded(arrays: Sequence[jax.Array]) -> bool:
  """Whether any array is sharded over an Explicit mesh."""
  return any(any(_compat.explicit_spec(x)) for x in arrays)


def placement(
  arrays: Sequence[jax.Array], paths: Sequence[Any]
) -> tuple[Any, Axes, Any, Any]:
  """How stacked leaves `[k, *shape]` are sharded; raises for unsupported shardings.

  Returns their mesh, `Axes`, and `PartitionSpec`s with and without the leading axis.
  """
  specs = [_compat.explicit_spec(x) for x in arrays]
  found = {spec[0]: path for spec, path in zip(specs, paths) if spec[0]}
  if len(found) > 1:
    (first, path), (second, other) = list(found.items())[:2]
    raise ValueError(
      "the micro-gradient axis must be sharded over the same mesh axes in every leaf,"
      f" got {first} for leaf {leaf_name(path)} and {second} for {leaf_name(other)}."
    )
  leading = next(iter(found), ())
  inner = [spec[1:] for spec in specs]
  of_leaves = [sum(spec, ()) for spec in inner]
  for path, names in zip(paths, of_leaves):
    both = set(leading) & set(names)
    if both:
      raise ValueError(
        f"the micro-gradient axis is sharded over mesh axis {min(both)!r}, and so is"
        f" another dimension of leaf {leaf_name(path)}. Use separate mesh axes for the"
        " micro-gradients and the parameters."
      )
  params = tuple(dict.fromkeys(sum(of_leaves, ())))
  replicated = tuple(tuple(n for n in params if n not in names) for names in of_leaves)
  axes = Axes(leading, True, params, replicated)
  stacked = [_partition((leading, *spec)) for spec in inner]
  return _mesh(arrays), axes, stacked, [_partition(spec) for spec in inner]


def reshard(leaves: Sequence[jax.Array], specs: Sequence[P], mesh) -> list[jax.Array]:
  return [
    jax.sharding.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(leaves, specs)
  ]


def split_batch(x: jax.Array, k: int, vmapped: bool) -> jax.Array:
  """`[batch, ...]` as `[k, batch // k, ...]`; microbatch i has the rows i, i + k, ...

  Sharded rows stay on their devices. If these do not divide a microbatch, shards the
  k microbatches instead, if `vmapped` and they divide k; else raises.
  """
  shape = (x.shape[0] // k, k, *x.shape[1:])
  spec = _compat.explicit_spec(x)
  if not any(spec):
    return jnp.swapaxes(jnp.reshape(x, shape), 0, 1)
  mesh = _mesh([x])
  number = math.prod(mesh.shape[name] for name in spec[0])
  by_rows = shape[0] % number == 0
  if not by_rows and not (vmapped and k % number == 0):
    raise ValueError(
      f"a batch of {x.shape[0]} rows is sharded over {number} devices (mesh axes"
      f" {spec[0]}), but each of its {k} microbatches has {shape[0]} rows, not a"
      f" multiple of {number}. Use larger microbatches, or fewer devices for the batch."
    )
  rows, leading = (spec[0], ((), spec[0])) if by_rows else ((), (spec[0], ()))
  (x,) = reshard([x], [_partition((rows, *spec[1:]))], mesh)
  sharding = NamedSharding(mesh, _partition((rows, (), *spec[1:])))
  result = jnp.swapaxes(jnp.reshape(x, shape, out_sharding=sharding), 0, 1)
  return reshard([result], [_partition((*leading, *spec[1:]))], mesh)[0]


def broadcast_per_microbatch(
  x: jax.Array, k: int, batch: Sequence[jax.Array]
) -> jax.Array:
  """k copies of an array, `[k, *shape]`, sharded like the microbatches."""
  result = jnp.broadcast_to(replicate(x)[None], (k, *x.shape))
  leading = [_compat.explicit_spec(leaf)[0] for leaf in batch]
  if not any(leading):
    return result
  spec = _partition((max(leading), *[()] * x.ndim))
  return reshard([result], [spec], _mesh(batch))[0]


def gather_over_batch_axes(
  leaves: Sequence[Any], batch: Sequence[jax.Array]
) -> list[Any]:
  """The leaves, gathered over the mesh axes that shard the microbatches."""
  taken = {name for x in batch for name in _compat.explicit_spec(x)[0]}

  def gather(x):
    spec = _compat.explicit_spec(x)
    if not taken & {*sum(spec, ())}:
      return x
    rest = _partition(tuple(tuple(n for n in e if n not in taken) for e in spec))
    return reshard([x], [rest], _mesh([x]))[0]

  return [gather(x) for x in leaves]


def reshard_like(x: jax.Array, like: jax.Array) -> jax.Array:
  """An array, sharded over an Explicit mesh like another one of its shape."""
  if not is_sharded([x, like]):
    return x
  return reshard([x], [explicit_partition(like)], _mesh([x, like]))[0]


def replicate(x: jax.Array) -> jax.Array:
  """The array, whole on every device of an Explicit mesh."""
  return reshard([x], [P()], _mesh([x]))[0] if is_sharded([x]) else x


def gather_weights(weights: Any, k: int | None, axis_names) -> jax.Array | None:
  """Checks this device's weights, `[k]` or a scalar; returns those of all devices."""
  if weights is None:
    return None
  shape = () if k is None else (k,)
  weights = replicate(_validate.weights(shape, microbatch_weights=weights))
  if not axis_names:
    return weights
  return _compat.all_gather(jnp.atleast_1d(weights), axis_names)


def explicit_partition(x: jax.Array) -> P:
  """The `PartitionSpec` of an array on an Explicit mesh."""
  return _partition(_compat.explicit_spec(x))


def _mesh(arrays):
  return next(
    jax.typeof(x).sharding.mesh for x in arrays if any(_compat.explicit_spec(x))
  )


def _partition(spec: _Spec) -> P:
  return P(*(names or None for names in spec))
