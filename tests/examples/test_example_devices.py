"""Devices: many give what one gives, and processes start, stop and go on together."""

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import models
import options
import train
import training
from common import devices, launch, storage

_SMALL = (
  *("--width", "8", "--tau", "0.9", "--label-noise", "0.4", "--seeds", "1"),
  *("--microbatch-size", "5", "--steps", "60", "--eval-every", "20"),
)
_SPREAD = (*_SMALL, "--devices", "4", "--checkpoint-seconds", "0")
pytestmark = pytest.mark.usefixtures("compiled_once")
# Of a command that takes a tenth of it on an idle machine.
_LIMIT = 150


def _rows(path):
  return [
    json.loads(line) for line in (path / storage.METRICS).read_text().splitlines()
  ]


def _assert_close_run(path, other, final_arrays, rtol=2e-3):
  """Equal but for rounding, which the weights pile up."""
  ours, theirs = _rows(path), _rows(other)
  assert len(ours) == len(theirs) > 0
  for one, two in zip(ours, theirs):
    # Single examples are looked at on one device only.
    one, two = (
      {name: x for name, x in row.items() if not name.startswith("auc/")}
      for row in (one, two)
    )
    assert one.keys() == two.keys()
    for name, value in one.items():
      exact = not isinstance(value, float) or name == "accept_rate"
      assert two[name] == (value if exact else pytest.approx(value, rel=rtol)), name
  ours, theirs = final_arrays(path), final_arrays(other)
  assert ours.keys() == theirs.keys()
  for arm in ours:
    accepted = [run[arm]["trace"]["accepted"] for run in (ours, theirs)]
    np.testing.assert_array_equal(*accepted)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-4), ours, theirs
  )


@pytest.mark.experiments
@pytest.mark.parametrize(
  "model, number", [("mlp", 2), pytest.param("normed", 4, marks=pytest.mark.long)]
)
def test_as_on_one_device(model, number, tmp_path, monkeypatch, final_arrays, normed):
  """One microbatch on each of four devices, and two on each of two."""
  if model == "normed":
    monkeypatch.setitem(models.KINDS, "mlp", models.Kind(normed, normalizes=True))
  one, many = tmp_path / "one", tmp_path / "many"
  argv = (*_SMALL, "--wrong-sources", "1", "--num-microbatches", "4")
  argv = (*argv, "--label-smoothing", "0.1", "--ema-decay", "0.9")
  assert train.main([*argv, "--out", str(one)]) == 0
  assert train.main([*argv, "--out", str(many), "--devices", str(number)]) == 0
  _assert_close_run(many, one, final_arrays)
  said = f"4 microbatches of 5, {4 // number} on each of {number} devices,"
  assert said in (many / "results.md").read_text()
  config = json.loads((many / "config.json").read_text())
  assert config["--devices"] == number
  arrays = final_arrays(many)
  gaf = arrays["sequential_tau0.9_smoothing_ema"]
  assert jax.tree.map(np.shape, gaf["learners"][0]["average"][0]) == jax.tree.map(
    np.shape, gaf["learners"][0]["params"]
  )
  assert 0.1 < gaf["trace"]["accepted"].mean() < 0.9
  statistics = arrays["plain"]["learners"][0]["batch_stats"]
  assert bool(statistics) is (model == "normed")


@pytest.mark.experiments
def test_each_device_holds_its_own_microbatches(digits):
  (part,) = options.parts(options.parse([*_SPREAD, "--num-microbatches", "8"]))
  team = devices.join(options.parse([*_SPREAD]))
  trainer = training.Trainer(part, digits, team.mesh)
  indices = np.arange(3 * 8 * 5, dtype=np.int32).reshape(3, 8, 5)
  images = trainer._own_images(indices, jax.sharding.PartitionSpec(None, devices.AXIS))
  for device, image in zip(team.mesh.devices, images.addressable_shards):
    assert image.device == device
    first = 2 * list(team.mesh.devices).index(device)
    own = indices[:, first : first + 2]
    np.testing.assert_array_equal(image.data, digits.train_images[own])


@pytest.fixture(scope="module")
def spread(tmp_path_factory, compiled_once):
  """A run on four devices that nothing interrupted."""
  path = tmp_path_factory.mktemp("spread") / "run"
  assert train.main([*_SPREAD, "--out", str(path)]) == 0
  return path


