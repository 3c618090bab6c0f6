"""A moving average for each source, in front of the filter."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gaf_optax import _mesh, _state, _tree, _validate
from gaf_optax._validate import leaf_name


class WorkerMomentumState(NamedTuple):
  """State of `worker_momentum`.

  Attributes:
    averages: the moving averages, like the micro-gradients, in at least float32.
  """

  averages: Any


def worker_momentum(
  decay: float, *, num_microbatches: int | None = None
) -> optax.GradientTransformationExtraArgs:
  r"""Replaces each micro-gradient by the moving average of its own source.

  In front of the filter: `optax.chain(worker_momentum(0.9), gaf(...), optax.sgd(lr))`.
  The i-th micro-gradient must always come from the same source (device, shard, client):

  .. math:: m_i \leftarrow \text{decay} \cdot m_i + (1 - \text{decay}) \cdot g_i

  starting from 0. Averages are less noisy than gradients, so wrong ones stand out.
  Without wrong sources this gains nothing over momentum in the optimizer. A
  micro-gradient that is not finite does not enter its average and is passed on
  unchanged, so that the filter drops it.

  Args:
    decay: in [0, 1).
    num_microbatches: k, for stacks with leaves `[k, *shape]`; the state holds k times
      the parameters. None if each device has one micro-gradient, shaped like the
      parameters, and its own state.

  Returns:
    A transformation whose `update(micro_grads, state)` takes and returns leaves
    `[k, *shape]`, or `[*shape]`, of the same dtypes. Extra arguments are ignored. A
    state for k micro-gradients can be sharded over k devices: inside `jax.shard_map`
    with `in_specs=P('data')` each device has averages `[1, *shape]` and passes its
    micro-gradient, `[*shape]`. If `jax.shard_map` also shards each micro-gradient, each
    part is checked for NaN separately.

  Raises:
    ValueError: for a decay outside its range, and in `update` for a leaf whose shape is
      not that of its average.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from gaf_optax import gaf, rules, worker_momentum
    >>> tx = optax.chain(
    ...     worker_momentum(0.5, num_microbatches=3),
    ...     gaf(0.9, rule=rules.majority()), optax.sgd(1.0))
    >>> state = tx.init(jnp.zeros(2))
    >>> rows = jnp.array([[2., 0.], [2., 1.], [-4., 0.]])
    >>> updates, state = tx.update(rows, state)
    >>> print(updates)
    [-1.   -0.25]

  References:
    Farhadkhani et al., `Robust Collaborative Learning with Linear Gradient Overhead
    <https://arxiv.org/abs/2209.10931>`_, 2023 (MoNNA).
  """
  _validate.in_interval(0, 1, decay=decay, open_end=True)
  k = num_microbatches
  if k is not None:
    _validate.count(1, num_microbatches=k)

  def init_fn(params):
    averages = _tree.accumulators(params)
    if k is not None:
      averages = jax.tree.map(lambda x: jnp.stack([x] * k), averages)
    return WorkerMomentumState(averages)

  def update_fn(micro_grads, state, params=None, **extra_args):
    del params, extra_args
    _state.check_type(state, WorkerMomentumState)
    averages = dict(jax.tree_util.tree_leaves_with_path(state.averages))
    rows = {
      path: _rows(path, leaf, averages.get(path), k)
      for path, leaf in jax.tree_util.tree_leaves_with_path(micro_grads)
      if jnp.issubdtype(leaf.dtype, jnp.inexact)
    }
    if not rows:
      return micro_grads, state
    finite = jnp.all(jnp.stack([_finite(x) for x in rows.values()]), axis=0)
    passed_on = {}
    for path, new in rows.items():
      old = _mesh.reshard_like(averages[path].reshape(new.shape), new)
      keep = jnp.asarray(decay, old.dtype)
      is_finite = finite.reshape(-1, *(1,) * (new.ndim - 1))
      is_finite = _mesh.reshard_like(jnp.broadcast_to(is_finite, new.shape), new)
      mixed = keep * old + (1 - keep) * new.astype(old.dtype)
      averages[path] = jnp.where(is_finite, mixed, old)
      passed_on[path] = jnp.where(is_finite, mixed.astype(new.dtype), new)

    def replaced(tree, values):
      put = lambda path, x: values[path].reshape(x.shape) if path in values else x
      return jax.tree_util.tree_map_with_path(put, tree)

    state = WorkerMomentumState(replaced(state.averages, averages))
    return replaced(micro_grads, passed_on), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _rows(path, leaf, average, k):
  """The micro-gradients of this device, `[j, *shape]`, checked against the state."""
  shape = None if average is None else average.shape
  if k is not None and shape == leaf.shape:
    return leaf
  if shape == (leaf.shape if k is None else (1, *leaf.shape)):
    return leaf[None]
  hint = " For stacked micro-gradients pass num_microbatches=k."
  if average is None:
    hint = " Was init called with different parameters?"
  elif k is not None:
    hint = f" num_microbatches is {k}."
  raise ValueError(
    f"micro-gradient leaf {leaf_name(path)} has shape {leaf.shape}, but the state has"
    f" {'no average' if average is None else f'an average of shape {shape}'}.{hint}"
  )


def _finite(rows):
  """Whether each micro-gradient is finite in this leaf, bool `[j]`."""
  return _mesh.replicate(jnp.all(jnp.isfinite(_tree.flat_rows(rows)), axis=1))
