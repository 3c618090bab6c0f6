"""Byte LM: its text, its model, its controls, its report, and runs that go on."""

import csv
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

_DIRECTORY = pathlib.Path(__file__).resolve().parents[2] / "examples" / "byte_lm"
# Last, since the other example has a train.py, too.
sys.path.append(str(_DIRECTORY))

import byte_documents  # noqa: E402
import byte_model  # noqa: E402
import byte_report  # noqa: E402
import byte_text  # noqa: E402
import byte_training  # noqa: E402
from common import arms, experiment, storage  # noqa: E402
from common.command import UserError  # noqa: E402

_spec = importlib.util.spec_from_file_location("byte_lm_train", _DIRECTORY / "train.py")
command = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(command)

_SMALL = ("--steps", "40", "--seeds", "2", "--num-microbatches", "4")
_SMALL += ("--microbatch-size", "2", "--tau", "0.9", "--parts", "code-page")
_MEMORY = "majority_memory_0.98_adaptive"


@pytest.fixture(scope="module", autouse=True)
def small(quickly_compiled):
  """The smallest model, compiled once for all runs of this module."""
  trainers = {}

  def trainer(text, steps, num_microbatches):
    key = text.digest, steps, num_microbatches
    if key not in trainers:
      trainers[key] = byte_training.ByteTrainer(text, steps, num_microbatches)
      trainers[key].forget = lambda: None  # Other runs need them.
    return trainers[key]

  model = functools.partial(byte_model.ByteTransformer, depth=1, heads=2)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(byte_training, "_WIDTH", 16)
    patch.setattr(byte_training, "ByteTransformer", model)
    patch.setattr(command, "ByteTrainer", trainer)
    yield


_CONTROL = arms.Arm("control", "control", imitates="plain", control="choice")


