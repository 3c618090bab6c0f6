"""Trains an image classifier with Gradient Agreement Filtering (arXiv 2412.18052).

Without options of the experiment it compares GAF with simple rivals on scikit-learn's
digits in about a minute: labels flipped, three of eight sources wrong, nothing wrong.
With options it trains one setting, such as the one in the paper's Table 1:

    python train.py --dataset cifar100 --model resnet18 --noise 0.4 --tau 0.97
"""

import contextlib
import dataclasses
import functools
import signal
import sys
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from jax.sharding import PartitionSpec as P

import data
import gaf_optax
import model as models
import results
import settings
from data import UserError


class State(NamedTuple):
  params: Any
  batch_stats: Any  # BatchNorm's running statistics; empty without BatchNorm
  opt_state: Any
  losses: jax.Array  # float32 [k], running mean of each microbatch's loss


@dataclasses.dataclass(frozen=True)
class Trainer:
  """One way to train; equal trainers share their compiled programs."""

  network: "Network"
  num_microbatches: int  # k
  learning_rate: float
  weight_decay: float
  tau: Any = 2.0  # At 2, every microbatch is accepted: the plain mean.
  rule: Any = None
  memory_decay: float | None = None
  last_layer: bool = False  # Compare the last layer's gradients only
  smallest_loss: bool = False  # A rival: keep the microbatches with the smallest loss
  augment: bool = False
  devices: int | None = None  # Number that share the microbatches, along "data"

  @property
  def tx(self) -> optax.GradientTransformationExtraArgs:
    """GAF, then the optimizer, which is skipped on steps without agreement."""
    optimizer = optax.chain(
      optax.add_decayed_weights(self.weight_decay),
      optax.sgd(self.learning_rate, momentum=0.9, nesterov=True),
    )
    if self.last_layer:  # `last_layer_step` filters.
      return gaf_optax.apply_if_nonzero(optimizer)
    return gaf_optax.apply_if_agreed(
      optimizer,
      self.tau,
      rule=self.rule,
      memory_decay=self.memory_decay,
      num_microbatches=self.num_microbatches,
      axis_name="data" if self.devices else None,
      stacked=True,
    )

  def loss_fn(self, params, batch_stats, images, labels):
    variables = {"params": params, "batch_stats": batch_stats}
    mutable = ["batch_stats"]
    logits, new = self.network.model.apply(
      variables, images, train=True, mutable=mutable
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), new.get("batch_stats", {})

  def train_step(self, state: State, images, labels, weights):
    """Takes one step with the micro-gradients that agree.

    Args:
      state: of one seed.
      images: float32 `[k, rows, height, width, channels]`, k microbatches.
      labels: int32 `[k, rows]`.
      weights: float32 `[k]`, how much each microbatch counts: 1 except in controls.
    """
    params, mean = state.params, lambda x: x.mean(axis=0)
    if self.devices:  # Each device differentiates its own loss, not the sum of all.
      params = jax.lax.pcast(params, "data", to="varying")
      mean = lambda x: jax.lax.pmean(x.mean(axis=0), "data")
    grad_fn = jax.value_and_grad(self.loss_fn, has_aux=True)
    grad_fn = jax.vmap(grad_fn, in_axes=(None, None, 0, 0))
    (losses, stats), micro_grads = grad_fn(params, state.batch_stats, images, labels)
    updates, opt_state = self.tx.update(
      micro_grads, state.opt_state, state.params, microbatch_weights=weights
    )
    params = optax.apply_updates(state.params, updates)
    state = State(params, jax.tree.map(mean, stats), opt_state, state.losses)
    return state, {"loss": mean(losses), **gaf_optax.metrics(opt_state)}

  def last_layer_step(self, state: State, images, labels, weights):
    """Likewise, comparing the last layer alone: affordable for single examples."""
    args = state.params, state.batch_stats
    if self.tau == 2:  # There is nothing to compare.

      def weighted_loss(*args):
        losses, stats = jax.vmap(self.loss_fn, (None, None, 0, 0))(*args)
        return weights @ losses / jnp.maximum(weights.sum(), 1), (losses.mean(), stats)

      grad_fn = jax.value_and_grad(weighted_loss, has_aux=True)
      (_, (loss, stats)), grads = grad_fn(*args, images, labels)
      num_accepted, distance = weights.sum(), -1.0
    else:  # Row i of the batch belongs to microbatch i modulo k.
      rows = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
      found = self.filtered_grad(*args, rows(images), rows(labels))
      (loss, stats), grads, agreement = found
      num_accepted, distance = agreement.num_accepted, agreement.distances.mean()
    updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    stats = jax.tree.map(lambda x: x.mean(axis=0), stats)
    found = dict(loss=loss, num_accepted=num_accepted, agreed=num_accepted > 0)
    found["mean_distance"] = distance
    return State(params, stats, opt_state, state.losses), found

  @property
  def filtered_grad(self):
    return gaf_optax.value_and_grad(
      self.loss_fn,
      self.num_microbatches,
      self.tau,
      rule=self.rule,
      memory_decay=self.memory_decay,
      batch_argnums=(2, 3),
      has_aux=True,
      compare=lambda path, leaf: path[0].key == "head",
    )

  def smallest_losses(self, state, images, labels, weights):
    """Weights of the `sum(weights)` microbatches with the smallest losses.

    Microbatches of one example change in each step. Otherwise the i-th comes from the
    i-th source, so the running mean of its losses decides.
    """
    losses, _ = jax.vmap(self.loss_fn, (None, None, 0, 0))(
      state.params, state.batch_stats, images, labels
    )
    if not self.last_layer:
      losses = 0.98 * state.losses + 0.02 * losses
    kept = jnp.argsort(jnp.argsort(losses)) < weights.sum()
    return state._replace(losses=losses), kept.astype(jnp.float32)

  @functools.partial(jax.jit, static_argnums=0)
  def step(self, state, train_images, step, seeds, indices, labels, weights):
    """One step of all seeds; the arrays are `[seeds, k, ...]`."""
    images = train_images[indices]
    if self.augment:
      images = jax.vmap(models.augmented, (0, None, 0))(seeds, step, images)

    def take(state, *batch):
      if self.smallest_loss:
        state, weights = self.smallest_losses(state, *batch)
        batch = (*batch[:2], weights)
      one = self.last_layer_step if self.last_layer else self.train_step
      state, found = one(state, *batch)
      return state, {name: found[name] for name in STEP_METRICS}

    take_all = jax.vmap(take)
    if self.devices:  # jax 0.8 cannot vmap collectives, so one seed at a time.
      in_turn = lambda *args: jax.lax.map(lambda one: take(*one), args)
      auto = (jax.sharding.AxisType.Auto,)
      devices = jax.devices()[: self.devices]
      mesh = jax.make_mesh((self.devices,), ("data",), auto, devices=devices)
      specs = (P(), *[P(None, "data")] * 3)
      take_all = jax.shard_map(in_turn, mesh=mesh, in_specs=specs, out_specs=P())
    return take_all(state, self.network.inputs(images), labels, weights)

  def init(self, seeds, images) -> State:
    """The state of all seeds before the first step."""
    params, batch_stats = self.network.init(seeds, self.network.inputs(images))
    losses = jnp.zeros((len(seeds), self.num_microbatches))
    return State(params, batch_stats, jax.vmap(self.tx.init)(params), losses)


