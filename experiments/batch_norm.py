"""Effect of BatchNorm statistics over all microbatches on distances and training.

`python experiments/batch_norm.py` trains an MLP on scikit-learn's digits from eight
sources; three have labels shifted by one. BatchNorm computes statistics of each
microbatch, or of all. The gradient then passes through all statistics (`axis_name`) or
only the microbatch's own. LayerNorm has no batch statistics. Prints two tables.
"""

import argparse
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from flax import linen as nn
from sklearn.datasets import load_digits

import gaf_optax
import report
from gaf_optax import rules

K, NUM_WRONG = 8, 3  # sources, and how many of them have shifted labels: the last
NUM_TRAIN = 1437  # of the 1,797 digits; the others test
SEEDS = 5
MEASURED_AT = (0, 50, 200)  # steps; the last is the end of training
DRAWS = 20  # batches to measure distances with at each of these

FILTER = dict(tau=gaf_optax.adaptive_tau(), rule=rules.majority(), num_microbatches=K)


class OwnGradient(nn.Module):
  """Normalizes by statistics of all microbatches, differentiates through its own."""

  train: bool

  @nn.compact
  def __call__(self, x):
    shape = (1,) * (x.ndim - 1) + x.shape[-1:]
    mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
    var = self.variable("batch_stats", "var", jnp.ones, shape)
    center, variance = mean.value, var.value
    if self.train:
      axes = tuple(range(x.ndim - 1))
      own = [jnp.mean(power, axes, keepdims=True) for power in (x, x**2)]
      center, square = jax.tree.map(
        lambda m: m + jax.lax.stop_gradient(jax.lax.pmean(m, "data") - m), own
      )
      variance = jnp.maximum(square - center**2, 0)
      mean.value = 0.9 * mean.value + 0.1 * center
      var.value = 0.9 * var.value + 0.1 * variance
    scale = self.param("scale", nn.initializers.ones, shape)
    bias = self.param("bias", nn.initializers.zeros, shape)
    return (x - center) * jax.lax.rsqrt(variance + 1e-5) * scale + bias


NORMS = {
  "BatchNorm": lambda train: nn.BatchNorm(not train, momentum=0.9),
  "BatchNorm, `axis_name`": lambda train: nn.BatchNorm(
    not train, momentum=0.9, axis_name="data"
  ),
  "statistics of all, gradient through its own": OwnGradient,
  "LayerNorm": lambda train: nn.LayerNorm(),
}


class Network(nn.Module):
  """Two hidden layers of 64, each normalized as `norm` says."""

  norm: str

  @nn.compact
  def __call__(self, x, train):
    for _ in range(2):
      x = nn.relu(NORMS[self.norm](train)(nn.Dense(64)(x)))
    return nn.Dense(10)(x)


class Run(NamedTuple):
  """Results of a training run; outside `train` with a leading axis of seeds.

  Attributes:
    accuracy: on the test images, at the end.
    accepted: bool `[steps, K]`, or None without a filter.
    distances: `[len(MEASURED_AT), DRAWS, K]`, or None with a filter.
  """

  accuracy: Any
  accepted: Any
  distances: Any


