"""Patch features: derived from the training images alone, one quadrant each."""

import numpy as np
import pytest

import features

pytestmark = pytest.mark.experiments


@pytest.fixture(scope="module")
def pixels():
  return np.random.default_rng(0).integers(0, 255, (60, 9, 11, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
  monkeypatch.setattr(features, "_NUM_SAMPLES", 2_000)


def test_features_are_standardized_over_the_training_images(pixels):
  train, test = features.of_patches(pixels, pixels[:7])
  assert train.shape == (60, 1024, 1, 1) and train.dtype == np.float32
  flat = train.reshape(60, -1)
  np.testing.assert_allclose(flat.mean(axis=0), 0, atol=1e-4)
  deviations = flat.std(axis=0)
  assert np.all((np.abs(deviations - 1) < 1e-2) | (deviations == 0))
  np.testing.assert_allclose(test, train[:7], atol=1e-4)
  # Other images do not change the features of the training images.
  again, _ = features.of_patches(pixels, 255 - pixels[:3])
  np.testing.assert_array_equal(again, train)


def test_each_feature_is_a_sum_over_one_quadrant(pixels):
  """Changing pixels that only the last quadrant's patches hold changes a quarter."""
  changed = pixels[:7].copy()
  changed[:, -1, -1] = 255 - changed[:, -1, -1]
  _, ours, theirs = features.of_patches(pixels, pixels[:7], changed)
  same = (ours[0] == theirs[0]).reshape(2, 4, 128)
  assert same[:, :3].all() and not same[:, 3].all()
