"""Decide: from the Gram matrix of each group to the weights of a step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gaf_optax import _rules, _tau


class Memory(NamedTuple):
  """The running mean of the cosines of all pairs, for each of m groups.

  Attributes:
    mean: float32 `[m, k, k]`, in [-1, 1]; 0 for a pair that was never compared.
    weight: float32 `[m, k, k]`, the weight of the steps in the mean; 0 for such a pair.
  """

  mean: jax.Array
  weight: jax.Array


class Inputs(NamedTuple):
  """What a decision needs besides the micro-gradients, all of it traced.

  Attributes:
    tau: a scalar.
    weights: `[k]`, how much each micro-gradient counts, at least 0; or None.
    start: int32 scalar, where a sequence starts.
    max_norm_ratio: a scalar or None.
    anchored: bool scalar, whether the anchor holds a step; None without an anchor.
    memory: a `Memory` or None.
    memory_decay: a scalar or None.
  """

  tau: jax.Array
  weights: jax.Array | None = None
  start: jax.Array | int = 0
  max_norm_ratio: Any = None
  anchored: jax.Array | None = None
  memory: Memory | None = None
  memory_decay: Any = None


class Decided(NamedTuple):
  """The decision of each of m groups.

  Attributes:
    decision: a `Decision` of arrays `[m, k]`; weights of sum 1, or all 0.
    factors: `[m + 1, k]`, with which the micro-gradients enter the result; the last row
      is for leaves of no group.
    plain: `[k]`, weights of the mean of all that are valid.
    tau: the mean over the groups, a scalar.
    valid: bool `[k]`, finite and of a weight above 0.
    present: bool `[k]`, of a weight above 0.
    memory: the new `Memory` or None.
  """

  decision: _rules.Decision
  factors: jax.Array
  plain: jax.Array
  tau: jax.Array
  valid: jax.Array
  present: jax.Array
  memory: Memory | None


def decide(
  rule: _rules.RuleFn,
  tau: _tau.Tau,
  gram: jax.Array,
  finite: jax.Array,
  inputs: Inputs,
  anchor: tuple[jax.Array, jax.Array] | None = None,
) -> Decided:
  """The decision of every group.

  Args:
    rule: a rule of this package or a user's.
    tau: what kind of tau `inputs.tau` is.
    gram: `[m, k, k]`, see `_kernels.gram`.
    finite: bool `[k]`.
    inputs: the rest.
    anchor: the squared norm `[m]` of an anchor, and its products `[m, k]` with the
      micro-gradients, if they are compared with it.
  """
  dtype, k = gram.dtype, gram.shape[-1]
  weights, valid = jnp.ones(k, dtype), finite
  if inputs.weights is not None:
    weights = inputs.weights.astype(dtype)
    weights /= jnp.where(jnp.any(weights > 0), jnp.max(weights), 1)
    valid = finite & (weights > 0)
    gram = jnp.where((valid[:, None] & valid[None, :])[None], gram, 0)

  def of_group(matrix, memory, anchor):
    scales = _scales(matrix, inputs.max_norm_ratio)
    seen, in_sums = matrix, scales
    if memory is not None:
      memory, seen = _remember(memory, matrix, valid, inputs.memory_decay)
      in_sums = jnp.ones_like(scales)
    rows = _rules.Rows(seen, valid, weights, in_sums, inputs.start)

    def at(tau):
      if anchor is not None:
        square, products = anchor
        return _rules.against_anchor(square, products, rows, inputs.anchored, tau)
      if isinstance(rule, _rules.Rule):
        return rule.decide(rows, tau)
      return _checked(rule, rule(_rules.scaled(seen), valid, tau), valid, dtype)

    found = tau.of(inputs.tau, lambda tau: at(tau).distances, valid)
    return at(found), scales, found, memory

  decision, scales, taus, memory = jax.vmap(of_group)(gram, inputs.memory, anchor)
  agreed = jnp.any(decision.accepted, axis=1, keepdims=True)
  shares = _normalized(jnp.where(agreed, decision.weights * weights[None], 0))
  plain = _normalized(jnp.where(valid, weights, 0))
  of_no_group = jnp.where(jnp.any(agreed), plain, 0)
  return Decided(
    decision._replace(weights=shares),
    jnp.concatenate([shares * scales, of_no_group[None]]),
    plain,
    jnp.mean(taus),
    valid,
    weights > 0,
    memory,
  )


def _normalized(weights):
  """Weights `[..., k]` divided by their sum; all zero where the sum is."""
  total = jnp.sum(weights, axis=-1, keepdims=True)
  return jnp.where(total != 0, weights / jnp.where(total != 0, total, 1), 0)


def _scales(gram, ratio):
  """The factor of each micro-gradient `[k]` that no norm be above ratio * median."""
  norms = jnp.sqrt(jnp.diagonal(gram))
  if ratio is None:
    return jnp.ones_like(norms)
  in_order = jnp.sort(jnp.where(norms > 0, norms, jnp.inf))
  number = jnp.sum(norms > 0)
  middle = in_order[jnp.maximum(number - 1, 0) // 2], in_order[number // 2]
  limit = jnp.asarray(ratio, norms.dtype) * (middle[0] / 2 + middle[1] / 2)
  return jnp.where(norms > limit, limit / jnp.where(norms > 0, norms, 1), 1)


def _remember(memory, gram, valid, decay):
  """The memory with a step's cosines in it, and the matrix that a rule sees of it."""
  norms = jnp.sqrt(jnp.diagonal(gram))
  compared = (norms[:, None] > 0) & (norms[None, :] > 0)
  norms = jnp.where(norms > 0, norms, 1)
  cosines = jnp.clip(gram / norms[:, None] / norms[None, :], -1, 1)
  weight = jnp.where(compared, decay * memory.weight + 1, memory.weight)
  step = (cosines - memory.mean) / jnp.where(compared, weight, 1)
  mean = jnp.where(compared, memory.mean + step, memory.mean)
  memory = Memory(mean.astype(jnp.float32), weight.astype(jnp.float32))
  seen = jnp.where(jnp.eye(norms.shape[0], dtype=bool), 1, memory.mean)
  seen = jnp.where(valid[:, None] & valid[None, :], seen, 0)
  return memory, seen.astype(gram.dtype)


def init_memory(num_groups: int, num_microbatches: int) -> Memory:
  zeros = lambda: jnp.zeros((num_groups, *(num_microbatches,) * 2), jnp.float32)
  return Memory(zeros(), zeros())


def majority(memory: Memory) -> tuple[jax.Array, jax.Array]:
  """For each source its cosine to the majority `[m, k]`, and its steps `[m, k]`.

  The cosine is that of `rules.majority`, NaN for a source that was never compared; the
  steps are the mean weight of its pairs.
  """
  k = memory.mean.shape[-1]
  own = jnp.eye(k, dtype=bool)
  find: Callable[[jax.Array], _rules.Decision]
  find = lambda gram: _rules.Majority()(gram, jnp.ones(k, bool), 2)
  distances = jax.vmap(find)(jnp.where(own, 1, jnp.asarray(memory.mean))).distances
  weight = jnp.where(own, 0, memory.weight)
  num_steps = jnp.sum(weight, axis=-1) / max(k - 1, 1)
  return jnp.where(num_steps > 0, 1 - distances, jnp.nan), num_steps


def _checked(rule, decision, valid, dtype):
  """A user's rule's decision, its shapes checked, nothing invalid in it."""
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
