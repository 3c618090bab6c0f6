"""Stacks that each device filters for itself, inside JAX's mappings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import gaf_optax
import oracle

N, K = 4, 12
MANY = 40  # So many are compared with a running sum, on CPU.


def stacks(k=K):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((N, k, 7)) + rng.standard_normal((N, 1, 7))
  x[1, 2] = np.nan  # so that the members take both forms of the Gram matrix
  return jnp.asarray(x, jnp.float32)


def expected(x, tau=0.6):
  return [oracle.gaf([member], tau).gradient[0] for member in x]


def filtered(x, **options):
  tx = gaf_optax.gaf(0.6, **options)
  return tx.update(x, tx.init(x[0]))[0]


@pytest.mark.parametrize("k", [K, MANY])
@pytest.mark.parametrize("mapping", [jax.vmap, jax.pmap])
def test_vmap_and_pmap(mapping, k):
  x = stacks(k)
  np.testing.assert_allclose(mapping(filtered)(x), expected(x), atol=1e-6)


def shard_mapped(f, check):
  mesh = jax.make_mesh((N,), ("data",), axis_types=(AxisType.Auto,))
  spec = PartitionSpec("data")
  return jax.jit(
    jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check)
  )


@pytest.mark.parametrize("k", [K, MANY])
@pytest.mark.parametrize("check", [True, False])
def test_shard_map(check, k):
  x = stacks(k)
  got = shard_mapped(lambda x: filtered(x[0])[None], check)(x)
  np.testing.assert_allclose(got, expected(x), atol=1e-6)


@pytest.mark.parametrize("check", [True, False])
def test_anchor_and_groups_trace_under_shard_map(check):
  x = stacks()
  for options in (dict(anchor_decay=0.9), dict(groups="leaf")):
    got = shard_mapped(lambda x, o=options: filtered(x[0], **o)[None], check)(x)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("check", [True, False])
def test_value_and_grad_under_shard_map(check):
  x = stacks()

  def f(x):
    params = jnp.zeros(7)
    if check:  # so that gradients stay those of the member
      params = jax.lax.pcast(params, "data", to="varying")
    of_member = gaf_optax.value_and_grad(lambda p, b: jnp.sum(p * b[0]), K, 0.6)
    return of_member(params, x[0])[1][None]

  np.testing.assert_allclose(shard_mapped(f, check)(x), expected(x), atol=1e-6)


def test_two_levels_by_hand():
  """Each member filters its own stack, then the members' results are filtered."""
  x = stacks()
  inner = jax.vmap(filtered)(x)
  two = optax.chain(gaf_optax.gaf(1.2), optax.sgd(1.0))
  updates, _ = two.update(inner, two.init(x[0, 0]))
  want = oracle.gaf([np.array(expected(x))], 1.2).gradient[0]
  np.testing.assert_allclose(updates, -want, atol=1e-6)
