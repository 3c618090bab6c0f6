"""The standard library's source files, and each step's windows of them."""

import dataclasses
import hashlib
import pathlib
import platform
import sysconfig
from typing import NamedTuple

import numpy as np

from arms import Part
from shared import UserError

CONTEXT = 64
# Directories of other people's code, of fixtures, or of tables in bulk.
_LEFT_OUT = {
  *("site-packages", "dist-packages", "test", "tests", "idlelib", "distutils"),
  *("lib2to3", "encodings", "pydoc_data", "__pycache__"),
}
# Differs between machines: how this Python was built.
_LEFT_OUT_FILES = "_sysconfigdata"
_VALIDATION_WINDOWS, _HELD_OUT_WINDOWS = 128, 64
# Share of wrong training documents, where single ones are wrong.
WRONG_SHARE = 0.2
# One stream of random numbers for each purpose; the values only have to differ.
_PLACES, _SHARDS, _KINDS, _BYTES, _HELD_OUT = range(5)

# Kinds of targets of a document; inputs are always right.
KINDS = ("right", "code page", "shifted", "random bytes")
PARTS = {
  "clean": "nothing wrong",
  "code-page": "one shard wrong: targets in another code page (EBCDIC)",
  "shifted": "one shard wrong: targets shifted once too often",
  "documents": "one document in five wrong: single sequences compared",
}
_KIND_OF_SHARD = {"clean": 0, "code-page": 1, "shifted": 2}
_CODE_PAGE = np.frombuffer(
  bytes(range(256)).decode("latin-1").encode("cp037"), np.uint8
)


class Batches(NamedTuple):
  """Inputs and targets of n steps."""

  inputs: np.ndarray  # uint8 `[n, k, b, CONTEXT]`
  # uint8 `[n, k, b, CONTEXT]`, the byte after each input, where right.
  targets: np.ndarray


@dataclasses.dataclass(frozen=True)
class Text:
  """Bytes to train on and windows to validate on, of different files."""

  training: np.ndarray  # uint8 `[n]`, the training files, concatenated
  names: tuple[str, ...]  # The training files, which are the documents
  sizes: np.ndarray  # int64 `[documents]`, of each in bytes, at least CONTEXT + 2
  # uint8 `[windows, CONTEXT + 2]`, evenly spaced in half of the other files each: right
  # ones to measure with, and ones as wrong as the training's to choose with.
  validation: np.ndarray
  held_out: np.ndarray
  description: str  # For people
  digest: str  # Differs between texts


class Schedule:
  """The microbatches of one seed; they depend on seed and step alone.

  The i-th microbatch always reads the i-th shard of the documents; single sequences
  read any document. All documents of a shard are equally likely, and so are all places
  in a document.

  Attributes:
    names: of the documents.
    kinds: int `[documents]`, indices in `KINDS`.
    documents: int `[steps, k, b]`, the document of each window.
    wrong: bool `[steps, k]`, which microbatches are from wrong documents.
    held_out_targets: uint8 `[windows, CONTEXT]`, as wrong as the training targets.
    control_key: numbers that the controls' choices come from.
  """

  def __init__(self, text: Text, part: Part, seed: int):
    self._text, self._seed, self.names = text, seed, text.names
    self.control_key = (seed, *b"choice")
    number, k = len(text.sizes), part.num_microbatches
    order, rng = _rng(seed, _SHARDS).permutation(number), _rng(seed, _HELD_OUT)
    source = np.arange(len(text.held_out)) % k
    if part.name == "documents":
      shards = [order] * k
      self.kinds = _some_wrong(number, _rng(seed, _KINDS))
      held_out = _some_wrong(len(text.held_out), rng)
    else:
      shards = [order[i::k] for i in range(k)]
      of_shards = np.zeros(k, int)
      of_shards[_rng(seed, _KINDS).integers(k)] = _KIND_OF_SHARD[part.name]
      self.kinds = np.zeros(number, int)
      for kind, shard in zip(of_shards, shards):
        self.kinds[shard] = kind
      held_out = of_shards[source]
    self.held_out_targets = _targets(text.held_out, held_out, rng)
    sizes, starts = text.sizes, np.cumsum(text.sizes) - text.sizes
    shape = (k, part.microbatch_size)
    documents, places = [], []
    for n in range(part.steps):
      rng = _rng(seed, _PLACES, n)
      drawn = np.stack([rng.choice(shard, shape[1]) for shard in shards])
      documents.append(drawn)
      places.append(starts[drawn] + rng.integers(sizes[drawn] - CONTEXT - 1))
    self.documents, self._places = np.array(documents), np.array(places)
    self.wrong = self.kinds[self.documents[..., 0]] > 0

  def batches(self, start: int, stop: int, clean: bool) -> Batches:
    """Batches of the steps in `[start, stop)`; with `clean`, nothing is wrong."""
    places, kinds = self._places[start:stop], self.kinds[self.documents[start:stop]]
    windows = self._text.training[places[..., None] + np.arange(CONTEXT + 2)]
    targets = [
      _targets(seen, kind * (not clean), _rng(self._seed, _BYTES, start + n))
      for n, (seen, kind) in enumerate(zip(windows, kinds))
    ]
    return Batches(windows[..., :-2], np.array(targets))


