"""The ways to map a function over devices, called in one way, and what to map over."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

N = 8


def stack(k, shapes, seed=0, common=1.0):
  """NumPy leaves `[k, *shape]` of noise and what all k share.

  `shapes` has for each name a shape, of float32, or a pair of one and a dtype.
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
  """Parameters for leaves `[k, *shape]`."""
  return jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), tree)


def mesh(shape=(N,), names=("data",), kind=AxisType.Auto):
  return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def mapped(f, stack, how, names=("data",), shape=(N,), spec=None, out=None):
  """`f` of each member's row of `stack`, on every member: leaves `[n, ...]`.

  `how` is 'vmap', 'pmap', or a pair of an axis type and whether to check. With
  `out` the results are those of `jax.shard_map` with these out_specs instead.
  """
  if how == "pmap":
    return jax.pmap(f, axis_name=names[0])(stack)
  if how == "vmap":
    run = f
    for name in reversed(names):
      run = jax.vmap(run, axis_name=name)
    nested = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), stack)
    result = jax.jit(run)(nested)
    number = math.prod(shape)
    return jax.tree.map(lambda x: x.reshape(number, *x.shape[len(shape) :]), result)
  kind, check = how
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


def name(how):
  if isinstance(how, str):
    return how
  return f"shard_map-{how[0].name}-{'checked' if how[1] else 'unchecked'}"
