"""Sharded training: each form of docs/devices.md decides as on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import device_mappings
import exchange
import gaf_optax
import oracle
import reference_forms

TAU = 0.41
N, WIDTH, HIDDEN = 8, 128, 256
SPECS = {"down": P(None, "data"), "scale": P(), "up": P("data"), "whole": P()}
WHOLE = jax.tree.map(lambda _: P(), SPECS)
STACK = jax.tree.map(lambda s: P(None, *s), SPECS)
VALUES = 2 * WIDTH * HIDDEN + WIDTH + 1
# Sharded over the second of two mesh axes, and over both.
HALVES = {"down": P(None, "fsdp"), "scale": P(), "up": P("fsdp"), "whole": P()}
BOTH = ("replica", "fsdp")


def loss(params, x, y):
  hidden = jnp.tanh(x @ params["up"]) * params["scale"]
  return jnp.mean((hidden @ params["down"] + params["whole"][None] - y) ** 2)


def model():
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  params = {
    "down": normal(HIDDEN, WIDTH) / 16,
    "scale": jnp.ones(()),
    "up": normal(WIDTH, HIDDEN) / 16,
    "whole": jnp.zeros(WIDTH),
  }
  x = normal(N, 4, WIDTH) + normal(1, 1, WIDTH)  # Noise plus a common part.
  y = normal(N, 4, WIDTH) + normal(1, 1, WIDTH)
  return params, x, y.at[5].multiply(-1)


def by_member(params, x, y):
  return jax.vmap(jax.grad(loss), (None, 0, 0))(params, x, y)


@functools.cache
def wanted(k):
  """The oracle's result for the micro-gradients of k devices."""
  params, x, y = model()
  grads = jax.jit(by_member)(params, *(a.reshape(k, -1, WIDTH) for a in (x, y)))
  result = oracle.gaf(list(grads.values()), TAU)
  assert result.agreed and result.margin > 1e-3
  return result


def place(tree, mesh, specs):
  put = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))
  return jax.tree.map(put, tree, specs)


def reshard(tree, mesh, specs):
  put = lambda x, s: jax.sharding.reshard(x, NamedSharding(mesh, s))
  return jax.tree.map(put, tree, specs)


def run(step, tx, params, batch, specs):
  """Compiles and runs the step, and compares its result with the oracle."""
  x, y = batch
  compiled = jax.jit(step).lower(params, tx.init(params), x, y).compile()
  gradient, state = compiled(params, tx.init(params), x, y)
  want = wanted(x.shape[0])
  found = reference_forms.compared(state.distances)
  np.testing.assert_allclose(found, want.distances, atol=1e-5)
  np.testing.assert_array_equal(state.accepted, want.accepted)
  for name, value in zip(sorted(gradient), want.gradient):
    np.testing.assert_allclose(gradient[name], value, atol=2e-6)
    local = NamedSharding(params[name].sharding.mesh, specs[name])
    assert gradient[name].sharding.is_equivalent_to(local, gradient[name].ndim)
  return compiled


def sent(compiled):
  """Bytes sent per device and temporary memory, relative to the gradient."""
  found = exchange.collectives(compiled.as_text(), N)
  temporary = compiled.memory_analysis().temp_size_in_bytes
  total = sum(collective.sent for collective in found)
  return total / (4 * VALUES), temporary / (4 * VALUES)


def test_some_members_are_dropped():
  """So that the tests below can fail."""
  assert 2 <= wanted(N).accepted.sum() < N


