"""Imports from experiments/, and a small data set."""

import dataclasses
import pathlib
import sys

import jax
import numpy as np
import pytest

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import figures
import shared


@pytest.fixture(scope="module", autouse=True)
def strict_promotion():
  """Not here: scripts run as users run them."""
  with jax.numpy_rank_promotion("allow"):
    yield


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled():
  """Programs that run a few times need not be fast."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def images():
  """240 training images of three classes in colour, which show their classes."""
  rng = np.random.default_rng(0)
  labels = np.arange(240, dtype=np.int32) % 3
  pixels = rng.integers(0, 120, (240, 6, 6, 3)) + 40 * labels[:, None, None, None]
  pixels = pixels.astype(np.uint8)
  train, held_out = slice(200), slice(200, None)
  return shared.Images(
    *(pixels[train], labels[train], pixels[held_out], labels[held_out]),
    *(pixels[:50][::-1], labels[:50][::-1], labels, 3),
    *(255.0, (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)),
  )


@pytest.fixture(scope="session")
def by_people(images):
  """The same, with labels by people: always the class before the right one."""
  return dataclasses.replace(images, given=(images.given + 2) % 3)


@pytest.fixture(scope="session")
def make_part():
  """A function that makes a small part; its model has one hidden layer of 4."""

  def make(arms=(), **changed):
    settings = dict(model="patches-mlp", width=4, optimizer="sgd", learning_rate=0.1)
    settings |= dict(microbatch_size=6, num_microbatches=4, steps=20, seeds=1)
    return figures.Part(name="x", arms=tuple(arms), **settings | changed)

  return make
