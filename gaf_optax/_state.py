"""State: what a step did, kept in the optimizer state."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gaf_optax import _rules, _tau, _tree

# Stands for a distance, a noise scale or a norm where there was nothing to compare. Not
# NaN, since JAX_DEBUG_NANS reports any that compiled code returns.
NOTHING = -1.0

# Stands for an infinite noise scale, for JAX_DEBUG_INFS; `metrics` gives Inf.
INFINITE = float(jnp.finfo(jnp.float32).max)

# A mean distance or a noise scale up to which micro-gradients are copies of one, but
# for rounding.
_ROUNDING = 1e-5


class GafState(NamedTuple):
  """State of `gaf`; all of it arrays whose shapes and dtypes never change.

  Attributes:
    num_updates: int32 scalar, the number of updates seen.
    ready: bool scalar, whether the last step agreed. The name is the one that
      `optax.experimental.aggregating.process` looks for.
    threshold: float32 scalar, tau of the last step.
    steered: float32 scalar, tau of the next step, or None unless tau is a
      `target_accept_rate`.
    num_accepted: float32 scalar, how many micro-gradients the last step
      accepted (the mean over the groups).
    num_seen: int32 scalar, of how many.
    mean_distance: float32 scalar, the mean of the last step's distances; -1 if
      there was none.
    accept_rate: float32 scalar in [0, 1], the accepted share of all
      micro-gradients since `init`.
    num_seen_total: float32 scalar, their number.
    skipped_steps: int32 scalar, steps without agreement since `init`.
    nonfinite: int32 scalar, micro-gradients with a NaN or an infinity since
      `init`.
    num_identical_steps: int32 scalar, steps in a row, up to the last one, whose
      micro-gradients were all copies of one, but for rounding.
    noise_scale: float32 scalar, the gradient noise scale in microbatches of the
      last step; -1 where it cannot be known, float32's largest number for Inf.
    anchor: with `anchor_decay` the moving average, shaped like the parameters;
      else None.
    anchored: bool scalar, whether the moving average holds a step yet, or None.
    memory: with `memory_decay` a NamedTuple `mean`, `weight`, float32 `[m, k, k]`;
      else None.
    distances: float32 `[k]` with `num_microbatches`, else None. -1 where there
      was nothing to compare. The mean over the groups.
    accepted: bool `[k]` with `num_microbatches`, else None. Accepted in any
      group.
    weights: float32 `[k]` with `num_microbatches`, else None: the weight of each in
      the result. They sum to 1, or are all 0 without agreement. The mean over the
      groups.
    accept_rates: float32 `[k]` with `num_microbatches`, else None: for each the share
      of the steps since `init` in which it was accepted in any group.
    grad_norm: float32 scalar, the norm of the last step's result, of the leaves
      that are compared; -1 where it cannot be known (with `embed`).
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
  """What one step did, the same for every form of the filter.

  Attributes:
    agreed: bool scalar.
    num_accepted: float32 scalar, the mean over the groups of how many they accepted.
    mean_distance: float32 scalar, `NOTHING` where nothing was compared.
    num_seen: int32 scalar.
    nonfinite: int32 scalar.
    identical: bool scalar, whether all are copies of one.
    noise_scale: float32 scalar, or `NOTHING`.
    grad_norm: float32 scalar, or `NOTHING`.
    each: for each micro-gradient a `Decision` `[k]`, or None where not kept.
  """

  agreed: jax.Array
  num_accepted: jax.Array
  mean_distance: jax.Array
  num_seen: jax.Array
  nonfinite: jax.Array
  identical: jax.Array
  noise_scale: jax.Array
  grad_norm: jax.Array
  each: _rules.Decision | None


class Agreement(NamedTuple):
  """What was found of k micro-gradients.

  Attributes:
    agreed: bool scalar, whether any two agreed; the gradient is zero if not.
    num_accepted: float32 scalar, how many were accepted (the mean over the groups).
    accepted: bool `[k]`, accepted in any group.
    weights: float32 `[k]`, the weight of each in the gradient: of sum 1, or all 0
      without agreement (the mean over the groups).
    distances: float32 `[k]`, in [0, 2]; -1 where there was nothing to compare.
    nonfinite: int32 scalar, how many had a NaN or an infinity.
  """

  agreed: jax.Array
  num_accepted: jax.Array
  accepted: jax.Array
  weights: jax.Array
  distances: jax.Array
  nonfinite: jax.Array


def agreement(step: Outcome) -> Agreement:
  """What a user gets of a step of which each micro-gradient's decision is known."""
  assert step.each is not None
  return Agreement(
    agreed=step.agreed,
    num_accepted=step.num_accepted,
    nonfinite=step.nonfinite,
    **step.each._asdict(),
  )


def or_nothing(values: jax.Array) -> jax.Array:
  return jnp.where(jnp.isfinite(values), values, NOTHING).astype(jnp.float32)


