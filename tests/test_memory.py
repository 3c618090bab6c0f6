"""`memory_decay` against the running mean of cosines in NumPy float64, in all forms."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import device_mappings
import exchange
import gaf_optax
import oracle
import reference_forms
from gaf_optax import rules

K, DECAY = 8, 0.9


def steps(seed, num_steps, k=K, dtype="float32", bad=True):
  """Trees with NaN, Inf, zero and tiny rows; sources 0 to 4 agree a little."""
  rng = np.random.default_rng(seed)
  common = rng.standard_normal(10)
  for t in range(num_steps):
    rows = rng.standard_normal((k, 10)) + common * (np.arange(k)[:, None] < 5)
    rows *= 10.0 ** rng.integers(-6, 6)
    if bad:
      rows[t % k] = [np.nan, np.inf, 0, 1e-14][t % 4]
    rows = jnp.asarray(rows).astype(dtype)
    yield {"a": rows[:, :6].reshape(k, 2, 3), "b": rows[:, 6:]}


def run(tx, trees):
  params = jax.tree.map(lambda x: x[0], trees[0])
  state = tx.init(params)
  update = jax.jit(tx.update)
  for tree in trees:
    gradient, state = update(tree, state, params)
  return gradient, state


def flat(tree):
  return oracle.vectors(list(tree.values()))


@pytest.mark.parametrize("dtype, decay", [("float32", DECAY), ("bfloat16", 0.0)])
def test_the_memory_is_the_oracles(dtype, decay):
  trees = list(steps(0, 13, dtype=dtype))
  tx = gaf_optax.gaf(0.9, memory_decay=decay, num_microbatches=K)
  _, state = run(tx, trees)
  mean, weight = oracle.remember([flat(tree) for tree in trees], decay)
  np.testing.assert_allclose(state.memory.mean[0], mean, atol=2e-5)
  np.testing.assert_allclose(state.memory.weight[0], weight, rtol=1e-5)
  chex.assert_shape(state.memory, (1, K, K))
  assert {x.dtype.name for x in state.memory} == {"float32"}


@pytest.mark.parametrize(
  "name, arguments",
  [
    ("sequential", {}),
    ("leave_one_out", {}),
    ("most_neighbors", {}),
    ("min_neighbors", {"fraction": 0.25}),
  ],
)
def test_every_rule_decides_on_the_memory(name, arguments):
  """The result is the mean of this step's accepted finite micro-gradients."""
  trees = list(steps(1, 26))
  rule = getattr(rules, name)(**arguments)
  tx = gaf_optax.gaf(0.8, rule=rule, memory_decay=DECAY, num_microbatches=K)
  gradient, state = run(tx, trees)
  mean, _ = oracle.remember([flat(tree) for tree in trees], DECAY)
  v = flat(trees[-1])
  finite = np.isfinite(v).all(axis=1)
  assert not finite.all()
  # Vectors whose Gram matrix is the memory.
  matrix = np.where(np.eye(K, dtype=bool), 1, mean)
  values, basis = np.linalg.eigh(matrix)
  assert values.min() > -1e-6
  rows = basis * np.sqrt(np.maximum(values, 0))
  # The sequence starts at the number of previous updates, modulo K.
  start = {"start": (len(trees) - 1) % K} if name == "sequential" else {}
  weights, accepted, distances, margin, _ = oracle.decide(
    name, rows, finite, 0.8, **arguments, **start
  )
  assert margin > 1e-4 and 1 < accepted.sum() < K
  np.testing.assert_array_equal(state.accepted, accepted)
  np.testing.assert_allclose(
    reference_forms.compared(state.distances), distances, atol=1e-4
  )
  share = weights / weights.sum()
  np.testing.assert_allclose(state.weights, share, atol=1e-4)
  clean = np.where(finite[:, None], v, 0)
  want = share @ clean
  largest = np.abs(clean).max()
  np.testing.assert_allclose(flat_one(gradient), want, atol=1e-5 * largest)


def flat_one(tree):
  return np.concatenate([np.asarray(x, np.float64).ravel() for x in tree.values()])


def test_a_rule_of_the_users_sees_the_matrix():
  def rule(gram, valid, tau):
    return rules.Decision(valid.astype(float), valid, gram[0] + 0.1 * gram[2])

  tx = gaf_optax.gaf(rule=rule, memory_decay=0.5, num_microbatches=3)
  rows = jnp.array([[1.0, 0.0], [1.0, 1.0], [jnp.nan, 0.0]])
  _, state = tx.update(rows, tx.init(jnp.zeros(2)))
  np.testing.assert_allclose(state.distances, [1, 0.5**0.5, 0], atol=1e-6)
  assert state.accepted.tolist() == [True, True, False]


