"""A small transformer on bytes, its training steps, and its validation loss."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import gaf_optax
import runs
from arms import (
  Arm,
  Chosen,
  already_decided,
  or_nan,
  relative,
  rule_and_tau,
  smallest_loss,
)
from byte_text import CONTEXT, Batches, Text

_WIDTH = 64
_LEARNING_RATE = 4e-3
_WARM_UP = 0.1  # Share of the steps, for the learning rate and for choosing by loss.
# Decay of the sources' running losses; their cosines have the same decay.
_MEMORY = 0.98
_LAST_LAYER = "head"
# Wavelengths of the rotations: from one radian per byte to this many times slower.
_SLOWEST = 100.0


class ByteTransformer(nn.Module):
  """Pre-norm decoder with rotary positions; its output layer is called "head"."""

  width: int = _WIDTH
  depth: int = 2  # Number of blocks
  heads: int = 4  # Of the attention

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Logits float32 `[b, t, 256]` of the byte after each of `tokens` `[b, t]`."""
    small = nn.initializers.normal(0.02)
    x = nn.Embed(256, self.width, embedding_init=small)(tokens)
    for _ in range(self.depth):
      x = x + self._attention(nn.LayerNorm()(x))
      hidden = nn.relu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
      x = x + nn.Dense(self.width)(hidden)
    head = nn.Dense(256, use_bias=False, kernel_init=small, name="head")
    return head(nn.LayerNorm()(x))

  def _attention(self, x):
    of_heads = (3, self.heads, self.width // self.heads)
    projected = nn.Dense(3 * self.width, use_bias=False)(x)
    query, key, value = jnp.moveaxis(
      projected.reshape(*x.shape[:2], *of_heads), 2, 0
    )  # [b, t, heads, d] each
    scores = jnp.einsum("bqhd,bkhd->bhqk", _rotated(query), _rotated(key))
    earlier = jnp.tril(jnp.ones(scores.shape, bool))
    scores = jnp.where(earlier, scores / of_heads[-1] ** 0.5, -jnp.inf)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), value)
    return nn.Dense(self.width, use_bias=False)(mixed.reshape(x.shape))


def _rotated(x):
  """Pairs of `[b, t, heads, d]` rotated by angles proportional to the position."""
  half = x.shape[-1] // 2
  speeds = _SLOWEST ** (-jnp.arange(half) / half)
  angles = jnp.arange(x.shape[1])[:, None] * speeds[None, :]
  cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
  a, b = x[..., :half], x[..., half:]
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Learner(NamedTuple):
  """State of training."""

  params: Any
  opt_state: Any  # With GAF's state, unless single sequences are compared
  average: Any = None  # Moving average of the parameters, where that is validated
  source_losses: Any = None  # float32 `[k]`, running losses, if an arm chooses by them


class Trace(NamedTuple):
  """Record of the steps, which are the first axis.

  k is the number of microbatches, or of sequences if those are compared.
  """

  loss: Any  # float32 `[k]`, in bits per byte
  distances: Any  # float32 `[k]`, NaN where nothing was compared
  accepted: Any  # bool `[k]`
  weights: Any  # float32 `[k]` in the mean, divided by the largest
  norms: Any  # float32 `[k]`, of single sequences' last-layer gradients; else None


class ByteTrainer(runs.Trainer):
  """Compiled training, which the arms of all parts share."""

  def __init__(self, text: Text, steps: int, num_microbatches: int):
    """Args: `num_microbatches` where no single sequences are compared."""
    super().__init__()
    self._model = ByteTransformer()
    self._text, self._num_microbatches = text, num_microbatches
    self._warm_up = max(1, int(_WARM_UP * steps))
    # Skipped steps still advance the schedule, so all arms end with the same learning
    # rate. They do not touch AdamW's moments or apply its weight decay.
    self._schedule = optax.warmup_cosine_decay_schedule(
      0.0, _LEARNING_RATE, self._warm_up, steps
    )

  def init(self, arm: Arm, seed: int) -> Learner:
    """The learner before the first step; its weights depend on the seed alone."""

    def init(seed):
      tokens = jnp.zeros((1, CONTEXT), jnp.uint8)
      params = self._model.init(jax.random.key(seed), tokens)["params"]
      learner = Learner(params, self._transformation(arm, 2.0, None).init(params))
      if arm.ema_decay is not None:
        learner = learner._replace(average=jax.tree.map(jnp.copy, params))
      if arm.control == "loss" and not arm.by_example:
        learner = learner._replace(source_losses=jnp.zeros(self._num_microbatches))
      return learner

    return self.cached(("init", arm.compiled()), init, np.int32(seed))

  def advance(
    self, arm: Arm, learner: Learner, batches: Batches, chosen: Chosen | None
  ) -> tuple[Learner, Trace]:
    """Takes some steps; a control keeps `chosen`."""
    one = self._step_by_example if arm.by_example else self._step

    def take(learner, tau, seen):
      return jax.lax.scan(lambda *now: one(arm, tau, *now), learner, seen)

    key = "advance", arm.compiled(), batches.inputs.shape
    return self.cached(key, take, learner, np.float32(arm.tau), (batches, chosen))

  def evaluate(self, arm: Arm, learner: Learner, schedule) -> tuple[Learner, dict]:
    """Bits per byte on right and on held-out windows, and each shard's agreement."""
    params = learner.params if learner.average is None else learner.average
    text, found = self._text, {}
    for name, windows, targets in (
      ("validation", text.validation, text.validation[:, 1:-1]),
      ("held_out", text.held_out, schedule.held_out_targets),
    ):
      seen = params, windows[:, :-2], targets
      found[name] = float(self.cached(("evaluate", name), self._loss, *seen))
    if arm.has_memory:
      for name, column in gaf_optax.sources(learner.opt_state).items():
        for i, value in enumerate(np.asarray(column)):
          found[f"source_{i + 1}/{name}"] = float(value)
    return learner, found

  def _transformation(self, arm, tau, chosen):
    adamw = optax.chain(optax.scale_by_adam(b2=0.99), optax.add_decayed_weights(0.01))
    if arm.by_example:
      filtered = optax.conditionally_transform(
        adamw, lambda step, agreed: agreed, forward_extra_args=True
      )
    else:
      rule, tau = rule_and_tau(arm, tau)
      if arm.imitates is not None:
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
    updates, opt_state = self._transformation(arm, tau, chosen).update(
      grads, learner.opt_state, learner.params
    )
    state = opt_state[0].gaf_state
    weights, distances = relative(state.weights), or_nan(state.distances)
    trace = Trace(losses, distances, state.accepted, weights, None)
    learner = learner._replace(source_losses=source_losses)
    return _moved(arm, learner, updates, opt_state), trace

  def _step_by_example(self, arm, tau, learner, seen):
    """A step that compares single sequences by their gradients of the last layer."""
    batches, chosen = seen
    params, k = learner.params, len(batches.inputs)
    inputs, targets = batches.inputs[:, 0], batches.targets[:, 0]
    loss = functools.partial(self._loss, smoothing=arm.smoothing)
    losses, norms = _alone(loss, params, inputs, targets)
    distances = jnp.full(k, jnp.nan)
    if arm.imitates is not None:
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
  """Losses of single sequences, and norms of their last-layer gradients."""

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