def outcome(decided: Any, gram: jax.Array, knows_norms: bool) -> Outcome:
  """The outcome of a step on stacks, from a `_decide.Decided`."""
  decision, valid = decided.decision, decided.valid
  distances = or_nothing(decision.distances)
  scale = _noise_scale(gram, valid)
  return Outcome(
    agreed=jnp.any(decision.accepted),
    num_accepted=jnp.mean(jnp.sum(decision.accepted, axis=1, dtype=jnp.float32)),
    mean_distance=mean_known(mean_known(distances, axis=1)),
    num_seen=jnp.sum(decided.present, dtype=jnp.int32),
    nonfinite=jnp.sum(decided.present & ~valid, dtype=jnp.int32),
    identical=are_copies(scale),
    noise_scale=scale,
    grad_norm=_norm(gram, decided.factors) if knows_norms else nothing(),
    each=over_groups(decision._replace(distances=distances)),
  )


def nothing(*shape: int) -> jax.Array:
  return jnp.full(shape, NOTHING, jnp.float32)


def _norm(gram, factors):
  """The norm of the result in all groups, from `[m, k, k]` and `[m + 1, k]`."""
  factors = factors[: gram.shape[0]]
  square = jnp.sum(gram * factors[:, :, None] * factors[:, None, :])
  return jnp.sqrt(jnp.maximum(square, 0)).astype(jnp.float32)


def _noise_scale(gram, valid):
  """The simple gradient noise scale in microbatches (arXiv 1812.06162, appendix A).

  `(mean_i G_ii - a) / a`, with a the mean of the off-diagonal entries, of matrices
  `[m, k, k]` that are added up. `INFINITE` where a <= 0, `NOTHING` where fewer than two
  are valid.
  """
  matrix = jnp.sum(jnp.where((valid[:, None] & valid[None, :])[None], gram, 0), axis=0)
  number = jnp.sum(valid).astype(matrix.dtype)
  trace = jnp.trace(matrix)
  diagonal = trace / jnp.maximum(number, 1)
  others = (jnp.sum(matrix) - trace) / jnp.maximum(number * (number - 1), 1)
  scale = (diagonal - others) / jnp.where(others > 0, others, 1)
  # Below 0 by rounding alone.
  scale = jnp.clip(jnp.where(others > 0, scale, INFINITE), 0, INFINITE)
  return jnp.where(number > 1, scale, NOTHING).astype(jnp.float32)


def over_groups(decision: _rules.Decision) -> _rules.Decision:
  """For each micro-gradient `[k]`, from `[m, k]` by group without NaN."""
  return _rules.Decision(
    weights=jnp.mean(decision.weights, axis=0, dtype=jnp.float32),
    accepted=jnp.any(decision.accepted, axis=0),
    distances=mean_known(decision.distances, axis=0),
  )


def mean_known(values: jax.Array, axis: int | None = None) -> jax.Array:
  """Mean of the values that are not `NOTHING`, float32; `NOTHING` without any."""
  if axis is not None and values.shape[axis] == 1:
    return jnp.squeeze(values, axis).astype(jnp.float32)
  known = values != NOTHING
  number = jnp.sum(known, axis=axis)
  total = jnp.sum(jnp.where(known, values, 0), axis=axis)
  mean = total / jnp.maximum(number, 1).astype(total.dtype)
  return jnp.where(number > 0, mean, NOTHING).astype(jnp.float32)


def are_copies(difference: jax.Array) -> jax.Array:
  """Whether all are copies of one, by their noise scale or their mean distance."""
  return (difference != NOTHING) & (difference <= _ROUNDING)


def init(params: Any, options: Any, memory: Any = None) -> GafState:
  """The state before the first step, for checked options.

  Raises:
    ValueError: for parameters that `optax.lookahead` has doubled.
  """
  if isinstance(params, optax.LookaheadParams):
    raise ValueError(
      "the parameters are optax.LookaheadParams, but gradients are those of the fast"
      " ones alone. Put the filter inside:"
      " optax.lookahead(optax.chain(gaf(tau), optax.sgd(0.1)), 5, 0.5)."
    )
  k = options.num_microbatches
  # A function each, since a donated state must not hold a buffer twice.
  zero = lambda dtype=jnp.int32: jnp.zeros((), dtype)
  has_anchor = options.anchor_decay is not None
  return GafState(
    num_updates=zero(),
    ready=zero(bool),
    threshold=jnp.array(options.tau.at(options.tau.init(), zero()), jnp.float32),
    steered=options.tau.init(),
    num_accepted=zero(jnp.float32),
    num_seen=zero(),
    mean_distance=nothing(),
    accept_rate=zero(jnp.float32),
    num_seen_total=zero(jnp.float32),
    skipped_steps=zero(),
    nonfinite=zero(),
    num_identical_steps=zero(),
    noise_scale=nothing(),
    anchor=_tree.accumulators(params) if has_anchor else None,
    anchored=zero(bool) if has_anchor else None,
    memory=memory,
    distances=None if k is None else nothing(k),
    accepted=None if k is None else jnp.zeros((k,), bool),
    weights=None if k is None else jnp.zeros((k,), jnp.float32),
    accept_rates=None if k is None else jnp.zeros((k,), jnp.float32),
    grad_norm=zero(jnp.float32),
  )


