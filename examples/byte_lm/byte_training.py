"""Training: one compiled stretch of steps, and the validation loss after it."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gaf_optax
from byte_model import ByteTransformer
from byte_text import CONTEXT, Batches, Text
from common.arms import (
  Arm,
  Chosen,
  Part,
  already_decided,
  or_nan,
  relative,
  rule_and_tau,
  smallest_loss,
)
from common.experiment import Trainer

_WIDTH = 64
_LEARNING_RATE = 4e-3
_WARM_UP = 0.1  # Share of the steps: of the learning rate, and until losses decide.
_WEIGHT_DECAY = 0.01
# Of the losses of sources, as of their cosines.
_MEMORY = 0.98
# What single sequences are compared by.
_LAST_LAYER = "head"


class Learner(NamedTuple):
  """What training changes."""

  params: Any
  opt_state: Any  # Of the optimizer, with GAF's unless single sequences are compared
  average: Any = None  # Moving average of the parameters, where that is validated
  # float32 `[k]`, running mean of the losses of each source, where those decide.
  source_losses: Any = None


class Trace(NamedTuple):
  """What happened at each step; arrays with the steps in front.

  k is the number of microbatches, or of sequences where those are compared.
  """

  loss: Any  # float32 `[k]`, in bits per byte
  distances: Any  # float32 `[k]`, NaN where nothing was compared
  accepted: Any  # bool `[k]`
  weights: Any  # float32 `[k]`, of the micro-gradients in the mean; the largest is 1
  # float32 `[k]`, of single sequences' gradients of the last layer; else None.
  norms: Any


class ByteTrainer(Trainer):
  """Compiled training, which arms of one rule share."""

  def __init__(self, text: Text, steps: int, num_microbatches: int):
    """Args: `num_microbatches` of the arms that do not compare single sequences."""
    super().__init__()
    self._model = ByteTransformer(width=_WIDTH)
    self._text, self._num_microbatches = text, num_microbatches
    self._warm_up = max(1, int(_WARM_UP * steps))
    # Outside of what is skipped, so that it goes by steps in every arm and all of
    # them end with the same learning rate. AdamW's moments and decay are inside.
    self._schedule = optax.warmup_cosine_decay_schedule(
      0.0, _LEARNING_RATE, self._warm_up, steps
    )

  def init(self, arm: Arm, seed: int) -> Learner:
    """The learner before the first step; its weights depend on the seed alone."""

    def init(seed):
      tokens = jnp.zeros((1, CONTEXT), jnp.uint8)
      params = self._model.init(jax.random.key(seed), tokens)["params"]
      transformation = self._transformation(arm, 2.0, None)
      learner = Learner(params, transformation.init(params))
      if arm.ema_decay is not None:
        learner = learner._replace(average=jax.tree.map(jnp.copy, params))
      if arm.control == "loss" and not arm.by_example:
        learner = learner._replace(source_losses=jnp.zeros(self._num_microbatches))
      return learner

    key = "init", arm.by_example, arm.has_memory, arm.ema_decay, arm.control == "loss"
    return self._cached(key, lambda: jax.jit(init), np.int32(seed))

  def empty_trace(self, part: Part, arm: Arm) -> Trace:
    """A trace of a part's steps, of all seeds, before the first."""
    empty = np.zeros((part.seeds, part.steps, part.num_microbatches), np.float32)
    norms = empty.copy() if arm.by_example else None
    return Trace(empty.copy(), empty.copy(), empty.astype(bool), empty, norms)

  def advance(
    self, arm: Arm, learner: Learner, batches: Batches, chosen: Chosen | None
  ) -> tuple[Learner, Trace]:
    """Takes some steps; of a control, `chosen` says what it keeps."""
    one = self._step_by_example if arm.by_example else self._step

    def take(learner, tau, seen):
      return jax.lax.scan(lambda *now: one(arm, tau, *now), learner, seen)

    # Stretches of other lengths and microbatches of other sizes are other programs.
    key = _decision(arm), batches.inputs.shape
    seen = np.float32(arm.tau), (batches, chosen)
    return self._cached(key, lambda: jax.jit(take), learner, *seen)

  def evaluate(self, arm: Arm, learner: Learner, schedule) -> dict[str, float]:
    """Bits per byte on right and on held-out windows, and what GAF's state says."""
    params = learner.params if learner.average is None else learner.average
    text, found = self._text, {}
    for name, windows, targets in (
      ("validation", text.validation, text.validation[:, 1:-1]),
      ("held_out", text.held_out, schedule.held_out_targets),
    ):
      make = lambda: jax.jit(self._loss)
      seen = params, windows[:, :-2], targets
      found[f"{name}_loss"] = float(self._cached(("evaluate", name), make, *seen))
    return found if arm.by_example else found | self._of_state(arm, learner)

  def row(self, trace: Trace, since: int) -> dict[str, float]:
    """What a line of the metrics file says of the steps since the line before."""
    trace = jax.tree.map(lambda x: x[since:], trace)
    compared = trace.distances[np.isfinite(trace.distances)]
    return {
      "train_loss": float(trace.loss.mean()),
      "accept_rate": float(trace.accepted.mean()),
      "distance": float(compared.mean()) if len(compared) else float("nan"),
    }

  def _of_state(self, arm, learner):
    """`gaf_optax.metrics` and, of a memory, the table of sources, by name."""

    def read(opt_state):
      columns = gaf_optax.sources(opt_state) if arm.has_memory else {}
      return jax.tree.map(or_nan, gaf_optax.metrics(opt_state)), columns

    key = "state", arm.has_memory
    scalars, columns = self._cached(key, lambda: jax.jit(read), learner.opt_state)
    found = {f"gaf/{name}": float(value) for name, value in scalars.items()}
    for name, column in columns.items():
      for i, value in enumerate(np.asarray(column)):
        found[f"source_{i + 1}/{name}"] = float(value)
    return found

  def _transformation(self, arm, tau, chosen):
    adamw = optax.chain(
      optax.scale_by_adam(b2=0.99), optax.add_decayed_weights(_WEIGHT_DECAY)
    )
    if arm.by_example:
      filtered = optax.conditionally_transform(
        adamw, lambda step, agreed: agreed, forward_extra_args=True
      )
    else:
      rule, tau = rule_and_tau(arm, tau)
      if arm.imitates:
        rule, tau = already_decided(chosen), 2.0
      filtered = gaf_optax.apply_if_agreed(
        adamw,
        tau,
        rule=rule,
        memory_decay=arm.memory_decay if arm.has_memory else None,
        num_microbatches=self._num_microbatches,
      )
    return optax.chain(filtered, optax.scale_by_learning_rate(self._schedule))

  def _warming_up(self, learner):
    return learner.opt_state[-1].count < self._warm_up

  def _loss(self, params, inputs, targets, smoothing=0.0):
    logits = self._model.apply({"params": params}, inputs)
    wanted = optax.smooth_labels(jax.nn.one_hot(targets, logits.shape[-1]), smoothing)
    return jnp.mean(optax.softmax_cross_entropy(logits, wanted)) / np.log(2)

  def _step(self, arm, tau, learner, seen):
    batches, chosen = seen
    loss = functools.partial(self._loss, smoothing=arm.smoothing)
    losses, grads = jax.vmap(jax.value_and_grad(loss), (None, 0, 0))(
      learner.params, batches.inputs, batches.targets
    )
    source_losses = learner.source_losses
    if arm.control == "loss":
      source_losses = _MEMORY * source_losses + (1 - _MEMORY) * losses
      number = jnp.sum(chosen.accepted)
      chosen = smallest_loss(source_losses, number, self._warming_up(learner))
    transformation = self._transformation(arm, tau, chosen)
    updates, opt_state = transformation.update(grads, learner.opt_state, learner.params)
    state = opt_state[0].gaf_state
    weights = relative(state.weights)
    distances = or_nan(state.distances)
    trace = Trace(losses, distances, state.accepted, weights, None)
    learner = learner._replace(source_losses=source_losses)
    return _moved(arm, learner, updates, opt_state), trace

  def _step_by_example(self, arm, tau, learner, seen):
    """A step in which single sequences are compared, by the last layer."""
    batches, chosen = seen
    params, k = learner.params, len(batches.inputs)
    inputs, targets = batches.inputs[:, 0], batches.targets[:, 0]
    loss = functools.partial(self._loss, smoothing=arm.smoothing)
    losses, norms = _alone(loss, params, inputs, targets)
    distances = jnp.full(k, jnp.nan)
    if arm.imitates:
      kept = chosen
      if arm.control == "loss":
        number = jnp.sum(chosen.accepted)
        kept = smallest_loss(losses, number, self._warming_up(learner))
      accepted, agreed = kept.accepted, jnp.any(kept.accepted)
      weights = kept.weights / jnp.maximum(jnp.sum(kept.weights), 1e-30)
      each = jax.vmap(loss, (None, 0, 0))
      weighted = lambda params: jnp.sum(
        weights * each(params, inputs[:, None], targets[:, None])
      )
      grads = jax.grad(weighted)(params)
    else:
      rule, tau = rule_and_tau(arm, tau)
      differentiate = gaf_optax.value_and_grad(
        loss, k, tau, rule=rule, compare=lambda path, leaf: path[0].key == _LAST_LAYER
      )
      _, grads, found = differentiate(params, inputs, targets)
      agreed, accepted, weights = found.agreed, found.accepted, found.weights
      distances = or_nan(found.distances)
    updates, opt_state = self._transformation(arm, tau, None).update(
      grads, learner.opt_state, params, agreed=agreed
    )
    trace = Trace(losses, distances, accepted, relative(weights), norms)
    return _moved(arm, learner, updates, opt_state), trace


def _alone(loss, params, inputs, targets):
  """Losses of single sequences, and norms of their gradients of the last layer."""

  def one(layer, *seen):
    return loss(params | {_LAST_LAYER: layer}, *(x[None] for x in seen))

  losses, grads = jax.vmap(jax.value_and_grad(one), (None, 0, 0))(
    params[_LAST_LAYER], inputs, targets
  )
  return losses, jax.vmap(optax.tree.norm)(grads)


def _moved(arm, learner, updates, opt_state):
  params, average = optax.apply_updates(learner.params, updates), learner.average
  if average is not None:
    average = optax.incremental_update(params, average, 1 - arm.ema_decay)
  return learner._replace(params=params, opt_state=opt_state, average=average)


def _decision(arm):
  """What of an arm is compiled in; a plain tau is an argument of the program."""
  if arm.imitates:
    return "imitates", arm.by_example, arm.control == "loss"
  return dataclasses.replace(arm, name="", label="", tau=2.0, clean=False)
