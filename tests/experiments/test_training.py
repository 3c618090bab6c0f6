"""Training: steps against gradients of single microbatches, combined in NumPy."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

import arms
import training
from schedule import Schedule
from shared import make_model

pytestmark = pytest.mark.experiments
_K, _SIZE = 4, 6


def _normalized(images, pixels):
  return (pixels / images.scale - np.array(images.mean)) / np.array(images.std)


@jax.jit
def _gradient(params, x, targets):
  def loss(params):
    logits = make_model("patches-mlp", 3, 4).apply({"params": params}, x, train=True)
    return -(targets * jax.nn.log_softmax(logits)).sum(axis=1).mean()

  return jax.grad(loss)(params)


def _gradients(params, x, targets):
  """Gradients of microbatches `[k, b, ...]`, in double precision."""
  each = [_gradient(params, np.float32(a), np.float32(b)) for a, b in zip(x, targets)]
  return [jax.tree.map(lambda g: np.asarray(g, float), one) for one in each]


def _losses(params, x, targets):
  """Losses of single examples, in NumPy."""
  dense, head = params["Dense_0"], params["head"]
  hidden = np.maximum(x.reshape(len(x), -1) @ dense["kernel"] + dense["bias"], 0)
  logits = hidden @ head["kernel"] + head["bias"]
  logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  return -np.sum(targets * logs, axis=1)


def _targets(labels, smoothing=0.0):
  return (1 - smoothing) * np.eye(3)[labels] + smoothing / 3


def _mean(grads, weights):
  shares = np.array(weights, float) / np.sum(weights)
  return jax.tree.map(lambda *g: sum(s * x for s, x in zip(shares, g)), *grads)


def _host(tree):
  return jax.tree.map(np.array, tree)


def _moved(params, gradient, rate=0.1):
  return jax.tree.map(lambda p, g: p - rate * g, params, gradient)


def _assert_close(found, expected, atol=1e-5):
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol)
  jax.tree.map(close, found, expected)


def _is_close(found, expected):
  same = jax.tree.map(lambda a, b: np.allclose(a, b, 1e-4, 1e-5), found, expected)
  return all(jax.tree.leaves(same))


def _flat(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _distances(vectors):
  vectors = np.array(vectors)
  norms = np.linalg.norm(vectors, axis=1)
  return 1 - vectors @ vectors.T / np.outer(norms, norms)


def _chosen(accepted):
  accepted = np.array(accepted, bool)
  return arms.Chosen(accepted, accepted.astype(np.float32))


class _Run:
  """A trainer, a schedule and a learner of one arm, advanced step by step."""

  def __init__(self, images, part, arm):
    self.images, self.arm, self.step = images, arm, 0
    self.trainer = training.Trainer(part, images)
    self.schedule = Schedule(part, images, 0)
    self.learner = self.trainer.init(arm, 0)

  @property
  def params(self):
    return _host(self.learner.params)

  def advance(self, chosen=None):
    """Takes a step; its batches, inputs and trace, of one step each."""
    seen = self.schedule.batches(self.step, self.step + 1, self.arm.clean)
    x = _normalized(self.images, self.images.train[seen.indices[0]])
    self.learner, trace = self.trainer.advance(self.arm, self.learner, seen, chosen)
    self.step += 1
    one = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf)[0], tree)
    return one(seen), x, one(trace)


def test_gaf_takes_the_mean_of_what_agrees(images, make_part):
  arm = arms.Arm("a", "a", tau=0.7, rule="most_neighbors")
  run, numbers = _Run(images, make_part([arm], label_noise=0.3), arm), set()
  for _ in range(10):
    params = run.params
    seen, x, trace = run.advance()
    grads = _gradients(params, x, _targets(seen.labels))
    near = _distances([_flat(g) for g in grads]) <= 0.7
    accepted = near[near.sum(axis=1).argmax()]
    accepted &= accepted.sum() > 1
    np.testing.assert_array_equal(trace.accepted, accepted)
    np.testing.assert_array_equal(trace.weights, accepted)
    expected = params
    if accepted.any():
      expected = _moved(params, _mean(grads, accepted))
    _assert_close(run.learner.params, expected)
    numbers.add(int(accepted.sum()))
  assert 0 in numbers and len(numbers) > 2


def test_what_each_way_of_the_plain_mean_changes(images, make_part):
  """Smoothed labels, mixtures and an average of the weights."""
  for ways in (dict(smoothing=0.3, ema_decay=0.3), dict(mixup=True)):
    arm = arms.Arm("a", "a", **ways)
    run = _Run(images, make_part([arm], label_noise=0.3, learning_rate=0.5), arm)
    params = average = run.params
    for step in range(5):
      seen, x, _ = run.advance()
      targets = _targets(seen.labels, arm.smoothing)
      if arm.mixup:
        share = float(jax.random.uniform(jax.random.fold_in(jax.random.key(0), step)))
        mix = lambda a: share * a + (1 - share) * np.roll(a, 1, axis=1)
        x, targets = mix(x), mix(targets)
      grads = _gradients(params, x, targets)
      params = _moved(params, _mean(grads, np.ones(_K)), 0.5)
      decay = [0.1, 2 / 11, 0.25, 0.3, 0.3][step]
      average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
      _assert_close(run.learner.params, params)
    if arm.ema_decay:
      _assert_close(run.learner.average[0], average)
      assert not _is_close(average, params)
    _, found = run.trainer.evaluate(arm, run.learner, run.schedule)
    tested = average if arm.ema_decay else params
    for name, pixels, labels in (
      ("test", images.test, images.test_labels),
      ("validation", images.validation, run.schedule.validation_labels(False)),
    ):
      x = _normalized(images, pixels)
      each = [_losses(tested, x, np.eye(3)[[c] * len(x)]) for c in range(3)]
      correct = np.mean(np.argmin(each, axis=0) == labels)
      assert found[f"{name}_accuracy"] == pytest.approx(correct)


def test_single_examples_and_their_controls(images, make_part, monkeypatch):
  """Last-layer comparison with the 5 nearest; as many at random; smallest losses."""
  monkeypatch.setattr(training, "WARM_UP", 1)
  compared = dict(quantile=0.5, by_example=True, rule="nearest_neighbors")
  for arm in arms.gaf_arms(2, ema_decay=0.5, **compared):
    run = _Run(images, make_part([arm], label_noise=0.3), arm)
    given = np.zeros(24, bool)
    given[[1, 5, 6, 20]] = True
    for step in range(3):
      params = run.params
      seen, x, trace = run.advance(_chosen([given]) if arm.imitates else None)
      x, targets = x.reshape(24, *x.shape[2:]), _targets(seen.labels.ravel())
      grads = _gradients(params, x[:, None], targets[:, None])
      losses = _losses(params, x, targets)
      distances = _distances([_flat(g["head"]) for g in grads])
      np.fill_diagonal(distances, np.inf)
      nearest = np.sort(distances, axis=1)[:, :5].mean(axis=1)
      accepted = {
        None: nearest <= np.sort(nearest)[11],
        "choice": given,
        "loss": (losses <= np.sort(losses)[3]) | (step < 1),
      }[arm.control]
      np.testing.assert_array_equal(trace.accepted, accepted)
      assert trace.loss == pytest.approx(losses.mean(), rel=1e-4)
      if arm.control is None:
        assert trace.distance == pytest.approx(nearest.mean(), rel=1e-4)
      _assert_close(run.learner.params, _moved(params, _mean(grads, accepted)))


def test_smallest_losses_of_microbatches(images, make_part, monkeypatch):
  """By one step's losses; for persistent sources, by their running mean."""
  monkeypatch.setattr(training, "WARM_UP", 2)
  monkeypatch.setattr(training, "_MEMORY", 0.8)
  _, control = arms.gaf_arms(_K, ["loss"], tau=0.9)
  for persistent in (False, True):
    settings = dict(wrong_sources=1, persistent=persistent, label_noise=0.3)
    run, mean, others = _Run(images, make_part([control], **settings), control), 0.0, 0
    for step in range(12):
      params, number = run.params, 1 + step % 3
      seen, x, trace = run.advance(_chosen([np.arange(_K) < number]))
      targets = _targets(seen.labels)
      losses = np.array([_losses(params, *one).mean() for one in zip(x, targets)])
      mean = 0.8 * mean + 0.2 * losses
      deciding = mean if persistent else losses
      kept = (deciding <= np.sort(deciding)[number - 1]) | (step < 2)
      others += np.any(kept != (losses <= np.sort(losses)[number - 1])) and step > 1
      np.testing.assert_array_equal(trace.accepted, kept)
      gradient = _mean(_gradients(params, x, targets), kept)
      _assert_close(run.learner.params, _moved(params, gradient))
    assert bool(others) is persistent


