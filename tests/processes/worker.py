"""One process of a training run over the devices of several processes.

Data-parallel training as in user code: each device has its own batch, `apply_if_agreed`
filters across devices, and orbax saves every few steps. A run that starts in a
directory with checkpoints resumes from the newest.
"""

import argparse
import os
import pathlib
import re
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gaf_optax

TAU, LEARNING_RATE, MOMENTUM = 0.9, 0.02, 0.8
MEMBERS, ROWS, FEATURES, HIDDEN = 8, 32, 6, 16


def corrupted(step):
  return (step if step % 4 == 2 else step + 3) % MEMBERS


def batch(step, member):
  """A device's rows of a regression; the corrupted device has targets of opposite sign.

  Each step corrupts one device. If the filter starts with it, no other agrees, and the
  step is skipped.
  """
  rng = np.random.default_rng([step, member])
  x = rng.normal(size=(ROWS, FEATURES))
  y = np.tanh(x @ np.linspace(-1, 1, FEATURES)) + 0.05 * rng.normal(size=ROWS)
  if member == corrupted(step):
    y = -2 * y
  return {"x": x.astype(np.float32), "y": y.astype(np.float32)}


def initial_params():
  rng = np.random.default_rng(0)
  params = {
    "hidden": {
      "kernel": rng.normal(size=(FEATURES, HIDDEN)) / FEATURES**0.5,
      "bias": np.zeros(HIDDEN),
    },
    "out": {"kernel": 0.1 * rng.normal(size=HIDDEN), "bias": np.zeros(())},
  }
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def loss(params, rows):
  hidden = jnp.tanh(rows["x"] @ params["hidden"]["kernel"] + params["hidden"]["bias"])
  predicted = hidden @ params["out"]["kernel"] + params["out"]["bias"]
  return jnp.mean((predicted - rows["y"]) ** 2)


def train_step(mesh, tx):
  """The step; it also returns the micro-gradients, for the test."""

  def local(params, state, rows):
    # Otherwise the gradient would be the sum over all devices.
    varying = jax.lax.pcast(params, "data", to="varying")
    value, grads = jax.value_and_grad(loss)(varying, rows)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    grads = jax.tree.map(lambda g: g[None], grads)
    return params, state, jax.lax.pmean(value, "data"), grads

  return jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(P(), P(), P("data")),
      out_specs=(P(), P(), P(), P("data")),
    )
  )


def checkpoints(directory):
  # Saves before the next step begins, so that a test knows the saved step.
  return ocp.CheckpointManager(
    pathlib.Path(directory).absolute() / "checkpoints",
    options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
  )


def train(mesh, options):
  """Runs the remaining steps; returns NumPy arrays by name."""
  tx = gaf_optax.apply_if_agreed(
    optax.sgd(LEARNING_RATE, MOMENTUM),
    TAU,
    axis_name="data",
    num_microbatches=mesh.size,
  )
  replicated, by_member = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
  mine = [
    member
    for member, device in enumerate(mesh.devices.flat)
    if device.process_index == jax.process_index()
  ]

  def begin():
    params = initial_params()
    return {"params": params, "state": tx.init(params)}

  manager = checkpoints(options.directory)
  start = manager.latest_step() or 0
  if start:
    target = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
      jax.eval_shape(begin),
    )
    carry = manager.restore(start, args=ocp.args.StandardRestore(target))
  else:
    carry = jax.jit(begin, out_shardings=replicated)()
  params, state = carry["params"], carry["state"]
  print(f"process {jax.process_index()} starts at step {start}", flush=True)
  initial = by_path(copies(params))

  step_fn = train_step(mesh, tx)
  history = []
  for step in range(start, options.steps):
    if step == options.die_at:
      die()
    local = [batch(step, member) for member in mine]
    rows = {
      name: jax.make_array_from_process_local_data(
        by_member, np.concatenate([b[name] for b in local])
      )
      for name in local[0]
    }
    params, state, value, grads = step_fn(params, state, rows)
    history.append(
      {
        "step": step,
        "loss": np.asarray(value),
        "accepted": np.asarray(state.gaf_state.accepted),
        "distances": np.asarray(state.gaf_state.distances),
        "params": by_path(copies(params)),
        "micro_grads": by_path(copies(grads)),
      }
    )
    print(f"process {jax.process_index()} did step {step}", flush=True)
    if (step + 1) % options.save_every == 0:
      manager.save(
        step + 1, args=ocp.args.StandardSave({"params": params, "state": state})
      )
  manager.close()
  result = by_path(jax.tree.map(lambda *xs: np.stack(xs), *history))
  result |= {"start": start, "initial": initial}
  result["metrics"] = {
    name: np.asarray(x) for name, x in gaf_optax.metrics(state).items()
  }
  return by_path(result)


