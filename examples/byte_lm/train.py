"""Trains a small byte language model on eight sources, some with wrong targets.

`python examples/byte_lm/train.py`; README.md in this directory shows the results.
"""

import argparse
import csv
import functools
import json
import pathlib
import platform
import sys
import sysconfig
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from matplotlib.figure import Figure
from tqdm import tqdm

import gaf_optax
from gaf_optax import rules

NUM_SOURCES, ROWS, CONTEXT, NUM_EVALUATIONS = 8, 2, 64, 10


@functools.cache
def make_optimizer(tau, steps):
  """AdamW on the sources that agree over many steps; tau = 2 is the plain mean."""
  schedule = optax.warmup_cosine_decay_schedule(0, 4e-3, steps // 10, steps)
  return optax.chain(
    gaf_optax.gaf(
      gaf_optax.adaptive_tau() if tau == "adaptive" else tau,
      rule=rules.majority(),
      memory_decay=0.98,
      num_microbatches=NUM_SOURCES,
    ),
    optax.adamw(schedule, b2=0.99, weight_decay=0.01),
  )


@functools.partial(jax.jit, static_argnames="tx")
def init(tx, seed):
  params = model.init(jax.random.key(seed), jnp.zeros((1, CONTEXT), jnp.uint8))
  return params, tx.init(params)


@functools.partial(jax.jit, static_argnames="tx")
def train_step(tx, params, opt_state, batch):
  """One update. Microbatch i of the batch always comes from source i."""
  losses, micro_grads = jax.vmap(jax.value_and_grad(loss), (None, 0))(params, batch)
  # Each gradient is a mean over valid tokens, and microbatches differ in their number.
  num_tokens = batch.mask.sum((1, 2))
  updates, opt_state = tx.update(
    micro_grads, opt_state, params, microbatch_weights=num_tokens
  )
  mean_loss = (losses * num_tokens).sum() / num_tokens.sum()
  return optax.apply_updates(params, updates), opt_state, mean_loss


@jax.jit
def loss(params, batch):
  """Mean over the valid tokens of one microbatch, in bits per byte."""
  logits = model.apply(params, batch.inputs)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
  num_tokens = jnp.maximum(batch.mask.sum(), 1)
  return jnp.sum(losses, where=batch.mask) / num_tokens / np.log(2)


class Decoder(nn.Module):
  """A pre-norm transformer; from tokens `[b, t]` to logits `[b, t, 256]`."""

  width: int = 64
  depth: int = 2
  num_heads: int = 4

  @nn.compact
  def __call__(self, tokens):
    positions = jnp.arange(tokens.shape[1])[None]
    x = nn.Embed(256, self.width)(tokens) + nn.Embed(CONTEXT, self.width)(positions)
    for _ in range(self.depth):
      attention = nn.MultiHeadDotProductAttention(self.num_heads)
      x += attention(nn.LayerNorm()(x), mask=nn.make_causal_mask(tokens))
      x += nn.Dense(self.width)(nn.relu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
    return nn.Dense(256)(nn.LayerNorm()(x))


model = Decoder()


class Batch(NamedTuple):
  """One microbatch `[ROWS, CONTEXT]`, or one per source `[k, ROWS, CONTEXT]`."""

  inputs: np.ndarray  # uint8
  targets: np.ndarray  # uint8, the byte after each input where the targets are right
  mask: np.ndarray  # bool, False after the end of the document


class Text(NamedTuple):
  """Documents are lines of text uint8 `[n, CONTEXT + 1]`, cut or padded with zeros."""

  sources: list[np.ndarray]  # One array per source
  validation: np.ndarray  # From other files


def load_text():
  """Reads the top-level modules of this Python's standard library."""
  root = pathlib.Path(sysconfig.get_paths()["stdlib"])
  # _sysconfigdata*.py contains this machine's build options.
  files = [p for p in sorted(root.glob("*.py")) if not p.name.startswith("_sysconfig")]
  if len(files) < 10 * NUM_SOURCES:
    raise ValueError(f"{root} contains only {len(files)} source files to train on")
  held_out = files[::10]
  training = [path for path in files if path not in held_out]
  validation = _documents(held_out)
  return Text(
    [_documents(training[i::NUM_SOURCES]) for i in range(NUM_SOURCES)],
    validation[:: max(1, len(validation) // 256)],
  )


def _documents(files):
  lines = b"\n".join(path.read_bytes() for path in files).splitlines(keepends=True)
  cut = [line[: CONTEXT + 1] for line in lines if len(line) > 8]
  padded = b"".join(line.ljust(CONTEXT + 1, b"\0") for line in cut)
  return np.frombuffer(padded, np.uint8).reshape(-1, CONTEXT + 1)


_EBCDIC = np.frombuffer(bytes(range(256)).decode("latin-1").encode("cp037"), np.uint8)


def draw_kinds(seed, num_wrong):
  """Draws the kind of error in each source's targets: a list of strings."""
  wrong = ["code page", "shifted", "code page"][:num_wrong]
  kinds = np.array(wrong + ["right"] * (NUM_SOURCES - num_wrong))
  return np.random.default_rng(seed).permutation(kinds).tolist()


def batches(text, kinds, seed, start, stop):
  """Yields the batch of each step, which depends only on the seed and the step."""
  for step in range(start, stop):
    rng = np.random.default_rng((seed, step))
    batch = as_batch(np.stack([rng.choice(source, ROWS) for source in text.sources]))
    targets = batch.targets.copy()
    for i, kind in enumerate(kinds):
      if kind == "code page":  # The labels went through another character table.
        targets[i] = _EBCDIC[targets[i]]
      elif kind == "shifted":  # The label is the byte after the next one.
        targets[i, :, :-1] = targets[i, :, 1:]
    yield batch._replace(targets=targets)


def as_batch(documents):
  """Inputs and right targets of documents uint8 `[..., CONTEXT + 1]`."""
  targets = documents[..., 1:]
  return Batch(documents[..., :-1], targets, targets != 0)


LINES = {"plain": "plain mean", "gaf": "GAF", "told": "right sources only (told)"}


def run(args, text, line, seed, progress, log):
  """Trains one line from its last checkpoint; returns its optimizer state."""
  tx = make_optimizer(args.tau if line == "gaf" else 2.0, args.steps)
  kinds = draw_kinds(seed, args.wrong_sources)
  used = np.array([line != "told" or kind == "right" for kind in kinds])
  validation = as_batch(text.validation)
  state, rows = list(init(tx, seed)), []
  path = (args.out / "checkpoints" / f"{line}-{seed}").absolute()
  keep = ocp.CheckpointManagerOptions(max_to_keep=1)
  with ocp.CheckpointManager(path, options=keep) as checkpoints:
    start = checkpoints.latest_step() or 0
    if start:
      items = dict(state=ocp.args.StandardRestore(state), rows=ocp.args.JsonRestore())
      restored = checkpoints.restore(start, args=ocp.args.Composite(**items))
      state, rows = restored.state, restored.rows
      log(rows)
    progress.set_description(f"seed {seed}, {LINES[line]}")
    progress.update(start)
    stream = batches(text, kinds, seed, start, args.steps)
    for step, batch in enumerate(stream, start + 1):
      # A source without valid tokens has weight 0 and is excluded.
      batch = batch._replace(mask=batch.mask & used[:, None, None])
      *state, train_loss = train_step(tx, *state, batch)
      progress.update()
      if step % max(1, args.steps // NUM_EVALUATIONS) and step != args.steps:
        continue
      row = dict(seed=seed, line=line, step=step, train_loss=float(train_loss))
      row["validation_loss"] = float(loss(state[0], validation))
      row |= {name: float(x) for name, x in gaf_optax.metrics(state[1]).items()}
      agreement = gaf_optax.sources(state[1])["agreement"]
      row |= {f"agreement_{i}": float(x) for i, x in enumerate(agreement, 1)}
      rows.append(row)
      log([row])
      items = dict(state=ocp.args.StandardSave(state), rows=ocp.args.JsonSave(rows))
      checkpoints.save(step, args=ocp.args.Composite(**items))
  return state[1]


def losses_table(rows):
  """Final validation losses as text: mean and standard deviation over the seeds."""

  def spread(x):
    return f"{x.mean():.3f}" + (f" ± {x.std(ddof=1):.3f}" if len(x) > 1 else "")

  last = {line: _column(rows, line, "validation_loss")[:, -1] for line in LINES}
  found = [f"{'':26}{'bits per byte':>16}{'minus plain mean':>19}"]
  for line, name in LINES.items():
    less = "" if line == "plain" else spread(last[line] - last["plain"])
    found.append(f"{name:26}{spread(last[line]):>16}{less:>19}".rstrip())
  return "\n".join(found)


def sources_table(opt_state, kinds):
  """`gaf_optax.sources` as text."""
  columns = gaf_optax.sources(opt_state)
  found = ["source  targets  " + "".join(f"{name:>14}" for name in columns)]
  for i, (kind, *values) in enumerate(zip(kinds, *columns.values()), 1):
    found.append(f"{i:<8}{kind:<9}" + "".join(f"{float(x):14.3f}" for x in values))
  return "\n".join(found)


def plot(rows, kinds, path):
  """Validation losses of all seeds, and the agreement of the sources in the first."""
  figure = Figure(figsize=(10, 4), layout="constrained")
  left, right = figure.subplots(1, 2)
  steps = _column(rows, "gaf", "step")[0]
  for line, color in zip(LINES, ("tab:gray", "tab:blue", "tab:green")):
    each = _column(rows, line, "validation_loss")
    style = dict(color=color, linestyle="--" if line == "told" else "-")
    left.plot(steps, each.mean(0), label=LINES[line], **style)
    left.fill_between(steps, each.min(0), each.max(0), color=color, alpha=0.2)
  left.set(xlabel="step", ylabel="bits per byte", title="Validation loss")
  left.legend(frameon=False)
  colors = {"right": "tab:blue", "code page": "tab:red", "shifted": "tab:orange"}
  for kind, color in colors.items():
    found = [i for i, other in enumerate(kinds, 1) if other == kind]
    for i in found:
      label = f"targets: {kind}" if i == found[0] else None
      agreement = _column(rows, "gaf", f"agreement_{i}")[0]
      right.plot(steps, agreement, color=color, label=label)
  right.axhline(0, color="black", linewidth=0.5)
  right.set(xlabel="step", ylabel="cosine", title="Agreement of each source (seed 0)")
  right.legend(frameon=False)
  figure.savefig(path, dpi=120)


def _column(rows, line, name):
  """Values `[seeds, evaluations]` of one line."""
  values = [row[name] for row in rows if row["line"] == line]
  return np.reshape(values, (rows[-1]["seed"] + 1, -1))


class Parser(argparse.ArgumentParser):
  def error(self, message):
    self.exit(2, f"{self.prog}: {message}\n")


def count(text):
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
  return int(text)


def threshold(text):
  try:
    if text == "adaptive" or 0 <= float(text) <= 2:
      return text if text == "adaptive" else float(text)
  except ValueError:
    pass
  message = f"expected 'adaptive' or a number from 0 to 2, got {text!r}"
  raise argparse.ArgumentTypeError(message)


def main(argv=None):
  parser = Parser(prog="train.py", description=__doc__.split("\n")[0])
  add = parser.add_argument
  add("--steps", type=count, default=200, help="of each run; default: 200")
  add("--seeds", type=count, default=3, help="number of seeds; default: 3")
  add("--tau", type=threshold, default="adaptive", help="0 to 2; default: adaptive")
  wrong = f"of {NUM_SOURCES}; the majority has to be right; default: 3"
  add("--wrong-sources", type=int, choices=range(4), default=3, help=wrong)
  add("--out", type=pathlib.Path, default="runs/byte_lm", help="default: runs/byte_lm")
  add("--resume", action="store_true", help="continue the run in --out")
  add("--quick", action="store_true", help="50 steps and one seed")
  args = parser.parse_args(argv)
  if args.quick:
    args.steps, args.seeds = 50, 1
  try:
    text = load_text()
    prepare(args)
  except (OSError, ValueError) as error:
    parser.error(str(error))
  rows = []

  def log(new):
    rows.extend(new)
    with open(args.out / "metrics.csv", "w", newline="") as file:
      writer = csv.DictWriter(file, rows[0])
      writer.writeheader()
      writer.writerows(rows)

  states = {}
  try:
    with tqdm(total=args.steps * args.seeds * len(LINES), unit="step") as progress:
      for seed in range(args.seeds):
        for line in LINES:
          states[line, seed] = run(args, text, line, seed, progress, log)
  except KeyboardInterrupt:
    print("train.py: stopped; --resume continues it", file=sys.stderr)
    return 130
  kinds = draw_kinds(0, args.wrong_sources)
  result = f"""Validation loss after {args.steps} steps (number of seeds: {args.seeds})
{losses_table(rows)}

Sources after the run of GAF with seed 0
{sources_table(states["gaf", 0], kinds)}
"""
  (args.out / "results.txt").write_text(result, encoding="utf-8")
  plot(rows, kinds, args.out / "plot.png")
  print(f"\n{result}\nWrote metrics.csv, results.txt and plot.png to {args.out}.")
  return 0


def prepare(args):
  """Creates `--out`, or checks that the run in it has the same options."""
  names = ("steps", "seeds", "tau", "wrong_sources")
  options = {name: getattr(args, name) for name in names}
  options["python"] = platform.python_version()  # The text differs between versions.
  path = args.out / "options.json"
  if not args.resume:
    if path.exists():
      raise ValueError(f"{args.out} contains a run; use --resume or another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(options))
  elif not path.exists():
    raise ValueError(f"found no run to resume in {args.out}")
  elif (found := json.loads(path.read_text())) != options:
    raise ValueError(f"the run in {args.out} has other options: {found}, not {options}")


if __name__ == "__main__":
  sys.exit(main())
