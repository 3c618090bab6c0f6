"""Training: one compiled stretch of steps, and the accuracy after it."""

import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gaf_optax
import models
from data import Dataset
from devices import AXIS
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
# Of arrays with the steps in front, then the microbatches.
_SPREAD = P(None, AXIS)


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

  def __init__(
    self, part: Part, dataset: Dataset, mesh: jax.sharding.Mesh | None = None
  ):
    """Args: `mesh` has the axis `devices.AXIS`; None for one device."""
    self._part, self._dataset, self._mesh = part, dataset, mesh
    self._model = models.make(part.model, dataset.num_classes, part.width)
    self._compiled: dict[Any, Any] = {}
    self._compiling = threading.Lock()
    test = _test_batches(dataset, part.devices or 1)
    if mesh is None:
      self._images = jax.device_put(dataset.train_images)
      self._test = jax.device_put(test)
    else:
      # Each device gets only the images of its own microbatches, step by step.
      self._images = None
      self._test = self._placed(test, P(AXIS))

  def init(self, arm: Arm, seed: int) -> Learner:
    """The learner before the first step; its weights depend on the seed alone."""
    params, batch_stats = self._cached(
      "init", lambda: jax.jit(self._init), np.int32(seed)
    )
    transformation = self._transformation(arm, arm.tau, None)
    return Learner(params, batch_stats, transformation.init(params))

  def placed(self, learner: Learner) -> Learner:
    """The learner on all devices of the mesh, the same on each."""
    return learner if self._mesh is None else self._placed(learner, P())

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
    tau = np.float32(arm.tau)
    batches = indices, labels, keep
    if self._mesh is not None:
      tau, keep = self._placed((tau, keep), P())
      batches = (*self._own_microbatches(indices, labels), keep)

    def advance(*args):
      return self._advance(arm, *args)

    specs = (P(), P(), P(), (_SPREAD, _SPREAD, P()))
    return self._cached(
      ("advance", _decision(arm), indices.shape),
      lambda: jax.jit(self._on_devices(advance, specs), donate_argnums=0),
      learner,
      tau,
      self._images,
      batches,
    )

  def accuracy(self, learner: Learner) -> float:
    """Share of the test images that are classified correctly."""
    correct = self._cached(
      "accuracy",
      lambda: jax.jit(self._on_devices(self._count_correct, (P(), P(AXIS), P(AXIS)))),
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

  def _own_microbatches(self, indices, labels):
    """Images and labels, on each device those of its microbatches alone."""
    images = self._dataset.train_images
    pixels = jax.make_array_from_callback(
      (*indices.shape, *images.shape[1:]),
      NamedSharding(self._mesh, _SPREAD),
      lambda index: images[indices[index[: indices.ndim]]],
    )
    return pixels, self._placed(labels, _SPREAD)

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
      axis_name=None if self._mesh is None else AXIS,
      stacked=True,
    )

  def _init(self, seed):
    x = jnp.zeros((1, *self._dataset.train_images.shape[1:]), jnp.uint8)
    x = self._inputs(x)
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
      x, labels, keep = batch
      x = self._inputs(x if images is None else images[x])
      params = learner.params
      if self._mesh is not None:
        # So that a gradient is that of this device's microbatch, not of all.
        params = jax.lax.pcast(params, AXIS, to="varying")
      (losses, stats), grads = micro_gradients(params, learner.batch_stats, x, labels)
      transformation = self._transformation(arm, tau, keep)
      updates, opt_state = transformation.update(
        grads, learner.opt_state, learner.params
      )
      measured = gaf_optax.metrics(opt_state)
      trace = Trace(
        self._mean(losses),
        measured["cosine_distance"],
        measured["threshold"],
        measured["accept_rate"],
        measured["skipped_steps"],
        measured["nonfinite"],
        opt_state.gaf_state.accepted,
      )
      learner = Learner(
        optax.apply_updates(learner.params, updates),
        jax.tree.map(self._mean, stats),
        opt_state,
      )
      return learner, trace

    return jax.lax.scan(step, learner, batches)

  def _mean(self, x):
    """Over all microbatches, which are in front."""
    x = jnp.mean(x, axis=0)
    return x if self._mesh is None else jax.lax.pmean(x, AXIS)

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

    correct = jnp.sum(jax.lax.map(count, (images, labels)))
    return correct if self._mesh is None else jax.lax.psum(correct, AXIS)


def _test_batches(dataset, shares):
  """Test images `[n, b, ...]` and labels `[n, b]`, n a multiple of `shares`."""
  rows = len(dataset.test_labels)
  size = min(_EVALUATION_BATCH, -(-rows // shares))
  missing = -rows % (size * shares)
  images = np.pad(dataset.test_images, ((0, missing), (0, 0), (0, 0), (0, 0)))
  # No class is -1: what was filled up is never correct.
  labels = np.pad(dataset.test_labels, (0, missing), constant_values=-1)
  return images.reshape(-1, size, *images.shape[1:]), labels.reshape(-1, size)


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
