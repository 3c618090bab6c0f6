"""Features: of patches, against NumPy; of images alone; and a model that takes them."""

import dataclasses

import numpy as np
import pytest

import data
import features
import models
import plan
import runs

pytestmark = pytest.mark.experiments


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(0)
  labels = np.arange(60, dtype=np.int32) % 3
  pixels = rng.integers(0, 255, (60, 9, 11, 3), dtype=np.uint8)
  return data.Dataset(
    *(pixels, labels, pixels[:7], labels[:7], 3, 255.0, (0.5,) * 3, (0.2,) * 3),
    *((), pixels[7:12], labels[7:12]),
  )


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
  monkeypatch.setattr(features, "_NUM_SAMPLES", 2_000)


def test_shapes_and_scale(images):
  made = features.of_patches(images)
  assert made.train_images.shape == (60, 1024, 1, 1)
  assert made.test_images.shape == (7, 1024, 1, 1)
  assert made.train_images.dtype == np.float32
  assert (made.scale, made.mean, made.std) == (1.0, (0.0,), (1.0,))
  np.testing.assert_array_equal(made.train_labels, images.train_labels)
  flat = made.train_images.reshape(60, -1)
  np.testing.assert_allclose(flat.mean(axis=0), 0, atol=1e-4)
  deviations = flat.std(axis=0)
  assert np.all((np.abs(deviations - 1) < 1e-2) | (deviations == 0))
  # The first test images are training images, and so are those held out.
  np.testing.assert_allclose(made.test_images, made.train_images[:7], atol=1e-4)
  held_out = made.validation_images
  assert held_out.dtype == np.float32
  np.testing.assert_allclose(held_out, made.train_images[7:12], atol=1e-4)


def test_labels_and_what_is_held_out_play_no_part(images):
  """Features are fitted to the training images alone."""
  other = dataclasses.replace(
    images,
    train_labels=images.train_labels[::-1],
    test_images=255 - images.test_images[:3],
    validation_images=np.zeros((0, 9, 11, 3), np.uint8),
  )
  ours, theirs = map(features.of_patches, (images, other))
  np.testing.assert_array_equal(ours.train_images, theirs.train_images)
  assert theirs.validation_images.shape == (0, 1024, 1, 1)


def test_each_feature_is_a_sum_over_one_quadrant(images):
  """Changing pixels that only the last quadrant's patches hold changes a quarter."""
  changed = images.test_images.copy()
  changed[:, -1, -1] = 255 - changed[:, -1, -1]
  other = dataclasses.replace(images, test_images=changed)
  ours, theirs = (
    features.of_patches(x).test_images[0, :, 0, 0] for x in (images, other)
  )
  same = (ours == theirs).reshape(2, 4, 128)
  assert same[:, :3].all() and not same[:, 3].all()


def test_parts_share_the_features_of_the_images_they_use(images):
  part = plan.Part(
    name="x",
    title="",
    arms=(plan.PLAIN,),
    model="patches-mlp",
    width=4,
    train_images=40,
    microbatch_size=5,
    steps=2,
    seeds=1,
  )
  made = {}
  first = runs.experiment(part, images, None, made)
  assert len(made) == 1
  (kept,) = made.values()
  # A sixth is held out.
  assert kept.train_images.shape == (34, 1024, 1, 1)
  assert kept.validation_images.shape == (6, 1024, 1, 1)
  runs.experiment(dataclasses.replace(part, label_noise=0.5), images, None, made)
  assert list(made.values()) == [kept]
  runs.experiment(dataclasses.replace(part, train_images=50), images, None, made)
  runs.experiment(dataclasses.replace(part, validation_images=10), images, None, made)
  assert len(made) == 3
  learner = first.trainer.init(plan.PLAIN, 0)
  assert learner.params["Dense_0"]["kernel"].shape == (1024, 4)
  assert models.KINDS["patches-mlp"].on_patches
