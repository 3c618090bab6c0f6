"""The filter as the first link of a chain."""

import optax

from gaf_optax import _decide, _filter, _mesh, _options, _state, _tree, rules


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

  An aggregator: it maps k micro-gradients to one gradient. It compares them by cosine
  distance over the whole pytree, drops those farther away than tau, averages the rest,
  and returns a zero gradient if no two agree:

  .. math::
    d_i = 1 - \frac{\langle s, g_i \rangle}{|s| |g_i|}, \qquad
    s \leftarrow s + g_i \text{ if } d_i \le \tau

  The sum s starts at :math:`g_1`, in the next update at :math:`g_2`, and so on, so that
  no position leads every step. The result is s divided by its number of terms.

  `gaf` is the first link of a chain: `optax.chain(gaf(0.97), optax.sgd(0.1))`. On a
  step without agreement the rest of the chain gets a zero gradient, so momentum, weight
  decay and Adam's counter continue. :func:`apply_if_agreed` skips the rest instead, as
  the paper does.

  Guarantees:

  ============================================  ==================================
  micro-gradient with NaN or an infinity        dropped; never enters the result
  norm above about 1e19 (float32 sums)          treated as not finite
  norm below about 3e-16                        treated as zero
  zero micro-gradient                           distance 1 to every other; never
                                                starts a sequence
  distance equal to tau                         accepted
  tau = 2                                       mean of the finite micro-gradients
  bfloat16, float16 leaves                      summed in float32; dtype is kept
  complex leaves                                real part of the Hermitian product
  integer and `float0` leaves                   ignored; zeros in the result
  `None`, `optax.MaskedNode`                    passed through
  ============================================  ==================================

  `optax.MultiSteps`, `optax.apply_if_finite` and `optax.flatten` cannot wrap a chain
  that starts with `gaf`; put them inside, after `gaf`. For accumulation use
  :func:`multi_steps`. To exclude leaves use `groups`; `optax.masked` would keep them
  stacked.

  Args:
    tau: the largest accepted distance, in [0, 2]: a float, an `optax.Schedule` (called
      with the number of updates), :func:`target_accept_rate`, :func:`tau_quantile` or
      :func:`adaptive_tau`. The paper uses 0.92 to 1.0. The larger the
      microbatches, the smaller the distances at the start of training.
    rule: how micro-gradients are compared: `rules.sequential()` (the default, above),
      another rule of :mod:`gaf_optax.rules`, or any callable
      `(gram [k, k], valid [k] bool, tau) -> rules.Decision`. `valid` is False for
      micro-gradients that are not finite or have weight 0; their rows and columns are
      zero. The Gram matrix is scaled so that the largest norm is 1.
    embed: an elementwise function with embed(0) = 0, applied to each leaf before the
      inner products only. With `jnp.sign` the cosine distance is twice the share of
      coordinates whose signs differ.
    axis_name: the name of an axis of `jax.pmap`, `jax.shard_map` or `jax.vmap`, or a
      tuple of names, where each device calls `update` with its own micro-gradient,
      shaped like the parameters. All devices get the same result, typed as replicated.
      The k devices are in row-major order of the names. Communication: the volume of
      `jax.lax.pmean` plus a k x k matrix per group; 1.5 times that with `anchor_decay`.
    param_axes: the name of a mesh axis, or a tuple of names, over which the parameters
      are sharded. Inner products are summed over these axes; a replicated leaf counts
      once. Without the replication check of `jax.shard_map` pass a tree of the
      parameters' `PartitionSpec`, or a prefix of it, instead of names.
    stacked: with `axis_name`, whether each device holds several micro-gradients, leaves
      `[k_local, *shape]`. All n * k_local are then compared, in device order. (To
      filter on each device first and then across devices, chain two `gaf`.)
    groups: None for one decision over the whole tree, 'leaf' for one per leaf, or a
      function `(path, leaf) -> label` for one per label. `path` is a JAX key path,
      `leaf` a `jax.ShapeDtypeStruct`. Leaves with label None enter no decision and
      are averaged over all finite micro-gradients. A group without agreement gives
      zeros. The step agrees if any group does; otherwise everything is zero.
    anchor_decay: in [0, 1). Compares each micro-gradient with an exponential moving
      average of past plain means instead of with the others. It needs one more copy of
      the parameters and works for k = 1. The first step accepts all. Excludes `rule`.
    memory_decay: in [0, 1). The rule gets the running mean of the cosines of all steps
      instead of those of this step. Requires that the i-th micro-gradient always comes
      from the same source (device, shard, annotator). 0.98 averages over roughly 50
      steps, which separates sources that a single noisy step cannot. For each pair, on
      steps where both are finite and not zero, `weight <- memory_decay * weight + 1;
      mean <- mean + (cosine - mean) / weight`. A pair never compared counts as
      orthogonal. Requires `num_microbatches`; excludes `anchor_decay`. Adds two arrays
      `[m, k, k]` for m groups to the state (see :func:`sources`), but no communication.
    max_norm_ratio: at least 1. Limits norms to this multiple of the median norm (of the
      group's valid, nonzero micro-gradients), in the result and in the sums that rules
      compare with. It needs no pass over the gradients.
    num_microbatches: k. If given, the state holds `distances`, `accepted` and `weights`
      of the last step's micro-gradients, and their `accept_rates` since `init`.

  Returns:
    A transformation whose `update(micro_grads, state, params=None)` takes leaves `[k,
    *shape]` (`[*shape]` with `axis_name`) and returns leaves `[*shape]` of the same
    dtypes. Stacks on an Explicit mesh stay sharded; the result has their sharding
    without the leading axis. The extra argument `microbatch_weights` holds the weight
    of each micro-gradient, for instance its number of valid tokens: `[k]`, at least 0,
    on any scale. With `axis_name` it is this device's scalar, `[k_local]` if stacked.
    The result is `sum(w_i g_i) / sum(w_i)` over the accepted; the sequential rules and
    `leave_one_out` compare with sums of w_i g_i. Weight 0 excludes g_i. Other extra
    arguments are ignored. The state is a :class:`GafState`, read by :func:`metrics`.

  Raises:
    ValueError: for arguments outside their ranges. `update` raises it for leaves that
      are not stacked or differ in k, an empty tree, k = 1 without an anchor, and a k
      other than `num_microbatches`. It also raises if the extra argument `value` or
      `grad` is stacked. With `axis_name` it raises for an unbound axis and, under the
      replication check, for gradients that do not vary over the axis. These are already
      summed: before `jax.grad`, call `jax.lax.pcast(params, axis_name, to='varying')`.

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
  options = _options.Options(
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
      per_device=bool(options.axis_names),
    )
    if not leaves.arrays:  # Placeholders or integers: there is nothing to filter.
      return leaves.unflatten([]), state
    spec = options.spec(leaves)
    k = (leaves.k or 1) * spec.axes.num_devices()
    options.check_num_microbatches(k)
    if state.anchor is not None:
      _tree.check_average_shapes(state.anchor, leaves)
    if state.memory is not None:
      _tree.check_num_groups(spec.layout, state.memory.mean.shape[0])
    inputs = _decide.Inputs(
      tau=options.tau.at(state.steered, state.num_updates),
      weights=_mesh.gather_weights(microbatch_weights, leaves.k, options.axis_names),
      start=state.num_updates % k,
      max_norm_ratio=options.max_norm_ratio,
      anchored=state.anchored,
      memory=state.memory,
      memory_decay=options.memory_decay,
    )
    means, state = _filter.step(
      leaves.arrays, state, inputs, options.anchor_decay, spec=spec
    )
    return leaves.unflatten(means), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
