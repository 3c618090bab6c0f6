"""Batches: what each step of each seed sees, a function of seed and step alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import labels as labels_lib
from common.command import UserError
from data import Dataset
from plan import HUMAN, Part

# One stream of random numbers for each purpose; the values only have to differ.
_NOISE, _ORDER, _SOURCES, _CONTROL, _AUGMENT, _WRONG_LABELS, _CLASSES, _HELD_OUT = (
  range(8)
)
# How many classes a source has of its own, where sources are skewed.
_OWN_CLASSES = 3
# Pixels that a crop moves by, at most, as usual for CIFAR.
_SHIFT = 4


class Batches(NamedTuple):
  """What n steps see."""

  steps: Any  # int32 `[n]`, their numbers
  indices: Any  # int32 `[n, k, b]`, which training images
  labels: Any  # int32 `[n, k, b]`
  wrong: Any  # bool `[n, k]`, whether a microbatch comes from a wrong source
  # int8 `[n, k, b, 3]`, rows and columns in 0 to 8 at which a crop of the padded
  # image begins, and whether it is mirrored; None without augmentation.
  crops: Any
  # uint8 `[n, k, b, height, width, channels]` where they are not looked up by
  # `indices` on the device, else None.
  images: Any = None


class Schedule:
  """The microbatches of one seed, the same for every arm of a part.

  Attributes:
    labels: int32 `[n]`, the training labels with their noise.
    mislabeled: bool `[n]`, which of them are not the dataset's.
    wrong: bool `[steps, k]`, which microbatches come from wrong sources.
    control_key: numbers that the controls' choices come from.
  """

  def __init__(self, part: Part, dataset: Dataset, base: np.ndarray, seed: int):
    """Args: `base` are the labels before any flipping, of those held out at the end."""
    self._part, self._seed, self._base = part, seed, dataset.train_labels
    self._num_classes = dataset.num_classes
    self.control_key = (seed, _CONTROL)
    self._epochs: dict[int, np.ndarray] = {}
    self._by_people, self._held_out = base, dataset.validation_labels
    if part.wrong_kind == HUMAN:  # Of the wrong sources alone.
      base = np.concatenate([self._base, self._held_out])
    base, held_out = np.split(base, [len(self._base)])
    self.labels = self._noisy(base, _NOISE)
    self._noisy_held_out = self._noisy(held_out, _HELD_OUT)
    self.mislabeled = self.labels != self._base
    draws, k = 1 if part.persistent else part.steps, part.num_microbatches
    wrong = labels_lib.draw_wrong_sources(
      draws, k, part.wrong_sources, _rng(seed, _SOURCES)
    )
    self.wrong = np.broadcast_to(wrong, (part.steps, k))
    if part.skew:
      self._own = [self._own_rows(base, source) for source in range(k)]
    if part.balanced:
      self._classes = _classes(base, dataset.num_classes, part)

  def batches(self, start: int, stop: int, clean: bool) -> Batches:
    """What the steps from `start` to before `stop` see; `clean`: nothing is wrong.

    Without `balanced` and `skew`, the images come in a new random order each time all
    have been seen; with them, each step draws anew, by the labels before flipping.
    """
    part, steps, indices = self._part, range(start, stop), self._indices(start, stop)
    labels, wrong = self.labels[indices], self.wrong[start:stop]
    if clean:
      labels, wrong = self._base[indices], np.zeros_like(wrong)
    if part.wrong_kind == "shifted-labels":
      labels = labels_lib.shift(labels, wrong, self._num_classes)
    if part.wrong_kind == "random-labels" and wrong.any():
      drawn = np.stack([self._drawn(_WRONG_LABELS, step) for step in steps])
      labels = np.where(wrong[..., None], drawn, labels)
    if part.wrong_kind == HUMAN:
      labels = np.where(wrong[..., None], self._by_people[indices], labels)
    crops = None
    if part.augment:
      crops = np.stack([self._crops(step) for step in steps])
    return Batches(
      np.arange(start, stop, dtype=np.int32), indices, labels, wrong, crops
    )

  def validation_labels(self, clean: bool) -> np.ndarray:
    """Labels int32 `[v]` of what is held out, as wrong as those that are trained on.

    Each is of one of the sources in turn; what is wrong with inputs is not wrong here.
    """
    part, right = self._part, self._held_out
    if clean or not len(right):
      return right
    labels, source = self._noisy_held_out, np.arange(len(right))
    wrong = self.wrong[0][source % part.num_microbatches]
    others = labels
    if part.wrong_kind == "shifted-labels":
      others = (labels + 1) % self._num_classes
    if part.wrong_kind == "random-labels":
      rng = _rng(self._seed, _HELD_OUT, _WRONG_LABELS)
      others = rng.integers(self._num_classes, size=len(right), dtype=np.int32)
    if part.wrong_kind == HUMAN:
      others = self._by_people[-len(right) :]
    return np.where(wrong, others, labels)

  def _noisy(self, labels, purpose):
    part, rng = self._part, _rng(self._seed, purpose)
    if part.random_labels:
      return rng.integers(self._num_classes, size=len(labels), dtype=np.int32)
    if part.asymmetric:
      pairs = labels_lib.CONFUSED[part.dataset]
      return labels_lib.confuse(labels, part.label_noise, pairs, rng)
    return labels_lib.flip(labels, part.label_noise, self._num_classes, rng)

  def wrong_examples(self) -> np.ndarray:
    """Bool `[steps, k, b]`, what is mislabeled or from a wrong source."""
    part = self._part
    found = np.zeros((part.steps, *self._shape), bool)
    if self.mislabeled.any():
      found |= self.mislabeled[self._indices(0, part.steps)]
    return found | self.wrong[..., None]

  def _indices(self, start, stop):
    if self._part.balanced:
      return np.stack([self._balanced(step) for step in range(start, stop)])
    if self._part.skew:
      return np.stack([self._skewed(step) for step in range(start, stop)])
    return self._in_epochs(start, stop)

  def _in_epochs(self, start, stop):
    n, (k, b) = len(self.labels), self._shape
    positions = np.arange(start * k * b, stop * k * b)
    needed = range(positions[0] // n, positions[-1] // n + 1)
    self._epochs = {
      epoch: self._epochs[epoch] if epoch in self._epochs else self._epoch(epoch)
      for epoch in needed
    }
    order = np.concatenate([self._epochs[epoch] for epoch in needed])
    return order[positions - needed[0] * n].reshape(-1, k, b)

  def _epoch(self, epoch):
    rng = _rng(self._seed, _ORDER, epoch)
    return rng.permutation(len(self.labels)).astype(np.int32)

  def _balanced(self, step):
    """Indices `[k, b]`, in which no image comes twice."""
    rng = _rng(self._seed, _ORDER, step)
    k, b = self._shape
    each = b // self._num_classes
    drawn = [rng.choice(rows, k * each, replace=False) for rows in self._classes]
    return np.concatenate([rows.reshape(k, each) for rows in drawn], axis=1)

  def _own_rows(self, labels, source):
    rng = _rng(self._seed, _CLASSES, source)
    classes = rng.choice(self._num_classes, _OWN_CLASSES, replace=False)
    rows = np.flatnonzero(np.isin(labels, classes)).astype(np.int32)
    if not len(rows):
      raise UserError(
        f"none of the {len(labels)} training images is of a class that source"
        f" {source + 1} has of its own; --skew needs more of them."
      )
    return rows

  def _skewed(self, step):
    """Indices `[k, b]`, of which about the share `skew` is from a source's classes."""
    rng = _rng(self._seed, _ORDER, step)
    drawn = rng.integers(len(self.labels), size=self._shape, dtype=np.int32)
    own = np.stack([rng.choice(rows, self._shape[1]) for rows in self._own])
    return np.where(rng.random(self._shape) < self._part.skew, own, drawn)

  def _drawn(self, purpose, step):
    rng = _rng(self._seed, purpose, step)
    return rng.integers(self._num_classes, size=self._shape, dtype=np.int32)

  def _crops(self, step):
    rng = _rng(self._seed, _AUGMENT, step)
    return rng.integers(
      [2 * _SHIFT + 1] * 2 + [2], size=(*self._shape, 3), dtype=np.int8
    )

  @property
  def _shape(self):
    return self._part.num_microbatches, self._part.microbatch_size


