"""Costs of the library in programs compiled for TPUs and GPUs that are not attached.

    pip install -e '.[accelerators]'
    python benchmarks/accelerators.py

compiles for eight devices and for one, and prints a table for each available target.
Programs are compiled and never run: no number here is a time on an accelerator. Each
cell has the value of the form and, after the stroke, of the plain mean.

Targets: TPUs such as v5e:2x4, v5e:4x4, v5p:2x2x2, v6e:2x4, or v5e:1x1 for forms on one
device; GPUs as h100:8 or h100:1. Forms are in `ACROSS` and `ALONE`. Trees are names of
`exchange.shapes` (resnet18, small, transformer, billion, billion-scanned), or shapes
such as 3x3x64x128,512x100.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import exchange
import measure

TARGETS = ("v5e:2x4", "v5p:2x2x2", "h100:8", "v5e:1x1", "h100:1")

# Across devices: options of `exchange.across`, and the dtypes, cycled over the leaves.
ACROSS: dict[str, dict[str, Any]] = {
  "gaf": {},
  "most_neighbors": {"rule": "most_neighbors"},
  "leaf": {"groups": "leaf"},
  "anchor": {"anchor_decay": 0.9},
  "memory": {"memory_decay": 0.98},
  "stacked": {"stacked": True},
  "unchecked": {"check": False},
  "sharded": {"explicit": True},
  "bfloat16": {"dtypes": ("bfloat16",)},
  "mixed": {"dtypes": ("float32", "bfloat16")},
  # FSDP under plain jit: a micro-gradient on each device, and a sharded result.
  "on_shards": {},
  "no_on_shards": {},
}
# On one device: `gaf` on a stack of k, and the streamed forms of `run.streamed_forms`.
ALONE = [f"k{k}{dtype}" for dtype in ("", "_bfloat16") for k in (2, 8, 32)]
ALONE += ["multi_steps", "value_and_grad"]

# Do not look for devices. Without devices to share, several processes may open libtpu,
# which its lock file otherwise forbids.
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TF_CPP_MIN_LOG_LEVEL": "3",
}


class Unavailable(Exception):
  """A target that cannot be opened, with the reason."""


def missing(target: str) -> str | None:
  """The missing package for a target, or None."""
  gpu = target.startswith("h100")
  module, package = (
    ("jax_plugins.xla_cuda12", "jax-cuda12-plugin") if gpu else ("libtpu", "libtpu")
  )
  try:
    found = importlib.util.find_spec(module)
  except ModuleNotFoundError:
    found = None
  return None if found else f"{package} is not installed"


def devices(target: str) -> list:
  """The devices of a target, to compile for."""
  from jax.experimental import topologies

  name, _, size = target.partition(":")
  if name != "h100":
    return list(topologies.get_topology_desc(target, "tpu").devices)
  config = (pathlib.Path(__file__).parent / "h100.txtpb").read_text(encoding="utf-8")
  return list(
    topologies.get_topology_desc(
      name, "cuda", target_config=config, topology=f"1x1x{size}"
    ).devices
  )


def _across(form, tree, found) -> Iterator[tuple[int, Callable, tuple]]:
  """For the form and then the mean: bytes of a gradient, function, arguments."""
  import jax
  import numpy as np

  import gaf_optax

  options = dict(ACROSS[form])
  usual = "bfloat16" if tree.startswith(("transformer", "billion")) else "float32"
  grads = exchange.gradient(exchange.shapes(tree), options.pop("dtypes", (usual,)))
  kind = jax.sharding.AxisType
  kind = kind.Explicit if options.pop("explicit", False) else kind.Auto
  mesh = jax.sharding.Mesh(np.array(found), ("data",), axis_types=(kind,))
  if "rule" in options:
    options["rule"] = getattr(gaf_optax.rules, options["rule"])()
  if form == "memory":
    options["num_microbatches"] = len(found)
  size = sum(x.size * x.dtype.itemsize for x in grads.values())
  for mean in (False, True):
    yield size, *exchange.across(grads, mesh, mean=mean, **options)


def _fsdp(form, tree, found):
  """Like `_across`, for parameters sharded over Auto axes."""
  import jax
  import numpy as np
  from jax.sharding import NamedSharding
  from jax.sharding import PartitionSpec as P

  import gaf_optax

  n = len(found)
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.sharding.Mesh(np.array(found), ("data",), axis_types=auto)
  grads = exchange.gradient(exchange.shapes(tree), ("float32",))

  def spec(x):
    fits = [i for i, size in enumerate(x.shape) if size % n == 0]
    return P(*[None] * fits[0], "data") if fits else P()

  def placed(tree, specs, leading=()):
    place = lambda x, spec: jax.ShapeDtypeStruct(
      (*leading, *x.shape), x.dtype, sharding=NamedSharding(mesh, spec)
    )
    return jax.tree.map(place, tree, specs)

  specs = jax.tree.map(spec, grads)
  tx = gaf_optax.gaf(0.97)
  if form == "on_shards":
    sharded = gaf_optax.gaf(0.97, param_axes="data")
    tx = gaf_optax.on_shards(sharded, mesh, specs)
  state = jax.eval_shape(tx.init, grads)
  state = placed(state, jax.tree.map(lambda _: P(), state))
  params = placed(grads, specs)
  stack = placed(grads, jax.tree.map(lambda _: P("data"), grads), (n,))
  out = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
  size = sum(4 * x.size for x in grads.values())
  update = lambda stack, state, params: tx.update(stack, state, params)
  yield size, jax.jit(update, out_shardings=(out, None)), (stack, state, params)
  mean = lambda stack: jax.tree.map(lambda x: x.mean(0), stack)
  yield size, jax.jit(mean, out_shardings=out), (stack,)


def _alone(form, tree, found):
  """Like `_across`, on the first device."""
  import jax
  import numpy as np

  import gaf_optax
  import run

  mesh = jax.sharding.Mesh(np.array(found[:1]), ("data",))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def placed(args, leading=()):
    place = lambda x: jax.ShapeDtypeStruct(
      (*leading, *x.shape), x.dtype, sharding=whole
    )
    return jax.tree.map(place, args)

  if not form.startswith("k"):
    sizes = (256, 128, 128, 10) if tree == "small" else (3072, 512, 512, 10)
    theirs, ours = run.streamed_forms(sizes, 8, 8)[form].values()
    size = 4 * run.num_values(ours[1])
    for function, *args in (ours, theirs):
      yield size, jax.jit(function), placed(tuple(args))
    return
  k, _, dtype = form[1:].partition("_")
  grads = exchange.gradient(exchange.shapes(tree), (dtype or "float32",))
  size = sum(x.size * x.dtype.itemsize for x in grads.values())
  tx, stack = gaf_optax.gaf(0.97), placed(grads, (int(k),))
  state = placed(jax.eval_shape(tx.init, grads))
  yield size, jax.jit(lambda stack, state: tx.update(stack, state)), (stack, state)
  yield size, jax.jit(run.library_mean), (stack,)


def _copies(found: dict[str, list[exchange.Instruction]]) -> int:
  """Bytes that the entry computation copies, possibly into another layout."""
  copies = {"copy", "transpose", "reshape"}

  def copied(op, rest):
    if op != "fusion":
      return op in copies
    name = rest.partition("calls=%")[2].split(",")[0].strip()
    ops = {each.op for each in found.get(name, [])}
    return bool(ops & copies) and ops <= copies | {"parameter", "bitcast"}

  return sum(
    exchange.size_of(shape) for _, shape, op, rest in found[""] if copied(op, rest)
  )


def figures(function: Any, args: tuple, n: int) -> dict[str, Any]:
  """Costs of a program in bytes, seconds and numbers, or None if not known."""
  import jax

  jax.clear_caches()
  start = time.perf_counter()
  lowered = function.lower(*args)
  middle = time.perf_counter()
  compiled = lowered.compile()
  end = time.perf_counter()
  text, memory = compiled.as_text(), compiled.memory_analysis()
  found = exchange.collectives(text, n)
  kinds = [each.kind for each in found if not each.rare]
  beside = memory.argument_size_in_bytes + memory.output_size_in_bytes
  return {
    "sent": sum(each.sent for each in found),
    "collectives": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
    "rare": sum(each.rare for each in found),
    "asynchronous": sum(each.asynchronous for each in found),
    "temporary": memory.temp_size_in_bytes,
    "peak": max(0, memory.peak_memory_in_bytes - beside),
    "copies": _copies(exchange.computations(text)),
    # Not reported by XLA for GPU.
    "accessed": (compiled.cost_analysis() or {}).get("bytes accessed"),
    "code": memory.generated_code_size_in_bytes or None,
    "lower": middle - start,
    "compile": end - middle,
  }


def _worker(target, tree, forms, gib, seconds, plain) -> None:
  """Prints a line of JSON for each form, or one with the reason for none."""
  import resource

  resource.setrlimit(resource.RLIMIT_DATA, (gib << 30, gib << 30))
  import jax

  if plain:
    import compile_cost

    jax.lax.platform_dependent = compile_cost.plain

  try:
    found = devices(target)
    sharding = jax.sharding.SingleDeviceSharding(found[0])
    one = jax.ShapeDtypeStruct((8,), "float32", sharding=sharding)
    # Initializes the compiler, so that no form pays for it.
    jax.jit(lambda x: x + 1).lower(one).compile()
  except Exception as error:
    print(json.dumps({"unavailable": _first_line(error)}), flush=True)
    return
  for form in forms:
    signal.alarm(seconds)
    row = {"form": form, "devices": len(found), "kind": found[0].device_kind}
    make = _across if len(found) > 1 else _alone
    make = _fsdp if form.endswith("on_shards") else make
    try:
      for name, (size, function, args) in zip(("own", "mean"), make(form, tree, found)):
        row |= {"size": size, name: figures(function, args, len(found))}
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
      row["error"] = _first_line(error)
    print(json.dumps(row), flush=True)


def _first_line(error):
  return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def measured(
  target: str,
  tree: str = "resnet18",
  forms: list[str] | None = None,
  gib: int = 8,
  seconds: int = 900,
  plain: bool = False,
) -> list[dict[str, Any]]:
  """Compiles the forms for a target, in other processes.

  Args:
    target: see the top of this file.
    tree: see `exchange.shapes`.
    forms: names in `ACROSS` or `ALONE`; None for all.
    gib: maximum memory of a process.
    seconds: maximum time per form.
    plain: without the library's branches for the platform.

  Returns:
    For each form, a dict with 'form' and either 'error' or 'own' and 'mean' (see
    `figures`) and 'size', the bytes of a gradient.

  Raises:
    Unavailable: if the target cannot be opened.
  """
  if reason := missing(target):
    raise Unavailable(reason)
  known = ALONE if re.fullmatch(r".*:1(x1)*", target) else ACROSS
  left = [form for form in known if forms is None or form in forms]
  rows: list[dict[str, Any]] = []
  while left:  # A new process compiles the forms after one that crashed.
    command = [sys.executable, __file__, "--worker", target, "--tree", tree]
    command += ["--gib", str(gib), "--seconds", str(seconds), "--forms", *left]
    command[3:3] = ["--plain"] * plain
    done = subprocess.run(
      command, env=os.environ | ENVIRONMENT, capture_output=True, text=True
    )
    lines = [x for x in done.stdout.splitlines() if x.startswith("{")]
    new = [json.loads(line) for line in lines]
    if new and "unavailable" in new[0]:
      raise Unavailable(new[0]["unavailable"])
    rows += new
    del left[: len(new)]
    if left:
      said = (done.stderr.splitlines() or [""])[-1][:200]
      if done.returncode < 0:  # Output of libraries does not explain it further.
        said = f"{signal.Signals(-done.returncode).name}, of {gib} GiB and {seconds} s"
      rows.append({"form": left.pop(0), "error": f"the process ended: {said}"})
  return rows


def _table(rows) -> str:
  across = rows[0].get("devices", 1) > 1
  header = ["form", "sent, P", "over the mean", "collectives", "in branches"]
  header = [*header, "asynchronous"] if across else header[:1]
  header += ["temporary, P", "peak, P", "copies, P", "accessed", "code"]
  header += ["lower, s", "compile, s"]
  lines = []
  for row in rows:
    if "error" in row:
      lines.append([row["form"], row["error"], *[""] * (len(header) - 2)])
      continue
    own, mean, size = row["own"], row["mean"], row["size"]
    both = lambda show: f"{show(own)} / {show(mean)}"
    units = lambda key: both(lambda cost: f"{cost[key] / size:.2f}")
    over = lambda key: f"{own[key] / mean[key]:.2f}" if own[key] and mean[key] else "-"
    kinds = lambda cost: ", ".join(f"{n} {x}" for x, n in cost["collectives"].items())
    cells = [row["form"]]
    if across:
      cells += [units("sent"), f"{own['sent'] / mean['sent']:.4f}", both(kinds)]
      cells += [both(lambda cost: cost[key]) for key in ("rare", "asynchronous")]
    cells += [units("temporary"), units("peak"), units("copies")]
    cells += [over("accessed"), over("code")]
    cells += [both(lambda cost: f"{cost[key]:.1f}") for key in ("lower", "compile")]
    lines.append(cells)
  return measure.table(header, lines)


_LEGEND = """\
P: the bytes of one gradient. "Sent": by a device on a ring, including branches that
rarely run. "Collectives": outside of branches. "Peak": peak memory without arguments
and results. "Copies": whole arrays, copied or converted to another layout. "Accessed"
and "code": bytes accessed, including all branches, and code size, relative to the mean;
XLA for GPU does not report them."""


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("targets", nargs="*", metavar="TARGET", default=list(TARGETS))
  parser.add_argument("--tree", default="resnet18")
  parser.add_argument("--forms", nargs="+", choices=[*ACROSS, *ALONE], metavar="FORM")
  parser.add_argument(
    "--plain", action="store_true", help="without the platform's own branches"
  )
  parser.add_argument("--gib", type=int, default=8, help="memory of a process")
  parser.add_argument("--seconds", type=int, default=900, help="at most, for a form")
  parser.add_argument("--out", type=pathlib.Path, default="runs/accelerators.md")
  parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.worker:
    _worker(args.targets[0], args.tree, args.forms, args.gib, args.seconds, args.plain)
    return
  versions = (f"{name} {version(name)}" for name in ("jax", "jaxlib", "optax"))
  parts = [f"{', '.join(versions)}; tree: {args.tree}.\n\n{_LEGEND}"]
  print(parts[0], flush=True)
  for target in args.targets:
    try:
      rows = measured(target, args.tree, args.forms, args.gib, args.seconds, args.plain)
      part = _table(rows) if rows else "None of the forms is for this target."
    except Unavailable as reason:
      part = f"Left out: {reason}."
    parts.append(f"## {target}\n\n{part}")
    print(f"\n{parts[-1]}", flush=True)
  measure.write(parts, args.out)


if __name__ == "__main__":
  main()
