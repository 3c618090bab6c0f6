"""Time, memory and compilation of the filter, relative to the plain mean.

    python benchmarks/run.py

prints a table for each section and writes them to `runs/benchmarks.md`, with the
machine, the versions and the date. Times are ratios within this run: programs run in
turn, and each is compared with the baseline of the same round. `RESULTS.md` has the
results.
"""

import argparse
import functools
import importlib.util
import math
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

import exchange
import gaf_optax
import measure
from gaf_optax import rules

_EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"

# Accepts most of the micro-gradients of `micro_gradients`. The number of accepted ones
# does not change the time.
_TAU = 0.97


def micro_gradients(shapes: list[tuple[int, ...]], k: int) -> dict[str, jax.Array]:
  """k random micro-gradients with a common part, leaves `[k, *shape]`."""

  @functools.partial(jax.jit, static_argnums=1)
  def leaf(key, shape):
    in_common = jax.random.normal(jax.random.fold_in(key, 1), (1, *shape[1:]))
    return in_common / 4 + jax.random.normal(key, shape)

  keys = jax.random.split(jax.random.key(0), len(shapes))
  # Numbers keep the order of the leaves when keys are sorted.
  return {
    f"{i:04d}": leaf(key, (k, *shape))
    for i, (key, shape) in enumerate(zip(keys, shapes))
  }


def num_values(tree: Any) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def library_mean(stack: Any) -> Any:
  """`jnp.mean` over the leading axis."""
  return jax.tree.map(lambda x: jnp.mean(x, axis=0), stack)


def written_mean(stack: Any) -> Any:
  """The mean as one sum of k terms, which XLA on CPU compiles to a faster loop."""
  return jax.tree.map(lambda x: sum(x[i] for i in range(len(x))) / len(x), stack)


def filtered(stack: Any, rule: Any = None) -> measure.Program:
  """`gaf` on a stack, compiled."""
  tx = gaf_optax.gaf(_TAU, rule=rule)
  state = tx.init(jax.tree.map(lambda x: x[0], stack))
  return measure.program(lambda stack, state: tx.update(stack, state), stack, state)


def compared(
  programs: dict[str, measure.Program], size: int, repeats: int
) -> list[list[str]]:
  """Table rows: name, time relative to the first program, temporary memory.

  Args:
    programs: the first is the baseline.
    size: values of one micro-gradient, the unit of memory (4 bytes each).
    repeats: number of counted rounds.
  """
  seconds = measure.interleaved({n: p.run for n, p in programs.items()}, repeats)
  baseline = next(iter(programs))
  milliseconds, ratios = measure.ratios(seconds, baseline)
  return [
    [
      name,
      str(ratios.get(name, f"1 ({milliseconds:.3g} ms)")),
      f"{program.temporary / (4 * size):.2f}",
    ]
    for name, program in programs.items()
  ]


def stacked(quick: bool) -> str:
  """Time and memory of `gaf` on a stack, next to the mean of the same stack."""
  shapes = exchange.shapes("awkward" if quick else "resnet18")
  rows = []
  for k in (2,) if quick else (2, 8, 32):
    stack = micro_gradients(shapes, k)
    programs = {
      "`jnp.mean`": measure.program(library_mean, stack),
      "mean, written as a sum": measure.program(written_mean, stack),
      "`gaf`": filtered(stack),
      "`gaf`, `most_neighbors`": filtered(stack, rules.most_neighbors()),
    }
    size = num_values(stack) // k
    rows += [[f"{k}", *row] for row in compared(programs, size, 2 if quick else 11)]
  return (
    f"{len(shapes)} leaves, {size:,} values, float32; time relative to `jnp.mean`,"
    " temporary memory in units of one gradient.\n\n"
    + measure.table(["k", "", "time", "temporary"], rows)
  )