def test_wrong_sources_have_scrambled_pixels(images, make_part):
  part = make_part([arms.PLAIN], wrong_sources=1, wrong_kind="pixels")
  order = np.random.default_rng(0).permutation(36)
  for arm in (arms.PLAIN, arms.CLEAN):
    run = _Run(images, part, arm)
    params = run.params
    seen, x, _ = run.advance()
    assert seen.wrong.sum() == (not arm.clean)
    right = _mean(_gradients(params, x, _targets(seen.labels)), np.ones(_K))
    flat = x.reshape(_K, _SIZE, 36, 3)
    flat[seen.wrong] = flat[seen.wrong][:, :, order]
    x = flat.reshape(x.shape)
    gradient = _mean(_gradients(params, x, _targets(seen.labels)), np.ones(_K))
    _assert_close(run.learner.params, _moved(params, gradient))
    assert _is_close(gradient, right) is arm.clean


def test_stale_sources_use_older_parameters(images, make_part, monkeypatch):
  monkeypatch.setattr(training, "_STALE_STEPS", 3)
  settings = dict(wrong_sources=2, wrong_kind="stale", learning_rate=0.5)
  run = _Run(images, make_part([arms.PLAIN], **settings), arms.PLAIN)
  old, differing = run.params, 0
  for step in range(6):
    params = run.params
    if step % 3 == 0:
      old = params
    seen, x, _ = run.advance()
    new, stale = (_gradients(p, x, _targets(seen.labels)) for p in (params, old))
    grads = [stale[i] if seen.wrong[i] else new[i] for i in range(_K)]
    mean = _mean(grads, np.ones(_K))
    differing += not _is_close(mean, _mean(new, np.ones(_K)))
    _assert_close(run.learner.params, _moved(params, mean, 0.5), 1e-4)
  assert differing == 4


