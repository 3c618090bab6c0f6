"""The results of a step, and the optimizer state that keeps them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gaf_optax import _rules, _tau, _tree

# In place of a missing distance, noise scale or norm. NaN would trigger JAX_DEBUG_NANS.
MISSING = -1.0

# In place of an infinite noise scale, for JAX_DEBUG_INFS; `metrics` returns Inf.
INFINITE = float(jnp.finfo(jnp.float32).max)

# Maximum mean distance or noise scale of micro-gradients that differ by rounding only.
_ROUNDING = 1e-5


class GafState(NamedTuple):
  """State of `gaf`: arrays with fixed shapes and dtypes; optional ones can be None.

  Fields not listed here are those of :func:`metrics`; an infinite `noise_scale` is
  stored as float32's largest number. Fields `[k]` exist with `num_microbatches`.

  Attributes:
    num_updates: int32 scalar, the number of updates.
    ready: bool scalar, whether the last step agreed;
      `optax.experimental.aggregating.process` looks for this name.
    steered: float32 scalar, tau of the next step for a `target_accept_rate`.
    num_seen: int32 scalar, micro-gradients in the last step with a weight above 0.
    num_seen_total: float32 scalar, the sum of `num_seen` since `init`.
    anchor: with `anchor_decay` the moving average, shaped like the parameters.
    anchored: bool scalar, whether the moving average has been initialized.
    memory: with `memory_decay` a NamedTuple of `mean` and `weight`, float32 `[m, k, k]`
      for m groups.
    distances: float32 `[k]`, means over the groups; -1 if there was nothing to compare.
    accepted: bool `[k]`, accepted in any group.
    weights: float32 `[k]`, weights in the result (means over the groups). Their sum is
      the share of groups that agree.
    accept_rates: float32 `[k]`, shares of the steps since `init` in which a
      micro-gradient was accepted in any group.
  """

  num_updates: jax.Array
  ready: jax.Array
  threshold: jax.Array
  steered: jax.Array | None
  num_accepted: jax.Array
  num_seen: jax.Array
  mean_distance: jax.Array
  accept_rate: jax.Array
  num_seen_total: jax.Array
  skipped_steps: jax.Array
  nonfinite: jax.Array
  num_identical_steps: jax.Array
  noise_scale: jax.Array
  anchor: Any
  anchored: jax.Array | None
  memory: Any
  distances: jax.Array | None
  accepted: jax.Array | None
  weights: jax.Array | None
  accept_rates: jax.Array | None
  grad_norm: jax.Array


class Outcome(NamedTuple):
  """The result of one step, in any form of the filter; scalars as in `GafState`.

  Attributes:
    identical: whether the micro-gradients differ by rounding only.
    per_microbatch: a `Decision` of arrays `[k]`, or None if not recorded.
  """

  agreed: jax.Array
  num_accepted: jax.Array
  mean_distance: jax.Array
  num_seen: jax.Array
  nonfinite: jax.Array
  identical: jax.Array
  noise_scale: jax.Array
  grad_norm: jax.Array
  per_microbatch: _rules.Decision | None


class Agreement(NamedTuple):
  """Which of k micro-gradients agreed, and their weights.

  Attributes:
    agreed: bool scalar, whether any was accepted; if not, the gradient is zero.
    num_accepted: float32 scalar, the number of accepted micro-gradients (the mean over
      the groups).
    accepted: bool `[k]`, accepted in any group.
    weights: float32 `[k]`, the weights in the gradient (the means over the groups).
      Their sum, over all devices, is the share of groups that agree.
    distances: float32 `[k]`, in [0, 2]; -1 if there was nothing to compare.
    nonfinite: int32 scalar, the number of micro-gradients that are not finite.
  """

  agreed: jax.Array
  num_accepted: jax.Array
  accepted: jax.Array
  weights: jax.Array
  distances: jax.Array
  nonfinite: jax.Array


def agreement(outcome: Outcome) -> Agreement:
  assert outcome.per_microbatch is not None
  return Agreement(
    agreed=outcome.agreed,
    num_accepted=outcome.num_accepted,
    nonfinite=outcome.nonfinite,
    **outcome.per_microbatch._asdict(),
  )


def outcome(decided: Any, gram: jax.Array, has_norms: bool) -> Outcome:
  """The `Outcome` of a step on stacks, from a `_decide.Decided`."""
  decision, valid = decided.decision, decided.valid
  decision = decision._replace(distances=nan_to_missing(decision.distances))
  scale = _noise_scale(gram, valid)
  return Outcome(
    agreed=jnp.any(decision.accepted),
    num_accepted=jnp.mean(jnp.sum(decision.accepted, axis=1, dtype=jnp.float32)),
    mean_distance=mean_known(mean_known(decision.distances, axis=1)),
    num_seen=jnp.sum(decided.present, dtype=jnp.int32),
    nonfinite=jnp.sum(decided.present & ~valid, dtype=jnp.int32),
    identical=are_identical(scale),
    noise_scale=scale,
    grad_norm=_norm(gram, decided.factors) if has_norms else missing(),
    per_microbatch=mean_over_groups(decision),
  )


def _norm(gram, factors):
  """The norm of the result in all groups, from `[m, k, k]` and `[m + 1, k]`."""
  factors = factors[: gram.shape[0]]
  square = jnp.sum(gram * factors[:, :, None] * factors[:, None, :])
  return jnp.sqrt(jnp.maximum(square, 0)).astype(jnp.float32)


def _noise_scale(gram, valid):
  """The simple gradient noise scale in microbatches (arXiv 1812.06162, appendix A).

  It is `(mean_i G_ii - a) / a`, where G `[k, k]` is the sum of the matrices `[m, k, k]`
  and a the mean of its off-diagonal entries. `INFINITE` if a <= 0, `MISSING` if fewer
  than two micro-gradients are valid.
  """
  matrix = jnp.sum(jnp.where((valid[:, None] & valid[None, :])[None], gram, 0), axis=0)
  number = jnp.sum(valid).astype(matrix.dtype)
  trace = jnp.trace(matrix)
  diagonal = trace / jnp.maximum(number, 1)
  others = (jnp.sum(matrix) - trace) / jnp.maximum(number * (number - 1), 1)
  scale = (diagonal - others) / jnp.where(others > 0, others, 1)
  # Rounding can make it negative.
  scale = jnp.clip(jnp.where(others > 0, scale, INFINITE), 0, INFINITE)
  return jnp.where(number > 1, scale, MISSING).astype(jnp.float32)


def missing(*shape: int) -> jax.Array:
  return jnp.full(shape, MISSING, jnp.float32)


def nan_to_missing(values: jax.Array) -> jax.Array:
  return jnp.where(jnp.isfinite(values), values, MISSING).astype(jnp.float32)


def mean_known(values: jax.Array, axis: int | None = None) -> jax.Array:
  """Mean of the values that are not `MISSING`, float32; `MISSING` if there are none."""
  if axis is not None and values.shape[axis] == 1:
    return jnp.squeeze(values, axis).astype(jnp.float32)
  known = values != MISSING
  number = jnp.sum(known, axis=axis)
  total = jnp.sum(jnp.where(known, values, 0), axis=axis)
  mean = total / jnp.maximum(number, 1).astype(total.dtype)
  return jnp.where(number > 0, mean, MISSING).astype(jnp.float32)


def mean_over_groups(decision: _rules.Decision) -> _rules.Decision:
  """A decision `[k]` from the groups' decisions `[m, k]`, which hold no NaN."""
  return _rules.Decision(
    weights=jnp.mean(decision.weights, axis=0, dtype=jnp.float32),
    accepted=jnp.any(decision.accepted, axis=0),
    distances=mean_known(decision.distances, axis=0),
  )


