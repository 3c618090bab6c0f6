"""Compat: what JAX releases name differently, and the types of sums and branches."""

import functools
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def accumulator_dtype(dtype) -> jnp.dtype:
  """The dtype in which sums over values of an inexact `dtype` are kept.

  At least 32 bits wide, and complex for complex values.
  """
  dtype = jnp.dtype(dtype)
  if jnp.issubdtype(dtype, jnp.complexfloating):
    return dtype
  return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def real_accumulator_dtype(leaves: Iterable[Any]) -> jnp.dtype:
  """The real dtype of inner products summed over leaves of several dtypes."""
  wide = any(x.dtype in (jnp.float64, jnp.complex128) for x in leaves)
  return jnp.dtype(jnp.float64 if wide else jnp.float32)


def for_cpu_loop(x: jax.Array, dtype: Any) -> tuple[jax.Array, Callable]:
  """An array as a loop on CPU should hold it, and what makes `dtype` of its parts.

  Before jax 0.11 XLA holds bfloat16 arrays of a loop in float32, all at once. Their
  bits take half of that.
  """
  if x.dtype != jnp.bfloat16 or jax.__version_info__ >= (0, 11):
    return x, lambda part: part.astype(dtype)

  def from_bits(part):
    bits = part.astype(jnp.uint32) << jnp.uint32(16)
    return lax.bitcast_convert_type(bits, jnp.float32).astype(dtype)

  return lax.bitcast_convert_type(x, jnp.uint16), from_bits


def varying(x: Any) -> frozenset:
  """Mesh axes over which a value's type says that it varies.

  Empty without the replication check of `jax.shard_map`, and outside of it.
  """
  aval = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
  manual = getattr(aval, "manual_axis_type", None)  # From jax 0.9 on.
  if manual is not None:
    return frozenset(manual.varying)
  return frozenset(getattr(aval, "vma", None) or ())


def explicit_spec(x: jax.Array) -> tuple[tuple[str, ...], ...]:
  """For each dimension the axes of an Explicit mesh that it is sharded over."""
  if not isinstance(x, jax.Array):
    return ((),) * jnp.ndim(x)
  sharding = getattr(jax.typeof(x), "sharding", None)
  spec = () if sharding is None else sharding.spec
  entries = [e if isinstance(e, tuple) else (e,) if e else () for e in spec]
  return tuple(entries + [()] * (jnp.ndim(x) - len(entries)))


def is_unreduced(x: Any) -> bool:
  """Whether an array is a part of a sum that has yet to be made over the devices."""
  sharding = getattr(jax.typeof(x), "sharding", None)
  return bool(getattr(getattr(sharding, "spec", None), "unreduced", None))


def zeros_like(x: jax.Array, dtype: Any) -> jax.Array:
  """Zeros shaped like an array, and sharded like it on an Explicit mesh."""
  zeros = functools.partial(jnp.zeros, jnp.shape(x), dtype)
  if not any(explicit_spec(x)):
    return zeros()
  if isinstance(x, jax.core.Tracer):
    return jax.sharding.reshard(zeros(), jax.typeof(x).sharding)
  return zeros(device=x.sharding)


def checks_replication(axis_name: Hashable) -> bool:
  """Whether types say here what varies over an axis."""
  return axis_name in varying(lax.axis_index(axis_name))


def typed_like(tree: Any, like: Any) -> Any:
  """The tree, each leaf varying over whatever any leaf of `like` varies over.

  Under `jax.shard_map` the values that a loop or a branch starts from have to be
  typed as varying over the mesh axes that the data varies over.
  """
  axes = frozenset().union(*(varying(leaf) for leaf in jax.tree.leaves(like)))
  return jax.tree.map(lambda x: as_varying(x, axes), tree)


def as_varying(x: jax.Array, axes: frozenset) -> jax.Array:
  """The array, typed as varying over these axes and those it varies over now."""
  missing = tuple(sorted(axes - varying(x), key=str))
  return lax.pcast(x, missing, to="varying") if missing else x


def all_gather(x: jax.Array, names: tuple[Hashable, ...]) -> jax.Array:
  """Slices `[c, ...]` of all replicas joined to `[n * c, ...]`, in replica order.

  Typed as replicated where types say so.
  """
  for some in [(name,) for name in reversed(names)] if _is_vmapped(names) else [names]:
    if not any(checks_replication(name) for name in some):
      x = lax.all_gather(x, some, tiled=True)
    elif jax.__version_info__ >= (0, 10):
      x = lax.all_gather(x, some, tiled=True, to="invarying")
    else:
      x = _all_gather_invariant(x, some)
  return x


def all_to_all(x: jax.Array, names: tuple[Hashable, ...]) -> jax.Array:
  """`[n, ...]`: row i goes to replica i; from each replica its row, in order."""
  if not _is_vmapped(names):
    return lax.all_to_all(x, names, 0, 0)
  # Nested vmaps have no exchange over several names at once.
  sizes = tuple(lax.axis_size(name) for name in names)
  result = x.reshape(*sizes, *x.shape[1:])
  for position, name in enumerate(names):
    result = lax.all_to_all(result, name, position, position)
  return result.reshape(x.shape)


def cond(condition: Any, true: Callable[[], Any], false: Callable[[], Any]) -> Any:
  """`lax.cond` whose results may differ in dtype, or in what they vary or lie over.

  Where they differ in dtype or sharding, that of `true` decides.
  """
  results = jax.eval_shape(true), jax.eval_shape(false)

  def typed(branch):
    def run():
      return jax.tree.map(_as_both, branch(), *results)

    return run

  return lax.cond(condition, typed(true), typed(false))


def _as_both(x, a, b):
  """`x` with a type that values of both types can be turned into."""
  if x.dtype != a.dtype:
    x = x.astype(a.dtype)
  x = as_varying(x, varying(a) | varying(b))
  sharding = a.sharding or b.sharding
  if sharding is not None and any(sharding.spec):
    return jax.sharding.reshard(x, sharding)
  return x


def _all_gather_invariant(x, names):
  """What `to='invarying'` does, under the name that it had before jax 0.10."""
  from jax._src.lax.parallel import all_gather_invariant

  return all_gather_invariant(x, names, tiled=True)


def _is_vmapped(names):
  """Whether more than one name is given and not all are axes of a mesh."""
  manual = jax.sharding.get_abstract_mesh().manual_axes
  return len(names) > 1 and not set(names) <= set(manual)
