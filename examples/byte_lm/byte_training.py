"""Training: one compiled stretch of steps, and the validation loss after it."""

import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gaf_optax
from byte_arms import RULES, Arm
from byte_model import ByteTransformer
from byte_text import CONTEXT, Batches, Text

_LEARNING_RATE = 4e-3
_WARM_UP = 0.1  # Share of the steps.
_WEIGHT_DECAY = 0.01


class Learner(NamedTuple):
  """What training changes: parameters and the optimizer's state, GAF's within it."""

  params: Any
  opt_state: Any


class Trainer:
  """Compiled training, which arms of one rule share; of use in several threads."""

  def __init__(self, text: Text, steps: int, num_microbatches: int):
    self._model = ByteTransformer()
    self._validation = text.validation
    self._num_microbatches = num_microbatches
    # Outside of what is skipped, so that it goes by steps in every arm and all of
    # them end with the same learning rate. AdamW's moments and decay are inside.
    self._schedule = optax.warmup_cosine_decay_schedule(
      0.0, _LEARNING_RATE, max(1, int(_WARM_UP * steps)), steps
    )
    self._compiled: dict[str, Any] = {}
    self._compiling = threading.Lock()

  def init(self, seed: int) -> Learner:
    """The learner before the first step."""

    def init(seed):
      tokens = jnp.zeros((1, CONTEXT), jnp.uint8)
      params = self._model.init(jax.random.key(seed), tokens)["params"]
      return Learner(params, self._transformation(2.0, None).init(params))

    return self._run("init", init, np.int32(seed))

  def advance(
    self, arm: Arm, learner: Learner, batches: Batches, kept: np.ndarray | None
  ) -> tuple[Learner, dict[str, np.ndarray]]:
    """Takes some steps.

    Args:
      arm: how.
      learner: where they start from.
      batches: what they see.
      kept: bool `[n, k]`, what a control keeps; else None.

    Returns:
      The learner after them, and of each step: `loss` float32 `[n, k]` in bits per
      byte, `distances` float32 `[n, k]` and `accepted` bool `[n, k]`.
    """

    def take(learner, tau, seen):
      def step(learner, seen):
        inputs, targets, kept = seen
        rule = RULES[arm.rule]() if kept is None else _decided(kept)
        return self._step(self._transformation(tau, rule), learner, inputs, targets)

      return jax.lax.scan(step, learner, seen)

    # Stretches of other lengths and microbatches of other sizes are other programs.
    name = f"{'kept' if arm.imitates else arm.rule} {batches.inputs.shape}"
    seen = batches.inputs, batches.targets, kept
    learner, happened = self._run(name, take, learner, np.float32(arm.tau), seen)
    return learner, jax.tree.map(np.asarray, happened)

  def validate(self, learner: Learner) -> float:
    """Bits per byte on the validation windows."""
    windows = self._validation
    loss = self._run(
      "validate", self._loss, learner.params, windows[:, :-1], windows[:, 1:]
    )
    return float(loss)

  def _run(self, name, function, *args):
    # By hand, since threads that call a new `jit` function at once each compile it.
    with self._compiling:
      if name not in self._compiled:
        self._compiled[name] = jax.jit(function).lower(*args).compile()
    return self._compiled[name](*args)

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

  def _step(self, transformation, learner, inputs, targets):
    losses, grads = jax.vmap(jax.value_and_grad(self._loss), (None, 0, 0))(
      learner.params, inputs, targets
    )
    updates, opt_state = transformation.update(grads, learner.opt_state, learner.params)
    state = opt_state[0].gaf_state
    learner = Learner(optax.apply_updates(learner.params, updates), opt_state)
    return learner, {
      "loss": losses,
      "distances": state.distances,
      "accepted": state.accepted,
    }


def _decided(kept):
  """A rule that keeps what is given `[k]`; its distances are those of plain mean."""

  def rule(gram, valid, tau):
    plain = RULES["sequential"]()(gram, valid, tau)
    return plain._replace(weights=kept.astype(gram.dtype), accepted=kept & valid)

  return rule
