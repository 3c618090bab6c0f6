"""Workers that compute wrong gradients, and rules that withstand them.

`python experiments/faults.py` trains a model on micro-gradients of 8 workers, some of
them faulty, with the plain mean, simple remedies, robust aggregation and `gaf_optax`.
It prints accuracies, and how far each arm is behind the best rival. `--task` names
other data and models. `--find` measures how soon `sources(state)` shows a fault that
begins in the middle of a run.
"""

import argparse
import functools
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

import byte_text
import byte_training
import charts
import features
import gaf_optax
import report
from gaf_optax import worker_momentum
from robust import ARMS, RECOMMENDED, RIVALS, Arm
from shared import UserError, data

STEPS = 400
DECAY = 0.9  # of the momentum, in the optimizer or at the workers
FAULTY = (0, 3, 5, 10)  # The faulty workers are a prefix; 0 is always among them.
OWN_CLASSES = 3  # preferred by a worker, in settings where workers differ
REFRESH = 100  # steps after which stale workers get new parameters
BYTES = 32  # in a window of the language model
FLIP_RATE = 1e-3  # share of a backward product's values with one bit flipped


class Task(NamedTuple):
  """Data, and the model that is trained on them."""

  x: np.ndarray  # inputs `[n, ...]`
  y: np.ndarray  # classes, int `[n]`, or for each byte `[n, length]`
  test_x: np.ndarray
  test_y: np.ndarray
  init: Callable  # from a key to the parameters
  logits: Callable  # `(params, x, product)`; `product` is the matmul of one layer
  rows: int  # in a microbatch
  learning_rate: float  # with SGD and momentum 0.9; Adam's is a tenth
  seeds: int


class Setting(NamedTuple):
  """What all arms of a table have in common."""

  num_faulty: int = 2
  workers: int = 8
  frequency: float = 1.0  # share of the steps in which a faulty worker is wrong
  optimizer: str = "sgd"
  own: float = 0.0  # share of a worker's examples from its preferred classes


def load(name: str, data_dir: str) -> Task:
  """Digits for an MLP or a ResNet, features of 10,000 images of CIFAR-10, or bytes."""
  if name == "bytes":
    text, model = byte_text.load(), byte_training.ByteTransformer(width=32, depth=1)
    # Training windows are about 500 bytes apart.
    windows = np.lib.stride_tricks.sliding_window_view(text.training, BYTES + 1)[::499]
    tests = text.validation.reshape(-1, BYTES + 1)
    start = functools.partial(model.init, tokens=windows[:1])
    data_of = *_pairs(windows), *_pairs(tests)
    return Task(*data_of, start, functools.partial(transformer, model), 2, 0.04, 3)
  if name == "patches":
    found = data.load("cifar10", data_dir)
    images = found.train_images[:10_000], found.test_images[:2_000]
    x, test_x = (part.reshape(len(part), -1) for part in features.of_patches(*images))
    labels = found.train_labels[:10_000], found.test_labels[:2_000]
    start = functools.partial(init, sizes=(x.shape[1], 32, 10))
    return Task(x, labels[0], test_x, labels[1], start, forward, 16, 0.005, 5)
  found = data.load("digits", data_dir)
  scaled = lambda images: images.astype(np.float32) / 16
  x, test_x = scaled(found.train_images), scaled(found.test_images)
  labels = found.train_labels, found.test_labels
  if name == "resnet":
    return Task(x, labels[0], test_x, labels[1], init_resnet, resnet, 4, 0.02, 3)
  x, test_x = (part.reshape(len(part), -1) for part in (x, test_x))
  start = functools.partial(init, sizes=(64, 32, 32, 10))
  return Task(x, labels[0], test_x, labels[1], start, forward, 8, 0.02, 5)