@dataclasses.dataclass(frozen=True)
class Network:
  """A model for images of a dataset, and what all ways to train it share."""

  model: nn.Module
  scaling: tuple  # Scale, mean and std, which normalize an image

  def inputs(self, images):
    scale, mean, std = self.scaling
    return (images.astype(jnp.float32) / scale - jnp.array(mean)) / jnp.array(std)

  @functools.partial(jax.jit, static_argnums=0)
  def init(self, seeds, images):
    """Parameters and BatchNorm's statistics of all seeds."""
    init = lambda seed: self.model.init(jax.random.key(seed), images, train=False)
    variables = jax.vmap(init)(seeds)
    return variables["params"], variables.get("batch_stats", {})

  @functools.partial(jax.jit, static_argnums=0)
  def measure(self, params, batch_stats, images, labels):
    """Correct predictions and summed losses `[seeds]`."""

    def count(params, batch_stats):
      variables = {"params": params, "batch_stats": batch_stats}
      logits = self.model.apply(variables, self.inputs(images), train=False)
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return jnp.sum(logits.argmax(axis=-1) == labels), losses.sum()

    return jax.vmap(count)(params, batch_stats)


STEP_METRICS = ("loss", "num_accepted", "agreed", "mean_distance")
# Number of first steps with all microbatches, since losses are random at first.
WARM_UP = 100


