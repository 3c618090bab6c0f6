"""All ways to map a function over devices, behind one function, and inputs for it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

N = 8


def stack(k, shapes, seed=0, common=1.0):
  """NumPy leaves `[k, *shape]`: noise plus a common part.

  `shapes` maps each name to a float32 shape, or to a shape and a dtype.
  """
  rng = np.random.default_rng(seed)
  draw = lambda shape: (
    rng.standard_normal((k, *shape)) + common * rng.standard_normal(shape)
  )

  def leaf(shape, dtype=np.float32):
    x = draw(shape)
    if np.issubdtype(dtype, np.complexfloating):
      x = x + 1j * draw(shape)
    return np.asarray(x, dtype)

  with_dtype = lambda v: v if len(v) == 2 and isinstance(v[0], tuple) else (v,)
  return {name: leaf(*with_dtype(v)) for name, v in shapes.items()}


def params_of(tree):
  return jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), tree)


def mesh(shape=(N,), names=("data",), kind=AxisType.Auto):
  return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def mapped(f, stack, mapping, names=("data",), shape=(N,), spec=None, out=None):
  """Maps `f` over the rows of `stack`, one per device; returns leaves `[n, ...]`.

  `mapping` is 'vmap', 'pmap', or a pair of an axis type and `check_vma`. `out` sets the
  `out_specs` of `jax.shard_map`; the results then have no leading device axis.
  """
  if mapping == "pmap":
    return jax.pmap(f, axis_name=names[0])(stack)
  if mapping == "vmap":
    run = f
    for name in reversed(names):
      run = jax.vmap(run, axis_name=name)
    nested = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), stack)
    result = jax.jit(run)(nested)
    number = math.prod(shape)
    return jax.tree.map(lambda x: x.reshape(number, *x.shape[len(shape) :]), result)
  kind, check = mapping
  grid = mesh(shape, names, kind)
  spec = P(names) if spec is None else spec
  stack = jax.tree.map(
    lambda x, s: jax.device_put(x, NamedSharding(grid, s)),
    stack,
    jax.tree.map(lambda _: spec, stack) if isinstance(spec, P) else spec,
  )

  def local(rows):
    result = f(jax.tree.map(lambda x: x[0], rows))
    if out is not None:
      return result
    return jax.tree.map(lambda x: jnp.asarray(x)[None], result)

  run = jax.jit(
    jax.shard_map(
      local,
      mesh=grid,
      in_specs=(spec,),
      out_specs=P(names) if out is None else out,
      check_vma=check,
    )
  )
  return jax.tree.map(np.asarray, run(stack))


SHARD_MAPS = [(kind, c) for kind in (AxisType.Auto, AxisType.Explicit) for c in (1, 0)]
ALL = ["vmap", "pmap", *((kind, bool(c)) for kind, c in SHARD_MAPS)]


def name(mapping):
  if isinstance(mapping, str):
    return mapping
  return f"shard_map-{mapping[0].name}-{'checked' if mapping[1] else 'unchecked'}"
