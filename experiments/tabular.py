"""Classification and regression with wrong targets, and simple rivals.

`python experiments/tabular.py` trains an MLP on scikit-learn's bundled tables (breast
cancer, wine, diabetes) with wrong targets. Either these are spread evenly, and
examples are compared; or three of eight sources are wrong, and a memory compares them.
"""

import argparse
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from sklearn import datasets
from sklearn.metrics import roc_auc_score

import gaf_optax
import report
from gaf_optax import rules

SEEDS = 10
STEPS, EVERY = 1000, 20  # of training, and between two looks at the test data
ROWS = 64  # in a batch
SHARE = 0.4  # share of the examples with wrong targets, if spread evenly
K, NUM_WRONG = 8, 3  # sources, and how many of them are wrong: the first
EMA_DECAY = 0.99
AUC_AT = (0, 1, 5, 20, 50)  # looks: before training, and after 20 to 1,000 steps
TASKS = {
  "breast cancer": datasets.load_breast_cancer,
  "wine": datasets.load_wine,
  "diabetes": datasets.load_diabetes,
}
NEAR = rules.nearest_neighbors(5)


class Data(NamedTuple):
  """A table, split; the targets are integers of classes, or floats of unit variance."""

  x: Any
  y: Any
  wrong: Any
  validation_x: Any
  validation_y: Any
  test_x: Any
  test_y: Any


def load(task: str, by_source: bool, seed: int) -> Data:
  """The split table; a half trains and a sixth validates, both with wrong targets."""
  rng = np.random.default_rng(seed)
  table = TASKS[task]()
  order = rng.permutation(len(table.target))
  x, y = table.data[order].astype(np.float32), table.target[order]
  validates = len(y) // 2 // K * K
  tests = validates + len(y) // 6
  x = (x - x[:validates].mean(0)) / x[:validates].std(0)
  seen = np.arange(len(y)) < tests
  if by_source:  # Each of eight consecutive rows is from another source.
    wrong = seen & (np.arange(len(y)) % K < NUM_WRONG)
  else:
    wrong = seen & (rng.random(len(y)) < SHARE)
  given = y.copy()
  if is_classification(task):
    shift = 1 if by_source else rng.integers(1, y.max() + 1, size=len(y))
    given = np.where(wrong, (y + shift) % (y.max() + 1), y)
  else:
    y = given = ((y - y[:validates].mean()) / y[:validates].std()).astype(np.float32)
    given = given.copy()
    given[wrong] = rng.permutation(given[wrong])
  parts = np.split(np.arange(len(y)), [validates, tests])
  train, validation, test = parts
  return Data(
    x[train],
    given[train],
    wrong[train],
    x[validation],
    given[validation],
    x[test],
    y[test],
  )


def is_classification(task):
  return task != "diabetes"


def init(key, num_inputs, num_outputs):
  sizes = (num_inputs, 64, 64, num_outputs)
  return [
    (jax.random.normal(k, (a, b)) * math.sqrt(2 / a), jnp.zeros(b))
    for k, a, b in zip(jax.random.split(key, 3), sizes, sizes[1:])
  ]


def forward(params, x):
  """The last layer's inputs and outputs."""
  for kernel, bias in params[:-1]:
    x = jax.nn.relu(x @ kernel + bias)
  kernel, bias = params[-1]
  return x, x @ kernel + bias


def losses(params, x, targets, huber=False):
  """Losses of single examples; targets are distributions `[B, c]` or values `[B]`."""
  _, out = forward(params, x)
  if targets.ndim == 2:
    return optax.softmax_cross_entropy(out, targets)
  if huber:
    return optax.huber_loss(out[:, 0], targets)
  return (out[:, 0] - targets) ** 2 / 2


def cotangents(out, targets):
  if targets.ndim == 2:
    return jax.nn.softmax(out) - targets
  return out - targets[:, None]


