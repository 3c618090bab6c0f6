"""Costs of the filter across devices, read from the compiled program.

For each number of devices: the bytes that a device sends (ring model) next to
`jax.lax.pmean` of the same gradients, the number of collectives, and temporary memory.
Programs are compiled for virtual CPU devices and never run, so the results do not
depend on the machine.

    python benchmarks/exchange.py
"""

import argparse
import json
import math
import re
import subprocess
import sys
from importlib.metadata import version
from typing import Any, NamedTuple

TREES = ("awkward", "resnet18")


class Cost(NamedTuple):
  """Costs of a program per device.

  Attributes:
    sent: bytes sent, on a ring.
    collectives: number of collectives.
    temporary: bytes of temporary memory.
  """

  sent: float
  collectives: int
  temporary: int


def shapes(tree: str) -> list[tuple[int, ...]]:
  """Shapes of a tree: by name, or given as in '3x3x64x128,512x100,64'.

  'awkward' and 'small' have sizes that 8 does not divide. 'resnet18' is a ResNet-18,
  'transformer' a decoder of 84 million values, and 'billion' one of a billion. In
  'billion-scanned' its 24 layers are stacked, as in `flax.linen.scan`.
  """
  if tree[0].isdigit():
    return [tuple(int(d) for d in leaf.split("x")) for leaf in tree.split(",")]
  if tree == "awkward":
    return [(17,), (64,), (3000,), (100_000,)]
  if tree == "small":
    return [(100_000,), (64,), (3_000,), (50_000,), (17,)]
  if tree == "transformer":
    return _decoder(8192, 1024, 6)
  if tree.startswith("billion"):
    return _decoder(50_304, 1792, 24, scanned=tree.endswith("scanned"))
  found: list[tuple[int, ...]] = [(7, 7, 3, 64), (64,), (64,)]
  before = 64
  for width in (64, 128, 256, 512):
    for block in range(2):
      found += [(3, 3, before, width), (width,), (width,)]
      found += [(3, 3, width, width), (width,), (width,)]
      if block == 0 and before != width:
        found += [(1, 1, before, width), (width,), (width,)]
      before = width
  return [*found, (512, 100), (100,)]


def _decoder(vocabulary, width, layers, scanned=False):
  """Embedding, attention and MLP of each layer with two norms, and a last norm."""
  block = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
  block += [(width,), (width,)]
  stack = [(layers, *shape) for shape in block] if scanned else block * layers
  return [(vocabulary, width), *stack, (width,)]


class Instruction(NamedTuple):
  """A line of a compiled program.

  Attributes:
    name: of the instruction.
    shape: text, the type of its result.
    op: operation, as in 'all-reduce'.
    rest: text, operands and attributes.
  """

  name: str
  shape: str
  op: str
  rest: str


class Collective(NamedTuple):
  """A collective of a compiled program.

  Attributes:
    kind: as in 'all-reduce'.
    size: bytes of the result.
    sent: bytes that a device sends when it runs on a ring.
    asynchronous: whether other work can run beside it.
    rare: whether it is in a branch of a conditional.
  """

  kind: str
  size: int
  sent: float
  asynchronous: bool = False
  rare: bool = False


_WIDTHS = {"f64": 8, "c64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4}
_WIDTHS |= {"bf16": 2, "f16": 2, "s16": 2, "u16": 2, "pred": 1, "s8": 1, "u8": 1}
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)")
_BRANCHES = re.compile(r"(?:branch_computations=\{|true_computation=)[^}]*")


def size_of(shape: str) -> int:
  """Bytes of a type, such as '(f32[8,3]{1,0}, bf16[2]{0})'; tokens have none."""
  return sum(
    _WIDTHS.get(dtype, 0) * math.prod(int(d) for d in dims.split(",") if d)
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
  )


