"""The state: no NaN in it, copies counted and warned of, states of others refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import across
import gaf_optax
from gaf_optax import rules

K = 4
PARAMS = {"w": jnp.zeros(3), "b": jnp.zeros(())}


def stack(seed=0, k=K):
  rng = np.random.default_rng(seed)
  make = lambda x: jnp.asarray(1 + rng.standard_normal((k, *x.shape)), jnp.float32)
  return jax.tree.map(make, PARAMS)


@pytest.fixture
def debug_nans():
  with jax.debug_nans(True):
    yield


OPTIONS = {
  "plain": dict(),
  "members": dict(num_microbatches=K),
  "anchor": dict(anchor_decay=0.5, num_microbatches=K),
  "memory": dict(memory_decay=0.5, num_microbatches=K),
  "leaf": dict(groups="leaf", rule=rules.most_neighbors()),
  "steered": dict(tau=gaf_optax.target_accept_rate(0.5)),
  "median": dict(rule=rules.geometric_median(), num_microbatches=K),
}


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("name", OPTIONS)
def test_debug_nans_finds_none_of_ours(name, jit, debug_nans):
  """In `init`, in a step of one zero and one huge micro-gradient, in what is read."""
  tx = gaf_optax.apply_if_agreed(optax.sgd(0.1), **OPTIONS[name])
  state = tx.init(PARAMS)
  update = jax.jit(tx.update) if jit else tx.update
  for seed in range(2):
    grads = stack(seed)
    if seed:
      grads = jax.tree.map(lambda x: x.at[0].set(0).at[1].mul(1e25), grads)
    _, state = update(grads, state, PARAMS)
    for leaf in jax.tree.leaves(state):
      assert not np.isnan(np.asarray(leaf)).any()
  gaf_optax.metrics(state)
  if name in ("members", "anchor", "memory"):
    assert state.gaf_state.distances.shape == (K,)
  if name == "memory":
    gaf_optax.sources(state)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_debug_nans_finds_none_in_streamed_forms(jit, debug_nans):
  maybe_jit = jax.jit if jit else lambda f: f
  tx = gaf_optax.multi_steps(optax.sgd(0.1), K, num_microbatches=K)
  state, update = tx.init(PARAMS), maybe_jit(tx.update)
  for i in range(K):
    _, state = update(jax.tree.map(lambda x: x[i], stack()), state, PARAMS)
  assert np.isnan(gaf_optax.metrics(state)["noise_scale"])
  assert np.isnan(state.gaf_state.distances).sum() == 1  # The first has no other.

  loss = lambda p, x: jnp.mean((x @ p["w"] + p["b"] - 1) ** 2)
  x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3)), jnp.float32)
  by_example = dict(
    compare=lambda path, leaf: path[0].key == "w", rule=rules.min_neighbors(0.5)
  )
  for options in (dict(), by_example):
    filtered = maybe_jit(gaf_optax.value_and_grad(loss, K, **options))
    _, _, agreement = filtered(PARAMS, x)
    assert agreement.distances.shape == (K,)
  found = gaf_optax.example_weights(x, x[:, :2])
  assert np.isnan(found.distances).any() and found.weights.shape == (8,)
  assert gaf_optax.cosine_distance(x * 1e25, jnp.ones_like(x)) > 0


def test_what_users_read_is_nan():
  tx = gaf_optax.gaf(num_microbatches=K)
  state = tx.init(PARAMS)
  assert np.isnan(state.mean_distance) and np.isnan(state.noise_scale)
  assert np.isnan(state.distances).all()
  _, state = tx.update(stack(), state, PARAMS)
  assert np.isnan(state.distances).sum() == 1
  np.testing.assert_allclose(state.mean_distance, np.nanmean(state.distances))
  assert gaf_optax.gaf().init(PARAMS).distances is None


def same(seed=0, k=K):
  one = stack(seed, 1)
  return jax.tree.map(lambda x: jnp.repeat(x, k, axis=0), one)


@pytest.mark.parametrize("form", ["gaf", "anchor", "one by one", "multi_steps", "pmap"])
def test_copies_are_counted(form):
  """Steps in a row; one step of others starts the count again."""
  k = 40 if form == "one by one" else K
  options = dict(anchor_decay=0.5) if form == "anchor" else {}
  steps = [same(0, k), same(1, k), stack(2, k), same(3, k)]
  if form == "pmap":
    tx = gaf_optax.gaf(axis_name="data")

    def run(*mine):
      state, found = tx.init(PARAMS), []
      for i, grads in enumerate(mine):
        if i != 2:  # A pmean left in.
          grads = jax.lax.pmean(grads, "data")
        _, state = tx.update(grads, state, PARAMS)
        found.append(gaf_optax.metrics(state)["identical"])
      return jnp.stack(found)

    steps = [stack(i, across.N) for i in range(4)]
    found = jax.pmap(run, axis_name="data")(*steps)[0]
  else:
    found = []
    if form == "multi_steps":
      tx = gaf_optax.multi_steps(optax.identity(), K)
    else:
      tx = gaf_optax.gaf(**options)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for grads in steps:
      if form == "multi_steps":
        for i in range(K):
          _, state = update(jax.tree.map(lambda x: x[i], grads), state, PARAMS)
      else:
        _, state = update(grads, state, PARAMS)
      found.append(int(gaf_optax.metrics(state)["identical"]))
  np.testing.assert_array_equal(found, [1, 2, 0, 1])


def test_zeros_and_lost_ones_are_no_copies():
  tx = gaf_optax.gaf()
  zeros = jax.tree.map(jnp.zeros_like, stack())
  lost = jax.tree.map(lambda x: x.at[1:].set(jnp.nan), stack())
  for grads in (zeros, lost):
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    assert int(gaf_optax.metrics(state)["identical"]) == 0


@pytest.mark.parametrize("where", ["metrics", "update"])
def test_ten_steps_of_copies_warn(where):
  tx = gaf_optax.gaf()
  state, update = tx.init(PARAMS), jax.jit(tx.update)
  for _ in range(9):
    _, state = update(same(), state, PARAMS)
  jax.block_until_ready(state)
  gaf_optax.metrics(state)
  tx.update(same(), state, PARAMS)
  _, state = update(same(), state, PARAMS)
  jax.block_until_ready(state)
  look = {
    "metrics": lambda: gaf_optax.metrics(state),
    "update": lambda: tx.update(same(), state, PARAMS),
  }
  with pytest.warns(UserWarning, match="copies of one") as record:
    look[where]()
  assert record[0].filename == __file__


def chain_state():
  return optax.chain(gaf_optax.gaf(), optax.sgd(0.1)).init(PARAMS)


OTHER = {"v": jnp.zeros((2, 2))}


@pytest.mark.parametrize(
  "tx, state, message",
  [
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
      "num_microbatches is 4, but the state is of 8",
    ),
    (
      gaf_optax.gaf(),
      gaf_optax.gaf(anchor_decay=0.5).init(PARAMS),
      "anchor_decay is not given, but the state has",
    ),
    (
      gaf_optax.gaf(gaf_optax.target_accept_rate(0.5)),
      gaf_optax.gaf().init(PARAMS),
      "tau is TargetAcceptRate",
    ),
    (
      gaf_optax.gaf(anchor_decay=0.5),
      gaf_optax.gaf(anchor_decay=0.5).init(OTHER),
      "nothing was found. Did init get other",
    ),
    (
      gaf_optax.gaf(anchor_decay=0.5),
      gaf_optax.gaf(anchor_decay=0.5).init({**PARAMS, "w": jnp.zeros(5)}),
      r"\(3,\) for leaf \['w'\], but one of shape \(5,\)",
    ),
  ],
  ids=[
    "chain",
    "adam",
    "agreed",
    "members",
    "number",
    "anchor",
    "steered",
    "tree",
    "shape",
  ],
)
def test_a_state_of_another_transformation(tx, state, message):
  with pytest.raises(ValueError, match=message):
    tx.update(stack(), state, PARAMS)


def test_a_stream_of_another_tree():
  one = jax.tree.map(lambda x: x[0], stack())
  tx = gaf_optax.multi_steps(optax.identity(), K)
  with pytest.raises(ValueError, match="nothing was found"):
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
  with pytest.raises(ValueError, match="filtered already"):
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
  mesh = across.mesh(kind=AxisType.Explicit)
  sharding = lambda spec: jax.NamedSharding(mesh, spec)
  x = jax.device_put(jnp.ones((16, 8)), sharding(P(None, "data")))
  y = jax.device_put(jnp.ones((8, 3)), sharding(P("data")))
  tx = gaf_optax.gaf()

  def step(x, y):
    grads = jnp.einsum("ij,jk->ik", x, y, out_sharding=sharding(P(unreduced={"data"})))
    return tx.update(grads, tx.init(jnp.zeros(3)))[0]

  with (
    jax.set_mesh(mesh),
    pytest.raises(ValueError, match="is unreduced, a sum over devices"),
  ):
    jax.jit(step)(x, y)
