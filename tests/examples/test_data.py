"""Data files: official archives are read; damaged and hostile ones are refused."""

import dataclasses
import hashlib
import io
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest


@pytest.fixture
def write_cifar100(write_batch):
  def write(root):
    folder = root / "cifar-100-python"
    train = write_batch(folder / "train", 30, 100, "fine_labels")
    write_batch(folder / "test", 20, 100, "fine_labels", seed=1)
    return train, folder / "train"

  return write


class Hostile:
  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


def test_digits_are_split_once_and_for_all(images_data):
  first, second = images_data.load("digits", ""), images_data.load("digits", "")
  assert first.train_images.shape == (1197, 8, 8, 1)
  assert first.test_images.shape == (600, 8, 8, 1)
  np.testing.assert_array_equal(first.train_labels, second.train_labels)
  assert set(np.unique(first.train_labels)) == set(range(10))
  assert first.train_images.max() == first.scale


def test_cifar100(images_data, write_cifar100, tmp_path):
  train, _ = write_cifar100(tmp_path)
  loaded = images_data.load("cifar100", tmp_path)
  np.testing.assert_array_equal(loaded.train_labels, train["fine_labels"])
  # Rows are channel-first: red 32x32, green, blue.
  assert loaded.train_images[4, 3, 2, 1] == train["data"][4][1024 + 3 * 32 + 2]
  assert "30 training and 20 test images" in loaded.notes[0]


def test_cifar10_batches_in_order(images_data, write_batch, tmp_path):
  folder = tmp_path / "cifar-10-batches-py"
  batches = [
    write_batch(folder / f"data_batch_{i}", 7, 10, "labels", seed=i)
    for i in range(1, 6)
  ]
  write_batch(folder / "test_batch", 9, 10, "labels")
  loaded = images_data.load("cifar10", tmp_path)
  expected = np.concatenate([batch["labels"] for batch in batches])
  np.testing.assert_array_equal(loaded.train_labels, expected)
  (folder / "data_batch_3").unlink()
  with pytest.raises(images_data.UserError, match="data_batch_3 cannot be read"):
    images_data.load("cifar10", tmp_path)


def test_archive(images_data, write_cifar100, tmp_path, monkeypatch, refused):
  """Read in place, downloaded completely or not at all, and checked by its md5."""
  write_cifar100(tmp_path / "plain")
  archive = images_data.ARCHIVES["cifar100"]
  packed = tmp_path / archive.file
  with tarfile.open(packed, "w:gz") as tar:
    tar.add(tmp_path / "plain" / archive.folder, archive.folder)
  content = packed.read_bytes()
  digest = hashlib.md5(content).hexdigest()
  mine = dataclasses.replace(archive, md5=digest)
  monkeypatch.setitem(images_data.ARCHIVES, "cifar100", mine)
  found = images_data.load("cifar100", tmp_path)
  plain = images_data.load("cifar100", tmp_path / "plain")
  np.testing.assert_array_equal(found.train_images, plain.train_images)
  assert not (tmp_path / archive.folder).exists()

  packed.write_bytes(content[:-100])
  options = ("--dataset", "cifar100", "--data-dir", tmp_path)
  said = refused(*options)
  assert "md5" in said and str(packed) in said
  packed.unlink()

  def fail(*_, **__):
    raise images_data.urllib.request.URLError("no route")

  monkeypatch.setattr(images_data.urllib.request, "urlopen", fail)
  for argv in (options, (*options, "--download")):
    said = refused(*argv)
    assert archive.url in said and str(packed) in said
  assert [path.name for path in tmp_path.iterdir()] == ["plain"]
  response = lambda *_, **__: io.BytesIO(content)
  monkeypatch.setattr(images_data.urllib.request, "urlopen", response)
  images_data.load("cifar100", tmp_path, download=True)
  assert packed.read_bytes() == content


