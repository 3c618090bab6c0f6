"""Batches: functions of seed and step alone, and the controls' choices."""

import dataclasses

import jax
import numpy as np
import pytest

import batches
import data
import plan
import runs
from common import arms

pytestmark = pytest.mark.experiments

_ARMS = (plan.PLAIN, *plan.gaf_arms(4, tau=0.9))


def _part(**changed):
  settings = dict(
    label_noise=0.4, microbatch_size=20, num_microbatches=4, steps=30, width=4
  )
  return plan.Part(name="x", title="", arms=_ARMS, **{**settings, **changed})


def _schedule(part, dataset, seed=0, base=None):
  if base is None:
    base = np.concatenate([dataset.train_labels, dataset.validation_labels])
  return batches.Schedule(part, dataset, base, seed)


def _concatenated(parts):
  return batches.Batches(
    *(None if arrays[0] is None else np.concatenate(arrays) for arrays in zip(*parts))
  )


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"balanced": True},
    {"augment": True},
    {"random_labels": True},
    {"wrong_sources": 1},
    {"wrong_sources": 2, "wrong_kind": "random-labels"},
    {"wrong_sources": 2, "persistent": True},
    {"skew": 0.5},
    {
      "balanced": True,
      "augment": True,
      "wrong_sources": 1,
      "wrong_kind": "random-labels",
    },
  ],
  ids=lambda options: "-".join(options) or "usual",
)
@pytest.mark.parametrize("clean", [False, True])
def test_batches_do_not_depend_on_how_they_are_asked_for(digits, options, clean):
  part = _part(**options)
  at_once = _schedule(part, digits).batches(0, 30, clean)
  schedule = _schedule(part, digits)
  later = [schedule.batches(17 + i, 18 + i, clean) for i in range(13)]
  sooner = schedule.batches(0, 17, clean)
  jax.tree.map(np.testing.assert_array_equal, at_once, _concatenated([sooner, *later]))
  np.testing.assert_array_equal(at_once.steps, np.arange(30))
  for array in (at_once.indices, at_once.labels):
    assert array.shape == (30, 4, 20) and array.dtype == np.int32
  assert at_once.wrong.shape == (30, 4) and at_once.wrong.dtype == bool
  assert at_once.wrong.sum() == (0 if clean else 30 * part.wrong_sources)
  assert (at_once.crops is None) is not part.augment
  other = _schedule(part, digits, seed=1).batches(0, 30, clean)
  for name, array, theirs in zip(at_once._fields[1:], at_once[1:], other[1:]):
    # Without noise, balanced microbatches have the same labels whatever the seed.
    same = name == "labels" and clean and part.balanced
    if array is not None and np.any(array) and not same:
      assert np.any(array != theirs)


def test_epochs(digits):
  indices = _schedule(_part(steps=30), digits).batches(0, 30, False).indices
  # 14 whole steps of 80 images in an epoch of 1,197: none comes twice.
  assert len(np.unique(indices[:14])) == 14 * 80
  # Two epochs: each twice.
  counts = np.bincount(indices.ravel()[: 2 * 1197], minlength=1197)
  np.testing.assert_array_equal(counts, 2)


def test_labels_of_wrong_sources(digits):
  part = _part(wrong_sources=1)
  schedule = _schedule(part, digits)
  clean = schedule.batches(0, 30, clean=True)
  wrong = schedule.batches(0, 30, clean=False)
  np.testing.assert_array_equal(clean.indices, wrong.indices)
  np.testing.assert_array_equal(clean.labels, digits.train_labels[clean.indices])
  noisy = schedule.labels[clean.indices]
  off_by_one = ((wrong.labels - noisy) % 10 == 1).all(axis=2)
  np.testing.assert_array_equal(off_by_one, wrong.wrong)
  np.testing.assert_array_equal(wrong.labels[~off_by_one], noisy[~off_by_one])
  np.testing.assert_array_equal(wrong.wrong, schedule.wrong)
  np.testing.assert_array_equal(
    schedule.mislabeled, schedule.labels != digits.train_labels
  )
  assert np.mean(schedule.mislabeled) == pytest.approx(0.4, abs=1e-3)
  np.testing.assert_array_equal(
    schedule.wrong_examples(), (noisy != clean.labels) | wrong.wrong[..., None]
  )


