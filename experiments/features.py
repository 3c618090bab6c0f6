"""Patch features of images, fixed before training (Coates and Ng, 2012)."""

import jax
import jax.numpy as jnp
import numpy as np

_NUM_FILTERS = 128
_SIZE = 6  # Of a patch, in pixels
_NUM_SAMPLES = 50_000  # Patches that the whitening is computed from
_CHUNK = 200  # Images at a time
# Threshold of a response; whitened patches have about deviation 1 along a filter.
_THRESHOLD = 1.0
_FLAT = 10.0  # Added to a patch's variance, of pixels in [0, 255], so flat ones stay so
_RIDGE = 0.1  # Added to the eigenvalues before they are inverted


def of_patches(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
  """Features in place of the pixels of training and other images, without any labels.

  Every 6 x 6 patch is brought to mean 0 and deviation 1 and ZCA-whitened. Filters are
  128 random whitened patches of the training images, of norm 1. With z the inner
  product of filter and patch, `max(0, z - 1)` and `max(0, -z - 1)` are summed over each
  quadrant of the image, and brought to mean 0 and deviation 1 over the training images:
  1,024 numbers for an image, as float32 `[n, 1024, 1, 1]`.

  Source: Coates and Ng, Learning Feature Representations with K-means, 2012.
  """
  samples = _normalized(_random_patches(train, np.random.default_rng(0)))
  mean = samples.mean(axis=0)
  values, vectors = np.linalg.eigh(np.cov(samples - mean, rowvar=False))
  whiten = (vectors / np.sqrt(values + _RIDGE)) @ vectors.T
  filters = (samples[:_NUM_FILTERS] - mean) @ whiten
  filters /= np.linalg.norm(filters, axis=1, keepdims=True)
  # One linear map from a normalized patch to its products with all filters.
  matrix = (whiten @ filters.T).astype(np.float32)
  offset = (mean @ matrix).astype(np.float32)[None, None, None]

  def raw(images):
    chunks = [images[i : i + _CHUNK] for i in range(0, len(images), _CHUNK)]
    return np.concatenate([_responses(chunk, matrix, offset) for chunk in chunks])

  found = [raw(images) for images in (train, *others)]
  center, scale = found[0].mean(axis=0), found[0].std(axis=0) + 1e-6
  return [((x - center) / scale)[..., None, None] for x in found]


def _random_patches(images, rng):
  """float64 `[number, size * size * channels]`, from places all over the images."""
  n, height, width, _ = images.shape
  image, row, column = (
    rng.integers(high, size=_NUM_SAMPLES)[:, None, None]
    for high in (n, height - _SIZE + 1, width - _SIZE + 1)
  )
  offsets = np.arange(_SIZE)
  patches = images[image, row + offsets[:, None], column + offsets]
  return patches.reshape(_NUM_SAMPLES, -1).astype(np.float64)


def _normalized(patches):
  patches = patches - patches.mean(axis=-1, keepdims=True)
  return patches / (patches.var(axis=-1, keepdims=True) + _FLAT) ** 0.5


@jax.jit
def _responses(images, matrix, offset):
  """float32 `[n, 8 * filters]` of images, not yet standardized."""
  n, height, width, _ = images.shape
  h, w = height - _SIZE + 1, width - _SIZE + 1
  pixels = images.astype(jnp.float32)
  corners = [(i, j) for i in range(_SIZE) for j in range(_SIZE)]
  patches = jnp.stack([pixels[:, i : i + h, j : j + w] for i, j in corners], axis=3)
  z = _normalized(patches.reshape(n, h, w, -1)) @ matrix - offset
  halves = lambda length: (slice(length // 2), slice(length // 2, None))
  quadrants = [(rows, columns) for rows in halves(h) for columns in halves(w)]
  return jnp.concatenate(
    [
      jnp.sum(jnp.maximum(sign * z - _THRESHOLD, 0)[:, rows, columns], axis=(1, 2))
      for sign in (1, -1)
      for rows, columns in quadrants
    ],
    axis=1,
  )
