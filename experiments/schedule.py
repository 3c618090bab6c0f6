"""The microbatches of each step, a function of seed and step alone."""

from typing import Any, NamedTuple

import numpy as np

from shared import CONFUSED, Images, UserError, confuse, flip

HUMAN = "human-labels"
# One stream of random numbers for each purpose; the results depend on the values.
_NOISE, _ORDER, _SOURCES, _CONTROL = 0, 1, 2, 3
_WRONG_LABELS, _CLASSES, _HELD_OUT = 5, 6, 7
# Number of classes that a source prefers, where sources are skewed.
_OWN_CLASSES = 3


class Batches(NamedTuple):
  """The microbatches of n steps."""

  steps: Any  # int32 `[n]`, their numbers
  indices: Any  # int32 `[n, k, b]`, which training images
  labels: Any  # int32 `[n, k, b]`
  wrong: Any  # bool `[n, k]`, whether a microbatch comes from a wrong source


class Schedule:
  """The microbatches of one seed, the same for every arm of a part.

  Attributes:
    labels: int32 `[n]`, the training labels with their noise.
    mislabeled: bool `[n]`, where they differ from the right ones.
    wrong: bool `[steps, k]`, which microbatches come from wrong sources.
    control_key: seeds the controls' random choices.
  """

  def __init__(self, part: Any, images: Images, seed: int):
    self._part, self._seed, self._images = part, seed, images
    self._shape = part.num_microbatches, part.microbatch_size
    self.control_key = (seed, _CONTROL)
    self._epochs: dict[int, np.ndarray] = {}
    base = images.given
    if part.wrong_kind == HUMAN:  # Labels by people come from wrong sources only.
      base = np.concatenate([images.labels, images.validation_labels])
    base, held_out = np.split(base, [len(images.labels)])
    self.labels = self._noisy(base, _NOISE)
    self._noisy_held_out = self._noisy(held_out, _HELD_OUT)
    self.mislabeled = self.labels != images.labels
    draws, k = 1 if part.persistent else part.steps, part.num_microbatches
    wrong = draw_wrong_sources(draws, k, part.wrong_sources, _rng(seed, _SOURCES))
    self.wrong = np.broadcast_to(wrong, (part.steps, k))
    if part.skew:
      self._own = [self._own_rows(base, source) for source in range(k)]

  def batches(self, start: int, stop: int, clean: bool) -> Batches:
    """Batches of the steps in `[start, stop)`; with `clean`, nothing is wrong.

    Each pass has a new random order; with `skew`, each step draws anew.
    """
    part, steps, indices = self._part, range(start, stop), self._indices(start, stop)
    labels, wrong = self.labels[indices], self.wrong[start:stop]
    if clean:
      labels, wrong = self._images.labels[indices], np.zeros_like(wrong)
    if part.wrong_kind == "shifted-labels":
      shifted = (labels + 1) % self._images.num_classes
      labels = np.where(wrong[..., None], shifted, labels)
    if part.wrong_kind == "random-labels" and wrong.any():
      drawn = np.stack([self._drawn(_WRONG_LABELS, step) for step in steps])
      labels = np.where(wrong[..., None], drawn, labels)
    if part.wrong_kind == HUMAN:
      labels = np.where(wrong[..., None], self._images.given[indices], labels)
    return Batches(np.arange(start, stop, dtype=np.int32), indices, labels, wrong)

  def validation_labels(self, clean: bool) -> np.ndarray:
    """Labels int32 `[v]` of the held-out images, as wrong as the training labels.

    The i-th image belongs to source i modulo k. Inputs are always right here.
    """
    part, right = self._part, self._images.validation_labels
    if clean:
      return right
    labels, source = self._noisy_held_out, np.arange(len(right))
    wrong = self.wrong[0][source % part.num_microbatches]
    others, number = labels, self._images.num_classes
    if part.wrong_kind == "shifted-labels":
      others = (labels + 1) % number
    if part.wrong_kind == "random-labels":
      rng = _rng(self._seed, _HELD_OUT, _WRONG_LABELS)
      others = rng.integers(number, size=len(right), dtype=np.int32)
    if part.wrong_kind == HUMAN:
      others = self._images.given[-len(right) :]
    return np.where(wrong, others, labels)

  def wrong_examples(self) -> np.ndarray:
    """Bool `[steps, k, b]`, which are mislabeled or from a wrong source."""
    found = np.zeros((self._part.steps, *self._shape), bool)
    if self.mislabeled.any():
      found |= self.mislabeled[self._indices(0, self._part.steps)]
    return found | self.wrong[..., None]

  def _noisy(self, labels, purpose):
    part, rng = self._part, _rng(self._seed, purpose)
    number = self._images.num_classes
    if part.random_labels:
      return rng.integers(number, size=len(labels), dtype=np.int32)
    if part.asymmetric:
      return confuse(labels, part.label_noise, CONFUSED[part.dataset], rng)
    return flip(labels, part.label_noise, number, rng)

  def _indices(self, start, stop):
    if self._part.skew:
      return np.stack([self._skewed(step) for step in range(start, stop)])
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

  def _own_rows(self, labels, source):
    rng = _rng(self._seed, _CLASSES, source)
    classes = rng.choice(self._images.num_classes, _OWN_CLASSES, replace=False)
    rows = np.flatnonzero(np.isin(labels, classes)).astype(np.int32)
    if not len(rows):
      raise UserError(f"source {source + 1} has no training image of its own classes.")
    return rows

  def _skewed(self, step):
    """Indices `[k, b]`, a share `skew` of them from the classes of each source."""
    rng = _rng(self._seed, _ORDER, step)
    drawn = rng.integers(len(self.labels), size=self._shape, dtype=np.int32)
    own = np.stack([rng.choice(rows, self._shape[1]) for rows in self._own])
    return np.where(rng.random(self._shape) < self._part.skew, own, drawn)

  def _drawn(self, purpose, step):
    rng = _rng(self._seed, purpose, step)
    return rng.integers(self._images.num_classes, size=self._shape, dtype=np.int32)


def draw_wrong_sources(steps: int, k: int, number: int, rng) -> np.ndarray:
  """Bool `[steps, k]`, in which `number` of each step's k are True."""
  rank = np.argsort(np.argsort(rng.random((steps, k)), axis=1), axis=1)
  return rank < number


def _rng(*key):
  return np.random.default_rng(key)
