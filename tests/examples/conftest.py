"""The example's modules are importable, and its command runs in the test's process."""

import dataclasses
import importlib
import pathlib
import struct
import sys
import types

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "cifar100_resnet18"
sys.path[:0] = [str(EXAMPLE), str(EXAMPLE.parent)]


@pytest.fixture(scope="module", autouse=True)
def strict_promotion():
  """Not here: scripts run as users run them, whose optimizers mix dtypes."""


class _Normed(nn.Module):
  """The smallest model with BatchNorm."""

  num_classes: int
  width: int

  @nn.compact
  def __call__(self, x, train):
    x = nn.Dense(self.width)(x.reshape(len(x), -1))
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
    return nn.Dense(self.num_classes, name="head")(x)


@pytest.fixture(scope="session")
def normed():
  return _Normed


@pytest.fixture(scope="session")
def example_dir():
  return EXAMPLE


@pytest.fixture
def shared_data():
  """Real files that some machines have beside the repository."""
  path = ROOT.parent / "shared" / "data"
  if not path.is_dir():
    pytest.skip(f"there is no {path} with real data on this machine")
  return path


@pytest.fixture
def refused(capsys):
  """A function that runs a command and returns its one sentence of refusal."""

  def run(*argv, command="train"):
    try:
      code = importlib.import_module(command).main([str(a) for a in argv])
    except SystemExit as error:
      code = error.code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if ": note: " not in line]
    assert code == 2, err
    assert out == ""
    assert len(lines) == 1 and lines[0].startswith(f"{command}.py: "), err
    return lines[0]

  return run


@pytest.fixture(scope="session")
def digits():
  import data

  return data.load("digits", "")


# What a trainer has nothing to do with, or takes the shape of from its batches.
_UNTRAINED = dict(
  name="",
  title="",
  arms=(),
  label_noise=0.0,
  random_labels=False,
  noisy_labels=None,
  noisy_labels_key=None,
  balanced=False,
  microbatch_size=0,
  steps=0,
  seeds=0,
  eval_every=0,
)


@pytest.fixture(scope="module")
def compiled_once():
  """Runs of one setting in this process share a trainer, whose compiling is slow."""
  import models
  import runs
  import training

  trainers = {}

  def trainer(part, dataset, mesh):
    shared = dataclasses.replace(part, **_UNTRAINED)
    key = shared, models.KINDS[part.model], hash(dataset.train_images.tobytes())
    if key not in trainers:
      trainers[key] = training.Trainer(part, dataset, mesh)
      trainers[key].forget = lambda: None  # Other runs need them.
    return trainers[key]

  with pytest.MonkeyPatch.context() as patch:
    replaced = types.SimpleNamespace(**{**vars(training), "Trainer": trainer})
    patch.setattr(runs, "training", replaced)
    yield


@pytest.fixture(scope="module")
def quickly_compiled():
  """Programs that are compiled in two thirds of the time, to be run a few times."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def final_arrays():
  """A function from a run's directory to all arrays of its newest checkpoints."""

  def read(path, part="experiment"):
    """By arm, read by orbax."""
    found = {}
    for arm in sorted((path / "checkpoints" / part).iterdir()):
      manager = ocp.CheckpointManager(arm.absolute())
      items = manager.restore(
        manager.latest_step(),
        args=ocp.args.Composite(
          learners=ocp.args.StandardRestore(), trace=ocp.args.StandardRestore()
        ),
      )
      found[arm.name] = jax.tree.map(np.asarray, dict(items))
      manager.close()
    return found

  return read


@pytest.fixture(scope="session")
def assert_same_run(final_arrays):
  """A function that compares what two runs have written, byte for byte."""

  def compare(path, other, *parts):
    for name in ("metrics.jsonl", "results.md", "results.csv"):
      assert (path / name).read_bytes() == (other / name).read_bytes()
    for part in parts or ("experiment",):
      ours, theirs = final_arrays(path, part), final_arrays(other, part)
      jax.tree.map(np.testing.assert_array_equal, ours, theirs)

  return compare


@pytest.fixture
def event_pb2():
  reason = 'needs tensorboardX: pip install "gaf_optax[tensorboard]"'
  return pytest.importorskip("tensorboardX.proto.event_pb2", reason=reason)


@pytest.fixture
def shown(event_pb2):
  """A function from a run's directory to its curves, by TensorBoard's rules."""

  def events(path):
    data = path.read_bytes()
    while len(data) >= 12:
      # Little-endian length, its checksum, the message, its checksum.
      (length,) = struct.unpack("<Q", data[:8])
      if len(data) < length + 16:
        break  # As a kill leaves it.
      yield event_pb2.Event.FromString(data[12 : 12 + length])
      data = data[length + 16 :]

  def read(path):
    curves = {}
    for file in sorted(path.iterdir()):
      versions = []
      for event in events(file):
        versions.append(event.file_version)
        if event.session_log.status == event_pb2.SessionLog.START:
          for points in curves.values():
            points[:] = [point for point in points if point[0] < event.step]
        for value in event.summary.value:
          points = curves.setdefault(value.tag, [])
          points.append((event.step, value.simple_value))
      assert versions[:1] in ([], ["brain.Event:2"])
    return curves

  return read
