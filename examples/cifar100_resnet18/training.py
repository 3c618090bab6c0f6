"""Training: one compiled stretch of steps, and the accuracy after it."""

import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gaf_optax
import models
from data import Dataset
from plan import RULES, Arm, Part

OPTIMIZERS = {
  "sgd": optax.sgd,
  "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
  "nesterov": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
  "adam": optax.adam,
  "adamw": optax.adamw,
  "rmsprop": optax.rmsprop,
}
_EVALUATION_BATCH = 500


class Learner(NamedTuple):
  """What training changes.

  Attributes:
    params: of the model.
    batch_stats: BatchNorm's running statistics, empty without BatchNorm.
    opt_state: of the optimizer, GAF's within it.
  """

  params: Any
  batch_stats: Any
  opt_state: Any


class Trace(NamedTuple):
  """What happened at each step; arrays with the steps in front.

  Attributes:
    loss: float32, the mean over all microbatches, accepted or not.
    distance: float32, mean cosine distance; NaN where nothing was compared.
    threshold: float32, tau.
    accept_rate: float32, the accepted share since the first step.
    skipped_steps: int32, since the first step.
    nonfinite: int32, since the first step.
    accepted: bool `[k]`.
  """

  loss: Any
  distance: Any
  threshold: Any
  accept_rate: Any
  skipped_steps: Any
  nonfinite: Any
  accepted: Any


def empty_trace(part: Part) -> Trace:
  """A trace of a part's steps, of all seeds, before the first."""
  shape = (part.seeds, part.steps)
  nan = lambda: np.full(shape, np.nan, np.float32)
  zero = lambda: np.zeros(shape, np.int32)
  accepted = np.zeros((*shape, part.num_microbatches), bool)
  return Trace(nan(), nan(), nan(), nan(), zero(), zero(), accepted)