def _pairs(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  return windows[:, :-1], windows[:, 1:].astype(np.int32)


def draw(task: Task, setting: Setting, steps: int, seed: int) -> np.ndarray:
  """Indices of each worker's examples, int32 `[steps, workers, rows]`."""
  rng = np.random.default_rng(seed)
  shape = steps, setting.workers, task.rows
  drawn = rng.integers(len(task.y), size=shape, dtype=np.int32)
  for worker in range(setting.workers if setting.own else 0):
    classes = rng.choice(task.y.max() + 1, OWN_CLASSES, replace=False)
    own = rng.choice(np.flatnonzero(np.isin(task.y, classes)), (steps, task.rows))
    chosen = rng.random((steps, task.rows)) < setting.own
    drawn[:, worker] = np.where(chosen, own, drawn[:, worker])
  return drawn


# Models. `product` replaces the matrix product of one layer.


def init(key: jax.Array, sizes: Sequence[int]) -> list[tuple[jax.Array, jax.Array]]:
  return [
    (jax.random.normal(k, (a, b)) * (2 / a) ** 0.5, jnp.zeros(b))
    for k, a, b in zip(jax.random.split(key, len(sizes)), sizes, sizes[1:])
  ]


def forward(params, x, product: Callable = jnp.matmul) -> jax.Array:
  """Logits of an MLP."""
  for i, (kernel, bias) in enumerate(params):
    x = (product if i == 1 else jnp.matmul)(jax.nn.relu(x) if i else x, kernel) + bias
  return x


WIDTHS = (8, 16, 32)  # of the ResNet's blocks, each of two convolutions


def init_resnet(key: jax.Array):
  channels = 1, WIDTHS[0], *(width for width in WIDTHS for _ in range(2))
  shapes = [(9 * a, b) for a, b in itertools.pairwise(channels)] + [(WIDTHS[-1], 10)]
  keys = jax.random.split(key, len(shapes))
  return [init(k, shape)[0][0] for k, shape in zip(keys, shapes)]


def resnet(params, x, product: Callable = jnp.matmul) -> jax.Array:
  """Logits of images `[n, h, w, 1]`.

  Each example is normalized individually. With BatchNorm, a gradient would depend on
  other microbatches, or on statistics that workers share.
  """
  stem, *kernels, head = params
  x = jax.nn.relu(_normalized(_convolution(x, stem)))
  for i, (first, second) in enumerate(zip(kernels[::2], kernels[1::2])):
    stride = 2 if i else 1
    y = _convolution(x, first, stride, product if i == 1 else jnp.matmul)
    y = _normalized(_convolution(jax.nn.relu(_normalized(y)), second))
    # As in arXiv 1512.03385, option A: new channels of a shortcut are zeros.
    more = y.shape[-1] - x.shape[-1]
    shortcut = jnp.pad(x[:, ::stride, ::stride], [(0, 0)] * 3 + [(0, more)])
    x = jax.nn.relu(shortcut + y)
  return jnp.mean(x, axis=(1, 2)) @ head


def _convolution(x, kernel, stride=1, product=jnp.matmul):
  """3 x 3 convolution, as a product of patches and a kernel `[9 c, channels]`."""
  (_, h, w, _), padded = x.shape, jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
  shifts = [(slice(i, i + h, stride), slice(j, j + w, stride)) for i, j in _PLACES]
  patches = jnp.concatenate([padded[:, i, j] for i, j in shifts], axis=-1)
  out = product(patches.reshape(-1, patches.shape[-1]), kernel)
  return out.reshape(*patches.shape[:-1], -1)


_PLACES = [(i, j) for i in range(3) for j in range(3)]


def _normalized(x):
  mean, variance = (f(x, axis=(1, 2, 3), keepdims=True) for f in (jnp.mean, jnp.var))
  return (x - mean) / jnp.sqrt(variance + 1e-5)


def transformer(model, params, tokens, product: Callable = jnp.matmul) -> jax.Array:
  """Logits of a `ByteTransformer`; the layer is the second of its MLP."""

  def call(method, args, kwargs, context):
    if context.module.name != "Dense_3":
      return method(*args, **kwargs)
    layer, (x,) = context.module.variables["params"], args
    out = product(x.reshape(-1, x.shape[-1]), layer["kernel"])
    return out.reshape(*x.shape[:-1], -1) + layer["bias"]

  with nn.intercept_methods(call):
    return model.apply(params, tokens)


def flip_bits(key: jax.Array, x: jax.Array, rate: Any, bfloat16: Any) -> jax.Array:
  """x with one random bit flipped in a share `rate` of the values.

  With `bfloat16`, x is first rounded to bfloat16, the upper half of a float32.
  """
  lowest = jnp.where(bfloat16, 16, 0).astype(jnp.uint32)
  drawn = jax.random.bits(key, x.shape)  # 27 bits decide whether, 5 which.
  hit = (drawn >> 5) < rate * 2**27
  flips = jnp.where(hit, jnp.uint32(1) << (lowest + drawn % (32 - lowest)), 0)
  x = jnp.where(bfloat16, x.astype(jnp.bfloat16).astype(jnp.float32), x)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) ^ flips
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


