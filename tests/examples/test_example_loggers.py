"""Loggers: what TensorBoard and wandb are told, also by runs killed and resumed."""

import argparse
import math
import sys
import types

import numpy as np
import pytest

import options
from common import loggers
from common.command import UserError

pytestmark = pytest.mark.experiments

_PACKAGES = "tensorboardX", "wandb"


def _asked(**given):
  return argparse.Namespace(**{"tensorboard": False, "wandb": None, **given})


@pytest.fixture(scope="module")
def part():
  (part,) = options.parts(options.parse(["--tau", "0.9", "--seeds", "2"]))
  return part


def _row(part, arm, seed, step, **values):
  return {"part": part.name, "arm": arm.name, "seed": seed, "step": step, **values}


def _rows(part, arm, *steps, value=1.0):
  return [_row(part, arm, seed, step, loss=value) for step in steps for seed in (0, 1)]


def _first_arm(part):
  return part.arms[0]


def test_tensorboard_shows_what_was_logged(tmp_path, part, shown):
  log = loggers.make(_asked(tensorboard=True), tmp_path / "run")
  assert not (tmp_path / "run").exists()
  for arm in part.arms:
    log.begin(part, arm, [])
    for step in (20, 40):
      for seed in range(2):
        accuracy, skipped = np.float32(step / 128 + seed), np.int32(seed)
        log.log(
          _row(part, arm, seed, step, test_accuracy=accuracy, skipped_steps=skipped)
        )
    log.flush()
  log.close()
  for arm in part.arms:
    for seed in range(2):
      path = tmp_path / "run" / "tensorboard" / "experiment" / arm.name / f"seed-{seed}"
      assert shown(path) == {
        "test_accuracy": [(20, 20 / 128 + seed), (40, 40 / 128 + seed)],
        "skipped_steps": [(20, seed), (40, seed)],
      }


def test_only_finite_numbers_are_logged(tmp_path, part, shown):
  arm = _first_arm(part)
  log = loggers.make(_asked(tensorboard=True), tmp_path)
  log.begin(part, arm, [])
  log.log(
    _row(part, arm, 0, 20, a=math.nan, b=None, c=math.inf, d=np.float32("nan"), e=0)
  )
  log.log(_row(part, arm, 0, 40, a=1.5, b=None))
  log.log(_row(part, arm, 0, 60, a=math.nan))
  log.flush()
  log.close()
  found = shown(tmp_path / "tensorboard" / "experiment" / arm.name / "seed-0")
  assert found == {"e": [(20, 0.0)], "a": [(40, 1.5)]}


@pytest.mark.parametrize("checkpoint", [0, 40])
def test_tensorboard_after_a_kill(tmp_path, part, shown, checkpoint):
  arm = _first_arm(part)
  path = tmp_path / "tensorboard" / "experiment" / arm.name / "seed-0"
  kept = _rows(part, arm, *range(20, checkpoint + 1, 20), value=1.0)

  def logged(rows, *steps, value):
    log = loggers.make(_asked(tensorboard=True), tmp_path)
    log.begin(part, arm, rows)
    for row in _rows(part, arm, *steps, value=value):
      log.log(row)
    return log

  # Kept here, since collecting them would close their files.
  killed = [logged([], 20, 40, 60, 80, value=1.0)]
  killed[0].flush()
  # The next is killed before its first flush, and the third after one.
  killed.append(logged(kept, checkpoint + 20, value=2.0))
  killed.append(logged(kept, checkpoint + 20, value=3.0))
  killed[2].flush()
  killed.append(logged(kept, *range(checkpoint + 20, 101, 20), value=4.0))
  killed[3].flush()
  steps = [20, 40, 60, 80, 100]
  expected = [(step, 1.0 if step <= checkpoint else 4.0) for step in steps]
  assert shown(path) == {"loss": expected}
  assert len(list(path.iterdir())) == 4
  for log in killed:
    log.close()