class Trainer:
  """Compiled training for the arms of one part, which share what they can."""

  def __init__(self, part: Part, dataset: Dataset):
    self._part, self._dataset = part, dataset
    self._model = models.make(part.model, dataset.num_classes, part.width)
    self._images = jax.device_put(dataset.train_images)
    self._compiled: dict[Any, Any] = {}
    self._compiling = threading.Lock()
    self._test = _test_batches(dataset)

  def init(self, arm: Arm, seed: int) -> Learner:
    """The learner before the first step; its weights depend on the seed alone."""
    params, batch_stats = self._cached(
      "init", lambda: jax.jit(self._init), np.int32(seed)
    )
    transformation = self._transformation(arm, arm.tau, None)
    return Learner(params, batch_stats, transformation.init(params))

  def advance(
    self,
    arm: Arm,
    learner: Learner,
    indices: np.ndarray,
    labels: np.ndarray,
    keep: np.ndarray | None = None,
  ) -> tuple[Learner, Trace]:
    """Takes some steps.

    Args:
      arm: how.
      learner: where they start from; its buffers are given away.
      indices: int32 `[n, k, b]`, which training images.
      labels: int32 `[n, k, b]`.
      keep: bool `[n, k]`, the choice of an arm that imitates.
    """
    return self._cached(
      ("advance", _decision(arm), indices.shape),
      lambda: jax.jit(lambda *args: self._advance(arm, *args), donate_argnums=0),
      learner,
      np.float32(arm.tau),
      self._images,
      (indices, labels, keep),
    )

  def accuracy(self, learner: Learner) -> float:
    """Share of the test images that are classified correctly."""
    correct = self._cached(
      "accuracy",
      lambda: jax.jit(self._count_correct),
      (learner.params, learner.batch_stats),
      *self._test,
    )
    return int(correct) / len(self._dataset.test_labels)

  def _cached(self, key, make, *args):
    # Compiled by hand, since threads that call a new `jit` function at the same
    # time each compile it.
    with self._compiling:
      if key not in self._compiled:
        self._compiled[key] = make().lower(*args).compile()
    return self._compiled[key](*args)

  def _inputs(self, images):
    data = self._dataset
    shape = (1,) * (images.ndim - 1) + (-1,)
    x = images.astype(jnp.float32) / data.scale
    mean = jnp.array(data.mean, jnp.float32).reshape(shape)
    std = jnp.array(data.std, jnp.float32).reshape(shape)
    return (x - mean) / std

  def _transformation(self, arm, tau, keep):
    rule = RULES[arm.rule]()
    if arm.target is not None:
      tau = gaf_optax.target_accept_rate(arm.target)
    if arm.imitates is not None:
      rule = _already_decided(keep)
    return gaf_optax.apply_if_agreed(
      OPTIMIZERS[self._part.optimizer](self._part.learning_rate),
      tau,
      rule=rule,
      num_microbatches=self._part.num_microbatches,
    )

  def _init(self, seed):
    x = self._inputs(jnp.zeros((1, *self._images.shape[1:]), jnp.uint8))
    variables = self._model.init(jax.random.key(seed), x, train=False)
    return variables["params"], variables.get("batch_stats", {})

  def _advance(self, arm, learner, tau, images, batches):
    def loss(params, batch_stats, x, y):
      logits, updated = self._model.apply(
        {"params": params, "batch_stats": batch_stats},
        x,
        train=True,
        mutable=["batch_stats"],
      )
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
      return jnp.mean(losses), updated.get("batch_stats", {})

    micro_gradients = jax.vmap(
      jax.value_and_grad(loss, has_aux=True), in_axes=(None, None, 0, 0)
    )

    def step(learner, batch):
      indices, labels, keep = batch
      x = self._inputs(images[indices])
      (losses, stats), grads = micro_gradients(
        learner.params, learner.batch_stats, x, labels
      )
      transformation = self._transformation(arm, tau, keep)
      updates, opt_state = transformation.update(
        grads, learner.opt_state, learner.params
      )
      measured = gaf_optax.metrics(opt_state)
      trace = Trace(
        jnp.mean(losses),
        measured["cosine_distance"],
        measured["threshold"],
        measured["accept_rate"],
        measured["skipped_steps"],
        measured["nonfinite"],
        opt_state.gaf_state.accepted,
      )
      learner = Learner(
        optax.apply_updates(learner.params, updates),
        jax.tree.map(lambda s: jnp.mean(s, axis=0), stats),
        opt_state,
      )
      return learner, trace

    return jax.lax.scan(step, learner, batches)

  def _count_correct(self, variables, images, labels):
    params, batch_stats = variables

    def count(batch):
      x, y = batch
      logits = self._model.apply(
        {"params": params, "batch_stats": batch_stats},
        self._inputs(x),
        train=False,
      )
      return jnp.sum(jnp.argmax(logits, axis=-1) == y)

    return jnp.sum(jax.lax.map(count, (images, labels)))


def _test_batches(dataset):
  """Test images `[n, b, ...]` and labels `[n, b]`, the last batch filled up."""
  rows = len(dataset.test_labels)
  size = min(_EVALUATION_BATCH, rows)
  missing = -rows % size
  images = np.pad(dataset.test_images, ((0, missing), (0, 0), (0, 0), (0, 0)))
  # No class is -1: what was filled up is never correct.
  labels = np.pad(dataset.test_labels, (0, missing), constant_values=-1)
  return (
    jax.device_put(images.reshape(-1, size, *images.shape[1:])),
    jax.device_put(labels.reshape(-1, size)),
  )


def _decision(arm):
  """What of an arm is compiled in; a plain tau is an argument of the program."""
  return arm.rule, arm.target, arm.imitates is not None


def _already_decided(keep):
  """A rule that accepts what `keep`, bool `[k]`, says.

  Its distances are those of the sequential rule that accepts everything.
  """

  def rule(gram, valid, tau):
    distances = RULES["sequential"]()(gram, valid, tau).distances
    accepted = keep & valid
    return gaf_optax.Decision(accepted.astype(distances.dtype), accepted, distances)

  return rule