@jax.custom_vjp
def flaky_matmul(x, kernel, key, rate, bfloat16):
  """A matrix product with bit flips in both products of its backward pass."""
  return x @ kernel


def _flaky_backward(saved, cotangent):
  x, kernel, key, *how = saved
  keys = jax.random.split(key)
  d_x = flip_bits(keys[0], cotangent @ kernel.T, *how)
  return d_x, flip_bits(keys[1], x.T @ cotangent, *how), None, None, None


flaky_matmul.defvjp(lambda *args: (args[0] @ args[1], args), _flaky_backward)


# Faults.


class Step(NamedTuple):
  """Inputs of a faulty worker, for all workers; it uses its own row."""

  key: jax.Array
  grads: jax.Array  # float32 `[k, P]`
  layer: slice  # the first layer's kernel, in P
  healthy: jax.Array  # bool `[k]`


def _for_all(row, like):
  return jnp.broadcast_to(row, like.shape)


def _noise(key, like):
  drawn = jax.random.normal(key, like.shape)
  length = lambda x: jnp.linalg.norm(x, axis=1, keepdims=True)
  return drawn * length(like) / length(drawn)


def honest_statistics(sent: jax.Array, healthy: jax.Array):
  """Mean and standard deviation (with n - 1) of the healthy rows, `[P]` each."""
  number, mask = jnp.sum(healthy), healthy[:, None]
  mean = jnp.sum(jnp.where(mask, sent, 0), axis=0) / number
  squares = jnp.where(mask, sent - mean, 0) ** 2
  return mean, jnp.sqrt(jnp.sum(squares, axis=0) / (number - 1))


# Vectors of adversaries that know the healthy workers' vectors (momentum, if any).
# As in ByzFL, commit 69bd1ac (2025-06-06); 1.5 is the default there.
ATTACKS: dict[str, Callable[..., jax.Array]] = {
  "-0.5 x mean": lambda mean, deviation: -0.5 * mean,
  "a little": lambda mean, deviation: mean + 1.5 * deviation,
}

# Wrong gradients, which a worker's momentum averages like right ones.
FAULTS: dict[str, Callable[[Step], jax.Array]] = {
  "none": lambda s: s.grads,
  "sign flipped": lambda s: -s.grads,
  "times -10": lambda s: -10 * s.grads,
  "times 100": lambda s: 100 * s.grads,
  "noise": lambda s: _noise(s.key, s.grads),
  "one layer noise": lambda s: s.grads.at[:, s.layer].set(
    10 * _noise(s.key, s.grads[:, s.layer])
  ),
  "zero": lambda s: jnp.zeros_like(s.grads),
  "duplicated": lambda s: _for_all(s.grads[-1], s.grads),
  "NaN": lambda s: jnp.full_like(s.grads, jnp.nan),
  # The same as "a little" where workers have no momentum.
  "a little, averaged": lambda s: _for_all(
    ATTACKS["a little"](*honest_statistics(s.grads, s.healthy)), s.grads
  ),
}


class Flaw(NamedTuple):
  """Errors in a worker's computation; scalars."""

  stale: Any  # bool, whether its parameters are up to `REFRESH` steps old
  rate: Any  # share of a backward product's values with one random bit flipped
  bfloat16: Any  # bool, whether these products are rounded to bfloat16


# Likewise, but from a wrong computation.
FLAWS = {
  "bit flips": Flaw(False, FLIP_RATE, False),
  "bit flips bf16": Flaw(False, FLIP_RATE, True),
  "stale": Flaw(True, 0.0, False),
}
NAMES = (*FAULTS, *FLAWS, *ATTACKS)


# Training.


def first_kernel(params: Any) -> slice:
  """Slice of the first layer's kernel in the flat parameters."""
  leaves = jax.tree.leaves(params)
  kernel = [leaf.ndim > 1 for leaf in leaves].index(True)
  ends = np.cumsum([0, *(leaf.size for leaf in leaves)])
  return slice(*ends[kernel : kernel + 2])