def _some_wrong(number, rng):
  """Kinds `[number]`: WRONG_SHARE of them are wrong, equally often in each way."""
  kinds = np.zeros(number, int)
  wrong = np.arange(round(WRONG_SHARE * number))
  kinds[wrong] = 1 + wrong % (len(KINDS) - 1)
  return rng.permutation(kinds)


def _targets(windows, kinds, rng):
  """Targets `[..., CONTEXT]` of windows `[..., CONTEXT + 2]` by kinds `[...]`."""
  right = windows[..., 1:-1]
  drawn = rng.integers(256, size=right.shape, dtype=np.uint8)
  ways = right, _CODE_PAGE[right], windows[..., 2:], drawn
  return np.choose(kinds[..., None], ways)


def load(root: pathlib.Path | None = None) -> Text:
  """The source files of this Python's standard library, or of another directory."""
  root = root or pathlib.Path(sysconfig.get_paths()["stdlib"])
  files = {name: (root / name).read_bytes() for name in source_files(root)}
  kept = {name: content for name, content in files.items() if _is_long(content)}
  training = [name for name in kept if not is_validation(name)]
  others = [name for name in kept if is_validation(name)]
  if not training or len(others) < 2:
    raise UserError(
      f"the standard library in {root} has too few source files ({len(files)} with"
      f" {sum(map(len, files.values())):,} bytes) to train on; this Python may keep"
      " it zipped or compiled."
    )
  digest = hashlib.sha256()
  for name, content in files.items():
    digest.update(f"{name} {len(content)} ".encode() + content)
  joined = lambda names: np.frombuffer(b"".join(kept[name] for name in names), np.uint8)
  return Text(
    joined(training),
    tuple(training),
    np.array([len(kept[name]) for name in training]),
    _windows(joined(others[::2]), _VALIDATION_WINDOWS),
    _windows(joined(others[1::2]), _HELD_OUT_WINDOWS),
    f"Python {platform.python_version()}'s standard library: {len(training)} files"
    f" with {len(joined(training)):,} bytes to train on, {len(others)} others with"
    f" {len(joined(others)):,} bytes for validation",
    digest.hexdigest(),
  )


def _is_long(content):
  return len(content) >= CONTEXT + 2


def _windows(text, number):
  """Windows uint8 `[number, CONTEXT + 2]`, evenly spaced in a text."""
  starts = np.linspace(0, len(text) - CONTEXT - 2, number).astype(int)
  return text[starts[:, None] + np.arange(CONTEXT + 2)]


def source_files(root: pathlib.Path) -> list[str]:
  """Names of the files that are read, relative to the directory, sorted."""
  names = (path.relative_to(root) for path in root.rglob("*.py"))
  return sorted(
    name.as_posix()
    for name in names
    if not _LEFT_OUT.intersection(name.parts[:-1])
    and not name.name.startswith(_LEFT_OUT_FILES)
  )


def is_validation(name: str) -> bool:
  """Whether a file is kept for validation: one in ten, by its name alone."""
  return hashlib.sha256(name.encode()).digest()[0] < 26


def _rng(*key):
  return np.random.default_rng(key)