def test_tensorboard_asked_for_when_resuming(tmp_path, part, shown):
  other, arm = part.arms[:2]
  log = loggers.make(_asked(tensorboard=True), tmp_path)
  log.begin(part, arm, _rows(part, other, 20, 40) + _rows(part, arm, 20, value=0.5))
  for row in _rows(part, arm, 40, value=0.25):
    log.log(row)
  log.flush()
  log.close()
  for seed in range(2):
    path = tmp_path / "tensorboard" / "experiment" / arm.name / f"seed-{seed}"
    assert shown(path) == {"loss": [(20, 0.5), (40, 0.25)]}


def test_what_was_flushed_survives_a_kill(tmp_path, part, shown):
  arm = _first_arm(part)
  log = loggers.make(_asked(tensorboard=True), tmp_path)
  log.begin(part, arm, [])
  steps = range(1, 51)
  for step in steps:
    log.log(_row(part, arm, 1, step, loss=1.0))
  log.flush()
  path = tmp_path / "tensorboard" / "experiment" / arm.name / "seed-1"
  assert shown(path) == {"loss": [(step, 1.0) for step in steps]}
  log.close()


def test_tensorboard_that_cannot_be_written(tmp_path, part, event_pb2):
  (tmp_path / "tensorboard").write_text("a file")
  log = loggers.make(_asked(tensorboard=True), tmp_path)
  with pytest.raises(UserError, match=r"tensorboard.* cannot be written to: .*\.$"):
    log.begin(part, _first_arm(part), [])
  log.close()


class _Run:
  """What stands in for one of wandb's runs and notes what is asked of it."""

  def __init__(self, offline=False, starting_step=0, **arguments):
    self.offline, self.starting_step = offline, starting_step
    self.arguments = arguments
    self.logged = []
    self.finished = 0
    self.sent = None  # How much a kill leaves: None for all.

  def log(self, values, *, step, commit):
    assert commit and not self.finished
    self.logged.append((step, values))

  def finish(self):
    self.finished += 1


@pytest.fixture
def wandb_runs(monkeypatch):
  runs = []

  def init(**arguments):
    # Offline wandb knows of no steps; else it goes on after the last that it was sent.
    before = [run for run in runs if run.arguments["id"] == arguments["id"]]
    sent = [step for run in before for step, _ in run.logged[: run.sent]]
    after = max(sent, default=-1) + 1
    runs.append(_Run(wandb.offline, 0 if wandb.offline else after, **arguments))
    (arguments["dir"] / "wandb" / f"run-{len(runs)}-{arguments['id']}").mkdir()
    return runs[-1]

  class Error(Exception):
    pass

  wandb = types.SimpleNamespace(init=init, Settings=dict, Error=Error, offline=False)
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  return runs


def test_wandb_has_a_run_for_each_seed_of_each_arm(tmp_path, part, wandb_runs):
  path = tmp_path / "main-3"
  log = loggers.make(_asked(wandb="noise"), path)
  assert not path.exists()
  for arm in part.arms[:2]:
    log.begin(part, arm, [])
    log.log(_row(part, arm, 1, 20, loss=0.5, distance=math.nan))
    log.flush()
  assert [run.finished for run in wandb_runs] == [1, 1, 0, 0]
  log.close()
  log.close()
  assert [run.finished for run in wandb_runs] == [1, 1, 1, 1]
  assert [run.logged for run in wandb_runs] == [[], [(20, {"loss": 0.5})]] * 2
  assert len({run.arguments["id"] for run in wandb_runs}) == 4
  assert not any(set(run.arguments["id"]) & set(":;,#?/'") for run in wandb_runs)
  last = wandb_runs[-1].arguments
  assert last["project"] == "noise" and last["resume"] == "allow"
  assert last["dir"] == path and last["reinit"] == "create_new"
  assert last["group"] == "main-3/experiment"
  assert last["job_type"] == "sequential_tau0.9"
  assert last["name"] == "experiment/sequential_tau0.9/seed-1"
  config = last["config"]
  assert config["seed"] == 1 and config["arm"]["tau"] == 0.9
  assert config["part"]["dataset"] == "digits" and "arms" not in config["part"]