def make_train(
  task: Task, arm: str, workers: int, optimizer: str, krum: int, watch: bool = False
) -> Callable:
  """A jitted function `(seeds, drawn, fault, faulty, frequency, onset)` of one arm.

  `seeds` `[n]` and `drawn` `[n, steps, k, rows]` are mapped over. `fault` is an index
  in `NAMES`. It begins at step `onset` in the workers `faulty`, bool `[k]`. Some arms
  are told their number; Krum needs it at compile time. Returns accuracy and loss `[n]`,
  and with `watch` the results of `sources`.
  """
  start = task.init(jax.random.key(0))
  _, unravel = ravel_pytree(start)
  layer = first_kernel(start)
  at_worker, k = arm.startswith("momentum"), workers
  then = optax.sgd(task.learning_rate, momentum=DECAY)
  if optimizer == "adam":
    then = optax.adam(task.learning_rate / 10)
  worker = optax.identity()
  if at_worker:
    worker = worker_momentum(DECAY, num_microbatches=k)
    then = optax.sgd(task.learning_rate / (1 - DECAY))
    if optimizer == "adam":
      then = optax.adam(task.learning_rate / 10, b1=0)
  arrays = tuple(map(jnp.asarray, task[:4]))
  flaws = list(map(jnp.asarray, zip(*FLAWS.values())))

  def loss(params, x, y, product=jnp.matmul):
    out = task.logits(params, x, product)
    return optax.softmax_cross_entropy_with_integer_labels(out, y).mean()

  def gradients(params, x, y, key=None, flaw=None):
    def one(x, y, key):
      product = jnp.matmul
      if flaw:
        product = lambda a, b: flaky_matmul(a, b, key, flaw.rate, flaw.bfloat16)
      return ravel_pytree(jax.grad(loss)(unravel(params), x, y, product))[0]

    return jax.vmap(one)(x, y, jax.random.split(key, k) if flaw else None)

  def run(seed, drawn, fault, faulty, frequency, onset):
    x, y, test_x, test_y = arrays
    told = krum if "Krum" in arm else jnp.sum(faulty)
    tx = optax.chain(*ARMS[arm](Arm(then, k, told, unravel)))
    keys = jax.random.split(jax.random.key(seed), 2)
    params = ravel_pytree(task.init(keys[0]))[0]
    flaw = Flaw(*(column[jnp.maximum(fault - len(FAULTS), 0)] for column in flaws))
    attack = jnp.maximum(fault - len(FAULTS) - len(FLAWS) + 1, 0)
    kind = jnp.where(attack > 0, 0, jnp.minimum(fault, len(FAULTS)))

    def step(carry, inputs):
      params, old, worker_state, state = carry
      t, rows = inputs
      key, when = jax.random.split(jax.random.fold_in(keys[1], t))
      old = jnp.where(t % REFRESH == 0, params, old)
      grads = gradients(params, x[rows], y[rows])
      wrong = faulty & (t >= onset)
      wrong &= jax.random.bernoulli(when, frequency, (k,))
      at_hand = Step(key, grads, layer, ~wrong)

      def computed():
        start = jnp.where(flaw.stale, old, params)
        return gradients(start, x[rows], y[rows], key, flaw)

      # The indices do not depend on the seed, so only one branch of a switch runs.
      branches = [lambda f=f: f(at_hand) for f in FAULTS.values()]
      found = jax.lax.switch(kind, [*branches, computed])
      grads = jnp.where(wrong[:, None], found, grads)
      sent, worker_state = worker.update(grads, worker_state, params)
      branches = [
        lambda f=f: _for_all(f(*honest_statistics(sent, ~wrong)), sent)
        for f in ATTACKS.values()
      ]
      lies = jax.lax.switch(attack, [lambda: sent, *branches])
      sent = jnp.where(wrong[:, None], lies, sent)
      updates, state = tx.update(sent, state, params)
      seen = None
      if watch:
        fields = {name: optax.tree.get(state, name) for name in ("accepted", "memory")}
        seen = gaf_optax.sources(state) | fields
      return (optax.apply_updates(params, updates), old, worker_state, state), seen

    first = params, params, worker.init(params), tx.init(params)
    steps = jnp.arange(len(drawn)), drawn
    (params, *_), seen = jax.lax.scan(step, first, steps)
    params = unravel(params)
    right = jnp.argmax(task.logits(params, test_x), axis=-1) == test_y
    return jnp.mean(right), loss(params, test_x, test_y), seen

  return jax.jit(jax.vmap(run, (0, 0, None, None, None, None)))


# Tables.

