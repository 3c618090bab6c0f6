"""The filter across devices, in every form of mapping, held to the oracle."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import across
import gaf_optax
import oracle
from gaf_optax import _exchange, rules

N = across.N
CHECKED = (AxisType.Auto, True)
UNCHECKED = (AxisType.Auto, False)
TAU = 0.8


def stack(k=N, seed=0, bad=False, all_dtypes=False):
  """Leaves whose sizes 8 does not divide, one empty, of one dtype or several."""
  rng = np.random.default_rng(seed)

  def leaf(*shape, common=1.0):
    return rng.standard_normal((k, *shape)) + common * rng.standard_normal(shape)

  tree = {
    "w": jnp.asarray(leaf(5, 7), jnp.float32),
    "b": jnp.asarray(leaf(17), jnp.float32),
    "s": jnp.asarray(leaf(), jnp.float32),
    "e": jnp.zeros((k, 0, 3), jnp.float32),
  }
  if all_dtypes:
    tree["h"] = jnp.asarray(leaf(30, common=0.5), jnp.bfloat16)
    tree["c"] = jnp.asarray(leaf(3) + 1j * leaf(3), jnp.complex64)
    tree["n"] = jnp.ones((k, 2), jnp.int32)
  if bad:
    tree["w"] = tree["w"].at[0, 2, 3].set(jnp.nan)
    tree["b"] = tree["b"].at[3].mul(1e15)
    tree["s"] = tree["s"].at[5].set(-jnp.inf)
    tree = jax.tree.map(lambda x: x.at[6].set(0), tree)
  return tree


def params_of(tree):
  return jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), tree)


def update(tx, params=None):
  def run(micro_grads):
    like = params_of(jax.tree.map(lambda x: x[None], micro_grads))
    like = like if params is None else params
    return tx.update(micro_grads, tx.init(like), like)

  return run


def assert_like(got, want, scale=1.0):
  for path, leaf in jax.tree_util.tree_flatten_with_path(want)[0]:
    found = dict(jax.tree_util.tree_flatten_with_path(got)[0])[path]
    assert found.dtype == leaf.dtype and found.shape == leaf.shape
    atol = 2e-2 if leaf.dtype == jnp.bfloat16 else 2e-6
    np.testing.assert_allclose(
      oracle.wide(found), oracle.wide(leaf), atol=atol * scale, err_msg=str(path)
    )


@pytest.mark.parametrize(
  "how, bad",
  [*((how, True) for how in across.ALL), ("vmap", False), (CHECKED, False)],
  ids=lambda x: across.name(x) if x not in (True, False) else ["good", "bad"][x],
)
def test_every_mapping_is_the_oracle(how, bad, monkeypatch):
  tree = stack(bad=bad, all_dtypes=True)
  inexact = {n: x for n, x in tree.items() if n != "n"}
  want = oracle.gaf(list(inexact.values()), TAU)
  assert want.margin > 1e-3 and want.agreed
  assert bad == (not want.accepted.all())
  tx = gaf_optax.gaf(TAU, axis_name="data", num_microbatches=N)
  if how in (CHECKED, "vmap"):  # These small trees, too, in several exchanges.
    monkeypatch.setattr(_exchange, "_MIN_BUCKET", 1)
  gradient, state = across.mapped(update(tx), tree, how)
  for x in jax.tree.leaves((gradient, state)):
    x = np.asarray(x)
    for member in x[1:]:
      np.testing.assert_array_equal(member, x[0])
  wanted = dict(zip(inexact, want.gradient))
  for name, x in gradient.items():
    assert x.dtype == tree[name].dtype
    value = wanted[name] if name in wanted else np.zeros(2)
    atol = 2e-2 if name == "h" else 2e-6
    np.testing.assert_allclose(oracle.wide(x[0]), value, atol=atol)
  np.testing.assert_array_equal(state.accepted[0], want.accepted)
  np.testing.assert_allclose(state.distances[0], want.distances, atol=1e-5)
  assert state.nonfinite[0] == (~want.finite).sum()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_results_are_typed_as_replicated(kind):
  """`out_specs=P()` passes the check, for the gradient and the whole state."""
  options = dict(anchor_decay=0.5, groups="leaf", num_microbatches=N)
  tx = gaf_optax.gaf(TAU, axis_name="data", **options)
  across.mapped(update(tx), stack(all_dtypes=True), (kind, True), out=P())


OPTIONS = {
  "most_neighbors": dict(rule=rules.most_neighbors("euclidean")),
  "leave_one_out": dict(rule=rules.leave_one_out(softness=0.1)),
  "custom": dict(
    rule=lambda gram, valid, tau: gaf_optax.Decision(
      jnp.where(valid, jnp.arange(1.0, len(valid) + 1), 0), valid, gram[0]
    )
  ),
  "leaf": dict(groups="leaf"),
  "labels": dict(groups=lambda path, leaf: None if leaf.shape == (17,) else leaf.ndim),
  # Of padding it would make ones.
  "embed": dict(embed=lambda x: jnp.cos(jnp.abs(x))),
}


@pytest.mark.parametrize(
  "name, how",
  [
    *((name, "vmap") for name in sorted(OPTIONS)),
    ("embed", CHECKED),
    ("labels", CHECKED),
  ],
  ids=lambda x: x if x in OPTIONS else across.name(x),
)
def test_options_do_what_they_do_on_a_stack(name, how):
  tree = stack(bad=True)
  options = dict(OPTIONS[name], num_microbatches=N)
  params = params_of(tree)
  tx = gaf_optax.gaf(TAU, **options)
  want, want_state = tx.update(tree, tx.init(params), params)
  tx = gaf_optax.gaf(TAU, axis_name="data", **options)
  got, state = across.mapped(update(tx), tree, how)
  first = jax.tree.map(lambda x: x[0], (got, state))
  largest = max(1, float(jnp.max(jnp.abs(want["b"]))))
  assert_like(first[0], want, largest)
  np.testing.assert_array_equal(first[1].accepted, want_state.accepted)
  np.testing.assert_allclose(first[1].distances, want_state.distances, atol=1e-5)


@pytest.mark.parametrize("how", ["vmap", "pmap", CHECKED], ids=across.name)
def test_anchor_over_steps(how):
  steps = [stack(seed=i, bad=i == 1) for i in range(3)]
  params = params_of(steps[0])

  def run(tx, steps):
    def one(state, tree):
      gradient, state = tx.update(tree, state, params)
      return state, gradient

    return jax.lax.scan(one, tx.init(params), steps)

  options = dict(anchor_decay=0.7, num_microbatches=N)
  together = jax.tree.map(lambda *x: jnp.stack(x), *steps)  # [3, N, ...]
  want_state, want = run(gaf_optax.gaf(0.95, **options), together)
  tx = gaf_optax.gaf(0.95, axis_name="data", **options)
  of_members = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), together)
  state, got = across.mapped(lambda mine: run(tx, mine), of_members, how)
  state, got = jax.tree.map(lambda x: x[3], (state, got))
  assert_like(got, want, max(1, float(jnp.max(jnp.abs(want["b"])))))
  largest = max(1, float(jnp.max(jnp.abs(want_state.anchor["b"]))))
  np.testing.assert_allclose(
    state.anchor["b"], want_state.anchor["b"], atol=1e-5 * largest
  )
  np.testing.assert_allclose(state.distances, want_state.distances, atol=1e-5)
  assert int(state.skipped_steps) == int(want_state.skipped_steps)


@pytest.mark.parametrize(
  "how, names",
  [
    ("vmap", ("a", "b")),
    ("vmap", ("b", "a")),
    (CHECKED, ("a", "b")),
    (UNCHECKED, ("b", "a")),
    ((AxisType.Explicit, True), ("a", "b")),
  ],
  ids=str,
)
def test_a_tuple_of_axes(how, names):
  """Members lie in the order of the tuple, the first name the slowest."""
  tree = stack(seed=1)
  order = np.arange(N).reshape(2, 4)
  order = (order if names == ("a", "b") else order.T).ravel()
  want = oracle.gaf([x[order] for x in tree.values()], TAU)
  tx = gaf_optax.gaf(TAU, axis_name=names, num_microbatches=N)
  gradient, state = across.mapped(update(tx), tree, how, names=("a", "b"), shape=(2, 4))
  np.testing.assert_allclose(state.distances[5], want.distances, atol=1e-5)
  np.testing.assert_allclose(gradient["w"][5], want.gradient[0], atol=2e-6)


@pytest.mark.parametrize(
  "how", ["vmap", "pmap", CHECKED, (AxisType.Explicit, False)], ids=across.name
)
def test_several_on_each_member(how):
  """`stacked=True` filters all n * k_local together, in member order."""
  tree = stack(k=3 * N, seed=2)
  want = oracle.gaf(list(tree.values()), TAU)
  parted = jax.tree.map(lambda x: x.reshape(N, 3, *x.shape[1:]), tree)
  tx = gaf_optax.gaf(TAU, axis_name="data", stacked=True, num_microbatches=3 * N)
  params = params_of(tree)
  gradient, state = across.mapped(update(tx, params), parted, how)
  np.testing.assert_allclose(state.distances[7], want.distances, atol=1e-5)
  np.testing.assert_allclose(gradient["w"][7], want.gradient[0], atol=2e-6)


@pytest.mark.parametrize("how", ["pmap", UNCHECKED, CHECKED], ids=across.name)
def test_two_levels_are_a_chain(how):
  """First the micro-gradients of each device, then those of the devices."""
  tree = {n: x for n, x in stack(k=3 * N, seed=3).items() if n in ("w", "b")}
  parted = jax.tree.map(lambda x: x.reshape(N, 3, *x.shape[1:]), tree)
  tx = optax.chain(gaf_optax.gaf(0.45), gaf_optax.gaf(1.0, axis_name="data"))
  params = params_of(tree)

  def member(mine):
    return tx.update(mine, tx.init(params), params)[0]

  got = across.mapped(member, parted, how)
  first = [oracle.gaf([parted["w"][i], parted["b"][i]], 0.45) for i in range(N)]
  assert {level.agreed for level in first} == {True, False}
  second = oracle.gaf(
    [np.stack([level.gradient[j] for level in first]) for j in range(2)], 1.0
  )
  for name, want in zip(("w", "b"), second.gradient):
    np.testing.assert_allclose(got[name][2], want, atol=2e-6)


def test_an_empty_leaf_behind_the_first_exchange(monkeypatch):
  monkeypatch.setattr(_exchange, "_MIN_BUCKET", 1)
  leaves = [jnp.arange(8.0 * 40).reshape(8, 1, 40), jnp.zeros((8, 1, 0, 2))]
  leaves.append(jnp.ones((8, 1, 40)))
  params = params_of([x[0] for x in leaves])
  tx = gaf_optax.gaf(2.0, axis_name="data", stacked=True)
  got, _ = across.mapped(update(tx, params), leaves, "vmap", shape=(8,))
  for x, y in zip(got, leaves):
    np.testing.assert_allclose(x[3], y.mean((0, 1)), rtol=1e-6)


shapes = st.lists(
  st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=4
)


@settings(max_examples=4)
@given(
  shapes,
  st.integers(1, 9),
  st.integers(1, 3),
  st.sampled_from([None, "leaf"]),
  st.integers(0, 2**32 - 1),
)
def test_sizes_nobody_thought_of(shapes, n, k_local, groups, seed):
  if n * k_local == 1:
    k_local = 2
  rng = np.random.default_rng(seed)
  leaves = [
    jnp.asarray(rng.standard_normal((n, k_local, *shape)) + 0.5, jnp.float32)
    for shape in shapes
  ]
  flat = [x.reshape(n * k_local, *x.shape[2:]) for x in leaves]
  params = params_of(flat)
  rule = rules.leave_one_out()
  options = dict(rule=rule, groups=groups, num_microbatches=n * k_local)
  tx = gaf_optax.gaf(0.9, **options)
  want, want_state = tx.update(flat, tx.init(params), params)
  tx = gaf_optax.gaf(0.9, axis_name="data", stacked=True, **options)
  with mock.patch.object(_exchange, "_MIN_BUCKET", 1):
    got, state = across.mapped(update(tx, params), leaves, "vmap", shape=(n,))
  distances = np.asarray(want_state.distances)
  if np.nanmin(np.abs(distances - 0.9), initial=1) < 1e-4:
    event("near tau")
    return
  np.testing.assert_allclose(state.distances[0], distances, atol=1e-5)
  for x, y in zip(got, want):
    np.testing.assert_allclose(x[n - 1], y, atol=1e-5)


FAULTS = ["good"] * 5 + ["nan", "inf", "huge", "zero", "stale"]


@functools.cache
def _compiled(rule):
  tx = gaf_optax.gaf(TAU, rule=rule, axis_name="data", num_microbatches=N)
  grid = across.mesh()

  def member(rows):
    mine = jax.tree.map(lambda x: x[0], rows)
    return update(tx)(mine)

  mapped = jax.shard_map(member, mesh=grid, in_specs=P("data"), out_specs=P())
  return jax.jit(mapped)


@settings(max_examples=60)
@given(
  st.lists(st.sampled_from(FAULTS), min_size=N, max_size=N),
  st.sampled_from(["sequential", "most_neighbors"]),
  st.sampled_from(["cosine", "euclidean"]),
  st.integers(0, 2**32 - 1),
)
def test_a_bad_device_never_poisons_the_update(faults, rule, distance, seed):
  """NaN, infinities and zeros are never in the result, and with the Euclidean
  distance neither is what is 1e15 times too long. (The cosine distance does not
  see lengths: what it accepts is what the algorithm says.)"""
  rng = np.random.default_rng(seed)
  common = rng.standard_normal(40)
  rows = common + rng.standard_normal((N, 40))
  good = np.array(rows)
  for i, fault in enumerate(faults):
    if fault == "nan":
      rows[i, rng.integers(40)] = np.nan
    elif fault == "inf":
      rows[i, rng.integers(40)] = -np.inf
    elif fault == "huge":
      rows[i] *= 1e15
    elif fault == "zero":
      rows[i] = 0
    elif fault == "stale":
      rows[i] = rows[(i + 1) % N]
  rows = np.asarray(rows, np.float32)
  leaves = {"a": rows[:, :17].copy(), "b": rows[:, 17:].reshape(N, 23, 1).copy()}
  want = oracle.gaf(list(leaves.values()), TAU, rule, kind=distance)
  made = getattr(rules, rule)(distance)
  stacked = {
    name: jax.device_put(x, NamedSharding(across.mesh(), P("data")))
    for name, x in leaves.items()
  }
  gradient, state = _compiled(made)(stacked)
  result = np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)])
  assert np.isfinite(result).all()
  if want.margin < 1e-5 / max(want.condition, 1e-12):
    event("near tau")
    return
  np.testing.assert_array_equal(state.accepted, want.accepted)
  largest = np.abs(np.where(want.accepted[:, None], rows, 0)).max(initial=1)
  for x, y in zip(jax.tree.leaves(gradient), want.gradient):
    np.testing.assert_allclose(x, y, atol=3e-6 * largest)
  huge = sum(np.isfinite(row).all() and np.abs(row).max() > 1e12 for row in rows)
  if distance == "euclidean" and huge <= 1:
    event("agreed" if want.agreed else "skipped")
    assert np.abs(result).max() <= np.abs(good).max()


def summed_gradients(axis, filtered):
  """Gradients of replicated parameters, which the check sums over the members."""

  def member(x):
    params = {"w": jnp.ones(4)}
    grads = jax.grad(lambda p: jnp.sum(p["w"] * x))(params)
    return filtered(grads, params)

  x = jnp.asarray(np.random.default_rng(0).standard_normal((N, 4)), jnp.float32)
  return x, lambda how: across.mapped(member, x, how, names=(axis,), out=P())


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_gradients_that_are_summed_already_are_refused(kind):
  tx = gaf_optax.gaf(0.97, axis_name="data")
  _, run = summed_gradients("data", lambda g, p: tx.update(g, tx.init(p), p)[0])
  message = r"leaf \['w'\].*pcast\(params, 'data', to='varying'\)"
  with pytest.raises(ValueError, match=message):
    run((kind, True))


def test_pmean_of_summed_gradients_is_n_times_the_mean():
  """What the guide says of the same mistake without the filter."""
  x, run = summed_gradients("data", lambda g, _: jax.lax.pmean(g, "data"))
  np.testing.assert_allclose(run(CHECKED)["w"], N * x.mean(0), rtol=1e-5)


def test_gradients_of_parameters_that_vary():
  """The remedy, in a training step; a parameter without a gradient, too."""
  x = stack()["b"]
  tx = gaf_optax.apply_if_agreed(optax.sgd(1.0), TAU, axis_name="data")
  params = {"w": jnp.ones(17), "unused": jnp.ones(3)}

  def step(params, state, x):
    local = jax.lax.pcast(params, "data", to="varying")
    grads = jax.grad(lambda p: jnp.sum(p["w"] * x[0]))(local)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  def steps(params, state, x):
    one = lambda carry, _: (step(*carry, x), None)
    return jax.lax.scan(one, (params, state), length=3)[0]

  grid = across.mesh()
  mapped = jax.jit(
    jax.shard_map(steps, mesh=grid, in_specs=(P(), P(), P("data")), out_specs=P())
  )
  new, state = mapped(params, tx.init(params), x)
  want = oracle.gaf([x, np.zeros((N, 3))], TAU)
  np.testing.assert_allclose(new["w"], 1 - 3 * want.gradient[0], atol=1e-5)
  assert int(gaf_optax.metrics(state)["num_microbatches"]) == N


def test_inject_hyperparams():
  make = optax.inject_hyperparams(gaf_optax.gaf, static_args=("axis_name",))
  tree = {"b": stack(seed=4)["b"]}
  for tau in (0.5, 2.0):
    tx = make(tau=tau, axis_name="data")
    got, _ = across.mapped(update(tx), tree, CHECKED)
    want = oracle.gaf([tree["b"]], tau)
    np.testing.assert_allclose(got["b"][0], want.gradient[0], atol=2e-6)


def member_update(stacked=None, **options):
  tx = gaf_optax.gaf(0.9, axis_name="data", stacked=stacked, **options)
  return lambda x: tx.update(x, tx.init(jnp.zeros(3)), jnp.zeros(3))[0]


class TestErrors:
  @pytest.mark.parametrize(
    "options, message",
    [
      (dict(axis_name=()), "at least one axis"),
      (dict(axis_name=("a", "a")), "twice"),
      (dict(axis_name=jnp.sin), "name of an axis"),
      (dict(axis_name="a", param_axes=("b", "a")), "axis 'a' is in axis_name and in"),
      (dict(axis_name="a", param_axes={"w": P(None, "a")}), "'a' is in axis_name"),
      (dict(param_axes={"w": P("a"), "b": "a"}), "mixture"),
      (dict(axis_name="a", stacked=1), "True, False or None"),
      (dict(stacked=False), "axis_name"),
    ],
  )
  def test_arguments(self, options, message):
    with pytest.raises(ValueError, match=message):
      gaf_optax.gaf(0.9, **options)

  @pytest.mark.parametrize("option", [dict(axis_name="a"), dict(stacked=True)])
  def test_streamed_forms(self, option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name}=.*one at a time"):
      gaf_optax.multi_steps(optax.sgd(0.1), 2, **option)
    with pytest.raises(ValueError, match=f"{name}=.*one at a time"):
      gaf_optax.value_and_grad(lambda w, x: w, 2, **option)

  @pytest.mark.parametrize("option", ["axis_name", "param_axes"])
  def test_an_axis_that_is_not_there(self, option):
    tx = gaf_optax.gaf(0.9, **{option: "data"})
    with pytest.raises(ValueError, match=f"{option} 'data' is not an axis here"):
      tx.update(jnp.ones((2, 3)), tx.init(jnp.ones(3)))

  def test_shapes(self):
    with pytest.raises(ValueError, match=r"\(2, 3\).*give stacked=True"):
      jax.vmap(member_update(), axis_name="data")(jnp.ones((4, 2, 3)))
    with pytest.raises(ValueError, match=r"shape \(3,\).*leave stacked out"):
      jax.vmap(member_update(stacked=True), axis_name="data")(jnp.ones((4, 3)))

  def test_numbers(self):
    with pytest.raises(ValueError, match="one micro-gradient"):
      jax.vmap(member_update(), axis_name="data")(jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="is 5, but 4"):
      jax.vmap(member_update(num_microbatches=5), axis_name="data")(jnp.ones((4, 3)))