def computations(text: str) -> dict[str, list[Instruction]]:
  """The instructions of each computation of a compiled program; the entry is ''."""
  found: dict[str, list[Instruction]] = {}
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      current = found.setdefault("" if header[1] else header[2], [])
    elif match := _INSTRUCTION.match(line):
      current.append(Instruction(*match.groups()))
  return found


def _rare(found):
  """Names of the computations that only branches of conditionals reach."""
  names = lambda text: set(re.findall(r"%([\w.\-]+)", text)) & set(found)
  always, left = set(), {""}
  while left:
    name = left.pop()
    always.add(name)
    for _, _, op, rest in found[name]:
      left |= names(_BRANCHES.sub("", rest) if op == "conditional" else rest) - always
  return set(found) - always


def collectives(text: str, n: int) -> list[Collective]:
  """The collectives of a compiled program, for a ring of n devices.

  A pair of `-start` and `-done` is one collective, with the result of the second.
  """
  share = (n - 1) / n
  sent = {
    "all-reduce": 2 * share,
    "all-gather": share,
    "all-to-all": share,
    "reduce-scatter": n - 1,
    "collective-permute": 1,
  }
  found = computations(text)
  rare = _rare(found)
  result = []
  for computation, instructions in found.items():
    done = {
      re.match(r".*?%([\w.\-]+)", rest)[1]: shape
      for _, shape, op, rest in instructions
      if op.endswith("-done")
    }
    for name, shape, op, _ in instructions:
      kind, start, _ = op.partition("-start")
      if kind in sent:
        size = size_of(done.get(name, shape))
        # XLA for TPU writes a reduce-scatter in this way.
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
          kind, size = "reduce-scatter", size // n
        asynchronous = bool(start) or "async" in computation
        result.append(
          Collective(kind, size, size * sent[kind], asynchronous, computation in rare)
        )
  return result


def across(
  grads: Any, mesh: Any, *, mean: bool = False, check: bool = True, **options: Any
) -> tuple[Any, tuple]:
  """`gaf` on one gradient per device of a one-axis mesh, to be compiled.

  Args:
    grads: a gradient, as a tree of `jax.ShapeDtypeStruct`.
    mesh: on an Explicit mesh, `gaf` filters a sharded stack, without `axis_name`.
    mean: use the plain mean instead.
    check: `check_vma` of `jax.shard_map`.
    **options: options of `gaf`; with `stacked` a device has two gradients.

  Returns:
    A jitted function, and its abstract arguments.
  """
  import jax
  import jax.numpy as jnp

  import gaf_optax

  P = jax.sharding.PartitionSpec
  (axis,), n = mesh.axis_names, mesh.size
  explicit = mesh.axis_types == (jax.sharding.AxisType.Explicit,)
  stacked = options.get("stacked", False)

  def place(spec, leading=lambda x: x.shape):
    sharding = jax.sharding.NamedSharding(mesh, spec)
    return lambda x: jax.ShapeDtypeStruct(leading(x), x.dtype, sharding=sharding)

  # Each device's part has the shape of a gradient: no axis is removed.
  rows = {
    (True, False): lambda x: (n, *x.shape),
    (False, True): lambda x: (2 * n, *x.shape),
    (False, False): lambda x: (n * x.shape[0], *x.shape[1:]),
  }[explicit, stacked]
  args = [jax.tree.map(place(P(axis), rows), grads)]
  if mean:

    def function(mine):
      if explicit or stacked:
        mine = jax.tree.map(lambda x: jnp.mean(x, axis=0), mine)
      return mine if explicit else jax.lax.pmean(mine, axis)

  else:
    tx = gaf_optax.gaf(0.97, axis_name=None if explicit else axis, **options)
    args.append(jax.tree.map(place(P()), jax.eval_shape(tx.init, grads)))
    function = lambda mine, state: tx.update(mine, state)
  if not explicit:
    specs = (P(axis), P())[: len(args)]
    function = jax.shard_map(
      function, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check
    )
  return jax.jit(function), tuple(args)