def score(params, x, y, classify):
  """Accuracy, or the share of the variance that is explained."""
  _, out = forward(params, x)
  if classify:
    return jnp.mean(jnp.argmax(out, axis=1) == y)
  return 1 - jnp.mean((out[:, 0] - y) ** 2) / jnp.var(y)


# How a step weighs examples: from `(params, x, targets)` to weights `[B]`.


def uniform(params, x, targets):
  return jnp.full(len(x), 1 / len(x))


def at_random(params, x, targets):
  return first_of(jnp.arange(len(x)))  # The batch is in random order.


def smallest_loss(params, x, targets):
  return first_of(jnp.argsort(jnp.argsort(losses(params, x, targets))))


def first_of(ranks):
  number = math.ceil(len(ranks) * (1 - SHARE))
  return jnp.where(ranks < number, 1 / number, 0)


def by_agreement(tau):
  def weights(params, x, targets):
    hidden, out = forward(params, x)
    found = gaf_optax.example_weights(hidden, cotangents(out, targets), tau, rule=NEAR)
    return found.weights

  return weights


class Arm(NamedTuple):
  """One way to train.

  Attributes:
    weights: of the examples of a batch; or by source a transformation of stacked
      gradients, or of their losses.
    smoothing: of labels, in [0, 1).
    mixup: whether pairs of examples are mixed.
    huber: whether the loss of a regression is Huber's.
    ema: whether an average of the weights is tested.
  """

  weights: Any
  smoothing: float = 0.0
  mixup: bool = False
  huber: bool = False
  ema: bool = False


QUANTILE = by_agreement(gaf_optax.tau_quantile(1 - SHARE))
ADAPTIVE = by_agreement(gaf_optax.adaptive_tau())
BY_EXAMPLE = {
  "plain mean": Arm(uniform),
  "as many at random": Arm(at_random),
  "smallest losses": Arm(smallest_loss),
  "label smoothing": Arm(uniform, smoothing=0.2),
  "Huber loss": Arm(uniform, huber=True),
  "mixup": Arm(uniform, mixup=True),
  "weight EMA": Arm(uniform, ema=True),
  "mixup, weight EMA": Arm(uniform, mixup=True, ema=True),
  "`tau_quantile(0.6)`": Arm(QUANTILE),
  "`adaptive_tau()`": Arm(ADAPTIVE),
  "`tau_quantile(0.6)`, weight EMA": Arm(QUANTILE, ema=True),
}


def source_mean(choose: Callable[[Any, Any], Any]) -> optax.GradientTransformation:
  """The mean of some sources; `choose` gets the step and their running losses."""

  def update(grads, state, params=None, *, source_losses):
    number, running = state
    running = 0.98 * running + 0.02 * source_losses
    kept = choose(number, running)
    weights = kept / kept.sum()
    mean = jax.tree.map(lambda g: jnp.tensordot(weights, g, axes=1), grads)
    return mean, (number + 1, running)

  return optax.GradientTransformationExtraArgs(
    lambda params: (jnp.zeros((), jnp.int32), jnp.zeros(K)), update
  )


def some_at_random(number, running):
  order = jax.random.permutation(jax.random.fold_in(jax.random.key(7), number), K)
  return (order >= NUM_WRONG).astype(jnp.float32)


def smallest_running(number, running):
  return (jnp.argsort(jnp.argsort(running)) < K - NUM_WRONG).astype(jnp.float32)