def check_type(state: Any, expected: type) -> None:
  """Raises unless a state is of the type that `init` made."""
  if not isinstance(state, expected):
    hint = ""
    if find(state):
      hint = " Is it the state of a chain that this transformation is a part of?"
    raise ValueError(
      f"update takes the {expected.__name__} that init of the same transformation"
      f" made, got {type(state).__name__}.{hint}"
    )


def check(state: Any, options: Any) -> None:
  """Raises unless `init` of a transformation with these options made the state.

  Raises:
    ValueError: naming what was found and the likely mistake.
  """
  check_type(state, GafState)
  carried = options.tau.init() is not None
  kept = {
    "tau": (options.tau if carried else None, "steered", state.steered),
    "anchor_decay": (options.anchor_decay, "anchor", state.anchor),
    "memory_decay": (options.memory_decay, "memory", state.memory),
    "num_microbatches": (options.num_microbatches, "distances", state.distances),
  }
  for name, (option, field, value) in kept.items():
    if (option is None) != (value is None):
      raise ValueError(
        f"{name} is {'not given' if option is None else option}, but the state"
        f" {'has' if option is None else 'lacks'} what it needs ({field}): init of a"
        " transformation with other options made it. Is it a restored one?"
      )
  k = options.num_microbatches
  if k is not None and state.distances.shape != (k,):
    raise ValueError(
      f"num_microbatches is {k}, but the state is of {state.distances.shape[-1]}"
      " micro-gradients: init of a transformation with another number made it."
    )


def advance(
  state: GafState, tau: _tau.Tau, value: jax.Array, step: Outcome
) -> GafState:
  """The state after a step; anchor and memory stay as they are.

  Args:
    state: the state before.
    tau: what kind of tau it is.
    value: the tau of this step.
    step: what the step did.
  """
  k = step.num_seen.astype(jnp.float32)
  total = state.num_seen_total + k
  # A running mean, since a float32 count of all that was accepted stops at 2**24.
  rate = (step.num_accepted - k * state.accept_rate) / jnp.maximum(total, 1)
  num_updates = optax.safe_increment(state.num_updates)
  each = {}
  if state.accept_rates is not None and step.each is not None:
    now = step.each.accepted.astype(jnp.float32)
    moved = (now - state.accept_rates) / num_updates.astype(jnp.float32)
    each = step.each._asdict()
    each["accept_rates"] = jnp.clip(state.accept_rates + moved, 0, 1)
  skipped = optax.safe_increment(state.skipped_steps)
  identical = optax.safe_increment(state.num_identical_steps)
  return state._replace(
    num_updates=num_updates,
    ready=step.agreed,
    threshold=value.astype(jnp.float32),
    steered=tau.after(value, step.num_accepted, step.num_seen - step.nonfinite),
    num_accepted=step.num_accepted,
    num_seen=step.num_seen,
    mean_distance=step.mean_distance,
    accept_rate=jnp.clip(state.accept_rate + rate, 0, 1),
    num_seen_total=total,
    skipped_steps=jnp.where(step.agreed, state.skipped_steps, skipped),
    # A count that would overflow stays where it is.
    nonfinite=jnp.maximum(state.nonfinite + step.nonfinite, state.nonfinite),
    num_identical_steps=jnp.where(step.identical, identical, 0),
    noise_scale=step.noise_scale,
    grad_norm=step.grad_norm,
    **each,
  )


def move_anchor(
  state: GafState, layout, decay, means: Sequence[jax.Array], any_finite: jax.Array
) -> GafState:
  """The state with the moving average moved towards a step's plain means.

  Without a finite micro-gradient there is no mean, and the average stays.
  """
  anchor = [
    jnp.where(any_finite, decay * a + (1 - decay) * mean, a).astype(a.dtype)
    for a, mean in zip(_tree.pick(state.anchor, layout), means)
  ]
  return state._replace(
    anchor=_tree.put(state.anchor, layout, anchor),
    anchored=jnp.asarray(state.anchored) | any_finite,
  )


def find(opt_state: Any) -> list[tuple[Any, GafState]]:
  """Path and state of every `GafState` in an optimizer state."""
  is_state = lambda node: isinstance(node, GafState)
  flat, _ = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=is_state)
  return [(path, node) for path, node in flat if is_state(node)]
