"""Several processes give the result of one, and stop when one of them dies."""

import contextlib
import fcntl
import functools
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import gaf_optax
import oracle
import reference_forms

WORKER = pathlib.Path(__file__).parent / "processes" / "worker.py"
# The worker's settings. In each step, one device has a wrong gradient. In steps 2 and
# 6 the filter starts with this device and finds no agreement.
TAU, LEARNING_RATE, MOMENTUM = 0.9, 0.02, 0.8
MEMBERS, STEPS, SAVE_EVERY, SKIPPED = 8, 10, 4, (2, 6)
# Seconds, in tests that kill a process. Otherwise JAX's default of 100: with 10, jax
# 0.8.2 declared living processes dead on a busy machine.
HEARTBEAT = 15
# Extra seconds for a process to end on a busy machine.
MARGIN = 20
# Seconds before running processes are killed.
LIMIT = 180

PORT_TAKEN = re.compile(
  r"address already in use|failed to add port|failed to start rpc server", re.I
)
NO_NETWORK = re.compile(
  r"not permitted|permission denied|unreachable|refused|cannot assign|resolve|gloo"
  r"|deadline exceeded|did not end",
  re.I,
)
LOST_PEER = re.compile(
  r"heartbeat timeout|stopped sending heartbeats|another task died"
  r"|connection (closed|reset) by peer|leader task was preempted/died",
  re.I,
)
PROBE = """
import sys, jax, jax.numpy as jnp
from jax.experimental import multihost_utils
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), initialization_timeout=60,
                           coordinator_bind_address=sys.argv[1])
found = multihost_utils.process_allgather(jnp.ones(()))
assert found.tolist() == [1, 1], found
"""


class Ended(NamedTuple):
  code: int  # exit code; if killed, minus the signal's number
  when: float  # time.monotonic()
  stdout: str
  stderr: str


def free_port():
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def environment():
  """This process's environment, without JAX's settings and proxies."""
  kept = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("JAX_", "PYTHONWARNINGS"))
    and not name.lower().endswith("_proxy")
  }
  return kept | {"PYTHONPATH": str(pathlib.Path(gaf_optax.__file__).parents[1])}