def make_trainer(part, method: str, dataset: data.Dataset) -> Trainer:
  """The trainer of one of `settings.METHODS`."""
  stem = {} if part.model == "mlp" else {"small_stem": part.small_stem}
  model = models.make(part.model, dataset.num_classes, part.width, **stem)
  filtering, rule = {}, getattr(gaf_optax.rules, part.rule)
  if method == "GAF":
    rule = rule(5) if part.rule == "nearest_neighbors" else rule()
    filtering = dict(tau=part.tau, rule=rule, memory_decay=part.memory_decay)
  trainer = Trainer(
    Network(model, (dataset.scale, dataset.mean, dataset.std)),
    part.num_microbatches,
    part.learning_rate,
    part.weight_decay,
    last_layer=part.last_layer,
    smallest_loss="loss" in method,
    augment=part.augment,
    devices=part.devices,
    **filtering,
  )
  try:
    _ = trainer.tx, part.last_layer and trainer.filtered_grad
  except ValueError as error:  # It says which options do not go together.
    raise UserError(str(error)) from error
  return trainer


def as_many_at_random(kept, seed, step, k):
  """Weights bool `[k]` that keep as many microbatches as GAF did in `kept` `[steps]`.

  The numbers of each 50 steps are used in random order. With two microbatches GAF keeps
  both or none, so this skips other steps.
  """
  start, place = step - step % 50, step % 50
  numbers = np.random.default_rng((seed, 3, start)).permutation(
    kept[start : start + 50]
  )
  return np.random.default_rng((seed, 4, step)).permutation(k) < numbers[place]


def train(run, line, part, method, dataset, kept, bar) -> None:
  """Trains all seeds by one method, and fills `kept` if that is GAF.

  Args:
    run: a `results.Run`.
    line: number of part and method in the order of training; their steps before it;
      whether it is the last.
    kept: float32 `[steps, seeds]`, how many microbatches GAF kept.
  """
  line, before, last = line
  trainer, k = make_trainer(part, method, dataset), part.num_microbatches
  seeds, images = np.arange(part.seeds), jnp.asarray(dataset.train_images)
  state, begin = trainer.init(seeds, images[:1]), 0
  if run.resumed_from is not None and run.progress["line"] == line:
    begin, restored = run.progress["step"], run.restore({"state": state, "kept": kept})
    state, kept[:] = restored["state"], restored["kept"]
    bar.update(begin)
  for start in range(begin, part.steps, part.eval_every):
    stop, found = min(part.steps, start + part.eval_every), []
    for step in range(start, stop):
      indices, labels = map(np.stack, zip(*(of_seed(step) for of_seed in part.batches)))
      weights = np.ones((part.seeds, k), np.float32)
      if "chance" in method or ("loss" in method and step >= WARM_UP):
        every = [as_many_at_random(kept[:, seed], seed, step, k) for seed in seeds]
        weights = np.stack(every).astype(np.float32)
      batch = indices, labels, weights
      state, metrics = trainer.step(state, images, np.int32(step), seeds, *batch)
      found.append(metrics)
      bar.update()
    found = {name: np.stack([one[name] for one in found]) for name in STEP_METRICS}
    if method == "GAF":
      kept[start:stop] = found["num_accepted"]
    measured = evaluate(trainer, state, dataset)
    measured["train_loss"] = found["loss"].mean(axis=0)
    measured["kept"] = found["num_accepted"].mean(axis=0) / k
    measured["skipped_steps"] = np.sum(found["agreed"] == 0, axis=0)
    measured["cosine_distance"] = found["mean_distance"].mean(axis=0)
    same = dict(part=part.title, method=method, step=stop)
    values = [{n: float(x[seed]) for n, x in measured.items()} for seed in seeds]
    run.log([{**same, "seed": seed, **row} for seed, row in enumerate(values)])
    arrays, now = {"state": state, "kept": kept}, last and stop == part.steps
    run.save(before + stop, arrays, now, line=line, step=stop)


