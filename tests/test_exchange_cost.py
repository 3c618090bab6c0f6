"""What the filter across devices sends and holds, read from the compiled program."""

import functools
import json
import os
import subprocess
import sys

import pytest

import exchange

pytestmark = pytest.mark.usefixtures("compiled_as_users_do")

AWKWARD = exchange.shapes("awkward")
SIZE = 4 * sum(n for (n,) in AWKWARD)


@functools.cache
def cost(n, check=True, leaves=tuple(AWKWARD), **options):
  return exchange.cost(list(leaves), n, check, **options)


@pytest.mark.parametrize("check", [True, False])
def test_sends_what_the_mean_sends(check):
  mean = cost(8, check, mean=True)
  assert mean.sent == pytest.approx(2 * SIZE * 7 / 8)
  assert mean.sent <= cost(8, check).sent <= 1.02 * mean.sent


def test_per_leaf_decisions_send_the_same():
  assert cost(8, groups="leaf").sent <= 1.02 * cost(8, mean=True).sent


def test_collectives_do_not_grow_with_the_leaves():
  many = tuple(AWKWARD) * 4
  counts = [
    cost(8, leaves=leaves, groups=groups).collectives
    for leaves in (tuple(AWKWARD), many)
    for groups in (None, "leaf")
  ]
  assert max(counts) <= min(counts) + 2
  assert max(counts) <= 13


@pytest.mark.parametrize("n", [2, 8])
def test_temporary_memory(n):
  """No device holds the k micro-gradients, nor anything near."""
  assert cost(n).temporary <= 3 * SIZE


@pytest.mark.long
def test_of_64_devices():
  """Bytes for each device stay flat: 64 send what 2P(n-1)/n says, and the Gram."""
  code = (
    "import json, jax, exchange;"
    "jax.config.update('jax_platforms', 'cpu');"
    "jax.config.update('jax_num_cpu_devices', 64);"
    "leaves = exchange.shapes('awkward') + [(1_000_000,)];"
    "costs = [exchange.cost(leaves, 64, mean=mean) for mean in (False, True)];"
    "print(json.dumps(costs))"
  )
  output = subprocess.run(
    [sys.executable, "-c", code],
    cwd=exchange.__file__.rpartition("/")[0],
    # Compiled as users compile, in this process, too.
    env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
    capture_output=True,
    text=True,
    check=True,
    timeout=300,
  ).stdout
  filtered, mean = (exchange.Cost(*values) for values in json.loads(output))
  size = SIZE + 4_000_000
  gram = 4 * 64 * (64 + 1)
  padding = 4 * 64
  # Two all-reduces of the Gram matrix, of which one runs in an ordinary step.
  assert filtered.sent <= mean.sent + 2 * (2 * gram + 4 * 64 + padding)
  assert filtered.sent <= 1.02 * mean.sent
  assert filtered.temporary <= 3 * size
