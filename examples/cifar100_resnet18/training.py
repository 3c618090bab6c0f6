"""Training: one compiled stretch of steps, and the accuracy after it."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.metrics import roc_auc_score

import gaf_optax
import models
import optimizers
from batches import Batches, Schedule, cropped
from common import experiment
from common.arms import (
  PLAIN,
  RULES,
  Arm,
  Chosen,
  already_decided,
  or_nan,
  relative,
  rule_and_tau,
  smallest_loss,
)
from common.devices import AXIS
from data import Dataset
from plan import Part

_EVALUATION_BATCH = 500
# The label of what fills up a batch: never correct.
_NO_CLASS = -1
# Training images whose signals are looked at.
_NUM_TOLD_APART = 256
SIGNALS = ("distance", "loss", "gradient norm")
# Steps that all take part in before the smallest losses decide.
WARM_UP = 100
# Of the losses of sources, as of their cosines.
_MEMORY = 0.98
# The name of what gives the classes' outputs in every model.
_LAST_LAYER = "head"
# Steps after which a source with stale parameters takes up the newest.
_STALE_STEPS = 100


class Learner(NamedTuple):
  """What training changes."""

  params: Any  # Of the model
  batch_stats: Any  # BatchNorm's running statistics, empty without BatchNorm
  opt_state: Any  # Of the optimizer, with GAF's unless single examples are compared
  plateau: Any = None  # Of `optax.contrib.reduce_on_plateau`; None without it
  stale: Any = None  # Older parameters, where some sources have those; else None
  # Moving average of `(params, batch_stats)`, where that is tested
  average: Any = None
  # float32 `[k]`, running mean of the losses of each source, where those decide.
  source_losses: Any = None


class Trace(NamedTuple):
  """What happened at each step; arrays with the steps in front.

  k is the number of microbatches, or of examples where those are compared.
  """

  loss: Any  # Float32, the mean over all microbatches, accepted or not
  distance: Any  # Float32, mean cosine distance; NaN where nothing was compared
  # Float32, tau; the largest accepted distance where examples are compared, NaN where
  # none was.
  threshold: Any
  nonfinite: Any  # Int32, how many micro-gradients
  accepted: Any  # bool `[k]`
  weights: Any  # float32 `[k]`, of the micro-gradients in the mean; the largest is 1
  memory: Any  # float16 `[k, k]`, mean cosines of all steps; None without memory


class Trainer(experiment.Trainer):
  """Compiled training for the arms of one part, which share what they can."""

  def __init__(
    self, part: Part, dataset: Dataset, mesh: jax.sharding.Mesh | None = None
  ):
    """Args: `mesh` has the axis `devices.AXIS`; None for one device."""
    super().__init__()
    self._part, self._dataset, self._mesh = part, dataset, mesh
    self.longest = models.KINDS[part.model].longest
    self._model = models.make(part.model, dataset.num_classes, part.width, part.depth)
    # On a CPU, XLA's convolutions are several times slower inside a loop.
    convolves = models.KINDS[part.model].convolves
    self._looped = not (convolves and jax.default_backend() == "cpu")
    self._plateau = optax.contrib.reduce_on_plateau(
      factor=0.1, patience=part.plateau_patience
    )
    # Each device gets only the images of its own microbatches, step by step.
    self._images = None if mesh else jax.device_put(dataset.train_images)
    self._test_images = self._in_batches(dataset.test_images)
    self._test_labels = self._in_batches(dataset.test_labels, _NO_CLASS)
    self._validation_images = self._in_batches(dataset.validation_images)

  def init(self, arm: Arm, seed: int) -> Learner:
    """The learner before the first step; its weights depend on the seed alone."""
    params, batch_stats = self._cached(
      "init", lambda: jax.jit(self._init), np.int32(seed)
    )
    if arm.by_example:
      transformation = self._optimizer_by_example()
    else:
      transformation = self._transformation(arm, arm.tau, None)
    copied = lambda tree, wanted: jax.tree.map(jnp.copy, tree) if wanted else None
    plateau = source_losses = None
    if self._part.optimizer == optimizers.PLATEAU:
      plateau = self._plateau.init(params)
    if self._keeps_losses(arm):
      source_losses = jnp.zeros(self._part.num_microbatches)
    return Learner(
      params,
      batch_stats,
      transformation.init(params),
      plateau,
      copied(params, self._has_stale_sources),
      copied((params, batch_stats), arm.ema_decay is not None),
      source_losses,
    )

  def placed(self, learner: Learner) -> Learner:
    """The learner on all devices of the mesh, the same on each."""
    return learner if self._mesh is None else self._placed(learner, P())

  def empty_trace(self, part: Part, arm: Arm) -> Trace:
    """A trace of a part's steps, of all seeds, before the first."""
    shape, k = (part.seeds, part.steps), part.num_microbatches
    if arm.by_example:
      k *= part.microbatch_size
    nan = lambda: np.full(shape, np.nan, np.float32)
    accepted, weights = np.zeros((*shape, k), bool), np.zeros((*shape, k), np.float32)
    memory = None
    if arm.has_memory:
      memory = np.zeros((*shape, k, k), np.float16)
    nonfinite = np.zeros(shape, np.int32)
    return Trace(nan(), nan(), nan(), nonfinite, accepted, weights, memory)

  def row(self, trace: Trace, since: int) -> dict[str, Any]:
    """What a line of the metrics file says of the steps.

    Loss and distance are those of the steps since the line before, counts those of all.
    With a memory also the share of all steps in which each source was accepted.
    """
    distances = trace.distance[since:][np.isfinite(trace.distance[since:])]
    of_sources = {}
    if trace.memory is not None:
      of_sources = {
        f"source_{i + 1}/accept_rate": float(rate)
        for i, rate in enumerate(trace.accepted.mean(axis=0))
      }
    return {
      "train_loss": float(trace.loss[since:].mean()),
      "cosine_distance": float(distances.mean()) if len(distances) else float("nan"),
      "threshold": float(trace.threshold[-1]),
      "accept_rate": float(trace.accepted.mean()),
      "skipped_steps": int(np.sum(~trace.accepted.any(axis=1))),
      "nonfinite": int(trace.nonfinite.sum()),
    } | of_sources

  def advance(
    self, arm: Arm, learner: Learner, batches: Batches, chosen: Chosen | None = None
  ) -> tuple[Learner, Trace]:
    """Takes some steps; the buffers of `learner` are given away."""
    seen = batches, chosen
    if self._looped:
      return self._advance(arm, learner, seen)
    happened = []
    for i in range(len(batches.steps)):
      one = jax.tree.map(lambda x: x[i], seen)
      learner, step = self._advance(arm, learner, one)
      happened.append(step)
    return learner, jax.tree.map(lambda *steps: np.stack(steps), *happened)

  def _advance(self, arm, learner, seen):
    front = (None,) if self._looped else ()
    spread = P(*front, AXIS)
    specs = (Batches(P(), *[spread] * 5), P())
    tau = np.float32(arm.tau)
    if self._mesh is not None:
      tau = self._placed(tau, P())
      batches, chosen = seen
      images = self._own_images(batches.indices, spread)
      batches = Batches(*map(self._placed, batches[:5], specs[0][:5]), images)
      seen = batches, self._placed(chosen, P())

    def take(learner, tau, images, seen):
      take_one = self._step_by_example if arm.by_example else self._step
      step = functools.partial(take_one, arm, tau, images)
      return jax.lax.scan(step, learner, seen) if self._looped else step(learner, seen)

    return self._cached(
      ("advance", _decision(arm), seen[0].indices.shape),
      lambda: jax.jit(self._on_devices(take, (P(), P(), P(), specs)), donate_argnums=0),
      learner,
      tau,
      self._images,
      seen,
    )

  def evaluate(
    self, arm: Arm, learner: Learner, schedule: Schedule
  ) -> dict[str, float]:
    """Loss and accuracy on the test images, and on those held out, labels as given.

    Where training labels are wrong, on one device also how well three signals tell
    which: areas under ROC of distance, loss and gradient norm.
    """
    variables = learner.average or (learner.params, learner.batch_stats)
    accuracy, loss = self._measured(variables, self._test_images, self._test_labels)
    found = {"test_loss": loss, "test_accuracy": accuracy}
    if len(self._dataset.validation_images):
      labels = self._in_batches(schedule.validation_labels(arm.clean), _NO_CLASS)
      held_out = self._measured(variables, self._validation_images, labels)
      found["validation_accuracy"] = held_out[0]
    return found | self._told_apart(arm, learner, schedule)

  def _measured(self, variables, images, labels):
    """Share of the images that are classified as labelled, and the mean loss."""
    correct, loss, number = self._cached(
      ("evaluate", images.shape),
      lambda: jax.jit(self._on_devices(self._evaluated, (P(), P(AXIS), P(AXIS)))),
      variables,
      images,
      labels,
    )
    return int(correct) / int(number), float(loss) / int(number)

  def _told_apart(self, arm, learner, schedule):
    """Areas under ROC of mislabeled training examples by what a filter could see."""
    rows = np.arange(min(_NUM_TOLD_APART, len(schedule.labels)))
    wrong = schedule.mislabeled[rows]
    if arm.clean or self._mesh is not None or wrong.all() or not wrong.any():
      return {}

    def signals(params, stats, images, labels):
      x, targets = self._inputs(images[rows]), self._targets(PLAIN, labels)
      gradients = self._of_last_layer(params, x, targets, stats)
      rule, tau = RULES["nearest_neighbors"](), jnp.float32(2)
      valid = jnp.ones(len(rows), bool)
      distances = rule(gradients @ gradients.T, valid, tau).distances
      loss = lambda x, targets: self._loss(params, x[None], targets[None], stats)
      losses = jax.vmap(loss)(x, targets)
      # Of those that are alike rounding alone would make a ranking.
      distances = jnp.round(distances, 6)
      return distances, losses, jnp.linalg.norm(gradients, axis=1)

    found = self._cached(
      "signals",
      lambda: jax.jit(signals),
      learner.params,
      learner.batch_stats,
      self._images,
      schedule.labels[rows],
    )
    return {
      f"auc/{name}": float(roc_auc_score(wrong, np.nan_to_num(signal, nan=1)))
      for name, signal in zip(SIGNALS, found)
    }

  def observed(self, learner: Learner, measured: dict[str, float]) -> Learner:
    """The learner after an evaluation; on a plateau it goes on more slowly."""
    if learner.plateau is None:
      return learner
    loss = jnp.float32(measured["test_loss"])
    _, plateau = self._plateau.update({}, learner.plateau, value=loss)
    return learner._replace(plateau=plateau)

  def _in_batches(self, rows, fill=0):
    """Rows `[n, b, ...]` to evaluate in so many batches, shared by the devices."""
    shares = self._part.devices or 1
    size = max(1, min(_EVALUATION_BATCH, -(-len(rows) // shares)))
    missing = -len(rows) % (size * shares)
    padding = (0, missing), *[(0, 0)] * (rows.ndim - 1)
    rows = np.pad(rows, padding, constant_values=fill)
    rows = rows.reshape(-1, size, *rows.shape[1:])
    return jax.device_put(rows) if self._mesh is None else self._placed(rows, P(AXIS))

  def _on_devices(self, function, in_specs):
    """`function` on each device's part of its arguments; without a mesh as it is."""
    if self._mesh is None:
      return function
    return jax.shard_map(function, mesh=self._mesh, in_specs=in_specs, out_specs=P())

  def _placed(self, tree, spec):
    """Arrays that all processes have, on the devices of the mesh."""
    sharding = NamedSharding(self._mesh, spec)

    def place(x):
      x = np.asarray(x)
      return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree)

  def _own_images(self, indices, spec):
    """Images, on each device those of its microbatches alone."""
    images = self._dataset.train_images
    return jax.make_array_from_callback(
      (*indices.shape, *images.shape[1:]),
      NamedSharding(self._mesh, spec),
      lambda index: images[indices[index[: indices.ndim]]],
    )

  def _inputs(self, images):
    data = self._dataset
    shape = (1,) * (images.ndim - 1) + (-1,)
    x = images.astype(jnp.float32) / data.scale
    mean = jnp.array(data.mean, jnp.float32).reshape(shape)
    std = jnp.array(data.std, jnp.float32).reshape(shape)
    return (x - mean) / std

  def _transformation(self, arm, tau, chosen):
    part = self._part
    anchor_decay, memory_decay = arm.anchor_decay, arm.memory_decay
    rule, tau = rule_and_tau(arm, tau)
    if not arm.decides_itself:
      rule, anchor_decay, memory_decay = already_decided(chosen), None, None
      tau = 2.0
    elif arm.imitates is not None:
      rule = _shuffled(rule)
    return gaf_optax.apply_if_agreed(
      self._optimizer(),
      tau,
      rule=rule,
      anchor_decay=anchor_decay,
      memory_decay=memory_decay,
      groups="leaf" if arm.by_leaf and arm.decides_itself else None,
      num_microbatches=part.num_microbatches,
      axis_name=None if self._mesh is None else AXIS,
      stacked=True,
    )

  def _optimizer(self):
    part = self._part
    return optimizers.make(part.optimizer, part.learning_rate, part.weight_decay)

  def _optimizer_by_example(self):
    """One that takes `agreed`, and does nothing where that is False."""
    return optax.conditionally_transform(
      self._optimizer(), lambda step, agreed: agreed, forward_extra_args=True
    )

  def _init(self, seed):
    x = self._inputs(jnp.zeros((1, *self._dataset.train_images.shape[1:]), jnp.uint8))
    variables = self._model.init(jax.random.key(seed), x, train=False)
    return variables["params"], variables.get("batch_stats", {})

  def _keeps_losses(self, arm):
    return arm.control == "loss" and self._part.persistent and not arm.by_example

  @property
  def _has_stale_sources(self):
    return bool(self._part.wrong_sources) and self._part.wrong_kind == "stale"

  def _step(self, arm, tau, images, learner, seen):
    batch, chosen = seen

    def loss(params, batch_stats, x, targets):
      logits, updated = self._model.apply(
        {"params": params, "batch_stats": batch_stats},
        x,
        train=True,
        mutable=["batch_stats"],
      )
      losses = optax.softmax_cross_entropy(logits, targets)
      return jnp.mean(losses), updated.get("batch_stats", {})

    x, targets = self._seen(batch, images), self._targets(arm, batch.labels)
    if arm.mixup:
      x, targets = jax.vmap(_mixed, (None, 0, 0))(batch.steps, x, targets)
    params, params_axis, stale = self._local_params(learner, batch)
    micro_gradients = jax.vmap(
      jax.value_and_grad(loss, has_aux=True), in_axes=(params_axis, None, 0, 0)
    )
    found = micro_gradients(params, learner.batch_stats, x, targets)
    (losses, stats), grads = found
    source_losses = learner.source_losses
    if arm.control == "loss":
      deciding = losses
      if source_losses is not None:
        deciding = source_losses = _MEMORY * source_losses + (1 - _MEMORY) * losses
      number = jnp.sum(chosen.accepted)
      chosen = smallest_loss(deciding, number, batch.steps < WARM_UP)
    transformation = self._transformation(arm, tau, chosen)
    updates, opt_state = transformation.update(grads, learner.opt_state, learner.params)
    if learner.plateau is not None:
      updates = optax.tree.scale(learner.plateau.scale, updates)
    state = opt_state.gaf_state
    memory = None
    if arm.has_memory:
      memory = jnp.mean(state.memory.mean, axis=0).astype(jnp.float16)
    trace = Trace(
      loss=self._mean(losses),
      distance=or_nan(state.mean_distance),
      threshold=state.threshold,
      nonfinite=state.nonfinite - learner.opt_state.gaf_state.nonfinite,
      accepted=state.accepted,
      weights=relative(state.weights),
      memory=memory,
    )
    params = optax.apply_updates(learner.params, updates)
    stats = jax.tree.map(self._mean, stats)
    learner = Learner(
      params,
      stats,
      opt_state,
      learner.plateau,
      stale,
      _averaged(arm, batch.steps, learner.average, (params, stats)),
      source_losses,
    )
    return learner, trace

  def _step_by_example(self, arm, tau, images, learner, seen):
    """A step in which single examples are compared, by the last layer."""
    batch, chosen = seen
    alone = lambda x: x.reshape(-1, *x.shape[2:])
    x, y = alone(self._seen(batch, images)), alone(batch.labels)
    params, targets = learner.params, self._targets(arm, y)
    if arm.decides_itself:
      rule, tau = rule_and_tau(arm, tau)
      differentiate = gaf_optax.value_and_grad(
        self._loss, len(y), tau, rule=rule, compare=_in_last_layer
      )
      loss, grads, found = differentiate(params, x, targets)
      agreed, accepted, weights = found.agreed, found.accepted, found.weights
      distances, nonfinite = or_nan(found.distances), found.nonfinite
    else:
      losses = jax.vmap(self._loss, (None, 0, 0))(params, x[:, None], targets[:, None])
      kept = chosen
      if arm.control == "loss":
        number = jnp.sum(chosen.accepted)
        kept = smallest_loss(losses, number, batch.steps < WARM_UP)
      weights = kept.weights / jnp.maximum(jnp.sum(kept.weights), 1e-30)
      loss, accepted = jnp.mean(losses), kept.accepted
      agreed, nonfinite = jnp.any(accepted), jnp.int32(0)
      distances = jnp.full(len(y), jnp.nan)
    if arm.mixup or not arm.decides_itself:
      # A label's weight goes with it into a mixture: the loss is linear in targets.
      seen = x, len(y) * weights[:, None] * targets
      seen = _mixed(batch.steps, *seen) if arm.mixup else seen
      grads = jax.grad(self._loss)(params, *seen)
    updates, opt_state = self._optimizer_by_example().update(
      grads, learner.opt_state, params, agreed=agreed
    )
    trace = Trace(
      loss=loss,
      distance=jnp.nanmean(distances),
      threshold=jnp.nanmax(jnp.where(accepted, distances, jnp.nan)),
      nonfinite=nonfinite,
      accepted=accepted,
      weights=relative(weights),
      memory=None,
    )
    params = optax.apply_updates(params, updates)
    average = _averaged(
      arm, batch.steps, learner.average, (params, learner.batch_stats)
    )
    learner = learner._replace(params=params, opt_state=opt_state, average=average)
    return learner, trace

  def _targets(self, arm, labels):
    """What labels `[...]` say of each class, `[..., c]`."""
    number = self._dataset.num_classes
    return optax.smooth_labels(jax.nn.one_hot(labels, number), arm.smoothing)

  def _loss(self, params, x, targets, stats=None):
    """The mean loss, by BatchNorm's running statistics; targets may be weighted."""
    variables = {"params": params, "batch_stats": stats or {}}
    logits = self._model.apply(variables, x, train=False)
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))

  def _of_last_layer(self, params, x, targets, stats=None):
    """Gradients `[b, P]` of single examples with respect to the last layer."""

    def gradient(x, targets):
      loss = lambda params: self._loss(params, x[None], targets[None], stats)
      grads = jax.grad(loss)(params)[_LAST_LAYER]
      return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grads)])

    return jax.vmap(gradient)(x, targets)

  def cosines(self, learner: Learner, batches: Batches) -> np.ndarray:
    """The cosines `[B, B]` of the examples' last-layer gradients in the first step.

    For a model without BatchNorm.
    """
    alone = lambda x: x[0].reshape(-1, *x.shape[3:])
    x = self._inputs(self._images[alone(batches.indices)])

    def cosines(*seen):
      rows = self._of_last_layer(*seen)
      rows /= jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
      return rows @ rows.T

    seen = learner.params, x, self._targets(PLAIN, alone(batches.labels))
    return np.asarray(self._cached("cosines", lambda: jax.jit(cosines), *seen))

  def _seen(self, batch, images):
    """Network inputs `[k, b, ...]`, those of wrong sources with what is wrong."""
    raw = batch.images if images is None else images[batch.indices]
    if batch.crops is not None:
      raw = cropped(raw, batch.crops)
    x = self._inputs(raw)
    kind = self._part.wrong_kind
    if self._part.wrong_sources and kind in ("pixels", "normalization"):
      bad = raw.astype(jnp.float32)
      if kind == "pixels":
        height, width = x.shape[-3:-1]
        order = np.random.default_rng(0).permutation(height * width)
        flat = x.reshape(*x.shape[:2], height * width, -1)
        bad = flat[:, :, order].reshape(x.shape)
      x = jnp.where(batch.wrong[:, None, None, None, None], bad, x)
    return x

  def _local_params(self, learner, batch):
    """Parameters to differentiate at, their axis of microbatches, and stale ones."""
    params, stale = learner.params, learner.stale
    if self._mesh is not None:
      # So that a gradient is that of this device's microbatch, not of all.
      params = jax.lax.pcast(params, AXIS, to="varying")
    if stale is None:
      return params, None, None
    renewed = batch.steps % _STALE_STEPS == 0
    stale = jax.tree.map(
      lambda new, old: jnp.where(renewed, new, old), learner.params, stale
    )
    local = lambda new, old: jnp.where(
      batch.wrong.reshape(-1, *(1,) * new.ndim), old[None], new[None]
    )
    return jax.tree.map(local, params, stale), 0, stale

  def _mean(self, x):
    """Over all microbatches, which are in front."""
    x = jnp.mean(x, axis=0)
    return x if self._mesh is None else jax.lax.pmean(x, AXIS)

  def _evaluated(self, variables, images, labels):
    params, batch_stats = variables

    def count(x, y):
      logits = self._model.apply(
        {"params": params, "batch_stats": batch_stats}, self._inputs(x), train=False
      )
      losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, jnp.maximum(y, 0)
      )
      correct, counts = jnp.argmax(logits, axis=-1) == y, y > _NO_CLASS
      return jnp.sum(correct), jnp.sum(jnp.where(counts, losses, 0)), jnp.sum(counts)

    if self._looped:
      counts = jax.lax.map(lambda batch: count(*batch), (images, labels))
    else:
      counts = jax.tree.map(
        lambda *x: jnp.stack(x), *(count(*b) for b in zip(images, labels))
      )
    total = jax.tree.map(jnp.sum, counts)
    return total if self._mesh is None else jax.lax.psum(total, AXIS)


