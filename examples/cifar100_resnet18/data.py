"""Data: the images and labels of digits, CIFAR-10 and CIFAR-100, checked."""

import dataclasses
import hashlib
import pathlib
import shutil
import tarfile
import urllib.request

import numpy as np

import safe_pickle
from common.command import UserError


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Images as they are stored, and how to make network inputs of them.

  Images of features are float32 (`features.of_patches`).
  """

  train_images: np.ndarray  # uint8 `[n, height, width, channels]`
  train_labels: np.ndarray  # int32 `[n]`, in `[0, num_classes)`
  test_images: np.ndarray  # uint8 `[m, height, width, channels]`
  test_labels: np.ndarray  # int32 `[m]`
  num_classes: int  # 10 or 100
  scale: float  # What a pixel is divided by
  mean: tuple[float, ...]  # Per channel, taken off after the division
  std: tuple[float, ...]  # Per channel, divided by after that
  notes: tuple[str, ...] = ()  # Sentences that the user should read
  # Held out of the training images, of which there may be none.
  validation_images: np.ndarray = dataclasses.field(
    default_factory=lambda: np.zeros((0, 1, 1, 1), np.uint8)
  )  # As the others, `[v, height, width, channels]`
  validation_labels: np.ndarray = dataclasses.field(
    default_factory=lambda: np.zeros(0, np.int32)
  )  # int32 `[v]`


@dataclasses.dataclass(frozen=True)
class Archive:
  """An official CIFAR python archive (https://www.cs.toronto.edu/~kriz/cifar.html)."""

  file: str  # Name of the archive
  md5: str  # Its published checksum
  folder: str  # The folder in it
  train_files: tuple[str, ...]  # The pickles of the training images, in order
  test_file: str  # The pickle of the test images
  label_key: str  # The key of the labels in each pickle
  num_classes: int  # How many there are
  mean: tuple[float, ...]  # Of the training images by channel, pixels in [0, 1]
  std: tuple[float, ...]  # Likewise

  @property
  def url(self) -> str:
    return f"https://www.cs.toronto.edu/~kriz/{self.file}"


ARCHIVES = {
  "cifar10": Archive(
    file="cifar-10-python.tar.gz",
    md5="c58f30108f718f92721af3b95e74349a",
    folder="cifar-10-batches-py",
    train_files=tuple(f"data_batch_{i}" for i in range(1, 6)),
    test_file="test_batch",
    label_key="labels",
    num_classes=10,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
  ),
  "cifar100": Archive(
    file="cifar-100-python.tar.gz",
    md5="eb9058c3a382ffc7106e4002c42a8d85",
    folder="cifar-100-python",
    train_files=("train",),
    test_file="test",
    label_key="fine_labels",
    num_classes=100,
    mean=(0.5071, 0.4866, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
  ),
}
_ROWS = (50_000, 10_000)
_DIGITS_TRAINING = 1_197


def load(name: str, data_dir: str, download: bool = False) -> Dataset:
  """Loads 'digits', which scikit-learn brings along, 'cifar10' or 'cifar100'.

  `data_dir` holds the CIFAR archive or the folder in it; `download` fetches what is
  missing. Raises a `UserError` if the data is not what its name says.
  """
  if name == "digits":
    return _digits()
  archive = ARCHIVES[name]
  read = _reader(archive, pathlib.Path(data_dir), download)
  train = [_images(archive, *read(file)) for file in archive.train_files]
  arrays = [
    *map(np.concatenate, zip(*train)),
    *_images(archive, *read(archive.test_file)),
  ]
  rows = (len(arrays[0]), len(arrays[2]))
  notes = ()
  if rows != _ROWS:
    notes = (
      f"{archive.folder} holds {rows[0]} training and {rows[1]} test images; the"
      f" official archive has {_ROWS[0]} and {_ROWS[1]}, so figures do not compare"
      " with published ones.",
    )
  scaling = 255.0, archive.mean, archive.std
  return Dataset(*arrays, archive.num_classes, *scaling, notes)


def _digits() -> Dataset:
  from sklearn import datasets  # Slow to import, and CIFAR does not need it.

  bunch = datasets.load_digits()
  order = np.random.default_rng(0).permutation(len(bunch.target))
  images = bunch.images.astype(np.uint8)[order, :, :, None]
  labels = bunch.target.astype(np.int32)[order]
  train, test = slice(_DIGITS_TRAINING), slice(_DIGITS_TRAINING, None)
  arrays = images[train], labels[train], images[test], labels[test]
  return Dataset(*arrays, 10, 16.0, (0.0,), (1.0,))


def _reader(archive, data_dir, download):
  """A function from a file's name to its bytes and where they come from."""
  folder, packed = data_dir / archive.folder, data_dir / archive.file
  if folder.is_dir():
    return lambda name: (_read(folder / name), str(folder / name))
  if not packed.is_file():
    if not download:
      raise UserError(
        f"there is no {folder} and no {packed}; get {archive.url} and put it there,"
        " name its folder with --data-dir, or let --download fetch it."
      )
    _download(archive, packed)
  content = _read(packed)
  digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
  if digest != archive.md5:
    raise UserError(
      f"{packed} is not the official archive or not whole: its md5 is {digest},"
      f" expected {archive.md5}; get it again from {archive.url}."
    )

  def read(name):
    # Read in memory: a tar file can name paths outside the folder.
    with tarfile.open(packed) as tar:
      member = tar.extractfile(f"{archive.folder}/{name}")
      return member.read(), f"{packed}:{archive.folder}/{name}"

  return read


def _read(path):
  try:
    return path.read_bytes()
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def _download(archive, packed):
  partial = packed.with_name(f".{packed.name}.partial")
  try:
    packed.parent.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen(archive.url, timeout=30) as response:
      with open(partial, "wb") as file:
        shutil.copyfileobj(response, file)
    partial.replace(packed)
  except OSError as error:  # URLError and timeouts are OSErrors.
    partial.unlink(missing_ok=True)
    raise UserError(
      f"{archive.url} could not be fetched ({error}); get it on a machine with a"
      f" network and put it at {packed}."
    ) from error


def _images(archive, content, source):
  """Images uint8 `[n, 32, 32, 3]` and labels int32 `[n]` of one pickle."""
  batch = safe_pickle.loads(content, source)
  if not isinstance(batch, dict) or not {"data", archive.label_key} <= batch.keys():
    raise UserError(
      f"{source} is not a CIFAR batch: it must hold a dict with 'data' and"
      f" {archive.label_key!r}."
    )
  pixels, found = batch["data"], type(batch["data"]).__name__
  if isinstance(pixels, np.ndarray):
    found = f"{pixels.dtype} {list(pixels.shape)}"
  if found != f"uint8 [{len(pixels)}, 3072]" or not len(pixels):
    raise UserError(f"{source}: 'data' must be uint8 [n, 3072], found {found}.")
  labels = checked_labels(
    batch[archive.label_key],
    len(pixels),
    archive.num_classes,
    f"{source}: {archive.label_key!r}",
  )
  return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy(), labels


def checked_labels(values, rows: int, num_classes: int, source: str) -> np.ndarray:
  """Labels int32 `[rows]`.

  Raises:
    UserError: for anything but `rows` integers in `[0, num_classes)`.
  """
  try:
    labels = np.asarray(values)
  except ValueError as error:  # Ragged.
    raise UserError(f"{source} must be {rows} integers.") from error
  if labels.shape != (rows,) or not np.issubdtype(labels.dtype, np.integer):
    raise UserError(
      f"{source} must be {rows} integers, found {labels.dtype} {list(labels.shape)}."
    )
  low, high = labels.min(), labels.max()
  if low < 0 or high >= num_classes:
    raise UserError(
      f"{source} must lie in 0 to {num_classes - 1}, found {low} to {high}."
    )
  return labels.astype(np.int32)