@pytest.mark.experiments
def test_stopped_and_resumed(spread, tmp_path, monkeypatch, assert_same_run):
  path = tmp_path / "run"
  run = lambda *more: train.main([*_SPREAD, "--out", str(path), *more])
  append = storage.RunDirectory.append_metrics

  def stop_in_the_second_arm(self, row):
    append(self, row)
    if row["arm"] == "sequential_tau0.9" and row["step"] == 40:
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(storage.RunDirectory, "append_metrics", stop_in_the_second_arm)
    assert run() == 128 + signal.SIGTERM
  assert run("--resume") == 0
  assert_same_run(path, spread)


@pytest.mark.experiments
def test_other_devices_do_not_resume(spread, refused):
  argv = (*_SMALL, "--out", spread, "--resume")
  said = "--devices was 4, now it is 2"
  assert said in refused(*argv, "--devices", "2", "--num-microbatches", "4")


@pytest.mark.parametrize(
  "argv, said",
  [
    ("--devices 0", "at least 1"),
    ("--devices 1", "nothing to compare"),
    ("--devices 4 --num-microbatches 6", "not a multiple of --devices 4"),
    ("--devices 4 --wrong-sources 5", "more than the 4"),
    ("--devices 16", "needs 16 devices, but JAX finds 8 (cpu)."),
    ("--processes 2", "--processes goes with --devices"),
    ("--devices 4 --processes 3", "not a multiple of --processes 3"),
    ("--devices 4 --process-id 0", "--process-id goes with --processes"),
    ("--devices 4 --coordinator x:1", "--coordinator goes with --processes"),
    ("--devices 4 --processes 2 --process-id 0", "go together"),
    ("--devices 4 --processes 2 --coordinator x:1", "go together"),
    ("--devices 4 --processes 2 --coordinator x:1 --process-id 2", "not below"),
    ("--devices 4 --processes 2 --coordinator x --process-id 1", "HOST:PORT"),
    ("--devices 4 --processes 2 --coordinator x:99999 --process-id 1", "HOST:PORT"),
  ],
)
def test_bad_options(refused, tmp_path, monkeypatch, argv, said):
  monkeypatch.chdir(tmp_path)
  assert jax.device_count() == 8  # From here on it stays so.
  assert said in refused(*argv.split())
  assert list(tmp_path.iterdir()) == []


