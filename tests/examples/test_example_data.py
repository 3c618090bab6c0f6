"""Data files: official archives are read, broken and hostile ones refused."""

import dataclasses
import hashlib
import os
import pathlib
import pickle
import tarfile
import zipfile

import numpy as np
import pytest

import data
import labels
import safe_pickle
from common.command import UserError


def _write_batch(path, rows, num_classes, key, seed=0):
  rng = np.random.default_rng(seed)
  batch = {
    "batch_label": "x",
    key: rng.integers(0, num_classes, rows).tolist(),
    "data": rng.integers(0, 256, (rows, 3072)).astype(np.uint8),
    "filenames": [f"{i}.png" for i in range(rows)],
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(pickle.dumps(batch, protocol=2))
  return batch


def _write_cifar100(root):
  folder = root / "cifar-100-python"
  train = _write_batch(folder / "train", 30, 100, "fine_labels")
  test = _write_batch(folder / "test", 20, 100, "fine_labels", seed=1)
  return train, test


def _write_cifar10(root):
  folder = root / "cifar-10-batches-py"
  batches = [
    _write_batch(folder / f"data_batch_{i}", 7, 10, "labels", seed=i)
    for i in range(1, 6)
  ]
  _write_batch(folder / "test_batch", 9, 10, "labels")
  return batches


def test_digits_are_split_once_and_for_all():
  first, second = data.load("digits", ""), data.load("digits", "")
  assert first.train_images.shape == (1197, 8, 8, 1)
  assert first.test_images.shape == (600, 8, 8, 1)
  np.testing.assert_array_equal(first.train_labels, second.train_labels)
  assert set(np.unique(first.train_labels)) == set(range(10))
  assert first.train_images.max() == first.scale


def test_cifar100_layout(tmp_path):
  train, test = _write_cifar100(tmp_path)
  loaded = data.load("cifar100", tmp_path)
  np.testing.assert_array_equal(loaded.train_labels, train["fine_labels"])
  np.testing.assert_array_equal(loaded.test_labels, test["fine_labels"])
  # Rows are channel-first: red 32x32, green, blue.
  assert loaded.train_images[4, 3, 2, 1] == train["data"][4][1024 + 3 * 32 + 2]
  assert "30 training and 20 test images" in loaded.notes[0]


def test_cifar10_batches_in_order(tmp_path):
  batches = _write_cifar10(tmp_path)
  loaded = data.load("cifar10", tmp_path)
  expected = np.concatenate([batch["labels"] for batch in batches])
  np.testing.assert_array_equal(loaded.train_labels, expected)
  assert loaded.train_images.shape == (35, 32, 32, 3)


def _pack(tmp_path, monkeypatch):
  _write_cifar100(tmp_path / "plain")
  archive = data.ARCHIVES["cifar100"]
  packed = tmp_path / archive.file
  with tarfile.open(packed, "w:gz") as tar:
    tar.add(tmp_path / "plain" / archive.folder, archive.folder)
  digest = hashlib.md5(packed.read_bytes()).hexdigest()
  monkeypatch.setitem(
    data.ARCHIVES, "cifar100", dataclasses.replace(archive, md5=digest)
  )
  return packed


def test_packed_archive_is_read_in_place(tmp_path, monkeypatch):
  _pack(tmp_path, monkeypatch)
  packed = data.load("cifar100", tmp_path)
  plain = data.load("cifar100", tmp_path / "plain")
  np.testing.assert_array_equal(packed.train_images, plain.train_images)
  assert not (tmp_path / "cifar-100-python").exists()


def test_truncated_archive_is_refused(tmp_path, monkeypatch, refused):
  packed = _pack(tmp_path, monkeypatch)
  packed.write_bytes(packed.read_bytes()[:-100])
  said = refused("--dataset", "cifar100", "--data-dir", tmp_path)
  assert "md5" in said and str(packed) in said


def test_download_replaces_nothing_until_whole(tmp_path, monkeypatch):
  packed = _pack(tmp_path, monkeypatch)
  content = packed.read_bytes()
  packed.unlink()

  class Response:
    blocks = [content[:1000], content[1000:], b""]

    def __enter__(self):
      return self

    def __exit__(self, *_):
      pass

    def read(self, _):
      assert not packed.exists()
      return self.blocks.pop(0)

  monkeypatch.setattr(data.urllib.request, "urlopen", lambda *_, **__: Response())
  assert len(data.load("cifar100", tmp_path, download=True).train_labels) == 30


def test_without_network(tmp_path, monkeypatch, refused):
  def fail(*_, **__):
    raise data.urllib.request.URLError("no route")

  monkeypatch.setattr(data.urllib.request, "urlopen", fail)
  archive = data.ARCHIVES["cifar100"]
  options = ("--dataset", "cifar100", "--data-dir", tmp_path)
  for argv in (options, (*options, "--download")):
    said = refused(*argv)
    assert archive.url in said and str(tmp_path / archive.file) in said
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_truncated_batch(tmp_path, refused, share):
  _write_cifar100(tmp_path)
  path = tmp_path / "cifar-100-python" / "train"
  content = path.read_bytes()
  path.write_bytes(content[: int(share * len(content))])
  assert str(path) in refused("--dataset", "cifar100", "--data-dir", tmp_path)


def test_garbage(tmp_path):
  rng = np.random.default_rng(0)
  for length in (1, 10, 1000):
    for _ in range(200):
      with pytest.raises(UserError, match="not a readable pickle"):
        # No such bytes make a whole pickle: the last never is its STOP.
        safe_pickle.loads(rng.bytes(length) + b"\0", "it")


class _Hostile:
  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_hostile_pickle_is_not_run(tmp_path, refused, protocol):
  mark = tmp_path / "ran"
  _write_cifar100(tmp_path)
  path = tmp_path / "cifar-100-python" / "train"
  path.write_bytes(
    pickle.dumps(_Hostile(os.system, f"touch {mark}"), protocol=protocol)
  )
  said = refused("--dataset", "cifar100", "--data-dir", tmp_path)
  assert "system" in said
  assert not mark.exists()


@pytest.mark.parametrize(
  "value",
  [
    _Hostile(eval, "1"),
    _Hostile(getattr, (), "x"),
    np.array([object], dtype=object),
    np.zeros(2, [("a", "i4")]),
    len,
  ],
  ids=["eval", "getattr", "objects", "records", "function"],
)
def test_only_number_arrays_in_pickles(value):
  with pytest.raises(UserError):
    safe_pickle.loads(pickle.dumps(value, protocol=2), "it")


@pytest.mark.parametrize("dtype", ["u1", "i8", "f4", ">i4", "?"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_number_arrays_in_pickles(dtype, protocol):
  array = np.arange(6).astype(dtype).reshape(2, 3)
  found = safe_pickle.loads(pickle.dumps({"a": array}, protocol=protocol), "it")
  np.testing.assert_array_equal(found["a"], array)


@pytest.mark.parametrize(
  "change, said",
  [
    ({"data": np.zeros((30, 3072), np.float32)}, "uint8"),
    ({"data": np.zeros((30, 100), np.uint8)}, "3072"),
    ({"data": "text"}, "str"),
    ({"fine_labels": [0] * 29}, "30 integers"),
    ({"fine_labels": [0.5] * 30}, "30 integers"),
    ({"fine_labels": [[0], [1, 2]]}, "30 integers"),
    ({"fine_labels": [100] + [0] * 29}, "0 to 99"),
    ({"fine_labels": [-1] + [0] * 29}, "0 to 99"),
  ],
)
def test_wrong_format(tmp_path, refused, change, said):
  batch, _ = _write_cifar100(tmp_path)
  path = tmp_path / "cifar-100-python" / "train"
  path.write_bytes(pickle.dumps({**batch, **change}, protocol=2))
  assert said in refused("--dataset", "cifar100", "--data-dir", tmp_path)


def test_another_pickle(tmp_path, refused):
  _write_cifar100(tmp_path)
  (tmp_path / "cifar-100-python" / "train").write_bytes(pickle.dumps([1, 2]))
  said = refused("--dataset", "cifar100", "--data-dir", tmp_path)
  assert "not a CIFAR batch" in said


def test_missing_batch(tmp_path, refused):
  _write_cifar10(tmp_path)
  (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
  said = refused("--dataset", "cifar10", "--data-dir", tmp_path)
  assert "data_batch_3" in said and "cannot be read" in said


def test_short_real_cifar100(shared_data):
  loaded = data.load("cifar100", shared_data)
  assert loaded.train_images.shape == (1117, 32, 32, 3)
  assert loaded.test_images.shape == (916, 32, 32, 3)
  assert len(np.unique(loaded.train_labels)) == 100


def test_real_human_labels(shared_data):
  clean = data.load("cifar100", shared_data).train_labels
  path = shared_data / "cifar100n" / "CIFAR-100_human.pt"
  noisy = labels.from_file(str(path), None, clean, 100)
  # 40.2 % of all 50,000 are wrong.
  assert 0.35 < np.mean(noisy != clean) < 0.45


def test_real_human_labels_of_another_dataset(shared_data, refused):
  said = refused(
    "--dataset",
    "cifar100",
    "--data-dir",
    shared_data,
    "--noisy-labels",
    shared_data / "cifar10n_human_labels.npz",
    "--noisy-labels-key",
    "worse_label",
  )
  assert "does not belong to these images" in said


def _label_file(path, arrays):
  if path.suffix == ".npy":
    np.save(path, arrays["noisy_label"])
  elif path.suffix == ".npz":
    np.savez(path, **arrays)
  else:
    with zipfile.ZipFile(path, "w") as packed:
      packed.writestr("archive/data.pkl", pickle.dumps(arrays, protocol=2))
  return str(path)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
def test_label_files(tmp_path, suffix):
  clean = np.arange(20, dtype=np.int32) % 10
  arrays = {"clean_label": clean, "noisy_label": (clean + 3) % 10}
  path = _label_file(tmp_path / f"labels{suffix}", arrays)
  found = labels.from_file(path, None, clean, 10)
  assert found.dtype == np.int32
  np.testing.assert_array_equal(found, arrays["noisy_label"])


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_label_file_of_more_rows(tmp_path, suffix):
  clean = np.arange(20, dtype=np.int32) % 10
  arrays = {"clean_label": clean, "noisy_label": clean[::-1].copy()}
  path = _label_file(tmp_path / f"labels{suffix}", arrays)
  found = labels.from_file(path, None, clean[:5], 10)
  np.testing.assert_array_equal(found, arrays["noisy_label"][:5])
  # Without clean labels nobody knows which rows they are.
  del arrays["clean_label"]
  path = _label_file(tmp_path / f"unknown{suffix}", arrays)
  with pytest.raises(UserError, match="must be 5 integers"):
    labels.from_file(path, None, clean[:5], 10)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
def test_broken_label_files(tmp_path, suffix):
  clean = np.arange(2000, dtype=np.int32) % 10
  whole = _label_file(tmp_path / f"labels{suffix}", {"noisy_label": clean})
  content = pathlib.Path(whole).read_bytes()
  for name, broken in (
    ("truncated", content[: len(content) // 2]),
    ("empty", b""),
    ("garbage", b"garbage" * 100),
  ):
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(broken)
    with pytest.raises(UserError, match="readable"):
      labels.from_file(str(path), None, clean, 10)


def test_label_file_with_objects(tmp_path):
  path = tmp_path / "labels.npy"
  np.save(path, np.array([_Hostile(os.system, "true")], dtype=object))
  with pytest.raises(UserError, match="not a readable .npy"):
    labels.from_file(str(path), None, np.zeros(1, np.int32), 10)


def test_label_file_choices(tmp_path):
  clean = np.zeros(4, np.int32)
  arrays = {"clean_label": clean, "a": clean, "b": clean + 1}
  path = _label_file(tmp_path / "labels.npz", arrays)
  np.testing.assert_array_equal(labels.from_file(path, "b", clean, 10), clean + 1)
  with pytest.raises(UserError, match="holds a, b; choose"):
    labels.from_file(path, None, clean, 10)
  with pytest.raises(UserError, match="has no 'c'"):
    labels.from_file(path, "c", clean, 10)
  with pytest.raises(UserError, match="cannot be read"):
    labels.from_file(str(tmp_path / "none.npz"), None, clean, 10)


def test_label_file_in_another_order(tmp_path):
  clean = np.arange(10, dtype=np.int32)
  path = _label_file(
    tmp_path / "labels.npz", {"clean_label": clean[::-1], "noisy_label": clean}
  )
  with pytest.raises(UserError, match="another order"):
    labels.from_file(path, None, clean, 10)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 1.0])
@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_flips_exactly_the_share_to_other_classes(share, num_classes):
  clean = np.arange(1197, dtype=np.int32) % num_classes
  noisy = labels.flip(clean, share, num_classes, np.random.default_rng(3))
  assert np.sum(noisy != clean) == round(share * 1197)
  assert noisy.min() >= 0 and noisy.max() < num_classes
  again = labels.flip(clean, share, num_classes, np.random.default_rng(3))
  np.testing.assert_array_equal(noisy, again)


def test_flips_go_evenly_to_all_other_classes():
  clean = np.full(90_000, 4, np.int32)
  noisy = labels.flip(clean, 1.0, 10, np.random.default_rng(0))
  counts = np.bincount(noisy, minlength=10)
  assert counts[4] == 0
  others = np.delete(counts, 4)
  assert np.all(np.abs(others - 10_000) < 500)  # five standard deviations


@pytest.mark.parametrize("name", list(labels.CONFUSED))
def test_confused_labels_become_the_class_that_they_are_mistaken_for(name):
  """The classes of arXiv 1609.03683, and no others; each with its own."""
  pairs = {
    # truck to automobile, bird to airplane, deer to horse, cat to dog and back
    "cifar10": {9: 1, 2: 0, 4: 7, 3: 5, 5: 3},
    "digits": {2: 7, 3: 8, 5: 6, 6: 5, 7: 1},
  }[name]
  clean = np.repeat(np.arange(10, dtype=np.int32), 2_000)
  noisy = labels.confuse(clean, 0.4, labels.CONFUSED[name], np.random.default_rng(0))
  assert noisy.dtype == np.int32
  for digit in range(10):
    found = noisy[clean == digit]
    changed = found[found != digit]
    assert set(changed) == ({pairs[digit]} if digit in pairs else set())
    # Of 2,000; five standard deviations.
    share = 0.4 if digit in pairs else 0
    assert len(changed) / 2_000 == pytest.approx(share, abs=0.055)
  again = labels.confuse(clean, 0.4, labels.CONFUSED[name], np.random.default_rng(0))
  np.testing.assert_array_equal(noisy, again)
  everything = labels.confuse(clean, 1.0, pairs, np.random.default_rng(0))
  np.testing.assert_array_equal(everything, [pairs.get(c, c) for c in clean])
  # Also of a few in which most classes are missing, and of none.
  for few in (np.int32([2, 2, 0]), np.zeros(0, np.int32)):
    found = labels.confuse(few, 1.0, pairs, np.random.default_rng(0))
    np.testing.assert_array_equal(found, [pairs.get(c, c) for c in few])
    assert found.dtype == np.int32


def test_wrong_sources():
  wrong = labels.draw_wrong_sources(500, 8, 3, np.random.default_rng(0))
  np.testing.assert_array_equal(wrong.sum(axis=1), 3)
  assert np.all(wrong.any(axis=0)) and len(np.unique(wrong, axis=0)) > 40
  clean = np.random.default_rng(1).integers(0, 10, (500, 8, 5)).astype(np.int32)
  shifted = labels.shift(clean, wrong, 10)
  expected = np.where(clean == 9, 0, clean + 1)
  for step in range(500):
    for source in range(8):
      right = expected if wrong[step, source] else clean
      np.testing.assert_array_equal(shifted[step, source], right[step, source])