def test_wandb_gets_no_step_twice(tmp_path, part, wandb_runs):
  """And the runs of a moved directory are the same, of another directory others."""
  arm = _first_arm(part)

  def logged(path, rows, *steps):
    log = loggers.make(_asked(wandb="noise"), path)
    log.begin(part, arm, rows)
    for row in _rows(part, arm, *steps):
      log.log(row)
    return log

  path = tmp_path / "run"
  log = logged(path, [], 20, 40)
  log.flush()
  # Killed, or closed after an exception, with a step that no checkpoint knows of.
  log.log(_row(part, arm, 0, 60, loss=1.0))
  log.close()
  path = path.rename(tmp_path / "moved")
  logged(path, _rows(part, arm, 20, 40), 60, 80).flush()
  logged(tmp_path / "other", [], 20)
  first, _, second, _, other, _ = wandb_runs
  assert [step for step, _ in first.logged + second.logged] == [20, 40, 60, 80]
  assert first.arguments["id"] == second.arguments["id"] != other.arguments["id"]


@pytest.mark.parametrize("offline", [False, True])
def test_wandb_is_sent_what_a_kill_has_lost(tmp_path, part, wandb_runs, offline):
  other, arm = part.arms[:2]
  sys.modules["wandb"].offline = offline
  kept = _rows(part, other, 20, 40, 60) + _rows(part, arm, 20, 40, 60)

  def steps_of_both():
    return [[step for step, _ in run.logged] for run in wandb_runs[-2:]]

  # At first nothing of this arm was asked for.
  log = loggers.make(_asked(wandb="noise"), tmp_path)
  log.begin(part, arm, kept)
  assert steps_of_both() == [[20, 40, 60]] * 2
  wandb_runs[0].sent, wandb_runs[1].sent = 1, 0
  log = loggers.make(_asked(wandb="noise"), tmp_path)
  log.begin(part, arm, kept)
  # Online wandb says what it has got; offline it does not, and a gap does less harm.
  expected = [[], []] if offline else [[40, 60], [20, 40, 60]]
  assert steps_of_both() == expected


def test_wandb_that_does_not_start(tmp_path, part, wandb_runs, monkeypatch):
  def init(**arguments):
    raise sys.modules["wandb"].Error("No API key configured.\nRetrying")

  log = loggers.make(_asked(wandb="noise"), tmp_path)
  monkeypatch.setattr(sys.modules["wandb"], "init", init)
  with pytest.raises(UserError, match=r"^wandb cannot start: No API key configured\.$"):
    log.begin(part, _first_arm(part), [])


@pytest.mark.parametrize(
  "asked, message",
  [
    ({"tensorboard": True}, r'--tensorboard .* "gaf_optax\[tensorboard\]"\.$'),
    ({"wandb": "noise"}, r"--wandb .* pip install wandb\.$"),
  ],
)
def test_missing_package(tmp_path, monkeypatch, asked, message):
  for name in list(sys.modules):
    if name.partition(".")[0] in _PACKAGES:
      monkeypatch.delitem(sys.modules, name)
  for name in _PACKAGES:
    monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(UserError, match=message):
    loggers.make(_asked(**asked), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_nothing_without_asking(tmp_path, part, monkeypatch):
  # An import would raise.
  for name in _PACKAGES:
    monkeypatch.setitem(sys.modules, name, None)
  log = loggers.make(_asked(), tmp_path / "run")
  log.begin(part, _first_arm(part), [])
  log.log(_row(part, _first_arm(part), 0, 20, loss=1.0))
  log.flush()
  log.close()
  assert not (tmp_path / "run").exists()