@pytest.mark.usefixtures("compiled_as_users_do")
class TestFSDP:
  # A gather of the parameters sends 7/8, as does each half of an all-reduce.
  SHARE = (N - 1) / N
  # Both halves of an exchange, with each slice padded to 1024 values.
  PADDING = 2 * (N - 1) * 1024 / VALUES
  # The blocks of N rows in the Gram product, relative to a gradient.
  BLOCK = N * 2048 / VALUES

  def batch(self, mesh):
    params, x, y = model()
    batch = place((x, y), mesh, (P("data"), P("data")))
    return place(params, mesh, SPECS), batch

  def test_explicit_axes(self):
    mesh = device_mappings.mesh(kind=AxisType.Explicit)
    tx = gaf_optax.gaf(TAU, num_microbatches=N)
    params, batch = self.batch(mesh)

    def step(params, state, x, y):
      grads = reshard(by_member(reshard(params, mesh, WHOLE), x, y), mesh, STACK)
      gradient, state = tx.update(grads, state, params)
      return reshard(gradient, mesh, SPECS), state

    bytes, temporary = sent(run(step, tx, params, batch, SPECS))
    # Moving them costs as much as the reduce-scatter of the plain step.
    assert bytes <= 1.03 * 2 * self.SHARE
    assert temporary <= 3 + self.BLOCK

  def test_auto_axes(self):
    mesh = device_mappings.mesh()
    tx = gaf_optax.gaf(TAU, param_axes="data", num_microbatches=N)
    tx = gaf_optax.on_shards(tx, mesh, SPECS)
    params, batch = self.batch(mesh)

    def step(params, state, x, y):
      return tx.update(by_member(params, x, y), state, params)

    bytes, temporary = sent(run(step, tx, params, batch, SPECS))
    assert bytes <= 1.03 * 2 * self.SHARE
    assert temporary <= 3 + self.BLOCK

  @pytest.mark.parametrize("moved", [True, False])
  def test_shard_map(self, moved):
    mesh = device_mappings.mesh()
    params, batch = self.batch(mesh)
    across_devices = dict(axis_name="data") if not moved else dict(param_axes=SPECS)
    tx = gaf_optax.gaf(TAU, num_microbatches=N, **across_devices)
    sharded_dim = lambda spec: [*spec].index("data") if "data" in [*spec] else None

    def gather(shard, spec):
      d = sharded_dim(spec)
      if d is None:
        return shard
      return jax.lax.all_gather(shard, "data", axis=d, tiled=True)

    def move(grad, spec):
      d = sharded_dim(spec)
      if d is None:
        return jax.lax.all_gather(grad, "data")
      return jax.lax.all_to_all(grad[None], "data", d + 1, 0, tiled=True)

    def member(params, state, x, y):
      if not moved:
        local = jax.lax.pcast(params, "data", to="varying")
        return tx.update(jax.grad(loss)(local, x[0], y[0]), state)
      grads = jax.grad(loss)(jax.tree.map(gather, params, SPECS), x[0], y[0])
      return tx.update(jax.tree.map(move, grads, SPECS), state)

    # Whole parameters and gradients, or shards.
    specs = SPECS if moved else WHOLE
    mapped = jax.shard_map(
      member,
      mesh=mesh,
      in_specs=(specs, P(), P("data"), P("data")),
      out_specs=(specs, P()),
      check_vma=not moved,
    )

    def step(*args):
      gradient, state = mapped(*args)
      local = lambda x, s: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, s))
      return jax.tree.map(local, gradient, SPECS), state

    bytes, temporary = sent(run(step, tx, params, batch, SPECS))
    most = 2 * self.SHARE if moved else 3 * self.SHARE + self.PADDING
    assert bytes <= 1.03 * most
    assert temporary <= (3 if moved else 4.5) + self.BLOCK

  @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
  def test_one_microbatch_after_the_other(self, kind):
    mesh = device_mappings.mesh(kind=kind)
    params, x, y = model()
    params = place(params, mesh, SPECS)
    options = dict(num_microbatches=N)
    inner = optax.sgd(1.0, momentum=0.9)
    if kind == AxisType.Auto:
      tx = gaf_optax.multi_steps(inner, N, TAU, param_axes="data", **options)
      tx = gaf_optax.on_shards(tx, mesh, SPECS, lead=())
    else:
      tx = gaf_optax.multi_steps(inner, N, TAU, **options)

    @jax.jit
    def step(params, state, x, y):
      use = reshard if kind == AxisType.Explicit else lambda tree, *_: tree
      local_loss = lambda p, x, y: loss(use(p, mesh, WHOLE), x, y)
      return tx.update(jax.grad(local_loss)(params, x, y), state, params)

    state = tx.init(params)
    for i in range(N):
      # Each row of a microbatch twice, so that the rows spread over the devices.
      rows = (jnp.repeat(a[i], 2, axis=0) for a in (x, y))
      microbatch = place(tuple(rows), mesh, (P("data"), P("data")))
      updates, state = jax.block_until_ready(step(params, state, *microbatch))
    want = wanted(N)
    found = reference_forms.compared(state.gaf_state.distances)
    np.testing.assert_allclose(found, want.distances, atol=1e-5)
    for name, value in zip(sorted(updates), want.gradient):
      np.testing.assert_allclose(updates[name], -value, atol=2e-6)


