"""One of four processes; one of them starts to compute wrong gradients.

Follows "Find the bad device" of docs/devices.md. Process 0 prints the accused device
and the step.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import gaf_optax

BEGIN, FAULTY, STEPS, ROWS = 60, 2, 260, 16


def loss(params, x, y):
  logits = jax.nn.relu(x @ params["hidden"]) @ params["out"]
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def low(state):
  table = gaf_optax.sources(state)
  usual = jnp.median(table["agreement"])
  return (table["agreement"] < usual / 2) & (usual > 0.03) & (table["num_steps"] > 20)


def main(coordinator, process):
  jax.config.update("jax_platforms", "cpu")
  jax.distributed.initialize(
    coordinator, 4, process, coordinator_bind_address=coordinator
  )
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
  robust = gaf_optax.gaf(
    gaf_optax.adaptive_tau(),
    rule=gaf_optax.rules.majority(),
    axis_name="data",
    memory_decay=0.98,
    num_microbatches=4,
    max_norm_ratio=1.0,
  )
  tx = optax.chain(robust, optax.sgd(0.1))

  def step(params, state, x, y, factor):
    grads = jax.grad(loss)(jax.lax.pcast(params, "data", to="varying"), x, y)
    grads = jax.tree.map(lambda g: g * factor[0], grads)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  data = P("data")
  step = jax.jit(
    jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), data, data, data), out_specs=P())
  )
  placed = lambda spec, x: jax.make_array_from_process_local_data(
    NamedSharding(mesh, spec), np.asarray(x)
  )
  digits = load_digits()
  keys = jax.random.split(jax.random.key(0))
  params = {
    "hidden": jax.random.normal(keys[0], (64, 32)) / 8,
    "out": jax.random.normal(keys[1], (32, 10)) / 6,
  }
  whole = lambda tree: jax.tree.map(lambda x: placed(P(), x), tree)
  params, state = whole(params), whole(tx.init(params))
  rng, streak = np.random.default_rng(process), np.zeros(4, int)
  for i in range(STEPS):
    rows = rng.integers(len(digits.target), size=ROWS)
    factor = -1.0 if process == FAULTY and i >= BEGIN else 1.0
    params, state = step(
      params,
      state,
      placed(data, digits.data[rows].astype(np.float32) / 16),
      placed(data, digits.target[rows].astype(np.int32)),
      placed(data, np.array([factor], np.float32)),
    )
    here = jax.tree.map(lambda x: x.addressable_data(0), state)
    streak = np.where(low(here), streak + 1, 0)
    if streak.max() >= 50:
      break
  if process == 0:
    print(f"accused {np.argmax(streak)} after step {i}")


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]))
