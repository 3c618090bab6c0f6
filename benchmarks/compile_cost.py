"""Costs to compile and run the filter on CPU, with and without its CPU branches.

For each tree and number of micro-gradients: CPU seconds to trace and compile, the
instructions of the program, temporary memory in gradients, and the time of a call
relative to the plain mean. "Plain" is the library without CPU branches; the difference
is their gain. `accelerators.py --plain` does the same for TPU and GPU.

    python benchmarks/compile_cost.py
"""

import argparse
import pathlib
import resource
import statistics
from unittest import mock

import jax
import jax.numpy as jnp

import exchange
import gaf_optax
import measure

# Some leaves of an MLP, a ResNet-18, and 16 layers of a small decoder.
TREES = {
  "mlp": [(64, 256), (256,), (256, 256), (256,), (256, 10), (10,)],
  "resnet18": exchange.shapes("resnet18"),
  "decoder": [(512, 64), (128, 64)]
  + 16 * [(64,), (64,), (64, 192), (192,), (64, 64), (64,)]
  + 16 * [(64,), (64,), (64, 256), (256,), (256, 64), (64,)],
}


def plain(*args, default=None, **by_platform):
  """`jax.lax.platform_dependent` without the branches of platforms."""
  return default(*args)


def figures(tree: str, k: int, dtype: str, repeats: int) -> list[list]:
  """Table rows of the mean, the filter, and the filter with plain branches."""
  draw = lambda i, s: jax.random.normal(jax.random.key(i), (k, *s)).astype(dtype)
  leaves = [draw(i, shape) for i, shape in enumerate(TREES[tree])]
  size = sum(x.nbytes for x in leaves) / k
  tx = gaf_optax.gaf(0.97)
  state = tx.init([x[0] for x in leaves])
  update = lambda leaves: tx.update(leaves, state)
  forms = {
    "mean": (lambda leaves: [jnp.mean(x, 0) for x in leaves], None),
    "gaf": (update, None),
    "gaf, plain": (update, plain),
  }
  rows, programs = [], {}
  for name, (function, branch) in forms.items():
    jax.clear_caches()
    patch = mock.patch.object(
      jax.lax, "platform_dependent", branch or jax.lax.platform_dependent
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    with patch:
      compiled = jax.jit(function).lower(leaves).compile()
    seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
    programs[name] = lambda run=compiled: jax.block_until_ready(run(leaves))
    temporary = compiled.memory_analysis().temp_size_in_bytes / size
    number = compiled.as_text().count(" = ")
    rows.append([tree, k, dtype, name, f"{seconds:.2f}", number, f"{temporary:.2f}"])
  times = measure.interleaved(programs, repeats)
  base = statistics.median(times["mean"])
  return [
    [*row, f"{statistics.median(own) / base:.2f}"]
    for row, own in zip(rows, times.values())
  ]


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--trees", nargs="+", choices=list(TREES), default=list(TREES))
  parser.add_argument("--k", nargs="+", type=int, default=[2, 8, 32])
  parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
  parser.add_argument("--repeats", type=int, default=7)
  parser.add_argument("--out", type=pathlib.Path, default="runs/compile_cost.md")
  args = parser.parse_args(argv)
  header = ["tree", "k", "dtype", "form", "compile, CPU s", "instructions"]
  header += ["temporary, P", "run / mean"]
  rows = []
  for tree in args.trees:
    for k in args.k:
      for dtype in args.dtypes:
        rows += figures(tree, k, dtype, args.repeats)
        print(*rows[-3:], sep="\n", flush=True)
  parts = [measure.environment(), measure.table(header, rows)]
  measure.write(parts, args.out)
  print(f"\n{parts[1]}\n\n{args.out}")


if __name__ == "__main__":
  main()
