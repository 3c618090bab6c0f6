"""Byte LM: its text, its model, its steps, and scores of documents."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arms
import byte_lm
import byte_text
import byte_training
from byte_text import CONTEXT, KINDS
from shared import UserError

pytestmark = pytest.mark.experiments


@pytest.fixture(scope="module")
def text():
  """16 documents in which each byte is the one before plus 1, modulo 251."""
  size = 251
  training = (np.arange(16 * size) % size).astype(np.uint8)
  windows = np.tile(training[: CONTEXT + 2], (24, 1))
  names, sizes = tuple(map(str, range(16))), np.full(16, size)
  return byte_text.Text(training, names, sizes, windows, windows, "", "")


def _schedule(text, name, seed=0, k=8, size=3):
  part = arms.Part(
    name=name, title="", arms=(), microbatch_size=size, num_microbatches=k, steps=20
  )
  return byte_text.Schedule(text, part, seed)


def test_files_are_for_training_or_for_validation(tmp_path):
  for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz"):
    path = tmp_path / f"package{number % 3}" / f"{letter}.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(letter * 100)
  for name in ("test/a.py", "package1/tests/b.py", "site-packages/c.py"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("T" * 100)
  (tmp_path / "_sysconfigdata_x.py").write_text("S" * 100)
  text = byte_text.load(tmp_path)
  parts = text.training, text.validation.ravel(), text.held_out.ravel()
  letters = [set(bytes(part)) for part in parts]
  assert all(letters)
  assert sorted(b for part in letters for b in part) == sorted(
    b"abcdefghijklmnopqrstuvwxyz"
  )
  held_out = {
    ord(pathlib.Path(name).stem)
    for name in byte_text.source_files(tmp_path)
    if byte_text.is_validation(name)
  }
  assert held_out == letters[1] | letters[2]
  ends = np.cumsum(text.sizes) - 1
  stems = [pathlib.Path(name).stem for name in text.names]
  assert [chr(text.training[end]) for end in ends] == stems
  assert byte_text.load(tmp_path).digest == text.digest
  (tmp_path / "package0" / "a.py").write_text("A" * 100)
  assert byte_text.load(tmp_path).digest != text.digest
  with pytest.raises(UserError, match=r"too few source files \(0 with 0 bytes\)"):
    byte_text.load(tmp_path / "none")


def _wrong(right, kind):
  page = [bytes([x]).decode("latin-1").encode("cp037")[0] for x in right.flat]
  ways = {"right": right, "shifted": (right + 1) % 251}
  return (ways | {"code page": np.reshape(page, right.shape)})[kind]


def test_targets_follow_the_inputs_or_are_wrong_as_said(text):
  for part in byte_text.PARTS:
    schedule = _schedule(text, part)
    batches, spared = (schedule.batches(0, 20, clean) for clean in (False, True))
    right = (batches.inputs.astype(int) + 1) % 251
    kinds = np.array(KINDS)[schedule.kinds[schedule.documents]]
    for kind in KINDS[:3]:
      of = kinds == kind
      np.testing.assert_array_equal(batches.targets[of], _wrong(right[of], kind))
    drawn = kinds == "random bytes"
    assert drawn.any() == (part == "documents")
    if drawn.any():
      assert np.mean(batches.targets[drawn] == right[drawn]) < 0.05
      assert sorted(schedule.kinds) == [*[0] * 13, 1, 2, 3]
    np.testing.assert_array_equal(schedule.wrong, (kinds != "right")[..., 0])
    np.testing.assert_array_equal(spared.targets, right)
    last = _schedule(text, part).batches(15, 20, False)
    for ours, theirs in zip(batches, last):
      np.testing.assert_array_equal(ours[15:], theirs)
    other = _schedule(text, part, seed=1).batches(0, 20, False)
    assert not np.array_equal(other.inputs, batches.inputs)


def test_shards_keep_their_documents_and_one_is_always_wrong(text):
  for part, kind in (("clean", "right"), ("code-page", "code page"), ("shifted",) * 2):
    schedules = [_schedule(text, part, seed) for seed in range(5)]
    for schedule in schedules:
      assert (schedule.wrong == schedule.wrong[0]).all()
      assert schedule.wrong[0].sum() == (part != "clean")
      shards = [set(schedule.documents[:, i].ravel()) for i in range(8)]
      assert sum(map(len, shards)) == len(set.union(*shards)) == 16
      # Held-out windows belong to the shards in turn.
      right = (np.arange(CONTEXT) + 1)[None, :]
      wrong = schedule.wrong[0][np.arange(24) % 8, None]
      expected = np.where(wrong, _wrong(right, kind), right)
      np.testing.assert_array_equal(schedule.held_out_targets, expected)
    assert part == "clean" or len({tuple(s.wrong[0]) for s in schedules}) > 1


def _logits(tokens):
  model = byte_training.ByteTransformer(width=16)
  return np.asarray(model.apply(model.init(jax.random.key(0), tokens), tokens))


def test_logits_depend_on_earlier_bytes_and_their_order_alone():
  tokens = np.tile(np.arange(9, dtype=np.uint8), (3, 1))
  tokens[1, 5] = 99
  tokens[2, :2] = 1, 0
  ours, changed, swapped = _logits(tokens)
  np.testing.assert_array_equal(ours[:5], changed[:5])
  assert (np.abs(ours[5:] - changed[5:]).max(axis=1) > 1e-6).all()
  assert np.abs(ours[-1] - swapped[-1]).max() > 1e-6


@pytest.fixture(scope="module")
def trainer(text):
  with pytest.MonkeyPatch.context() as patch:
    smaller = lambda: _SMALL
    patch.setattr(byte_training, "ByteTransformer", smaller)
    yield byte_training.ByteTrainer(text, 20, 4)


_SMALL = byte_training.ByteTransformer(width=16, depth=1)


def _loss(params, inputs, targets, smoothing=0.0):
  """Bits per byte, of each window `[b]`."""
  logs = jax.nn.log_softmax(_SMALL.apply({"params": params}, inputs))
  wanted = (1 - smoothing) * jax.nn.one_hot(targets, 256) + smoothing / 256
  return -(wanted * logs).sum(axis=-1).mean(axis=-1) / jnp.log(2.0)


def _chosen(accepted):
  return arms.Chosen(accepted, accepted.astype(np.float32))


def test_steps_are_adamw_on_the_mean_of_what_is_kept(trainer, text):
  """With a skipped step, which only changes the learning rate, and smoothed labels."""
  schedule = optax.warmup_cosine_decay_schedule(0.0, 4e-3, 2, 20)
  batches = _schedule(text, "shifted", k=4, size=1).batches(0, 4, False)
  accepted = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]], bool)
  control = arms.Arm("x", "x", imitates="plain", control="choice", smoothing=0.25)
  before = trainer.init(control, 0)
  after, trace = trainer.advance(control, before, batches, _chosen(accepted))
  np.testing.assert_array_equal(trace.accepted, accepted)
  adam = optax.chain(optax.scale_by_adam(b2=0.99), optax.add_decayed_weights(0.01))
  params, state = before.params, adam.init(before.params)
  gradient = jax.jit(jax.grad(lambda params, x, y: _loss(params, x, y, 0.25).mean()))
  for step, kept in enumerate(accepted):
    if kept.any():
      seen = batches.inputs[step, kept, 0], batches.targets[step, kept, 0]
      updates, state = adam.update(gradient(params, *seen), state, params)
      rate = schedule(step)
      params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
  # Adam divides small gradients by their own size, rounding and all.
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4)
  jax.tree.map(close, after.params, params)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after.params, before.params)
  assert max(jax.tree.leaves(moved)) > 1e-3


def test_average_is_validated_and_losses_decide_after_a_warm_up(trainer, text):
  control = arms.Arm("x", "x", imitates="plain", control="loss", ema_decay=0.75)
  schedule, learner = _schedule(text, "shifted", k=4, size=1), trainer.init(control, 0)
  average, mean = learner.params, np.zeros(4)
  two = _chosen(np.array([[True, True, False, False]]))
  for step in range(4):
    batches = schedule.batches(step, step + 1, False)
    learner, trace = trainer.advance(control, learner, batches, two)
    mean = 0.98 * mean + 0.02 * np.asarray(trace.loss[0])
    number = 4 if step < 2 else 2  # All, in a tenth of the 20 steps.
    kept = mean <= np.sort(mean)[number - 1]
    np.testing.assert_array_equal(trace.accepted[0], kept)
    average = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, average, learner.params)
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
  jax.tree.map(close, learner.average, average)
  _, found = trainer.evaluate(control, learner, schedule)
  windows = text.validation[:, :-2], text.validation[:, 1:-1]
  expected = float(_loss(average, *windows).mean())
  assert found["validation"] == pytest.approx(expected, rel=1e-5)


def test_single_sequences_are_compared_by_the_last_layer(trainer, text):
  compared = dict(quantile=0.5, by_example=True, rule="nearest_neighbors")
  (arm,) = arms.gaf_arms(2, [], **compared)
  batches = _schedule(text, "documents", k=12, size=1).batches(0, 1, False)
  learner = trainer.init(arm, 0)
  _, trace = trainer.advance(arm, learner, batches, None)
  one = lambda params, x, y: _loss(params, x[None], y[None])[0]
  grads = jax.vmap(jax.grad(one), (None, 0, 0))(
    learner.params, batches.inputs[0, :, 0], batches.targets[0, :, 0]
  )
  rows = np.asarray(grads["head"]["kernel"], float).reshape(12, -1)
  norms = np.linalg.norm(rows, axis=1)
  distances = 1 - rows @ rows.T / np.outer(norms, norms)
  nearest = np.sort(distances, axis=1)[:, 1:6].mean(axis=1)
  np.testing.assert_allclose(trace.norms[0], norms, rtol=1e-4)
  np.testing.assert_allclose(trace.distances[0], nearest, atol=1e-4)
  np.testing.assert_array_equal(trace.accepted[0], nearest <= np.sort(nearest)[5])


def test_scores_of_documents_by_hand():
  signal = np.array([[1.0, 3.0, np.nan], [5.0, 5.0, 8.0]])
  documents = np.array([[0, 1, 3], [0, 1, 1]])
  found = byte_lm.document_scores(signal, documents, 4)
  # Steps have means of 2 and 6.
  np.testing.assert_allclose(found, [(-1 - 1) / 2, (1 - 1 + 2) / 3, np.nan, np.nan])
  kinds = np.array([0, 0, 0, 1, 2, 3])
  score = np.array([0.1, 0.5, 0.7, 0.6, 0.9, np.nan])
  expected = {"all wrong": 5 / 6, "code page": 2 / 3, "shifted": 1.0}
  found = byte_lm.areas(score, kinds)
  assert np.isnan(found.pop("random bytes"))
  assert found == pytest.approx(expected)