def test_persistent_sources_are_wrong_in_every_step_and_others_for_each_seed(digits):
  part = _part(wrong_sources=2, persistent=True)
  found = [_schedule(part, digits, seed).wrong for seed in range(6)]
  for wrong in found:
    assert wrong.shape == (30, 4) and (wrong == wrong[0]).all()
    assert wrong[0].sum() == 2
  assert len({wrong[0].tobytes() for wrong in found}) > 1


@pytest.mark.parametrize("skew", [0.3, 1.0])
def test_skewed_sources_have_classes_of_their_own(digits, skew):
  part = _part(skew=skew, steps=100, label_noise=0.0)
  schedule = _schedule(part, digits)
  labels = schedule.batches(0, 100, clean=False).labels
  for source in range(4):
    shares = np.bincount(labels[:, source].ravel(), minlength=10) / labels[:, 0].size
    own = np.sort(shares)[-3:].sum()
    # Of the others, three tenths are from these classes too; 2,000 labels, five sigma.
    assert own == pytest.approx(skew + 0.3 * (1 - skew), abs=0.06)
  assert len({np.bincount(labels[:, s].ravel()).tobytes() for s in range(4)}) == 4


def test_random_labels_of_wrong_sources(digits):
  part = _part(wrong_sources=2, wrong_kind="random-labels", steps=200)
  schedule = _schedule(part, digits)
  clean = schedule.batches(0, 200, clean=True)
  wrong = schedule.batches(0, 200, clean=False)
  np.testing.assert_array_equal(clean.indices, wrong.indices)
  right, noisy = ~wrong.wrong, schedule.labels[clean.indices]
  np.testing.assert_array_equal(wrong.labels[right], noisy[right])
  drawn, truth = (x.labels[wrong.wrong].ravel() for x in (wrong, clean))
  # 8,000 labels; five standard deviations.
  assert np.all(np.abs(np.bincount(drawn, minlength=10) - 800) < 135)
  assert np.mean(drawn == truth) == pytest.approx(0.1, abs=0.017)
  # An image drawn again gets another one.
  assert len(np.unique(drawn.reshape(-1, 20), axis=0)) == 400


@pytest.mark.parametrize("kind", ["pixels", "normalization", "stale"])
def test_labels_stay_where_something_else_is_wrong(digits, kind):
  schedule = _schedule(_part(wrong_sources=2, wrong_kind=kind), digits)
  wrong = schedule.batches(0, 30, clean=False)
  np.testing.assert_array_equal(wrong.labels, schedule.labels[wrong.indices])
  np.testing.assert_array_equal(wrong.wrong.sum(axis=1), 2)
  assert not schedule.batches(0, 30, clean=True).wrong.any()