def evaluate(trainer, state, dataset) -> dict:
  """Test loss and accuracy `[seeds]`, in batches of 1,000."""
  images, labels = dataset.test_images, dataset.test_labels
  parts = [slice(i, i + 1000) for i in range(0, len(labels), 1000)]
  measure = functools.partial(trainer.network.measure, state.params, state.batch_stats)
  correct, losses = zip(*(measure(images[rows], labels[rows]) for rows in parts))
  return {
    "test_loss": sum(map(np.asarray, losses)) / len(labels),
    "test_accuracy": sum(map(np.asarray, correct)) / len(labels),
  }


def run_all(options) -> None:
  parts = settings.parts(options)
  first = parts[0]
  if first.devices:
    with contextlib.suppress(RuntimeError):  # JAX has been used before.
      jax.config.update("jax_num_cpu_devices", first.devices)
    if len(jax.devices()) < first.devices:
      raise UserError(f"--devices {first.devices}, but JAX has {len(jax.devices())}.")
  dataset, labels = data.load(first.dataset, options.data_dir, options.download), None
  for note in dataset.notes:
    print(f"train.py: note: {note}", file=sys.stderr)
  if file := first.noisy_labels:
    clean, key = dataset.train_labels, first.noisy_labels_key
    labels = data.noisy_labels(file, key, clean, dataset.num_classes)
  lines = [(part, method) for part in parts for method in part.methods]
  for part, method in lines:  # Report errors before anything is written.
    make_trainer(part, method, dataset)
    part.batches = [
      data.Batches(
        dataset,
        seed,
        (part.num_microbatches, part.microbatch_size),
        part.noise,
        labels,
        part.wrong_sources,
        part.balanced,
      )
      for seed in range(part.seeds)
    ]
  name, before = "main" if len(parts) > 1 else first.dataset, 0
  steps = sum(part.steps for part, _ in lines)
  with contextlib.ExitStack() as stack:
    run = stack.enter_context(contextlib.closing(results.Run(options, name)))
    bar = stack.enter_context(tqdm.tqdm(total=steps, disable=None))
    for number, (part, method) in enumerate(lines):
      if method == "GAF":
        kept = np.zeros((part.steps, part.seeds), np.float32)
      bar.set_description(f"{part.title}, {method}")
      if number < run.progress["line"]:
        bar.update(part.steps)
      else:
        line = number, before, number == len(lines) - 1
        train(run, line, part, method, dataset, kept, bar)
      before += part.steps
  said = results.report(run.rows, run.path)
  (run.path / "results.md").write_text(said + "\n", encoding="utf-8")
  print(said)


def main(argv=None) -> int:
  """Runs the command; returns its exit code."""
  options = settings.parse(argv)
  try:
    run_all(options)
  except UserError as error:
    print(f"train.py: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("train.py: interrupted; --resume continues.", file=sys.stderr)
    return 128 + signal.SIGINT
  return 0


if __name__ == "__main__":
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  sys.exit(main())