def mlp(sizes):
  """Parameters of a dense network, and its loss on a microbatch."""

  def init(key):
    keys = jax.random.split(key, len(sizes) - 1)
    return [
      {"w": jax.random.normal(k, (a, b)) / math.sqrt(a), "b": jnp.zeros(b)}
      for k, a, b in zip(keys, sizes, sizes[1:])
    ]

  def loss(params, x, y):
    for layer in params[:-1]:
      x = jax.nn.relu(x @ layer["w"] + layer["b"][None])
    logits = x @ params[-1]["w"] + params[-1]["b"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

  return init, loss


def _images(k, rows, shape, num_classes=10):
  keys = jax.random.split(jax.random.key(1), 2)
  x = jax.random.normal(keys[0], (k, rows, *shape))
  return x, jax.random.randint(keys[1], (k, rows), 0, num_classes)


def streamed_forms(
  sizes: tuple[int, ...], k: int, rows: int
) -> dict[str, dict[str, tuple]]:
  """Gradients of an MLP on k microbatches, in Optax's forms and with GAF.

  Returns:
    For each form, two labeled pairs of a function and its arguments.
  """
  init, loss = mlp(sizes)
  params = init(jax.random.key(0))
  x, y = _images(k, rows, sizes[:1])
  flat = params, x.reshape(-1, sizes[0]), y.reshape(-1)

  def accumulated(tx):
    def cycle(params, state, x, y):
      def step(state, microbatch):
        updates, state = tx.update(jax.grad(loss)(params, *microbatch), state, params)
        return state, None

      return jax.lax.scan(step, state, (x, y))[0]

    return cycle, params, tx.init(params), x, y

  forms = {}
  if hasattr(optax, "microbatching"):  # Not in Optax 0.2.6.
    micro = optax.microbatching
    in_optax = micro.microbatch(
      jax.value_and_grad(loss), (1, 2), rows, micro.AccumulationType.MEAN
    )
    ours = gaf_optax.value_and_grad(loss, k, _TAU, batch_argnums=(1, 2))
    forms["value_and_grad"] = {
      "`optax.microbatching`": (in_optax, *flat),
      "`value_and_grad`": (ours, *flat),
    }
  multi = optax.MultiSteps(optax.sgd(0.1), k).gradient_transformation()
  forms["multi_steps"] = {
    "`optax.MultiSteps`": accumulated(multi),
    "`multi_steps`": accumulated(gaf_optax.multi_steps(optax.sgd(0.1), k, _TAU)),
  }
  return forms


def streamed(quick: bool) -> str:
  """Time and memory of the streamed forms, next to Optax's, gradients included."""
  sizes = (16, 8, 10) if quick else (3072, 512, 512, 10)
  size = num_values(mlp(sizes)[0](jax.random.key(0)))
  rows = []
  for k, batch in ((4, 2),) if quick else ((8, 8), (8, 64), (32, 8)):
    for forms in streamed_forms(sizes, k, batch).values():
      programs = {name: measure.program(*form) for name, form in forms.items()}
      found = compared(programs, size, 2 if quick else 15)
      rows += [[f"{k} x {batch}", *row] for row in found]
  return (
    f"Gradients and their mean for an MLP {'-'.join(map(str, sizes))}, {size:,} values;"
    " time relative to Optax's form, temporary memory in units of one gradient.\n\n"
    + measure.table(["k x rows", "", "time", "temporary"], rows)
  )


def step(quick: bool) -> str:
  """A whole training step of a ResNet, next to that with the mean."""
  sys.path.append(str(_EXAMPLES / "cifar100_resnet18"))
  import model as models

  on_cpu = jax.default_backend() == "cpu"
  model, side = models.ResNet(10, 16, (1, 1, 1, 1), small_stem=True), 32
  settings = [(k, 16, jnp.float32) for k in (2, 8)]
  if quick:
    model, side = models.ResNet(10, 2, (1,), small_stem=True), 8
    settings = [(2, 2, jnp.bfloat16)]
  elif not on_cpu:
    model = models.ResNet(100, small_stem=False)
    settings = [(k, 128, d) for d in (jnp.float32, jnp.bfloat16) for k in (2, 8)]
  rows = []
  for k, batch, dtype in settings:
    x, y = _images(k, batch, (side, side, 3))
    variables = model.init(jax.random.key(0), x[0, :1], train=False)
    params, statistics = variables["params"], variables["batch_stats"]

    def loss(params, statistics, x, y):
      cast = lambda tree: jax.tree.map(lambda a: a.astype(dtype), tree)
      variables = {"params": cast(params), "batch_stats": statistics}
      logits, new = model.apply(variables, cast(x), train=True, mutable=["batch_stats"])
      losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), y
      )
      return losses.mean(), new["batch_stats"]

    def train(tx, params, statistics, state, x, y):
      each = jax.vmap(jax.value_and_grad(loss, has_aux=True), (None, None, 0, 0))
      (_, statistics), grads = each(params, statistics, x, y)
      updates, state = tx.update(grads, state, params)
      statistics = jax.tree.map(lambda s: jnp.mean(s, axis=0), statistics)
      return optax.apply_updates(params, updates), statistics, state

    inner = optax.sgd(0.1, momentum=0.9)
    ways = {
      "mean": optax.stateless(lambda stack, _: library_mean(stack)),
      "mean, written as a sum": optax.stateless(lambda stack, _: written_mean(stack)),
      "`gaf`": gaf_optax.gaf(_TAU),
    }
    programs = {}
    for name, way in ways.items():
      tx = optax.chain(way, inner)
      programs[name] = measure.program(
        functools.partial(train, tx), params, statistics, tx.init(params), x, y
      )
    found = compared(programs, num_values(params), 2 if quick else 21)
    setting = f"{k} x {batch}, {jnp.dtype(dtype).name}"
    rows += [[setting, *row] for row in found]
  name = f"ResNet of width {model.width}, blocks {model.blocks}"
  return (
    f"{name}, {num_values(params):,} values, images of {side} x {side}, SGD with"
    " momentum: forward, backward and update; time relative to the step with"
    " `jnp.mean`.\n\n" + measure.table(["k x images", "", "time", "temporary"], rows)
  )


