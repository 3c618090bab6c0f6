"""Each command runs at a tiny size, and a killed run resumes exactly."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import arms
import batch_norm
import byte_lm
import byte_training
import data
import figures
import overview
import paper
import report
import runs
import shared
import tabular

pytestmark = pytest.mark.experiments


@pytest.fixture(scope="module")
def tiny():
  """Figures with one part and few arms; a random CIFAR-10 of 96 images."""
  rng = np.random.default_rng(0)
  labels = np.arange(96, dtype=np.int32) % 10
  pixels = rng.integers(0, 256, (96, 32, 32, 3), dtype=np.uint8)
  digits = data.load("digits", "")
  cifar10 = data.Dataset(
    *(pixels, labels, pixels[:20], labels[:20], 10, 255.0, (0.5,) * 3, (0.25,) * 3)
  )
  usual = figures.parts

  def parts(name):
    part = usual(name)[-1]
    # The plain mean, three others, and what these imitate.
    kept = [part.arms[0], *[arm for arm in part.arms if arm.role != "rival"][-3:]]
    names = {arm.name for arm in kept} | {arm.imitates for arm in kept}
    kept = tuple(arm for arm in part.arms if arm.name in names)
    changed = dict(microbatch_size=5, width=16, train_images=96)
    return [dataclasses.replace(part, arms=kept, **changed)]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(figures, "parts", parts)
    patch.setattr(data, "load", lambda name, _: {"digits": digits}.get(name, cifar10))
    # Every other label by people is wrong.
    by_people = lambda path, key, clean, number: (clean + np.arange(96) % 2) % 10
    patch.setattr(data, "noisy_labels", by_people)
    patch.setattr(shared, "ViT", functools.partial(shared.ViT, depth=1))
    patch.setattr("features._NUM_SAMPLES", 500)
    yield


@pytest.mark.parametrize(
  "name",
  # Each way of drawing and each data set once.
  [
    "vit",
    "tau",
    "noise",
    "human-cifar10",
    "by-example",
    "memory-patches",
    "skew-patches",
  ],
)
def test_figure(tiny, name, tmp_path, capsys):
  paper.main([name, "--steps", "4", "--seeds", "2", "--out", str(tmp_path)])
  out, (part,) = capsys.readouterr().out, figures.parts(name)
  lines = report.read_csv(tmp_path / f"{name}.csv")
  assert [line["arm"] for line in lines] == [a.name for a in part.arms for _ in "01"]
  assert all(0 <= float(line["final"]) <= float(line["best"]) <= 1 for line in lines)
  assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
  assert f"**{part.title}**" in out
  told = tmp_path / f"{name}-told-apart.csv"
  assert told.exists() is (name not in ("memory-patches", "skew-patches"))


@pytest.fixture
def finished(tiny, tmp_path):
  """A run that nothing interrupted; its arguments and directory."""
  argv = ["memory", "--steps", "4", "--seeds", "2"]
  paper.main([*argv, "--out", str(tmp_path / "whole")])
  return argv, tmp_path / "whole"


def test_summary_by_hand():
  part = figures.Part(name="x", arms=(arms.PLAIN,), steps=20, seeds=2, eval_every=5)
  wrong = np.zeros((20, 2, 3), bool)
  wrong[:, 0] = True
  accepted = np.zeros((2, 20, 2), bool)
  accepted[0, :10], accepted[1, :5, 1] = True, True
  distance = np.full((2, 20), np.nan)
  distance[0, -2:] = 0.5, 1.0

  class Schedule:
    def wrong_examples(self):
      return wrong

  experiment = runs.Experiment(part, [Schedule(), Schedule()], None)
  experiment.traces["plain"] = {"accepted": accepted, "distance": distance}
  experiment.curves["plain"] = {
    "test_accuracy": np.array([[0.1, 0.7, 0.6, 0.5], [0.2, 0.3, 0.4, 0.1]]),
    "validation_accuracy": np.array([[0.1, 0.2, 0.4, 0.4], [0.9, 0.2, 0.3, 0.1]]),
  }
  expected = {
    "best": [0.7, 0.4],
    "final": [0.5, 0.1],
    "picked": [0.6, 0.2],  # The first of two equal ones.
    "accepted": [0.5, 0.125],
    "updates": [10, 5],
    "late_distance": [0.75, np.nan],
    "from_wrong": [0.5, 0],
  }
  found = paper.summary(experiment, arms.PLAIN)
  assert found.keys() == expected.keys()
  for name, values in expected.items():
    np.testing.assert_allclose(found[name], values, err_msg=name)


def test_a_killed_run_goes_on_exactly(tmp_path):
  """Killed while it trains; complete arms are kept, and the results are the same."""
  command = [sys.executable, str(overview.RESULTS.parent / "paper.py"), "random-labels"]
  command += ["--steps", "60", "--seeds", "2", "--out"]
  env = os.environ | {"JAX_PLATFORMS": "cpu"}
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  subprocess.run([*command, whole], env=env, check=True, capture_output=True)
  process = subprocess.Popen(
    [*command, killed], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  first = killed / "random_labels" / "plain.npz"
  while not first.exists() and process.poll() is None:
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  assert not (killed / "random-labels.csv").exists()
  made = first.stat().st_mtime_ns
  subprocess.run(
    [*command, killed, "--resume"], env=env, check=True, capture_output=True
  )
  assert first.stat().st_mtime_ns == made
  files = lambda path: {
    file.relative_to(path): file for file in path.rglob("*") if file.is_file()
  }
  assert files(whole).keys() == files(killed).keys()
  for name, file in files(whole).items():
    if file.suffix == ".npz":
      ours, theirs = np.load(file), np.load(killed / name)
      assert ours.files == theirs.files
      for one in ours.files:
        np.testing.assert_array_equal(ours[one], theirs[one])
    else:
      assert file.read_bytes() == (killed / name).read_bytes()


def test_resumed_with_other_arms_missing(finished, tmp_path):
  """A control that is trained again reads what GAF accepted from its file."""
  argv, whole = finished
  csv = (whole / "memory.csv").read_bytes()
  (arm, *_) = sorted((whole / "stale3").glob("*random_choice.npz"))
  arm.unlink()
  (whole / "memory.csv").unlink()
  paper.main([*argv, "--out", str(whole), "--resume"])
  assert (whole / "memory.csv").read_bytes() == csv


def test_refusals(finished, tmp_path, monkeypatch, capsys):
  argv, whole = finished
  for more, said in (
    ([*argv], "is not empty; choose another --out, or --resume it."),
    ([*argv[:-1], "3", "--resume"], "was begun with"),
    ([*argv, "--only", "nothing"], "--only nothing: the parts are stale3."),
  ):
    monkeypatch.setattr(sys, "argv", ["experiments/paper.py", *more])
    with pytest.raises(SystemExit) as stopped:
      runs.main(lambda: paper.main([*more, "--out", str(whole)]))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("paper.py: ") and said in line
  (whole / "config.json").write_text(json.dumps({}))
  with pytest.raises(shared.UserError, match="was begun with {}"):
    paper.main([*argv, "--out", str(whole), "--resume"])
  with pytest.raises(SystemExit):
    paper.main(["memory", "--steps", "0"])
  assert "expected an integer of at least 1, got '0'" in capsys.readouterr().err


def test_too_few_images():
  part = figures.Part(name="x", arms=(), microbatch_size=600)
  with pytest.raises(
    shared.UserError, match="2 x 600 training images, but there are 998"
  ):
    shared.images(part, "")


def test_a_sixth_of_the_images_is_held_out():
  part = dataclasses.replace(figures.parts("distance")[0], train_images=60)
  found = shared.images(part, "")
  digits = data.load("digits", "")
  np.testing.assert_array_equal(found.train, digits.train_images[:50])
  np.testing.assert_array_equal(found.validation, digits.train_images[50:60])
  np.testing.assert_array_equal(found.given, digits.train_labels[:60])
  np.testing.assert_array_equal(found.test_labels, digits.test_labels)


def test_byte_lm(tmp_path, capsys, monkeypatch):
  smaller = functools.partial(byte_training.ByteTransformer, 16, depth=1, heads=2)
  monkeypatch.setattr(byte_training, "ByteTransformer", smaller)
  few = lambda usual: lambda *args: [usual(*args)[0], *usual(*args)[-5:]]
  monkeypatch.setattr(byte_lm, "_by_source", few(byte_lm._by_source))
  monkeypatch.setattr(byte_lm, "_by_example", few(byte_lm._by_example))
  argv = ["--parts", "code-page", "documents", "--steps", "10", "--seeds", "2"]
  byte_lm.main([*argv, "--out", str(tmp_path)])
  lines = report.read_csv(tmp_path / "byte-lm.csv")
  assert {line["part"] for line in lines} == {"code-page", "documents"}
  assert all(0 < float(line["best"]) <= float(line["final"]) < 9 for line in lines)
  out = capsys.readouterr().out
  assert "shards, after the last step" in out and "gradient norm, plain mean" in out
  told = report.read_csv(tmp_path / "byte-lm-documents.csv")
  assert {line["signal"] for line in told} == set(report.SIGNALS)
  with pytest.raises(shared.UserError, match="--steps 12 is not a multiple of 10"):
    byte_lm.main(["--steps", "12", "--out", str(tmp_path / "other")])


def test_tabular(tmp_path, monkeypatch, capsys):
  """A memory is better than chance, and the scores of all seeds are written."""
  monkeypatch.setattr(tabular, "SEEDS", 3)
  monkeypatch.setattr(tabular, "STEPS", 100)
  monkeypatch.setattr(tabular, "AUC_AT", (0, 5))
  kept = ("plain mean", "as many at random", "`tau_quantile(0.6)`")
  kept += ("five at random", "`memory_decay=0.98`", "right sources only")
  for name in ("BY_EXAMPLE", "BY_SOURCE"):
    some = {arm: x for arm, x in getattr(tabular, name).items() if arm in kept}
    monkeypatch.setattr(tabular, name, some)
  tabular.main(["--tasks", "wine", "--out", str(tmp_path)])
  path = tmp_path / "tabular.csv"
  header = lambda path: path.read_text().partition("\n")[0]
  assert header(path) == header(overview.RESULTS / "tabular.csv")
  by_example, by_source = report.settings(path)
  (gain,) = report.gains(by_source, "final")
  assert gain.chance.mean > 0.05
  assert {one.role for one in by_source.values()} == {"gaf", "chance", "rival", "ideal"}
  assert len(report.gains(by_example, "final")) == 1
  told = report.read_csv(tmp_path / "tabular-told-apart.csv")
  assert len(told) == 2 * 3
  assert "wine, 40% of the targets wrong" in capsys.readouterr().out


def test_batch_norm(monkeypatch, capsys):
  monkeypatch.setattr(batch_norm, "MEASURED_AT", (0, 4))
  monkeypatch.setattr(batch_norm, "SEEDS", 2)
  monkeypatch.setattr(batch_norm, "DRAWS", 2)
  norms = {name: batch_norm.NORMS[name] for name in ("BatchNorm, `axis_name`",)}
  monkeypatch.setattr(batch_norm, "NORMS", norms)
  batch_norm.main(["--rows", "4"])
  lines = [
    x for x in capsys.readouterr().out.splitlines() if x.startswith("| BatchNorm")
  ]
  assert len(lines) == 3
  distances = np.array([[0.1, 0.2, 0.2, 0.3, 0.9, 0.2, 0.4, 0.1]])
  # 15 pairs: 0.2 is above one of the right ones and equal to two, and so on.
  right, wrong = distances[0, :5], distances[0, 5:]
  pairs = [(w > r) + (w == r) / 2 for w in wrong for r in right]
  assert batch_norm.area_under_roc(distances) == pytest.approx(np.mean(pairs))