def test_damaged_batches(write_cifar100, tmp_path, refused):
  batch, path = write_cifar100(tmp_path)
  content = path.read_bytes()
  options = ("--dataset", "cifar100", "--data-dir", tmp_path)
  for share in (0.0, 0.3, 0.999):
    path.write_bytes(content[: int(share * len(content))])
    said = refused(*options)
    assert str(path) in said and "truncated" in said
  path.write_bytes(pickle.dumps([1, 2]))
  assert "not a CIFAR batch" in refused(*options)
  for change, said in (
    ({"data": np.zeros((30, 3072), np.float32)}, "uint8"),
    ({"data": np.zeros((30, 100), np.uint8)}, "3072"),
    ({"data": "text"}, "str"),
    ({"fine_labels": [0] * 29}, "30 integers"),
    ({"fine_labels": [0.5] * 30}, "30 integers"),
    ({"fine_labels": [[0], [1, 2]]}, "30 integers"),
    ({"fine_labels": [100] + [0] * 29}, "0 to 99"),
    ({"fine_labels": [-1] + [0] * 29}, "0 to 99"),
  ):
    path.write_bytes(pickle.dumps({**batch, **change}, protocol=2))
    assert said in refused(*options)


def test_hostile_pickle_is_not_run(write_cifar100, tmp_path, refused):
  mark = tmp_path / "ran"
  _, path = write_cifar100(tmp_path)
  hostile = Hostile(os.system, f"touch {mark}")
  for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    path.write_bytes(pickle.dumps(hostile, protocol=protocol))
    assert "system" in refused("--dataset", "cifar100", "--data-dir", tmp_path)
    assert not mark.exists()


def test_only_number_arrays_in_pickles(images_data):
  for value in (
    Hostile(eval, "1"),
    Hostile(getattr, (), "x"),
    np.array([object], dtype=object),
    np.zeros(2, [("a", "i4")]),
    len,
  ):
    with pytest.raises(images_data.UserError):
      images_data.load_pickle(pickle.dumps(value, protocol=2), "it")
  for dtype in ("u1", "i8", "f4", ">i4", "?"):
    array = np.arange(6).astype(dtype).reshape(2, 3)
    for protocol in (2, 4):
      content = pickle.dumps({"a": array}, protocol=protocol)
      found = images_data.load_pickle(content, "it")["a"]
      np.testing.assert_array_equal(found, array)


