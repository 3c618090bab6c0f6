"""Communication and memory of the filter across devices, from the compiled program."""

import functools
import json
import math
import os
import subprocess
import sys

import pytest

import exchange

pytestmark = pytest.mark.usefixtures("compiled_as_users_do")

N = 8
AWKWARD = exchange.shapes("awkward")
SIZE = 4 * sum(n for (n,) in AWKWARD)


@functools.cache
def cost(check=True, leaves=tuple(AWKWARD), **options):
  return exchange.cost(list(leaves), N, check, **options)


def beside_the_mean(n, leaves, groups=1):
  """Exact number of bytes that the filter may send in addition to the mean.

  Slices are padded to 1024 values, and to 128 per group; leaf sizes are rounded up. The
  Gram matrices and finiteness flags are all-reduced once.
  """
  padding = 1024 + 128 * (groups - 1) + len(leaves)
  return 4 * 2 * (n - 1) * (padding + (groups * n**2 + n) / n)


def test_sends_what_the_mean_sends():
  mean = cost(mean=True)
  assert mean.sent == pytest.approx(2 * SIZE * 7 / 8)
  own = cost()
  assert mean.sent <= own.sent <= mean.sent + beside_the_mean(N, AWKWARD)
  assert cost(check=False).sent == own.sent


def test_per_leaf_decisions_send_the_same():
  groups = len(AWKWARD)
  limit = cost(mean=True).sent + beside_the_mean(N, AWKWARD, groups)
  assert cost(groups="leaf").sent <= limit


def test_collectives_do_not_grow_with_the_leaves():
  """Exchange, Gram matrices, and exchange back."""
  many = tuple(AWKWARD) + ((33,),) * 8
  found = cost(), cost(groups="leaf"), cost(leaves=many, groups="leaf")
  assert [one.collectives for one in found] == [3, 3, 3]


def test_a_resnet():
  """It sends as much as the mean, and no device holds all k micro-gradients."""
  leaves = tuple(exchange.shapes("resnet18"))
  size = 4 * sum(math.prod(shape) for shape in leaves)
  own = cost(leaves=leaves)
  assert own.sent <= 1.01 * 2 * size * 7 / 8
  assert own.temporary <= 3 * size


@pytest.mark.long
def test_of_64_devices():
  """64 devices each send 2P(n-1)/n values, plus the Gram matrix."""
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
    # Compiled as users compile.
    env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
    capture_output=True,
    text=True,
    check=True,
    timeout=300,
  ).stdout
  filtered, mean = (exchange.Cost(*values) for values in json.loads(output))
  size = SIZE + 4_000_000
  limit = mean.sent + beside_the_mean(64, [*AWKWARD, (1_000_000,)])
  assert mean.sent <= filtered.sent <= limit
  assert filtered.temporary <= 3 * size


def test_pairs_branches_and_fusions_in_the_text_of_a_program():
  """XLA's notation for GPU and TPU; a `-start` and its `-done` are one collective."""
  text = """HloModule jit_f, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  ROOT %add = f32[] add(%a, %a)
}

%often (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}

%seldom (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0} parameter(0)
  ROOT %called = f32[8]{0} call(%p.1), to_apply=%deeper
}

%deeper (p.2: f32[8]) -> f32[8] {
  %p.2 = f32[8]{0} parameter(0)
  ROOT %pmax.6 = f32[1,8]{1,0:T(1,128)S(1)} all-reduce(%p.2), to_apply=%sum
}

%all-reduce-scatter.3 (p.3: f32[64]) -> f32[8] {
  %p.3 = f32[64]{0} parameter(0)
  %all-reduce.7 = f32[64]{0} all-reduce(%p.3), to_apply=%sum
  ROOT %dynamic-slice = f32[8]{0} dynamic-slice(%all-reduce.7)
}

%async_collective_fusion (p.4: bf16[8]) -> bf16[64] {
  %p.4 = bf16[8]{0} parameter(0)
  ROOT %all-gather.1 = bf16[64]{0} all-gather(%p.4), dimensions={0}
}

ENTRY %main.5 (x: f32[8], y: bf16[8]) -> f32[8] {
  %x = f32[8]{0:T(128)} parameter(0)
  %s = ((f32[8]), (f32[64], /*index=1*/f32[64])) all-gather-start(%x, %x)
  %d = (f32[64]{0}, f32[64]{0}) all-gather-done(%s), metadata={op_name="all_gather"}
  %t = f32[8]{0} fusion(%d), kind=kCustom, calls=%all-reduce-scatter.3
  %u = bf16[64]{0} fusion(%y), calls=%async_collective_fusion, metadata={op_name="v"}
  ROOT %c = f32[8]{0} conditional(%x, %t, %t), branch_computations={%often, %seldom}
}
"""
  found = exchange.collectives(text, 8)
  assert sorted(found) == [
    ("all-gather", 128, 112, True, False),
    ("all-gather", 512, 448, True, False),
    ("all-reduce", 32, 56, False, True),
    ("reduce-scatter", 32, 224, False, False),
  ]
