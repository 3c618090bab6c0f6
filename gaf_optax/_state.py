"""State: what a step did, kept in the optimizer state, and read as metrics."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gaf_optax import _gram, _options, _threshold, _tree, _validate, rules

# A mean distance or a noise scale up to which micro-gradients are copies of one, but
# for rounding; and how many such steps in a row are worth a warning.
_ROUNDING = 1e-5
_MANY_STEPS = 10


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
    raw_mean_distance: float32 scalar, the mean of the last step's finite distances;
      -1 if there was none. `mean_distance` is the same with NaN.
    accept_rate: float32 scalar in [0, 1], the accepted share of all
      micro-gradients since `init`.
    num_seen_total: float32 scalar, their number.
    skipped_steps: int32 scalar, steps without agreement since `init`.
    nonfinite: int32 scalar, micro-gradients with a NaN or an infinity since
      `init`.
    identical: int32 scalar, steps in a row, up to the last one, whose micro-gradients
      were all copies of one, but for rounding.
    raw_noise_scale: float32 scalar, the gradient noise scale in microbatches of the
      last step; -1 where it cannot be known. `noise_scale` is the same with NaN.
    anchor: with `anchor_decay` the moving average, shaped like the parameters;
      else None.
    anchored: bool scalar, whether the moving average holds a step yet, or None.
    memory: with `memory_decay` a `rules.Memory`, else None.
    raw_distances: float32 `[k]` with `num_microbatches`, else None. -1 where there
      was nothing to compare. The mean over the groups. `distances` is the same with
      NaN.
    accepted: bool `[k]` with `num_microbatches`, else None. Accepted in any
      group.
    weights: float32 `[k]` with `num_microbatches`, else None: the weight of each in
      the result. They sum to 1, or are all 0 without agreement. The mean over the
      groups.
    accept_rates: float32 `[k]` with `num_microbatches`, else None: for each the share
      of the steps since `init` in which it was accepted in any group.
  """

  num_updates: jax.Array
  ready: jax.Array
  threshold: jax.Array
  steered: jax.Array | None
  num_accepted: jax.Array
  num_seen: jax.Array
  raw_mean_distance: jax.Array
  accept_rate: jax.Array
  num_seen_total: jax.Array
  skipped_steps: jax.Array
  nonfinite: jax.Array
  identical: jax.Array
  raw_noise_scale: jax.Array
  anchor: Any
  anchored: jax.Array | None
  memory: Any
  raw_distances: jax.Array | None
  accepted: jax.Array | None
  weights: jax.Array | None
  accept_rates: jax.Array | None

  @property
  def mean_distance(self) -> jax.Array:
    return _or_nan(self.raw_mean_distance)

  @property
  def noise_scale(self) -> jax.Array:
    return _or_nan(self.raw_noise_scale)

  @property
  def distances(self) -> jax.Array | None:
    return None if self.raw_distances is None else _or_nan(self.raw_distances)


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
    each: for each micro-gradient a `rules.Decision` `[k]`, or None where not kept.
  """

  agreed: jax.Array
  num_accepted: jax.Array
  mean_distance: jax.Array
  num_seen: jax.Array
  nonfinite: jax.Array
  identical: jax.Array
  noise_scale: jax.Array
  each: rules.Decision | None


class Agreement(NamedTuple):
  """What was found of k micro-gradients.

  Attributes:
    agreed: bool scalar, whether any two agreed; the gradient is zero if not.
    num_accepted: float32 scalar, how many were accepted (the mean over the groups).
    accepted: bool `[k]`, accepted in any group.
    weights: float32 `[k]`, the weight of each in the gradient: of sum 1, or all 0
      without agreement (the mean over the groups).
    raw_distances: float32 `[k]`, in [0, 2], -1 where there was nothing to compare.
      `distances` is the same with NaN.
    nonfinite: int32 scalar, how many had a NaN or an infinity.
  """

  agreed: jax.Array
  num_accepted: jax.Array
  accepted: jax.Array
  weights: jax.Array
  raw_distances: jax.Array
  nonfinite: jax.Array

  @property
  def distances(self) -> jax.Array:
    return _or_nan(self.raw_distances)


def agreement(step: Outcome) -> Agreement:
  """What a user gets of a step of which each micro-gradient's decision is known."""
  assert step.each is not None
  return Agreement(
    agreed=step.agreed,
    num_accepted=step.num_accepted,
    nonfinite=step.nonfinite,
    **_kept(step.each),
  )


def _kept(each: rules.Decision) -> dict[str, jax.Array]:
  return dict(
    accepted=each.accepted, weights=each.weights, raw_distances=each.distances
  )


