"""Text: the standard library's source files, and what each step sees of them."""

import dataclasses
import hashlib
import pathlib
import platform
import sysconfig
from typing import NamedTuple

import numpy as np

from common.arms import Part
from common.command import UserError

CONTEXT = 64
# A directory of other people's code, of fixtures, or of tables in bulk.
_LEFT_OUT = {
  *("site-packages", "dist-packages", "test", "tests", "idlelib", "distutils"),
  *("lib2to3", "encodings", "pydoc_data", "__pycache__"),
}
# Differs between machines: how this Python was built.
_LEFT_OUT_FILES = "_sysconfigdata"
_VALIDATION_WINDOWS = 128
# One stream of random numbers for each purpose; the values only have to differ.
_PLACES, _SOURCES = range(2)

# What a wrong source does to its targets, by part; inputs are always right.
PARTS = {
  "clean": "nothing wrong",
  "code-page": "wrong sources: targets in another code page (EBCDIC)",
  "shifted": "wrong sources: targets shifted once too often",
}
_CODE_PAGE = np.frombuffer(
  bytes(range(256)).decode("latin-1").encode("cp037"), np.uint8
)


class Batches(NamedTuple):
  """What n steps see."""

  inputs: np.ndarray  # uint8 `[n, k, b, CONTEXT]`
  # uint8 `[n, k, b, CONTEXT]`, the byte after each input, where right.
  targets: np.ndarray


@dataclasses.dataclass(frozen=True)
class Text:
  """Bytes to train on and windows to validate on, of different files."""

  training: np.ndarray  # uint8 `[n]`, the training files one after the other
  # uint8 `[windows, CONTEXT + 1]`, evenly spaced in the other files.
  validation: np.ndarray
  description: str  # What was read, for people
  digest: str  # Tells whether two texts are the same


class Schedule:
  """The microbatches of one seed; places depend on seed and step alone.

  Attributes:
    wrong: bool `[steps, k]`, which microbatches come from wrong sources.
    control_key: numbers that the controls' choices come from.
  """

  def __init__(self, text: Text, part: Part, seed: int):
    self._text, self._part, self._seed = text, part, seed
    # Other ones in each step.
    bad = np.arange(part.num_microbatches) < part.wrong_sources
    permuted = [_rng(seed, _SOURCES, n).permutation(bad) for n in range(part.steps)]
    self.wrong = np.array(permuted)
    self.control_key = (seed, *b"choice")

  def batches(self, start: int, stop: int, clean: bool) -> Batches:
    """What the steps from `start` to before `stop` see; `clean`: nothing is wrong."""
    training, part = self._text.training, self._part
    shape, last = (
      (part.num_microbatches, part.microbatch_size),
      len(training) - CONTEXT - 2,
    )
    places = [
      _rng(self._seed, _PLACES, n).integers(last + 1, size=shape)
      for n in range(start, stop)
    ]
    windows = training[np.array(places)[..., None] + np.arange(CONTEXT + 2)]
    inputs, targets = windows[..., :-2], windows[..., 1:-1]
    wrong = self.wrong[start:stop] & (not clean)
    corrupted = _CODE_PAGE[targets] if part.name == "code-page" else windows[..., 2:]
    return Batches(inputs, np.where(wrong[..., None, None], corrupted, targets))


def load(root: pathlib.Path | None = None) -> Text:
  """The source files of this Python's standard library, or of another directory."""
  root = root or pathlib.Path(sysconfig.get_paths()["stdlib"])
  files = {name: (root / name).read_bytes() for name in source_files(root)}
  kept = {True: [], False: []}
  for name, content in files.items():
    kept[is_validation(name)].append(content)
  training, validation = (
    np.frombuffer(b"".join(kept[held_out]), np.uint8) for held_out in (False, True)
  )
  if min(len(training), len(validation)) < CONTEXT + 2:
    raise UserError(
      f"the standard library in {root} has too few source files ({len(files)} with"
      f" {sum(map(len, files.values())):,} bytes) to train on; this Python may keep"
      " it zipped or compiled."
    )
  digest = hashlib.sha256()
  for name, content in files.items():
    digest.update(f"{name} {len(content)} ".encode() + content)
  starts = np.linspace(0, len(validation) - CONTEXT - 1, _VALIDATION_WINDOWS)
  return Text(
    training,
    validation[starts.astype(int)[:, None] + np.arange(CONTEXT + 1)],
    f"Python {platform.python_version()}'s standard library: {len(kept[False])}"
    f" files with {len(training):,} bytes to train on, {len(kept[True])} others with"
    f" {len(validation):,} bytes for validation",
    digest.hexdigest(),
  )


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