@pytest.mark.parametrize("k, size", [(4, 20), (2, 10), (8, 30)])
def test_balanced_microbatches(digits, k, size):
  part = _part(balanced=True, microbatch_size=size, num_microbatches=k)
  found = _schedule(part, digits).batches(0, 30, clean=False)
  assert found.indices.shape == (30, k, size)
  truth = digits.train_labels[found.indices]
  counts = (truth[..., None] == np.arange(10)).sum(axis=2)
  np.testing.assert_array_equal(counts, size // 10)
  # By labels before flipping, of which four tenths are flipped.
  assert np.mean(found.labels != truth) == pytest.approx(0.4, abs=0.05)
  for step in found.indices:
    assert len(np.unique(step)) == k * size
  # Drawn anew in each step, from all images.
  assert (
    len(np.unique(found.indices)) > (1 - np.exp(-0.9 * k * size * 30 / 1197)) * 1197
  )
  assert len(np.unique(found.indices.reshape(30, -1), axis=0)) == 30


@pytest.mark.parametrize(
  "size, k, rows, said",
  [
    (15, 2, None, "of 10 classes, so --microbatch-size 15 must be a multiple of that."),
    (490, 2, None, "2 balanced microbatches of 490 need 98 images of each class, but"),
    (20, 4, 100, "need 8 images of each class, but class "),
  ],
)
def test_balance_that_cannot_be(digits, size, k, rows, said):
  part = _part(
    balanced=True, microbatch_size=size, num_microbatches=k, train_images=rows
  )
  with pytest.raises(data.UserError, match=said) as raised:
    runs.experiment(part, digits)
  if rows:
    trained = digits.train_labels[: rows - rows // 6]
    numbers = np.bincount(trained, minlength=10)
    assert f"class {numbers.argmin()} has {numbers.min()}." in str(raised.value)


def test_every_crop_and_mirroring_occurs(digits):
  part = _part(augment=True, steps=60)
  crops = _schedule(part, digits).batches(0, 60, clean=False).crops
  assert crops.shape == (60, 4, 20, 3) and crops.dtype == np.int8
  counts = np.zeros((9, 9, 2), int)
  np.add.at(counts, tuple(crops.reshape(-1, 3).T), 1)  # Raises out of range.
  assert crops.min() == 0
  # 4,800 over 162: none is missing, none comes too often.
  assert counts.min() > 5 and counts.max() < 65
  np.testing.assert_array_equal(crops.reshape(-1, 3).max(axis=0), [8, 8, 1])


@pytest.mark.parametrize("height, width, channels", [(8, 8, 1), (6, 9, 3)])
def test_cropped(height, width, channels):
  """Against NumPy: a black border, a window in it, mirrored or not."""
  rng = np.random.default_rng(0)
  images = rng.integers(1, 256, (2, 81, height, width, channels), dtype=np.uint8)
  shifts = np.stack(np.meshgrid(np.arange(9), np.arange(9)), axis=-1).reshape(81, 2)
  crops = np.zeros((2, 81, 3), np.int8)
  crops[..., :2] = shifts
  crops[1, :, 2] = 1
  found = np.asarray(jax.jit(batches.cropped)(images, crops))
  assert found.dtype == np.uint8 and found.shape == images.shape
  for mirrored in range(2):
    for i, (row, column) in enumerate(shifts):
      padded = np.zeros((height + 8, width + 8, channels), np.uint8)
      padded[4:-4, 4:-4] = images[mirrored, i]
      expected = padded[row : row + height, column : column + width]
      if mirrored:
        expected = expected[:, ::-1]
      np.testing.assert_array_equal(found[mirrored, i], expected)
  # In the middle nothing moves.
  middle = np.flatnonzero((shifts == 4).all(axis=1))
  np.testing.assert_array_equal(found[0, middle], images[0, middle])


def test_random_labels_know_nothing_of_the_truth():
  truth = np.arange(30_000, dtype=np.int32) % 10
  dataset = data.Dataset(
    *(np.zeros((30_000, 1, 1, 1), np.uint8), truth, np.zeros((1, 1, 1, 1)), truth[:1]),
    *(10, 1.0, (0.0,), (1.0,)),
  )
  found = _schedule(_part(random_labels=True, label_noise=0.0), dataset).labels
  assert found.dtype == np.int32
  pairs = np.zeros((10, 10), int)
  np.add.at(pairs, (truth, found), 1)
  # Of 3,000 in each line 300 in each column; five standard deviations.
  assert np.all(np.abs(pairs - 300) < 5 * np.sqrt(300 * 0.9))
  other = _schedule(_part(random_labels=True), dataset, seed=1).labels
  assert np.mean(found == other) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(
  "options, trained",
  [
    ({}, 200 - 33),  # A sixth is held out.
    ({"balanced": True}, 200 - 33),
    ({"skew": 1.0, "validation_images": 60}, 140),
  ],
)
def test_only_the_first_images_are_used_and_the_last_of_them_held_out(
  digits, options, trained
):
  part = _part(train_images=200, label_noise=0.0, seeds=2, **options)
  one = runs.experiment(part, digits)
  held_out, used = one.trainer._dataset, digits.train_images[:200]
  np.testing.assert_array_equal(one.trainer._images, used[:trained])
  np.testing.assert_array_equal(held_out.validation_images, used[trained:])
  for schedule in one.schedules:
    np.testing.assert_array_equal(schedule.labels, digits.train_labels[:trained])
    found = schedule.validation_labels(clean=False)
    np.testing.assert_array_equal(found, digits.train_labels[trained:200])
    indices = schedule.batches(0, 30, clean=False).indices
    assert indices.min() >= 0 and indices.max() < trained
    if not part.skew:
      np.testing.assert_array_equal(np.unique(indices), np.arange(trained))


@pytest.mark.parametrize("validation", [200, 300])
def test_not_all_images_can_be_held_out(digits, validation):
  part = _part(train_images=200, validation_images=validation)
  with pytest.raises(data.UserError, match=r"^4 microbatches of 20 are more than the"):
    runs.experiment(part, digits)


def test_flipped_share_is_of_the_images_that_are_used(digits):
  part = _part(train_images=200, label_noise=0.25, validation_images=40)
  one = runs.experiment(part, digits)
  different = one.schedules[0].labels != digits.train_labels[:160]
  assert different.sum() == 40
  found = one.schedules[0].validation_labels(clean=False)
  assert (found != digits.train_labels[160:200]).sum() == 10


def _many(number=30_000):
  """A data set of labels alone, a sixth of them held out, and wrong ones for all."""
  truth = np.random.default_rng(99).integers(10, size=number, dtype=np.int32)
  pixels, trained = np.zeros((number, 1, 1, 1), np.uint8), number - number // 6
  dataset = data.Dataset(
    *(pixels[:trained], truth[:trained], pixels[:1], truth[:1]),
    *(10, 1.0, (0.0,), (1.0,), (), pixels[trained:], truth[trained:]),
  )
  people = (truth + (np.arange(number) % 5 == 0)) % 10  # A fifth off by one.
  return dataset, people.astype(np.int32)


@pytest.mark.parametrize(
  "options, from_people, share",
  [
    ({"label_noise": 0.4}, False, 0.4),
    ({"label_noise": 0.4, "asymmetric": True}, False, 0.4 * 0.5),
    ({"label_noise": 0.0, "random_labels": True}, False, 0.9),
    ({"label_noise": 0.0, "noisy_labels": "x.npy"}, True, 0.2),
    ({"label_noise": 0.0, "wrong_sources": 1}, False, 0.25),
    ({"label_noise": 0.0, "wrong_sources": 3, "persistent": True}, False, 0.75),
    # Of four sources one: the others flipped, its own flipped and shifted.
    ({"label_noise": 0.4, "wrong_sources": 1}, False, 0.3 + 0.25 * (1 - 0.4 / 9)),
    (
      {"label_noise": 0.0, "wrong_sources": 2, "wrong_kind": "random-labels"},
      False,
      0.45,
    ),
    (
      {"label_noise": 0.0, "wrong_sources": 2, "wrong_kind": plan.HUMAN}
      | {"persistent": True, "noisy_labels": "x.npy"},
      True,
      0.1,
    ),
    # Their labels are right, and inputs are not shown wrong.
    ({"label_noise": 0.0, "wrong_sources": 2, "wrong_kind": "pixels"}, False, 0.0),
    ({"label_noise": 0.2, "wrong_sources": 2, "wrong_kind": "stale"}, False, 0.2),
  ],
)
def test_held_out_labels_are_as_wrong_as_those_that_are_trained_on(
  options, from_people, share
):
  part = _part(steps=250, **options)
  dataset, people = _many()
  base = people if from_people else None
  schedule = _schedule(part, dataset, base=base)
  seen = schedule.batches(0, 250, clean=False)
  truth = dataset.train_labels[seen.indices]
  trained = seen.labels != truth
  found = schedule.validation_labels(clean=False)
  right = dataset.validation_labels
  assert found.shape == right.shape == (5_000,) and found.dtype == np.int32
  held_out = found != right
  # 20,000 and 5,000 labels; five standard deviations.
  assert trained.mean() == pytest.approx(share, abs=0.018)
  assert held_out.mean() == pytest.approx(share, abs=0.036)
  if part.wrong_sources and not part.label_noise and share:
    # Each is of one of the sources in turn; those of right ones are right.
    wrong = schedule.wrong[0]
    for source in range(4):
      assert bool(held_out[source::4].any()) is bool(wrong[source])
  if part.wrong_kind == "shifted-labels" and part.wrong_sources:
    wrong = np.resize(schedule.wrong[0], 5_000)
    off = (found - right)[wrong] % 10
    assert np.mean(off == 1) == pytest.approx(1 - part.label_noise, abs=0.07)
  if from_people:
    theirs = people[-5_000:]
    if part.wrong_kind == plan.HUMAN:
      theirs = np.where(np.resize(schedule.wrong[0], 5_000), theirs, right)
    np.testing.assert_array_equal(found, theirs)
  np.testing.assert_array_equal(schedule.validation_labels(clean=True), right)
  again = schedule.validation_labels(clean=False)
  np.testing.assert_array_equal(found, again)
  other = _schedule(part, dataset, 1, base).validation_labels(clean=False)
  # What people said is the same for every seed, what is drawn is not.
  drawn = (part.label_noise or part.random_labels or part.wrong_sources) and share
  assert np.any(other != found) == bool(drawn)


def test_human_labels_are_of_the_wrong_sources_alone():
  options = dict(wrong_sources=2, persistent=True, wrong_kind=plan.HUMAN)
  part = _part(label_noise=0.0, noisy_labels="x.npy", **options)
  dataset, people = _many(3_000)
  schedule = _schedule(part, dataset, base=people)
  np.testing.assert_array_equal(schedule.labels, dataset.train_labels)
  assert not schedule.mislabeled.any()
  seen = schedule.batches(0, 30, clean=False)
  wrong = seen.wrong[..., None]
  expected = np.where(wrong, people[seen.indices], dataset.train_labels[seen.indices])
  np.testing.assert_array_equal(seen.labels, expected)
  clean = schedule.batches(0, 30, clean=True)
  np.testing.assert_array_equal(clean.labels, dataset.train_labels[clean.indices])
  # Without wrong sources they are everybody's.
  part = _part(label_noise=0.0, noisy_labels="x.npy")
  schedule = _schedule(part, dataset, base=people)
  np.testing.assert_array_equal(schedule.labels, people[: len(schedule.labels)])
  np.testing.assert_array_equal(
    schedule.mislabeled, schedule.labels != dataset.train_labels
  )


def _accepted(steps=4000, k=8):
  """Never exactly one, and the first more often than the others."""
  rng = np.random.default_rng(0)
  accepted = rng.random((steps, k)) < np.linspace(0.6, 0.1, k)
  accepted[accepted.sum(axis=1) == 1] = False
  weights = np.where(accepted, rng.random((steps, k)), 0).astype(np.float32)
  return accepted, weights


def test_random_choice_takes_as_much_in_each_step():
  accepted, weights = _accepted()
  found = arms.random_choice(accepted, weights, 0, 3)
  assert found.accepted.dtype == bool and found.weights.dtype == np.float32
  numbers = accepted.sum(axis=1)
  np.testing.assert_array_equal(found.accepted.sum(axis=1), numbers)
  np.testing.assert_array_equal(np.sort(found.weights), np.sort(weights))
  # Each weight stays with what it belongs to.
  np.testing.assert_array_equal(found.weights > 0, found.accepted)
  some = (numbers > 0) & (numbers < 8)
  same = (found.accepted == accepted).all(axis=1)[some]
  assert same.mean() < 0.1
  # All members equally often, where GAF takes the first most.
  rates = found.accepted.mean(axis=0)
  assert np.ptp(accepted.mean(axis=0)) > 0.4
  assert np.ptp(rates) < 10 * np.sqrt(0.25 / len(accepted))
  again = arms.random_choice(accepted, weights, 0, 3)
  jax.tree.map(np.testing.assert_array_equal, found, again)
  other = arms.random_choice(accepted, weights, 1, 3)
  assert np.any(other.accepted != found.accepted)


@pytest.mark.parametrize("steps", [4000, 4025, 30])
def test_random_steps_are_as_many_in_each_window(steps):
  accepted, _ = _accepted(steps)
  # Most of them early, as in GAF's training.
  accepted[: steps // 2][np.arange(steps // 2) % 3 > 0] = False
  accepted[steps // 2 :: 4] = False
  before = accepted.copy()
  found = arms.random_steps(accepted, 0, 3)
  np.testing.assert_array_equal(accepted, before)
  taken, ours = before.any(axis=1), found.accepted.any(axis=1)
  np.testing.assert_array_equal(found.accepted, np.repeat(ours[:, None], 8, axis=1))
  np.testing.assert_array_equal(found.weights, found.accepted.astype(np.float32))
  assert found.weights.dtype == np.float32
  for start in range(0, steps, 50):
    window = slice(start, start + 50)
    assert taken[window].sum() == ours[window].sum()
  assert 0.2 < np.mean(taken != ours) < 0.8
  if steps == 4000:
    # At all times within a window.
    rates = ours.reshape(-1, 50).mean(axis=0)
    assert np.abs(rates - taken.mean()).max() < 5 * np.sqrt(0.25 / 80)
  other = arms.random_steps(accepted, 1, 3)
  assert np.any(other.accepted != found.accepted)


def test_two_microbatches_leave_nothing_to_choose():
  for k, kinds in ((2, ["steps"]), (3, ["choice", "steps"])):
    gaf, *controls = plan.gaf_arms(k, tau=0.9)
    assert [arm.control for arm in controls] == kinds
    part = dataclasses.replace(_part(num_microbatches=k), arms=(gaf, *controls))
    assert list(part.controls(gaf.name)) == kinds