def by_example(quick: bool) -> str:
  """Single examples, compared by the last layer, next to one step on the batch."""
  batch = 4 if quick else 256
  rows = []
  for name, make in _MODELS.items():
    loss, params, data, last, weighted = make(batch, quick)
    ours = gaf_optax.value_and_grad(
      loss, batch, gaf_optax.tau_quantile(0.5), rule=_NEAREST, compare=last
    )
    found = jax.tree_util.tree_flatten_with_path(params)[0]
    size = batch * sum(leaf.size for path, leaf in found if last(path, leaf))
    gradients = jax.random.normal(jax.random.key(2), (batch, size // batch))
    product = functools.partial(jnp.matmul, precision="highest")
    programs = {
      "`jax.value_and_grad`": measure.program(jax.value_and_grad(loss), params, *data),
      "`value_and_grad(compare=...)`": measure.program(ours, params, *data),
      "a product of `2 B^2 c` alone": measure.program(
        lambda x: product(x, x.T), gradients
      ),
    }
    if weighted is not None:
      programs["`example_weights`"] = measure.program(
        jax.value_and_grad(weighted), params, *data
      )
    repeats = 2 if quick else 15 if weighted is not None else 5
    label = f"{name}, {num_values(params):,} values, c = {size // batch:,}"
    rows += [[label, *row] for row in compared(programs, size, repeats)]
  return (
    f"B = {batch} examples; c values are compared. Time relative to"
    " `jax.value_and_grad` of the mean loss, temporary memory in units of B c values."
    "\n\n" + measure.table(["model", "", "time", "temporary"], rows)
  )


_NEAREST = rules.nearest_neighbors(5)


def _compared_mlp(num_classes):
  """A function that makes an MLP whose last layer is compared."""

  def make(batch, quick):
    sizes = (16, 8, 8, num_classes) if quick else (784, 1024, 1024, num_classes)
    init, loss = mlp(sizes)
    (x,), (y,) = _images(1, batch, sizes[:1], num_classes)

    def weighted(params, x, y):
      for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"][None])
      logits = x @ params[-1]["w"] + params[-1]["b"][None]
      errors = jax.nn.softmax(logits) - jax.nn.one_hot(y, num_classes)
      tau = gaf_optax.tau_quantile(0.5)
      weights = gaf_optax.example_weights(x, errors, tau, rule=_NEAREST).weights
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
      return jnp.sum(weights * losses)

    last = lambda path, leaf: path[0].idx == len(sizes) - 2
    return loss, init(jax.random.key(0)), (x, y), last, weighted

  return make


def _compared_resnet(batch, quick):
  """A ResNet with GroupNorm: BatchNorm would tie the examples together."""
  sys.path.append(str(_EXAMPLES / "cifar100_resnet18"))
  import flax.linen as nn

  import model as models

  class ResNet(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
      for stage in range(2 if quick else 4):
        stride = 2 if stage else 1
        shortcut = models._convolution(self.width * 2**stage, 1, stride)(x)
        x = models._convolution(self.width * 2**stage, 3, stride)(x)
        x = nn.relu(nn.GroupNorm(num_groups=None, group_size=4)(x))
        x = models._convolution(self.width * 2**stage, 3, 1)(x)
        x = nn.relu(nn.GroupNorm(num_groups=None, group_size=4)(x) + shortcut)
      return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))

  model = ResNet(4 if quick else 16)
  (x,), (y,) = _images(1, batch, (8, 8, 3) if quick else (32, 32, 3))
  params = model.init(jax.random.key(0), x[:1])["params"]

  def loss(params, x, y):
    logits = model.apply({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

  return loss, params, (x, y), lambda path, leaf: path[0].key == "Dense_0", None


def _compared_transformer(batch, quick):
  """A decoder on bytes, compared by the last layer of its last block."""
  # Other examples also have a train.py, so load it by path.
  path = _EXAMPLES / "byte_lm" / "train.py"
  spec: Any = importlib.util.spec_from_file_location("byte_lm_train", path)
  example = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(example)
  model = example.Decoder(width=16 if quick else 96)
  tokens = jax.random.randint(jax.random.key(1), (batch, 9 if quick else 65), 0, 256)
  params = model.init(jax.random.key(0), tokens[:1])["params"]

  def loss(params, tokens):
    logits = model.apply({"params": params}, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

  return loss, params, (tokens,), lambda path, leaf: path[0].key == "Dense_2", None


_MODELS = {
  "MLP of 10 classes": _compared_mlp(10),
  "MLP of 100 classes": _compared_mlp(100),
  "ResNet": _compared_resnet,
  "transformer on 64 bytes": _compared_transformer,
}


def growth(quick: bool) -> str:
  """Time against k, on one device: by the Gram matrix, and by a running sum."""
  shapes = [(10, 10)] if quick else [(1000, 500), (500_000,)]
  rows = []
  for k in (2,) if quick else (2, 4, 8, 16, 32, 64, 128, 256):
    stack = micro_gradients(shapes, k)
    tx = gaf_optax.multi_steps(optax.identity(), k, _TAU)
    state = tx.init(jax.tree.map(lambda x: x[0], stack))

    def one_by_one(stack, state):
      def push(carry, micro_grad):
        return tx.update(micro_grad, carry[1]), None

      start = jax.tree.map(lambda x: jnp.zeros_like(x[0]), stack), state
      return jax.lax.scan(push, start, stack)[0]

    programs = {
      "mean": measure.program(written_mean, stack),
      "`jnp.mean`": measure.program(library_mean, stack),
      "`gaf`": filtered(stack),
      "`gaf`, `most_neighbors`": filtered(stack, rules.most_neighbors()),
      "`multi_steps` in a scan": measure.program(one_by_one, stack, state),
    }
    seconds = measure.interleaved(
      {n: p.run for n, p in programs.items()}, 2 if quick else 7
    )
    milliseconds, ratios = measure.ratios(seconds, "mean")
    rows.append([k, f"{milliseconds:.3g}", *ratios.values()])
  size = num_values(stack) // k
  return (
    f"{len(shapes)} leaves, {size:,} values; time relative to the mean, written as a"
    " sum.\n\n" + measure.table(["k", "mean, ms", *ratios], rows)
  )


def compilation(quick: bool) -> str:
  """Seconds to compile `gaf`, against k and the number of leaves."""
  settings = [(k, 10, 512) for k in (2, 8, 32, 128, 256)]
  settings += [(8, 100, 512), (8, 1000, 512)]
  settings += [(k, leaves, 32768) for k in (2, 4, 8) for leaves in (10, 100)]
  rows = []
  for k, leaves, size in [(2, 1, 512)] if quick else settings:
    # Different shapes, so that no program is reused.
    stack = {
      f"{i:04d}": jax.ShapeDtypeStruct((k, size // 64, 64 - i % 32), jnp.float32)
      for i in range(leaves)
    }
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stack)
    cells = [k, leaves, f"{size // 2:,} to {size:,}"]
    for rule in (rules.sequential(), rules.most_neighbors()):
      tx = gaf_optax.gaf(_TAU, rule=rule)
      state = jax.eval_shape(tx.init, like)
      cells.append(_seconds(tx.update, stack, state))
    rows.append([*cells, _seconds(library_mean, stack)])
  header = ["k", "leaves", "values in each"]
  header += ["`gaf`, s", "`gaf`, `most_neighbors`, s", "`jnp.mean`, s"]
  return "Tracing and compiling, median of 3.\n\n" + measure.table(header, rows)


def _seconds(function, *args):
  times = sorted(measure.compile_seconds(function, *args) for _ in range(3))
  return f"{times[1]:.2f}"


def against_peers(quick: bool) -> str:
  """The same micro-gradients through other packages, in PyTorch."""
  try:
    import peers
  except ModuleNotFoundError as error:
    return f"Left out: there is no {error.name} here; `pip install -e '.[peers]'`."
  shapes = exchange.shapes("awkward" if quick else "resnet18")
  rows = []
  for k in (2,) if quick else (2, 8):
    stack = micro_gradients(shapes, k)
    programs = {
      "`gaf`": filtered(stack).run,
      "`gaf`, `most_neighbors`": filtered(stack, rules.most_neighbors()).run,
      "mean in JAX, written as a sum": measure.program(written_mean, stack).run,
      **peers.programs(stack, _TAU),
    }
    seconds = measure.interleaved(programs, 2 if quick else 7)
    milliseconds, ratios = measure.ratios(seconds, "`gaf`")
    for name in programs:
      time = ratios.get(name, f"1 ({milliseconds:.3g} ms)")
      rows.append([f"{k}", name, str(time)])
  size = num_values(stack) // k
  return (
    f"{len(shapes)} leaves, {size:,} values, float32; {peers.versions()}. Time relative"
    " to `gaf`.\n\n" + measure.table(["k", "", "time"], rows)
  )


SECTIONS = {
  "stacked": stacked,
  "streamed": streamed,
  "step": step,
  "by_example": by_example,
  "growth": growth,
  "compilation": compilation,
  "peers": against_peers,
}


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
  parser.add_argument("--out", type=pathlib.Path, default="runs/benchmarks.md")
  parser.add_argument(
    "--quick",
    action="store_true",
    help="tiny sizes, to test that it runs",
  )
  args = parser.parse_args(argv)
  parts = [f"# Times with jax {jax.__version__}", measure.environment() + "."]
  print(*parts, sep="\n\n", flush=True)
  for name in args.only:
    section = SECTIONS[name]
    heading = (section.__doc__ or "").rstrip(".")
    parts.append(f"## {heading}\n\n{section(args.quick)}")
    print(f"\n{parts[-1]}", flush=True)
  measure.write(parts, args.out)


if __name__ == "__main__":
  main()