def cost(leaves: list[tuple[int, ...]], n: int, check: bool = True, **options) -> Cost:
  """Cost of `gaf(axis_name='data', **options)`, or of the mean with `mean=True`."""
  import jax

  kind = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((n,), ("data",), axis_types=kind, devices=jax.devices()[:n])
  function, args = across(gradient(leaves), mesh, check=check, **options)
  compiled = function.lower(*args).compile()
  found = collectives(compiled.as_text(), n)
  return Cost(
    sum(each.sent for each in found),
    len(found),
    compiled.memory_analysis().temp_size_in_bytes,
  )


def gradient(leaves: list[tuple[int, ...]], dtypes: tuple[str, ...] = ("float32",)):
  """A tree of `jax.ShapeDtypeStruct`; the dtypes are cycled over the leaves."""
  import jax

  # Numbers keep the order of the leaves when keys are sorted.
  return {
    f"{i:04d}": jax.ShapeDtypeStruct(shape, dtypes[i % len(dtypes)])
    for i, shape in enumerate(leaves)
  }


def _worker(n: int) -> None:
  import jax

  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", n)
  for tree in TREES:
    leaves = shapes(tree)
    filtered, mean = cost(leaves, n), cost(leaves, n, mean=True)
    row = dict(tree=tree, n=n, leaves=len(leaves), values=_values(leaves))
    print(json.dumps(row | dict(filtered=filtered, mean=mean)), flush=True)


def measured(n: int) -> list[dict]:
  """A row for each tree, from a process with n devices."""
  command = [sys.executable, __file__, "--worker", str(n)]
  output = subprocess.run(
    command, capture_output=True, text=True, check=True, timeout=600
  ).stdout
  rows = [json.loads(line) for line in output.splitlines()]
  for row in rows:
    row["filtered"], row["mean"] = Cost(*row["filtered"]), Cost(*row["mean"])
  return rows


def extrapolated(num_values: int, n: int) -> float:
  """Bytes sent in an ordinary step, relative to the mean, by calculation.

  Besides the exchange of float32 gradients, an ordinary step sends one sum of k x k
  products and k flags. The program's other two all-reduces are in a branch for values
  that are not finite, zero, or out of range.
  """
  return (num_values + n * n + n) / num_values


def _values(leaves) -> int:
  return sum(math.prod(shape) for shape in leaves)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--devices", type=int, nargs="+", default=[2, 8, 64])
  parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    _worker(args.worker)
    return
  print(f"jax {version('jax')}, float32, replication check on; P: the gradient\n")
  print(
    "| leaves | values | devices | sent, MB | pmean, MB | ratio | collectives |", end=""
  )
  print(" temporary, P | pmean, P |")
  print("|---|---|---|---|---|---|---|---|---|")
  for n in args.devices:
    for row in measured(n):
      filtered, mean, size = row["filtered"], row["mean"], 4 * row["values"]
      cells = [
        row["leaves"],
        f"{row['values']:,}",
        n,
        f"{filtered.sent / 1e6:.3f}",
        f"{mean.sent / 1e6:.3f}",
        f"{filtered.sent / mean.sent:.4f}",
        f"{filtered.collectives} / {mean.collectives}",
        f"{filtered.temporary / size:.2f}",
        f"{mean.temporary / size:.2f}",
      ]
      print("|", " | ".join(map(str, cells)), "|", flush=True)
  print("\nOn paper, sent in an ordinary step over pmean:\n")
  pods = (8, 64, 256, 1024, 4096)
  print("| values |", " | ".join(f"{n} devices" for n in pods), "|")
  print("|---" * (len(pods) + 1) + "|")
  for values in (_values(shapes("resnet18")), 10**8, 10**9, 10**10):
    ratios = (f"{extrapolated(values, n):.4f}" for n in pods)
    print(f"| {values:,} |", " | ".join(ratios), "|")


if __name__ == "__main__":
  main()