RARE = ("sign flipped", "times -10", "times 100", "noise", "NaN", *list(FLAWS)[:2])
_TOLD = ("trimmed mean, told", "multi-Krum, told")
SIMPLE = (
  *("plain mean", "mean, clipped at 1", "each clipped at 1", "apply_if_finite"),
  *("jumps of the norm skipped", *_TOLD, "centered clipping", *RECOMMENDED),
)
ROBUST = (
  *("plain mean", *_TOLD, "centered clipping", "NNM, trimmed mean, told"),
  *("momentum: multi-Krum, told", "momentum: NNM, trimmed mean, told", *RECOMMENDED),
)
WITH_ADAM = (*SIMPLE[:2], _TOLD[0], "centered clipping", RECOMMENDED[0])
ALIKE = ("2 of 8", "1 of 8", "3 of 8")  # The target is about these.
SETTINGS: dict[str, tuple[Setting, Sequence[str], Sequence[str]]] = {
  "2 of 8": (Setting(2), tuple(ARMS), NAMES),
  "1 of 8": (Setting(1), tuple(ARMS), NAMES),
  "3 of 8": (Setting(3), tuple(ARMS), NAMES),
  "2 of 8, 10 % of the steps": (Setting(frequency=0.1), SIMPLE, RARE),
  "2 of 8, 1 % of the steps": (Setting(frequency=0.01), SIMPLE, RARE),
  "2 of 8, 30 % own classes": (Setting(own=0.3), ROBUST, NAMES),
  "2 of 8, 70 % own classes": (Setting(own=0.7), ROBUST, NAMES),
  "2 of 8, Adam": (Setting(optimizer="adam"), tuple(ARMS), NAMES),
  "2 of 8, Adam, 1 % of the steps": (Setting(2, 8, 0.01, "adam"), WITH_ADAM, RARE),
  "4 of 16": (Setting(4, 16), ROBUST[-4:], NAMES),
}


# The other tasks cost ten times as much.
SOME = (
  *(*ROBUST, "mean, clipped at 1", "each clipped at 1", "geometric median"),
  "momentum: trimmed mean, told",
)
TASKS: dict[str, dict[str, tuple[Setting, Sequence[str], Sequence[str]]]] = {
  "digits": SETTINGS,
  "patches": {"2 of 8": (Setting(), SOME, NAMES)},
  "resnet": {"2 of 8": (Setting(), SOME, NAMES)},
  "bytes": {"2 of 8, Adam": (Setting(optimizer="adam"), SOME, NAMES)},
}


def measure(
  name: str, task: Task, settings: dict, steps: int, path: pathlib.Path
) -> list[dict]:
  """A line for each case, with all seeds; each is written when it is ready."""
  lines: list[dict[str, Any]] = []
  programs: dict[tuple, Callable] = {}
  total = sum(len(arms) * len(faults) for _, arms, faults in settings.values())
  bar = tqdm.tqdm(total=total, desc=name)
  for title, (setting, arms, faults) in settings.items():
    seeds = np.arange(task.seeds)
    drawn = np.stack([draw(task, setting, steps, seed) for seed in seeds])
    faulty = np.isin(np.arange(setting.workers), FAULTY[: setting.num_faulty])
    for arm in arms:
      krum = setting.num_faulty if "Krum" in arm else 0
      key = arm, setting.workers, setting.optimizer, krum
      if key not in programs:
        programs[key] = make_train(task, *key)
      for fault in faults:
        args = NAMES.index(fault), faulty, setting.frequency, 0
        accuracy, final_loss, _ = programs[key](seeds, drawn, *args)
        line = dict(task=name, setting=title, fault=fault, arm=arm)
        line |= {f"accuracy {i}": f"{x:.4f}" for i, x in enumerate(accuracy)}
        lines.append(line | {f"loss {i}": f"{x:.4g}" for i, x in enumerate(final_loss)})
        bar.update()
      report.write_csv(path, lines)
  return lines


Cases = dict[tuple[str, str], dict[str, np.ndarray]]
BITS = 8.0  # in a byte: the loss of a uniform guess; NaN and larger losses count as 8


def by_case(lines: Sequence[dict]) -> Cases:
  """Scores `[seeds]` of each arm, by setting and fault: accuracies, higher is better.

  For bytes, a score is minus the validation loss in bits per byte.
  """
  found: Cases = {}
  for line in lines:
    column = "loss" if line["task"] == "bytes" else "accuracy"
    values = np.array([float(x) for n, x in line.items() if n.startswith(column)])
    if column == "loss":
      values = -np.fmin(values / np.log(2), BITS)
    found.setdefault((line["setting"], line["fault"]), {})[line["arm"]] = values
  return found