class TestReplicasOfShards:
  def batch(self, mesh, k, spec):
    params, x, y = model()
    x, y = (a.reshape(k, -1, WIDTH) for a in (x, y))
    return place(params, mesh, HALVES), place((x, y), mesh, (spec, spec))

  @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
  def test_each_replica_is_a_member(self, kind):
    mesh = device_mappings.mesh((2, 4), BOTH, kind)
    params, batch = self.batch(mesh, 2, P(*BOTH))
    options = dict(num_microbatches=2)
    if kind == AxisType.Auto:
      options |= dict(axis_name="replica", stacked=True, param_axes="fsdp")
      tx = gaf_optax.on_shards(
        gaf_optax.gaf(TAU, **options), mesh, HALVES, lead=("replica",)
      )
    else:
      tx = gaf_optax.gaf(TAU, **options)

    def step(params, state, x, y):
      use = reshard if kind == AxisType.Explicit else lambda tree, *_: tree
      local_loss = lambda p, x, y: loss(use(p, mesh, WHOLE), x, y)
      grads = jax.vmap(jax.grad(local_loss), (None, 0, 0))(params, x, y)
      return tx.update(grads, state, params)

    run(step, tx, params, batch, HALVES)

  def test_each_device_is_a_member(self):
    mesh = device_mappings.mesh((2, 4), BOTH, AxisType.Explicit)
    params, batch = self.batch(mesh, N, P(BOTH))
    tx = gaf_optax.gaf(TAU, num_microbatches=N)
    eighths = lambda spec: [BOTH if name == "fsdp" else name for name in spec]
    stack = jax.tree.map(lambda spec: P(None, *eighths(spec)), HALVES)

    def step(params, state, x, y):
      grads = reshard(by_member(reshard(params, mesh, WHOLE), x, y), mesh, stack)
      gradient, state = tx.update(grads, state, params)
      return reshard(gradient, mesh, HALVES), state

    run(step, tx, params, batch, HALVES)


@pytest.mark.parametrize(
  "k, compared, where", [(4, None, "fsdp"), (2, "up", "tensor"), (32, "up", "fsdp")]
)
def test_a_batch_on_an_explicit_mesh(k, compared, where):
  """`value_and_grad` of a batch sharded over its rows, as on one device."""
  params, x, y = model()
  x, y = (a.reshape(N * 4, WIDTH) for a in (x, y))
  x = x.at[3].set(jnp.nan)  # One microbatch is not finite.
  shape, names = ((2, 4), ("data", "model")) if where == "tensor" else ((N,), ("data",))
  specs = {
    "fsdp": SPECS,
    "tensor": jax.tree.map(lambda s: P(*("model" if n else n for n in s)), SPECS),
  }[where]
  mesh = device_mappings.mesh(shape, names, AxisType.Explicit)

  def filtered(loss):
    options = dict(tau=TAU)
    if compared is not None:
      near = gaf_optax.rules.nearest_neighbors(k // 2)
      select = lambda path, leaf: path[0].key == compared
      options = dict(tau=gaf_optax.tau_quantile(0.5), rule=near, compare=select)
    return jax.jit(gaf_optax.value_and_grad(loss, k, **options))

  gathered = lambda params, x, y: loss(reshard(params, mesh, WHOLE), x, y)
  _, want, expected = filtered(loss)(params, x, y)
  batch = place((x, y), mesh, (P("data"), P("data")))
  _, grads, found = filtered(gathered)(place(params, mesh, specs), *batch)
  np.testing.assert_array_equal(found.accepted, expected.accepted)
  assert int(found.nonfinite) == 1 and (k == 2 or found.agreed)
  for name, leaf in grads.items():
    wanted_sharding = NamedSharding(mesh, specs[name])
    assert leaf.sharding.is_equivalent_to(wanted_sharding, leaf.ndim)
    np.testing.assert_allclose(leaf, want[name], rtol=1e-4, atol=1e-6)


def test_a_batch_that_devices_do_not_divide():
  params, x, y = model()
  mesh = device_mappings.mesh(kind=AxisType.Explicit)
  batch = place((x.reshape(-1, WIDTH), y.reshape(-1, WIDTH)), mesh, (P("data"),) * 2)
  with pytest.raises(ValueError, match="8 devices .*16 microbatches has 2 rows"):
    gaf_optax.value_and_grad(loss, 16)(place(params, mesh, WHOLE), *batch)