def test_persisting_wrong_sources_are_found_where_one_step_shows_nothing():
  """Five of eight sources share a small common part, three share another."""
  rng = np.random.default_rng(3)
  parts = rng.standard_normal((2, 200))
  of_source = np.repeat([0, 1], [5, 3])
  rows = [
    jnp.asarray(rng.standard_normal((K, 200)) + 0.3 * parts[of_source], jnp.float32)
    for _ in range(100)
  ]
  rule = rules.min_neighbors(0.6)
  accepted = {}
  for name, options in {"now": {}, "memory": {"memory_decay": 0.98}}.items():
    tx = gaf_optax.gaf(0.95, rule=rule, num_microbatches=K, **options)
    state, update = tx.init(jnp.zeros(200)), jax.jit(tx.update)
    each = []
    for x in rows:
      _, state = update(x, state)
      each.append(np.asarray(state.accepted))
    accepted[name] = np.mean(each[50:], axis=0)
  np.testing.assert_array_equal(accepted["memory"], of_source == 0)
  assert np.ptp(accepted["now"][:5]) < 0.5 and accepted["now"][:5].mean() < 0.9


def test_groups_have_memories_of_their_own():
  trees = list(steps(4, 9))
  options = dict(memory_decay=DECAY, num_microbatches=K)
  _, state = run(gaf_optax.gaf(0.9, groups="leaf", **options), trees)
  for group, name in enumerate(trees[0]):
    # A row that is not finite in one leaf is invalid in every group.
    whole = [np.isfinite(flat(t)).all(axis=1) for t in trees]
    masked = [
      np.where(ok[:, None], flat({name: t[name]}), np.nan)
      for ok, t in zip(whole, trees)
    ]
    mean, weight = oracle.remember(masked, DECAY)
    np.testing.assert_allclose(state.memory.mean[group], mean, atol=2e-5)
    np.testing.assert_allclose(state.memory.weight[group], weight, rtol=1e-5)


@functools.cache
def on_one_device(k):
  """Steps of k micro-gradients, the options, and the last gradient and state."""
  trees = list(steps(5, 3, k))
  rule = rules.most_neighbors()
  options = dict(rule=rule, memory_decay=DECAY, num_microbatches=k)
  return trees, options, *run(gaf_optax.gaf(0.9, **options), trees)


def assert_same(gradient, state, want, want_state):
  largest = np.abs(want["b"]).max()
  scaled = lambda tree: jax.tree.map(lambda x: np.asarray(x) / largest, tree)
  chex.assert_trees_all_close(scaled(gradient), scaled(want), atol=1e-5)
  chex.assert_trees_all_close(state, want_state, rtol=1e-4, atol=2e-5)


# test_across.py tests the mappings; here the state must be the same in all of them.
@pytest.mark.parametrize(
  "mapping, k_local",
  [(device_mappings.ALL[2], 1), (device_mappings.ALL[-1], 3)],
  ids=["one", "stacked"],
)
def test_across_devices_it_is_the_stacked_form(mapping, k_local):
  trees, options, want, want_state = on_one_device(K * k_local)
  stacked = k_local > 1
  tx = gaf_optax.gaf(0.9, axis_name="data", stacked=stacked, **options)
  shape = (K, k_local) if stacked else (K,)
  members = [jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), t) for t in trees]
  stack = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *members)

  def all_steps(rows):
    params = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), trees[0])

    def one(state, tree):
      gradient, state = tx.update(tree, state, params)
      return state, gradient

    state, gradients = jax.lax.scan(one, tx.init(params), rows)
    return jax.tree.map(lambda x: x[-1], gradients), state

  mapped = device_mappings.mapped(all_steps, stack, mapping)
  gradient, state = jax.tree.map(lambda x: x[5], mapped)
  assert_same(gradient, state, want, want_state)


def test_stacks_sharded_over_an_explicit_mesh():
  """Under plain jit, with the state carried through a scan."""
  trees, options, want, want_state = on_one_device(K)
  grid = device_mappings.mesh(kind=jax.sharding.AxisType.Explicit)
  spec = jax.sharding.PartitionSpec
  put = lambda tree, *axes: jax.device_put(
    tree, jax.sharding.NamedSharding(grid, spec(*axes))
  )
  stack = put(jax.tree.map(lambda *x: jnp.stack(x), *trees), None, "data")
  params = put(jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), trees[0]))
  tx = gaf_optax.gaf(0.9, **options)

  @jax.jit
  def all_steps(state, stack):
    one = lambda state, tree: tx.update(tree, state, params)[::-1]
    return jax.lax.scan(one, state, stack)

  state, gradients = all_steps(put(tx.init(params)), stack)
  assert_same(jax.tree.map(lambda x: x[-1], gradients), state, want, want_state)


