"""Compiled steps of the image experiments, and the accuracy after them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.metrics import roc_auc_score

import gaf_optax
import report
import runs
from arms import (
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
from schedule import Batches, Schedule
from shared import Images, make_model

# Number of steps that keep all before the smallest losses decide.
WARM_UP = 100
# Number of training images whose signals are compared with their labels.
_NUM_TOLD_APART = 256
_EVALUATION_BATCH = 500
# Label of padding: never correct.
_NO_CLASS = -1
# Decay of the sources' running losses; their cosines have the same decay.
_MEMORY = 0.98
_LAST_LAYER = "head"
# A source with stale parameters copies the newest ones after this many steps.
_STALE_STEPS = 100

_momentum = functools.partial(optax.sgd, momentum=0.9)
_nesterov = functools.partial(_momentum, nesterov=True)
OPTIMIZERS = {
  "sgd": optax.sgd,
  "momentum": _momentum,
  "nesterov": _nesterov,
  # Divides the learning rate by ten where the test loss no longer falls.
  "nesterov-plateau": _nesterov,
  "adam": optax.adam,
  "adamw": functools.partial(optax.adamw, weight_decay=0.01),
  "rmsprop": functools.partial(optax.rmsprop, decay=0.99),
}
_PLATEAU = optax.contrib.reduce_on_plateau(factor=0.1, patience=10)


class Learner(NamedTuple):
  """State of training."""

  params: Any
  batch_stats: Any  # BatchNorm's running statistics, empty without BatchNorm
  opt_state: Any  # With GAF's state, unless single examples are compared
  plateau: Any  # State of `_PLATEAU`, or None
  stale: Any  # Older parameters, where some sources have those, or None
  average: Any  # Moving average of `(params, batch_stats)`, or None
  source_losses: Any  # float32 `[k]`, running losses if an arm chooses by them, or None


class Trace(NamedTuple):
  """Record of the steps, which are the first axis.

  k is the number of microbatches, or of examples if those are compared.
  """

  loss: Any  # float32, mean over all microbatches, accepted or not
  distance: Any  # float32, mean cosine distance; NaN where nothing was compared
  accepted: Any  # bool `[k]`
  weights: Any  # float32 `[k]` in the mean, divided by the largest


class Trainer(runs.Trainer):
  """Compiled training, which the arms of a part share."""

  def __init__(self, part: Any, images: Images):
    super().__init__()
    self._part, self._data = part, images
    self._model = make_model(part.model, images.num_classes, part.width)
    # On CPU, XLA's convolutions are several times slower inside a loop.
    self._looped = part.model != "resnet18" or jax.default_backend() != "cpu"
    self._images = jax.device_put(images.train)
    self._test = _in_batches(images.test), _in_batches(images.test_labels, _NO_CLASS)
    self._validation = _in_batches(images.validation)

  def init(self, arm: Arm, seed: int) -> Learner:
    """The learner before the first step; its weights depend on the seed alone."""
    part = self._part
    params, batch_stats = self.cached("init", self._init, np.int32(seed))
    copied = lambda tree, wanted: jax.tree.map(jnp.copy, tree) if wanted else None
    if arm.by_example:
      transformation = self._optimizer_by_example()
    else:
      transformation = self._transformation(arm, arm.tau, None)
    sums = arm.control == "loss" and part.persistent and not arm.by_example
    return Learner(
      params,
      batch_stats,
      transformation.init(params),
      _PLATEAU.init(params) if part.optimizer == "nesterov-plateau" else None,
      copied(params, part.wrong_sources and part.wrong_kind == "stale"),
      copied((params, batch_stats), arm.ema_decay is not None),
      jnp.zeros(part.num_microbatches) if sums else None,
    )

  def advance(
    self, arm: Arm, learner: Learner, batches: Batches, chosen: Chosen | None
  ) -> tuple[Learner, Trace]:
    """Takes some steps; the buffers of `learner` are given away."""
    take_one = self._step_by_example if arm.by_example else self._step
    seen = batches, chosen

    def take(learner, tau, images, seen):
      step = functools.partial(take_one, arm, tau, images)
      return jax.lax.scan(step, learner, seen) if self._looped else step(learner, seen)

    key = "advance", arm.compiled(), batches.indices.shape
    run = lambda *args: self.cached(key, take, *args, donate_argnums=0)
    tau = np.float32(arm.tau)
    if self._looped:
      return run(learner, tau, self._images, seen)
    happened = []
    for i in range(len(batches.steps)):
      one = jax.tree.map(lambda x: x[i], seen)
      learner, trace = run(learner, tau, self._images, one)
      happened.append(trace)
    return learner, jax.tree.map(lambda *steps: np.stack(steps), *happened)

  def evaluate(
    self, arm: Arm, learner: Learner, schedule: Schedule
  ) -> tuple[Learner, dict[str, float]]:
    """Accuracy on the test images and, by noisy labels, on the held-out images.

    With wrong training labels, also areas under ROC for finding them by distance, loss
    and gradient norm. On a plateau, lowers the learning rate.
    """
    variables = learner.average or (learner.params, learner.batch_stats)
    accuracy, loss = self._measured(variables, *self._test)
    labels = _in_batches(schedule.validation_labels(arm.clean), _NO_CLASS)
    validation, _ = self._measured(variables, self._validation, labels)
    found = {"test_accuracy": accuracy, "validation_accuracy": validation}
    if learner.plateau is not None:
      loss = jnp.float32(loss)
      _, plateau = _PLATEAU.update({}, learner.plateau, value=loss)
      learner = learner._replace(plateau=plateau)
    return learner, found | self._told_apart(arm, learner, schedule)

  def _measured(self, variables, images, labels):
    """Share of the images that are classified as labelled, and the mean loss."""
    key = "evaluate", images.shape
    correct, loss, number = self.cached(key, self._evaluated, variables, images, labels)
    return int(correct) / int(number), float(loss) / int(number)

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
    return jax.tree.map(jnp.sum, counts)

  def _told_apart(self, arm, learner, schedule):
    rows = np.arange(min(_NUM_TOLD_APART, len(schedule.labels)))
    wrong = schedule.mislabeled[rows]
    if arm.name != PLAIN.name or wrong.all() or not wrong.any():
      return {}

    def signals(params, stats, images, labels):
      x, targets = self._inputs(images[rows]), self._targets(PLAIN, labels)
      gradients = self._of_last_layer(params, x, targets, stats)
      valid = jnp.ones(len(rows), bool)
      rule = RULES["nearest_neighbors"]()
      distances = rule(gradients @ gradients.T, valid, jnp.float32(2)).distances
      loss = lambda x, targets: self._loss(params, x[None], targets[None], stats)
      # Rounded, so that rounding errors do not rank equal ones.
      distances = jnp.round(distances, 6)
      return distances, jax.vmap(loss)(x, targets), jnp.linalg.norm(gradients, axis=1)

    seen = learner.params, learner.batch_stats, self._images, schedule.labels[rows]
    found = self.cached("signals", signals, *seen)
    return {
      name: float(roc_auc_score(wrong, np.nan_to_num(signal, nan=1)))
      for name, signal in zip(report.SIGNALS, found)
    }

  def _init(self, seed):
    x = self._inputs(jnp.zeros((1, *self._data.train.shape[1:]), jnp.uint8))
    variables = self._model.init(jax.random.key(seed), x, train=False)
    return variables["params"], variables.get("batch_stats", {})

  def _inputs(self, images):
    shape = (1,) * (images.ndim - 1) + (-1,)
    mean, std = (
      jnp.array(x, jnp.float32).reshape(shape)
      for x in (self._data.mean, self._data.std)
    )
    return (images.astype(jnp.float32) / self._data.scale - mean) / std

  def _targets(self, arm, labels):
    """Distributions `[..., c]` over the classes of labels `[...]`."""
    number = self._data.num_classes
    return optax.smooth_labels(jax.nn.one_hot(labels, number), arm.smoothing)

  def _optimizer(self):
    return OPTIMIZERS[self._part.optimizer](self._part.learning_rate)

  def _optimizer_by_example(self):
    """An optimizer that takes `agreed`, and does nothing where that is False."""
    return optax.conditionally_transform(
      self._optimizer(), lambda step, agreed: agreed, forward_extra_args=True
    )

  def _transformation(self, arm, tau, chosen):
    if arm.imitates is not None:
      rule, tau = already_decided(chosen), 2.0
    else:
      rule, tau = rule_and_tau(arm, tau)
    return gaf_optax.apply_if_agreed(
      self._optimizer(),
      tau,
      rule=rule,
      memory_decay=arm.memory_decay if arm.has_memory else None,
      num_microbatches=self._part.num_microbatches,
    )

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
    params, axis, stale = _with_stale(learner, batch)
    micro_gradients = jax.vmap(
      jax.value_and_grad(loss, has_aux=True), in_axes=(axis, None, 0, 0)
    )
    (losses, stats), grads = micro_gradients(params, learner.batch_stats, x, targets)
    source_losses = learner.source_losses
    if arm.control == "loss":
      deciding = losses
      if source_losses is not None:
        deciding = source_losses = _MEMORY * source_losses + (1 - _MEMORY) * losses
      number = jnp.sum(chosen.accepted)
      chosen = smallest_loss(deciding, number, batch.steps < WARM_UP)
    updates, opt_state = self._transformation(arm, tau, chosen).update(
      grads, learner.opt_state, learner.params
    )
    if learner.plateau is not None:
      updates = optax.tree.scale(learner.plateau.scale, updates)
    state = opt_state.gaf_state
    trace = Trace(
      jnp.mean(losses),
      or_nan(state.mean_distance),
      state.accepted,
      relative(state.weights),
    )
    params = optax.apply_updates(learner.params, updates)
    stats = jax.tree.map(lambda x: jnp.mean(x, axis=0), stats)
    learner = learner._replace(
      params=params,
      batch_stats=stats,
      opt_state=opt_state,
      stale=stale,
      average=_averaged(arm, batch.steps, learner.average, (params, stats)),
      source_losses=source_losses,
    )
    return learner, trace

  def _step_by_example(self, arm, tau, images, learner, seen):
    """A step that compares single examples by their gradients of the last layer."""
    batch, chosen = seen
    alone = lambda x: x.reshape(-1, *x.shape[2:])
    x, y = alone(self._seen(batch, images)), alone(batch.labels)
    params, targets = learner.params, self._targets(arm, y)
    if arm.imitates is None:
      rule, tau = rule_and_tau(arm, tau)
      differentiate = gaf_optax.value_and_grad(
        self._loss, len(y), tau, rule=rule, compare=_in_last_layer
      )
      loss, grads, found = differentiate(params, x, targets)
      agreed, accepted, weights = found.agreed, found.accepted, found.weights
      distance = jnp.nanmean(or_nan(found.distances))
    else:
      losses = jax.vmap(self._loss, (None, 0, 0))(params, x[:, None], targets[:, None])
      kept = chosen
      if arm.control == "loss":
        number = jnp.sum(chosen.accepted)
        kept = smallest_loss(losses, number, batch.steps < WARM_UP)
      weights = kept.weights / jnp.maximum(jnp.sum(kept.weights), 1e-30)
      loss, accepted = jnp.mean(losses), kept.accepted
      agreed, distance = jnp.any(accepted), jnp.float32(jnp.nan)
      # The loss is linear in targets, so these can carry the weights.
      grads = jax.grad(self._loss)(params, x, len(y) * weights[:, None] * targets)
    updates, opt_state = self._optimizer_by_example().update(
      grads, learner.opt_state, params, agreed=agreed
    )
    params = optax.apply_updates(params, updates)
    variables = params, learner.batch_stats
    learner = learner._replace(
      params=params,
      opt_state=opt_state,
      average=_averaged(arm, batch.steps, learner.average, variables),
    )
    return learner, Trace(loss, distance, accepted, relative(weights))

  def _loss(self, params, x, targets, stats=None):
    """The mean loss with BatchNorm's running statistics; targets may be weighted."""
    variables = {"params": params, "batch_stats": stats or {}}
    logits = self._model.apply(variables, x, train=False)
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))

  def _of_last_layer(self, params, x, targets, stats):
    """Gradients `[b, P]` of single examples with respect to the last layer."""

    def gradient(x, targets):
      loss = lambda params: self._loss(params, x[None], targets[None], stats)
      grads = jax.grad(loss)(params)[_LAST_LAYER]
      return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grads)])

    return jax.vmap(gradient)(x, targets)

  def _seen(self, batch, images):
    """Network inputs `[k, b, ...]`; wrong sources may scramble their pixels."""
    x = self._inputs(images[batch.indices])
    if self._part.wrong_sources and self._part.wrong_kind == "pixels":
      height, width = x.shape[-3:-1]
      order = np.random.default_rng(0).permutation(height * width)
      flat = x.reshape(*x.shape[:2], height * width, -1)
      scrambled = flat[:, :, order].reshape(x.shape)
      x = jnp.where(batch.wrong[:, None, None, None, None], scrambled, x)
    return x