def behind(cases: Cases) -> dict[str, dict[tuple[str, str], report.Difference]]:
  """How far the best rival of each case is ahead of each arm, paired by seed."""
  found: dict = {}
  for case, arms in cases.items():
    best = max((arm for arm in arms if arm in RIVALS), key=lambda a: arms[a].mean())
    for arm, values in arms.items():
      found.setdefault(arm, {})[case] = report.Difference.of(arms[best], values)
  return found


def table(cases: Cases, setting: str) -> str:
  """Mean accuracies, or losses, of all arms and faults."""
  faults = [fault for title, fault in cases if title == setting]
  rows = [["mean", *faults]]
  for arm in cases[setting, faults[0]]:
    rows.append([arm, *(f"{abs(cases[setting, f][arm].mean()):.3f}" for f in faults)])
  return report.aligned(rows)


def summary(cases: Cases) -> str:
  """How far each arm is behind the best rival on average and at worst, and where."""
  rows = [["behind the best rival", "cases", "on average", "at worst", "in"]]
  others = [(title,) for title in SETTINGS if title not in ALIKE]
  for titles in (ALIKE, *others):
    some = {case: arms for case, arms in cases.items() if case[0] in titles}
    if some:
      rows.append([f"**{', '.join(dict.fromkeys(s for s, _ in some))}**", *[""] * 4])
    for arm, found in behind(some).items():
      worst = max(found, key=lambda case: found[case].mean)
      average = np.mean([difference.mean for difference in found.values()])
      where = ", ".join(worst[::-1]) if titles == ALIKE else worst[1]
      rows.append([arm, str(len(found)), f"{average:+.3f}", str(found[worst]), where])
  return report.aligned(rows)


def picture(path: pathlib.Path, cases: Cases, title: str) -> None:
  """How far each arm is behind the best rival, in colours."""
  setting = next(iter(cases))[0]
  found = behind({case: arms for case, arms in cases.items() if case[0] == setting})
  values = np.array([[d.mean for d in row.values()] for row in found.values()])
  figure = Figure(figsize=(10, 8), layout="constrained")
  axes = figure.subplots()
  unit = "bits per byte" if title == "bytes" else "accuracy"
  image = axes.imshow(values, cmap="viridis_r", vmin=0, vmax=0.05, aspect="auto")
  figure.colorbar(image, extend="max", label=f"{unit} behind the best rival")
  names = [fault for title, fault in cases if title == setting]
  slanted = dict(rotation=60, ha="right", rotation_mode="anchor")
  axes.set_xticks(range(len(names)), names, **slanted)
  axes.set_yticks(range(len(found)), list(found))
  for (row, column), value in np.ndenumerate(values):
    color = "white" if value > 0.025 else "black"
    place = dict(ha="center", va="center", fontsize=7, color=color)
    axes.text(column, row, f"{value:.3f}".replace("0.", "."), **place)
  axes.set_title(f"{title}: faulty workers, {setting}")
  charts.save(figure, path)


# Finding the faulty worker.

# Agreement is low below half of the workers' median, if that is above 0.03: healthy
# workers differ by a standard deviation of about 0.01.
LOW, LEAST_MEDIAN = 0.5, 0.03
LASTING = (1, 20, 50)  # steps
LEAST_STEPS = 20  # in the memory's average
COPIES = (0.8, 0.9)  # cosine of two workers in the memory


def lasting(found: np.ndarray, number: int) -> np.ndarray:
  """Whether `found` `[n, steps, k]` is true in the last `number` steps."""
  total = np.cumsum(found, axis=1)
  total[:, number:] -= total[:, :-number].copy()
  return total == number


def accused(seen: dict[str, Any]) -> dict[str, np.ndarray]:
  """Bool `[n, steps, k]` by signal, from `sources` and the memory."""
  known, agreement = seen["num_steps"] >= LEAST_STEPS, seen["agreement"]
  typical = np.median(agreement, axis=-1, keepdims=True)
  low = known & (typical > LEAST_MEDIAN) & (agreement < LOW * typical)
  found = {f"agreement low in {n} steps": lasting(low, n) for n in LASTING}
  found["rejected in 50 steps"] = lasting(~seen["accepted"], 50)
  others = ~np.eye(known.shape[-1], dtype=bool)
  nearest = np.max(seen["memory"].mean[:, :, 0], axis=-1, where=others, initial=-1)
  return found | {f"copy, cosine above {c}": known & (nearest > c) for c in COPIES}


