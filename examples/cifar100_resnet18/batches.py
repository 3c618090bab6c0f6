"""Batches: what each step of each seed sees, a function of seed and step alone."""

import numpy as np

import labels as labels_lib
from data import Dataset
from plan import Part

# One stream of random numbers for each purpose; the values only have to differ.
_NOISE, _ORDER, _SOURCES, _CONTROL = range(4)


class Schedule:
  """The microbatches of one seed, the same for every arm of a part.

  Attributes:
    labels: int32 `[n]`, the training labels with their noise.
    wrong: bool `[steps, k]`, which microbatches have shifted labels.
  """

  def __init__(self, part: Part, dataset: Dataset, base: np.ndarray, seed: int):
    """Args: `base` are the training labels int32 `[n]` before any flipping."""
    self._part, self._seed = part, seed
    self._num_classes = dataset.num_classes
    self._epochs: dict[int, np.ndarray] = {}
    self.labels = labels_lib.flip(
      base, part.label_noise, dataset.num_classes, _rng(seed, _NOISE)
    )
    self.wrong = labels_lib.draw_wrong_sources(
      part.steps,
      part.num_microbatches,
      part.wrong_sources,
      _rng(seed, _SOURCES),
    )

  def batches(self, start: int, stop: int, clean: bool):
    """Indices and labels, int32 `[stop - start, k, b]`, of the steps from start on.

    The images come in a new random order each time all have been seen.

    Args:
      start: first step.
      stop: the step after the last.
      clean: whether the wrong sources are left out.
    """
    part, n = self._part, len(self.labels)
    k, b = part.num_microbatches, part.microbatch_size
    positions = np.arange(start * k * b, stop * k * b)
    needed = range(positions[0] // n, positions[-1] // n + 1)
    self._epochs = {
      epoch: self._epochs[epoch] if epoch in self._epochs else self._epoch(epoch)
      for epoch in needed
    }
    order = np.concatenate([self._epochs[epoch] for epoch in needed])
    indices = order[positions - needed[0] * n].reshape(-1, k, b)
    labels = self.labels[indices]
    if not clean:
      labels = labels_lib.shift(labels, self.wrong[start:stop], self._num_classes)
    return indices, labels

  def _epoch(self, epoch):
    rng = _rng(self._seed, _ORDER, epoch)
    return rng.permutation(len(self.labels)).astype(np.int32)


def random_choice(accepted: np.ndarray, seed: int, shuffled: bool) -> np.ndarray:
  """Chooses at random as many micro-gradients, in as many steps, as GAF accepted.

  Args:
    accepted: bool `[steps, k]`, what GAF accepted.
    seed: of the run that is imitated.
    shuffled: whether the steps' numbers come in a random order too; for k = 2 that
      is skipping the same share of steps at random.

  Returns:
    bool `[steps, k]`.
  """
  rng = _rng(seed, _CONTROL)
  sizes = accepted.sum(axis=1)
  if shuffled:
    sizes = rng.permutation(sizes)
  rank = np.argsort(np.argsort(rng.random(accepted.shape), axis=1), axis=1)
  return rank < sizes[:, None]


def _rng(*key):
  return np.random.default_rng(key)