FILTER = dict(rule=rules.majority(), num_microbatches=K)
ALL = source_mean(lambda number, running: jnp.ones(K))
MEMORY = gaf_optax.gaf(gaf_optax.adaptive_tau(), memory_decay=0.98, **FILTER)
BY_SOURCE = {
  "plain mean": Arm(ALL),
  "five at random": Arm(source_mean(some_at_random)),
  "five with the smallest running losses": Arm(source_mean(smallest_running)),
  "geometric median": Arm(gaf_optax.gaf(rule=rules.geometric_median())),
  "label smoothing": Arm(ALL, smoothing=0.2),
  "Huber loss": Arm(ALL, huber=True),
  "weight EMA": Arm(ALL, ema=True),
  "one step compared": Arm(gaf_optax.gaf(gaf_optax.adaptive_tau(), **FILTER)),
  "`memory_decay=0.98`": Arm(MEMORY),
  "`memory_decay=0.98`, weight EMA": Arm(MEMORY, ema=True),
  "right sources only": Arm(
    source_mean(lambda number, running: (jnp.arange(K) >= NUM_WRONG).astype(float))
  ),
}


# The arm that the table of all settings compares with chance, which keeps as many.
OURS = {False: "`tau_quantile(0.6)`", True: "`memory_decay=0.98`"}


class Curves(NamedTuple):
  """Scores at every look `[looks]`, on noisy validation data and on test data.

  `signals` `[looks, 3, examples]` are distance, loss and last-layer gradient norm of
  every training example at `AUC_AT`; None if not wanted.
  """

  validation: Any
  test: Any
  signals: Any