def _or_nan(values: jax.Array) -> jax.Array:
  """What users read of distances and noise scales."""
  with jax.debug_nans(False):
    return jnp.where(jnp.asarray(values) == _gram.NOTHING, jnp.nan, values)


def or_nothing(values: jax.Array) -> jax.Array:
  return jnp.where(jnp.isfinite(values), values, _gram.NOTHING).astype(jnp.float32)


def outcome(
  decision: rules.Decision, finite: jax.Array, noise_scale: jax.Array
) -> Outcome:
  """The outcome of a step, from the decision `[m, k]` by group."""
  distances = or_nothing(decision.distances)
  return Outcome(
    agreed=jnp.any(decision.accepted),
    num_accepted=jnp.mean(jnp.sum(decision.accepted, axis=1, dtype=jnp.float32)),
    mean_distance=mean_known(mean_known(distances, axis=1)),
    num_seen=jnp.full((), finite.shape[0], jnp.int32),
    nonfinite=jnp.sum(~finite, dtype=jnp.int32),
    identical=are_copies(noise_scale),
    noise_scale=noise_scale,
    each=over_groups(decision._replace(distances=distances)),
  )


def over_groups(decision: rules.Decision) -> rules.Decision:
  """For each micro-gradient `[k]`, from `[m, k]` by group without NaN."""
  return rules.Decision(
    weights=jnp.mean(decision.weights, axis=0, dtype=jnp.float32),
    accepted=jnp.any(decision.accepted, axis=0),
    distances=mean_known(decision.distances, axis=0),
  )


def mean_known(values: jax.Array, axis: int | None = None) -> jax.Array:
  """Mean of the values that are not `NOTHING`, float32; `NOTHING` without any."""
  known = values != _gram.NOTHING
  number = jnp.sum(known, axis=axis)
  total = jnp.sum(jnp.where(known, values, 0), axis=axis)
  mean = total / jnp.maximum(number, 1).astype(total.dtype)
  return jnp.where(number > 0, mean, _gram.NOTHING).astype(jnp.float32)


def are_copies(difference: jax.Array) -> jax.Array:
  """Whether all are copies of one, by their noise scale or their mean distance."""
  return (difference != _gram.NOTHING) & (difference <= _ROUNDING)


