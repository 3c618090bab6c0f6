"""GAF: the public face: one aggregator, and one that skips steps without agreement."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from gaf_optax import _filter, _jax_types, _options, _state, _tree, rules


def gaf(
  tau: _options.Tau = 0.97,
  *,
  rule: rules.RuleFn | None = None,
  embed: Callable[[jax.Array], jax.Array] | None = None,
  axis_name: _options.AxisNames | None = None,
  param_axes: _options.ParamAxes = (),
  stacked: bool | None = None,
  groups: _options.Groups | None = None,
  anchor_decay: float | None = None,
  memory_decay: float | None = None,
  num_microbatches: int | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Gradient Agreement Filtering: averages the micro-gradients that agree.

  An aggregator: takes k micro-gradients and gives one gradient. Compares them by
  cosine distance over the whole pytree, drops those that are farther than tau,
  averages the rest, and gives a zero gradient where no two agree:

  .. math::
    d_i = 1 - \frac{\langle s, g_i \rangle}{|s| |g_i|}, \qquad
    s \leftarrow s + g_i \text{ if } d_i \le \tau

  starting from :math:`s = g_1`; the result is s divided by the number of its
  terms. It is the first link of a chain, `optax.chain(gaf(0.97), optax.sgd(0.1))`.
  On a step without agreement the rest of that chain sees a zero gradient:
  momentum coasts, weight decay and Adam's counter go on. To leave them as they
  were, as the paper does, use :func:`apply_if_agreed`.

  What it guarantees:

  ============================================  ==================================
  micro-gradient with NaN or an infinity        never accepted, never in the result
  zero micro-gradient                           at distance 1 from every other
  distance equal to tau                         accepted
  tau = 2                                       the mean of the finite ones
  every value times 1e-30 or 1e+30              the same decision
  bfloat16, float16 leaves                      sums in float32, result as the leaf
  complex leaves                                real part of the Hermitian product
  integer and `float0` leaves                   no part; zeros
  `None`, `optax.MaskedNode`                    passed through
  ============================================  ==================================

  `optax.MultiSteps`, `optax.apply_if_finite` and `optax.flatten` cannot wrap a
  chain that starts with `gaf`; they belong inside it, after `gaf` (for
  accumulation there is :func:`multi_steps`, and micro-gradients that are not
  finite are dropped anyway). `optax.masked` leaves the leaves outside its mask
  stacked; to exclude leaves use `groups`.

  Args:
    tau: the largest distance that is accepted, in [0, 2]: a float, an
      `optax.Schedule` (called with the number of updates seen), or a
      :func:`target_accept_rate`. The useful range is 0.92 to 1.0 for most models;
      small microbatches and few classes can want less.
    rule: how the micro-gradients are compared: `rules.sequential()` (the
      default, above), another rule of :mod:`gaf_optax.rules`, or any callable
      `(gram [k, k], valid [k] bool, tau) -> rules.Decision`. `valid` is False for
      micro-gradients that are not finite, whose rows and columns are zero; the
      Gram matrix is scaled so that the largest norm is 1.
    embed: an elementwise function, applied to each leaf before the inner products
      and to nothing else. With `jnp.sign` the cosine distance is twice the share
      of coordinates whose signs differ.
    axis_name: the name of a mapped axis, or a tuple of names, where each replica
      (device) calls `update` with its own micro-gradient, shaped like the
      parameters: inside `jax.pmap`, `jax.shard_map` or `jax.vmap`. All replicas get
      the same result, typed as replicated. k is the number of replicas, ordered
      row-major over `axis_name`. What is sent: the volume of `jax.lax.pmean` and one
      k x k matrix; with an anchor half as much again. (As compiled for TPU, XLA
      still sends 1.5 times as much.)
    param_axes: the name of a mesh axis, or a tuple of names, over which the
      parameters themselves are sharded. Inner products are summed over them, a
      leaf that is replicated over such an axis counted once. Without the
      replication check of `jax.shard_map` the types do not tell which leaves are
      replicated: give a tree of the parameters' `PartitionSpec` instead of names,
      or a prefix of it.
    stacked: with `axis_name`, whether each replica holds several micro-gradients,
      leaves `[k_local, *shape]`, of which all n * k_local are filtered together, in
      replica order. (Filtering first on each device and then across devices is a
      chain of two `gaf`.)
    groups: None for one decision over the whole tree, 'leaf' for one for each
      leaf, or a function `(path, leaf) -> label` for one for each label, where
      `path` is a JAX key path and `leaf` a `jax.ShapeDtypeStruct` of the
      parameter's shape. Leaves of label None take no part in any decision and are
      averaged over all finite micro-gradients. The step has agreed when any group
      has; a group without agreement gives zeros.
    anchor_decay: in [0, 1). Each micro-gradient is compared with an exponential
      moving average of the past steps' plain means instead of with the others,
      which needs one more copy of the parameters but works for k = 1. The first
      step accepts. Excludes `rule`.
    memory_decay: in [0, 1). The rule decides on the running mean of the cosines of
      all steps instead of those of this step, for micro-gradients whose position means
      something: the i-th always comes from the same source (device, shard,
      annotator). With 0.98, some fifty steps show what one step's noise hides. For
      each pair, on the steps where both are finite and not zero,
      `weight <- memory_decay * weight + 1; mean <- mean + (cosine - mean) / weight`.
      A pair that was never compared counts as orthogonal. Needs `num_microbatches`;
      excludes `anchor_decay`. The state holds `[m, k, k]` numbers more
      (`state.memory`, of which :func:`sources` makes a table) and nothing more is
      sent.
    num_microbatches: k. When given, the state holds the last step's `distances`,
      `accepted` and `weights` for each micro-gradient, and its `accept_rates` since
      `init`.

  Returns:
    A transformation whose `update(micro_grads, state, params=None)` takes leaves
    `[k, *shape]` (`[*shape]` with `axis_name`) and returns leaves `[*shape]` of the
    same dtypes. Stacks that are sharded over an Explicit mesh are filtered where
    they are, and the result is sharded as they are without their leading axis.
    Extra arguments are ignored. Its state is a :class:`GafState`; :func:`metrics`
    reads it.

  Raises:
    ValueError: for arguments outside their ranges. `update` raises it for leaves
      that are not stacked or differ in k, for an empty tree, for k = 1 without an
      anchor and for a k other than `num_microbatches`; across devices also for an
      axis that is not bound and, under the replication check, for gradients that
      do not vary over `axis_name`: those of replicated parameters are summed
      already (`jax.lax.pcast(params, axis_name, to='varying')` before `jax.grad`).

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from gaf_optax import gaf
    >>> loss = lambda w, x, y: jnp.mean((x @ w - y) ** 2)
    >>> x = jax.random.normal(jax.random.key(0), (4, 8, 3))  # 4 microbatches of 8
    >>> y = x @ jnp.array([1.0, -2.0, 3.0])
    >>> tx = optax.chain(gaf(0.97), optax.sgd(0.1))
    >>> w = jnp.zeros(3)
    >>> state = tx.init(w)
    >>> for _ in range(50):
    ...   grads = jax.vmap(jax.grad(loss), (None, 0, 0))(w, x, y)
    ...   updates, state = tx.update(grads, state, w)
    ...   w = optax.apply_updates(w, updates)
    >>> print(jnp.round(w, 2))
    [ 1. -2.  3.]

    One micro-gradient on each device:

    >>> mesh = jax.make_mesh((jax.device_count(),), ('data',),
    ...                      axis_types=(jax.sharding.AxisType.Auto,))
    >>> tx = optax.chain(gaf(0.97, axis_name='data'), optax.sgd(0.1))
    >>> def step(w, state, x, y):
    ...   grads = jax.grad(loss)(jax.lax.pcast(w, 'data', to='varying'), x, y)
    ...   updates, state = tx.update(grads, state, w)
    ...   return optax.apply_updates(w, updates), state
    >>> P = jax.sharding.PartitionSpec
    >>> step = jax.jit(jax.shard_map(step, mesh=mesh,
    ...   in_specs=(P(), P(), P('data'), P('data')), out_specs=P()))

  References:
    Chaubard et al., `Beyond Gradient Averaging in Parallel Optimization
    <https://arxiv.org/abs/2412.18052>`_, 2024.
  """
  options = _options.checked(
    tau,
    rule=rule,
    embed=embed,
    axis_name=axis_name,
    param_axes=param_axes,
    stacked=stacked,
    groups=groups,
    anchor_decay=anchor_decay,
    memory_decay=memory_decay,
    num_microbatches=num_microbatches,
  )

  def init_fn(params):
    return _state.init(params, options)

  def update_fn(micro_grads, state, params=None, **extra_args):
    del extra_args
    _state.check(state, options)
    _state.warn_if_identical(state, stacklevel=3)
    _tree.check_not_empty(micro_grads)
    leaves = _tree.flatten(
      micro_grads,
      state.anchor if params is None else params,
      options.groups,
      stacked=options.stacked,
      per_replica=bool(options.axis_names),
    )
    if not leaves.arrays:  # Placeholders or integers: there is nothing to filter.
      return leaves.unflatten([]), state
    plan = options.plan(leaves)
    _check_number((leaves.k or 1) * plan.axes.num_replicas(), options)
    if state.anchor is not None:
      _tree.check_kept(state.anchor, leaves)
    if state.memory is not None:
      _tree.check_num_groups(plan.layout, state.memory.mean.shape[0])
    means, state = _filter.step(
      leaves.arrays,
      state,
      options.threshold(state.num_updates, state.steered),
      options.anchor_decay,
      options.memory_decay,
      plan=plan,
    )
    return leaves.unflatten(means), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class ApplyIfAgreedState(NamedTuple):
  """State of `apply_if_agreed`.

  Attributes:
    gaf_state: a `GafState`.
    inner_state: the state of the inner transformation.
  """

  gaf_state: _state.GafState
  inner_state: Any


