"""Stream: GAF on micro-gradients that come one at a time, with one running mean."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gaf_optax import (
  _gram,
  _leaves,
  _numerics,
  _options,
  _state,
  _threshold,
  _transform,
  _validate,
  rules,
)


class Stream(NamedTuple):
  """What is kept of the micro-gradients of a cycle so far; m groups.

  Attributes:
    means: like the parameters, the weighted mean of what each leaf's group
      accepted.
    embedded: with `embed`, the same of the embedded leaves, else None.
    plain: with an anchor, the mean of all finite ones, else None.
    total: `[m]`, the sums of the weights.
    num_accepted: int32 `[m]`.
    distance_sum: float32 `[m]`, over the micro-gradients that were compared.
    compared: int32 `[m]`, how many those are.
    seen: int32 scalar.
    finite: int32 scalar, how many of those seen are finite.
  """

  means: Any
  embedded: Any
  plain: Any
  total: jax.Array
  num_accepted: jax.Array
  distance_sum: jax.Array
  compared: jax.Array
  seen: jax.Array
  finite: jax.Array


class Comparison(NamedTuple):
  """What was found of one micro-gradient: `[m]` by group, and a bool scalar."""

  accepted: jax.Array
  distances: jax.Array
  finite: jax.Array


def start(params: Any, options: _options.Options) -> Stream:
  """An empty stream for micro-gradients shaped like the parameters."""
  leaves = _leaves.read(params, None, options.groups, stacked=False)
  zeros = lambda: _leaves.accumulators(params)
  m = leaves.layout.num_groups
  dtype = _numerics.real_accumulator_dtype(x.dtype for x in leaves.arrays)
  with_anchor = options.anchor_decay is not None
  return Stream(
    means=zeros(),
    embedded=zeros() if options.embed and not with_anchor else None,
    plain=zeros() if with_anchor else None,
    total=jnp.zeros((m,), dtype),
    num_accepted=jnp.zeros((m,), jnp.int32),
    distance_sum=jnp.zeros((m,), jnp.float32),
    compared=jnp.zeros((m,), jnp.int32),
    seen=jnp.zeros((), jnp.int32),
    finite=jnp.zeros((), jnp.int32),
  )


@functools.partial(jax.jit, static_argnames=("rule", "embed", "layout"))
def push(
  stream: Stream,
  arrays: Sequence[jax.Array],
  threshold: jax.Array,
  anchor: Sequence[jax.Array] | None = None,
  anchored: jax.Array | None = None,
  *,
  rule: Any,
  embed: Any,
  layout: _leaves.Layout,
) -> tuple[Stream, Comparison]:
  """Compares one micro-gradient with the stream, or the anchor, and takes it up."""
  dtype = stream.total.dtype
  if anchor is not None:
    gram, finite = _pair(anchor, arrays, layout, embed)
    pair_valid = jnp.ones((1,), bool)
    decision = rules.decide_groups(None, gram, pair_valid, threshold, anchored)
    distances, accepted = decision.distances[:, 0], decision.accepted[:, 0]
    keep, add = 1, accepted
  else:
    values = arrays
    if embed is not None:
      values = [_gram.embedded(x, embed, dtype) for x in arrays]
    kept = stream.means if embed is None else stream.embedded
    means = _leaves.pick(kept, layout)
    gram, finite = _pair(means, values, layout, None, unread=arrays)
    first = stream.total == 0
    distances = _numerics.distance(
      rule.distance,
      gram.products[:, 0, 1],
      gram.products[:, 0, 0],
      gram.products[:, 1, 1],
      tau=threshold,
      shift=gram.exponents[:, 1] - gram.exponents[:, 0],
    )
    keep, add, accepted = rule.merge(distances, threshold, first)
    distances = jnp.where(first, jnp.nan, distances)
  accepted &= finite
  distances = jnp.where(finite, distances, jnp.nan)
  before = jnp.where(finite, keep, 1).astype(dtype) * stream.total
  add = jnp.where(finite, add, 0).astype(dtype)
  total = before + add

  # One more slot at the end: the mean of all finite ones, which leaves of no group
  # have and which moves the anchor.
  number = stream.finite.astype(dtype)
  after = jnp.append(total, number + finite)
  after = jnp.where(after > 0, after, 1)
  keeps = jnp.append(before, number) / after
  adds = jnp.append(add, finite.astype(dtype)) / after

  def taken_up(tree, values, members):
    mixed = [
      _mixed(mean, keeps[g], value, adds[g])
      for mean, value, g in zip(_leaves.pick(tree, layout), values, members)
    ]
    return _leaves.put(tree, layout, mixed)

  members = layout.members
  all_plain = (layout.num_groups,) * len(members)
  compared = jnp.isfinite(distances)
  stream = Stream(
    means=taken_up(stream.means, arrays, members),
    embedded=None
    if stream.embedded is None
    else taken_up(stream.embedded, values, members),
    plain=None if stream.plain is None else taken_up(stream.plain, arrays, all_plain),
    total=total,
    num_accepted=stream.num_accepted + accepted,
    distance_sum=stream.distance_sum
    + jnp.where(compared, distances, 0).astype(jnp.float32),
    compared=stream.compared + compared,
    seen=stream.seen + 1,
    finite=stream.finite + finite,
  )
  return stream, Comparison(accepted, distances.astype(jnp.float32), finite)


def _pair(left, right, layout, embed, unread=()):
  """The Gram of two vectors, and whether the second is finite.

  `unread` are the leaves of the second as they were before an embedding.
  """
  pairs = [(a[None], b[None]) for a, b in zip(left, right)]
  pairs += [(jnp.zeros_like(x)[None], x[None]) for x in unread]
  members = layout.members + (layout.num_groups,) * len(unread)
  gram, finite = _gram.gram(pairs, members, layout.num_groups, embed)
  return gram, finite[1]


def _mixed(mean, keep, value, add):
  """`keep * mean + add * value`, without a value that is not taken up."""
  real = jnp.finfo(mean.dtype).dtype
  value = jnp.where(add != 0, value.astype(mean.dtype), 0)
  mixed = keep.astype(real) * mean + add.astype(real) * value
  return _numerics.without_overflow(mixed)


def finish(
  stream: Stream,
  arrays: Sequence[jax.Array],
  layout: _leaves.Layout,
  least: int,
) -> tuple[list[jax.Array], jax.Array]:
  """The result of a cycle, of the dtypes of `arrays`, and bool `[m]`: who agreed.

  `least` is how many micro-gradients have to be accepted.
  """
  agreed = stream.num_accepted >= least
  slots = jnp.append(agreed, True)
  results = [
    jnp.where(slots[g], mean, 0).astype(x.dtype)
    for mean, x, g in zip(_leaves.pick(stream.means, layout), arrays, layout.members)
  ]
  return results, agreed


class MultiStepsState(NamedTuple):
  """State of `multi_steps`.

  Attributes:
    mini_step: int32 scalar, micro-gradients seen in this cycle, in [0, every_k).
    gaf_state: a `GafState` of the last finished cycle, whose `ready` is False
      within a cycle.
    inner_state: the state of the inner transformation.
    stream: the running mean of this cycle.
    cycle_distances: float32 `[m, k]` of this cycle with `num_microbatches`, or
      None.
    cycle_accepted: bool `[m, k]` likewise.
  """

  mini_step: jax.Array
  gaf_state: _state.GafState
  inner_state: Any
  stream: Stream
  cycle_distances: jax.Array | None
  cycle_accepted: jax.Array | None


@_options.spelled_out(_transform.gaf)
def multi_steps(
  inner: optax.GradientTransformation,
  every_k: int | Callable[[jax.Array], jax.Array],
  tau: Any = 0.97,
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  """Takes one micro-gradient a call and runs `inner` on every k-th, if they agree.

  The drop-in for `optax.MultiSteps`: calls before the k-th of a cycle emit zero
  updates, the k-th emits the update of `inner` for the filtered mean of the k
  micro-gradients. One running mean is kept, whatever k is (with `embed` a second
  one, with `anchor_decay` the moving average and a second one). A rejected
  micro-gradient uses up its slot. A cycle without agreement emits zeros and leaves
  the state of `inner` as it was.

  Args:
    inner: the transformation that takes the filtered gradient.
    every_k: micro-gradients in a cycle, at least 2 (1 with an anchor), or a
      function from the number of finished cycles to it.
    tau: see :func:`gaf`; a schedule is called with the number of finished cycles.
    **options: `rule` (`rules.sequential()` or `rules.running_average()`),
      `embed`, `groups`, `anchor_decay` and `num_microbatches`, see :func:`gaf`.

  Returns:
    A transformation whose `update(micro_grad, state, params=None)` takes and
    returns leaves shaped like the parameters. Extra arguments go to `inner`.
    :func:`metrics` reads its state and speaks of the last finished cycle.

  Raises:
    ValueError: for arguments outside their ranges, and for a rule that has to see
      all micro-gradients at once.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from gaf_optax import multi_steps
    >>> tx = multi_steps(optax.sgd(1.0), every_k=2)
    >>> state = tx.init(jnp.zeros(2))
    >>> updates, state = tx.update(jnp.array([2.0, 0.0]), state)
    >>> print(updates)
    [0. 0.]
    >>> updates, state = tx.update(jnp.array([2.0, 2.0]), state)
    >>> print(updates)
    [-2. -1.]

  References:
    Chaubard et al., `Beyond Gradient Averaging in Parallel Optimization
    <https://arxiv.org/abs/2412.18052>`_, 2024, algorithm 1.
  """
  checked = _streamed_options(tau, **options)
  least = 1 if checked.anchor_decay is not None else 2
  if not callable(every_k):
    _validate.count(least, every_k=every_k)
    if checked.num_microbatches not in (None, every_k):
      raise ValueError(
        f"num_microbatches is {checked.num_microbatches}, but every_k is {every_k}."
      )
  elif checked.num_microbatches is not None:
    raise ValueError(
      "num_microbatches needs a fixed every_k, since it sets the shape of the"
      f" state; got the function {every_k!r}."
    )
  inner = optax.with_extra_args_support(inner)
  target = tau if isinstance(tau, _threshold.TargetAcceptRate) else None

  def fresh(params):
    stream = start(params, checked)
    if checked.num_microbatches is None:
      return stream, None, None
    shape = (stream.total.shape[0], checked.num_microbatches)
    return (
      stream,
      jnp.full(shape, jnp.nan, jnp.float32),
      jnp.zeros(shape, bool),
    )

  def init_fn(params):
    stream, distances, accepted = fresh(params)
    return MultiStepsState(
      mini_step=jnp.zeros((), jnp.int32),
      gaf_state=_state.init(
        params, tau, checked.anchor_decay, checked.num_microbatches
      ),
      inner_state=inner.init(params),
      stream=stream,
      cycle_distances=distances,
      cycle_accepted=accepted,
    )

  def update_fn(micro_grad, state, params=None, **extra_args):
    gaf_state = state.gaf_state
    _leaves.check_not_empty(micro_grad)
    like = state.stream.means if params is None else params
    leaves = _leaves.read(micro_grad, like, checked.groups, stacked=False)
    if not leaves.arrays:
      return leaves.rebuild([]), state
    if (leaves.layout.num_groups,) != state.stream.total.shape:
      raise ValueError(
        f"groups made {leaves.layout.num_groups} groups of the micro-gradient's"
        f" leaves, but {state.stream.total.shape[0]} of the parameters' leaves at"
        " init. Is a leaf missing, or does the label depend on more than path,"
        " shape and dtype?"
      )
    threshold = _threshold.value(tau, gaf_state.num_updates, gaf_state.steered)
    anchor = None
    if checked.anchor_decay is not None:
      anchor = _leaves.pick(gaf_state.anchor, leaves.layout)
    stream, found = push(
      state.stream,
      leaves.arrays,
      threshold,
      anchor,
      gaf_state.anchored,
      rule=checked.rule,
      embed=checked.embed,
      layout=leaves.layout,
    )
    distances, accepted = state.cycle_distances, state.cycle_accepted
    if distances is not None:
      distances = distances.at[:, state.mini_step].set(found.distances)
      accepted = accepted.at[:, state.mini_step].set(found.accepted)
    k = every_k(gaf_state.num_updates) if callable(every_k) else every_k

    def end_of_cycle():
      means, agreed = finish(stream, leaves.arrays, leaves.layout, least)
      step = _outcome(stream, agreed, distances, accepted)
      new_state = gaf_state
      if checked.anchor_decay is not None:
        new_state = _state.move_anchor(
          gaf_state,
          leaves.layout,
          checked.anchor_decay,
          _leaves.pick(stream.plain, leaves.layout),
          stream.finite > 0,
        )
      new_state = _state.advance(new_state, target, threshold, step)
      updates, inner_state = _transform.run_if(
        step.agreed,
        inner,
        leaves.rebuild(means),
        state.inner_state,
        params,
        extra_args,
      )
      return updates, MultiStepsState(
        jnp.zeros((), jnp.int32),
        new_state,
        inner_state,
        jax.tree.map(jnp.zeros_like, state.stream),
        distances,
        accepted,
      )

    def within_cycle():
      updates = optax.tree.zeros_like(jax.eval_shape(end_of_cycle)[0])
      return updates, MultiStepsState(
        state.mini_step + 1,
        # Nothing is ready for what may follow, until the end of the cycle.
        gaf_state._replace(ready=jnp.zeros((), bool)),
        state.inner_state,
        stream,
        distances,
        accepted,
      )

    return jax.lax.cond(state.mini_step + 1 >= k, end_of_cycle, within_cycle)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _outcome(stream, agreed, distances, accepted):
  """The outcome of a cycle; the last two `[m, k]`, or None where not kept."""
  compared = jnp.maximum(stream.compared, 1)
  mean = jnp.where(stream.compared > 0, stream.distance_sum / compared, jnp.nan)
  member_distances = member_accepted = None
  if distances is not None:
    member_distances = _state.nanmean(distances, axis=0)
    member_accepted = jnp.any(accepted & agreed[:, None], axis=0)
  return _state.Outcome(
    jnp.any(agreed),
    jnp.mean(jnp.where(agreed, stream.num_accepted, 0).astype(jnp.float32)),
    _state.nanmean(mean),
    stream.seen,
    stream.seen - stream.finite,
    member_distances,
    member_accepted,
  )


class Agreement(NamedTuple):
  """What `value_and_grad` found of k microbatches.

  Attributes:
    agreed: bool scalar, whether any two agreed; the gradient is zero if not.
    accepted: float32 scalar, how many micro-gradients were accepted (the mean over
      the groups).
    distances: float32 `[k]`, in [0, 2], NaN where there was nothing to compare.
    nonfinite: int32 scalar, how many had a NaN or an infinity.
  """

  agreed: jax.Array
  accepted: jax.Array
  distances: jax.Array
  nonfinite: jax.Array


@_options.spelled_out(_transform.gaf)
def value_and_grad(
  fun: Callable[..., Any],
  num_microbatches: int,
  tau: Any = 0.97,
  *,
  argnums: int | Sequence[int] = 0,
  batch_argnums: int | Sequence[int] = 1,
  has_aux: bool = False,
  **options: Any,
) -> Callable[..., Any]:
  """`jax.value_and_grad` over microbatches, filtered while it goes.

  Splits the batch into k microbatches of consecutive rows, visits one after the
  other in a `jax.lax.scan`, and keeps one running mean of the micro-gradients that
  agree (with `embed` a second one), so that memory does not grow with k.

  Args:
    fun: a function whose value is a scalar, or a pair of one and auxiliary output
      with `has_aux`.
    num_microbatches: k, at least 2; divides the leading axis of the batch.
    tau: the largest distance that is accepted, in [0, 2]: a float or a scalar
      array, traced or not.
    argnums: which positional arguments to differentiate with respect to.
    batch_argnums: which positional arguments hold the batch: pytrees of arrays
      `[batch, ...]`.
    has_aux: whether `fun` returns a pair.
    **options: `rule` (`rules.sequential()` or `rules.running_average()`), `embed`
      and `groups`, see :func:`gaf`.

  Returns:
    A function with the signature of `fun` that returns `(value, grads, agreement)`,
    or `((value, aux), grads, agreement)` with `has_aux`. `value` is the mean over
    all microbatches, leaves of `aux` are stacked `[k, ...]`, `grads` is like the
    arguments, zero where no two micro-gradients agree, and `agreement` is an
    :class:`Agreement`.

  Raises:
    ValueError: for arguments outside their ranges, for a rule that has to see all
      micro-gradients at once, and for `anchor_decay`, since there is no state to
      hold the average (:func:`multi_steps` has one). The returned function raises
      it for a batch whose leading axis k does not divide.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gaf_optax import value_and_grad
    >>> loss = lambda w, x, y: jnp.mean((x @ w - y) ** 2)
    >>> x, y = jnp.ones((8, 3)), jnp.ones(8)
    >>> value, grads, agreement = value_and_grad(
    ...     loss, 4, batch_argnums=(1, 2))(jnp.zeros(3), x, y)
    >>> print(value, grads, agreement.accepted)
    1.0 [-2. -2. -2.] 4.0

  References:
    Chaubard et al., `Beyond Gradient Averaging in Parallel Optimization
    <https://arxiv.org/abs/2412.18052>`_, 2024, algorithm 1.
  """
  _validate.function(fun=fun)
  _validate.count(
    2,
    " One micro-gradient alone has nothing to compare with.",
    num_microbatches=num_microbatches,
  )
  _validate.scalar(
    " A schedule or a target_accept_rate needs a state; pass the value itself.",
    tau=tau,
  )
  if options.get("anchor_decay") is not None:
    raise ValueError(
      "value_and_grad keeps no state from one call to the next, so anchor_decay"
      f"={options['anchor_decay']!r} has nowhere to keep its average. Use"
      " multi_steps or gaf."
    )
  checked = _streamed_options(tau, **options)
  batch_args = _positions(batch_argnums, "batch_argnums")
  wanted_args = _positions(argnums, "argnums")
  both = set(batch_args) & set(wanted_args)
  if both:
    raise ValueError(f"argument {min(both)} is named in argnums and in batch_argnums.")
  differentiate = jax.value_and_grad(fun, argnums, has_aux=has_aux)
  k = int(num_microbatches)

  def filtered(*args, **kwargs):
    threshold = jnp.asarray(tau, float)
    wanted: Any = tuple(args[i] for i in wanted_args)
    if not isinstance(argnums, Sequence):
      (wanted,) = wanted
    batch = [_split(args, i, k) for i in batch_args]

    def visit(stream, microbatch):
      own = list(args)
      for i, value in zip(batch_args, microbatch):
        own[i] = value
      out, grads = differentiate(*own, **kwargs)
      leaves = _leaves.read(grads, wanted, checked.groups, stacked=False)
      stream, found = push(
        stream,
        leaves.arrays,
        threshold,
        rule=checked.rule,
        embed=checked.embed,
        layout=leaves.layout,
      )
      return stream, (out, found)

    like = _leaves.read(wanted, None, checked.groups, stacked=False)
    empty = _numerics.typed(start(wanted, checked), _numerics.typed_zero(wanted))
    stream, (out, found) = jax.lax.scan(visit, empty, batch)
    means, agreed = finish(stream, like.arrays, like.layout, 2)
    step = _outcome(stream, agreed, found.distances.T, found.accepted.T)
    values, aux = out if has_aux else (out, None)
    value = jnp.mean(values, axis=0)
    agreement = Agreement(
      step.agreed, step.accepted, step.member_distances, step.nonfinite
    )
    return (value, aux) if has_aux else value, like.rebuild(means), agreement

  return filtered


def _streamed_options(tau, **options) -> _options.Options:
  """Checked options, without the rules that need all micro-gradients at once."""
  checked = _options.checked(tau, **options)
  if checked.anchor_decay is None and not isinstance(
    checked.rule, rules.SequentialRule
  ):
    raise ValueError(
      f"rule {checked.rule!r} has to see all micro-gradients at once. Streamed"
      " micro-gradients are compared with a running sum: use rules.sequential(),"
      " rules.running_average() or anchor_decay, or stack them and use gaf."
    )
  return checked


def _positions(argnums, name):
  try:
    return (operator.index(argnums),)
  except TypeError:
    pass
  try:
    return tuple(operator.index(i) for i in argnums)
  except TypeError:
    raise ValueError(
      f"{name} must be an int or a sequence of ints, got {argnums!r}."
    ) from None


def _split(args, position, k):
  """The batch argument with its leading axis split in `[k, batch // k]`."""
  if not -len(args) <= position < len(args):
    raise ValueError(
      f"batch_argnums names argument {position}, but there are {len(args)}"
      " positional arguments. Batch arguments are passed by position."
    )

  def split(path, leaf):
    shape = _leaves.leaf_shape(leaf)
    if not shape or shape[0] % k or not shape[0]:
      raise ValueError(
        f"batch argument {position}{jax.tree_util.keystr(path)} has shape"
        f" {shape}: its leading axis does not split into {k} microbatches of"
        " equal size."
      )
    return jnp.reshape(leaf, (k, shape[0] // k, *shape[1:]))

  return jax.tree_util.tree_map_with_path(split, args[position])