def train(seed, data, *, arm, by_source, num_classes, with_signals) -> Curves:
  """One run."""
  keys = jax.random.split(jax.random.key(seed), 2)
  params = init(keys[0], data.x.shape[1], max(num_classes, 1))
  adam = optax.adam(3e-3)
  tx = optax.chain(arm.weights, adam) if by_source else adam
  tx = optax.with_extra_args_support(tx)
  size = len(data.x)

  def target(y):
    if not num_classes:
      return y
    hot = jax.nn.one_hot(y, num_classes)
    return (1 - arm.smoothing) * hot + arm.smoothing / num_classes

  def by_example(params, state, key):
    rows = jax.random.permutation(key, size)[:ROWS]
    x, y = data.x[rows], target(data.y[rows])
    if arm.mixup:
      share = jax.random.uniform(jax.random.fold_in(key, 1))
      mix = lambda a: share * a + (1 - share) * jnp.roll(a, 1, axis=0)
      x, y = mix(x), mix(y)
    weights = jax.lax.stop_gradient(arm.weights(params, x, y))
    loss = lambda params: jnp.sum(weights * losses(params, x, y, arm.huber))
    return tx.update(jax.grad(loss)(params), state, params)

  def by_sources(params, state, key):
    mine = lambda a: a.reshape(size // K, K, *a.shape[1:]).swapaxes(0, 1)
    rows = jax.vmap(lambda k: jax.random.permutation(k, size // K)[: ROWS // K])(
      jax.random.split(key, K)
    )
    pick = jax.vmap(lambda a, rows: a[rows])
    loss = lambda params, x, y: jnp.mean(losses(params, x, target(y), arm.huber))
    values, grads = jax.vmap(jax.value_and_grad(loss), (None, 0, 0))(
      params, pick(mine(data.x), rows), pick(mine(data.y), rows)
    )
    return tx.update(grads, state, params, source_losses=values)

  one = by_sources if by_source else by_example

  def step(carry, number):
    params, state, average = carry
    updates, state = one(params, state, jax.random.fold_in(keys[1], number))
    params = optax.apply_updates(params, updates)
    average = optax.incremental_update(params, average, 1 - EMA_DECAY)
    return (params, state, average), None

  def look(carry, start):
    tested = carry[2] if arm.ema else carry[0]
    found = [
      score(tested, x, y, num_classes > 0)
      for x, y in ((data.validation_x, data.validation_y), (data.test_x, data.test_y))
    ]
    signals = None
    if with_signals:
      hidden, out = forward(carry[0], data.x)
      errors = cotangents(out, target(data.y))
      distances = gaf_optax.example_weights(hidden, errors, rule=NEAR).distances
      norms = jnp.sqrt((jnp.sum(hidden**2, 1) + 1) * jnp.sum(errors**2, 1))
      signals = distances, losses(carry[0], data.x, target(data.y)), norms
    carry, _ = jax.lax.scan(step, carry, start + jnp.arange(EVERY))
    return carry, (*found, signals and jnp.stack(signals))

  starts = jnp.arange(0, STEPS + 1, EVERY)
  _, found = jax.lax.scan(look, (params, tx.init(params), params), starts)
  return Curves(*found)


def curves(task, by_source, arm, with_signals=False) -> tuple[Curves, Any]:
  """Curves of all seeds, and which training examples are wrong `[seeds, examples]`."""
  tables = [load(task, by_source, seed) for seed in range(SEEDS)]
  data = Data(*map(np.stack, zip(*tables)))
  classes = int(data.test_y.max()) + 1 if is_classification(task) else 0
  one = functools.partial(
    train,
    arm=arm,
    by_source=by_source,
    num_classes=classes,
    with_signals=with_signals,
  )
  found = jax.jit(jax.vmap(one))(jnp.arange(SEEDS), data)
  return jax.device_get(found), data.wrong


def three(found: Curves) -> dict[str, np.ndarray]:
  """The scores `[seeds]`: final, best, and picked by noisy validation data."""
  picked = np.argmax(found.validation, axis=1)
  return {
    "final": found.test[:, -1],
    "best": found.test.max(axis=1),
    "picked": found.test[np.arange(len(picked)), picked],
  }


def role(name) -> str:
  """The role of an arm in a comparison: ours, chance, an ideal, or a simple rival."""
  if name.startswith("`") or name == "one step compared":
    return "gaf"
  if name.endswith("at random"):
    return "chance"
  return "ideal" if name == "right sources only" else "rival"


def areas(task) -> list[dict[str, Any]]:
  """How well three signals tell wrong examples from right ones, a line per seed."""
  found, wrong = curves(task, False, BY_EXAMPLE["plain mean"], with_signals=True)
  return [
    {"title": task, "seed": seed, "step": at * EVERY}
    | {
      name: roc_auc_score(wrong[seed], found.signals[seed, at, i])
      for i, name in enumerate(report.SIGNALS)
    }
    for at in AUC_AT
    for seed in range(SEEDS)
  ]


def scores(task: str, by_source: bool) -> list[dict[str, Any]]:
  """A line of CSV for each arm and seed."""
  arms = BY_SOURCE if by_source else BY_EXAMPLE
  skipped = "Huber loss" if is_classification(task) else "label smoothing"
  if by_source:
    title = f"{task}, targets of {NUM_WRONG} of {K} sources wrong"
  else:
    title = f"{task}, {SHARE:.0%} of the targets wrong, spread evenly"
  lines = []
  for name, arm in arms.items():
    if name == skipped:
      continue
    found = three(curves(task, by_source, arm)[0])
    # The one chance control stands for all GAF arms.
    imitates = OURS[by_source] if role(name) == "chance" else ""
    lines += [
      {"claim": "memory" if by_source else "by-example", "part": title, "title": title}
      | {"arm": name, "label": name.replace("`", ""), "role": role(name)}
      | {"imitates": imitates, "seed": seed}
      | {score: values[seed] for score, values in found.items()}
      for seed in range(SEEDS)
    ]
  return lines


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
  parser.add_argument("--out", type=pathlib.Path, default="runs/tabular")
  options = parser.parse_args(argv)
  out = options.out
  told = [line for task in options.tasks for line in areas(task)]
  report.write_csv(out / "tabular-told-apart.csv", told)
  lines = [
    line
    for by_source in (False, True)
    for task in tqdm.tqdm(
      options.tasks, desc="by source" if by_source else "by example"
    )
    for line in scores(task, by_source)
  ]
  path = out / "tabular.csv"
  report.write_csv(path, lines)
  print(report.table(report.settings(path)))
  print(f"The scores of all seeds are in {out}.")


if __name__ == "__main__":
  main()