@pytest.mark.usefixtures("compiled_as_users_do")
def test_it_sends_nothing_more():
  """The compiled program has the same collectives with and without the memory."""

  def sent(**options):
    tx = gaf_optax.gaf(axis_name="data", num_microbatches=K, **options)
    params = {"a": jnp.zeros((40, 50)), "b": jnp.zeros(7)}
    update = lambda grads, state: tx.update(grads, state, params)
    mesh = device_mappings.mesh()
    spec = jax.sharding.PartitionSpec
    local = jax.shard_map(
      update, mesh=mesh, in_specs=(spec("data"), spec()), out_specs=spec()
    )
    grads = jax.tree.map(lambda x: jnp.zeros((K * x.shape[0], *x.shape[1:])), params)
    text = jax.jit(local).lower(grads, tx.init(params)).compile().as_text()
    return sorted(exchange.collectives(text, K))

  without = sent()
  assert without and sent(memory_decay=0.9) == without


@pytest.mark.usefixtures("standard_promotion")
def test_in_apply_if_agreed_and_a_scan():
  """The memory is updated on steps without agreement, while Adam is unchanged."""
  tau = lambda number: jnp.where(number % 2 == 0, 0.9, 0.0)
  tx = gaf_optax.apply_if_agreed(
    optax.adam(0.1), tau, memory_decay=DECAY, num_microbatches=K
  )
  trees = list(steps(6, 5))
  params = jax.tree.map(lambda x: x[0], trees[1])
  state = tx.init(params)
  stack = jax.tree.map(lambda *x: jnp.stack(x), *trees)

  @jax.jit
  def scanned(state):
    one = lambda state, tree: (tx.update(tree, state, params)[1], None)
    return jax.lax.scan(one, state, stack)[0]

  after = scanned(state)
  chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
  mean, _ = oracle.remember([flat(tree) for tree in trees], DECAY)
  np.testing.assert_allclose(after.gaf_state.memory.mean[0], mean, atol=2e-5)
  assert int(gaf_optax.metrics(after)["skipped_steps"]) == 2
  assert int(optax.tree.get(after, "count")) == 3


def test_errors():
  for options, message in [
    ({"memory_decay": 0.9}, "needs num_microbatches"),
    ({"memory_decay": 1.0, "num_microbatches": 4}, r"memory_decay must be in \[0, 1\)"),
    (
      {"memory_decay": 0.9, "anchor_decay": 0.9, "num_microbatches": 4},
      "memory_decay and anchor_decay exclude each other",
    ),
  ]:
    with pytest.raises(ValueError, match=message):
      gaf_optax.gaf(**options)


def test_streamed_forms_refuse_it():
  options = dict(memory_decay=0.9, num_microbatches=2)
  with pytest.raises(ValueError, match="Stack them and use gaf"):
    gaf_optax.multi_steps(optax.sgd(0.1), 2, **options)
  with pytest.raises(ValueError, match="Stack them and use gaf"):
    gaf_optax.value_and_grad(lambda w, x: w @ x, 2, memory_decay=0.9)


def test_other_groups_than_at_init_are_refused():
  tx = gaf_optax.gaf(groups="leaf", memory_decay=0.9, num_microbatches=2)
  state = tx.init({"a": jnp.zeros(2), "b": jnp.zeros(3)})
  with pytest.raises(ValueError, match="groups formed 1 groups"):
    tx.update({"a": jnp.ones((2, 2))}, state)


def test_decay_may_be_injected():
  tx = optax.inject_hyperparams(
    gaf_optax.gaf, static_args=("rule", "embed", "groups", "num_microbatches")
  )(tau=0.9, memory_decay=0.5, num_microbatches=3)
  rows = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)), jnp.float32)
  state = tx.init(jnp.zeros(4))
  update = jax.jit(tx.update)
  for decay, weight in [(0.5, 1), (0.5, 1.5), (0.2, 1.3)]:
    state = optax.tree.set(state, memory_decay=jnp.float32(decay))
    _, state = update(rows, state)
    np.testing.assert_allclose(state.inner_state.memory.weight[0], weight, rtol=1e-6)
