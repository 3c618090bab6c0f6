"""Training: one compiled stretch of steps, and the validation loss after it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gaf_optax
from byte_model import ByteTransformer
from byte_text import CONTEXT, Batches, Text
from common.arms import RULES, Arm, Chosen, Part, already_decided, relative
from common.experiment import Trainer

_LEARNING_RATE = 4e-3
_WARM_UP = 0.1  # Share of the steps.
_WEIGHT_DECAY = 0.01


class Learner(NamedTuple):
  """What training changes: parameters and the optimizer's state, GAF's within it."""

  params: Any
  opt_state: Any


class Trace(NamedTuple):
  """What happened at each step; arrays with the steps in front."""

  loss: Any  # float32 `[k]`, in bits per byte
  distances: Any  # float32 `[k]`, NaN where nothing was compared
  accepted: Any  # bool `[k]`
  weights: Any  # float32 `[k]`, of the micro-gradients in the mean; the largest is 1


class ByteTrainer(Trainer):
  """Compiled training, which arms of one rule share."""

  def __init__(self, text: Text, steps: int, num_microbatches: int):
    super().__init__()
    self._model = ByteTransformer()
    self._validation = text.validation
    self._num_microbatches = num_microbatches
    # Outside of what is skipped, so that it goes by steps in every arm and all of
    # them end with the same learning rate. AdamW's moments and decay are inside.
    self._schedule = optax.warmup_cosine_decay_schedule(
      0.0, _LEARNING_RATE, max(1, int(_WARM_UP * steps)), steps
    )

  def init(self, arm: Arm, seed: int) -> Learner:
    """The learner before the first step; it depends on the seed alone."""

    def init(seed):
      tokens = jnp.zeros((1, CONTEXT), jnp.uint8)
      params = self._model.init(jax.random.key(seed), tokens)["params"]
      return Learner(params, self._transformation(2.0, None).init(params))

    return self._cached("init", lambda: jax.jit(init), np.int32(seed))

  def empty_trace(self, part: Part, arm: Arm) -> Trace:
    """A trace of a part's steps, of all seeds, before the first."""
    del arm  # All have the same.
    empty = np.zeros((part.seeds, part.steps, part.num_microbatches), np.float32)
    return Trace(empty.copy(), empty.copy(), empty.astype(bool), empty)

  def advance(
    self, arm: Arm, learner: Learner, batches: Batches, chosen: Chosen | None
  ) -> tuple[Learner, Trace]:
    """Takes some steps; of a control, `chosen` says what it keeps."""

    def take(learner, tau, seen):
      def step(learner, seen):
        batches, chosen = seen
        rule = already_decided(chosen) if arm.imitates else RULES[arm.rule]()
        return self._step(self._transformation(tau, rule), learner, batches)

      return jax.lax.scan(step, learner, seen)

    # Stretches of other lengths and microbatches of other sizes are other programs.
    key = "imitates" if arm.imitates else arm.rule, batches.inputs.shape
    tau = np.float32(2.0 if arm.imitates else arm.tau)
    return self._cached(key, lambda: jax.jit(take), learner, tau, (batches, chosen))

  def evaluate(self, arm: Arm, learner: Learner, schedule) -> dict[str, float]:
    """Bits per byte on the validation windows."""
    del arm, schedule  # The windows are the same for all.
    inputs, targets = self._validation[:, :-1], self._validation[:, 1:]
    make = lambda: jax.jit(self._loss)
    loss = self._cached("evaluate", make, learner.params, inputs, targets)
    return {"validation_loss": float(loss)}

  def row(self, trace: Trace, since: int) -> dict[str, float]:
    """What a line of the metrics file says of the steps since the line before."""
    trace = jax.tree.map(lambda x: x[since:], trace)
    return {
      "train_loss": float(trace.loss.mean()),
      "accept_rate": float(trace.accepted.mean()),
      "distance": float(np.nanmean(trace.distances)),
    }

  def _transformation(self, tau, rule):
    adamw = optax.chain(
      optax.scale_by_adam(b2=0.99), optax.add_decayed_weights(_WEIGHT_DECAY)
    )
    return optax.chain(
      gaf_optax.apply_if_agreed(
        adamw, tau, rule=rule, num_microbatches=self._num_microbatches
      ),
      optax.scale_by_learning_rate(self._schedule),
    )

  def _loss(self, params, inputs, targets):
    logits = self._model.apply({"params": params}, inputs)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.mean(losses) / np.log(2)

  def _step(self, transformation, learner, batches):
    losses, grads = jax.vmap(jax.value_and_grad(self._loss), (None, 0, 0))(
      learner.params, batches.inputs, batches.targets
    )
    updates, opt_state = transformation.update(grads, learner.opt_state, learner.params)
    state = opt_state[0].gaf_state
    learner = Learner(optax.apply_updates(learner.params, updates), opt_state)
    weights = relative(state.weights)
    return learner, Trace(losses, state.distances, state.accepted, weights)
