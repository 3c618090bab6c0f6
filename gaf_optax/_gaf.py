"""GAF: the filter as the first link of a chain."""

import optax

from gaf_optax import (
  _decide,
  _filter,
  _mesh,
  _options,
  _state,
  _tree,
  rules,
)


def gaf(
  tau: _options.Tau = 0.97,
  *,
  rule: rules.RuleFn | None = None,
  embed: _tree.Embed | None = None,
  axis_name: _options.AxisNames | None = None,
  param_axes: _options.ParamAxes = (),
  stacked: bool | None = None,
  groups: _options.Groups | None = None,
  anchor_decay: float | None = None,
  memory_decay: float | None = None,
  num_microbatches: int | None = None,
  max_norm_ratio: float | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Gradient Agreement Filtering: averages the micro-gradients that agree.

  An aggregator: takes k micro-gradients and gives one gradient. Compares them by
  cosine distance over the whole pytree, drops those that are farther than tau,
  averages the rest, and gives a zero gradient where no two agree:

  .. math::
    d_i = 1 - \frac{\langle s, g_i \rangle}{|s| |g_i|}, \qquad
    s \leftarrow s + g_i \text{ if } d_i \le \tau

  starting from :math:`s = g_1`; the result is s divided by the number of its
  terms. The next update starts from :math:`g_2`, and so on, so that no position leads
  every step. It is the first link of a chain, `optax.chain(gaf(0.97), optax.sgd(0.1))`.
  On a step without agreement the rest of that chain sees a zero gradient:
  momentum coasts, weight decay and Adam's counter go on. To leave them as they
  were, as the paper does, use :func:`apply_if_agreed`.

  What it guarantees:

  ============================================  ==================================
  micro-gradient with NaN or an infinity        never accepted, never in the result
  a norm above about 1e19 (sums in float32)     counts as not finite
  a norm below about 3e-16                      counts as zero
  zero micro-gradient                           at distance 1 from every other, never
                                                the first of a sequence
  distance equal to tau                         accepted
  tau = 2                                       the mean of the finite ones
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
    embed: an elementwise function with embed(0) = 0, applied to each leaf before the
      inner products and to nothing else. With `jnp.sign` the cosine distance is twice
      the share of coordinates whose signs differ.
    axis_name: the name of a mapped axis, or a tuple of names, where each replica
      (device) calls `update` with its own micro-gradient, shaped like the
      parameters: inside `jax.pmap`, `jax.shard_map` or `jax.vmap`. All replicas get
      the same result, typed as replicated. k is the number of replicas, ordered
      row-major over `axis_name`. What is sent: the volume of `jax.lax.pmean` and one
      k x k matrix; with an anchor half as much again.
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
      has; a group without agreement gives zeros. Where none has, all is zero, the
      leaves of label None too.
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
    max_norm_ratio: at least 1. A micro-gradient that is longer than so many times the
      median norm (of the valid, nonzero ones, in its group) counts as scaled down to
      that, in the sum that others are compared with and in the result. The cosine does
      not see lengths. Costs k numbers and no pass over the gradients.
    num_microbatches: k. When given, the state holds the last step's `distances`,
      `accepted` and `weights` for each micro-gradient, and its `accept_rates` since
      `init`.

  Returns:
    A transformation whose `update(micro_grads, state, params=None)` takes leaves
    `[k, *shape]` (`[*shape]` with `axis_name`) and returns leaves `[*shape]` of the
    same dtypes. Stacks that are sharded over an Explicit mesh are filtered where
    they are, and the result is sharded as they are without their leading axis.
    The extra argument `microbatch_weights` says how much each micro-gradient counts,
    for instance its number of valid tokens: `[k]`, at least 0, on any scale (with
    `axis_name` a scalar of this device, or `[k_local]` with `stacked`). The result is
    `sum(w_i g_i) / sum(w_i)` over the accepted; what the sequential rules and
    `leave_one_out` compare with is the sum of w_i g_i; 0 excludes a micro-gradient.
    Other extra arguments are ignored. The state is a :class:`GafState`, which
    :func:`metrics` reads.

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
    max_norm_ratio=max_norm_ratio,
  )

  def init_fn(params):
    memory = None
    if options.memory_decay is not None and options.num_microbatches is not None:
      leaves = _tree.flatten(params, None, options.groups, stacked=False)
      num_groups = leaves.layout.num_groups
      memory = _decide.init_memory(num_groups, options.num_microbatches)
    return _state.init(params, options, memory)

  def update_fn(
    micro_grads, state, params=None, *, microbatch_weights=None, **extra_args
  ):
    _state.check(state, options)
    _tree.check_not_empty(micro_grads)
    _tree.check_not_stacked(extra_args, micro_grads if options.stacked else None)
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
    k = (leaves.k or 1) * plan.axes.num_replicas()
    options.check_number(k)
    if state.anchor is not None:
      _tree.check_kept(state.anchor, leaves)
    if state.memory is not None:
      _tree.check_num_groups(plan.layout, state.memory.mean.shape[0])
    inputs = _decide.Inputs(
      tau=options.tau.at(state.steered, state.num_updates),
      weights=_mesh.gathered_weights(microbatch_weights, leaves.k, options.axis_names),
      start=state.num_updates % k,
      max_norm_ratio=options.max_norm_ratio,
      anchored=state.anchored,
      memory=state.memory,
      memory_decay=options.memory_decay,
    )
    means, state = _filter.step(
      leaves.arrays, state, inputs, options.anchor_decay, plan=plan
    )
    return leaves.unflatten(means), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
