"""Datasets: digits, CIFAR-10 and CIFAR-100, with checks and label noise."""

import dataclasses
import hashlib
import io
import pathlib
import pickle
import shutil
import tarfile
import urllib.request
import zipfile

import numpy as np


class UserError(Exception):
  """A wrong option, file or directory; users read the message."""


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Images as stored, and the numbers that normalize them."""

  train_images: np.ndarray  # uint8 `[n, height, width, channels]`
  train_labels: np.ndarray  # int32 `[n]`, in `[0, num_classes)`
  test_images: np.ndarray  # uint8 `[m, height, width, channels]`
  test_labels: np.ndarray  # int32 `[m]`
  num_classes: int
  scale: float  # The largest pixel value
  mean: tuple[float, ...]  # Per channel, of pixels in [0, 1]
  std: tuple[float, ...]  # Likewise
  notes: tuple[str, ...] = ()  # Sentences that the user should read


@dataclasses.dataclass(frozen=True)
class Archive:
  """An official CIFAR python archive (https://www.cs.toronto.edu/~kriz/cifar.html)."""

  file: str
  md5: str  # The published checksum
  folder: str  # The folder in the archive
  train_files: tuple[str, ...]  # Pickles of the training images, in order
  test_file: str
  label_key: str  # The key of the labels in each pickle
  num_classes: int
  mean: tuple[float, ...]  # See `Dataset`
  std: tuple[float, ...]

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
DATASETS = ("digits", *ARCHIVES)


def load(name: str, data_dir: str | pathlib.Path, download: bool = False) -> Dataset:
  """Loads "digits", which scikit-learn includes, "cifar10" or "cifar100".

  `data_dir` holds the CIFAR archive or the folder in it; `download` fetches a missing
  archive. Raises a `UserError` if the files are missing, damaged or different.
  """
  if name == "digits":
    return _digits()
  archive = ARCHIVES[name]
  read = _reader(archive, pathlib.Path(data_dir), download)
  train = [_images(archive, *read(file)) for file in archive.train_files]
  images, labels = map(np.concatenate, zip(*train))
  test_images, test_labels = _images(archive, *read(archive.test_file))
  notes = ()
  if (rows := (len(images), len(test_images))) != (50_000, 10_000):
    notes = (
      f"{archive.folder} holds {rows[0]} training and {rows[1]} test images instead of"
      " 50000 and 10000; do not compare the results with published ones.",
    )
  arrays = images, labels, test_images, test_labels
  return Dataset(*arrays, archive.num_classes, 255.0, archive.mean, archive.std, notes)


def _digits():
  from sklearn import datasets  # Slow to import, and CIFAR does not need it.

  bunch = datasets.load_digits()
  order = np.random.default_rng(0).permutation(len(bunch.target))
  images = bunch.images.astype(np.uint8)[order, :, :, None]
  labels = bunch.target.astype(np.int32)[order]
  arrays = images[:1197], labels[:1197], images[1197:], labels[1197:]
  return Dataset(*arrays, 10, 16.0, (0.0,), (1.0,))


def _reader(archive, data_dir, download):
  """Returns a function from a file's name to its bytes and a name for errors."""
  folder, packed = data_dir / archive.folder, data_dir / archive.file
  if folder.is_dir():
    return lambda name: (_read(folder / name), str(folder / name))
  if not packed.is_file():
    if not download:
      raise UserError(
        f"found neither {folder} nor {packed}; get {archive.url} and put it there, name"
        " its folder with --data-dir, or fetch it with --download."
      )
    _download(archive, packed)
  content = _read(packed)
  digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
  if digest != archive.md5:
    raise UserError(
      f"{packed} is incomplete or not the official archive: its md5 is {digest},"
      f" expected {archive.md5}; get it again from {archive.url}."
    )

  def read(name):
    # Read in memory: a tar file can name paths outside of its folder.
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
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
      f"{archive.url} could not be fetched ({error}); get it on another machine and put"
      f" it at {packed}."
    ) from error


def _images(archive, content, source):
  """Images uint8 `[n, 32, 32, 3]` and labels int32 `[n]` of one pickle."""
  batch = load_pickle(content, source)
  if not isinstance(batch, dict) or not {"data", archive.label_key} <= batch.keys():
    raise UserError(
      f"{source} is not a CIFAR batch: expected a dict with 'data' and"
      f" {archive.label_key!r}."
    )
  pixels, found = batch["data"], type(batch["data"]).__name__
  if isinstance(pixels, np.ndarray):
    found = f"{pixels.dtype} {list(pixels.shape)}"
  if found != f"uint8 [{len(pixels)}, 3072]" or not len(pixels):
    raise UserError(f"{source}: 'data' must be uint8 [n, 3072], found {found}.")
  where = f"{source}: {archive.label_key!r}"
  labels = batch[archive.label_key]
  labels = checked_labels(labels, len(pixels), archive.num_classes, where)
  return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy(), labels


