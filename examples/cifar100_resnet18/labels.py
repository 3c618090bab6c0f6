"""Labels: flipped, confused, shifted, or read from a file of human labels."""

import io
import pathlib
import zipfile

import numpy as np

import safe_pickle
from common.command import UserError
from data import checked_labels

# Far above any label file, far below what would fill the memory.
_MOST_BYTES = 1 << 28


def flip(
  labels: np.ndarray, share: float, num_classes: int, rng: np.random.Generator
) -> np.ndarray:
  """Gives a share of the labels int32 `[n]` another class, each of them as often.

  Exactly `round(share * n)` labels change.
  """
  number = round(share * len(labels))
  which = rng.permutation(len(labels))[:number]
  noisy = labels.copy()
  noisy[which] += rng.integers(1, num_classes, number, dtype=np.int32)
  return noisy % num_classes


# For each class what it is usually mistaken for, by data set; no other is flipped.
CONFUSED = {
  "digits": {2: 7, 3: 8, 5: 6, 6: 5, 7: 1},
  "cifar10": {2: 0, 3: 5, 4: 7, 5: 3, 9: 1},
}


def confuse(
  labels: np.ndarray, share: float, pairs: dict[int, int], rng: np.random.Generator
) -> np.ndarray:
  """Gives a share of the labels of some classes the class that `pairs` has for it.

  Asymmetric noise, for CIFAR-10 that of arXiv 1609.03683: truck to automobile, bird to
  airplane, deer to horse, cat to dog and back; for digits that of its MNIST.
  """
  to = np.arange(labels.max() + 1)
  to[list(pairs)] = list(pairs.values())
  return np.where(rng.random(len(labels)) < share, to[labels], labels).astype(np.int32)


def shift(labels: np.ndarray, wrong: np.ndarray, num_classes: int) -> np.ndarray:
  """Labels `[..., k, b]` with those of the wrong microbatches `[..., k]` off by one."""
  return np.where(wrong[..., None], (labels + 1) % num_classes, labels)


def draw_wrong_sources(
  steps: int, k: int, number: int, rng: np.random.Generator
) -> np.ndarray:
  """Bool `[steps, k]`, `number` of each step's k drawn evenly."""
  rank = np.argsort(np.argsort(rng.random((steps, k)), axis=1), axis=1)
  return rank < number


def from_file(
  path: str, key: str | None, clean: np.ndarray, num_classes: int
) -> np.ndarray:
  """The training labels that a file gives instead of the clean ones.

  Args:
    path: an `.npy` file of one array, an `.npz` file, or a `.pt` file of CIFAR-N
      (a zip that holds one pickle).
    key: which array of it; None where there is no choice.
    clean: int32 `[n]`. Where the file holds `clean_label`, its first n must be
      these; only then may it hold more than n.
    num_classes: labels lie in `[0, num_classes)`.
  """
  arrays = _arrays(pathlib.Path(path))
  choices = [name for name in arrays if "clean" not in name and "coarse" not in name]
  if key is None:
    if len(choices) != 1:
      raise UserError(
        f"{path} holds {', '.join(choices) or 'no noisy labels'}; choose with"
        " --noisy-labels-key."
      )
    key = choices[0]
  if key not in arrays:
    raise UserError(f"{path} has no {key!r}; it holds {', '.join(arrays)}.")
  rows = len(clean)
  known = arrays.get("clean_label")
  if known is not None:
    known = checked_labels(
      _start(known, rows), rows, num_classes, f"{path}: 'clean_label'"
    )
    if not np.array_equal(known, clean):
      share = np.mean(known != clean)
      raise UserError(
        f"{path} does not belong to these images: its clean labels differ from the"
        f" dataset's at {share:.0%} of the rows (another order, or another"
        " dataset)."
      )
    arrays[key] = _start(arrays[key], rows)
  return checked_labels(arrays[key], rows, num_classes, f"{path}: {key!r}")


def _start(values, rows):
  return values[:rows] if np.ndim(values) else values


def _arrays(path) -> dict:
  """The named arrays (or lists) in a label file."""
  try:
    if path.stat().st_size > _MOST_BYTES:
      raise UserError(f"{path} is too large for a file of labels.")
    content = path.read_bytes()
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}.") from error
  if path.suffix not in (".npy", ".npz", ".pt"):
    raise UserError(f"{path} must be an .npy, .npz or .pt file.")
  try:
    if path.suffix == ".npy":
      return {"labels": np.load(io.BytesIO(content), allow_pickle=False)}
    with zipfile.ZipFile(io.BytesIO(content)) as packed:
      members = {info.filename: info.file_size for info in packed.infolist()}
      if sum(members.values()) > _MOST_BYTES:
        raise UserError(f"{path} unpacks to too much for a file of labels.")
      if path.suffix == ".pt":
        (pickled,) = [name for name in members if name.endswith("/data.pkl")]
        arrays = safe_pickle.loads(packed.read(pickled), f"{path}:{pickled}")
    if path.suffix == ".npz":
      with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        arrays = dict(stored)
  except (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile) as error:
    raise UserError(
      f"{path} is not a readable {path.suffix} file of labels (truncated, damaged"
      f" or of another kind): {error}."
    ) from error
  if not isinstance(arrays, dict):
    raise UserError(f"{path} must hold a dict of labels.")
  return arrays
