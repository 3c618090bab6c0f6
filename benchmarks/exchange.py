"""What the filter across devices costs, read from the compiled program.

For each number of devices: the bytes that a device sends (ring model) next to
`jax.lax.pmean` on the same gradients, the number of collectives, and the temporary
memory. Devices are virtual CPU devices and programs are compiled only, so that the
figures do not depend on the machine.

    python benchmarks/exchange.py
"""

import argparse
import json
import math
import re
import subprocess
import sys
from importlib.metadata import version
from typing import NamedTuple

TREES = ("awkward", "resnet18")


class Cost(NamedTuple):
  """What one program costs a device.

  Attributes:
    sent: bytes sent, on a ring.
    collectives: how many.
    temporary: bytes of temporary memory.
  """

  sent: float
  collectives: int
  temporary: int


def shapes(tree: str) -> list[tuple[int, ...]]:
  """Leaves of a tree: sizes that 8 does not divide, or those of a ResNet-18."""
  if tree == "awkward":
    return [(17,), (64,), (3000,), (100_000,)]
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


_WIDTHS = {"f64": 8, "c64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2}
_WIDTHS |= {"pred": 1, "s8": 1, "u8": 1}
_COLLECTIVE = re.compile(
  r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)"
  r"(?:-start)?\("
)


def collectives(text: str, n: int) -> list[tuple[str, int, float]]:
  """The collectives of a compiled program: (operation, bytes of result, bytes sent).

  Bytes are those that a device sends when the operation runs on a ring of n.
  """
  share = (n - 1) / n
  sent = {
    "all-reduce": 2 * share,
    "all-gather": share,
    "all-to-all": share,
    "reduce-scatter": n - 1,
    "collective-permute": 1,
  }
  found = []
  for line in text.splitlines():
    match = _COLLECTIVE.search(line)
    if match:
      size = sum(
        _WIDTHS[dtype] * math.prod(int(d) for d in dims.split(",") if d)
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
      )
      found.append((match[2], size, size * sent[match[2]]))
  return found


def cost(leaves: list[tuple[int, ...]], n: int, check: bool = True, **options) -> Cost:
  """Of `gaf(axis_name='data', **options)`, or of the plain mean with `mean=True`."""
  import jax
  import jax.numpy as jnp

  import gaf_optax

  P = jax.sharding.PartitionSpec
  kind = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((n,), ("data",), axis_types=kind, devices=jax.devices()[:n])
  mean = options.pop("mean", False)
  # Numbered so that the order of the leaves is that of the list.
  grads = {
    f"{i:04d}": jax.ShapeDtypeStruct((n, *shape), jnp.float32)
    for i, shape in enumerate(leaves)
  }
  tx = gaf_optax.gaf(0.97, axis_name="data", **options)

  def member(rows):
    mine = jax.tree.map(lambda x: x[0], rows)
    if mean:
      return jax.lax.pmean(mine, "data")
    return tx.update(mine, tx.init(mine))

  mapped = jax.shard_map(
    member, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=check
  )
  compiled = jax.jit(mapped).lower(grads).compile()
  found = collectives(compiled.as_text(), n)
  return Cost(
    sum(sent for _, _, sent in found),
    len(found),
    compiled.memory_analysis().temp_size_in_bytes,
  )


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
  """A row for each tree, from a process that has n devices."""
  command = [sys.executable, __file__, "--worker", str(n)]
  output = subprocess.run(
    command, capture_output=True, text=True, check=True, timeout=600
  ).stdout
  rows = [json.loads(line) for line in output.splitlines()]
  for row in rows:
    row["filtered"], row["mean"] = Cost(*row["filtered"]), Cost(*row["mean"])
  return rows


def extrapolated(num_values: int, n: int) -> float:
  """Bytes sent over those of the mean, in an ordinary step, on paper.

  An ordinary step sends one sum of k x k products and k flags besides the exchange
  of float32 gradients; the two other all-reduces of the program are in a branch for
  values that are not finite, zero, or out of range.
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