def checked_labels(values, rows: int, num_classes: int, source: str) -> np.ndarray:
  """Labels int32 `[rows]`; a `UserError` unless integers in `[0, num_classes)`."""
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
      f"{source} must be in 0 to {num_classes - 1}, found {low} to {high}."
    )
  return labels.astype(np.int32)


# Plain number types: no objects, no records.
_NUMBERS = {*"?bBhHiIlLqQfd", "b1", "i1", "i2", "i4", "i8"}
_NUMBERS |= {"u1", "u2", "u4", "u8", "f4", "f8"}


def _dtype(name, *copy_and_align):
  if name not in _NUMBERS:
    raise pickle.UnpicklingError(f"an array of dtype {name!r} is not allowed")
  return np.dtype(name, *copy_and_align)


def _reconstruct(kind, shape, typecode):
  del typecode  # The array's state, which follows, holds its dtype.
  if kind is not np.ndarray or tuple(shape) != (0,):
    raise pickle.UnpicklingError("only plain arrays are allowed")
  return np.ndarray(shape, np.int8)


def _encode(text, encoding="latin1"):
  if encoding != "latin1":
    raise pickle.UnpicklingError(f"the encoding {encoding!r} is not allowed")
  return text.encode("latin1")


# Everything that a pickle may call: stand-ins that only create arrays.
_ALLOWED = {
  "numpy.core.multiarray._reconstruct": _reconstruct,
  "numpy._core.multiarray._reconstruct": _reconstruct,
  "numpy.ndarray": np.ndarray,
  "numpy.dtype": _dtype,
  "_codecs.encode": _encode,
  "builtins.bytes": bytes,
  "__builtin__.bytes": bytes,
}


class _Unpickler(pickle.Unpickler):
  def find_class(self, module, name):
    if f"{module}.{name}" not in _ALLOWED:
      raise pickle.UnpicklingError(f"it asks for {module}.{name}")
    return _ALLOWED[f"{module}.{name}"]


def load_pickle(content: bytes, source: str):
  """Loads a pickle of dicts, lists, numbers, strings and number arrays.

  Nothing else that the pickle names is imported or called, so a hostile file is
  harmless. Strings of Python 2 are decoded as latin1.
  """
  try:
    return _Unpickler(io.BytesIO(content), encoding="latin1").load()
  except Exception as error:  # A broken pickle can raise nearly anything.
    raise UserError(
      f"{source} is not a readable pickle of arrays (truncated, damaged, or not a data"
      f" file): {error or type(error).__name__}."
    ) from error


def flip(labels: np.ndarray, share: float, num_classes: int, rng) -> np.ndarray:
  """Changes `round(share * n)` of the labels int32 `[n]` to a random other class."""
  which = rng.permutation(len(labels))[: round(share * len(labels))]
  noisy = labels.copy()
  noisy[which] += rng.integers(1, num_classes, len(which), dtype=np.int32)
  return noisy % num_classes


# For some classes, the class that they are usually mistaken for (arXiv 1609.03683).
CONFUSED = {
  "digits": {2: 7, 3: 8, 5: 6, 6: 5, 7: 1},
  "cifar10": {2: 0, 3: 5, 4: 7, 5: 3, 9: 1},
}


def confuse(labels: np.ndarray, share: float, pairs: dict[int, int], rng) -> np.ndarray:
  """Changes a share of the labels of each class in `pairs`: asymmetric noise."""
  to = np.arange(max(*pairs, labels.max(initial=0)) + 1)
  to[list(pairs)] = list(pairs.values())
  return np.where(rng.random(len(labels)) < share, to[labels], labels).astype(np.int32)


# Far above any file of labels, far below what would fill the memory.
_MAX_BYTES = 1 << 28


