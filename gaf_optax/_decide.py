"""Maps the Gram matrix of each group to the weights of a step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gaf_optax import _rules, _tau


class Memory(NamedTuple):
  """The running mean of the cosines of all pairs, for each of m groups.

  Attributes:
    mean: float32 `[m, k, k]`, in [-1, 1]; 0 for a pair that was never compared.
    weight: float32 `[m, k, k]`, the weight of the steps in the mean.
  """

  mean: jax.Array
  weight: jax.Array


class Inputs(NamedTuple):
  """The traced inputs of a decision, except for the inner products.

  Attributes:
    tau: from `Tau.at`.
    weights: `microbatch_weights` `[k]` or None.
    start: int32 scalar, where sequential rules start.
    anchored: bool scalar, whether the anchor has been initialized.
  """

  tau: _tau.Tau
  weights: jax.Array | None = None
  start: jax.Array | int = 0
  max_norm_ratio: Any = None
  anchored: jax.Array | None = None
  memory: Memory | None = None
  memory_decay: Any = None


class Decided(NamedTuple):
  """The decisions of m groups.

  Attributes:
    decision: a `Decision` of arrays `[m, k]`; weights sum to 1, or are all 0.
    factors: `[m + 1, k]`, the factors of the micro-gradients in the result; the last
      row is for leaves without a group.
    plain: `[k]`, the weights of the plain mean.
    tau: its value is the mean over the groups.
    valid: bool `[k]`, finite and with a weight above 0.
    present: bool `[k]`, with a weight above 0.
    memory: the new `Memory` or None.
  """

  decision: _rules.Decision
  factors: jax.Array
  plain: jax.Array
  tau: _tau.Tau
  valid: jax.Array
  present: jax.Array
  memory: Memory | None


def decide(
  rule: _rules.RuleFn,
  gram: jax.Array,
  finite: jax.Array,
  inputs: Inputs,
  anchor: tuple[jax.Array, jax.Array] | None = None,
) -> Decided:
  """The decisions of all groups, from `gram` `[m, k, k]` and `finite` `[k]`.

  `anchor` is None, or the anchor's squared norms `[m]` and inner products `[m, k]`.
  """
  dtype, k = gram.dtype, gram.shape[-1]
  weights, valid = jnp.ones(k, dtype), finite
  if inputs.weights is not None:
    weights = inputs.weights.astype(dtype)
    weights /= jnp.where(jnp.any(weights > 0), jnp.max(weights), 1)
    valid = finite & (weights > 0)
    gram = jnp.where((valid[:, None] & valid[None, :])[None], gram, 0)

  def decide_group(matrix, memory, anchor):
    scales = _scales(matrix, inputs.max_norm_ratio)
    compared, sum_scales = matrix, scales
    if memory is not None:
      memory, compared = _update_memory(memory, matrix, valid, inputs.memory_decay)
      sum_scales = jnp.ones_like(scales)
    rows = _rules.Rows(compared, valid, weights, sum_scales, inputs.start)

    def decide_at(tau):
      if anchor is not None:
        square, products = anchor
        return _rules.against_anchor(square, products, rows, inputs.anchored, tau)
      if isinstance(rule, _rules.Rule):
        return rule.decide(rows, tau)
      return _check_decision(rule, rule(_rules.scaled(compared), valid, tau), rows)

    tau = inputs.tau.from_distances(lambda tau: decide_at(tau).distances, valid)
    return decide_at(tau.value), scales, tau.value, memory

  decision, scales, taus, memory = jax.vmap(decide_group)(gram, inputs.memory, anchor)
  agreed = jnp.any(decision.accepted, axis=1, keepdims=True)
  shares = _normalized(jnp.where(agreed, decision.weights * weights[None], 0))
  plain = _normalized(jnp.where(valid, weights, 0))
  without_group = jnp.where(jnp.any(agreed), plain, 0)
  return Decided(
    decision._replace(weights=shares),
    jnp.concatenate([shares * scales, without_group[None]]),
    plain,
    inputs.tau.with_value(jnp.mean(taus)),
    valid,
    weights > 0,
    memory,
  )


def _normalized(weights):
  """Weights `[..., k]` divided by their sum, or zeros if the sum is 0."""
  total = jnp.sum(weights, axis=-1, keepdims=True)
  return jnp.where(total != 0, weights / jnp.where(total != 0, total, 1), 0)


def _scales(gram, ratio):
  """Factors `[k]` that limit the norms to `ratio` times their median."""
  norms = jnp.sqrt(jnp.diagonal(gram))
  if ratio is None:
    return jnp.ones_like(norms)
  in_order = jnp.sort(jnp.where(norms > 0, norms, jnp.inf))
  number = jnp.sum(norms > 0)
  middle = in_order[jnp.maximum(number - 1, 0) // 2], in_order[number // 2]
  limit = jnp.asarray(ratio, norms.dtype) * (middle[0] / 2 + middle[1] / 2)
  return jnp.where(norms > limit, limit / jnp.where(norms > 0, norms, 1), 1)


def _update_memory(memory, gram, valid, decay):
  """The memory after adding a step's cosines, and the matrix for the rule."""
  norms = jnp.sqrt(jnp.diagonal(gram))
  compared = (norms[:, None] > 0) & (norms[None, :] > 0)
  norms = jnp.where(norms > 0, norms, 1)
  cosines = jnp.clip(gram / norms[:, None] / norms[None, :], -1, 1)
  decay = jnp.asarray(decay, memory.weight.dtype)
  weight = jnp.where(compared, decay * memory.weight + 1, memory.weight)
  step = (cosines - memory.mean) / jnp.where(compared, weight, 1)
  mean = jnp.where(compared, memory.mean + step, memory.mean)
  memory = Memory(mean.astype(jnp.float32), weight.astype(jnp.float32))
  matrix = jnp.where(jnp.eye(norms.shape[0], dtype=bool), 1, memory.mean)
  matrix = jnp.where(valid[:, None] & valid[None, :], matrix, 0)
  return memory, matrix.astype(gram.dtype)


def init_memory(num_groups: int, num_microbatches: int) -> Memory:
  zeros = lambda: jnp.zeros((num_groups, *(num_microbatches,) * 2), jnp.float32)
  return Memory(zeros(), zeros())


def _check_decision(rule, decision, rows):
  """Checks the shapes of a user's decision; excludes invalid micro-gradients."""
  valid, dtype = rows.valid, rows.gram.dtype
  try:
    weights, accepted, distances = decision
  except (TypeError, ValueError):
    raise ValueError(
      f"rule {rule!r} must return a Decision(weights, accepted, distances), got"
      f" {decision!r}."
    ) from None
  arrays = {"weights": weights, "accepted": accepted, "distances": distances}
  for name, array in arrays.items():
    if jnp.shape(array) != valid.shape:
      raise ValueError(
        f"rule {rule!r} returned {name} of shape {jnp.shape(array)} for"
        f" {valid.shape[0]} micro-gradients, expected {valid.shape}."
      )
  return _rules.Decision(
    jnp.where(valid, jnp.asarray(weights).astype(dtype), 0),
    jnp.asarray(accepted, bool) & valid,
    jnp.asarray(distances).astype(dtype),
  )