def delays(found: np.ndarray, onset: int) -> np.ndarray:
  """Steps from the onset to the first accusation, `[n]`; inf without one."""
  later = found[:, onset:]
  return np.where(later.any(axis=1), later.argmax(axis=1) + 1, np.inf)


def find(name: str, task: Task, runs: int, steps: int) -> list[dict[str, Any]]:
  """A line for each fault, signal, and arm with a memory; worker 0 is faulty.

  The fault begins half-way. The last lines are of runs without faults: with equal
  sources, with sources that differ, and ten times as long.
  """
  lines = []
  cases = [(fault, 0.0, steps) for fault in NAMES[1:]]
  cases += [("none", own, steps) for own in (0.0, 0.3, 0.7)]
  cases += [("none", 0.0, 10 * steps)]
  bar = tqdm.tqdm(total=len(RECOMMENDED) * len(cases), desc=f"{name}, finding")
  for arm in RECOMMENDED:
    program = make_train(task, arm, 8, "sgd", 0, watch=True)
    for fault, own, length in cases:
      seeds, onset = np.arange(runs), length // 2
      drawn = np.stack([draw(task, Setting(own=own), length, s) for s in seeds])
      faulty = np.arange(8) < (fault != "none")
      seen = program(seeds, drawn, NAMES.index(fault), faulty, 1.0, onset)[2]
      for signal, wrong in accused(jax.device_get(seen)).items():
        steps_needed, healthy = delays(wrong[..., 0], onset), wrong[..., faulty.sum() :]
        line = dict(task=name, arm=arm, fault=fault, own=own, steps=length)
        line |= dict(signal=signal, runs=runs, found=0, median="", most="")
        if faulty.any():
          line["found"] = int(np.isfinite(steps_needed).sum())
          line |= dict(median=np.median(steps_needed), most=steps_needed.max())
        line |= dict(false_alarms=int(healthy.sum()), worker_steps=healthy.size)
        lines.append(line | dict(false_in_runs=int(healthy.any(axis=(1, 2)).sum())))
      bar.update()
  return lines


def found_table(lines: Sequence[dict[str, Any]]) -> str:
  """Median and largest number of steps, or runs with a false alarm."""
  signals = list(dict.fromkeys(line["signal"] for line in lines))
  rows: dict[tuple, list[str]] = {}
  for line in lines:
    said = f"{line['median']} ({line['most']})"
    if line["fault"] == "none":
      said = f"{line['false_in_runs']} of {line['runs']} runs"
    case = line["arm"], f"{line['fault']}, {line['own']} own, {line['steps']} steps"
    rows.setdefault(case, list(case)).append(said)
  return report.aligned([["arm", "fault", *signals], *rows.values()])


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--task", choices=TASKS, default="digits")
  parser.add_argument("--quick", action="store_true", help="40 steps and two seeds")
  parser.add_argument("--find", action="store_true", help="how soon a fault is shown")
  parser.add_argument("--data-dir", default="data", help="where CIFAR-10 is")
  parser.add_argument(
    "--out", type=pathlib.Path, default="runs/faults", help="a folder"
  )
  parser.add_argument("--keep", type=pathlib.Path, help="the same, in place of --out")
  options = parser.parse_args(argv)
  try:
    task = load(options.task, options.data_dir)
  except UserError as error:
    print(f"{options.task} is skipped: {error}")
    return
  task = task._replace(seeds=2) if options.quick else task
  steps = 40 if options.quick else STEPS
  out = options.keep or options.out
  out.mkdir(parents=True, exist_ok=True)
  if options.find:
    lines = find(options.task, task, 2 if options.quick else 50, steps)
    path = out / f"faults-{options.task}-found.csv"
    report.write_csv(path, lines)
    print(found_table(lines))
  else:
    path = out / f"faults-{options.task}.csv"
    cases = by_case(measure(options.task, task, TASKS[options.task], steps, path))
    print(table(cases, next(iter(cases))[0]), summary(cases), sep="\n\n")
    picture(path.with_suffix(".png"), cases, options.task)
  print(f"All runs are in {path}.")


if __name__ == "__main__":
  main()
