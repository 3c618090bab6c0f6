"""Metrics: what users read of an optimizer state."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gaf_optax import _decide, _state, _validate

# Steps in a row with micro-gradients that are copies of one, from which on to warn.
_MANY_STEPS = 10


def metrics(opt_state: Any) -> dict[str, jax.Array]:
  """What the last step did, as scalars ready to log.

  Args:
    opt_state: an optimizer state that holds a `GafState` anywhere in it, for
      instance that of `optax.chain(gaf(), optax.adam(1e-3))`.

  Returns:
    A dict of scalar arrays:

    * `num_accepted`: micro-gradients accepted in the last step (float32; with
      `groups` the mean over the groups);
    * `num_microbatches`: of how many (int32);
    * `accept_rate`: the accepted share since `init`, in [0, 1] (float32);
    * `mean_distance`: mean of the distances of the last step, in [0, 2], -1 if there
      was none (float32);
    * `threshold`: tau of the last step (float32);
    * `agreed`: whether the last step agreed (bool);
    * `skipped_steps`: steps without agreement since `init` (int32);
    * `nonfinite`: micro-gradients with a NaN or an infinity since `init`
      (int32);
    * `num_identical_steps`: steps in a row, up to the last one, in which all
      micro-gradients were copies of one (int32): they were averaged before, and the
      filter does nothing. From ten on, reading them outside `jit` warns as well;
    * `grad_norm`: norm of the last step's result, of the leaves that are compared
      (float32), from the Gram matrix; -1 with `embed`;
    * `noise_scale`: the simple gradient noise scale of the last step (float32): the
      number of microbatches whose mean is as much noise as gradient. It comes from
      the inner products of all finite micro-gradients, accepted or not. Inf where
      they have nothing in common, -1 where it cannot be known: in streamed forms,
      and with fewer than two finite ones.

  Raises:
    ValueError: if there is no `GafState` in it, or more than one.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from gaf_optax import gaf, metrics
    >>> tx = optax.chain(gaf(0.97), optax.sgd(0.1))
    >>> state = tx.init(jnp.zeros(2))
    >>> _, state = tx.update(jnp.array([[1., 0.], [1., 0.], [0., 1.]]), state)
    >>> float(metrics(state)['num_accepted']), bool(metrics(state)['agreed'])
    (2.0, True)

  References:
    McCandlish et al., `An Empirical Model of Large-Batch Training
    <https://arxiv.org/abs/1812.06162>`_, 2018, for the noise scale.
  """
  state = _the_one(opt_state)
  _warn_if_identical(state, stacklevel=3)
  noise_scale = jnp.asarray(state.noise_scale)
  with jax.debug_infs(False):
    noise_scale = jnp.where(noise_scale == _state.INFINITE, jnp.inf, noise_scale)
  values = {
    "num_accepted": state.num_accepted,
    "num_microbatches": state.num_seen,
    "accept_rate": state.accept_rate,
    "mean_distance": state.mean_distance,
    "threshold": state.threshold,
    # Not `ready`, which is False within a cycle of `multi_steps`.
    "agreed": jnp.asarray(state.num_accepted) > 0,
    "skipped_steps": state.skipped_steps,
    "nonfinite": state.nonfinite,
    "num_identical_steps": state.num_identical_steps,
    "grad_norm": state.grad_norm,
    "noise_scale": noise_scale,
  }
  return {name: jnp.asarray(value) for name, value in values.items()}


def sources(opt_state: Any) -> dict[str, jax.Array]:
  """What `memory_decay` has found of the k sources, as a table to log or to print.

  Source i is where the i-th micro-gradient of every step comes from: a device, a shard,
  an annotator. A wrong source has an agreement near zero or below. One whose data are
  of a kind of their own has less than the others, too, but more than zero.

  Args:
    opt_state: an optimizer state that holds a `GafState` anywhere in it, as for
      :func:`metrics`, of a `gaf` or `apply_if_agreed` with `memory_decay`.

  Returns:
    A dict of columns, float32 `[k]`:

    * `agreement`: the cosine, in the memory, to the (k // 2)-th nearest of the other
      sources, in [-1, 1]: with so many others, all at least as near, it is in a
      majority. That is 1 minus the distance of `rules.majority()`. A pair that was
      never compared counts as orthogonal. The mean over the groups; NaN for a source
      that was never compared with another;
    * `accept_rate`: the share of the steps since `init` in which it was accepted in any
      group, in [0, 1]. Steps without agreement count, and so do those in which it was
      not finite;
    * `num_steps`: on how many steps its cosines rest: the mean weight of its pairs with
      the others in the memory, at most `1 / (1 - memory_decay)`. The mean over the
      groups.

  Raises:
    ValueError: if there is no `GafState` in it, or more than one; if it has no memory;
      and if it is the state of all devices of a `jax.pmap`, of which to give one.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from gaf_optax import gaf, sources
    >>> tx = optax.chain(gaf(memory_decay=0.98, num_microbatches=3), optax.sgd(0.1))
    >>> state = tx.init(jnp.zeros(2))
    >>> rows = jnp.array([[1., 0.], [2., 0.], [-1., 0.]])
    >>> _, state = tx.update(rows, state)
    >>> for name, column in sources(state).items():
    ...   print(name, column)
    agreement [ 1.  1. -1.]
    accept_rate [1. 1. 0.]
    num_steps [1. 1. 1.]
  """
  state = _the_one(opt_state)
  if state.memory is None:
    raise ValueError(
      "this GafState remembers nothing of its sources. Make it with"
      " gaf(..., memory_decay=0.98, num_microbatches=k); the streamed forms have no"
      " memory."
    )
  if jnp.ndim(state.memory.mean) != 3:
    raise ValueError(
      "expected the state of one device, whose memory is [m, k, k], got shape"
      f" {jnp.shape(state.memory.mean)}. Is it that of all devices of a jax.pmap? They"
      " hold the same: jax.tree.map(lambda x: x[0], opt_state)."
    )
  with jax.debug_nans(False):
    agreement, num_steps = _decide.majority(state.memory)
    agreement = jnp.nanmean(agreement, axis=0)
  return {
    "agreement": agreement,
    "accept_rate": jnp.asarray(state.accept_rates),
    "num_steps": jnp.mean(num_steps, axis=0),
  }


def _warn_if_identical(state: _state.GafState, stacklevel: int) -> None:
  """Warns of micro-gradients that are copies of one, if that is known by now."""
  number: Any = state.num_identical_steps
  if callable(getattr(number, "__jax_array__", None)):  # A variable of Flax NNX.
    number = number.__jax_array__()
  if not _validate.is_concrete(number):
    return
  if isinstance(number, jax.Array):
    if not getattr(number, "is_ready", lambda: True)():
      return  # Nothing is waited for.
    number = number.addressable_data(0)
  largest = np.asarray(number).max()
  if largest >= _MANY_STEPS:
    warnings.warn(
      f"in the last {largest} steps all micro-gradients were copies of one, so"
      " that the filter did nothing. Were they averaged before it, by jax.lax.pmean or"
      " by flax's DynamicScale(axis_name), or are the microbatches the same?",
      stacklevel=stacklevel,
    )


def _the_one(opt_state: Any) -> _state.GafState:
  """The one `GafState` in an optimizer state."""
  found = _state.find(opt_state)
  if not found:
    raise ValueError(
      "there is no GafState in this optimizer state. Pass the whole state of a"
      f" chain that has gaf in it; got {type(opt_state).__name__}."
    )
  if len(found) > 1:
    places = ", ".join(jax.tree_util.keystr(path) or "(the root)" for path, _ in found)
    raise ValueError(
      f"there are {len(found)} GafStates in this optimizer state, at {places}."
      " Pass the part of it that holds one."
    )
  return found[0][1]
