"""Schedule: batches depend on seed and step alone, and are wrong as specified."""

import numpy as np
import pytest

from schedule import HUMAN, Schedule, draw_wrong_sources
from shared import UserError, confuse, flip

pytestmark = pytest.mark.experiments


def _assert_same(ours, theirs, since=0):
  for a, b in zip(ours, theirs):
    np.testing.assert_array_equal(a[since:], b)


def test_batches_do_not_depend_on_how_they_are_asked_for(images, make_part):
  for settings in (
    dict(label_noise=0.4),
    dict(random_labels=True),
    dict(wrong_sources=2, wrong_kind="random-labels"),
    dict(wrong_sources=2, persistent=True),
    dict(skew=0.5),
  ):
    part = make_part(**settings)
    for clean in (False, True):
      whole = Schedule(part, images, 0).batches(0, 20, clean)
      schedule = Schedule(part, images, 0)
      _assert_same(whole, schedule.batches(15, 20, clean), since=15)
      _assert_same([x[:15] for x in whole], schedule.batches(0, 15, clean))
      assert whole.indices.shape == whole.labels.shape == (20, 4, 6)
      other = Schedule(part, images, 1).batches(0, 20, clean)
      assert np.any(other.indices != whole.indices)
      if clean:
        right = images.labels[whole.indices]
        np.testing.assert_array_equal(whole.labels, right)
        assert not whole.wrong.any()


def test_each_pass_sees_each_image_once(images, make_part):
  """200 images, 24 per step: 25 steps are three passes."""
  seen = Schedule(make_part(steps=25), images, 0).batches(0, 25, False)
  passes = seen.indices.reshape(3, 200)
  for order in passes:
    np.testing.assert_array_equal(np.sort(order), np.arange(200))
  assert np.any(passes[0] != passes[1])


def test_flipped_and_confused_labels(images, by_people, make_part):
  schedule = Schedule(make_part(label_noise=0.3), images, 0)
  assert schedule.mislabeled.sum() == 60
  np.testing.assert_array_equal(schedule.mislabeled, schedule.labels != images.labels)
  given = Schedule(make_part(noisy_labels_key="x"), by_people, 0)
  np.testing.assert_array_equal(given.labels, by_people.given[:200])
  random = Schedule(make_part(random_labels=True), images, 0)
  assert 0.5 < random.mislabeled.mean() < 0.8
  rng = np.random.default_rng(0)
  labels = np.repeat(np.arange(10, dtype=np.int32), 100)
  flipped, confused = (
    flip(labels, 0.4, 10, rng),
    confuse(labels, 0.4, {2: 7, 5: 6}, rng),
  )
  assert np.mean(flipped != labels) == 0.4
  changed = confused != labels
  assert set(labels[changed]) == {2, 5} and set(confused[changed]) == {7, 6}
  assert 0.3 < changed[labels == 2].mean() < 0.5


def test_wrong_sources(images, by_people, make_part):
  for kind, data, wrong in (
    ("shifted-labels", images, 1),
    (HUMAN, by_people, 2),
    ("pixels", images, 0),
  ):
    schedule = Schedule(make_part(wrong_sources=2, wrong_kind=kind), data, 0)
    seen = schedule.batches(0, 20, False)
    right = images.labels[seen.indices]
    expected = np.where(seen.wrong[..., None], (right + wrong) % 3, right)
    np.testing.assert_array_equal(seen.labels, expected)
    np.testing.assert_array_equal(seen.wrong, schedule.wrong)
    assert (seen.wrong.sum(axis=1) == 2).all() and len(
      np.unique(seen.wrong, axis=0)
    ) > 3
  seen = Schedule(make_part(wrong_sources=2, wrong_kind="random-labels"), images, 0)
  seen = seen.batches(0, 20, False)
  differ = seen.labels != images.labels[seen.indices]
  assert not differ[~seen.wrong].any() and 0.5 < differ[seen.wrong].mean() < 0.8
  schedules = [
    Schedule(make_part(wrong_sources=1, persistent=True), images, seed)
    for seed in range(9)
  ]
  assert all((one.wrong == one.wrong[0]).all() for one in schedules)
  assert len({one.wrong[0].argmax() for one in schedules}) > 1


def test_wrong_sources_are_drawn_evenly():
  drawn = draw_wrong_sources(4_000, 8, 3, np.random.default_rng(0))
  assert (drawn.sum(axis=1) == 3).all()
  np.testing.assert_allclose(drawn.mean(axis=0), 3 / 8, atol=0.03)


def test_held_out_labels_are_as_wrong_as_the_others(images, by_people, make_part):
  right = images.validation_labels
  held_out = lambda data, **settings: Schedule(
    make_part(**settings), data, 0
  ).validation_labels(False)
  assert np.mean(held_out(images, label_noise=0.25) != right) == 0.25
  np.testing.assert_array_equal(held_out(by_people), (right + 2) % 3)
  pixels = held_out(images, wrong_sources=2, wrong_kind="pixels")
  np.testing.assert_array_equal(pixels, right)
  settings = dict(wrong_sources=1, persistent=True)
  for kind, data, wrong in (("shifted-labels", images, 1), (HUMAN, by_people, 2)):
    schedule = Schedule(make_part(wrong_kind=kind, **settings), data, 0)
    source = np.arange(len(right)) % 4
    expected = np.where(schedule.wrong[0][source], (right + wrong) % 3, right)
    np.testing.assert_array_equal(schedule.validation_labels(False), expected)
    np.testing.assert_array_equal(schedule.validation_labels(True), right)


def test_wrong_examples_are_mislabeled_or_from_wrong_sources(images, make_part):
  part = make_part(label_noise=0.3, wrong_sources=1)
  schedule = Schedule(part, images, 0)
  seen = schedule.batches(0, 20, False)
  expected = schedule.mislabeled[seen.indices] | seen.wrong[..., None]
  np.testing.assert_array_equal(schedule.wrong_examples(), expected)


def test_sources_with_classes_of_their_own(make_part, images, monkeypatch):
  monkeypatch.setattr("schedule._OWN_CLASSES", 1)
  share = lambda skew: _most_frequent(
    Schedule(make_part(skew=skew, steps=300), images, 0)
  )
  # A source's own class, and a third of the draws from all classes.
  np.testing.assert_allclose(share(0.7), 0.7 + 0.3 / 3, atol=0.05)
  np.testing.assert_allclose(share(0.01), 1 / 3, atol=0.06)
  schedule = Schedule(make_part(skew=0.5), images, 0)
  with pytest.raises(UserError, match="source 1 has no training image"):
    schedule._own_rows(np.full(5, 7), 0)


def _most_frequent(schedule):
  labels = schedule.batches(0, 300, True).labels
  counts = [np.bincount(labels[:, i].ravel(), minlength=3) for i in range(4)]
  return [count.max() / count.sum() for count in counts]
