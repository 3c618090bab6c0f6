"""Training: what a step does, the controls, and runs that go on after any stop."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pytest

import batches
import models
import options
import train
import training
from common import arms, experiment, storage

_SMALL = (
  "--width",
  "8",
  "--tau",
  "0.9",
  "--label-noise",
  "0.4",
  "--seeds",
  "2",
  "--microbatch-size",
  "5",
  "--eval-every",
  "20",
)


def _part(*argv):
  (part,) = options.parts(options.parse([*_SMALL, *argv]))
  return part


def _run(path, *argv):
  return train.main([*_SMALL, "--steps", "110", "--out", str(path), *argv])


def _lines(path):
  return path.read_text().splitlines()


def _schedule(part, dataset, seed=0):
  return batches.Schedule(part, dataset, dataset.train_labels, seed)


# But for the process that is killed, which compiles its own.
pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, compiled_once):
  """A run that nothing interrupted."""
  path = tmp_path_factory.mktemp("whole") / "run"
  assert _run(path) == 0
  return path


def test_outputs(whole):
  names = {p.name for p in whole.iterdir()}
  assert names == {
    "config.json",
    "metrics.jsonl",
    "results.md",
    "results.csv",
    "checkpoints",
    "experiment_accuracy.png",
    "experiment_distance.png",
    "experiment_accept_rate.png",
  }
  for plot in whole.glob("*.png"):
    assert plot.read_bytes().startswith(b"\x89PNG")
  rows = [json.loads(line) for line in _lines(whole / "metrics.jsonl")]
  arms = ["plain", "sequential_tau0.9", "sequential_tau0.9_random_steps"]
  # Every 20 steps and after the last, of 110.
  expected = [
    (arm, seed, step)
    for arm in arms
    for step in (20, 40, 60, 80, 100, 110)
    for seed in range(2)
  ]
  assert [(r["arm"], r["seed"], r["step"]) for r in rows] == expected
  areas = {f"auc/{name}" for name in ("distance", "loss", "gradient norm")}
  for row in rows:
    assert 0 <= row["test_accuracy"] <= 1 and row["train_loss"] > 0
    # Of 199 images, whose labels are as noisy.
    assert 0 <= row["validation_accuracy"] <= 1
    assert float(row["validation_accuracy"] * 199) == pytest.approx(
      round(row["validation_accuracy"] * 199)
    )
    assert {name for name in row if "/" in name} == areas
    assert 0 <= row["accept_rate"] <= 1 and row["nonfinite"] == 0
  assert all(r["accept_rate"] == 1 for r in rows if r["arm"] == "plain")
  # By now mislabeled images differ from the others.
  for name in areas:
    assert np.mean([row[name] for row in rows if row["step"] == 110]) > 0.5, name


_PICTURED = (
  *("--width", "8", "--label-noise", "0.4", "--seeds", "2", "--microbatch-size", "6"),
  *("--steps", "24", "--eval-every", "12"),
)
_REMEMBERING = (
  *("--num-microbatches", "3", "--memory-decay", "0.9", "--rule", "majority"),
  *("--adaptive-tau", "--ema-decay", "0.9", "--mixup", "--label-smoothing", "0.1"),
)


def _assert_pictured(run, path, picture):
  drawn = path / f"experiment_{picture}.png"
  others = {"examples", "memory"} - {picture}
  assert drawn.read_bytes().startswith(b"\x89PNG")
  assert not any((path / f"experiment_{name}.png").exists() for name in others)
  assert "of these wrong" in (path / "results.md").read_text()
  # The same from checkpoints alone.
  before = drawn.read_bytes()
  drawn.unlink()
  assert run(path, "--resume") == 0
  assert drawn.read_bytes() == before


@pytest.mark.experiments
def test_picture_of_examples(tmp_path):
  argv = ("--by-example", "--tau-quantile", "0.5", "--label-smoothing", "0.1")
  run = lambda path, *more: train.main([*_PICTURED, *argv, "--out", str(path), *more])
  assert run(tmp_path / "run") == 0
  _assert_pictured(run, tmp_path / "run", "examples")


@pytest.mark.experiments
def test_memory_average_and_mixtures(
  tmp_path, monkeypatch, capsys, shown, assert_same_run
):
  """Stopped in the middle and resumed: the same, and so are its curves."""
  run = lambda path, *more: train.main(
    [*_PICTURED, *_REMEMBERING, "--tensorboard", "--out", str(path), *more]
  )
  whole, path = tmp_path / "whole", tmp_path / "run"
  assert run(whole) == 0
  append = storage.RunDirectory.append_metrics
  (part,) = options.parts(options.parse([*_PICTURED, *_REMEMBERING]))
  (gaf,) = (arm.name for arm in part.arms if arm.is_gaf)

  def stop(self, row):
    append(self, row)
    if (row["arm"], row["step"], row["seed"]) == (gaf, 12, 0):
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(storage.RunDirectory, "append_metrics", stop)
    assert run(path) == 128 + signal.SIGTERM
  assert run(path, "--resume") == 0
  assert_same_run(path, whole)
  _assert_pictured(run, path, "memory")
  # Each source has a rate, with a memory only; in the events, too.
  rows = [json.loads(line) for line in _lines(path / "metrics.jsonl")]
  names = [f"source_{i}/accept_rate" for i in (1, 2, 3)]
  for row in rows:
    found = [name for name in row if name.startswith("source_")]
    assert found == (names if row["arm"] == gaf else [])
  ours = [row for row in rows if row["arm"] == gaf]
  for row in ours:
    rates = [row[name] for name in names]
    assert np.mean(rates) == pytest.approx(row["accept_rate"])
  assert len({row[name] for row in ours for name in names}) > 2
  for seed in range(2):
    curves = shown(path / "tensorboard" / "experiment" / gaf / f"seed-{seed}")
    for name in (*names, "validation_accuracy", "auc/distance"):
      expected = [(row["step"], row[name]) for row in ours if row["seed"] == seed]
      assert curves[name] == pytest.approx(np.array(expected))


@pytest.mark.experiments
def test_stopped_anywhere_and_resumed(
  whole, tmp_path, monkeypatch, capsys, assert_same_run
):
  path = tmp_path / "run"
  append = storage.RunDirectory.append_metrics
  rows = []

  def stop_at(number, how):
    rows.clear()

    def appended(self, row):
      append(self, row)
      rows.append(row)
      if len(rows) == number:
        how()

    monkeypatch.setattr(storage.RunDirectory, "append_metrics", appended)

  class Crash(BaseException):
    pass

  def crash():
    raise Crash

  # An orderly stop in the first arm, between two checkpoints.
  stop_at(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
  assert _run(path) == 128 + signal.SIGTERM
  assert "--resume" in capsys.readouterr().err
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  # A crash in the second arm, after lines that no checkpoint knows of.
  stop_at(15, crash)
  with pytest.raises(Crash):
    _run(path, "--resume")
  half_a_line = '{"part": "experiment", "ar'
  with open(path / storage.METRICS, "a") as file:
    file.write(half_a_line)
  # Ctrl-C in the control, whose choices come from the second arm's trace.
  stop_at(18, lambda: os.kill(os.getpid(), signal.SIGINT))
  assert _run(path, "--resume") == 128 + signal.SIGINT
  monkeypatch.undo()
  assert _run(path, "--resume") == 0
  assert_same_run(path, whole)


@pytest.mark.experiments
def test_killed_and_resumed(whole, tmp_path, example_dir, assert_same_run):
  path = tmp_path / "run"
  command = [
    sys.executable,
    str(example_dir / "train.py"),
    *_SMALL,
    "--steps",
    "110",
    "--out",
    str(path),
    "--checkpoint-seconds",
    "0",
  ]
  # As many devices as this process has, so that the programs are the same.
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(jax.device_count()),
  }
  process = subprocess.Popen(
    command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
  )
  try:
    deadline = time.monotonic() + 120
    metrics = path / storage.METRICS
    # In the second of the three arms.
    while not (metrics.exists() and metrics.read_text().count("\n") >= 15):
      assert process.poll() is None, process.stderr.read().decode()
      assert time.monotonic() < deadline
      time.sleep(0.002)
    process.kill()
    process.wait()
  finally:
    process.kill()
    process.stderr.close()
  assert process.returncode == -signal.SIGKILL
  assert not (path / "results.md").exists()
  assert _run(path, "--resume") == 0
  assert_same_run(path, whole)


def test_resume_of_a_complete_run_changes_nothing(whole, capsys):
  before = (whole / storage.METRICS).read_bytes()
  assert _run(whole, "--resume") == 0
  assert (whole / storage.METRICS).read_bytes() == before
  assert "GAF tau 0.9" in capsys.readouterr().out


@pytest.mark.parametrize(
  "change, flag",
  [
    (("--tau", "0.8"), "--tau was 0.9, now it is 0.8"),
    (("--seeds", "3"), "--seeds was 2, now it is 3"),
    (("--rule", "leave_one_out"), "--rule was not given"),
  ],
)
def test_resume_with_other_options(whole, refused, change, flag):
  argv = (*_SMALL, "--steps", "110", "--out", whole, "--resume", *change)
  assert flag in refused(*argv)


def test_run_is_not_overwritten(whole, refused):
  assert "already holds something" in refused("--out", whole)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_damaged_config(tmp_path, refused, content):
  (tmp_path / "config.json").write_text(content)
  assert "config.json" in refused("--out", tmp_path, "--resume")


def test_metrics_that_got_shorter(whole, tmp_path):
  directory = storage.RunDirectory(tmp_path / "run", {}, False)
  directory.append_metrics({"a": float("nan")})
  assert directory.metrics() == [{"a": None}]
  directory._kept = 1000
  with pytest.raises(storage.UserError, match="shorter"):
    directory.begin(None, None)
  directory.close()


def test_default_directories_are_numbered(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  choose = lambda resume=False: str(storage.choose_directory(None, "main", resume))
  assert choose() == "runs/main-1"
  for number in (1, 2, 10):
    (tmp_path / "runs" / f"main-{number}").mkdir(parents=True)
  (tmp_path / "runs" / "main-old").mkdir()
  assert choose() == "runs/main-11"
  assert choose(resume=True) == "runs/main-10"


def test_stops_are_the_same_from_every_start():
  for every, steps in ((20, 110), (7, 30), (300, 650), (1000, 10)):
    part = _part("--eval-every", str(every), "--steps", str(steps))
    stops = experiment.stops(part, 100, 0)
    assert stops[-1] == steps and stops == sorted(set(stops))
    assert set(range(every, steps, every)) <= set(stops)
    for i, stop in enumerate(stops[:-1]):
      assert experiment.stops(part, 100, stop) == stops[i + 1 :]


@pytest.mark.experiments
def test_control_updates_as_often_as_gaf(whole, final_arrays):
  arms = final_arrays(whole)
  gaf, control = (
    arms[name]["trace"]["accepted"]
    for name in ("sequential_tau0.9", "sequential_tau0.9_random_steps")
  )
  assert 0 < gaf.any(axis=2).sum() < gaf.any(axis=2).size
  np.testing.assert_array_equal(
    gaf.any(axis=2).sum(axis=1), control.any(axis=2).sum(axis=1)
  )
  skipped = control.shape[1] - control.any(axis=2).sum(axis=1)
  rows = [json.loads(line) for line in _lines(whole / "metrics.jsonl")]
  last = [row for row in rows if row["arm"] == "sequential_tau0.9_random_steps"][-2:]
  assert [row["skipped_steps"] for row in last] == skipped.tolist()


@pytest.mark.experiments
def test_control_averages_what_it_keeps_and_skips_the_rest(digits):
  """Against a few lines of NumPy and Optax that know no GAF."""
  part = _part("--num-microbatches", "4", "--optimizer", "adamw")
  trainer = training.Trainer(part, digits)
  control = part.controls("sequential_tau0.9")["choice"]
  seen = _schedule(part, digits).batches(0, 5, clean=True)
  # In proportion to these, with which nothing else has to do.
  weights = np.array(
    [[1, 1, 1, 1], [0, 0, 0, 0], [0.25, 0, 0, 0.75], [0] * 4, [0, 0.5, 1, 0]]
  )
  keep = weights > 0
  start = trainer.init(control, 3)
  params = jax.tree.map(np.array, start.params)
  chosen = arms.Chosen(keep, weights.astype(np.float32))
  learner, trace = trainer.advance(control, start, seen, chosen)
  np.testing.assert_array_equal(trace.accepted, keep)

  model = models.make("mlp", 10, 8)
  images = digits.train_images.astype(np.float32) / 16

  @jax.jit
  @jax.grad
  def gradient(params, x, y):
    logits = model.apply({"params": params}, x, train=True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

  transformation = optax.adamw(0.02, weight_decay=0.01)
  state = transformation.init(params)
  for step in range(5):
    kept = np.flatnonzero(keep[step])
    if not len(kept):
      continue
    grads = [
      gradient(params, images[seen.indices[step, i]], seen.labels[step, i])
      for i in kept
    ]
    shares = weights[step, kept] / weights[step].sum()
    mean = jax.tree.map(lambda *g: sum(map(np.multiply, shares, g)), *grads)
    updates, state = transformation.update(mean, state, params)
    params = optax.apply_updates(params, updates)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5),
    learner.params,
    params,
  )
  assert int(optax.tree.get(learner.opt_state.inner_state, "count")) == 3


@pytest.mark.experiments
@pytest.mark.parametrize("looped", [True, False])
def test_evaluation_is_of_the_whole_test_set(digits, looped):
  part = _part()
  trainer = training.Trainer(part, digits)
  trainer._looped = looped
  learner = trainer.init(part.arms[0], 0)
  logits = models.make("mlp", 10, 8).apply(
    {"params": learner.params},
    digits.test_images.astype(np.float32) / 16,
    train=False,
  )
  # 600 images do not fill whole batches of 500.
  logits = np.asarray(logits, float)
  expected = np.mean(np.argmax(logits, axis=1) == digits.test_labels)
  own = logits[np.arange(600), digits.test_labels]
  loss = np.mean(np.log(np.exp(logits).sum(axis=1)) - own)
  found = trainer.evaluate(part.arms[0], learner, _schedule(part, digits))
  assert found["test_accuracy"] == pytest.approx(expected)
  assert found["test_loss"] == pytest.approx(loss, rel=1e-5)
  # Here nothing is held out.
  assert "validation_accuracy" not in found


@pytest.mark.experiments
def test_batch_norm_statistics_are_averaged_over_microbatches(
  digits, monkeypatch, normed
):
  monkeypatch.setitem(models.KINDS, "mlp", models.Kind(normed, normalizes=True))
  part = _part()
  plain = dataclasses.replace(part.arms[0], ema_decay=0.05)
  seen = _schedule(part, digits).batches(0, 2, clean=True)
  # At this rate the weights stay what they are.
  part = dataclasses.replace(part, learning_rate=1e-30)
  trainer = training.Trainer(part, digits)
  start = trainer.init(plain, 0)
  dense = jax.tree.map(np.array, start.params["Dense_0"])
  learner, _ = trainer.advance(plain, start, seen)

  images = digits.train_images.reshape(1197, 64) / 16
  hidden = images[seen.indices] @ dense["kernel"] + dense["bias"]  # [2, 2, 5, 8]
  found = learner.batch_stats["BatchNorm_0"]
  averaged = learner.average[1]["BatchNorm_0"]
  for name, before, now in (
    ("mean", 0.0, hidden.mean(axis=2)),
    ("var", 1.0, hidden.var(axis=2)),
  ):
    expected = average = before
    for step in range(2):
      expected = 0.9 * expected + 0.1 * now[step].mean(axis=0)
      average = 0.05 * average + 0.95 * expected
    np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(averaged[name], average, rtol=1e-4, atol=1e-6)


@pytest.mark.experiments
def test_plateau_survives_an_interruption(tmp_path, monkeypatch, assert_same_run):
  argv = ("--optimizer", "nesterov-plateau", "--plateau-patience", "1")
  # So low that the test loss does not fall.
  argv = (*argv, "--learning-rate", "1e-7", "--steps", "100")
  whole, path = tmp_path / "whole", tmp_path / "run"
  scales = []
  observed = training.Trainer.observed

  def noted(self, learner, measured):
    learner = observed(self, learner, measured)
    scales.append(float(learner.plateau.scale))
    return learner

  with monkeypatch.context() as patch:
    patch.setattr(training.Trainer, "observed", noted)
    assert _run(whole, *argv) == 0
  # Of plain averaging alone, before and after the stop.
  first = scales[: 2 * 5]
  assert min(first[:4]) < 1 and min(first[6:]) < min(first[:6])
  append = storage.RunDirectory.append_metrics

  def stop(self, row):
    append(self, row)
    if row["arm"] == "plain" and row["step"] == 60 and row["seed"] == 1:
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(storage.RunDirectory, "append_metrics", stop)
    assert _run(path, *argv) == 128 + signal.SIGTERM
  assert _run(path, *argv, "--resume") == 0
  assert_same_run(path, whole)
