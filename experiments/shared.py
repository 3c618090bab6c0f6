"""Data and models of the example, a vision transformer, and held-out images."""

import dataclasses
import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

_EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"
sys.path.append(str(_EXAMPLES / "cifar100_resnet18"))

import data
import features
from data import CONFUSED, UserError, confuse, flip
from model import MLP, ResNet

__all__ = ["CONFUSED", "Images", "UserError", "confuse", "flip", "images", "make_model"]

HUMAN_LABELS = "cifar10n_human_labels.npz"


class ViT(nn.Module):
  """Vision transformer (arXiv 2010.11929) of 16 patches, without dropout."""

  num_classes: int
  width: int = 64  # Of the tokens; the hidden layers have four times as many
  depth: int = 4
  head_width: int = 16

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    del train
    patch = x.shape[1] // 4
    x = nn.Conv(self.width, (patch, patch), strides=(patch, patch), padding="VALID")(x)
    x = x.reshape(len(x), -1, self.width)
    first = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
    x = jnp.concatenate([jnp.tile(first, (len(x), 1, 1)), x], axis=1)
    x += self.param(
      "position", nn.initializers.normal(0.02), (1, x.shape[1], self.width)
    )
    for _ in range(self.depth):
      y = nn.LayerNorm(epsilon=1e-6)(x)
      x += nn.MultiHeadDotProductAttention(self.width // self.head_width)(y)
      y = nn.LayerNorm(epsilon=1e-6)(x)
      y = nn.gelu(nn.Dense(4 * self.width)(y), approximate=False)
      x += nn.Dense(self.width)(y)
    x = nn.LayerNorm(epsilon=1e-6)(x)[:, 0]
    return nn.Dense(self.num_classes, name="head")(x)


def make_model(name: str, num_classes: int, width: int | None) -> nn.Module:
  """A model whose `apply` takes images and `train`; its last layer is called "head"."""
  given = {} if width is None else {"width": width}
  if name == "resnet18":  # One block per stage, and torchvision's stem.
    return ResNet(num_classes, blocks=(1, 1, 1, 1), small_stem=False, **given)
  if name == "patches-mlp":
    return MLP(num_classes, depth=1, **given)
  return {"mlp": MLP, "vit": ViT}[name](num_classes, **given)


@dataclasses.dataclass(frozen=True)
class Images:
  """A dataset with some of its training images held out for validation.

  Attributes:
    train, validation, test: images uint8 (features: float32) `[n, h, w, channels]`.
    labels, validation_labels, test_labels: right ones, int32 `[n]`.
    given: labels int32 of the training and the validation images before any flipping.
    num_classes: how many there are.
    scale, mean, std: of the normalization `(x / scale - mean) / std`.
  """

  train: np.ndarray
  labels: np.ndarray
  validation: np.ndarray
  validation_labels: np.ndarray
  test: np.ndarray
  test_labels: np.ndarray
  given: np.ndarray
  num_classes: int
  scale: float
  mean: tuple[float, ...]
  std: tuple[float, ...]


def images(part, data_dir: str, cache: dict | None = None) -> Images:
  """The images of a part; the last sixth of the training images is held out.

  `cache` keeps loaded datasets and computed features, for other parts.
  """
  cache = {} if cache is None else cache
  if part.dataset not in cache:
    cache[part.dataset] = data.load(part.dataset, data_dir)
  found = cache[part.dataset]
  rows = min(part.train_images or len(found.train_labels), len(found.train_labels))
  trained = rows - max(1, rows // 6)
  if part.microbatch_size * part.num_microbatches > trained:
    raise UserError(
      f"a step needs {part.num_microbatches} x {part.microbatch_size} training images,"
      f" but there are {trained}."
    )
  given = found.train_labels
  if part.noisy_labels_key:
    path = pathlib.Path(data_dir, HUMAN_LABELS)
    given = data.noisy_labels(path, part.noisy_labels_key, given, found.num_classes)
  splits = found.train_images[:trained], found.train_images[trained:rows]
  train, validation, test = *splits, found.test_images
  scaling = found.scale, found.mean, found.std
  if part.model == "patches-mlp":
    key = part.dataset, rows
    if key not in cache:
      cache[key] = features.of_patches(train, validation, test)
    (train, validation, test), scaling = cache[key], (1.0, (0.0,), (1.0,))
  return Images(
    train,
    found.train_labels[:trained],
    validation,
    found.train_labels[trained:rows],
    test,
    found.test_labels,
    given[:rows],
    found.num_classes,
    *scaling,
  )