def kill(process):
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def run_once(commands, directory, limit):
  """Runs the commands simultaneously until all have ended, or until the limit."""
  directory.mkdir(parents=True, exist_ok=True)
  outputs = [
    (directory / f"stdout-{i}", directory / f"stderr-{i}") for i in range(len(commands))
  ]
  running, ended = [], {}
  deadline = time.monotonic() + limit
  try:
    for command, (stdout, stderr) in zip(commands, outputs):
      with stdout.open("wb") as out, stderr.open("wb") as err:
        running.append(
          subprocess.Popen(
            [sys.executable, "-u", *command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=environment(),
            # A process group, so that its children are also killed.
            start_new_session=True,
          )
        )
    while len(ended) < len(running) and time.monotonic() < deadline:
      for i, process in enumerate(running):
        if i not in ended and process.poll() is not None:
          ended[i] = time.monotonic()
      first = outputs[0][1]
      if 0 in ended and running[0].returncode and taken(first.read_text()):
        break  # The others would wait for it.
      time.sleep(0.05)
  finally:
    for process in running:
      kill(process)
  results = []
  for i, (stdout, stderr) in enumerate(outputs):
    late = "" if i in ended else f"\n(did not end within {limit} s: killed)"
    results.append(
      Ended(
        running[i].returncode,
        ended.get(i, time.monotonic()),
        stdout.read_text(errors="replace"),
        stderr.read_text(errors="replace") + late,
      )
    )
  return results


def taken(stderr):
  return bool(PORT_TAKEN.search(stderr))


def run(commands_for, directory, limit=LIMIT):
  """Runs `commands_for(coordinator)`, and retries once if the port was taken."""
  for _ in range(2):
    ended = run_once(commands_for(f"127.0.0.1:{free_port()}"), directory, limit)
    print(report(ended))
    if not taken(ended[0].stderr):
      break
  return ended


def report(ended):
  """The output of the processes, for debugging."""
  parts = []
  for i, e in enumerate(ended):
    stdout = re.sub(r"^\[Gloo\] Rank .*\n", "", e.stdout, flags=re.M)
    parts.append(
      f"--- process {i}: exit code {e.code}\n{stdout[-2000:]}\n{e.stderr[-6000:]}"
    )
  return "\n".join(parts)


def train(directory, processes, *, extra=(), victim=None, dies=()):
  """Runs the worker on all devices."""

  def commands(coordinator):
    return [
      [
        str(WORKER),
        *("--coordinator", coordinator),
        *("--processes", str(processes), "--process", str(i)),
        *("--devices", str(MEMBERS // processes)),
        *("--steps", str(STEPS), "--save-every", str(SAVE_EVERY)),
        *("--directory", str(directory)),
        *extra,
        *(dies if i == victim else ()),
      ]
      for i in range(processes)
    ]

  return run(commands, directory)


def results(directory, processes):
  """The arrays of each process, by name."""
  found = []
  for i in range(processes):
    with np.load(directory / f"result-{i}.npz") as file:
      found.append(dict(file))
  return found


def micro_grads(found):
  """Micro-gradients of all devices, `[steps, devices, ...]` by name."""
  return {
    name: np.concatenate([result[name] for result in found], axis=1)[:, :, 0]
    for name in found[0]
    if name.startswith("micro_grads/")
  }


def part(result, prefix):
  return {
    name.removeprefix(prefix): x
    for name, x in result.items()
    if name.startswith(prefix)
  }


@pytest.fixture(scope="module")
def once(tmp_path_factory):
  """Returns a folder, which the first pytest worker that asks for it has filled."""
  root = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    root = root.parent

  def get(name, fill):
    folder = root / name
    with (root / f"{name}.lock").open("w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      if not (folder / "filled").exists():
        shutil.rmtree(folder, ignore_errors=True)
        fill(folder)
        (folder / "filled").touch()
    return folder

  return get


@pytest.fixture(scope="module")
def network(once):
  """Skips if two processes on this machine cannot connect."""

  def probe(folder):
    ended = run(
      lambda coordinator: [["-c", PROBE, coordinator, str(i)] for i in range(2)],
      folder,
      limit=90,
    )
    reason = ""
    if any(e.code for e in ended):
      reason = "\n".join(e.stderr for e in ended)
      # Any other reason is a broken test, not a missing network.
      assert NO_NETWORK.search(reason), report(ended)
    (folder / "reason").write_text(reason)

  try:
    free_port()
  except OSError as error:
    pytest.skip(f"no loopback socket here: {error}")
  reason = (once("network", probe) / "reason").read_text()
  if reason:
    pytest.skip(f"jax.distributed with gloo does not run here: {reason[-500:]}")


@pytest.fixture(scope="module")
def uneven():
  """Micro-gradients with leaf sizes that 8 devices do not divide."""
  rng = np.random.default_rng(7)
  shapes = {"w17": (17,), "w3000": (3, 1000), "scalar": (), "bf16": (5, 9), "one": (1,)}
  stack = {}
  for name, shape in shapes.items():
    x = rng.normal(size=shape) + 0.5 * rng.normal(size=(MEMBERS, *shape))
    x[2] *= -1
    dtype = jnp.bfloat16 if name == "bf16" else np.float32
    stack[name] = np.array(jnp.asarray(x, dtype), np.float32)
  stack["w17"][5, 16] = np.nan
  return stack


@pytest.fixture(scope="module")
def uninterrupted(once, network, uneven):
  """Returns the results of an undisturbed run, by number of processes."""

  def get(processes):

    def fill(folder):
      folder.mkdir()
      np.savez(folder / "stack.npz", **uneven)
      ended = train(folder, processes, extra=("--stack", str(folder / "stack.npz")))
      assert [e.code for e in ended] == [0] * processes, report(ended)

    return results(once(f"of_{processes}_processes", fill), processes)

  return functools.cache(get)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.long)])
def test_training_is_that_of_one_process(uninterrupted, processes):
  one, several = uninterrupted(1), uninterrupted(processes)
  for name, x in micro_grads(several).items():
    np.testing.assert_allclose(x, micro_grads(one)[name], 2e-5, 2e-6, err_msg=name)
  for found in several:
    assert found.keys() == one[0].keys()
    for name, x in found.items():
      y = one[0][name]
      if name.startswith("micro_grads/"):
        continue
      if name.startswith(("params/", "initial/", "filtered/gradient/")):
        axis = 1 if name.startswith("params/") else 0
        # All devices of all processes hold the same.
        first = several[0][name].take([0], axis)
        np.testing.assert_array_equal(x, np.broadcast_to(first, x.shape), name)
        x, y = x.take(0, axis), y.take(0, axis)
      if x.dtype.kind == "f":
        np.testing.assert_allclose(x, y, 2e-5, 2e-6, err_msg=name)
      else:
        np.testing.assert_array_equal(x, y, name)


@pytest.mark.parametrize("processes", [1, 2, pytest.param(4, marks=pytest.mark.long)])
def test_training_is_that_of_the_oracle(uninterrupted, processes):
  found = uninterrupted(processes)[0]
  grads = micro_grads(uninterrupted(processes))
  params = {name: oracle.wide(x[0]) for name, x in part(found, "initial/").items()}
  trace = {name: np.zeros_like(x) for name, x in params.items()}
  assert found["step"].tolist() == list(range(STEPS))
  for step in range(STEPS):
    start = step % MEMBERS
    expected = oracle.gaf([x[step] for x in grads.values()], TAU, start=start)
    assert expected.margin > 0.05  # Far more than rounding.
    assert expected.agreed == (step not in SKIPPED)
    np.testing.assert_array_equal(found["accepted"][step], expected.accepted)
    distances = reference_forms.compared(found["distances"][step])
    np.testing.assert_allclose(distances, expected.distances, atol=1e-5)
    if expected.agreed:
      wrong = (start + 3) % MEMBERS
      assert expected.accepted.tolist() == [i != wrong for i in range(MEMBERS)]
      gradient = dict(zip(part(grads, "micro_grads/"), expected.gradient))
      for name in params:
        trace[name] = MOMENTUM * trace[name] + gradient[name]
        params[name] = params[name] - LEARNING_RATE * trace[name]
    for name, x in params.items():
      now = found[f"params/{name}"][step, 0]
      np.testing.assert_allclose(now, x, rtol=1e-5, atol=2e-6, err_msg=name)
  assert found["metrics/skipped_steps"] == len(SKIPPED)
  assert found["loss"][-1] < found["loss"][0]


@pytest.mark.parametrize("processes", [1, 2, pytest.param(4, marks=pytest.mark.long)])
def test_leaves_of_uneven_sizes(uninterrupted, uneven, processes):
  expected = oracle.gaf(list(uneven.values()), TAU)
  assert expected.margin > 0.05
  assert expected.accepted.tolist() == [i not in (2, 5) for i in range(MEMBERS)]
  for found in uninterrupted(processes):
    found = part(found, "filtered/")
    np.testing.assert_array_equal(found["accepted"], expected.accepted)
    distances = reference_forms.compared(found["distances"])
    np.testing.assert_allclose(distances, expected.distances, atol=1e-5)
    assert found["nonfinite"] == 1
    for name, gradient in zip(uneven, expected.gradient):
      narrow = name == "bf16"
      assert found[f"dtype/{name}"] == ("bfloat16" if narrow else "float32")
      on_devices = found[f"gradient/{name}"]
      assert on_devices.shape == (MEMBERS // processes, *gradient.shape)
      for x in on_devices:
        tolerance = 2**-8 if narrow else 1e-5
        np.testing.assert_allclose(x, gradient, tolerance, 1e-6, err_msg=name)


def restored(directory):
  """Step and parameters of the newest checkpoint, read by a single process."""
  options = ocp.CheckpointManagerOptions(read_only=True)
  handler = ocp.StandardCheckpointHandler()
  with ocp.CheckpointManager(
    directory / "checkpoints", options=options, item_handlers=handler
  ) as manager:
    step = manager.latest_step()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
      dict(manager.item_metadata(step)),
    )
    saved = manager.restore(step, args=ocp.args.StandardRestore(target))
  return step, saved["params"]


@pytest.mark.long
@pytest.mark.parametrize(
  "processes, victim, dies, newest, left",
  [
    pytest.param(4, 2, ("--die-at", "6"), 4, 2, id="member_between_checkpoints"),
    pytest.param(2, 0, ("--die-saving", "8"), 4, 2, id="coordinator_in_a_checkpoint"),
  ],
)
def test_a_dead_process_ends_the_others_and_a_restart_goes_on(
  uninterrupted, tmp_path, processes, victim, dies, newest, left
):
  for attempt in range(2):
    directory = tmp_path / str(attempt)
    ended = train(
      directory,
      processes,
      extra=("--heartbeat", str(HEARTBEAT)),
      victim=victim,
      dies=dies,
    )
    # Otherwise a late heartbeat stopped the run before the victim died.
    if ended[victim].code == -signal.SIGKILL:
      break
  assert ended[victim].code == -signal.SIGKILL, report(ended)
  for other in ended[:victim] + ended[victim + 1 :]:
    assert other.code != 0, report(ended)
    assert LOST_PEER.search(other.stderr), report(ended)
    assert other.when - ended[victim].when < HEARTBEAT + MARGIN, report(ended)
  assert not list(directory.glob("result-*"))

  step, params = restored(directory)
  assert step == newest
  whole = uninterrupted(processes)[0]
  flat, _ = jax.tree_util.tree_flatten_with_path(params)
  assert flat
  for path, x in flat:
    name = "/".join(key.key for key in path)
    np.testing.assert_array_equal(x, whole[f"params/{name}"][newest - 1, 0], name)

  # Resumes with the same or a smaller number of processes, with all devices.
  ended = train(directory, left)
  assert [e.code for e in ended] == [0] * left, report(ended)
  for i, again in enumerate(results(directory, left)):
    whole = uninterrupted(left)[i]
    assert f"process {i} starts at step {newest}\n" in ended[i].stdout
    assert again["step"].tolist() == list(range(newest, STEPS))
    for name, x in again.items():
      expected = whole[name]
      if name.startswith(("loss", "accepted", "distances", "params/", "micro_grads/")):
        expected = expected[newest:]
      elif name.startswith("initial/"):
        expected = whole[name.replace("initial", "params")][newest - 1]
      elif name in ("start", "step"):
        continue
      np.testing.assert_array_equal(x, expected, name)


@pytest.mark.long
def test_the_recipe_finds_the_process_that_computes_wrong_gradients(network, tmp_path):
  """Its gradients are reversed from step 60 on; see docs/devices.md."""
  script = WORKER.with_name("faulty.py")
  ended = run(lambda at: [[str(script), at, str(i)] for i in range(4)], tmp_path)
  assert [e.code for e in ended] == [0] * 4, report(ended)
  accused, step = re.search(r"accused (\d) after step (\d+)", ended[0].stdout).groups()
  assert int(accused) == 2
  assert 60 + 50 <= int(step) < 259