def _area(wrong, signal):
  """The share of pairs of a wrong and a right example that the signal ranks so."""
  pairs = signal[wrong][:, None] - signal[~wrong][None]
  return np.mean(pairs > 0) + np.mean(pairs == 0) / 2


def test_areas_of_what_tells_wrong_labels(images, make_part):
  part = make_part([arms.PLAIN], label_noise=0.3, learning_rate=0.3)
  run = _Run(images, part, arms.PLAIN)
  seen = run.schedule.batches(0, 20, False)
  for _ in range(3):
    run.learner, _ = run.trainer.advance(arms.PLAIN, run.learner, seen, None)
  _, found = run.trainer.evaluate(arms.PLAIN, run.learner, run.schedule)
  params, wrong = run.params, run.schedule.mislabeled
  x, targets = _normalized(images, images.train), _targets(run.schedule.labels)
  grads = _gradients(params, x[:, None], targets[:, None])
  heads = np.array([_flat(one["head"]) for one in grads])
  distances = _distances(heads)
  np.fill_diagonal(distances, np.inf)
  expected = {
    "distance": np.sort(distances, axis=1)[:, :5].mean(axis=1).round(6),
    "loss": _losses(params, x, targets),
    "gradient norm": np.linalg.norm(heads, axis=1),
  }
  for name, signal in expected.items():
    # Rounding may change the ranks of a few.
    assert found[name] == pytest.approx(_area(wrong, signal), abs=2e-3)
    assert found[name] > 0.55
  assert found.keys() - expected == {"test_accuracy", "validation_accuracy"}
  clean = Schedule(dataclasses.replace(part, label_noise=0.0), images, 0)
  _, found = run.trainer.evaluate(arms.PLAIN, run.learner, clean)
  assert "loss" not in found


def test_optimizers(images, make_part):
  """The first step of each, from the optimizer's definition."""
  steps = {
    "sgd": lambda g: g,
    "momentum": lambda g: g,
    "nesterov-plateau": lambda g: 1.9 * g,
    "adam": lambda g: np.sign(g),
    "rmsprop": lambda g: g / np.sqrt(0.01 * g**2),
  }
  for name, step in steps.items():
    params, grads = np.array([1.0, -2.0]), np.array([0.5, -3.0])
    optimizer = training.OPTIMIZERS[name](0.1)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates, -0.1 * step(grads), rtol=1e-4)
  adamw = training.OPTIMIZERS["adamw"](0.1)
  updates, _ = adamw.update(np.zeros(2), adamw.init(params), params)
  np.testing.assert_allclose(updates, -0.1 * 0.01 * params, rtol=1e-4)


def test_plateau(images, make_part, monkeypatch):
  """After two evaluations without a lower loss a step is a tenth as large."""
  plateau = optax.contrib.reduce_on_plateau(factor=0.1, patience=2)
  monkeypatch.setattr(training, "_PLATEAU", plateau)
  run = _Run(images, make_part([arms.PLAIN], optimizer="nesterov-plateau"), arms.PLAIN)
  for _ in range(4):  # Nothing is trained, so the loss is constant.
    run.learner, _ = run.trainer.evaluate(arms.PLAIN, run.learner, run.schedule)
  assert float(run.learner.plateau.scale) == pytest.approx(0.1)
  params = run.params
  seen, x, _ = run.advance()
  gradient = _mean(_gradients(params, x, _targets(seen.labels)), np.ones(_K))
  _assert_close(run.learner.params, _moved(params, gradient, 0.1 * 1.9 * 0.1))


def test_convolutions_on_a_cpu_run_without_a_loop(images, make_part):
  """The same numbers as in a loop, with BatchNorm's statistics."""
  (arm, _) = arms.gaf_arms(2, tau=0.95)
  part = make_part([arm], model="resnet18", num_microbatches=2)
  results = []
  for looped in (None, True):
    run = _Run(images, part, arm)
    assert run.trainer._looped is False
    run.trainer._looped = looped or run.trainer._looped
    seen = run.schedule.batches(0, 3, False)
    learner, trace = run.trainer.advance(arm, run.learner, seen, None)
    _, found = run.trainer.evaluate(arm, learner, run.schedule)
    results.append((_host(learner.batch_stats), _host(trace), found))
  _assert_close(*results, 1e-4)
  assert results[0][1].accepted.shape == (3, 2)