def _in_batches(rows, fill=0):
  """Rows `[n, b, ...]` to evaluate in batches, padded with `fill`."""
  size = max(1, min(_EVALUATION_BATCH, len(rows)))
  padding = (0, -len(rows) % size), *[(0, 0)] * (rows.ndim - 1)
  rows = np.pad(rows, padding, constant_values=fill)
  return jax.device_put(rows.reshape(-1, size, *rows.shape[1:]))


def _with_stale(learner, batch):
  """Parameters to differentiate at, their axis of microbatches, and stale ones."""
  if learner.stale is None:
    return learner.params, None, None
  renewed = batch.steps % _STALE_STEPS == 0
  stale = jax.tree.map(
    lambda new, old: jnp.where(renewed, new, old), learner.params, learner.stale
  )
  local = lambda new, old: jnp.where(
    batch.wrong.reshape(-1, *(1,) * new.ndim), old[None], new[None]
  )
  return jax.tree.map(local, learner.params, stale), 0, stale


def _mixed(step, x, targets):
  """Each example of a batch `[b, ...]` mixed with its predecessor; alpha is 1.

  Source: mixup, arXiv 1710.09412.
  """
  share = jax.random.uniform(jax.random.fold_in(jax.random.key(0), step))
  mix = lambda a: share * a + (1 - share) * jnp.roll(a, 1, axis=0)
  return mix(x), mix(targets)


def _averaged(arm, step, average, variables):
  """The moving average of parameters and statistics; its decay starts at 0.1."""
  if average is None:
    return None
  decay = jnp.minimum(arm.ema_decay, (1 + step) / (10 + step))
  return optax.incremental_update(variables, average, 1 - decay)


def _in_last_layer(path, leaf):
  del leaf
  return path[0].key == _LAST_LAYER
