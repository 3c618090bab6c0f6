"""The filter across devices, in every mapping, against the oracle."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import device_mappings
import gaf_optax
import oracle
import reference_forms
from gaf_optax import _exchange, rules

N = device_mappings.N
CHECKED = (AxisType.Auto, True)
TAU = 0.8
# Sizes that 8 does not divide, and an empty leaf.
SHAPES = {"w": (5, 7), "b": (17,), "s": (), "e": (0, 3)}
DTYPES = {"h": ((30,), jnp.bfloat16), "c": ((3,), np.complex64)}


def bad_stack(seed=0, shapes=SHAPES):
  """A stack with a NaN, an Inf, a row of zeros, and a far too long row."""
  tree = device_mappings.stack(N, shapes, seed)
  tree["w"][0, 2, 3] = np.nan
  tree["b"][3] *= 1e12
  tree["s"][5] = -np.inf
  for x in tree.values():
    x[6] = 0
  return tree


def update(tx, params=None, **extra):
  """`tx.update` on one device, at the first step."""

  def run(micro_grads, **extra):
    like = params
    if params is None:
      like = jax.tree.map(jnp.zeros_like, micro_grads)
    return tx.update(micro_grads, tx.init(like), like, **extra)

  return run


def steps_of(tx, params):
  """Gradients and states of all steps `[steps, ...]` on one device."""

  def run(steps, **extra):
    def one(state, x):
      micro_grads, extra = x
      gradient, state = tx.update(micro_grads, state, params, **extra)
      return state, (gradient, state)

    return jax.lax.scan(one, tx.init(params), (steps, extra))[1]

  return run


def assert_close(found, expected):
  """Absolute tolerance by dtype, relative to the largest value."""
  found = np.asarray(found)
  assert found.shape == np.shape(expected)
  scale = max(np.max(np.abs(expected), initial=0), 1)
  atol = 2e-2 if found.dtype == jnp.bfloat16 else 2e-6
  np.testing.assert_allclose(
    oracle.wide(found) / scale, oracle.wide(expected) / scale, atol=atol
  )


@pytest.mark.parametrize("mapping", device_mappings.ALL, ids=device_mappings.name)
def test_every_mapping_is_the_oracle(mapping, monkeypatch):
  """Two steps with all dtypes and several exchanges, the first with bad rows."""
  monkeypatch.setattr(_exchange, "_BUCKET", 1)
  steps = [
    bad_stack(4, SHAPES | DTYPES),
    device_mappings.stack(N, SHAPES | DTYPES, 5, 0.7),
  ]
  for x in steps[1].values():  # Accepted, and scaled down.
    x[4] *= np.asarray(10, x.dtype)
  weights = np.array([[2, 1, 0, 1, 2, 1, 1, 3], [1, 1, 1, 2, 1, 0, 1, 1]], np.float32)
  options = dict(num_microbatches=N, max_norm_ratio=2.0)
  tx = gaf_optax.gaf(TAU, axis_name="data", **options)
  run = steps_of(
    tx, device_mappings.params_of(steps[0] | {"n": np.ones((N, 2), np.int32)})
  )
  of_members = {n: np.stack([s[n] for s in steps], axis=1) for n in steps[0]}
  of_members["n"] = np.ones((N, 2, 2), np.int32)
  member = lambda x: run(x[0], microbatch_weights=x[1])
  gradient, state = device_mappings.mapped(
    member, (of_members, weights.T.copy()), mapping
  )
  for x in jax.tree.leaves((gradient, state)):
    x = np.asarray(x)
    for other in x[1:]:
      np.testing.assert_array_equal(other, x[0])
  nonfinite = 0
  for i, (tree, own) in enumerate(zip(steps, weights)):
    extra = dict(microbatch_weights=own, max_norm_ratio=2.0, start=i)
    want = oracle.gaf(list(tree.values()), TAU, **extra)
    assert want.margin > 1e-3 and want.agreed
    assert not want.accepted[own > 0].all()
    for (name, x), value in zip(tree.items(), want.gradient):
      assert gradient[name].dtype == x.dtype
      assert_close(gradient[name][0, i], value)
    np.testing.assert_array_equal(state.accepted[0, i], want.accepted)
    np.testing.assert_allclose(
      reference_forms.compared(state.distances[0, i]), want.distances, atol=1e-5
    )
    nonfinite += (~want.finite & (own > 0)).sum()
    assert state.nonfinite[0, i] == nonfinite
    assert state.num_seen[0, i] == (own > 0).sum()
  assert nonfinite == 2
  assert not gradient["n"].any() and gradient["n"].dtype == np.int32


OPTIONS = {
  "labels": dict(
    groups=lambda path, leaf: None if leaf.shape == (17,) else leaf.ndim,
    memory_decay=0.9,
    rule=rules.majority(),
  ),
  "embed": dict(embed=jnp.sign, max_norm_ratio=1.5),
  "anchor": dict(anchor_decay=0.7, groups="leaf"),
}


def test_options_do_what_they_do_on_a_stack():
  """The result is typed as replicated: `out_specs=P()` passes the check."""
  steps = [
    device_mappings.stack(N, SHAPES, 5),
    bad_stack(6),
    device_mappings.stack(N, SHAPES, 7),
  ]
  params = device_mappings.params_of(steps[0])

  def run_all(steps, **where):
    return {
      name: steps_of(
        gaf_optax.gaf(0.95, num_microbatches=N, **options, **where), params
      )(steps)
      for name, options in OPTIONS.items()
    }

  together = jax.tree.map(lambda *x: np.stack(x), *steps)  # [3, N, ...]
  want = jax.jit(run_all)(together)
  of_members = jax.tree.map(lambda x: np.swapaxes(x, 0, 1).copy(), together)
  member = lambda mine: run_all(mine, axis_name="data")
  got = device_mappings.mapped(member, of_members, (AxisType.Explicit, True), out=P())
  for name in OPTIONS:
    gradients, states = zip(got[name], want[name])
    for path, x in jax.tree_util.tree_leaves_with_path(gradients[1]):
      found = dict(jax.tree_util.tree_leaves_with_path(gradients[0]))[path]
      assert found.dtype == x.dtype and found.shape == x.shape, (name, path)
      for a, b in zip(found, x):
        assert_close(a, b)
    for field in ("accepted", "skipped_steps", "nonfinite"):
      np.testing.assert_array_equal(*(getattr(s, field) for s in states), name)
    np.testing.assert_allclose(*(s.distances for s in states), atol=1e-5)
    assert 0 < states[1].accepted.mean() < 1
    jax.tree.map(assert_close, *(s.anchor for s in states))
    jax.tree.map(assert_close, *(s.memory for s in states))


@pytest.mark.parametrize("mapping", ["vmap", CHECKED], ids=device_mappings.name)
def test_a_tuple_of_axes(mapping):
  """Devices are numbered in the order of the tuple; the last name varies fastest."""
  tree = device_mappings.stack(N, SHAPES, 1)
  leaves = list(tree.values())
  want = oracle.gaf([x[np.arange(N).reshape(2, 4).T.ravel()] for x in leaves], TAU)
  other = oracle.gaf(leaves, TAU)
  assert np.nanmax(np.abs(np.sort(want.distances) - np.sort(other.distances))) > 1e-3
  tx = gaf_optax.gaf(TAU, axis_name=("b", "a"), num_microbatches=N)
  gradient, state = device_mappings.mapped(
    update(tx), tree, mapping, names=("a", "b"), shape=(2, 4)
  )
  found = reference_forms.compared(state.distances[5])
  np.testing.assert_allclose(found, want.distances, atol=1e-5)
  assert_close(gradient["w"][5], want.gradient[0])


def test_several_on_each_member():
  """`stacked=True` filters all n * k_local together, in device order."""
  tree = device_mappings.stack(3 * N, SHAPES, 2)
  weights = np.random.default_rng(2).integers(0, 4, 3 * N).astype(np.float32)
  want = oracle.gaf(list(tree.values()), TAU, microbatch_weights=weights)
  assert want.margin > 1e-3 and (weights == 0).any()
  parted = jax.tree.map(lambda x: x.reshape(N, 3, *x.shape[1:]), (tree, weights))
  tx = gaf_optax.gaf(TAU, axis_name="data", stacked=True, num_microbatches=3 * N)
  run = update(tx, device_mappings.params_of(tree))
  member = lambda x: run(x[0], microbatch_weights=x[1])
  gradient, state = device_mappings.mapped(member, parted, CHECKED)
  np.testing.assert_array_equal(state.accepted[7], want.accepted)
  found = reference_forms.compared(state.distances[7])
  np.testing.assert_allclose(found, want.distances, atol=1e-5)
  assert_close(gradient["w"][7], want.gradient[0])


def test_two_levels_are_a_chain():
  """First the micro-gradients of each device, then their means."""
  tree = device_mappings.stack(3 * N, {"w": (5, 7), "b": (17,)}, 3)
  parted = jax.tree.map(lambda x: x.reshape(N, 3, *x.shape[1:]), tree)
  tx = optax.chain(gaf_optax.gaf(0.45), gaf_optax.gaf(1.0, axis_name="data"))
  params = device_mappings.params_of(tree)

  def member(mine):
    return tx.update(mine, tx.init(params), params)[0]

  got = device_mappings.mapped(member, parted, CHECKED)
  first = [oracle.gaf([parted["w"][i], parted["b"][i]], 0.45) for i in range(N)]
  assert {level.agreed for level in first} == {True, False}
  second = oracle.gaf(
    [np.stack([level.gradient[j] for level in first]) for j in range(2)], 1.0
  )
  for name, want in zip(("w", "b"), second.gradient):
    assert_close(got[name][2], want)


@pytest.mark.parametrize("n, k_local", [(1, 3), (7, 2)])
def test_sizes_that_do_not_divide(n, k_local, monkeypatch):
  """A group per leaf and several exchanges, the first of them empty."""
  monkeypatch.setattr(_exchange, "_BUCKET", 1)
  k = n * k_local
  shapes = {"e": (0, 2), "s": (), "a": (3, 4, 5), "long": (9000,), "z": (5,)}
  tree = device_mappings.stack(k, shapes, 4)
  tx = gaf_optax.gaf(TAU, groups="leaf", axis_name="data", stacked=True)
  parted = jax.tree.map(lambda x: x.reshape(n, k_local, *x.shape[1:]), tree)
  run = update(tx, device_mappings.params_of(tree))
  gradient, state = device_mappings.mapped(run, parted, "vmap", shape=(n,))
  results = {name: oracle.gaf([x], TAU) for name, x in tree.items()}
  for name, want in results.items():
    assert want.margin > 1e-4 and gradient[name].shape[1:] == shapes[name]
    assert_close(gradient[name][n - 1], want.gradient[0])
  number = np.mean([want.accepted.sum() for want in results.values()])
  np.testing.assert_allclose(state.num_accepted[0], number)


FAULTS = ["good"] * 5 + ["nan", "inf", "huge", "zero", "stale"]


@functools.cache
def _compiled(rule):
  tx = gaf_optax.gaf(TAU, rule=rule, axis_name="data", num_microbatches=N)
  grid = device_mappings.mesh()

  def member(rows):
    mine = jax.tree.map(lambda x: x[0], rows)
    return update(tx)(mine)

  mapped = jax.shard_map(member, mesh=grid, in_specs=P("data"), out_specs=P())
  return jax.jit(mapped)


@settings(max_examples=40)
@given(
  st.lists(st.sampled_from(FAULTS), min_size=N, max_size=N),
  st.sampled_from(["cosine", "euclidean"]),
  st.integers(0, 2**32 - 1),
)
def test_a_bad_device_never_poisons_the_update(faults, distance, seed):
  """NaN, infinite and zero micro-gradients never enter the result.

  Nor, with the Euclidean distance, do vectors that are 1e15 times too long. The cosine
  distance ignores lengths, so the algorithm may accept them.
  """
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
  want = oracle.gaf(list(leaves.values()), TAU, kind=distance)
  made = rules.sequential(distance)
  stacked = {
    name: jax.device_put(x, NamedSharding(device_mappings.mesh(), P("data")))
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
  """Gradients of replicated parameters, which `check_vma` sums over the devices."""

  def member(x):
    params = {"w": jnp.ones(4)}
    grads = jax.grad(lambda p: jnp.sum(p["w"] * x))(params)
    return filtered(grads, params)

  x = jnp.asarray(np.random.default_rng(0).standard_normal((N, 4)), jnp.float32)
  return x, lambda mapping: device_mappings.mapped(
    member, x, mapping, names=(axis,), out=P()
  )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_gradients_that_are_summed_already_are_refused(kind):
  tx = gaf_optax.gaf(0.97, axis_name="data")
  _, run = summed_gradients("data", lambda g, p: tx.update(g, tx.init(p), p)[0])
  message = r"leaf \['w'\].*pcast\(params, 'data', to='varying'\)"
  with pytest.raises(ValueError, match=message):
    run((kind, True))


def test_pmean_of_summed_gradients_is_n_times_the_mean():
  """The same mistake without the filter, as in the guide."""
  x, run = summed_gradients("data", lambda g, _: jax.lax.pmean(g, "data"))
  np.testing.assert_allclose(run(CHECKED)["w"], N * x.mean(0), rtol=1e-5)


def test_gradients_of_parameters_that_vary():
  """The remedy in a training step, with a parameter that has no gradient."""
  x = device_mappings.stack(N, {"w": (17,)})["w"]
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

  grid = device_mappings.mesh()
  mapped = jax.jit(
    jax.shard_map(steps, mesh=grid, in_specs=(P(), P(), P("data")), out_specs=P())
  )
  new, state = mapped(params, tx.init(params), x)
  want = sum(oracle.gaf([x], TAU, start=i).gradient[0] for i in range(3))
  np.testing.assert_allclose(new["w"], 1 - want, atol=1e-5)
  assert int(gaf_optax.metrics(state)["num_microbatches"]) == N


def test_inject_hyperparams():
  make = optax.inject_hyperparams(gaf_optax.gaf, static_args=("axis_name",))
  tree = device_mappings.stack(N, {"b": (17,)}, 4)
  got, _ = device_mappings.mapped(
    update(make(tau=0.5, axis_name="data")), tree, CHECKED
  )
  want, usual = (oracle.gaf([tree["b"]], tau) for tau in (0.5, 0.97))
  assert not np.allclose(want.gradient[0], usual.gradient[0], atol=1e-3)
  np.testing.assert_allclose(got["b"][0], want.gradient[0], atol=2e-6)


def member_update(stacked=None, weights=None, **options):
  tx = gaf_optax.gaf(0.9, axis_name="data", stacked=stacked, **options)
  state = tx.init(jnp.zeros(3))
  return lambda x: tx.update(x, state, jnp.zeros(3), microbatch_weights=weights)[0]


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
    with pytest.raises(ValueError, match=r"\(2, 3\).*pass stacked=True"):
      jax.vmap(member_update(), axis_name="data")(jnp.ones((4, 2, 3)))
    with pytest.raises(ValueError, match=r"shape \(3,\).*omit stacked"):
      jax.vmap(member_update(stacked=True), axis_name="data")(jnp.ones((4, 3)))

  def test_numbers(self):
    with pytest.raises(ValueError, match="one micro-gradient"):
      jax.vmap(member_update(), axis_name="data")(jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="is 5, but 4"):
      jax.vmap(member_update(num_microbatches=5), axis_name="data")(jnp.ones((4, 3)))

  @pytest.mark.parametrize("stacked, shape", [(None, ()), (True, (2,))])
  def test_weights(self, stacked, shape):
    rows = jnp.ones((4, *shape, 3))
    for weights in (np.ones(4), np.ones(() if stacked else 1)):
      message = rf"microbatch_weights must have shape {re.escape(str(shape))}"
      with pytest.raises(ValueError, match=message):
        jax.vmap(member_update(stacked, weights), axis_name="data")(rows)
    for weight in (-1.0, np.nan):
      with pytest.raises(ValueError, match="microbatch_weights must be finite and"):
        run = member_update(stacked, np.full(shape, weight))
        jax.vmap(run, axis_name="data")(rows)