def train(seed, num_wrong, num_kept, *, norm, rows, filter) -> Run:
  """One run.

  Args:
    seed: draws the split, the sources, the weights and the batches.
    num_wrong: number of sources with shifted labels, the last ones.
    num_kept: number of sources in the mean, the first ones; K with a filter.
    norm: a name in `NORMS`.
    rows: examples in a microbatch.
    filter: arguments of `apply_if_agreed`, or None for the mean.
  """
  keys = jax.random.split(jax.random.key(seed), 3)
  digits = load_digits()
  order = jax.random.permutation(keys[0], len(digits.target))
  x = jnp.asarray(digits.data / 16, jnp.float32)[order]
  y = jnp.asarray(digits.target)[order]
  size = NUM_TRAIN // K
  inputs = x[: K * size].reshape(K, size, -1)
  labels = y[: K * size].reshape(K, size)
  shifted = jnp.arange(K)[:, None] >= K - num_wrong
  labels = jnp.where(shifted, (labels + 1) % 10, labels)

  def batch(step):
    drawn = jax.random.split(jax.random.fold_in(keys[1], step), K)
    rows_of = jax.vmap(lambda key: jax.random.permutation(key, size)[:rows])(drawn)
    return (
      jnp.take_along_axis(inputs, rows_of[..., None], axis=1),
      jnp.take_along_axis(labels, rows_of, axis=1),
    )

  network = Network(norm)

  def loss(params, statistics, x, y):
    variables = {"params": params, "batch_stats": statistics}
    logits, new = network.apply(variables, x, train=True, mutable=["batch_stats"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return losses.mean(), new.get("batch_stats", {})

  # With axis_name="data", statistics cover all microbatches.
  micro_grads = jax.vmap(
    jax.grad(loss, has_aux=True), (None, None, 0, 0), axis_name="data"
  )
  optimizer = optax.sgd(0.05, momentum=0.9)
  tx = gaf_optax.apply_if_agreed(optimizer, **filter) if filter else optimizer
  weights = jnp.where(jnp.arange(K) < num_kept, 1 / num_kept, 0)

  def step(carry, number):
    params, statistics, state = carry
    grads, statistics = micro_grads(params, statistics, *batch(number))
    statistics = jax.tree.map(lambda s: s.mean(axis=0), statistics)
    if not filter:
      grads = jax.tree.map(lambda g: jnp.tensordot(weights, g, axes=1), grads)
    updates, state = tx.update(grads, state, params)
    accepted = optax.tree.get(state, "accepted") if filter else None
    return (optax.apply_updates(params, updates), statistics, state), accepted

  probe = gaf_optax.gaf(**FILTER)

  def distances(params, statistics, at):
    def draw(i):
      batch_number = MEASURED_AT[-1] + DRAWS * at + i  # none that is trained on
      grads, _ = micro_grads(params, statistics, *batch(batch_number))
      return probe.update(grads, probe.init(params), params)[1].distances

    return jax.lax.map(draw, jnp.arange(DRAWS))

  variables = network.init(keys[2], x[:1], train=False)
  params, statistics = variables["params"], variables.get("batch_stats", {})
  carry = params, statistics, tx.init(params)
  found, accepted = [], []
  for at, (start, stop) in enumerate(zip((0, *MEASURED_AT), MEASURED_AT)):
    if stop:
      carry, kept = jax.lax.scan(step, carry, jnp.arange(start, stop))
      accepted.append(kept)
    if not filter:
      found.append(distances(*carry[:2], at))

  variables = {"params": carry[0], "batch_stats": carry[1]}
  logits = network.apply(variables, x[NUM_TRAIN:], train=False)
  return Run(
    jnp.mean(jnp.argmax(logits, axis=1) == y[NUM_TRAIN:]),
    jnp.concatenate(accepted) if filter else None,
    None if filter else jnp.stack(found),
  )


def runs(**options):
  """A compiled function from `num_wrong` and `num_kept` to the runs of all seeds."""
  one = functools.partial(train, **options)
  seeds = jnp.arange(SEEDS)
  compiled = jax.jit(jax.vmap(one, (0, None, None)))
  return lambda *numbers: jax.device_get(compiled(seeds, *numbers))


def area_under_roc(distances):
  """How often a wrong source is further away than a right; `[..., K]` to `[...]`."""
  right, wrong = np.split(distances, [K - NUM_WRONG], axis=-1)
  right, wrong = right[..., None, :], wrong[..., None]
  return np.mean((wrong > right) + (wrong == right) / 2, axis=(-1, -2))


def spread(values, digits=2) -> str:
  """Mean and standard deviation over the seeds."""
  mean, deviation = np.mean(values), np.std(values, ddof=1)
  return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--rows", type=int, default=16, help="in a microbatch")
  rows = parser.parse_args(argv).rows
  measured = [["", "step", "right", "wrong", "area under ROC"]]
  trained = [
    ["", "plain mean", "`gaf`", "with a memory", "right only", "nothing wrong"]
  ]
  for norm in tqdm.tqdm(NORMS):
    of = functools.partial(runs, norm=norm, rows=rows)
    mean_of = of(filter=None)
    mean = mean_of(NUM_WRONG, K)
    for i, step in enumerate(MEASURED_AT):
      distances = mean.distances[:, i]  # [seeds, DRAWS, K]
      right, wrong = np.split(distances.mean(axis=1), [K - NUM_WRONG], axis=1)
      area = area_under_roc(distances).mean(axis=1)
      figures = map(spread, (right.mean(axis=1), wrong.mean(axis=1), area))
      measured.append([norm, str(step), *figures])
    row = [norm, spread(mean.accuracy, 3)]
    for filter in (FILTER, FILTER | {"memory_decay": 0.98}):
      run = of(filter=filter)(NUM_WRONG, K)
      rates = run.accepted.mean(axis=(0, 1))
      right, wrong = rates[:-NUM_WRONG].mean(), rates[-NUM_WRONG:].mean()
      row.append(f"{spread(run.accuracy, 3)} ({right:.2f}, {wrong:.2f})")
    for numbers in ((NUM_WRONG, K - NUM_WRONG), (0, K)):
      row.append(spread(mean_of(*numbers).accuracy, 3))
    trained.append(row)
  print(
    f"Microbatches of {rows}, {NUM_WRONG} of {K} sources wrong, {SEEDS} seeds, mean ±"
    " standard deviation.\n\nDistance to the majority of right and of wrong"
    " microbatches in runs of the plain mean:\n\n" + report.aligned(measured)
  )
  print(
    "\nFinal test accuracy; in brackets the accepted share of right and of wrong"
    " microbatches:\n\n" + report.aligned(trained)
  )


if __name__ == "__main__":
  main()
