"""Steps: soft weights, wrong sources, plateaus and devices, against gradients by hand.

The gradient of each microbatch is taken by itself, of inputs made in NumPy; what
becomes of them is computed in NumPy too, in double precision.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import batches
import data
import gaf_optax
import models
import options
import plan
import training
from common import arms, devices

pytestmark = [
  pytest.mark.experiments,
  pytest.mark.usefixtures("quickly_compiled"),
]
_K, _SIZE = 4, 6
_CONTROLLED = (plan.PLAIN, *plan.gaf_arms(_K, tau=0.9))
_WIDTH = 4


@pytest.fixture(scope="module")
def images():
  """A small data set in colour; the labels can be read from the images."""
  rng = np.random.default_rng(0)
  labels = np.arange(300, dtype=np.int32) % 3
  pixels = rng.integers(0, 120, (300, 6, 6, 3)) + 40 * labels[:, None, None, None]
  pixels = pixels.astype(np.uint8)
  held_out = pixels[::-1][:70], labels[::-1][:70]
  return data.Dataset(
    *(pixels, labels, pixels[:50], labels[:50]),
    *(3, 255.0, (0.3, 0.4, 0.5), (0.2, 0.25, 0.3), (), *held_out),
  )


def _part(arms=(plan.PLAIN,), **changed):
  settings = dict(
    model="mlp",
    width=_WIDTH,
    depth=1,
    optimizer="sgd",
    learning_rate=0.1,
    label_noise=0.3,
    microbatch_size=_SIZE,
    num_microbatches=_K,
    steps=20,
    seeds=1,
  )
  return plan.Part(name="x", title="", arms=tuple(arms), **{**settings, **changed})


def _schedule(part, dataset):
  base = np.concatenate([dataset.train_labels, dataset.validation_labels])
  return batches.Schedule(part, dataset, base, 0)


def _seen(part, dataset, start, stop, clean=False):
  return _schedule(part, dataset).batches(start, stop, clean)


def _normalized(dataset, pixels):
  return (pixels / dataset.scale - np.array(dataset.mean)) / np.array(dataset.std)


@jax.jit
def _gradient(params, x, y):
  def loss(params):
    model = models.MLP(3, _WIDTH, 1)
    logits = model.apply({"params": params}, x, train=True)
    if y.ndim > 1:
      return -jnp.sum(y * jax.nn.log_softmax(logits), axis=1).mean()
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

  return jax.grad(loss)(params)


def _gradients(params, x, y):
  """Of each microbatch, in double precision."""
  each = [_gradient(params, jnp.float32(a), b) for a, b in zip(x, y)]
  return [jax.tree.map(lambda g: np.asarray(g, float), one) for one in each]


def _mean(grads, weights):
  shares = np.array(weights, float) / np.sum(weights)
  return jax.tree.map(lambda *g: sum(s * x for s, x in zip(shares, g)), *grads)


def _host(tree):
  return jax.tree.map(np.array, tree)


def _assert_close(found, expected, tolerance=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=tolerance),
    found,
    expected,
  )


def _is_close(found, expected):
  same = jax.tree.map(lambda a, b: np.allclose(a, b, 1e-4, 1e-5), found, expected)
  return all(jax.tree.leaves(same))


def _flat(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _distance(a, b):
  return 1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))


def _by_hand(rule, vectors, tau, softness, start=0):
  """Weights and what is accepted, by the definitions; a sequence begins at `start`."""
  k = len(vectors)
  soft = lambda d: _sigmoid((tau - d) / softness)
  first, *others = np.roll(np.arange(k), -start)
  if rule == "sequential":
    s, weights, accepted = vectors[first], np.eye(k)[first], np.arange(k) == first
    for i in others:
      d = _distance(s, vectors[i])
      weights[i], accepted[i] = soft(d), d <= tau
      s = s + weights[i] * vectors[i]
  elif rule == "leave_one_out":
    total = np.sum(vectors, axis=0)
    d = np.array([_distance(v, total - v) for v in vectors])
    weights, accepted = soft(d), d <= tau
  elif rule == "most_neighbors":
    d = np.array([[_distance(a, b) for b in vectors] for a in vectors])
    np.fill_diagonal(d, 0)
    center = np.argmax((d <= tau).sum(axis=1))
    weights, accepted = soft(d[center]), d[center] <= tau
    weights[center] = 1
  elif rule == "running_average":
    s, weights, accepted = vectors[first], np.eye(k)[first], np.arange(k) == first
    for i in others:
      accepted[i] = _distance(s, vectors[i]) <= tau
      if accepted[i]:
        s, weights = (s + vectors[i]) / 2, weights / 2 + np.eye(k)[i] / 2
  if accepted.sum() < 2:
    return np.zeros(k), np.zeros(k, bool)
  return weights, accepted


@pytest.mark.parametrize(
  "rule, tau, softness",
  [
    ("sequential", 0.7, 0.1),
    ("leave_one_out", 0.8, 0.1),
    ("most_neighbors", 0.7, 0.1),
    ("running_average", 0.8, 0.0),
  ],
)
def test_weights_in_the_trace_are_those_of_the_mean(images, rule, tau, softness):
  arm = arms.Arm("a", "a", tau=tau, rule=rule, softness=softness)
  part = _part([arm])
  trainer = training.Trainer(part, images)
  learner = trainer.init(arm, 1)
  numbers, patterns = set(), set()
  for step in range(12):
    seen = _seen(part, images, step, step + 1)
    params = _host(learner.params)
    x = _normalized(images, images.train_images[seen.indices[0]])
    grads = _gradients(params, x, seen.labels[0])
    vectors = [_flat(g) for g in grads]
    weights, accepted = _by_hand(rule, vectors, tau, softness, start=step % _K)
    learner, trace = trainer.advance(arm, learner, seen)
    np.testing.assert_array_equal(trace.accepted[0], accepted)
    # Only in proportion do they matter.
    if accepted.any():
      relative = weights / np.max(weights)
      np.testing.assert_allclose(trace.weights[0], relative, rtol=1e-3, atol=1e-4)
      mean = _mean(grads, weights)
      expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, mean)
      _assert_close(learner.params, expected)
      assert not _is_close(learner.params, params)
    else:
      np.testing.assert_array_equal(trace.weights[0], 0)
      jax.tree.map(np.testing.assert_array_equal, learner.params, params)
    numbers.add(int(accepted.sum()))
    in_order = np.roll(np.asarray(trace.weights[0], float), -step)
    patterns.add(tuple(np.round(in_order, 5)))
  assert 0 in numbers and len(numbers) > 2
  if rule == "running_average":
    assert (0.25, 0.25, 0.5, 1.0) in patterns


def _targets(labels, smoothing):
  """A share of each label spread over the three classes."""
  return (1 - smoothing) * np.eye(3)[labels] + smoothing / 3


def _losses(params, x, targets):
  """Of single examples."""
  logits = models.MLP(3, _WIDTH, 1).apply(
    {"params": params}, jnp.float32(x), train=True
  )
  logits = np.asarray(logits, float)
  own = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  return -np.sum(targets * own, axis=1)


def _of_examples(images, part, seen, params, smoothing=0.0):
  """Losses and whole gradients of each example of one step, inputs and targets."""
  x = _normalized(images, images.train_images[seen.indices[0]])
  x = x.reshape(-1, *x.shape[2:])
  targets = _targets(seen.labels[0].ravel(), smoothing)
  grads = _gradients(params, x[:, None], targets[:, None])
  return _losses(params, x, targets), grads, x, targets


def _share(step):
  """Of an image in its mixture: uniform, another one in each step."""
  return float(jax.random.uniform(jax.random.fold_in(jax.random.key(0), step)))


def _mixed_mean(params, step, x, targets, weights):
  """The gradient of mixtures of examples, in which each label has its weight.

  A mixture has the losses of two labels; they count as much as these have of it.
  """
  share, total, before = _share(step), np.sum(weights), np.roll(np.arange(len(x)), 1)
  mixtures = share * x + (1 - share) * x[before]
  terms = []
  for of_it, order in ((share, np.arange(len(x))), (1 - share, before)):
    grads = _gradients(params, mixtures[:, None], targets[order][:, None])
    terms += [
      jax.tree.map(lambda g: of_it * weights[i] / total * g, one)
      for i, one in zip(order, grads)
    ]
  return jax.tree.map(lambda *g: sum(g), *terms)


def test_shares_of_mixtures_are_uniform_and_others_in_each_step():
  shares = [_share(step) for step in range(300)]
  assert stats.kstest(shares, "uniform").pvalue > 1e-3
  x = np.arange(6, dtype=np.float32).reshape(3, 2)
  mixed, targets = training._mixed(7, x, np.eye(3, dtype=np.float32))
  share = _share(7)
  np.testing.assert_allclose(mixed, share * x + (1 - share) * x[[2, 0, 1]], rtol=1e-6)
  expected = share * np.eye(3) + (1 - share) * np.eye(3)[[2, 0, 1]]
  np.testing.assert_allclose(targets, expected, rtol=1e-6)


def _assert_evaluated(trainer, arm, learner, params, schedule):
  """The numbers of an evaluation are those of `params`, by hand."""
  found, dataset = trainer.evaluate(arm, learner, schedule), trainer._dataset
  noisy = schedule.validation_labels(arm.clean)
  for name, pixels, labels in (
    ("test", dataset.test_images, dataset.test_labels),
    ("validation", dataset.validation_images, noisy),
  ):
    x, targets = _normalized(dataset, pixels), np.eye(3)[labels]
    each = np.array([_losses(params, x, np.eye(3)[[c] * len(x)]) for c in range(3)])
    correct = np.mean(each.argmin(axis=0) == labels)
    assert found[f"{name}_accuracy"] == pytest.approx(correct)
    if name == "test":
      loss = _losses(params, x, targets).mean()
      assert found["test_loss"] == pytest.approx(loss, rel=1e-4)
  return found


@pytest.mark.parametrize(
  "ways",
  [{"smoothing": 0.3, "ema_decay": 0.3}, {"mixup": True}],
  ids=["smoothing and average", "mixup"],
)
def test_ways_of_the_plain_mean(images, ways):
  """Soft labels, mixtures and the average that is tested, by hand."""
  arm = arms.Arm("a", "a", **ways)
  part = _part([arm], learning_rate=0.5)
  trainer, schedule = training.Trainer(part, images), _schedule(part, images)
  learner = trainer.init(arm, 1)
  params = average = _host(learner.params)
  unchanged = 0
  for step in range(6):
    seen = schedule.batches(step, step + 1, False)
    x = _normalized(images, images.train_images[seen.indices[0]])
    targets = np.array([_targets(one, arm.smoothing) for one in seen.labels[0]])
    if arm.mixup:
      # Within each microbatch.
      ones = np.ones(_SIZE)
      grads = [_mixed_mean(params, step, *one, ones) for one in zip(x, targets)]
    else:
      grads = _gradients(params, x, targets)
    usual = _mean(_gradients(params, x, seen.labels[0]), np.ones(_K))
    mean = _mean(grads, np.ones(_K))
    unchanged += _is_close(mean, usual)
    params = jax.tree.map(lambda p, g: p - 0.5 * g, params, mean)
    # At first a shorter average: 0.1, 0.18, 0.25, and from then on 0.3.
    decay = [0.1, 2 / 11, 0.25, 0.3, 0.3, 0.3][step]
    average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
    learner, _ = trainer.advance(arm, learner, seen)
    _assert_close(learner.params, params)
  assert unchanged == 0
  tested = params
  if arm.ema_decay is None:
    assert learner.average is None
  else:
    _assert_close(learner.average[0], average)
    assert not _is_close(average, params)
    tested = average
  _assert_evaluated(trainer, arm, learner, tested, schedule)


@pytest.mark.parametrize(
  "ways", [{}, {"smoothing": 0.2, "mixup": True, "ema_decay": 0.5}], ids=["", "ways"]
)
def test_examples_are_compared_by_the_last_layer_with_their_nearest(images, ways):
  kind = dict(quantile=0.5, rule="nearest_neighbors", by_example=True)
  arm = arms.Arm("a", "a", **kind, **ways)
  part = _part([arm])
  trainer, kept = training.Trainer(part, images), set()
  learner = trainer.init(arm, 1)
  for step in range(4):
    seen = _seen(part, images, step, step + 1)
    params, average = _host(learner.params), _host((learner.average or [None])[0])
    losses, grads, x, targets = _of_examples(images, part, seen, params, arm.smoothing)
    heads = np.array([_flat(g["head"]) for g in grads])
    distances = np.array([[_distance(a, b) for b in heads] for a in heads])
    np.fill_diagonal(distances, np.inf)
    nearest = np.sort(distances, axis=1)[:, :5].mean(axis=1)
    accepted = nearest <= np.sort(nearest)[_K * _SIZE // 2 - 1]
    learner, trace = trainer.advance(arm, learner, seen)
    np.testing.assert_array_equal(trace.accepted[0], accepted)
    assert trace.loss[0] == pytest.approx(losses.mean(), rel=1e-5)
    assert trace.distance[0] == pytest.approx(nearest.mean(), rel=1e-4)
    assert trace.threshold[0] == pytest.approx(nearest[accepted].max(), rel=1e-4)
    mean = _mean(grads, accepted)
    if arm.mixup:
      mean = _mixed_mean(params, step, x, targets, accepted)
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, mean)
    _assert_close(learner.params, params)
    if average is not None:
      decay = min(0.5, (1 + step) / (10 + step))
      average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
      _assert_close(learner.average[0], average)
    kept.add(accepted.tobytes())
  assert len(kept) == 4


@pytest.mark.parametrize(
  "control, mixup, step",
  [
    ("choice", True, 0),
    # At first all take part: the losses of a new network say little.
    ("loss", False, training.WARM_UP - 1),
    ("loss", False, training.WARM_UP),
  ],
)
def test_controls_of_examples(images, control, mixup, step):
  gaf, *controls = plan.gaf_arms(_K, quantile=0.5, mixup=mixup, **plan.BY_EXAMPLE)
  (arm,) = (one for one in controls if one.control == control)
  part = _part([plan.PLAIN, gaf, *controls], steps=step + 1)
  trainer = training.Trainer(part, images)
  learner = trainer.init(arm, 0)
  params = _host(learner.params)
  seen = _seen(part, images, step, step + 1)
  losses, grads, *shown = _of_examples(images, part, seen, params)
  chosen = np.zeros((1, _K * _SIZE), bool)
  chosen[0, [1, 5, 6, 20]] = True
  learner, trace = trainer.advance(
    arm, learner, seen, arms.Chosen(chosen, chosen.astype(np.float32))
  )
  accepted = chosen[0]
  if control == "loss":
    number = 4 if step >= training.WARM_UP else len(losses)
    accepted = losses <= np.sort(losses)[number - 1]
    assert np.any(accepted != chosen[0])
  np.testing.assert_array_equal(trace.accepted[0], accepted)
  mean = _mean(grads, accepted)
  if mixup:
    mean = _mixed_mean(params, step, *shown, accepted)
  _assert_close(learner.params, jax.tree.map(lambda p, g: p - 0.1 * g, params, mean))


def test_smallest_loss_of_microbatches(images):
  gaf, control = plan.gaf_arms(_K, ["loss"], tau=0.9)
  part = _part([plan.PLAIN, gaf, control], steps=training.WARM_UP + 1)
  trainer = training.Trainer(part, images)
  seen = _seen(part, images, training.WARM_UP, training.WARM_UP + 1)
  before, after = _applied(trainer, control, seen, [1, 0, 0, 1])
  x = _normalized(images, images.train_images[seen.indices[0]])
  losses = []
  for a, b in zip(x, seen.labels[0]):
    out = models.MLP(3, _WIDTH, 1).apply({"params": before}, jnp.float32(a), train=True)
    losses.append(optax.softmax_cross_entropy_with_integer_labels(out, b).mean())
  kept = np.array(losses) <= np.sort(losses)[1]
  mean = _mean(_gradients(before, x, seen.labels[0]), kept)
  _assert_close(after, jax.tree.map(lambda p, g: p - 0.1 * g, before, mean))


def test_smallest_mean_loss_of_sources_that_persist(images, monkeypatch):
  """The sources with the smallest running mean of all losses so far are kept."""
  assert training._MEMORY == 0.98
  monkeypatch.setattr(training, "_MEMORY", 0.8)
  monkeypatch.setattr(training, "WARM_UP", 2)
  gaf, control = plan.gaf_arms(_K, ["loss"], tau=0.9)
  part = _part([plan.PLAIN, gaf, control], wrong_sources=1, persistent=True)
  trainer, mean = training.Trainer(part, images), np.zeros(_K)
  learner, others = trainer.init(control, 0), 0
  assert trainer.init(plan.PLAIN, 0).source_losses is None
  for step in range(8):
    seen = _seen(part, images, step, step + 1)
    params, number = _host(learner.params), 1 + step % 3
    x = _normalized(images, images.train_images[seen.indices[0]])
    losses = [
      _losses(params, a, np.eye(3)[b]).mean() for a, b in zip(x, seen.labels[0])
    ]
    mean = 0.8 * mean + 0.2 * np.array(losses)
    kept = (mean <= np.sort(mean)[number - 1]) | (step < 2)
    others += step > 1 and np.any(kept != (losses <= np.sort(losses)[number - 1]))
    chosen = (np.arange(_K) < number)[None]
    chosen = arms.Chosen(chosen, chosen.astype(np.float32))
    learner, trace = trainer.advance(control, learner, seen, chosen)
    np.testing.assert_array_equal(trace.accepted[0], kept)
    np.testing.assert_allclose(learner.source_losses, mean, rtol=1e-4)
    gradient = _mean(_gradients(params, x, seen.labels[0]), kept)
    _assert_close(
      learner.params, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    )
  assert others


def _area(wrong, signal):
  """The share of pairs of a wrong and a right example that the signal orders so."""
  pairs = signal[wrong][:, None] - signal[~wrong][None]
  return np.mean(pairs > 0) + np.mean(pairs == 0) / 2


def test_areas_of_what_tells_wrong_labels_apart(images):
  """By hand, of the first 256 training images; and it can be told after some steps."""
  averaged = dataclasses.replace(plan.PLAIN, ema_decay=0.99)
  part = _part([averaged], learning_rate=0.3)
  trainer, schedule = training.Trainer(part, images), _schedule(part, images)
  learner = trainer.init(averaged, 0)
  for _ in range(3):
    learner, _ = trainer.advance(averaged, learner, schedule.batches(0, 20, False))
  found = trainer.evaluate(averaged, learner, schedule)
  params, wrong = _host(learner.params), schedule.mislabeled[:256]
  x = _normalized(images, images.train_images[:256])
  targets = np.eye(3)[schedule.labels[:256]]
  grads = _gradients(params, x[:, None], targets[:, None])
  heads = np.array([_flat(one["head"]) for one in grads])
  norms = np.linalg.norm(heads, axis=1)
  distances = 1 - heads @ heads.T / np.outer(norms, norms)
  np.fill_diagonal(distances, np.inf)
  nearest = np.sort(distances, axis=1)[:, :5].mean(axis=1)
  expected = {
    "auc/distance": nearest.round(6),  # Many are the same example to the last layer.
    "auc/loss": _losses(params, x, targets),
    "auc/gradient norm": norms,
  }
  assert {name for name in found if name.startswith("auc/")} == {*expected}
  for name, signal in expected.items():
    # Rounding may change places of a few.
    assert found[name] == pytest.approx(_area(wrong, signal), abs=2e-3)
    assert found[name] > 0.55
  # Not of an arm that is spared them, nor where nothing or everything is wrong.
  for arm, changed in (
    (plan.CLEAN, {}),
    (plan.PLAIN, {"label_noise": 0.0}),
    (plan.PLAIN, {"label_noise": 1.0}),
  ):
    other = _schedule(dataclasses.replace(part, **changed), images)
    found = trainer.evaluate(arm, learner._replace(average=None), other)
    assert found.keys() == {"test_loss", "test_accuracy", "validation_accuracy"}


def test_areas_by_running_statistics(images, monkeypatch, normed):
  monkeypatch.setitem(models.KINDS, "mlp", models.Kind(normed, normalizes=True))
  part = dataclasses.replace(_part(), depth=None)
  trainer, schedule = training.Trainer(part, images), _schedule(part, images)
  learner = trainer.init(plan.PLAIN, 0)
  learner, _ = trainer.advance(plan.PLAIN, learner, schedule.batches(0, 10, False))
  found = trainer.evaluate(plan.PLAIN, learner, schedule)
  params, kept = _host(learner.params), _host(learner.batch_stats)["BatchNorm_0"]
  x = _normalized(images, images.train_images[:256]).reshape(256, -1)
  hidden = x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
  hidden = (hidden - kept["mean"]) / np.sqrt(kept["var"] + 1e-5)
  hidden = hidden * params["BatchNorm_0"]["scale"] + params["BatchNorm_0"]["bias"]
  logits = hidden @ params["head"]["kernel"] + params["head"]["bias"]
  probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  errors = probabilities - np.eye(3)[schedule.labels[:256]]
  # The bias's gradient is the error, the kernel's its product with the hidden layer.
  norms = np.linalg.norm(errors, axis=1) * np.sqrt(1 + np.sum(hidden**2, axis=1))
  losses = -np.log(probabilities[np.arange(256), schedule.labels[:256]])
  wrong = schedule.mislabeled[:256]
  for name, signal in (("loss", losses), ("gradient norm", norms)):
    assert found[f"auc/{name}"] == pytest.approx(_area(wrong, signal), abs=2e-3)


def test_lines_of_the_metrics_file(images):
  """Of a step on: loss and distance; of all so far: counts, and rates of sources."""
  trainer = training.Trainer(_part(), images)
  accepted = np.array([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 1]], bool)
  numbers = np.float32([1, 2, 3, 5])
  distance = np.float32([0.5, np.nan, 0.25, 0.75])
  trace = training.Trace(
    *(numbers, distance, numbers / 10, np.int32([0, 2, 0, 1])),
    *(accepted, accepted.astype(np.float32), None),
  )
  expected = {
    "train_loss": 4.0,
    "cosine_distance": 0.5,
    "threshold": 0.5,
    "accept_rate": 7 / 12,
    "skipped_steps": 1,
    "nonfinite": 3,
  }
  assert trainer.row(trace, 2) == pytest.approx(expected)
  remembering = trace._replace(memory=np.zeros((4, 3, 3), np.float16))
  expected |= {f"source_{i + 1}/accept_rate": n / 4 for i, n in enumerate((2, 3, 2))}
  assert trainer.row(remembering, 2) == pytest.approx(expected)


def test_memory_in_the_trace_is_the_mean_of_all_cosines(images):
  arm = arms.Arm("a", "a", adaptive=True, rule="majority", memory_decay=0.5)
  part = _part([arm])
  trainer = training.Trainer(part, images)
  learner, total, weight = trainer.init(arm, 1), np.zeros((_K, _K)), 0.0
  for step in range(4):
    seen = _seen(part, images, step, step + 1)
    x = _normalized(images, images.train_images[seen.indices[0]])
    grads = _gradients(_host(learner.params), x, seen.labels[0])
    vectors = [_flat(g) for g in grads]
    cosines = np.array([[1 - _distance(a, b) for b in vectors] for a in vectors])
    total, weight = 0.5 * total + cosines, 0.5 * weight + 1
    learner, trace = trainer.advance(arm, learner, seen)
    np.testing.assert_allclose(trace.memory[0], total / weight, atol=2e-3)


def test_cosines_of_a_batch(images):
  arm = arms.Arm("a", "a", quantile=0.5, rule="nearest_neighbors", by_example=True)
  part = _part([arm])
  trainer = training.Trainer(part, images)
  learner, seen = trainer.init(arm, 1), _seen(part, images, 0, 1)
  _, grads, *_ = _of_examples(images, part, seen, _host(learner.params))
  heads = [_flat(g["head"]) for g in grads]
  expected = [[1 - _distance(a, b) for b in heads] for a in heads]
  np.testing.assert_allclose(trainer.cosines(learner, seen), expected, atol=1e-5)


def _applied(trainer, arm, seen, weights):
  """Parameters before and after one step, with the micro-gradients so weighted."""
  learner = trainer.init(arm, 0)
  before = _host(learner.params)
  weights = np.float32(weights)[None]
  chosen = arms.Chosen(weights > 0, weights)
  learner, _ = trainer.advance(arm, learner, seen, chosen)
  return before, _host(learner.params)


@pytest.mark.parametrize("kind, augment", [("pixels", True), ("normalization", False)])
def test_wrong_sources_see_something_wrong(images, kind, augment):
  wrong = dict(wrong_sources=1, wrong_kind=kind, label_noise=0.0)
  part = _part(_CONTROLLED, augment=augment, **wrong)
  trainer = training.Trainer(part, images)
  control = part.controls("sequential_tau0.9")["choice"]
  seen, spared = (_seen(part, images, 5, 6, clean) for clean in (False, True))
  (wrong,) = np.flatnonzero(seen.wrong[0])
  raw, labels = images.train_images[seen.indices[0]], seen.labels[0]
  if augment:
    moved = np.zeros_like(raw)
    for i, j in np.ndindex(_K, _SIZE):
      row, column, mirrored = seen.crops[0, i, j]
      padded = np.pad(raw[i, j], ((4, 4), (4, 4), (0, 0)))
      moved[i, j] = padded[row : row + 6, column : column + 6]
      if mirrored:
        moved[i, j] = moved[i, j, :, ::-1]
    raw = moved
  right = _normalized(images, raw)
  bad = right.copy()
  if kind == "normalization":
    bad[wrong] = raw[wrong]
  else:
    order = np.random.default_rng(0).permutation(36)
    bad[wrong] = right[wrong].reshape(_SIZE, 36, 3)[:, order].reshape(_SIZE, 6, 6, 3)
  for i in range(_K):
    before, after = _applied(trainer, control, seen, np.eye(_K)[i])

    def expected(x):
      (gradient,) = _gradients(before, x[i : i + 1], labels[i : i + 1])
      return jax.tree.map(lambda p, g: p - 0.1 * g, before, gradient)

    # Values of up to 255 make large gradients.
    _assert_close(after, expected(bad), 1e-4)
    assert _is_close(after, expected(right)) == (i != wrong)
    # The plain mean that is spared sees the same, with nothing wrong.
    _, after = _applied(trainer, control, spared, np.eye(_K)[i])
    _assert_close(after, expected(right))


def test_stale_sources_use_older_parameters(images, monkeypatch):
  """Those of the last step whose number is a multiple, here of 3."""
  monkeypatch.setattr(training, "_STALE_STEPS", 3)
  part = _part(wrong_sources=2, wrong_kind="stale", learning_rate=0.5)
  trainer = training.Trainer(part, images)
  for arm in (plan.PLAIN, plan.CLEAN):
    learner = trainer.init(arm, 0)
    params, old = _host(learner.params), None
    # In two stretches, of which the second begins between two multiples.
    for start, stop in ((0, 4), (4, 8)):
      seen = _seen(part, images, start, stop, arm.clean)
      learner, _ = trainer.advance(arm, learner, seen)
    differing = 0
    for step in range(8):
      if step % 3 == 0:
        old = params
      seen = _seen(part, images, step, step + 1, arm.clean)
      x = _normalized(images, images.train_images[seen.indices[0]])
      new, stale = (_gradients(p, x, seen.labels[0]) for p in (params, old))
      grads = [stale[i] if seen.wrong[0, i] else new[i] for i in range(_K)]
      mean = _mean(grads, np.ones(_K))
      differing += not _is_close(mean, _mean(new, np.ones(_K)))
      params = jax.tree.map(lambda p, g: p - 0.5 * g, params, mean)
    _assert_close(learner.params, params, 1e-4)
    assert differing == (0 if arm.clean else 5)


def test_number_of_steps_that_parameters_are_stale():
  assert training._STALE_STEPS == 100
  assert "100 steps" in plan.CORRUPTIONS["stale"]


def test_choice_within_each_leaf(images):
  """The control takes of each parameter array as many as its rule, but others."""
  arms = plan.gaf_arms(_K, tau=0.6, rule="leave_one_out", by_leaf=True)
  part = _part(arms)
  gaf, control = part.arms[0], part.controls(arms[0].name)["choice"]
  trainer = training.Trainer(part, images)
  others, sizes = 0, set()
  learner = trainer.init(control, 1)
  for step in range(16):
    seen = _seen(part, images, step, step + 1)
    params = _host(learner.params)
    x = _normalized(images, images.train_images[seen.indices[0]])
    grads = [jax.tree.leaves(g) for g in _gradients(params, x, seen.labels[0])]
    learner, _ = trainer.advance(control, learner, seen)
    updates = jax.tree.map(lambda a, b: np.asarray(b - a), params, learner.params)
    for leaf, update in enumerate(jax.tree.leaves(updates)):
      vectors = [g[leaf].ravel() for g in grads]
      _, accepted = _by_hand("leave_one_out", vectors, 0.6, 1.0)
      number = int(accepted.sum())
      sizes.add(number)
      if not number:
        np.testing.assert_allclose(update, 0, atol=1e-8)
        continue
      means = {
        members: -0.1 * np.mean([vectors[i] for i in members], axis=0)
        for members in itertools.combinations(range(_K), number)
      }
      errors = {m: np.abs(update.ravel() - mean).max() for m, mean in means.items()}
      nearest = min(errors, key=errors.get)
      assert errors[nearest] < 1e-6
      others += nearest != tuple(np.flatnonzero(accepted))
  assert len(sizes) > 2 and others > 4
  # GAF's own choice is another program.
  assert training._decision(gaf) != training._decision(control)


def test_shuffled_rule():
  def rule(gram, valid, tau):
    # As many as the first entry says, and the first ones.
    accepted = jnp.arange(4) < gram[0, 0]
    weights = jnp.where(accepted, jnp.array([0.5, 0.25, 0.125, 0.0625]), 0)
    return gaf_optax.Decision(weights, accepted, gram[1])

  rng = np.random.default_rng(0)
  grams = rng.random((3000, 4, 4)).astype(np.float32)
  numbers = np.arange(3000) % 5
  grams[:, 0, 0] = numbers
  shuffled = jax.jit(jax.vmap(training._shuffled(rule), in_axes=(0, None, None)))
  valid = np.ones(4, bool)
  weights, accepted, distances = map(np.asarray, shuffled(grams, valid, 0.5))
  np.testing.assert_array_equal(accepted.sum(axis=1), numbers)
  np.testing.assert_array_equal(weights > 0, accepted)
  usual = np.array([0.5, 0.25, 0.125, 0.0625])
  expected = np.where(np.arange(4) < numbers[:, None], usual, 0)
  np.testing.assert_array_equal(np.sort(weights), np.sort(expected))
  np.testing.assert_array_equal(distances, grams[:, 1])
  for number in (1, 2, 3):
    # Each of the 600 has another one of all choices, each as often.
    chosen, counts = np.unique(accepted[numbers == number], axis=0, return_counts=True)
    assert len(chosen) == (4, 6, 4)[number - 1]
    share = 1 / len(chosen)
    assert np.all(np.abs(counts - 600 * share) < 5 * np.sqrt(600 * share * (1 - share)))
  again = shuffled(grams, valid, 0.5)
  np.testing.assert_array_equal(again.accepted, accepted)


def _runs(trainer, arm, seen, schedule):
  learner = trainer.init(arm, 0)
  learner, trace = trainer.advance(arm, trainer.placed(learner), seen)
  found = trainer.evaluate(arm, learner, schedule)
  return _host(learner), trace, {k: x for k, x in found.items() if "auc" not in k}


def _assert_same(ours, theirs):
  for found, expected in zip(ours, theirs):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      found,
      expected,
    )


def test_what_runs_without_a_loop(images):
  for model in models.KINDS:
    part = _part(model=model, width=models.KINDS[model].divisor)
    assert training.Trainer(part, images)._looped is ("resnet" not in model)


def _mesh():
  asked = options.parse(["--devices", "2", "--num-microbatches", str(_K)])
  return devices.join(asked).mesh


@pytest.mark.parametrize(
  "kind, others",
  [
    # On how many devices, and whether in a loop.
    ("normalization", [(2, True)]),
    ("stale", [(None, False), (2, False)]),
  ],
)
def test_on_many_devices_and_without_a_loop(images, kind, others, monkeypatch):
  monkeypatch.setattr(training, "_STALE_STEPS", 2)
  # With what changes a learner and its labels, too.
  (arm, *_) = plan.gaf_arms(_K, tau=0.6, smoothing=0.2, ema_decay=0.5)
  part = _part([arm], augment=True, wrong_sources=2, wrong_kind=kind)
  part = dataclasses.replace(part, balanced=True, weight_decay=0.1, optimizer="adamw")
  seen = _seen(part, images, 0, 5)
  results = []
  for number, looped in ((None, True), *others):
    one = dataclasses.replace(part, devices=number)
    trainer = training.Trainer(one, images, _mesh() if number else None)
    assert trainer._looped
    trainer._looped = looped
    results.append(_runs(trainer, arm, seen, _schedule(one, images)))
  expected = results[0]
  for found in results[1:]:
    _assert_same(found, expected)
    assert jax.tree.map(np.shape, found[1]) == jax.tree.map(np.shape, expected[1])
    np.testing.assert_array_equal(found[1].accepted, expected[1].accepted)
  assert 0 < expected[1].accepted.mean() < 1


def test_plateau(images):
  """After two evaluations without a lower loss a step is a tenth as large."""
  part = _part(optimizer="nesterov-plateau", plateau_patience=2, devices=2)
  trainer = training.Trainer(part, images, _mesh())
  seen = _seen(part, images, 0, 1)

  def step(losses):
    learner = trainer.placed(trainer.init(plan.PLAIN, 0))
    for loss in losses:
      learner = trainer.observed(learner, {"test_loss": loss})
    before = _host(learner.params)
    learner, _ = trainer.advance(plan.PLAIN, learner, seen)
    return jax.tree.map(lambda a, b: b - a, before, _host(learner.params)), learner

  first, _ = step([])
  for losses, scale in (
    ([1.0, 0.9, 0.8], 1),
    ([1.0, 1.0], 1),
    ([1.0, 2.0, 0.9, 1.0], 1),
    ([1.0, 1.0, 1.0], 0.1),
    ([0.5, 0.6, 0.7, 0.3, 0.3], 0.1),
    ([0.5, 0.6, 0.7, 0.6, 0.5], 0.01),
  ):
    found, learner = step(losses)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, scale * b, rtol=2e-2, atol=1e-6),
      found,
      first,
    )
    assert float(learner.plateau.scale) == pytest.approx(scale)
  # The optimizer itself is Nesterov's: the first step is 1.9 gradients.
  learner = trainer.init(plan.PLAIN, 0)
  x = _normalized(images, images.train_images[seen.indices[0]])
  mean = _mean(_gradients(_host(learner.params), x, seen.labels[0]), np.ones(_K))
  _assert_close(first, jax.tree.map(lambda g: -0.19 * g, mean))


def test_others_have_no_plateau(images):
  part = _part(optimizer="nesterov")
  trainer = training.Trainer(part, images)
  learner = trainer.init(plan.PLAIN, 0)
  assert learner.plateau is None and trainer.observed(learner, {}) is learner


def test_weight_decay(images):
  part = _part(weight_decay=0.5)
  trainer = training.Trainer(part, images)
  learner = trainer.init(plan.PLAIN, 0)
  params, seen = _host(learner.params), _seen(part, images, 0, 1)
  x = _normalized(images, images.train_images[seen.indices[0]])
  mean = _mean(_gradients(params, x, seen.labels[0]), np.ones(_K))
  learner, _ = trainer.advance(plan.PLAIN, learner, seen)
  expected = jax.tree.map(lambda p, g: p - 0.1 * (g + 0.5 * p), params, mean)
  _assert_close(learner.params, expected)


@pytest.mark.parametrize(
  "name, decay, expected",
  [
    ("adamw", None, 0.01),
    ("adamw", 0.0, 0),
    ("adamw", 0.25, 0.25),
    ("adam", None, 0),
    ("sgd", None, 0),
    ("sgd", 0.25, 0.25),
    ("nesterov-plateau", 0.25, 1.9 * 0.25),
  ],
)
def test_usual_weight_decay(images, name, decay, expected):
  """With a gradient of zero nothing else moves the weights."""
  part = _part(optimizer=name, weight_decay=decay)
  trainer = training.Trainer(part, images)
  params = {"w": jnp.ones((3,))}
  transformation = trainer._transformation(plan.PLAIN, 2.0, None)
  zero = {"w": jnp.zeros((_K, 3))}
  updates, _ = transformation.update(zero, transformation.init(params), params)
  np.testing.assert_allclose(updates["w"], -0.1 * expected, atol=1e-8)