@_options.shown(gaf, _options.StackOptions)
def apply_if_agreed(
  inner: optax.GradientTransformation,
  tau: _options.Tau = 0.97,
  **gaf_options: Unpack[_options.StackOptions],
) -> optax.GradientTransformationExtraArgs:
  """`gaf` followed by `inner`, which is left out on steps without agreement.

  As `optax.chain(gaf(tau), inner)`, but on a step without agreement `inner` is not
  run: the update is zero and its state stays as it was. That is what the paper's
  algorithm does.

  ==================  ==========================  =======================
  without agreement   `chain(gaf(), inner)`       `apply_if_agreed(inner)`
  ==================  ==========================  =======================
  momentum            decays, moves the weights   stays, moves nothing
  weight decay        goes on                     pauses
  Adam's moments      decay                       stay
  Adam's counter      goes on                     stays
  schedules in inner  go on                       pause
  ==================  ==========================  =======================

  Args:
    inner: the transformation that takes the filtered gradient.
    tau: see :func:`gaf`.
    **gaf_options: the other arguments of :func:`gaf`.

  Returns:
    A transformation like that of :func:`gaf`. Extra arguments go to `inner`.

  Raises:
    ValueError: as :func:`gaf`.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from gaf_optax import apply_if_agreed
    >>> tx = apply_if_agreed(optax.adam(0.1), tau=0.97)
    >>> state = tx.init(jnp.zeros(2))
    >>> opposed = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
    >>> updates, state = tx.update(opposed, state)
    >>> print(updates, int(optax.tree.get(state, 'count')))
    [0. 0.] 0

  References:
    Chaubard et al., `Beyond Gradient Averaging in Parallel Optimization
    <https://arxiv.org/abs/2412.18052>`_, 2024, algorithm 1.
  """
  outer = gaf(tau, **gaf_options)
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    return ApplyIfAgreedState(outer.init(params), init_inner(inner, params))

  def update_fn(micro_grads, state, params=None, **extra_args):
    _state.check_type(state, ApplyIfAgreedState)
    grads, gaf_state = outer.update(micro_grads, state.gaf_state, params)
    updates, inner_state = run_if(
      gaf_state.ready, inner, grads, state.inner_state, params, extra_args
    )
    return updates, ApplyIfAgreedState(gaf_state, inner_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class ApplyIfNonzeroState(NamedTuple):
  """State of `apply_if_nonzero`.

  Attributes:
    skipped_steps: int32 scalar, steps with a gradient of zeros since `init`.
    inner_state: the state of the inner transformation.
  """

  skipped_steps: jax.Array
  inner_state: Any


def apply_if_nonzero(
  inner: optax.GradientTransformation, *, param_axes: Any = ()
) -> optax.GradientTransformationExtraArgs:
  """`inner`, which is left out on steps whose gradient is all zeros.

  For what :func:`value_and_grad` returns, whose gradient is exactly zero where no two
  micro-gradients agreed. `inner` then is not run, as with :func:`apply_if_agreed`: the
  update is zero and its state stays as it was. Nothing but the gradient has to be
  passed on, so that it fits any trainer: `TrainState.apply_gradients(grads=grads)`,
  `nnx.Optimizer.update(model, grads)`, `tx.update(grads, state, params)`.

  Args:
    inner: the transformation that takes the filtered gradient.
    param_axes: under `jax.shard_map` the name of the mesh axis, or a tuple of names,
      over which the parameters are sharded: `inner` is run where any device's part of
      the gradient is not zero.

  Returns:
    A transformation whose state is an :class:`ApplyIfNonzeroState`. Extra arguments go
    to `inner`.

  Raises:
    ValueError: if `inner` has a filter in it, whose place is in front.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from gaf_optax import apply_if_nonzero, value_and_grad
    >>> loss = lambda w, x: jnp.mean(x @ w)
    >>> tx = apply_if_nonzero(optax.adam(0.1))
    >>> w = jnp.zeros(2)
    >>> state = tx.init(w)
    >>> opposed = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
    >>> _, grads, agreement = value_and_grad(loss, num_microbatches=2)(w, opposed)
    >>> updates, state = tx.update(grads, state, w)
    >>> print(agreement.agreed, updates, state.skipped_steps)
    False [0. 0.] 1
  """
  inner = optax.with_extra_args_support(inner)
  names = _options.as_names("param_axes", param_axes)

  def init_fn(params):
    inner_state = init_inner(inner, params)
    return ApplyIfNonzeroState(jnp.zeros((), jnp.int32), inner_state)

  def update_fn(grads, state, params=None, **extra_args):
    _state.check_type(state, ApplyIfNonzeroState)
    leaves = [x for x in jax.tree.leaves(grads) if x.dtype != jax.dtypes.float0]
    nonzero = functools.reduce(
      jnp.logical_or, [jnp.any(x != 0) for x in leaves], jnp.zeros((), bool)
    )
    if names:
      nonzero = jax.lax.psum(nonzero.astype(jnp.int32), names) > 0
    updates, inner_state = run_if(
      nonzero, inner, grads, state.inner_state, params, extra_args
    )
    skipped = optax.safe_increment(state.skipped_steps)
    skipped = jnp.where(nonzero, state.skipped_steps, skipped)
    return updates, ApplyIfNonzeroState(skipped, inner_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def init_inner(inner, params):
  """The state of a transformation that gets filtered gradients.

  Raises:
    ValueError: if it filters, too.
  """
  state = inner.init(params)
  if _state.find(state):
    raise ValueError(
      "inner has a gaf in it, but what it gets is filtered already. Leave the gaf out:"
      " apply_if_agreed(optax.sgd(0.1), tau), for instance."
    )
  return state


def run_if(condition, inner, grads, inner_state, params, extra_args):
  """The update and state of `inner`, or zeros and the old state."""

  def run():
    return inner.update(grads, inner_state, params, **extra_args)

  def leave():
    return optax.tree.zeros_like(jax.eval_shape(run)[0]), inner_state

  return _jax_types.cond(condition, run, leave)


def _check_number(k, options):
  if k == 1 and options.anchor_decay is None:
    raise ValueError(
      "there is one micro-gradient (k = 1) and nothing to compare it with. Split"
      " the batch into at least two microbatches, or give anchor_decay to compare"
      " with past steps."
    )
  if options.num_microbatches not in (None, k):
    raise ValueError(
      f"num_microbatches is {options.num_microbatches}, but {k} micro-gradients"
      " arrived."
    )