def test_too_few_accelerators(refused, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  said = "JAX finds 8 (gpu); with JAX_PLATFORMS=cpu there are virtual ones."
  assert said in refused("--devices", "16")


# From here on with processes.


@pytest.fixture(scope="module")
def environment():
  """For processes that shall talk to each other on this machine."""
  try:
    with socket.create_server(("127.0.0.1", 0)) as server:
      socket.create_connection(server.getsockname()).close()
  except OSError as error:
    pytest.skip(f"no connection over the loopback of this machine: {error}")
  own = {**os.environ, "JAX_PLATFORMS": "cpu"}
  own.pop("JAX_NUM_CPU_DEVICES", None)  # The command sets it.
  # Compiled in two thirds of the time.
  own["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
  return own


@pytest.fixture(scope="module")
def launched(tmp_path_factory, environment, example_dir):
  """A run in two processes that nothing interrupted."""
  path = tmp_path_factory.mktemp("launched") / "run"
  command = [sys.executable, example_dir / "train.py", *_SPREAD]
  done = subprocess.run(
    [*command, "--processes", "2", "--out", path],
    env=environment,
    capture_output=True,
    text=True,
    timeout=_LIMIT,
  )
  assert done.returncode == 0, done.stderr
  # One process prints, and the results alone are on the standard output.
  assert done.stdout.startswith("## digits") and done.stdout.count("## digits") == 1
  assert done.stdout.endswith(f"are in {path}.\n")
  return path


def _wait_for_lines(path, number, processes):
  deadline = time.monotonic() + _LIMIT
  while not path.exists() or path.read_text().count("\n") < number:
    for process in processes:
      assert process.poll() is None
    assert time.monotonic() < deadline
    time.sleep(0.005)


@pytest.mark.long
def test_two_processes_as_one(launched, spread, final_arrays):
  _assert_close_run(launched, spread, final_arrays)


@pytest.mark.long
def test_one_killed_ends_all_and_resumes(
  launched, tmp_path, environment, monkeypatch, capfd, assert_same_run
):
  path = tmp_path / "run"
  monkeypatch.setattr(os, "environ", environment)
  children = []
  start = launch._start

  def recorded(*args):
    children.append(start(*args))
    return children[-1]

  monkeypatch.setattr(launch, "_start", recorded)
  argv = [*_SPREAD, "--processes", "2", "--out", str(path)]
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    code = pool.submit(launch.launch, train.__file__, argv, options.parse(argv), [])
    try:
      while len(children) < 2 and not code.done():
        time.sleep(0.01)
      # In the second of the three arms.
      _wait_for_lines(path / storage.METRICS, 4, children)
      children[1].kill()
      assert code.result(timeout=_LIMIT) == 1
    finally:
      for child in children:
        child.kill()
  said = "train.py: process 1 of 2 was ended by SIGKILL, and the others were"
  assert said in capfd.readouterr().err
  assert all(child.returncode for child in children)
  assert not (path / "results.md").exists()
  assert train.main([*argv, "--resume"]) == 0
  assert_same_run(path, launched)


@pytest.fixture
def start_two(environment, tmp_path, example_dir):
  """A function that starts two processes one by one, as on two machines."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
  started = []

  def start(*more_of_second):
    for process, more in enumerate(((), more_of_second)):
      started.append(
        subprocess.Popen(
          [
            *(sys.executable, example_dir / "train.py", *_SPREAD, "--processes", "2"),
            *("--coordinator", f"127.0.0.1:{port}", "--process-id", str(process)),
            # Not in one directory, as without a common file system.
            *("--out", tmp_path / f"{process}", *more),
          ],
          env=environment,
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
        )
      )
    return started

  yield start
  for process in started:
    process.kill()
    process.communicate()


@pytest.mark.long
def test_signal_to_one_stops_all(start_two, tmp_path):
  first, second = start_two()
  _wait_for_lines(tmp_path / "0" / storage.METRICS, 2, (first, second))
  second.terminate()
  out, err = first.communicate(timeout=_LIMIT)
  assert first.returncode == 128 + signal.SIGTERM, err
  assert "--resume" in err and out == ""
  _, err = second.communicate(timeout=_LIMIT)
  assert second.returncode == 128 + signal.SIGTERM
  assert "train.py" not in err
  assert not (tmp_path / "1").exists()


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_without_a_launcher_the_other_ends_too(victim, start_two, tmp_path):
  processes = start_two()
  killed, other = processes[victim], processes[1 - victim]
  _wait_for_lines(tmp_path / "0" / storage.METRICS, 2, processes)
  killed.kill()
  started = time.monotonic()
  _, err = other.communicate(timeout=_LIMIT)
  assert time.monotonic() - started < 45
  assert other.returncode not in (0, 2)
  # Said after the exchange that failed, or by JAX where that was faster.
  assert "exchange with the other processes failed" in err or "task died" in err


@pytest.mark.long
def test_processes_with_different_options(start_two, tmp_path):
  for process in start_two("--label-noise", "0.3"):
    _, err = process.communicate(timeout=_LIMIT)
    assert process.returncode == 2
    assert "train.py: the processes were started with different options" in err
  assert not any(tmp_path.iterdir())


def test_port_that_is_taken(refused, environment):
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
    argv = ("--processes", "2", "--coordinator", address, "--process-id", "0")
    said = refused(*_SPREAD, *argv)
  assert f"process 0 of 2 does not find the others over --coordinator {address}" in said


@pytest.mark.long
def test_refusal_of_one_ends_all(launched, environment, example_dir):
  command = [sys.executable, example_dir / "train.py", *_SPREAD, "--processes", "2"]
  done = subprocess.run(
    [*command, "--out", launched],
    env=environment,
    capture_output=True,
    text=True,
    timeout=_LIMIT,
  )
  assert done.returncode == 2 and done.stdout == ""
  said = [line for line in done.stderr.splitlines() if line.startswith("train.py")]
  why, follows = sorted(said, key=lambda line: "another process" in line)
  assert "already holds something" in why
  assert follows == "train.py: another process cannot go on; its message says why."