def _decision(arm):
  """What of an arm is compiled in; a plain tau is an argument of the program."""
  ways = arm.smoothing, arm.mixup, arm.ema_decay
  if not arm.decides_itself:
    return "imitates", arm.by_example, arm.control == "loss", *ways
  varying = dict(name="", label="", tau=2.0, imitates=None, control=None, clean=False)
  return dataclasses.replace(arm, **varying), arm.imitates is not None


def _mixed(step, x, targets):
  """Each of a batch `[b, ...]` mixed with the one before it: mixup with alpha 1.

  Source: arXiv 1710.09412.
  """
  share = jax.random.uniform(jax.random.fold_in(jax.random.key(0), step))
  mix = lambda a: share * a + (1 - share) * jnp.roll(a, 1, axis=0)
  return mix(x), mix(targets)


def _averaged(arm, step, average, variables):
  """The moving average of parameters and statistics, at first a shorter one."""
  if average is None:
    return None
  decay = jnp.minimum(arm.ema_decay, (1 + step) / (10 + step))
  return optax.incremental_update(variables, average, 1 - decay)


def _in_last_layer(path, leaf):
  del leaf
  return path[0].key == _LAST_LAYER


def _shuffled(rule):
  """A rule that keeps as many micro-gradients as another one, drawn at random."""

  def shuffled(gram, valid, tau):
    decision = rule(gram, valid, tau)
    # The Gram matrix's own digits: other ones in each step, leaf and seed.
    digits = jax.lax.bitcast_convert_type(jnp.sum(gram).astype(jnp.float32), jnp.int32)
    order = jax.random.permutation(
      jax.random.fold_in(jax.random.key(0), digits), len(valid)
    )
    return decision._replace(
      weights=decision.weights[order], accepted=decision.accepted[order]
    )

  return shuffled
