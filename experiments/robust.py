"""Rivals of `gaf_optax` for faulty workers, and the arms of `faults.py`.

Micro-gradients are `[k, P]` here, the flat gradients of k workers.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from gaf_optax import adaptive_tau, gaf, rules


def in_order(rows: jax.Array) -> jax.Array:
  """Each column sorted; a network of exchanges, on CPU much faster than jnp.sort."""
  rows = list(rows)
  for i in range(len(rows)):
    for j in range(i % 2, len(rows) - 1, 2):
      pair = rows[j], rows[j + 1]
      rows[j], rows[j + 1] = jnp.minimum(*pair), jnp.maximum(*pair)
  return jnp.stack(rows)


def trimmed_mean(rows: jax.Array, number: Any) -> jax.Array:
  """The mean without the `number` smallest and largest values of each coordinate."""
  at = jnp.arange(len(rows))
  kept = (at >= number) & (at < len(rows) - number)
  return kept.astype(rows.dtype) @ in_order(rows) / jnp.sum(kept)


def median(rows: jax.Array) -> jax.Array:
  return trimmed_mean(rows, (len(rows) - 1) // 2)


def nearest_neighbor_mixing(rows: jax.Array, number: Any) -> jax.Array:
  """Each row replaced by the mean of its k - `number` nearest, itself included."""
  gram = rows @ rows.T
  minus_square = 2 * gram - jnp.diag(gram)  # of the distance, except for the own length
  rank = jnp.argsort(jnp.argsort(-minus_square, axis=1), axis=1)
  return (rank < len(rows) - number) @ rows / (len(rows) - number)


def clipped(rows: jax.Array, radius: float) -> jax.Array:
  """Each row scaled down to the length `radius`, if it is longer."""
  length = jnp.linalg.norm(rows, axis=-1, keepdims=True)
  return rows * jnp.minimum(1, radius / jnp.maximum(length, 1e-12))


def robust(function: Callable) -> optax.GradientTransformation:
  """Aggregates with `function`; rows that are not finite or overflow count as zeros."""
  usable = lambda rows: jnp.isfinite(jnp.sum(rows**2, axis=1, keepdims=True))
  return optax.stateless(lambda rows, _: function(jnp.where(usable(rows), rows, 0)))


MEAN = optax.stateless(lambda rows, _: jnp.mean(rows, axis=0))


def centered_clipping(radius: float) -> optax.GradientTransformation:
  """Karimireddy et al., arXiv 2012.10333: around the last result, one iteration."""

  def update(rows, center, params=None):
    usable = jnp.isfinite(jnp.sum(rows**2, axis=1, keepdims=True))
    rows = jnp.where(usable, rows, center)
    center += jnp.mean(clipped(rows - center, radius), axis=0)
    return center, center

  return optax.GradientTransformation(jnp.zeros_like, update)


def skip_jumps(inner: optax.GradientTransformation, factor: float = 2.0):
  """Skips steps whose norm is over `factor` times the running mean of norms."""

  def update(grad, state, params=None):
    inner_state, typical, count = state
    norm = jnp.linalg.norm(grad)
    good = (count < 10) | (norm <= factor * typical)
    good &= jnp.isfinite(norm)
    updates, new_state = inner.update(grad, inner_state, params)
    rate = jnp.maximum(0.02, 1 / (count + 1))
    new = new_state, typical + rate * (norm - typical), count + 1
    updates = jnp.where(good, updates, 0)
    return updates, jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)

  init = lambda params: (inner.init(params), jnp.zeros(()), jnp.zeros((), jnp.int32))
  return optax.GradientTransformation(init, update)


def on_tree(inner, unravel) -> optax.GradientTransformation:
  """A stateless transformation that needs the layers, on flat vectors."""

  def update(grad, params):
    out, _ = inner.update(unravel(grad), inner.init(None), unravel(params))
    return ravel_pytree(out)[0]

  return optax.stateless(update)


class Arm(NamedTuple):
  """Inputs of an arm; only arms with "told" in their name use `num_faulty`."""

  then: optax.GradientTransformation
  k: int
  num_faulty: Any
  unravel: Callable  # from a flat vector to the layers

  def gaf(self, tau=None, rule=None, memory_decay=None, max_norm_ratio=None):
    """The default is `adaptive_tau` and the majority rule."""
    if tau is None:
      tau, rule = adaptive_tau(), rules.majority()
    memory = dict(memory_decay=memory_decay, num_microbatches=self.k)
    return gaf(tau, rule=rule, max_norm_ratio=max_norm_ratio, **memory), self.then

  def robust(self, function):
    return robust(function), self.then

  def recommended(self):
    return self.gaf(memory_decay=0.98, max_norm_ratio=1.0)

  def trimmed(self):
    return self.robust(lambda rows: trimmed_mean(rows, self.num_faulty))

  def mixed(self):
    mix = lambda rows: nearest_neighbor_mixing(rows, self.num_faulty)
    return self.robust(lambda rows: trimmed_mean(mix(rows), self.num_faulty))

  def krum(self):
    return self.gaf(2.0, rules.multi_krum(self.num_faulty))


# From an `Arm` to the transformations of its chain.
RIVALS: dict[str, Callable[[Arm], Sequence[Any]]] = {
  "plain mean": lambda arm: (MEAN, arm.then),
  "mean, clipped at 1": lambda arm: (MEAN, optax.clip_by_global_norm(1.0), arm.then),
  "each clipped at 1": lambda arm: arm.robust(lambda rows: clipped(rows, 1.0).mean(0)),
  "jumps of the norm skipped": lambda arm: (MEAN, skip_jumps(arm.then)),
  "apply_if_finite": lambda arm: (MEAN, optax.apply_if_finite(arm.then, 10**6)),
  "adaptive_grad_clip": lambda arm: (
    *(MEAN, on_tree(optax.adaptive_grad_clip(0.01), arm.unravel), arm.then),
  ),
  "median": lambda arm: arm.robust(median),
  "trimmed mean, told": Arm.trimmed,
  "geometric median": lambda arm: arm.gaf(2.0, rules.geometric_median()),
  "multi-Krum, told": Arm.krum,
  # Both radii are the best of 0.3, 1 and 3.
  "centered clipping": lambda arm: (centered_clipping(3.0), arm.then),
  "NNM, trimmed mean, told": Arm.mixed,
  # With momentum at the workers, and SGD of the same effective learning rate, or Adam
  # with b1 = 0.
  "momentum: plain mean": lambda arm: (MEAN, arm.then),
  "momentum: trimmed mean, told": Arm.trimmed,
  "momentum: multi-Krum, told": Arm.krum,
  "momentum: NNM, trimmed mean, told": Arm.mixed,
  "momentum: centered clipping": lambda arm: (centered_clipping(1.0), arm.then),
}
OURS: dict[str, Callable[[Arm], Sequence[Any]]] = {
  "gaf(0.97)": lambda arm: arm.gaf(0.97),
  "most_neighbors 0.97": lambda arm: arm.gaf(0.97, rules.most_neighbors()),
  "majority, adaptive": Arm.gaf,
  "majority, adaptive, memory": lambda arm: arm.gaf(memory_decay=0.98),
  "recommended (memory, length clip)": Arm.recommended,
  "momentum: gaf, one step": lambda arm: arm.gaf(max_norm_ratio=1.0),
  "momentum: recommended": Arm.recommended,
}
RECOMMENDED = ("recommended (memory, length clip)", "momentum: recommended")
ARMS = RIVALS | OURS