def noisy_labels(path, key: str | None, clean: np.ndarray, num_classes: int):
  """Reads the training labels int32 `[n]` that replace the clean ones.

  Args:
    path: an `.npy` file of one array, an `.npz` file, or a `.pt` file of CIFAR-N
      (a zip file that holds one pickle).
    key: the array's name in the file; None where there is only one noisy array.
    clean: int32 `[n]`. If the file has `clean_label`, its first n must equal these.
      Only a file with `clean_label` may hold more than n labels.
    num_classes: labels are in `[0, num_classes)`.
  """
  arrays, rows = _arrays(pathlib.Path(path)), len(clean)
  choices = [name for name in arrays if "clean" not in name and "coarse" not in name]
  if key is None and len(choices) == 1:
    key = choices[0]
  if key not in arrays:
    problem = f"has no {key!r}" if key else "needs --noisy-labels-key"
    found = ", ".join(choices) or "no noisy labels"
    raise UserError(f"{path} {problem}; it holds {found}.")
  known, found = arrays.get("clean_label"), arrays[key]
  if known is not None:
    known, found = (x[:rows] if np.ndim(x) else x for x in (known, found))
    known = checked_labels(known, rows, num_classes, f"{path}: 'clean_label'")
    if not np.array_equal(known, clean):
      raise UserError(
        f"{path} does not belong to these images: its clean labels differ from the"
        f" dataset's at {np.mean(known != clean):.0%} of the rows (another order, or"
        " another dataset)."
      )
  return checked_labels(found, rows, num_classes, f"{path}: {key!r}")


def _arrays(path):
  """The named arrays (or lists) in a file of labels."""
  if path.suffix not in (".npy", ".npz", ".pt"):
    raise UserError(f"{path} must be an .npy, .npz or .pt file.")
  content = _read(path)
  try:
    if path.suffix == ".npy":
      return {"labels": np.load(io.BytesIO(content), allow_pickle=False)}
    with zipfile.ZipFile(io.BytesIO(content)) as packed:
      members = {info.filename: info.file_size for info in packed.infolist()}
      if sum(members.values()) > _MAX_BYTES:
        raise UserError(f"{path} unpacks to too many bytes for a file of labels.")
      if path.suffix == ".pt":
        (pickled,) = [name for name in members if name.endswith("/data.pkl")]
        arrays = load_pickle(packed.read(pickled), f"{path}:{pickled}")
    if path.suffix == ".npz":
      with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        arrays = dict(stored)
  except (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile) as error:
    raise UserError(
      f"{path} is not a readable {path.suffix} file of labels (truncated, damaged or of"
      f" another kind): {error}."
    ) from error
  if not isinstance(arrays, dict):
    raise UserError(f"{path} must hold a dict of labels.")
  return arrays


class Batches:
  """The microbatches of one seed: a function of the step, so that runs can resume.

  Attributes:
    labels: int32 `[n]`, the training labels with their noise.
    wrong: bool `[k]`, the sources with every label shifted by one.
  """

  def __init__(self, dataset, seed, shape, noise, labels, num_wrong, balanced):
    """Args: `shape` is k, rows; `labels` replace the flipped ones if not None."""
    self._seed, self._shape, self._orders, (k, rows) = seed, shape, {}, shape
    clean, self._num_classes = dataset.train_labels, dataset.num_classes
    flipped = flip(clean, noise, self._num_classes, self._rng(0))
    self.labels = flipped if labels is None else labels
    self.wrong = self._rng(1).permutation(k) < num_wrong
    self._classes = []  # The images of each class, where microbatches are balanced
    if balanced:
      self._classes = [np.flatnonzero(clean == c) for c in range(self._num_classes)]
      if rows % self._num_classes:
        raise UserError(
          f"--balanced needs a --microbatch-size that is a multiple of"
          f" {self._num_classes}, the number of classes; found {rows}."
        )
      needed, least = k * rows // self._num_classes, min(map(len, self._classes))
      if least < needed:
        raise UserError(
          f"--balanced needs {needed} images of each class, but one has {least}."
        )

  def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training images and their labels, int32 `[k, rows]`."""
    indices = (self._balanced if self._classes else self._in_epochs)(step)
    labels = self.labels[indices]
    shifted = (labels + 1) % self._num_classes
    return indices.astype(np.int32), np.where(self.wrong[:, None], shifted, labels)

  def _in_epochs(self, step):
    (k, rows), n = self._shape, len(self.labels)
    start, stop = step * k * rows, (step + 1) * k * rows
    epochs, known = range(start // n, (stop - 1) // n + 1), self._orders
    new = lambda epoch: self._rng(2, epoch).permutation(n)
    self._orders = {e: known[e] if e in known else new(e) for e in epochs}
    order = np.concatenate(list(self._orders.values()))
    first = epochs[0] * n
    return order[start - first : stop - first].reshape(k, rows)

  def _balanced(self, step):
    """Equally many images of each class, drawn anew and disjoint within the step."""
    (k, rows), rng = self._shape, self._rng(2, step)
    shape = k, rows // self._num_classes
    drawn = [rng.choice(of_class, shape, replace=False) for of_class in self._classes]
    return np.concatenate(drawn, axis=1)

  def _rng(self, *key):
    return np.random.default_rng((self._seed, *key))
