"""Byte LM: its text, its model, its controls, its report, and runs that go on."""

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
_SMALL += ("--microbatch-size", "1", "--parts", "code-page", "--tau", "0.9")


@pytest.fixture(scope="module", autouse=True)
def small(quickly_compiled):
  """The smallest model, compiled once for all runs of this module."""
  trainers = {}

  def trainer(text, steps, num_microbatches):
    key = text.digest, steps, num_microbatches
    if key not in trainers:
      trainers[key] = byte_training.ByteTrainer(text, steps, num_microbatches)
    return trainers[key]

  model = functools.partial(byte_model.ByteTransformer, width=16, depth=1, heads=2)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(byte_training, "ByteTransformer", model)
    patch.setattr(command, "ByteTrainer", trainer)
    yield


_CONTROL = arms.Arm("control", "control", imitates="plain", control="choice")


def _run(path, *argv):
  return command.main([*_SMALL, "--out", str(path), *map(str, argv)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run that nothing interrupted."""
  path = tmp_path_factory.mktemp("whole") / "run"
  assert _run(path) == 0
  return path


def _schedule(name, seed=0, steps=6, k=8, size=3):
  argv = ["--parts", name, "--num-microbatches", str(k), "--microbatch-size", str(size)]
  (part,) = command.parts(command._parsed(argv))
  part = dataclasses.replace(part, steps=steps)
  return byte_text.Schedule(_counting(), part, seed)


def _counting(length=4000):
  """A text in which each byte is the one before and 1, modulo 251."""
  training = (np.arange(length) % 251).astype(np.uint8)
  windows = np.tile(training[: byte_text.CONTEXT + 1], (4, 1))
  return byte_text.Text(training, windows, "counting", "counting")


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
  training, validation = set(bytes(text.training)), set(text.validation.ravel())
  assert training and validation and not training & validation
  assert training | validation == set(b"abcdefghijklmnopqrstuvwxyz")
  assert len(text.training) == 100 * len(training)
  names = byte_text.source_files(library)
  held_out = {ord(pathlib.Path(n).stem) for n in names if byte_text.is_validation(n)}
  assert held_out == validation


def test_text_is_the_same_each_time_and_tells_itself_from_another(library):
  first, second = byte_text.load(library), byte_text.load(library)
  np.testing.assert_array_equal(first.training, second.training)
  np.testing.assert_array_equal(first.validation, second.validation)
  assert first.digest == second.digest
  (library / "package0" / "a.py").write_text("A" * 100)
  assert byte_text.load(library).digest != first.digest


def test_the_real_library_is_split_about_nine_to_one():
  text = byte_text.load()
  names = byte_text.source_files(pathlib.Path(os.__file__).parent)
  share = np.mean([byte_text.is_validation(name) for name in names])
  assert len(text.training) > 1_000_000 and 0.05 < share < 0.2
  assert text.validation.shape == (128, byte_text.CONTEXT + 1)


def test_library_without_sources(tmp_path):
  with pytest.raises(UserError, match=r"too few source files \(0 with 0 bytes\)"):
    byte_text.load(tmp_path)


@pytest.mark.parametrize("part", byte_text.PARTS)
def test_targets_follow_the_inputs_or_are_wrong_as_said(part):
  schedule = _schedule(part)
  batches, spared = (schedule.batches(0, 6, clean) for clean in (False, True))
  right = (batches.inputs.astype(int) + 1) % 251
  wrong = {
    "clean": right,
    "shifted": (right + 1) % 251,
    "code-page": np.reshape(
      [bytes([x]).decode("latin-1").encode("cp037")[0] for x in right.flat], right.shape
    ),
  }[part]
  number = 0 if part == "clean" else 3
  np.testing.assert_array_equal(schedule.wrong.sum(axis=1), [number] * 6)
  assert part == "clean" or len({tuple(w) for w in schedule.wrong}) > 1
  expected = np.where(schedule.wrong[..., None, None], wrong, right)
  np.testing.assert_array_equal(batches.targets, expected)
  np.testing.assert_array_equal(spared.inputs, batches.inputs)
  np.testing.assert_array_equal(spared.targets, right)


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


def test_no_logit_depends_on_a_later_byte():
  tokens = np.tile(np.arange(12, dtype=np.uint8), (2, 1))
  tokens[1, 7] = 99
  ours, theirs = _logits(tokens, depth=2)
  np.testing.assert_array_equal(ours[:7], theirs[:7])
  assert (np.abs(ours[7:] - theirs[7:]).max(axis=1) > 1e-6).all()


def test_logits_depend_on_the_order_of_earlier_bytes():
  ours, theirs = _logits(np.array([[1, 2, 3, 4], [2, 1, 3, 4]], np.uint8), depth=1)
  assert np.abs(ours[-1] - theirs[-1]).max() > 1e-6


def _chosen(accepted):
  return arms.Chosen(accepted, accepted.astype(np.float32))


@pytest.fixture(scope="module")
def trainer(small):
  return command.ByteTrainer(_counting(), 20, 4)


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
  model = byte_training.ByteTransformer()

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


# The command.


def test_outputs(whole):
  names = {path.name for path in whole.iterdir()}
  plots = {"validation_loss.png", "cosine_distance.png"}
  files = {"config.json", "metrics.jsonl", "results.md", "results.csv", "checkpoints"}
  assert names == files | plots
  for name in plots:
    assert (whole / name).read_bytes().startswith(b"\x89PNG")
  assert len((whole / "results.csv").read_text().splitlines()) == 1 + 6 * 2


def test_controls_accept_as_many_as_what_they_imitate(whole, final_arrays):
  arrays = final_arrays(whole, "code-page")
  for rule in command.RULES:
    gaf, control = (
      arrays[f"{rule}_tau0.9{kind}"]["trace"]["accepted"]
      for kind in ("", "_random_choice")
    )
    np.testing.assert_array_equal(gaf.sum(axis=2), control.sum(axis=2))
    for ours, theirs in zip(gaf, control):
      assert 0 < ours.sum() < ours.size and not np.array_equal(ours, theirs)


def test_two_microbatches_have_a_choice_too():
  (part, _) = command.parts(
    command._parsed(["--num-microbatches", "2", "--parts", "shifted", "clean"])
  )[::-1]
  for arm in filter(lambda arm: arm.is_gaf, part.arms):
    assert list(part.controls(arm.name)) == ["choice"]


def test_loss_falls(whole):
  lines = (whole / storage.METRICS).read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  for arm in {row["arm"] for row in rows}:
    for seed in range(2):
      losses = [
        row["validation_loss"]
        for row in rows
        if (row["arm"], row["seed"]) == (arm, seed)
      ]
      assert len(losses) == 20 and losses[0] > 7.5  # 8 bits at the beginning
      assert losses[-1] < losses[0] - 0.5, arm


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_resumed(
  whole, tmp_path, monkeypatch, capsys, assert_same_run, number
):
  append, appended = storage.RunDirectory.append_metrics, []

  def append_and_stop(self, row):
    append(self, row)
    appended.append(row)
    if len(appended) == 70:
      os.kill(os.getpid(), number)

  with monkeypatch.context() as patch:
    patch.setattr(storage.RunDirectory, "append_metrics", append_and_stop)
    assert _run(tmp_path / "run") == 128 + number
  assert "--resume" in capsys.readouterr().err
  assert not (tmp_path / "run" / "results.md").exists()
  assert _run(tmp_path / "run", "--resume") == 0
  assert_same_run(tmp_path / "run", whole, "code-page")


def test_dead_between_two_checkpoints(whole, tmp_path, monkeypatch, assert_same_run):
  class Died(BaseException):
    pass

  stops, stopped = experiment.Trainer.observed, []

  def die(*args):
    stopped.append(args)
    if len(stopped) > 50:
      raise Died
    return stops(*args)

  with monkeypatch.context() as patch, pytest.raises(Died):
    patch.setattr(experiment.Trainer, "observed", die)
    _run(tmp_path / "run", "--checkpoint-seconds", "1000")
  assert _run(tmp_path / "run", "--resume") == 0
  assert_same_run(tmp_path / "run", whole, "code-page")


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
    (["--steps", "30"], "multiple of 20"),
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


def test_bad_directories(refused, whole, tmp_path):
  assert "already holds something" in refused("--out", whole)
  other = refused(*_SMALL, "--out", whole, "--resume", "--seeds", "3")
  assert "--seeds was 2, now it is 3" in other
  said = refused("--out", whole / "results.md")
  assert "results.md cannot be written to: File exists." in said
  (tmp_path / "config.json").write_text("[1")
  assert "does not hold a run" in refused("--out", tmp_path, "--resume")


def test_another_text_is_not_resumed(refused, whole, tmp_path):
  config = json.loads((whole / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(config | {"--text": "other"}))
  assert "--text was other" in refused(*_SMALL, "--out", tmp_path, "--resume")


def test_damaged_checkpoint(refused, whole, tmp_path):
  shutil.copytree(whole, tmp_path / "run")
  for file in (tmp_path / "run/checkpoints/code-page/plain").rglob("*"):
    if file.is_file():
      file.write_bytes(b"")
  assert "cannot be read" in refused(*_SMALL, "--out", tmp_path / "run", "--resume")


# The report.


def test_summary_of_a_case_by_hand():
  loss = np.full((20, 2), 5.0, np.float32)
  loss[18:] = [[1.0, 9.0], [2.0, 3.0]]
  wrong = np.zeros((20, 2), bool)
  wrong[18, 1] = wrong[0, 0] = True
  accepted = np.zeros((20, 2), bool)
  accepted[0] = accepted[1] = True
  distances = np.full((20, 2), [np.nan, 0.5], np.float32)
  distances[0] = [np.nan, 1.75]
  distances[19] = [1.0, 1.25]
  validation = np.linspace(4, 3, 20)
  validation[7] = 2.5
  trace = byte_training.Trace(loss, distances, accepted, None)
  twice = byte_training.Trace(*(x if x is None else np.stack([x, x]) for x in trace))
  both = np.stack([wrong, wrong]), np.stack([validation, validation])
  summary = byte_report.Summary.of(twice, *both)
  expected = dict(
    best=2.5,
    final=3.0,
    training=2.0,  # of 1, 2 and 3
    accepted=0.1,
    from_wrong=0.25,
    taken=0.1,
    first_distance=1.125,
    last_distance=2.75 / 3,
    largest_mean=1.75,
    largest=1.75,
  )
  assert vars(summary).keys() == expected.keys()
  for name, values in vars(summary).items():
    np.testing.assert_allclose(values, [expected[name]] * 2, err_msg=name)


def test_tables_compare_with_the_right_arms():
  (part,) = command.parts(command._parsed(["--parts", "shifted", "--tau", "0.9"]))
  final = {arm: np.array([float(i), i]) for i, arm in enumerate(part.arms)}
  summaries = {
    arm: byte_report.Summary(value + 10, value, *[value] * 8)
    for arm, value in final.items()
  }
  _, _, *lines = byte_report.differences_table(part, summaries).splitlines()
  first, second = (
    [cell.strip() for cell in line.strip("|").split("|")] for line in lines
  )
  # In the order of the arms: plain, two pairs of GAF and control, nothing wrong.
  assert first == ["GAF sequential tau 0.9", *["+1.000", "-1.000", "-4.000"] * 2]
  assert second == ["GAF most_neighbors tau 0.9", *["+3.000", "-1.000", "-2.000"] * 2]