def are_identical(difference: jax.Array) -> jax.Array:
  """Whether a noise scale or mean distance is that of identical micro-gradients."""
  return (difference != MISSING) & (difference <= _ROUNDING)


def init(params: Any, options: Any, memory: Any = None) -> GafState:
  if isinstance(params, optax.LookaheadParams):
    raise ValueError(
      "the parameters are optax.LookaheadParams, but gradients belong to their fast"
      " part. Put the filter inside:"
      " optax.lookahead(optax.chain(gaf(tau), optax.sgd(0.1)), 5, 0.5)."
    )
  k = options.num_microbatches
  has_anchor = options.anchor_decay is not None
  # Functions, since a donated state must not hold the same buffer twice.
  zero = lambda dtype=jnp.int32: jnp.zeros((), dtype)
  zeros = lambda dtype: None if k is None else jnp.zeros((k,), dtype)
  return GafState(
    num_updates=zero(),
    ready=zero(bool),
    threshold=jnp.array(options.tau.at(options.tau.init(), zero()).value, jnp.float32),
    steered=options.tau.init(),
    num_accepted=zero(jnp.float32),
    num_seen=zero(),
    mean_distance=missing(),
    accept_rate=zero(jnp.float32),
    num_seen_total=zero(jnp.float32),
    skipped_steps=zero(),
    nonfinite=zero(),
    num_identical_steps=zero(),
    noise_scale=missing(),
    anchor=_tree.accumulators(params) if has_anchor else None,
    anchored=zero(bool) if has_anchor else None,
    memory=memory,
    distances=None if k is None else missing(k),
    accepted=zeros(bool),
    weights=zeros(jnp.float32),
    accept_rates=zeros(jnp.float32),
    grad_norm=zero(jnp.float32),
  )


