"""Differences between JAX releases, and the types of sums and branches."""

import functools
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def accumulator_dtype(dtype) -> jnp.dtype:
  """The dtype for sums of values: at least 32 bits, complex for complex values."""
  dtype = jnp.dtype(dtype)
  if jnp.issubdtype(dtype, jnp.complexfloating):
    return dtype
  return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def real_accumulator_dtype(leaves: Iterable[Any]) -> jnp.dtype:
  """The real dtype for inner products over several leaves."""
  wide = any(x.dtype in (jnp.float64, jnp.complex128) for x in leaves)
  return jnp.dtype(jnp.float64 if wide else jnp.float32)


def for_cpu_loop(x: jax.Array, dtype: Any) -> tuple[jax.Array, Callable]:
  """An array for use in a loop on CPU, and a function that casts its parts to `dtype`.

  Before jax 0.11, XLA converts a loop's bfloat16 arrays to float32 as a whole. Passing
  their bits avoids that copy.
  """
  if x.dtype != jnp.bfloat16 or jax.__version_info__ >= (0, 11):
    return x, lambda part: part.astype(dtype)

  def from_bits(part):
    bits = part.astype(jnp.uint32) << jnp.uint32(16)
    return lax.bitcast_convert_type(bits, jnp.float32).astype(dtype)

  return lax.bitcast_convert_type(x, jnp.uint16), from_bits


def varying(x: Any) -> frozenset:
  """The mesh axes over which a value varies, according to its type.

  Empty outside `jax.shard_map` and without its replication check.
  """
  aval = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
  manual = getattr(aval, "manual_axis_type", None)  # Since jax 0.9.
  if manual is not None:
    return frozenset(manual.varying)
  return frozenset(getattr(aval, "vma", None) or ())


def explicit_spec(x: jax.Array) -> tuple[tuple[str, ...], ...]:
  """For each dimension, the axes of an Explicit mesh that it is sharded over."""
  if not isinstance(x, jax.Array):
    return ((),) * jnp.ndim(x)
  sharding = getattr(jax.typeof(x), "sharding", None)
  spec = () if sharding is None else sharding.spec
  entries = [e if isinstance(e, tuple) else (e,) if e else () for e in spec]
  return tuple(entries + [()] * (jnp.ndim(x) - len(entries)))


def is_unreduced(x: Any) -> bool:
  """Whether an array's sum over devices is still pending."""
  sharding = getattr(jax.typeof(x), "sharding", None)
  return bool(getattr(getattr(sharding, "spec", None), "unreduced", None))


def zeros_like(x: jax.Array, dtype: Any) -> jax.Array:
  """Zeros with the shape of an array and its sharding over an Explicit mesh."""
  zeros = functools.partial(jnp.zeros, jnp.shape(x), dtype)
  if not any(explicit_spec(x)):
    return zeros()
  if isinstance(x, jax.core.Tracer):
    return jax.sharding.reshard(zeros(), jax.typeof(x).sharding)
  return zeros(device=x.sharding)


def checks_replication(axis_name: Hashable) -> bool:
  """Whether types here show which values vary over an axis."""
  return axis_name in varying(lax.axis_index(axis_name))


def typed_like(tree: Any, like: Any) -> Any:
  """The tree, cast to vary over the axes of `like`, as loops in `shard_map` need."""
  axes = frozenset().union(*(varying(leaf) for leaf in jax.tree.leaves(like)))
  return jax.tree.map(lambda x: as_varying(x, axes), tree)


def as_varying(x: jax.Array, axes: frozenset) -> jax.Array:
  """The array, cast to vary over these axes also."""
  missing = tuple(sorted(axes - varying(x), key=str))
  return lax.pcast(x, missing, to="varying") if missing else x


def all_gather(x: jax.Array, names: tuple[Hashable, ...]) -> jax.Array:
  """Concatenates `[c, ...]` of all devices to `[n * c, ...]`, typed as replicated."""
  for some in [(name,) for name in reversed(names)] if _is_vmapped(names) else [names]:
    if not any(checks_replication(name) for name in some):
      x = lax.all_gather(x, some, tiled=True)
    elif jax.__version_info__ >= (0, 10):
      x = lax.all_gather(x, some, tiled=True, to="invarying")
    else:
      from jax._src.lax.parallel import all_gather_invariant

      x = all_gather_invariant(x, some, tiled=True)
  return x


def all_to_all(x: jax.Array, names: tuple[Hashable, ...]) -> jax.Array:
  """Sends row i of `[n, ...]` to device i; returns the received rows in order."""
  if not _is_vmapped(names):
    return lax.all_to_all(x, names, 0, 0)
  # Nested vmaps do not support several names at once.
  sizes = tuple(lax.axis_size(name) for name in names)
  result = x.reshape(*sizes, *x.shape[1:])
  for position, name in enumerate(names):
    result = lax.all_to_all(result, name, position, position)
  return result.reshape(x.shape)


def _is_vmapped(names):
  """Whether there are several names, not all of them mesh axes."""
  manual = jax.sharding.get_abstract_mesh().manual_axes
  return len(names) > 1 and not set(names) <= set(manual)


def cond(condition: Any, true: Callable[[], Any], false: Callable[[], Any]) -> Any:
  """`lax.cond` for results of different dtypes (`true` decides), axes or shardings."""
  results = jax.eval_shape(true), jax.eval_shape(false)

  def common_type(x, a, b):
    x = x if x.dtype == a.dtype else x.astype(a.dtype)
    x = as_varying(x, varying(a) | varying(b))
    sharding = a.sharding or b.sharding
    if sharding is not None and any(sharding.spec):
      return jax.sharding.reshard(x, sharding)
    return x

  run = lambda branch: lambda: jax.tree.map(common_type, branch(), *results)
  return lax.cond(condition, run(true), run(false))
