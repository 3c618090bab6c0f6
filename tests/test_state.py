"""The state: no NaN, warnings of identical micro-gradients, errors for other states."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import device_mappings
import gaf_optax
import known_steps
import oracle
from gaf_optax import GafState, rules

K = 4
PARAMS = {"w": jnp.zeros(3), "b": jnp.zeros(())}


def stack(seed=0, k=K):
  one = lambda i, x: jnp.asarray(
    1 + known_steps.draw([seed, i], k, *x.shape), jnp.float32
  )
  return {name: one(i, x) for i, (name, x) in enumerate(PARAMS.items())}


@pytest.fixture
def debug_nans():
  with jax.debug_nans(True):
    yield


OPTIONS = {
  "plain": dict(),
  "anchor": dict(anchor_decay=0.5, num_microbatches=K),
  "memory": dict(memory_decay=0.5, num_microbatches=K),
  "leaf": dict(
    groups="leaf",
    rule=rules.geometric_median(),
    num_microbatches=K,
    max_norm_ratio=2.0,
  ),
  "steered": dict(tau=gaf_optax.target_accept_rate(0.5), rule=rules.most_neighbors()),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_debug_nans_finds_none_of_ours(name, debug_nans):
  """In `init`, in steps with zero, huge and too long rows, and when the state is read.

  Not jitted: this compiles the same operations and also checks the values between them.
  """
  tx = gaf_optax.apply_if_agreed(optax.sgd(0.1), **OPTIONS[name])
  state = tx.init(PARAMS)
  plain = stack()
  odd = jax.tree.map(lambda x: x.at[0].set(0).at[1].mul(1e14), plain)
  for grads in (
    plain,
    odd,
    jax.tree.map(lambda x: x.at[2].mul(1e19), odd),
    jax.tree.map(jnp.zeros_like, plain),
  ):
    _, state = tx.update(grads, state, PARAMS)
    for leaf in jax.tree.leaves(state):
      assert not np.isnan(np.asarray(leaf)).any()
  gaf_optax.metrics(state)
  if "num_microbatches" in OPTIONS[name]:
    assert state.gaf_state.distances.shape == (K,)
  if name == "memory":
    gaf_optax.sources(state)


def test_debug_nans_finds_none_in_streamed_forms(debug_nans):
  tx = gaf_optax.multi_steps(optax.sgd(0.1), K, num_microbatches=K)
  state = tx.init(PARAMS)
  for i in range(K):
    _, state = tx.update(jax.tree.map(lambda x: x[i], stack()), state, PARAMS)
  assert gaf_optax.metrics(state)["noise_scale"] == -1
  # The first has nothing to compare with.
  assert (state.gaf_state.distances == -1).sum() == 1

  loss = lambda p, x: jnp.mean((x @ p["w"] + p["b"] - 1) ** 2)
  x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3)), jnp.float32)
  by_example = dict(
    compare=lambda path, leaf: path[0].key == "w", rule=rules.min_neighbors(0.5)
  )
  for options in (dict(), by_example):
    filtered = jax.jit(gaf_optax.value_and_grad(loss, K, **options))
    _, _, agreement = filtered(PARAMS, x)
    assert agreement.distances.shape == (K,)
  found = gaf_optax.example_weights(x, x[:, :2])
  assert (found.distances == -1).any() and found.weights.shape == (8,)
  assert gaf_optax.cosine_distance(x * 1e14, jnp.ones_like(x)) > 0


def test_what_was_not_compared_is_minus_1():
  tx = gaf_optax.gaf(num_microbatches=K)
  state = tx.init(PARAMS)
  assert state.mean_distance == state.noise_scale == -1
  np.testing.assert_array_equal(state.distances, -1)
  _, state = tx.update(stack(), state, PARAMS)
  distances = np.asarray(state.distances)
  assert (distances == -1).tolist() == [True, False, False, False]
  np.testing.assert_allclose(state.mean_distance, distances[1:].mean(), rtol=1e-6)
  lost = jax.tree.map(lambda x: x.at[1:].set(jnp.nan), stack())
  _, state = tx.update(lost, state, PARAMS)
  assert state.mean_distance == state.noise_scale == -1
  np.testing.assert_array_equal(state.distances, -1)
  assert gaf_optax.gaf().init(PARAMS).distances is None


@pytest.mark.parametrize("name", ["plain", "leaf", "anchor", "multi_steps"])
def test_grad_norm_is_that_of_the_result(name):
  """The norm of the compared leaves; 0 without agreement, -1 if not known."""
  options = {**OPTIONS.get(name, {}), "tau": 0.6}
  if name == "leaf":
    options["groups"] = lambda path, leaf: None if path[0].key == "b" else 0
  if name == "multi_steps":
    tx = gaf_optax.multi_steps(optax.identity(), K, 0.6)
  else:
    tx = gaf_optax.gaf(**options)
  state, update = tx.init(PARAMS), jax.jit(tx.update)
  agreed = []
  for seed in range(6):
    sign = jnp.where(jnp.arange(K) < seed, -1.0, 1.0)
    grads = {
      "w": stack(seed)["w"] * sign[:, None] * 10.0**seed,
      "b": stack(seed)["b"] * 10.0**seed,
    }
    if name == "multi_steps":
      for i in range(K):
        gradient, state = update(jax.tree.map(lambda x: x[i], grads), state, PARAMS)
    else:
      gradient, state = update(grads, state, PARAMS)
    found = gaf_optax.metrics(state)
    values = [gradient["w"]] if name == "leaf" else jax.tree.leaves(gradient)
    flat = np.concatenate([np.ravel(x).astype(np.float64) for x in values])
    np.testing.assert_allclose(found["grad_norm"], np.linalg.norm(flat), rtol=1e-4)
    agreed.append(bool(found["agreed"]))
  assert agreed.count(True) > 2
  assert GafState._fields[-1] == "grad_norm"  # Other code names fields by position.


def test_grad_norm_is_unknown_with_an_embedding():
  tx = gaf_optax.gaf(embed=jnp.sign)
  _, state = tx.update(stack(), tx.init(PARAMS), PARAMS)
  assert state.ready and gaf_optax.metrics(state)["grad_norm"] == -1


@pytest.mark.parametrize("name", ["plain", "leaf", "anchor"])
def test_noise_scale_is_the_definition(name):
  """Over the finite ones, summed over groups, and independent of an anchor."""
  options = {**OPTIONS[name], "tau": 2.0}
  options.pop("num_microbatches", None)
  tx = gaf_optax.gaf(**options)
  state, update = tx.init(PARAMS), jax.jit(tx.update)
  for seed, scale in enumerate((1e-12, 1.0, 1e13)):
    grads = jax.tree.map(lambda x: jnp.float32(scale) * x, stack(seed, 7))
    if seed == 1:
      grads["w"] = grads["w"].at[3, 1].set(jnp.nan)
    _, state = update(grads, state, PARAMS)
    want = oracle.noise_scale(list(grads.values()))
    found = float(gaf_optax.metrics(state)["noise_scale"])
    assert found == pytest.approx(want, rel=1e-4) and 0 < want < np.inf


def test_noise_scale_without_anything_in_common_and_of_one():
  tx = gaf_optax.gaf(2.0)
  for rows, want in [
    ([[1.0, 0.0], [-1.0, 0.0]], np.inf),
    ([[0.0, 0.0], [0.0, 0.0]], np.inf),
    ([[1.0, 0.0], [jnp.nan, 0.0]], -1),
  ]:
    _, state = tx.update(jnp.array(rows), tx.init(jnp.zeros(2)))
    assert float(gaf_optax.metrics(state)["noise_scale"]) == want


def same(seed=0, k=K):
  one = stack(seed, 1)
  return jax.tree.map(lambda x: jnp.repeat(x, k, axis=0), one)


@pytest.mark.parametrize("form", ["gaf", "anchor", "multi_steps", "pmap"])
def test_copies_are_counted(form):
  """In consecutive steps; different micro-gradients reset the counter."""
  k = K
  options = dict(anchor_decay=0.5) if form == "anchor" else {}
  updates = [same(0, k), same(1, k), stack(2, k), same(3, k)]
  if form == "pmap":
    tx = gaf_optax.gaf(axis_name="data")

    def run(*mine):
      state, found = tx.init(PARAMS), []
      for i, grads in enumerate(mine):
        if i != 2:  # As if averaged by pmean.
          grads = jax.lax.pmean(grads, "data")
        _, state = tx.update(grads, state, PARAMS)
        found.append(gaf_optax.metrics(state)["num_identical_steps"])
      return jnp.stack(found)

    updates = [stack(i, device_mappings.N) for i in range(4)]
    found = jax.pmap(run, axis_name="data")(*updates)[0]
  else:
    found = []
    if form == "multi_steps":
      tx = gaf_optax.multi_steps(optax.identity(), K)
    else:
      tx = gaf_optax.gaf(**options)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for grads in updates:
      if form == "multi_steps":
        for i in range(K):
          _, state = update(jax.tree.map(lambda x: x[i], grads), state, PARAMS)
      else:
        _, state = update(grads, state, PARAMS)
      found.append(int(gaf_optax.metrics(state)["num_identical_steps"]))
  np.testing.assert_array_equal(found, [1, 2, 0, 1])


def test_zeros_and_lost_ones_are_no_copies():
  tx = gaf_optax.gaf()
  zeros = jax.tree.map(jnp.zeros_like, stack())
  lost = jax.tree.map(lambda x: x.at[1:].set(jnp.nan), stack())
  for grads in (zeros, lost):
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    assert int(gaf_optax.metrics(state)["num_identical_steps"]) == 0


def test_ten_steps_of_copies_warn():
  tx = gaf_optax.gaf()
  state, update = tx.init(PARAMS), jax.jit(tx.update)
  for _ in range(9):
    _, state = update(same(), state, PARAMS)
  gaf_optax.metrics(jax.block_until_ready(state))
  _, state = update(same(), state, PARAMS)
  jax.block_until_ready(state)
  with pytest.warns(
    UserWarning, match="all micro-gradients of the last 10 steps were identical"
  ) as record:
    gaf_optax.metrics(state)
  assert record[0].filename == __file__


def chain_state():
  return optax.chain(gaf_optax.gaf(), optax.sgd(0.1)).init(PARAMS)


OTHER = {"v": jnp.zeros((2, 2))}


def test_a_state_of_another_transformation():
  for tx, state, message in [
    (gaf_optax.gaf(), chain_state(), "got tuple. Is it the state of a chain"),
    (gaf_optax.gaf(), optax.adam(1.0).init(PARAMS)[0], "got ScaleByAdamState"),
    (gaf_optax.apply_if_agreed(optax.sgd(1.0)), chain_state(), "ApplyIfAgreedState"),
    (
      gaf_optax.gaf(num_microbatches=K),
      gaf_optax.gaf().init(PARAMS),
      "num_microbatches is 4, but the state lacks",
    ),
    (
      gaf_optax.gaf(num_microbatches=K),
      gaf_optax.gaf(num_microbatches=8).init(PARAMS),
      "num_microbatches is 4, but the state holds 8",
    ),
    (
      gaf_optax.gaf(),
      gaf_optax.gaf(anchor_decay=0.5).init(PARAMS),
      "anchor_decay is not given, but the state has",
    ),
    (
      gaf_optax.gaf(gaf_optax.target_accept_rate(0.5)),
      gaf_optax.gaf().init(PARAMS),
      "tau is _TargetAcceptRate.* the state lacks the field steered",
    ),
    (
      gaf_optax.gaf(anchor_decay=0.5),
      gaf_optax.gaf(anchor_decay=0.5).init(OTHER),
      r"no average for leaf \['b'\].*init called with different",
    ),
    (
      gaf_optax.gaf(anchor_decay=0.5),
      gaf_optax.gaf(anchor_decay=0.5).init({**PARAMS, "w": jnp.zeros(5)}),
      r"average of shape \(5,\) for leaf \['w'\] of shape \(3,\)",
    ),
  ]:
    with pytest.raises(ValueError, match=message):
      tx.update(stack(), state, PARAMS)


def test_a_stream_of_another_tree():
  one = jax.tree.map(lambda x: x[0], stack())
  tx = gaf_optax.multi_steps(optax.identity(), K)
  with pytest.raises(ValueError, match="the state has no average for leaf"):
    tx.update(one, tx.init(OTHER), PARAMS)
  with pytest.raises(ValueError, match="MultiStepsState"):
    tx.update(one, chain_state(), PARAMS)


@pytest.mark.parametrize(
  "make",
  [
    gaf_optax.apply_if_agreed,
    gaf_optax.apply_if_nonzero,
    lambda inner: gaf_optax.multi_steps(inner, K),
  ],
  ids=["apply_if_agreed", "apply_if_nonzero", "multi_steps"],
)
def test_a_filter_within_a_filter(make):
  tx = make(optax.chain(gaf_optax.gaf(), optax.sgd(0.1)))
  with pytest.raises(ValueError, match="already filtered. Remove the gaf"):
    tx.init(PARAMS)


def test_a_traced_tau_out_of_range_shows_in_metrics():
  @jax.jit
  def run(tau):
    tx = gaf_optax.gaf(tau)
    return gaf_optax.metrics(tx.update(stack(), tx.init(PARAMS), PARAMS)[1])

  for tau, accepted in [(3.0, K), (-1.0, 0), (np.nan, 0)]:
    found = run(jnp.float32(tau))
    np.testing.assert_equal(float(found["threshold"]), tau)
    assert int(found["num_accepted"]) == accepted


def test_unreduced_gradients_are_refused():
  mesh = device_mappings.mesh(kind=AxisType.Explicit)
  sharding = lambda spec: jax.NamedSharding(mesh, spec)
  x = jax.device_put(jnp.ones((16, 8)), sharding(P(None, "data")))
  y = jax.device_put(jnp.ones((8, 3)), sharding(P("data")))
  tx = gaf_optax.gaf()

  def step(x, y):
    grads = jnp.einsum("ij,jk->ik", x, y, out_sharding=sharding(P(unreduced={"data"})))
    return tx.update(grads, tx.init(jnp.zeros(3)))[0]

  with (
    jax.set_mesh(mesh),
    pytest.raises(ValueError, match="is unreduced: its sum over devices"),
  ):
    jax.jit(step)(x, y)
