"""Stacks that each device filters separately, inside JAX's mappings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import device_mappings
import gaf_optax
import oracle

K, TAU = 12, 0.6
MAPPINGS = ["vmap", "pmap", (AxisType.Auto, True), (AxisType.Auto, False)]


@pytest.mark.parametrize("mapping", MAPPINGS, ids=device_mappings.name)
def test_each_member_decides_for_itself(mapping):
  rows = device_mappings.stack(device_mappings.N * K, {"x": (7,), "y": (2,)})
  rows = jax.tree.map(lambda x: x.reshape(device_mappings.N, K, -1), rows)
  rows["x"] += device_mappings.stack(1, {"x": (device_mappings.N, 1, 7)}, 1)["x"][0]
  rows["x"][1, 2] = np.nan
  stacked = {
    "plain": gaf_optax.gaf(TAU),
    "leaf": gaf_optax.gaf(TAU, groups="leaf"),
    "anchor": gaf_optax.gaf(TAU, anchor_decay=0.9),  # The first step accepts all.
  }

  def loss(params, batch):
    terms = jax.tree.map(lambda p, b: jnp.sum(p * b[0]), params, batch)
    return sum(terms.values())

  def member(mine):
    params = jax.tree.map(lambda x: jnp.zeros(x.shape[1:]), mine)
    results = {
      name: tx.update(mine, tx.init(params), params)[0] for name, tx in stacked.items()
    }
    # Otherwise JAX sums the gradients over the devices.
    if mapping == (AxisType.Auto, True):
      params = jax.lax.pcast(params, "data", to="varying")
    _, results["streamed"], _ = gaf_optax.value_and_grad(loss, K, TAU)(params, mine)
    return results

  found = device_mappings.mapped(member, rows, mapping)
  agreed = set()
  for i, (x, y) in enumerate(zip(rows["x"], rows["y"])):
    want = oracle.gaf([x, y], TAU)
    # A non-finite value in one leaf makes the whole row non-finite.
    both = [np.where(want.finite[:, None], z, np.nan) for z in (x, y)]
    alone = [oracle.gaf([z], TAU).gradient[0] for z in both]
    mean = [z[want.finite].mean(0) for z in (x, y)]
    assert want.margin > 1e-4
    agreed.add(int(want.accepted.sum()))
    for name, (a, b) in {
      "plain": want.gradient,
      "streamed": want.gradient,
      "leaf": alone,
      "anchor": mean,
    }.items():
      np.testing.assert_allclose(found[name]["x"][i], a, atol=2e-6)
      np.testing.assert_allclose(found[name]["y"][i], b, atol=2e-6)
  assert len(agreed) > 2
