"""Byte LM: its text, its model, its controls, its report, and runs that go on."""

import functools
import importlib.util
import json
import os
import pathlib
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

import byte_arms  # noqa: E402
import byte_model  # noqa: E402
import byte_report  # noqa: E402
import byte_runs  # noqa: E402
import byte_text  # noqa: E402
import byte_training  # noqa: E402
from byte_errors import UserError  # noqa: E402

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
      trainers[key] = byte_training.Trainer(text, steps, num_microbatches)
    return trainers[key]

  model = functools.partial(byte_model.ByteTransformer, width=16, depth=1, heads=2)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(byte_training, "ByteTransformer", model)
    patch.setattr(byte_runs, "Trainer", trainer)
    yield


_CONTROL = byte_arms.Arm("control", "control", imitates=byte_arms.PLAIN)


def _run(path, *argv):
  return command.main([*_SMALL, "--out", str(path), *map(str, argv)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run that nothing interrupted."""
  path = tmp_path_factory.mktemp("whole") / "run"
  assert _run(path) == 0
  return path


def _records(path):
  return {file.name: dict(np.load(file)) for file in (path / "runs").glob("*.npz")}


def _assert_same_run(path, other):
  for name in ("results.md", "results.csv"):
    assert (path / name).read_bytes() == (other / name).read_bytes()
  ours, theirs = _records(path), _records(other)
  assert ours.keys() == theirs.keys() and len(ours) == 12
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


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
  batches = _counting().batches(part, 0, range(6), 8, 3)
  right = (batches.inputs.astype(int) + 1) % 251
  wrong = {
    "clean": right,
    "shifted": (right + 1) % 251,
    "code-page": np.reshape(
      [bytes([x]).decode("latin-1").encode("cp037")[0] for x in right.flat], right.shape
    ),
  }[part]
  number = 0 if part == "clean" else 3
  np.testing.assert_array_equal(batches.wrong.sum(axis=1), [number] * 6)
  assert part == "clean" or len({tuple(w) for w in batches.wrong}) > 1
  expected = np.where(batches.wrong[..., None, None], wrong, right)
  np.testing.assert_array_equal(batches.targets, expected)


def test_batches_depend_on_seed_and_step_alone():
  text = _counting()
  batches = functools.partial(text.batches, num_microbatches=8, size=2)
  six, last = (batches("shifted", 1, steps) for steps in (range(6), range(4, 6)))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[4:], b), six, last)
  clean = batches("clean", 1, range(6))
  np.testing.assert_array_equal(clean.inputs, six.inputs)
  assert not np.array_equal(batches("clean", 2, range(6)).inputs, clean.inputs)
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


@pytest.fixture(scope="module")
def trainer(small):
  return byte_runs.Trainer(_counting(), 20, 4)


@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [0, 2]])
def test_steps_are_adamw_on_the_mean_of_what_is_kept(trainer, kept):
  batches = _counting().batches("shifted", 0, range(3), 4, 1)
  before, accepted = trainer.init(0), np.isin(range(4), kept) & np.ones((3, 1), bool)
  seen = (_CONTROL, before, batches, accepted)
  if accepted.all():
    seen = (byte_arms.PLAIN, before, batches, None)
  after, happened = trainer.advance(*seen)
  np.testing.assert_array_equal(happened["accepted"], accepted)
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
  batches = _counting().batches("clean", 0, range(3), 4, 1)
  before = trainer.init(0)
  nothing = np.zeros((3, 4), bool)
  after, happened = trainer.advance(_CONTROL, before, batches, nothing)
  assert not happened["accepted"].any()
  (_, adamw), (schedule,) = after.opt_state[0], jax.tree.leaves(after.opt_state[1])
  equal = np.testing.assert_array_equal
  jax.tree.map(equal, after.params, before.params)
  jax.tree.map(equal, adamw, before.opt_state[0].inner_state)
  assert int(schedule) == 3


def test_random_choice_keeps_as_many_but_others():
  accepted = np.zeros((200, 8), bool)
  accepted[np.arange(200), 0] = True
  accepted[100:, :4] = True
  accepted[150:] = False
  kept = byte_arms.random_choice(accepted, 0)
  np.testing.assert_array_equal(kept.sum(axis=1), accepted.sum(axis=1))
  # In place i with probability 1/8: 12.5 of 100, standard deviation 3.3.
  assert 2 <= kept[:100].sum(axis=0).min() <= kept[:100].sum(axis=0).max() <= 26
  np.testing.assert_array_equal(kept, byte_arms.random_choice(accepted, 0))
  assert not np.array_equal(kept, byte_arms.random_choice(accepted, 1))


# The command.


def test_outputs(whole):
  names = {path.name for path in whole.iterdir()}
  plots = {"validation_loss.png", "cosine_distance.png"}
  assert names == {"config.json", "results.md", "results.csv", "runs", *plots}
  for name in plots:
    assert (whole / name).read_bytes().startswith(b"\x89PNG")
  assert len((whole / "results.csv").read_text().splitlines()) == 1 + 6 * 2


def test_controls_accept_as_many_as_what_they_imitate(whole):
  records = _records(whole)
  for rule in byte_arms.RULES:
    for seed in range(2):
      gaf, control = (
        records[f"code-page_{rule}-0.9{kind}_{seed}.npz"]["accepted"]
        for kind in ("", "-choice")
      )
      np.testing.assert_array_equal(gaf.sum(axis=1), control.sum(axis=1))
      assert 0 < gaf.sum() < gaf.size and not np.array_equal(gaf, control)


def test_loss_falls(whole):
  for name, record in _records(whole).items():
    validation = record["validation"]
    assert validation[0] > 7.5, name  # 8 bits at the beginning
    assert validation[-1] < validation[0] - 0.5, name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_resumed(whole, tmp_path, monkeypatch, capsys, number):
  save, saved = byte_runs._save, []

  def save_and_stop(*args):
    save(*args)
    saved.append(args)
    if len(saved) == 70:
      os.kill(os.getpid(), number)

  with monkeypatch.context() as patch:
    patch.setattr(byte_runs, "_save", save_and_stop)
    assert _run(tmp_path / "run") == 128 + number
  assert "--resume goes on" in capsys.readouterr().err
  assert not (tmp_path / "run" / "results.md").exists()
  assert any("leaf_0" in record for record in _records(tmp_path / "run").values())
  assert _run(tmp_path / "run", "--resume") == 0
  _assert_same_run(tmp_path / "run", whole)


def test_dead_before_a_file_takes_its_name(whole, tmp_path, monkeypatch):
  class Died(BaseException):
    pass

  replace, replaced = os.replace, []

  def die(*args):
    replaced.append(args)
    if len(replaced) > 50:
      raise Died
    replace(*args)

  with monkeypatch.context() as patch, pytest.raises(Died):
    patch.setattr(os, "replace", die)
    _run(tmp_path / "run")
  assert list((tmp_path / "run" / "runs").glob(".*.partial"))
  assert _run(tmp_path / "run", "--resume") == 0
  _assert_same_run(tmp_path / "run", whole)


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
    (["--steps", "0"], "at least 20"),
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
  assert "another --seeds" in other
  assert "File exists" in refused("--out", whole / "results.md")
  assert "does not hold a run" in refused("--out", tmp_path / "new", "--resume")
  (tmp_path / "config.json").write_text("[1")
  assert "does not hold a run" in refused("--out", tmp_path, "--resume")


def test_another_text_is_not_resumed(refused, whole, tmp_path):
  config = json.loads((whole / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(config | {"text": "other"}))
  assert "another text" in refused(*_SMALL, "--out", tmp_path, "--resume")


def test_damaged_file(refused, whole, tmp_path):
  (tmp_path / "runs").mkdir()
  config = (whole / "config.json").read_bytes()
  (tmp_path / "config.json").write_bytes(config)
  (tmp_path / "runs" / "code-page_plain_0.npz").write_bytes(b"PK\x03\x04")
  assert "was damaged" in refused(*_SMALL, "--out", tmp_path, "--resume")


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
  record = dict(
    loss=loss,
    wrong=wrong,
    accepted=accepted,
    distances=distances,
    validation=validation,
  )
  summary = byte_report.Summary.of([record, record])
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


@pytest.mark.parametrize(
  "ours, said",
  [
    # Standard deviation 1, t 4.3027 with 2 degrees of freedom, over the root of 3.
    ([1.0, 2.0, 3.0], "+2.000 ± 2.484"),
    ([-1.1, -1.0, -0.9], "**-1.000 ± 0.248**"),
    ([1.0, 2.0], "+1.500"),
  ],
)
def test_difference(ours, said):
  assert byte_report.difference(np.array(ours) + 7, np.full(len(ours), 7.0)) == said


def test_tables_compare_with_the_right_arms():
  arms = byte_arms.arms("shifted", [0.9])
  final = {arm: np.array([float(i), i]) for i, arm in enumerate(arms)}
  summaries = {
    arm: byte_report.Summary(value + 10, value, *[value] * 8)
    for arm, value in final.items()
  }
  _, _, first, second = byte_report.differences_table(summaries).splitlines()
  # In the order of the arms: plain, two pairs of GAF and control, nothing wrong.
  assert first == f"| GAF sequential tau 0.9 |{' +1.000 | -1.000 | -4.000 |' * 2}"
  assert second == f"| GAF most_neighbors tau 0.9 |{' +3.000 | -1.000 | -2.000 |' * 2}"
