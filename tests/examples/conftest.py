"""The modules of the example, and its command in the test's process."""

import importlib.util
import pathlib
import pickle
import sys

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
IMAGES = ROOT / "examples" / "cifar100_resnet18"


@pytest.fixture(scope="module", autouse=True)
def strict_promotion():
  """Off for the examples, which run with JAX's default settings."""
  with jax.numpy_rank_promotion("allow"):
    yield


@pytest.fixture(scope="session")
def images_train():
  """`examples/cifar100_resnet18/train.py`; other examples also have a train.py."""
  sys.path.insert(0, str(IMAGES))
  spec = importlib.util.spec_from_file_location("images_train", IMAGES / "train.py")
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  spec.loader.exec_module(module)
  sys.path.remove(str(IMAGES))
  return module


@pytest.fixture(scope="session")
def images_data(images_train):
  return images_train.data


@pytest.fixture
def refused(images_train, capsys):
  """A function that runs a failing command and returns its one-sentence error."""

  def run(*argv):
    try:
      code = images_train.main([str(a) for a in argv])
    except SystemExit as error:
      code = error.code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if ": note: " not in line]
    assert code == 2, err
    assert out == ""
    assert len(lines) == 1 and lines[0].startswith("train.py: "), err
    return lines[0]

  return run


@pytest.fixture(scope="session")
def write_batch():
  """A function that writes a pickle in CIFAR's format and returns its contents."""

  def write(path, rows, num_classes, key, seed=0, balanced=False):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, rows)
    if balanced:
      labels = np.arange(rows) % num_classes
    batch = {
      "batch_label": "x",
      key: labels.tolist(),
      "data": rng.integers(0, 256, (rows, 3072)).astype(np.uint8),
      "filenames": [f"{i}.png" for i in range(rows)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(batch, protocol=2))
    return batch

  return write
