"""`worker_momentum` against its recursion in NumPy float64, in every mapping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import device_mappings
import gaf_optax
import oracle
from gaf_optax import rules

K, STEPS, DECAY, TAU = device_mappings.N, 6, 0.75, 0.9
SHAPES = {"w": (3, 5), "s": (), "h": ((16,), jnp.bfloat16)}


def trees():
  """Micro-gradients of each step: two are reversed, one is not finite in one leaf."""
  found = [device_mappings.stack(K, SHAPES, seed) for seed in range(STEPS)]
  for tree in found:
    for x in tree.values():
      x[5:7] *= -1
  found[2]["w"][3, 0, 0] = np.nan
  found[4]["s"][3] = np.inf
  return found


def averages(trees):
  """The output of each step, leaves `[k, *shape]` in float64."""
  wide = lambda tree: {name: np.asarray(x, np.float64) for name, x in tree.items()}
  means = {name: 0 * x for name, x in wide(device_mappings.stack(K, SHAPES)).items()}
  passed = []
  for tree in map(wide, trees):
    finite = np.all(
      [np.isfinite(x.reshape(K, -1)).all(1) for x in tree.values()], axis=0
    )
    for name, x in tree.items():
      for i in np.flatnonzero(finite):
        means[name][i] = DECAY * means[name][i] + (1 - DECAY) * x[i]
    keep = lambda x: finite.reshape(-1, *[1] * (x.ndim - 1))
    passed.append({n: np.where(keep(x), means[n], x) for n, x in tree.items()})
  return passed


def assert_same(found, want):
  for name, x in found.items():
    rtol = 1e-2 if name == "h" else 1e-5
    np.testing.assert_allclose(
      np.asarray(x, np.float64), want[name], rtol=rtol, atol=rtol, err_msg=name
    )


def test_stacks():
  tx = gaf_optax.worker_momentum(DECAY, num_microbatches=K)
  params = {
    **device_mappings.params_of(trees()[0]),
    "steps": jnp.int32(0),
    "none": None,
  }
  state = tx.init(params)
  assert state.averages["h"].dtype == jnp.float32
  for tree, want in zip(trees(), averages(trees())):
    own = {**tree, "steps": jnp.zeros(K, jnp.int32), "none": None}
    found, state = jax.jit(tx.update)(own, state)
    assert found.pop("steps").shape == (K,) and found.pop("none") is None
    assert found["h"].dtype == jnp.bfloat16
    assert_same(found, want)


@pytest.mark.parametrize("mapping", device_mappings.ALL, ids=device_mappings.name)
def test_on_devices(mapping):
  """Each device keeps its state over the steps."""
  tx = gaf_optax.worker_momentum(DECAY)
  want = averages(trees())

  def run(rows):
    state = tx.init(jax.tree.map(lambda x: x[0], rows))
    if mapping in [(kind, True) for kind in AxisType]:
      state = jax.lax.pcast(state, "data", to="varying")

    def step(state, row):
      found, state = tx.update(row, state)
      return state, found

    return jax.lax.scan(step, state, rows)[1]

  stack = {n: np.stack([t[n] for t in trees()], axis=1) for n in SHAPES}
  found = device_mappings.mapped(run, stack, mapping)
  for i in range(STEPS):
    assert_same({n: x[:, i] for n, x in found.items()}, want[i])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_state_for_k_is_sharded_over_k_devices(kind, tmp_path):
  """Between calls it is a normal array, which a checkpoint can store."""
  mesh = device_mappings.mesh(kind=kind)
  tx = optax.chain(
    gaf_optax.worker_momentum(DECAY, num_microbatches=K),
    gaf_optax.gaf(TAU, axis_name="data", rule=rules.majority(), num_microbatches=K),
  )
  params = device_mappings.params_of(trees()[0])
  state = tx.init(params)
  of_state = (
    gaf_optax.WorkerMomentumState(jax.tree.map(lambda _: P("data"), params)),
    jax.tree.map(lambda _: P(), state[1]),
  )

  @jax.jit
  @jax.shard_map(mesh=mesh, in_specs=(P("data"), of_state), out_specs=(P(), of_state))
  def step(tree, state):
    return tx.update(jax.tree.map(lambda x: x[0], tree), state)

  place = lambda tree, specs: jax.device_put(
    tree, jax.tree.map(lambda s: jax.sharding.NamedSharding(mesh, s), specs)
  )
  state = place(state, of_state)
  for i, (tree, want) in enumerate(zip(trees(), averages(trees()))):
    if i == STEPS // 2:  # Interrupted and restored.
      target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
      with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        state = checkpointer.restore(tmp_path / "state", target)
    found, state = step(place(tree, {name: P("data") for name in SHAPES}), state)
    filtered = oracle.gaf(list(want.values()), TAU, "majority")
    np.testing.assert_array_equal(state[1].accepted, filtered.accepted)
    assert_same(found, dict(zip(want, filtered.gradient)))
  assert not filtered.accepted.all() and filtered.accepted.any()


def test_errors():
  for decay in (-0.1, 1.0, np.nan):
    with pytest.raises(ValueError, match="decay must be in"):
      gaf_optax.worker_momentum(decay)
  with pytest.raises(ValueError, match="num_microbatches must be at least 1"):
    gaf_optax.worker_momentum(DECAY, num_microbatches=0)
  params = jnp.zeros(3)
  alone = gaf_optax.worker_momentum(DECAY)
  stacked = gaf_optax.worker_momentum(DECAY, num_microbatches=4)
  for tx, grads, words in [
    (alone, jnp.ones((4, 3)), r"shape \(4, 3\).* pass num_microbatches=k"),
    (stacked, jnp.ones((2, 3)), r"shape \(2, 3\).* num_microbatches is 4"),
    (stacked, jnp.ones(3), r"shape \(3,\).*shape \(4, 3\)"),
    (stacked, {"w": jnp.ones((4, 3))}, r"leaf \['w'\].*no average. Was init called"),
  ]:
    with pytest.raises(ValueError, match=words):
      tx.update(grads, tx.init(params))
  with pytest.raises(ValueError, match="WorkerMomentumState"):
    alone.update(params, optax.EmptyState())