def filter_stack(mesh, path):
  """Filters stored micro-gradients `[k, ...]` once, the i-th on device i."""
  stack = dict(np.load(path))
  # NumPy's files do not support bfloat16, so its values are stored as float32.
  dtypes = {
    name: jnp.bfloat16 if "bf16" in name else x.dtype for name, x in stack.items()
  }
  tx = gaf_optax.gaf(TAU, axis_name="data", num_microbatches=mesh.size)

  def local(rows):
    micro_grad = {name: x[0] for name, x in rows.items()}
    params = {name: jnp.zeros(x.shape, x.dtype) for name, x in micro_grad.items()}
    return tx.update(micro_grad, tx.init(params), params)

  run = jax.jit(
    jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=(P(), P()))
  )
  gradient, state = run(
    {
      name: jax.make_array_from_callback(
        x.shape,
        NamedSharding(mesh, P("data")),
        lambda index: x[index].astype(dtypes[name]),
      )
      for name, x in stack.items()
    }
  )
  dtypes_found = {name: str(x.dtype) for name, x in gradient.items()}
  wide = {name: x.astype(jnp.float32) for name, x in gradient.items()}
  return by_path(
    {
      "gradient": copies(wide),
      "dtype": dtypes_found,
      "accepted": np.asarray(state.accepted),
      "distances": np.asarray(state.distances),
      "nonfinite": np.asarray(state.nonfinite),
    }
  )


def copies(tree):
  """Each leaf as `[devices of this process, ...]`: the copy of each device."""
  return jax.tree.map(
    lambda x: np.stack([np.asarray(s.data) for s in x.addressable_shards]), tree
  )


def by_path(tree):
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {"/".join(str(key.key) for key in path): leaf for path, leaf in flat}


def die_while_saving(step):
  """Kills this process once it has begun to write the checkpoint of this step."""
  folder = re.compile(rf"/checkpoints/{step}\b")
  files = set()

  def hook(event, arguments):
    if event == "open" and "w" in str(arguments[1]):
      path = str(arguments[0])
      if folder.search(path):
        files.add(path)
        # The first checkpoint is complete, this one is not.
        if len(files) == 2:
          die()

  sys.addaudithook(hook)


def die():
  os.kill(os.getpid(), signal.SIGKILL)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--coordinator", default=None, help="host:port")
  parser.add_argument("--processes", type=int, default=1)
  parser.add_argument("--process", type=int, default=0)
  parser.add_argument("--devices", type=int, required=True, help="of each process")
  parser.add_argument("--steps", type=int, required=True)
  parser.add_argument("--directory", required=True)
  parser.add_argument("--save-every", type=int, default=4)
  parser.add_argument("--heartbeat", type=int, default=100, help="seconds")
  parser.add_argument("--stack", default=None, help="npz to filter after the training")
  parser.add_argument("--die-at", type=int, default=None, help="before this step")
  parser.add_argument("--die-saving", type=int, default=None, help="after these steps")
  options = parser.parse_args()

  if options.die_saving is not None:
    die_while_saving(options.die_saving)

  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", options.devices)
  if options.processes > 1:
    jax.distributed.initialize(
      options.coordinator,
      num_processes=options.processes,
      process_id=options.process,
      initialization_timeout=60,
      heartbeat_timeout_seconds=options.heartbeat,
      shutdown_timeout_seconds=options.heartbeat,
      coordinator_bind_address=options.coordinator,
    )
  mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
  result = train(mesh, options)
  if options.stack:
    filtered = filter_stack(mesh, options.stack)
    result |= {f"filtered/{name}": x for name, x in filtered.items()}
  path = pathlib.Path(options.directory) / f"result-{options.process}.npz"
  np.savez(path, **result)


if __name__ == "__main__":
  main()