def _classes(labels, num_classes, part):
  """The images of each class, enough of them for a step."""
  rows = [np.flatnonzero(labels == c).astype(np.int32) for c in range(num_classes)]
  each, rest = divmod(part.microbatch_size, num_classes)
  if rest:
    raise UserError(
      f"balanced microbatches have equally many images of {num_classes} classes, so"
      f" --microbatch-size {part.microbatch_size} must be a multiple of that."
    )
  needed = each * part.num_microbatches
  smallest = min(range(num_classes), key=lambda c: len(rows[c]))
  if len(rows[smallest]) < needed:
    raise UserError(
      f"{part.num_microbatches} balanced microbatches of {part.microbatch_size} need"
      f" {needed} images of each class, but class {smallest} has"
      f" {len(rows[smallest])}."
    )
  return rows


def cropped(images: jax.Array, crops: jax.Array) -> jax.Array:
  """Images uint8 `[k, b, height, width, channels]`, cropped and mirrored by `crops`.

  The image moves by up to 4 pixels over a black border, as usual for CIFAR.
  """
  around = ((0, 0), (_SHIFT, _SHIFT), (_SHIFT, _SHIFT), (0, 0))
  flat = images.reshape(-1, *images.shape[2:])

  def crop(padded, how):
    start = (how[0].astype(int), how[1].astype(int), 0)
    image = jax.lax.dynamic_slice(padded, start, flat.shape[1:])
    return jnp.where(how[2] == 1, image[:, ::-1], image)

  return jax.vmap(crop)(jnp.pad(flat, around), crops.reshape(-1, 3)).reshape(
    images.shape
  )


def _rng(*key):
  return np.random.default_rng(key)
