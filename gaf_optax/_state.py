"""State: what a step did, kept in the optimizer state and read as metrics."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gaf_optax import _leaves, _threshold


class GafState(NamedTuple):
  """State of `gaf`; all of it arrays whose shapes and dtypes never change.

  Attributes:
    num_updates: int32 scalar, the number of updates seen.
    ready: bool scalar, whether the last step agreed. The name is the one that
      `optax.experimental.aggregating.process` looks for.
    threshold: float32 scalar, tau of the last step.
    steered: float32 scalar, tau of the next step, or None unless tau is a
      `target_accept_rate`.
    last_accepted: float32 scalar, how many micro-gradients the last step
      accepted (the mean over the groups).
    last_microbatches: int32 scalar, of how many.
    mean_distance: float32 scalar, the mean of the last step's finite distances;
      NaN if there was none.
    accept_rate: float32 scalar in [0, 1], the accepted share of all
      micro-gradients since `init`.
    total_microbatches: float32 scalar, their number.
    skipped_steps: int32 scalar, steps without agreement since `init`.
    nonfinite: int32 scalar, micro-gradients with a NaN or an infinity since
      `init`.
    anchor: with `anchor_decay` the moving average, shaped like the parameters;
      else None.
    anchored: bool scalar, whether the moving average holds a step yet, or None.
    distances: float32 `[k]` with `num_microbatches`, else None. NaN where there
      was nothing to compare. The mean over the groups.
    accepted: bool `[k]` with `num_microbatches`, else None. Accepted in any
      group.
  """

  num_updates: jax.Array
  ready: jax.Array
  threshold: jax.Array
  steered: jax.Array | None
  last_accepted: jax.Array
  last_microbatches: jax.Array
  mean_distance: jax.Array
  accept_rate: jax.Array
  total_microbatches: jax.Array
  skipped_steps: jax.Array
  nonfinite: jax.Array
  anchor: Any
  anchored: jax.Array | None
  distances: jax.Array | None
  accepted: jax.Array | None


class Outcome(NamedTuple):
  """What one step did, the same for every form of the filter.

  Attributes:
    agreed: bool scalar.
    accepted: float32 scalar, the mean over the groups of how many they accepted.
    mean_distance: float32 scalar, NaN where nothing was compared.
    microbatches: int32 scalar.
    nonfinite: int32 scalar.
    member_distances: float32 `[k]`, or None where they are not kept.
    member_accepted: bool `[k]`, or None.
  """

  agreed: jax.Array
  accepted: jax.Array
  mean_distance: jax.Array
  microbatches: jax.Array
  nonfinite: jax.Array
  member_distances: jax.Array | None
  member_accepted: jax.Array | None


def outcome(accepted: jax.Array, distances: jax.Array, finite: jax.Array) -> Outcome:
  """The outcome of a step, from `accepted` and `distances` `[m, k]` by group."""
  return Outcome(
    agreed=jnp.any(accepted),
    accepted=jnp.mean(jnp.sum(accepted, axis=1, dtype=jnp.float32)),
    mean_distance=nanmean(nanmean(distances, axis=1)),
    microbatches=jnp.full((), finite.shape[0], jnp.int32),
    nonfinite=jnp.sum(~finite, dtype=jnp.int32),
    member_distances=nanmean(distances, axis=0),
    member_accepted=jnp.any(accepted, axis=0),
  )


def nanmean(values: jax.Array, axis: int | None = None) -> jax.Array:
  """Mean of the finite values, float32; NaN where there is none."""
  finite = jnp.isfinite(values)
  number = jnp.sum(finite, axis=axis)
  total = jnp.sum(jnp.where(finite, values, 0), axis=axis)
  mean = total / jnp.maximum(number, 1)
  return jnp.where(number > 0, mean, jnp.nan).astype(jnp.float32)


def init(params, tau, anchor_decay, num_microbatches) -> GafState:
  """The state before the first step."""
  steered = isinstance(tau, _threshold.TargetAcceptRate)
  # A function each, since a donated state must not hold a buffer twice.
  zero = lambda dtype=jnp.int32: jnp.zeros((), dtype)
  initial = lambda: jnp.array(_threshold.value(tau, zero(), None), jnp.float32)
  anchor = anchored = distances = accepted = None
  if anchor_decay is not None:
    anchor = _leaves.accumulators(params)
    anchored = zero(bool)
  if num_microbatches is not None:
    distances = jnp.full((num_microbatches,), jnp.nan, jnp.float32)
    accepted = jnp.zeros((num_microbatches,), bool)
  return GafState(
    num_updates=zero(),
    ready=zero(bool),
    threshold=initial(),
    steered=initial() if steered else None,
    last_accepted=zero(jnp.float32),
    last_microbatches=zero(),
    mean_distance=jnp.full((), jnp.nan, jnp.float32),
    accept_rate=zero(jnp.float32),
    total_microbatches=zero(jnp.float32),
    skipped_steps=zero(),
    nonfinite=zero(),
    anchor=anchor,
    anchored=anchored,
    distances=distances,
    accepted=accepted,
  )


def advance(state: GafState, tau, threshold: jax.Array, step: Outcome) -> GafState:
  """The state after a step; the anchor stays as it is.

  Args:
    state: the state before.
    tau: as the user gave it, if it is a `TargetAcceptRate`.
    threshold: the tau of this step.
    step: what the step did.
  """
  k = step.microbatches.astype(jnp.float32)
  total = state.total_microbatches + k
  # A running mean, since a float32 count of all that was accepted stops at 2**24.
  rate = state.accept_rate + (step.accepted - k * state.accept_rate) / total
  members = {}
  if state.distances is not None:
    members = {
      "distances": step.member_distances,
      "accepted": step.member_accepted,
    }
  threshold = threshold.astype(jnp.float32)
  return state._replace(
    num_updates=optax.safe_increment(state.num_updates),
    ready=step.agreed,
    threshold=threshold,
    steered=_threshold.steer(tau, threshold, step.accepted, k - step.nonfinite),
    last_accepted=step.accepted,
    last_microbatches=step.microbatches,
    mean_distance=step.mean_distance,
    accept_rate=jnp.clip(rate, 0, 1),
    total_microbatches=total,
    skipped_steps=jnp.where(
      step.agreed,
      state.skipped_steps,
      optax.safe_increment(state.skipped_steps),
    ),
    # A count that would overflow stays where it is.
    nonfinite=jnp.maximum(state.nonfinite + step.nonfinite, state.nonfinite),
    **members,
  )


def move_anchor(
  state: GafState, layout, decay, means: list[jax.Array], any_finite: jax.Array
) -> GafState:
  """The state with the moving average moved towards a step's plain means.

  Without a finite micro-gradient there is no mean, and the average stays.
  """
  anchor = [
    jnp.where(any_finite, decay * a + (1 - decay) * mean, a).astype(a.dtype)
    for a, mean in zip(_leaves.pick(state.anchor, layout), means)
  ]
  return state._replace(
    anchor=_leaves.put(state.anchor, layout, anchor),
    anchored=jnp.asarray(state.anchored) | any_finite,
  )


def metrics(opt_state: Any) -> dict[str, jax.Array]:
  """What the last step did, as scalars ready to log.

  Args:
    opt_state: an optimizer state that holds a `GafState` anywhere in it, for
      instance that of `optax.chain(gaf(), optax.adam(1e-3))`.

  Returns:
    A dict of scalar arrays:

    * `accepted`: micro-gradients accepted in the last step (float32; with
      `groups` the mean over the groups);
    * `microbatches`: of how many (int32);
    * `accept_rate`: the accepted share since `init`, in [0, 1] (float32);
    * `cosine_distance`: mean of the finite distances of the last step, in
      [0, 2], NaN if there was none (float32);
    * `threshold`: tau of the last step (float32);
    * `agreed`: whether the last step agreed (bool);
    * `skipped_steps`: steps without agreement since `init` (int32);
    * `nonfinite`: micro-gradients with a NaN or an infinity since `init`
      (int32).

  Raises:
    ValueError: if there is no `GafState` in it, or more than one.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from gaf_optax import gaf, metrics
    >>> tx = optax.chain(gaf(0.97), optax.sgd(0.1))
    >>> state = tx.init(jnp.zeros(2))
    >>> _, state = tx.update(jnp.array([[1., 0.], [1., 0.], [0., 1.]]), state)
    >>> float(metrics(state)['accepted']), bool(metrics(state)['agreed'])
    (2.0, True)
  """
  is_state = lambda node: isinstance(node, GafState)
  flat, _ = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=is_state)
  found = [(path, node) for path, node in flat if is_state(node)]
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
  state = found[0][1]
  values = {
    "accepted": state.last_accepted,
    "microbatches": state.last_microbatches,
    "accept_rate": state.accept_rate,
    "cosine_distance": state.mean_distance,
    "threshold": state.threshold,
    # Not `ready`, which is False within a cycle of `multi_steps`.
    "agreed": jnp.asarray(state.last_accepted) > 0,
    "skipped_steps": state.skipped_steps,
    "nonfinite": state.nonfinite,
  }
  return {name: jnp.asarray(value) for name, value in values.items()}
