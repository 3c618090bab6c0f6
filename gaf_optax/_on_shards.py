"""Runs a transformation on each device's part of the arrays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gaf_optax import _mesh, _validate
from gaf_optax._validate import leaf_name


def on_shards(
  tx: optax.GradientTransformation,
  mesh: Mesh,
  specs: Any,
  *,
  lead: tuple[Any, ...] = (None,),
) -> optax.GradientTransformationExtraArgs:
  """Runs `tx` on gradients that plain `jit` shards over a mesh of Auto axes.

  With Auto axes the sharding is not part of an array's type. So `update` runs in a
  `jax.shard_map` over the mesh, where each device has its part of every leaf. Give `tx`
  the axes that the parameters are sharded over: `gaf(tau, param_axes="data")`.

  Args:
    tx: `gaf`, `apply_if_agreed`, `multi_steps`, or a chain of one of them and
      elementwise transformations.
    mesh: the mesh.
    specs: a tree of the parameters' `PartitionSpec`, a prefix of it, or a function of
      the parameters' shapes (a tree of `jax.ShapeDtypeStruct`) that returns either.
    lead: how the micro-gradient axis is sharded, as the first entries of a
      `PartitionSpec`: `(None,)` if it is not; `(name,)` if over a mesh axis (with
      `gaf(axis_name=name, stacked=True)`); `()` if there is none (`multi_steps`).

  Returns:
    A transformation whose `update` takes leaves `[k, *shape]`, or `[*shape]` if `lead`
    is `()`, and returns leaves `[*shape]`, sharded by `specs`. `microbatch_weights` are
    sharded by `lead`; other arrays among the extra arguments are replicated.

  Raises:
    ValueError: if `mesh` is not a `Mesh` or `lead` not a tuple. `update` raises it for
      a leaf without a spec, and for a spec with an axis that the mesh does not have.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from jax.sharding import PartitionSpec as P
    >>> from gaf_optax import gaf, on_shards
    >>> mesh = jax.make_mesh((jax.device_count(),), ('data',),
    ...                      axis_types=(jax.sharding.AxisType.Auto,))
    >>> tx = optax.chain(
    ...     on_shards(gaf(0.97, param_axes='data'), mesh, P('data')), optax.sgd(1.0))
    >>> params = jnp.zeros(jax.device_count())
    >>> state = tx.init(params)
    >>> updates, state = jax.jit(tx.update)(jnp.ones((2, params.size)), state, params)
    >>> print(updates[0])
    -1.0
  """
  if not isinstance(mesh, Mesh):
    raise ValueError(f"mesh must be a jax.sharding.Mesh, got {mesh!r}.")
  if not isinstance(lead, tuple):
    raise ValueError(f"lead must be a tuple such as (None,) or (), got {lead!r}.")
  tx = optax.with_extra_args_support(tx)

  def update_fn(
    grads, state, params=None, *, microbatch_weights=None, **extra_args: Any
  ):
    shape = lambda x: jax.ShapeDtypeStruct(x.shape[len(lead) :], x.dtype)
    like = jax.tree.map(shape, grads) if params is None else params
    of_params = _specs_of_leaves(specs, jax.eval_shape(lambda tree: tree, like), mesh)
    own = dict(jax.tree_util.tree_flatten_with_path(of_params, _is_spec)[0])
    of_path: Callable[[Any, Any], Any] = lambda path, _: own[path]
    of_updates = jax.tree_util.tree_map_with_path(of_path, grads)
    of_grads = jax.tree.map(lambda spec: P(*lead, *spec), of_updates, is_leaf=_is_spec)
    of_state = optax.tree_map_params(
      tx,
      lambda _, spec: spec,
      state,
      of_params,
      transform_non_params=lambda _: P(),
    )
    arrays = {
      name: value
      for name, value in extra_args.items()
      if all(isinstance(x, jax.Array) for x in jax.tree.leaves(value))
    }
    others = {name: extra_args[name] for name in extra_args.keys() - arrays.keys()}
    weights = {}
    if microbatch_weights is not None:
      weights["microbatch_weights"] = jnp.asarray(microbatch_weights)

    def update(grads, state, params, arrays, weights):
      return tx.update(grads, state, params, **arrays, **weights, **others)

    of_inputs: Any = (
      of_grads,
      of_state,
      None if params is None else of_params,
      P(),
      P(*lead),
    )
    run = jax.shard_map(
      update, mesh=mesh, in_specs=of_inputs, out_specs=(of_updates, of_state)
    )
    return run(grads, state, params, arrays, weights)

  return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def _is_spec(node):
  return isinstance(node, P)


def _specs_of_leaves(specs, shapes, mesh):
  """A spec for every leaf of the parameters."""
  specs = specs(shapes) if callable(specs) and not _is_spec(specs) else specs
  flat = jax.tree_util.tree_flatten_with_path(specs, is_leaf=_is_spec)[0]
  for path, spec in flat:
    if not _is_spec(spec):
      raise ValueError(
        f"specs must hold PartitionSpecs, got {spec!r} at {leaf_name(path)}."
      )
    for name in _mesh.spec_axes(spec):
      _validate.one_of(tuple(mesh.axis_names), **{f"axis of {spec} in specs": name})
  return jax.tree_util.tree_map_with_path(
    lambda path, _: _mesh.spec_at(specs, path, "specs"), shapes
  )
