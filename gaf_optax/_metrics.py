"""Summaries of an optimizer state for users."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gaf_optax import _rules, _state, _validate

# Minimum number of consecutive steps with identical micro-gradients for a warning.
_MANY_STEPS = 10


def metrics(opt_state: Any) -> dict[str, jax.Array]:
  """Scalars to log, about the last step or about all steps since `init`.

  Args:
    opt_state: an optimizer state that contains a `GafState`, for instance the state of
      `optax.chain(gaf(), optax.adam(1e-3))`.

  Returns:
    A dict of scalar arrays:

    * `num_accepted`: accepted micro-gradients in the last step (float32; with `groups`
      the mean over the groups);
    * `num_microbatches`: the last step's micro-gradients with a weight above 0 (int32);
    * `accept_rate`: the share of micro-gradients accepted since `init` (float32);
    * `mean_distance`: the mean of the last step's distances, in [0, 2]; -1 if there are
      none (float32);
    * `threshold`: tau of the last step (float32);
    * `agreed`: whether the last step agreed (bool);
    * `skipped_steps`: steps without agreement since `init` (int32);
    * `nonfinite`: micro-gradients that were not finite, since `init` (int32);
    * `num_identical_steps`: consecutive steps, up to the last one, with identical
      micro-gradients (int32). The filter has no effect on them; the usual cause is an
      average before the filter. From 10 on, calls outside `jit` warn;
    * `grad_norm`: the norm of the compared leaves of the last step's result, from the
      Gram matrix; -1 with `embed` (float32);
    * `noise_scale`: the simple gradient noise scale of the last step: the number of
      microbatches whose mean has as much noise as signal (float32). Inf without a
      common signal; -1 with fewer than two finite micro-gradients and in `multi_steps`.

  Raises:
    ValueError: unless the state contains exactly one `GafState`.

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
  state = _find_single_state(opt_state)
  _warn_if_identical(state)
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
  """A table of the k sources, from the memory of `memory_decay`.

  Source i is where the i-th micro-gradient of every step comes from: a device, a shard,
  an annotator. A wrong source has an agreement of about zero or less. A source with a
  different but valid data distribution scores lower than the rest, but above zero.

  Args:
    opt_state: as for :func:`metrics`, with `memory_decay`.

  Returns:
    A dict of columns, float32 `[k]`:

    * `agreement`: the remembered cosine to the (k // 2)-th nearest other source, in
      [-1, 1] (1 minus the distance of `rules.majority()`, the mean over the groups).
      Pairs that were never compared count as orthogonal; NaN if a source never was;
    * `accept_rate`: the share of steps since `init` in which the source was accepted in
      any group, in [0, 1]. Skipped steps and gradients that are not finite count as
      not accepted;
    * `num_steps`: the effective number of steps averaged (the mean weight of the
      source's pairs), at most `1 / (1 - memory_decay)`.

  Raises:
    ValueError: unless the state contains exactly one `GafState`, with a memory. Pass
      one of the equal states that `jax.pmap` returns.

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
  state = _find_single_state(opt_state)
  if state.memory is None:
    raise ValueError(
      "this GafState has no memory. Create it with gaf(..., memory_decay=0.98,"
      " num_microbatches=k); multi_steps does not support a memory."
    )
  cosines = jnp.asarray(state.memory.mean)
  if cosines.ndim != 3:
    raise ValueError(
      "expected the state of one device, with a memory [m, k, k], got shape"
      f" {cosines.shape}. The devices of a jax.pmap have equal states; pass one:"
      " jax.tree.map(lambda x: x[0], opt_state)."
    )
  k = cosines.shape[-1]
  diagonal = jnp.eye(k, dtype=bool)
  majority = lambda gram: _rules.Majority()(gram, jnp.ones(k, bool), 2)
  distances = jax.vmap(majority)(jnp.where(diagonal, 1, cosines)).distances
  num_steps = jnp.where(diagonal, 0, state.memory.weight).sum(-1) / max(k - 1, 1)
  with jax.debug_nans(False):
    agreement = jnp.nanmean(jnp.where(num_steps > 0, 1 - distances, jnp.nan), axis=0)
  return {
    "agreement": agreement,
    "accept_rate": jnp.asarray(state.accept_rates),
    "num_steps": jnp.mean(num_steps, axis=0),
  }


def _warn_if_identical(state: _state.GafState) -> None:
  """Warns of identical micro-gradients, without waiting for the state."""
  number: Any = state.num_identical_steps
  if callable(getattr(number, "__jax_array__", None)):  # A variable of Flax NNX.
    number = number.__jax_array__()
  if not _validate.is_concrete(number):
    return
  if isinstance(number, jax.Array):
    if not getattr(number, "is_ready", lambda: True)():
      return
    number = number.addressable_data(0)
  largest = np.asarray(number).max()
  if largest >= _MANY_STEPS:
    warnings.warn(
      f"all micro-gradients of the last {largest} steps were identical, so the filter"
      " had no effect. Were they averaged before it, by jax.lax.pmean or by flax's"
      " DynamicScale(axis_name)? Or are the microbatches identical?",
      stacklevel=3,
    )


def _find_single_state(opt_state: Any) -> _state.GafState:
  found = _state.find(opt_state)
  if not found:
    raise ValueError(
      "there is no GafState in this optimizer state. Pass the whole state of a chain"
      f" that contains gaf; got {type(opt_state).__name__}. (value_and_grad has no"
      " state: log the Agreement that it returns and the norm of its gradient.)"
    )
  if len(found) > 1:
    places = ", ".join(jax.tree_util.keystr(path) or "(the root)" for path, _ in found)
    raise ValueError(
      f"there are {len(found)} GafStates in this optimizer state, at {places}. Pass a"
      " part of it with one GafState."
    )
  return found[0][1]