def _run(path, *argv):
  return command.main([*_SMALL, *map(str, argv), "--out", str(path)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run that nothing interrupted."""
  path = tmp_path_factory.mktemp("whole") / "run"
  assert _run(path, "documents") == 0
  return path


@pytest.fixture
def of_memory(monkeypatch):
  """The command with the plain mean, the memory and its controls alone."""
  all_arms = command._by_source

  def some(*args):
    return [arm for arm in all_arms(*args) if "memory" in arm.name or arm == arms.PLAIN]

  monkeypatch.setattr(command, "_by_source", some)


@pytest.fixture
def uninterrupted(of_memory, tmp_path):
  path = tmp_path / "whole"
  assert _run(path) == 0
  return path


def _schedule(name, seed=0, steps=6, k=8, size=3):
  argv = ["--parts", name, "--num-microbatches", str(k), "--microbatch-size", str(size)]
  (part,) = command.parts(command._parsed(argv))
  part = dataclasses.replace(part, steps=steps)
  return byte_text.Schedule(_counting(), part, seed)


def _counting(documents=16, size=251):
  """A text in which each byte is the one before and 1, modulo 251."""
  training = (np.arange(documents * size) % 251).astype(np.uint8)
  windows = np.tile(training[: byte_text.CONTEXT + 2], (24, 1))
  names = tuple(map(str, range(documents)))
  sizes = np.full(documents, size)
  return byte_text.Text(
    training, names, sizes, windows, windows, "counting", "counting"
  )


# The text.


@pytest.fixture
def library(tmp_path):
  """A directory like that of a standard library, each file of one letter."""
  for number in range(26):
    letter = chr(ord("a") + number)
    path = tmp_path / f"package{number % 3}" / f"{letter}.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(letter * 100)
  for name in ("test/a.py", "package1/tests/b.py", "site-packages/c.py"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("T" * 100)
  (tmp_path / "_sysconfigdata_x.py").write_text("S" * 100)
  (tmp_path / "package1" / "notes.txt").write_text("N" * 100)
  return tmp_path


def test_files_are_for_training_or_for_validation_alone(library):
  text = byte_text.load(library)
  parts = text.training, text.validation.ravel(), text.held_out.ravel()
  training, validation, chosen = (set(bytes(part)) for part in parts)
  assert training and validation and chosen
  letters = b"abcdefghijklmnopqrstuvwxyz"
  assert sorted([*training, *validation, *chosen]) == sorted(letters)
  assert len(text.training) == 100 * len(training) == text.sizes.sum()
  ends = np.cumsum(text.sizes) - 1
  assert [chr(text.training[end]) for end in ends] == [
    pathlib.Path(name).stem for name in text.names
  ]
  names = byte_text.source_files(library)
  held_out = {ord(pathlib.Path(n).stem) for n in names if byte_text.is_validation(n)}
  assert held_out == validation | chosen


def test_text_is_the_same_each_time_and_tells_itself_from_another(library):
  first, second = byte_text.load(library), byte_text.load(library)
  np.testing.assert_array_equal(first.training, second.training)
  np.testing.assert_array_equal(first.validation, second.validation)
  np.testing.assert_array_equal(first.held_out, second.held_out)
  assert first.digest == second.digest
  (library / "package0" / "a.py").write_text("A" * 100)
  assert byte_text.load(library).digest != first.digest


@pytest.mark.experiments
def test_the_real_library_is_split_about_nine_to_one():
  text = byte_text.load()
  names = byte_text.source_files(pathlib.Path(os.__file__).parent)
  share = np.mean([byte_text.is_validation(name) for name in names])
  assert len(text.training) > 1_000_000 and 0.05 < share < 0.2
  assert text.validation.shape == (128, byte_text.CONTEXT + 2)


def test_library_without_sources(tmp_path):
  with pytest.raises(UserError, match=r"too few source files \(0 with 0 bytes\)"):
    byte_text.load(tmp_path)


def _wrong(right, kind):
  page = [bytes([x]).decode("latin-1").encode("cp037")[0] for x in right.flat]
  return {
    "right": right,
    "shifted": (right + 1) % 251,
    "code page": np.reshape(page, right.shape),
  }[kind]


@pytest.mark.parametrize("part", byte_text.PARTS)
def test_targets_follow_the_inputs_or_are_wrong_as_said(part):
  schedule = _schedule(part, steps=20)
  batches, spared = (schedule.batches(0, 20, clean) for clean in (False, True))
  right = (batches.inputs.astype(int) + 1) % 251
  kinds = np.array(byte_text.KINDS)[schedule.kinds[schedule.documents]]
  for kind in byte_text.KINDS[:3]:
    of = kinds == kind
    np.testing.assert_array_equal(batches.targets[of], _wrong(right[of], kind))
  drawn = kinds == "random bytes"
  assert drawn.any() == (part == "documents")
  if drawn.any():
    assert np.mean(batches.targets[drawn] == right[drawn]) < 0.05
  np.testing.assert_array_equal(schedule.wrong, (kinds != "right")[..., 0])
  np.testing.assert_array_equal(spared.inputs, batches.inputs)
  np.testing.assert_array_equal(spared.targets, right)


@pytest.mark.parametrize("part", ["clean", "code-page", "shifted"])
def test_shards_keep_their_documents_and_one_is_always_wrong(part):
  of_seeds = [_schedule(part, seed, steps=20) for seed in range(5)]
  for schedule in of_seeds:
    assert (schedule.wrong == schedule.wrong[0]).all()
    assert schedule.wrong[0].sum() == (part != "clean")
    shards = [set(schedule.documents[:, i].ravel()) for i in range(8)]
    assert sum(map(len, shards)) == len(set.union(*shards)) == 16
    # Held-out windows are of the shards in turn.
    right = (np.arange(byte_text.CONTEXT) + 1)[None, :]
    wrong = schedule.wrong[0][np.arange(24) % 8, None]
    kind = {"clean": "right", "code-page": "code page"}.get(part, part)
    expected = np.where(wrong, _wrong(right, kind), right)
    np.testing.assert_array_equal(schedule.held_out_targets, expected)
  assert part == "clean" or len({tuple(s.wrong[0]) for s in of_seeds}) > 1


def test_a_fifth_of_the_documents_is_wrong_in_each_way_alike():
  schedule = _schedule("documents", steps=40)
  assert sorted(schedule.kinds) == [*[0] * 13, 1, 2, 3]
  assert set(schedule.documents.ravel()) == set(range(16))
  right = np.arange(byte_text.CONTEXT) + 1
  differ = (schedule.held_out_targets != right).any(axis=1)
  assert differ.sum() == 5
  other = _schedule("documents", 1)
  assert not np.array_equal(other.kinds, schedule.kinds)


def test_batches_depend_on_seed_and_step_alone():
  six, last = (_schedule("shifted", 1).batches(n, 6, False) for n in (0, 4))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[4:], b), six, last)
  clean = _schedule("clean", 1).batches(0, 6, False)
  np.testing.assert_array_equal(clean.inputs, six.inputs)
  other = _schedule("clean", 2).batches(0, 6, False)
  assert not np.array_equal(other.inputs, clean.inputs)
  starts = clean.inputs[..., 0].ravel()
  assert len(set(starts)) > 0.5 * len(starts)


# The model and the steps.


def _logits(tokens, depth):
  model = byte_model.ByteTransformer(width=16, depth=depth)
  variables = jax.jit(model.init)(jax.random.key(0), tokens)
  return np.asarray(jax.jit(model.apply)(variables, tokens))


@pytest.mark.experiments
def test_no_logit_depends_on_a_later_byte():
  tokens = np.tile(np.arange(12, dtype=np.uint8), (2, 1))
  tokens[1, 7] = 99
  ours, theirs = _logits(tokens, depth=2)
  np.testing.assert_array_equal(ours[:7], theirs[:7])
  assert (np.abs(ours[7:] - theirs[7:]).max(axis=1) > 1e-6).all()


@pytest.mark.experiments
def test_logits_depend_on_the_order_of_earlier_bytes():
  ours, theirs = _logits(np.array([[1, 2, 3, 4], [2, 1, 3, 4]], np.uint8), depth=1)
  assert np.abs(ours[-1] - theirs[-1]).max() > 1e-6


def _chosen(accepted):
  return arms.Chosen(accepted, accepted.astype(np.float32))


@pytest.fixture(scope="module")
def trainer(small):
  return command.ByteTrainer(_counting(), 20, 4)


@pytest.mark.experiments
@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [0, 2]])
def test_steps_are_adamw_on_the_mean_of_what_is_kept(trainer, kept):
  batches = _schedule("shifted", k=4, size=1).batches(0, 3, False)
  before = trainer.init(arms.PLAIN, 0)
  accepted = np.isin(range(4), kept) & np.ones((3, 1), bool)
  seen = (_CONTROL, before, batches, _chosen(accepted))
  if accepted.all():
    seen = (arms.PLAIN, before, batches, None)
  after, happened = trainer.advance(*seen)
  np.testing.assert_array_equal(happened.accepted, accepted)
  np.testing.assert_array_equal(happened.weights, accepted)
  schedule = optax.warmup_cosine_decay_schedule(0.0, 4e-3, 2, 20)
  adamw = optax.adamw(schedule, b2=0.99, weight_decay=0.01)
  model = byte_training.ByteTransformer(width=16)

  def loss(params, inputs, targets):
    logits = model.apply({"params": params}, inputs[kept, 0])
    targets = jax.nn.one_hot(targets[kept, 0], 256)
    return optax.softmax_cross_entropy(logits, targets).mean() / jnp.log(2.0)

  @jax.jit
  def step(params, state, inputs, targets):
    grads = jax.grad(loss)(params, inputs, targets)
    updates, state = adamw.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params, state = before.params, jax.jit(adamw.init)(before.params)
  for inputs, targets in zip(batches.inputs, batches.targets):
    params, state = step(params, state, inputs, targets)
  # Adam divides small gradients by their own size, rounding and all.
  close = functools.partial(np.testing.assert_allclose, atol=1e-4)
  jax.tree.map(close, after.params, params)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after.params, before.params)
  assert max(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.experiments
def test_skipped_steps_move_the_schedule_alone(trainer):
  batches = _schedule("clean", k=4, size=1).batches(0, 3, False)
  before = trainer.init(_CONTROL, 0)
  nothing = _chosen(np.zeros((3, 4), bool))
  after, happened = trainer.advance(_CONTROL, before, batches, nothing)
  assert not happened.accepted.any()
  (_, adamw), (schedule,) = after.opt_state[0], jax.tree.leaves(after.opt_state[1])
  equal = np.testing.assert_array_equal
  jax.tree.map(equal, after.params, before.params)
  jax.tree.map(equal, adamw, before.opt_state[0].inner_state)
  assert int(schedule) == 3


def _advanced(trainer, arm, name="shifted", kept=None):
  """Batches, and what an arm makes of them: its learner and its trace."""
  schedule = _schedule(name, k=4, size=1 if name == "shifted" else 3)
  batches = schedule.batches(0, 4, False)
  learner, happened = trainer.advance(arm, trainer.init(arm, 0), batches, kept)
  return batches, learner, jax.tree.map(np.asarray, happened)


@pytest.mark.experiments
def test_average_of_the_weights_alone_is_validated(trainer):
  ema = dataclasses.replace(arms.PLAIN, ema_decay=0.75)
  schedule, learner = _schedule("shifted", k=4, size=1), trainer.init(ema, 0)
  expected = learner.params
  for step in range(3):
    seen = schedule.batches(step, step + 1, False)
    learner, _ = trainer.advance(ema, learner, seen, None)
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, expected, learner.params)
  close = functools.partial(np.testing.assert_allclose, atol=1e-6)
  jax.tree.map(close, learner.average, expected)
  plain = learner._replace(average=None, params=learner.average)
  ours, theirs = (
    trainer.evaluate(ema, one, schedule)["validation_loss"] for one in (learner, plain)
  )
  assert ours == theirs


@pytest.mark.experiments
def test_smallest_loss_goes_by_the_running_mean_of_each_source(trainer):
  control = arms.Arm("loss", "", imitates="plain", control="loss")
  two = _chosen(np.tile([True, True, False, False], (4, 1)))
  _, _, happened = _advanced(trainer, control, kept=two)
  mean = np.zeros(4)
  for step, (losses, accepted) in enumerate(zip(happened.loss, happened.accepted)):
    mean = 0.98 * mean + 0.02 * losses
    number = 4 if step < 2 else 2  # All, in a tenth of the 20 steps.
    kept = np.sort(mean.argsort()[:number])
    np.testing.assert_array_equal(np.flatnonzero(accepted), kept)


@pytest.mark.experiments
def test_label_smoothing_spreads_a_share_over_all_bytes(trainer):
  smoothed = dataclasses.replace(arms.PLAIN, smoothing=0.25)
  batches, _, happened = _advanced(trainer, smoothed)
  params = trainer.init(arms.PLAIN, 0).params
  model = byte_training.ByteTransformer(width=16)
  logits = jax.jit(model.apply)({"params": params}, batches.inputs[0, :, 0])
  logs = np.asarray(jax.nn.log_softmax(logits), float)
  of_target = np.take_along_axis(
    logs, batches.targets[0, :, 0, :, None].astype(int), -1
  )
  expected = -(0.75 * of_target[..., 0] + 0.25 * logs.mean(-1)).mean(-1) / np.log(2)
  np.testing.assert_allclose(happened.loss[0], expected, rtol=1e-5)


@pytest.mark.experiments
def test_single_sequences_are_compared_by_the_last_layer(trainer):
  compared = arms.gaf_arms(
    2, [], quantile=0.5, by_example=True, rule="nearest_neighbors"
  )
  batches, _, happened = _advanced(trainer, compared[0], "documents")
  params = trainer.init(compared[0], 0).params
  model = byte_training.ByteTransformer(width=16)

  def loss(params, inputs, targets):
    logits = model.apply({"params": params}, inputs)
    targets = jax.nn.one_hot(targets, 256)
    return optax.softmax_cross_entropy(logits, targets).mean() / jnp.log(2.0)

  grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(
    params, batches.inputs[0], batches.targets[0]
  )
  rows = np.asarray(grads["head"]["kernel"], float).reshape(12, -1)
  norms = np.linalg.norm(rows, axis=1)
  distances = 1 - rows @ rows.T / np.outer(norms, norms)
  nearest = np.sort(distances, axis=1)[:, 1:6].mean(axis=1)
  np.testing.assert_allclose(happened.norms[0], norms, rtol=1e-4)
  np.testing.assert_allclose(happened.distances[0], nearest, atol=1e-4)
  kept = np.zeros(12, bool)
  kept[nearest.argsort()[:6]] = True
  np.testing.assert_array_equal(happened.accepted[0], kept)


# The command.


def test_a_short_run(of_memory, tmp_path):
  argv = ["--num-microbatches", "2", "--microbatch-size", "1", "--parts", "shifted"]
  out = ["--out", str(tmp_path / "run")]
  assert command.main(["--steps", "10", "--seeds", "2", *argv, *out]) == 0
  assert "GAF" in (tmp_path / "run" / "results.md").read_text()
  assert {row["arm"] for row in _rows(tmp_path / "run")} > {"plain", _MEMORY}


@pytest.mark.experiments
def test_outputs(whole):
  names = {path.name for path in whole.iterdir()}
  plots = {f"{name}.png" for name in ("validation_loss", "differences")}
  plots |= {"sources.png", "documents.png"}
  files = {"config.json", "metrics.jsonl", "results.md", "results.csv", "checkpoints"}
  assert names == files | plots | {"documents.md", "documents.csv"}
  for name in plots:
    assert (whole / name).read_bytes().startswith(b"\x89PNG")
  with open(whole / "results.csv", newline="") as file:
    lines = list(csv.DictReader(file))
  parts = command.parts(command._parsed([*_SMALL, "documents"]))
  expected = [
    (part.name, arm.name, arm.role, str(seed))
    for part in parts
    for arm in part.arms
    for seed in range(2)
  ]
  fields = "part", "arm", "role", "seed"
  assert [tuple(line[field] for field in fields) for line in lines] == expected
  for line in lines:
    final, best, picked = (float(line[name]) for name in ("final", "best", "picked"))
    assert 0 < best <= min(final, picked) < 9


@pytest.mark.experiments
def test_controls_accept_as_many_as_what_they_imitate(whole, final_arrays):
  for part in command.parts(command._parsed([*_SMALL, "documents"])):
    arrays = final_arrays(whole, part.name)
    for arm in part.arms:
      if arm.control in ("choice", "loss"):
        gaf, control = (
          arrays[name]["trace"]["accepted"] for name in (arm.imitates, arm.name)
        )
        if arm.control == "loss":  # After a warm-up.
          assert control[:, :4].all()
          gaf, control = gaf[:, 4:], control[:, 4:]
        np.testing.assert_array_equal(gaf.sum(axis=2), control.sum(axis=2))
        assert part.name != "documents" or not np.array_equal(gaf, control)
      if arm.control == "right":
        kept = arrays[arm.name]["trace"]["accepted"]
        for seed in range(2):
          schedule = byte_text.Schedule(byte_text.load(), part, seed)
          np.testing.assert_array_equal(kept[seed], ~schedule.wrong)


def _rows(path):
  lines = (path / storage.METRICS).read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.mark.experiments
def test_loss_falls(whole):
  rows = _rows(whole)
  for key in {(row["part"], row["arm"], row["seed"]) for row in rows}:
    losses = [
      row["validation_loss"]
      for row in rows
      if (row["part"], row["arm"], row["seed"]) == key
    ]
    assert len(losses) == 10 and losses[0] > 7.5  # 8 bits at the beginning
    # An average of weights lags behind.
    assert losses[-1] < losses[0] - (0.05 if key[1] == "ema" else 0.5), key


@pytest.mark.experiments
def test_lines_say_what_the_filter_did_and_what_the_memory_holds(whole, final_arrays):
  learners = final_arrays(whole, "code-page")[_MEMORY]["learners"]
  rows = [row for row in _rows(whole) if row["arm"] == _MEMORY]
  for seed, learner in enumerate(learners):
    (mean,) = [
      leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(learner)
      if "memory" in jax.tree_util.keystr(path) and "mean" in jax.tree_util.keystr(path)
    ]
    # The second nearest of three others makes a majority of four with it.
    others = np.sort(mean[0] - 9 * np.eye(4), axis=1)
    last = [row for row in rows if row["seed"] == seed][-1]
    said = [last[f"source_{i + 1}/agreement"] for i in range(4)]
    np.testing.assert_allclose(said, others[:, -2], atol=1e-6)
    accepted = final_arrays(whole, "code-page")[_MEMORY]["trace"]["accepted"][seed]
    said = [last[f"source_{i + 1}/accept_rate"] for i in range(4)]
    np.testing.assert_allclose(said, accepted.mean(axis=0), atol=1e-5)
    assert last["gaf/num_accepted"] == accepted[-1].sum()
    assert last["gaf/accept_rate"] == pytest.approx(accepted.mean(), abs=1e-5)


@pytest.mark.experiments
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_within_the_memory_and_resumed(
  uninterrupted, tmp_path, monkeypatch, capsys, assert_same_run, final_arrays, number
):
  append, appended = storage.RunDirectory.append_metrics, []

  def append_and_stop(self, row):
    append(self, row)
    appended.append(row)
    if len(appended) == 30:
      os.kill(os.getpid(), number)

  with monkeypatch.context() as patch:
    patch.setattr(storage.RunDirectory, "append_metrics", append_and_stop)
    assert _run(tmp_path / "run") == 128 + number
  assert "--resume" in capsys.readouterr().err
  assert not (tmp_path / "run" / "results.md").exists()
  held = final_arrays(tmp_path / "run", "code-page")
  assert sorted(held) == [_MEMORY, "plain"]
  steps = held[_MEMORY]["trace"]["accepted"].any(axis=(0, 2))
  assert 0 < steps.sum() < len(steps)
  assert _run(tmp_path / "run", "--resume") == 0
  assert_same_run(tmp_path / "run", uninterrupted, "code-page")


@pytest.mark.experiments
def test_dead_between_two_checkpoints(
  uninterrupted, tmp_path, monkeypatch, assert_same_run
):
  class Died(BaseException):
    pass

  stops, stopped = experiment.Trainer.observed, []

  def die(*args):
    stopped.append(args)
    if len(stopped) > 30:
      raise Died
    return stops(*args)

  with monkeypatch.context() as patch, pytest.raises(Died):
    patch.setattr(experiment.Trainer, "observed", die)
    _run(tmp_path / "run", "--checkpoint-seconds", "1000")
  assert _run(tmp_path / "run", "--resume") == 0
  assert_same_run(tmp_path / "run", uninterrupted, "code-page")


@pytest.fixture
def refused(capsys):
  """A function that runs the command and returns its one sentence of refusal."""

  def run(*argv):
    try:
      code = command.main([str(a) for a in argv])
    except SystemExit as error:
      code = error.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "", err
    # Beside it, the progress bar.
    (line,) = [line for line in err.splitlines() if line.startswith("train.py: ")]
    return line

  return run


@pytest.mark.parametrize(
  "argv, said",
  [
    (["--steps", "25"], "multiple of 10"),
    (["--steps", "0"], "at least 1"),
    (["--seeds", "none"], "at least 1, got 'none'"),
    (["--num-microbatches", "1"], "at least 2"),
    (["--tau", "2"], "from 0 to below 2"),
    (["--tau", "nan"], "from 0 to below 2"),
    (["--parts", "digits"], "invalid choice: 'digits'"),
    (["--epochs", "3"], "unrecognized arguments"),
  ],
)
def test_bad_options(refused, argv, said):
  assert said in refused(*argv)


@pytest.mark.experiments
def test_bad_directories(refused, whole, tmp_path):
  assert "already holds something" in refused("--out", whole)
  other = refused(*_SMALL, "documents", "--out", whole, "--resume", "--seeds", "3")
  assert "--seeds was 2, now it is 3" in other
  said = refused("--out", whole / "results.md")
  assert "results.md cannot be written to: File exists." in said
  (tmp_path / "config.json").write_text("[1")
  assert "does not hold a run" in refused("--out", tmp_path, "--resume")


@pytest.mark.experiments
def test_another_text_is_not_resumed(refused, whole, tmp_path):
  config = json.loads((whole / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(config | {"--text": "other"}))
  assert "--text was other" in refused(
    *_SMALL, "documents", "--out", tmp_path, "--resume"
  )


@pytest.mark.experiments
def test_damaged_checkpoint(refused, whole, tmp_path):
  shutil.copytree(whole, tmp_path / "run")
  for file in (tmp_path / "run/checkpoints/code-page/plain").rglob("*"):
    if file.is_file():
      file.write_bytes(b"")
  assert "cannot be read" in refused(
    *_SMALL, "documents", "--out", tmp_path / "run", "--resume"
  )


# The report.


def test_summary_of_a_case_by_hand():
  accepted, wrong = np.zeros((2, 2, 20, 2), bool)
  accepted[:, 0] = accepted[:, 1] = True
  wrong[:, 0, 0] = wrong[:, 18, 1] = True
  validation = np.tile(np.linspace(4, 3, 10), (2, 1))
  validation[:, 7] = 2.5
  held_out = np.full((2, 10), 5.0)
  held_out[0, 2] = held_out[1, 9] = 4.0
  summary = byte_report.Summary.of(accepted, wrong, validation, held_out)
  expected = dict(
    final=[3.0] * 2,
    best=[2.5] * 2,
    picked=[4 - 2 / 9, 3.0],
    accepted=[0.1] * 2,
    from_wrong=[0.25] * 2,
    taken=[0.1] * 2,
  )
  assert vars(summary).keys() == expected.keys()
  for name, values in vars(summary).items():
    np.testing.assert_allclose(values, expected[name], err_msg=name)


def test_tables_compare_with_all_but_other_arms_controls():
  (part,) = command.parts(command._parsed(["--parts", "shifted", "--tau", "0.9"]))
  summaries = {
    arm: byte_report.Summary(*(np.full(2, float(i + n)) for n in range(6)))
    for i, arm in enumerate(part.arms)
  }
  memory = part.arm(_MEMORY)
  place = part.arms.index(memory)
  table = byte_report.differences_table(memory, part, summaries)
  _, _, *lines = [
    [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
  ]
  expected = [
    [arm.label, *[f"{place - i:+.3f}"] * 3]
    for i, arm in enumerate(part.arms)
    if arm != memory
  ]
  assert lines == expected and len(lines) == 8
  (step,) = [arm for arm in part.arms if arm.is_gaf and arm != memory]
  table = byte_report.differences_table(step, part, summaries)
  assert "random choice" not in table and "right sources only" in table


def test_scores_are_means_less_those_of_the_steps():
  signal = np.array([[1.0, 3.0], [5.0, np.nan], [2.0, 4.0]])
  documents = np.array([[0, 1], [1, 0], [1, 1]])
  found = byte_documents.scores(signal, documents, 3)
  np.testing.assert_allclose(found, [-1.0, (1 + 0 - 1 + 1) / 4, np.nan])


def test_areas_and_the_share_of_wrong_ones_among_the_worst():
  kinds = np.array([0, 0, 0, 1, 2, 3, 3])
  score = np.array([1.0, 2.0, 3.0, 4.0, 2.5, 0.0, np.nan])
  # Of nine pairs of a wrong and a right one that are known, five are in order.
  expected = [5 / 9, 1.0, 2 / 3, 0.0]
  np.testing.assert_allclose(byte_documents.areas(score, kinds), expected)
  assert byte_documents.precision(score, kinds) == pytest.approx(2 / 3)
