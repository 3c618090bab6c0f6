"""Sharded: stacks that are spread over an Explicit mesh, as their types say."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gaf_optax import _compat, _exchange, _leaves

# For each dimension the names of the axes that it is sharded over.
_Spec = tuple[tuple[str, ...], ...]


def is_sharded(arrays: Sequence[jax.Array]) -> bool:
  """Whether the type of any array says that it is sharded."""
  return any(any(_compat.explicit_spec(x)) for x in arrays)


def on_each_device(
  filtered: Callable[..., Any],
  arrays: Sequence[jax.Array],
  anchor: Sequence[jax.Array] | None,
  *rest: Any,
  paths: Sequence[Any],
) -> Any:
  """`filtered` of stacked leaves `[k, *shape]`, called by each device on its part.

  Args:
    filtered: as `_transform._filtered`; called with `axes` too.
    arrays: the leaves.
    anchor: leaves `[*shape]`, or None.
    *rest: replicated arrays.
    paths: where in the tree each leaf is.

  Returns:
    What `filtered` returns; the leaves in it are sharded as those of the stack,
    whose leading axis they do not have.

  Raises:
    ValueError: if the leading axes are sharded differently, or other dimensions
      over the same mesh axes.
  """
  specs = [_compat.explicit_spec(x) for x in arrays]
  members = _leading(specs, paths)
  inner = [spec[1:] for spec in specs]
  axes = _axes(members, inner)
  both = set(members) & set(axes.params)
  if both:
    path = next(p for p, spec in zip(paths, inner) if both & {*sum(spec, ())})
    raise ValueError(
      f"the stack of micro-gradients is sharded over mesh axis {min(both)!r}, and so"
      f" is a dimension of leaf {_leaves.name(path)}. Use one mesh axis for the"
      " micro-gradients and another one for the parameters."
    )
  mesh = _mesh(arrays)
  stack = [_partition((members, *spec)) for spec in inner]
  single = [_partition(spec) for spec in inner]
  of_anchor: Any = P()
  if anchor is not None:
    own = [_partition(_compat.explicit_spec(a)) for a in anchor]
    anchor, of_anchor = _resharded(anchor, single, mesh), single
  result = jax.shard_map(
    lambda arrays, anchor, *rest: filtered(arrays, anchor, *rest, axes=axes),
    mesh=mesh,
    in_specs=(stack, of_anchor, *(P() for _ in rest)),
    out_specs=(single, of_anchor, P(), P(), P()),
  )(_resharded(arrays, stack, mesh), anchor, *rest)
  if anchor is None:
    return result
  means, plain, *others = result
  return means, _resharded(plain, own, mesh), *others


def gram(of_rows: Callable[..., Any], leaves: Sequence[Sequence[jax.Array]], **options):
  """`_gram.gram` of leaves whose rows are on every device, in parts.

  Args:
    of_rows: `_gram.gram`.
    leaves: for each leaf its blocks of rows `[k_b, *shape]`.
    **options: the other arguments of `of_rows`, but for `spread`.
  """
  specs = [max(_compat.explicit_spec(b)[1:] for b in blocks) for blocks in leaves]
  axes = _axes((), specs)
  mesh = _mesh([block for blocks in leaves for block in blocks])
  rows = [_partition(((), *spec)) for spec in specs]

  def local(leaves):
    return of_rows(leaves, spread=_exchange.spread(axes), **options)

  mapped = jax.shard_map(local, mesh=mesh, in_specs=(rows,), out_specs=P())
  return jax.jit(mapped)(
    [
      tuple(_resharded(blocks, [spec] * len(blocks), mesh))
      for blocks, spec in zip(leaves, rows)
    ]
  )


def _axes(members, inner: Sequence[_Spec]) -> _exchange.Axes:
  params = tuple(dict.fromkeys(name for spec in inner for name in sum(spec, ())))
  replicated = tuple(
    tuple(name for name in params if name not in sum(spec, ())) for spec in inner
  )
  return _exchange.Axes(members, True, params, replicated)


def _mesh(arrays):
  return next(
    jax.typeof(x).sharding.mesh for x in arrays if any(_compat.explicit_spec(x))
  )


def _resharded(leaves, specs, mesh):
  return [
    jax.sharding.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(leaves, specs)
  ]


def _leading(specs: Sequence[_Spec], paths) -> tuple[str, ...]:
  """The mesh axes that the micro-gradient axis of every leaf is sharded over."""
  found = {spec[0]: path for spec, path in zip(specs, paths) if spec[0]}
  if len(found) > 1:
    (first, path), (second, other) = list(found.items())[:2]
    raise ValueError(
      "the micro-gradient axis must be sharded over the same mesh axes in every"
      f" leaf, but it is over {first} in leaf {_leaves.name(path)} and over {second}"
      f" in leaf {_leaves.name(other)}."
    )
  return next(iter(found), ())


def _partition(spec: _Spec) -> P:
  return P(*(names or None for names in spec))