def init(params: Any, options: _options.Options) -> GafState:
  """The state before the first step."""
  steered = isinstance(options.tau, _threshold.TargetAcceptRate)
  k = options.num_microbatches
  # A function each, since a donated state must not hold a buffer twice.
  zero = lambda dtype=jnp.int32: jnp.zeros((), dtype)
  nothing = lambda *shape: jnp.full(shape, _gram.NOTHING, jnp.float32)
  initial = lambda: jnp.array(options.threshold(zero(), None), jnp.float32)
  memory = None
  if options.memory_decay is not None:
    leaves = _tree.flatten(params, None, options.groups, stacked=False)
    memory = options.rule.init(leaves.layout.num_groups, k)
  has_anchor = options.anchor_decay is not None
  return GafState(
    num_updates=zero(),
    ready=zero(bool),
    threshold=initial(),
    steered=initial() if steered else None,
    num_accepted=zero(jnp.float32),
    num_seen=zero(),
    raw_mean_distance=nothing(),
    accept_rate=zero(jnp.float32),
    num_seen_total=zero(jnp.float32),
    skipped_steps=zero(),
    nonfinite=zero(),
    identical=zero(),
    raw_noise_scale=nothing(),
    anchor=_tree.accumulators(params) if has_anchor else None,
    anchored=zero(bool) if has_anchor else None,
    memory=memory,
    raw_distances=None if k is None else nothing(k),
    accepted=None if k is None else jnp.zeros((k,), bool),
    weights=None if k is None else jnp.zeros((k,), jnp.float32),
    accept_rates=None if k is None else jnp.zeros((k,), jnp.float32),
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


def check(state: Any, options: _options.Options) -> None:
  """Raises unless `init` of a transformation with these options made the state.

  Raises:
    ValueError: naming what was found and the likely mistake.
  """
  check_type(state, GafState)
  steered = isinstance(options.tau, _threshold.TargetAcceptRate)
  kept = {
    "tau": (options.tau if steered else None, "steered", state.steered),
    "anchor_decay": (options.anchor_decay, "anchor", state.anchor),
    "memory_decay": (options.memory_decay, "memory", state.memory),
    "num_microbatches": (
      options.num_microbatches,
      "raw_distances",
      state.raw_distances,
    ),
  }
  for name, (option, field, value) in kept.items():
    if (option is None) != (value is None):
      raise ValueError(
        f"{name} is {'not given' if option is None else option}, but the state"
        f" {'has' if option is None else 'lacks'} what it needs ({field}): init of a"
        " transformation with other options made it. Is it a restored one?"
      )
  k = options.num_microbatches
  if k is not None and state.raw_distances.shape != (k,):
    raise ValueError(
      f"num_microbatches is {k}, but the state is of {state.raw_distances.shape[-1]}"
      " micro-gradients: init of a transformation with another number made it."
    )


def advance(
  state: GafState,
  steering: _threshold.TargetAcceptRate | None,
  threshold: jax.Array,
  step: Outcome,
) -> GafState:
  """The state after a step; anchor and memory stay as they are.

  Args:
    state: the state before.
    steering: how tau moves, if it is steered.
    threshold: the tau of this step.
    step: what the step did.
  """
  k = step.num_seen.astype(jnp.float32)
  total = state.num_seen_total + k
  # A running mean, since a float32 count of all that was accepted stops at 2**24.
  rate = state.accept_rate + (step.num_accepted - k * state.accept_rate) / total
  num_updates = optax.safe_increment(state.num_updates)
  threshold = threshold.astype(jnp.float32)
  each = {}
  if state.accept_rates is not None and step.each is not None:
    now = step.each.accepted.astype(jnp.float32)
    moved = (now - state.accept_rates) / num_updates.astype(jnp.float32)
    each = _kept(step.each)
    each["accept_rates"] = jnp.clip(state.accept_rates + moved, 0, 1)
  return state._replace(
    num_updates=num_updates,
    ready=step.agreed,
    threshold=threshold,
    steered=_threshold.steer(
      steering, threshold, step.num_accepted, step.num_seen - step.nonfinite
    ),
    num_accepted=step.num_accepted,
    num_seen=step.num_seen,
    raw_mean_distance=step.mean_distance,
    accept_rate=jnp.clip(rate, 0, 1),
    num_seen_total=total,
    skipped_steps=jnp.where(
      step.agreed,
      state.skipped_steps,
      optax.safe_increment(state.skipped_steps),
    ),
    # A count that would overflow stays where it is.
    nonfinite=jnp.maximum(state.nonfinite + step.nonfinite, state.nonfinite),
    identical=jnp.where(step.identical, optax.safe_increment(state.identical), 0),
    raw_noise_scale=step.noise_scale,
    **each,
  )


def move_anchor(
  state: GafState, layout, decay, means: list[jax.Array], any_finite: jax.Array
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
    * `mean_distance`: mean of the finite distances of the last step, in
      [0, 2], NaN if there was none (float32);
    * `threshold`: tau of the last step (float32);
    * `agreed`: whether the last step agreed (bool);
    * `skipped_steps`: steps without agreement since `init` (int32);
    * `nonfinite`: micro-gradients with a NaN or an infinity since `init`
      (int32);
    * `identical`: steps in a row, up to the last one, in which all micro-gradients
      were copies of one (int32): they were averaged before, and the filter does
      nothing. From ten on, reading them outside `jit` warns as well;
    * `noise_scale`: the simple gradient noise scale of the last step (float32): the
      number of microbatches whose mean is as much noise as gradient. It comes from
      the inner products of all finite micro-gradients, accepted or not. Inf where
      they have nothing in common, NaN where it cannot be known: in streamed forms,
      and with fewer than two finite ones.

    With `JAX_DEBUG_NANS` call it outside `jit`, since JAX reports every NaN that
    compiled code returns. The state itself holds none.

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
  warn_if_identical(state, stacklevel=3)
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
    "identical": state.identical,
    "noise_scale": state.noise_scale,
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
      majority. That is 1 minus the distance of `rules.min_neighbors((k // 2 + 1) / k)`
      (for k = 8 the same as `min_neighbors(0.6)`). A pair that was never compared
      counts as orthogonal. The mean over the groups; NaN for a source that was never
      compared with another;
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
    agreement, num_steps = rules.majority(state.memory)
    agreement = jnp.nanmean(agreement, axis=0)
  return {
    "agreement": agreement,
    "accept_rate": jnp.asarray(state.accept_rates),
    "num_steps": jnp.mean(num_steps, axis=0),
  }


def warn_if_identical(state: GafState, stacklevel: int) -> None:
  """Warns of micro-gradients that are copies of one, if that is known by now."""
  number: Any = state.identical
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


def find(opt_state: Any) -> list[tuple[Any, GafState]]:
  """Path and state of every `GafState` in an optimizer state."""
  is_state = lambda node: isinstance(node, GafState)
  flat, _ = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=is_state)
  return [(path, node) for path, node in flat if is_state(node)]


def _the_one(opt_state: Any) -> GafState:
  """The one `GafState` in an optimizer state."""
  found = find(opt_state)
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