def label_file(path, arrays):
  if path.suffix == ".npy":
    np.save(path, arrays["noisy_label"])
  elif path.suffix == ".npz":
    np.savez(path, **arrays)
  else:
    with zipfile.ZipFile(path, "w") as packed:
      packed.writestr("archive/data.pkl", pickle.dumps(arrays, protocol=2))
  return path


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
def test_label_files(images_data, tmp_path, suffix):
  clean = np.arange(2000, dtype=np.int32) % 10
  read = lambda path, key=None, clean=clean: images_data.noisy_labels(
    path, key, clean, 10
  )
  noisy = (clean + 3) % 10
  arrays = {"clean_label": clean, "noisy_label": noisy}
  path = label_file(tmp_path / f"labels{suffix}", arrays)
  found = read(path)
  assert found.dtype == np.int32
  np.testing.assert_array_equal(found, noisy)
  content = path.read_bytes()
  for damaged in (content[: len(content) // 2], b"", b"garbage" * 100):
    path.write_bytes(damaged)
    with pytest.raises(images_data.UserError, match="readable"):
      read(path)
  if suffix == ".npy":
    np.save(path, np.array([Hostile(os.system, "true")], dtype=object))
    with pytest.raises(images_data.UserError, match="not a readable .npy"):
      read(path)
    return
  # More rows than images, allowed only with clean labels.
  path = label_file(path, arrays)
  np.testing.assert_array_equal(read(path, clean=clean[:5]), noisy[:5])
  with pytest.raises(images_data.UserError, match="another order"):
    read(path, clean=clean[1:6])
  path = label_file(path, {"noisy_label": noisy, "other": clean})
  np.testing.assert_array_equal(read(path, "other"), clean)
  for key, rows, said in (
    ("noisy_label", clean[:5], "must be 5 integers"),
    (None, clean, "needs --noisy-labels-key; it holds noisy_label, other"),
    ("third", clean, "has no 'third'"),
  ):
    with pytest.raises(images_data.UserError, match=said):
      read(path, key, rows)


def test_flipped_labels(images_data):
  """Exactly this share changes, uniformly to the other classes."""
  for share in (0.0, 0.1, 0.4, 1.0):
    for num_classes in (2, 10, 100):
      clean = np.arange(1197, dtype=np.int32) % num_classes
      rng = np.random.default_rng(3)
      noisy = images_data.flip(clean, share, num_classes, rng)
      assert np.sum(noisy != clean) == round(share * 1197)
      assert noisy.min() >= 0 and noisy.max() < num_classes
  clean = np.full(90_000, 4, np.int32)
  noisy = images_data.flip(clean, 1.0, 10, np.random.default_rng(0))
  counts = np.delete(np.bincount(noisy, minlength=10), 4)
  assert counts.sum() == 90_000
  assert np.all(np.abs(counts - 10_000) < 500)  # Five standard deviations


def test_confused_labels(images_data):
  """Only the pairs of classes of arXiv 1609.03683."""
  pairs = {
    # truck to automobile, bird to airplane, deer to horse, cat to dog and back
    "cifar10": {9: 1, 2: 0, 4: 7, 3: 5, 5: 3},
    "digits": {2: 7, 3: 8, 5: 6, 6: 5, 7: 1},
  }
  clean = np.repeat(np.arange(10, dtype=np.int32), 2_000)
  for name, expected in pairs.items():
    confused, rng = images_data.CONFUSED[name], np.random.default_rng(0)
    noisy = images_data.confuse(clean, 0.4, confused, rng)
    for label in range(10):
      changed = noisy[(clean == label) & (noisy != label)]
      assert set(changed) == ({expected[label]} if label in expected else set())
      share = 0.4 if label in expected else 0.0
      assert len(changed) / 2_000 == pytest.approx(share, abs=0.055)  # Five deviations


def test_batches(images_data):
  """A pure function of the step; each epoch has every image once; sources persist."""
  digits, n = images_data.load("digits", ""), 1197
  make = lambda **how: images_data.Batches(
    digits,
    **{
      **dict(seed=2, shape=(8, 5), noise=0.0, labels=None, num_wrong=0),
      **dict(balanced=False, **how),
    },
  )
  batches = make(num_wrong=3)
  seen = [batches(step) for step in range(3 * n // 40)]
  again = make(num_wrong=3)(70)
  np.testing.assert_array_equal(again[0], seen[70][0])
  flat = np.concatenate([indices.ravel() for indices, _ in seen])
  for epoch in range(2):
    np.testing.assert_array_equal(np.sort(flat[epoch * n : (epoch + 1) * n]), range(n))
  assert not np.array_equal(flat[:n], flat[n : 2 * n])
  clean = digits.train_labels
  for indices, labels in seen:
    wrong = np.all(labels == (clean[indices] + 1) % 10, axis=1)
    right = np.all(labels == clean[indices], axis=1)
    np.testing.assert_array_equal(wrong, batches.wrong)
    np.testing.assert_array_equal(right, ~batches.wrong)
  assert batches.wrong.sum() == 3

  balanced = images_data.Batches(digits, 0, (2, 20), 0.4, None, 0, True)
  indices, labels = balanced(5)
  assert len(np.unique(indices)) == 40
  for row in clean[indices]:
    np.testing.assert_array_equal(np.bincount(row), 2)
  assert 0.1 < np.mean(labels != clean[indices]) < 0.7
  for shape in ((2, 15), (100, 20)):
    with pytest.raises(images_data.UserError, match="--balanced needs"):
      images_data.Batches(digits, 0, shape, 0.0, None, 0, True)