def check_type(state: Any, expected: type) -> None:
  if not isinstance(state, expected):
    hint = " Is it the state of a chain that contains this transformation?"
    raise ValueError(
      f"update takes the {expected.__name__} returned by init of the same"
      f" transformation, got {type(state).__name__}.{hint if find(state) else ''}"
    )


def check(state: Any, options: Any) -> None:
  """Raises unless the state belongs to these options."""
  check_type(state, GafState)
  has_tau = options.tau.init() is not None
  fields = {
    "target_accept_rate as tau": (options.tau if has_tau else None, "steered"),
    "anchor_decay": (options.anchor_decay, "anchor"),
    "memory_decay": (options.memory_decay, "memory"),
    "num_microbatches": (options.num_microbatches, "distances"),
  }
  for name, (option, field) in fields.items():
    if (option is None) != (getattr(state, field) is None):
      raise ValueError(
        f"{name} is {'not given' if option is None else option}, but the state"
        f" {'has' if option is None else 'lacks'} the field {field}: it was created by"
        " init with different options (perhaps restored from a checkpoint)."
      )
  k = options.num_microbatches
  if k is not None and state.distances.shape != (k,):
    raise ValueError(
      f"num_microbatches is {k}, but the state holds {state.distances.shape[-1]}"
      " decisions: it was created by init with a different number."
    )


def advance(state: GafState, tau: _tau.Tau, outcome: Outcome) -> GafState:
  """The state after a step; anchor and memory are unchanged."""
  k = outcome.num_seen.astype(jnp.float32)
  total = state.num_seen_total + k
  # A running mean, since float32 cannot count past 2**24.
  rate = (outcome.num_accepted - k * state.accept_rate) / jnp.maximum(total, 1)
  num_updates = optax.safe_increment(state.num_updates)
  recorded = {}
  if state.accept_rates is not None and outcome.per_microbatch is not None:
    recorded = outcome.per_microbatch._asdict()
    accepted = outcome.per_microbatch.accepted.astype(jnp.float32)
    moved = (accepted - state.accept_rates) / num_updates.astype(jnp.float32)
    recorded["accept_rates"] = jnp.clip(state.accept_rates + moved, 0, 1)
  skipped = optax.safe_increment(state.skipped_steps)
  identical = optax.safe_increment(state.num_identical_steps)
  return state._replace(
    num_updates=num_updates,
    ready=outcome.agreed,
    threshold=tau.value.astype(jnp.float32),
    steered=tau.after(outcome.num_accepted, outcome.num_seen - outcome.nonfinite),
    num_accepted=outcome.num_accepted,
    num_seen=outcome.num_seen,
    mean_distance=outcome.mean_distance,
    accept_rate=jnp.clip(state.accept_rate + rate, 0, 1),
    num_seen_total=total,
    skipped_steps=jnp.where(outcome.agreed, state.skipped_steps, skipped),
    # The sum may overflow.
    nonfinite=jnp.maximum(state.nonfinite + outcome.nonfinite, state.nonfinite),
    num_identical_steps=jnp.where(outcome.identical, identical, 0),
    noise_scale=outcome.noise_scale,
    grad_norm=outcome.grad_norm,
    **recorded,
  )


def move_anchor(
  state: GafState, layout, decay, means: Sequence[jax.Array], any_valid: jax.Array
) -> GafState:
  """The state with the anchor moved towards a step's plain means, if there are any."""
  anchor = []
  for old, mean in zip(_tree.select(state.anchor, layout), means):
    keep = jnp.asarray(decay, old.dtype)
    moved = keep * old + (1 - keep) * mean.astype(old.dtype)
    anchor.append(jnp.where(any_valid, moved, old))
  return state._replace(
    anchor=_tree.replace(state.anchor, layout, anchor),
    anchored=jnp.asarray(state.anchored) | any_valid,
  )


def find(opt_state: Any) -> list[tuple[Any, GafState]]:
  """Path and state of every `GafState` in an optimizer state."""
  is_state = lambda node: isinstance(node, GafState)
  flat = jax.tree_util.tree_leaves_with_path(opt_state, is_state)
  return [(path, node) for path, node in flat if is_state(node)]
