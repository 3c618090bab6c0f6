"""Communication and memory in programs compiled for absent TPUs and GPUs."""

import functools
import json
import os
import re
import subprocess

import jax
import pytest

import accelerators

SMALL = "small"
# Several megabytes, and leaves with more axes and different layouts.
LARGE = "1000x1000,700,3x3x128x256,512x100"
# Stacks of whole tiles on TPU. In other shapes, k is one of the axes of a tile, and XLA
# copies the argument once into another layout.
SHAPED = "3x3x256x512,512x1024,3x3x64x64,700,64,512x128"

ACROSS = {
  SMALL: ["gaf", "leaf", "memory", "anchor", "unchecked", "bfloat16", "mixed"],
  LARGE: ["gaf", "anchor", "on_shards"],
}
ALONE = {
  SHAPED: [f"k{k}{dtype}" for dtype in ("", "_bfloat16") for k in (2, 8, 32)],
  LARGE: ["multi_steps", "value_and_grad"],
}


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
  """Costs of all forms by target and tree, compiled once per session.

  The workers of pytest-xdist share them through a file.
  """
  folder = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    folder = folder.parent

  @functools.cache
  def rows(target, tree, forms):
    if jax.__version_info__ < (0, 12):
      pytest.skip(
        f"the bounds are for the compilers of jax 0.12, not {jax.__version__}"
      )
    if reason := accelerators.missing(target):
      pytest.skip(reason)
    import fcntl

    path = folder / (re.sub(r"\W", "-", f"{target}-{tree}") + ".json")
    with open(path.with_suffix(".lock"), "w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      if not path.exists():
        path.write_text(json.dumps(accelerators.measured(target, tree, forms)))
    return {row["form"]: row for row in json.loads(path.read_text())}

  def row(target, tree, form, forms):
    with pytest.MonkeyPatch.context() as patch:
      # Not the flags of tests/conftest.py. The skipped passes do not affect buffers.
      flags = "--xla_llvm_disable_expensive_passes=true"
      patch.setenv("XLA_FLAGS", flags if target.startswith("h100") else "")
      found = rows(target, tree, forms)[form]
    assert "error" not in found, found["error"]
    return found

  return row


# Session-scoped parameters, so that pytest groups the tests by target.
@pytest.fixture(scope="session", params=["v5e:2x4", "h100:8"])
def across(request, compiled):
  return lambda tree, form: compiled(request.param, tree, form, tuple(ACROSS[tree]))


@pytest.fixture(scope="session", params=["v5e:1x1", "h100:1"])
def alone(request, compiled):
  return lambda tree, form: compiled(request.param, tree, form, tuple(ALONE[tree]))


@pytest.mark.parametrize(
  "tree, form", [(tree, form) for tree in ACROSS for form in ACROSS[tree]]
)
def test_sends_what_the_mean_sends(across, tree, form):
  """Up to the Gram matrix and padding; 1.5 times as much with an anchor."""
  row = across(tree, form)
  half = row["size"] * 7 / 8  # Half an all-reduce: enough for a sharded result.
  if form == "on_shards":  # XLA all-reduces the mean of some leaves.
    assert row["own"]["sent"] <= 1.01 * half <= row["mean"]["sent"] * 1.02
    return
  assert row["mean"]["sent"] == pytest.approx(2 * half)
  most = (1.51 if form == "anchor" else 1.01) * row["mean"]["sent"]
  if form == "leaf":  # Slices of five leaves, each padded to 128 values.
    most += 2 * 7 / 8 * 5 * 127 * 8 * 4
  assert row["own"]["sent"] <= most


@pytest.mark.parametrize("form", [form for form in ACROSS[SMALL] if form != "anchor"])
def test_collectives_of_an_ordinary_step(across, form):
  """Exchange, Gram matrix, and exchange back; one exchange per dtype."""
  own = across(SMALL, form)["own"]
  assert sum(own["collectives"].values()) <= (5 if form == "mixed" else 3)
  assert own["rare"] <= 2


@pytest.mark.parametrize("form", ALONE[SHAPED])
def test_a_stack_is_not_copied(alone, form):
  row = alone(SHAPED, form)
  assert row["own"]["copies"] <= 0.1 * row["size"]


@pytest.mark.parametrize("form", ALONE[SHAPED])
def test_memory_beside_a_stack(alone, form):
  row = alone(SHAPED, form)
  # Sums of many rows stay in float32 until they are rounded: 2 P of bfloat16.
  most = 2.2 if form == "k32_bfloat16" else 1.1
  assert row["own"]["temporary"] <= most * row["size"]


def test_size_of_the_code(compiled):
  row = compiled("v5e:1x1", SHAPED, "k2", tuple(ALONE[SHAPED]))
  assert row["own"]["code"] <= 5 * row["mean"]["code"]


@pytest.mark.parametrize("form", ["multi_steps", "value_and_grad"])
def test_streamed_forms_keep_one_mean_more_than_optax(alone, form):
  row = alone(LARGE, form)
  assert row["own"]["temporary"] <= row["mean"]["temporary"] + row["size"]


def _fake_processes(monkeypatch, *outcomes):
  """Processes that print lines and exit with a code; returns the commands."""
  commands, left = [], list(outcomes)

  def run(command, **kwargs):
    commands.append(command)
    lines, code = left.pop(0)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    return subprocess.CompletedProcess(command, code, text, "no memory left\n")

  monkeypatch.setattr(accelerators, "missing", lambda target: None)
  monkeypatch.setattr(accelerators.subprocess, "run", run)
  return commands


def test_forms_after_one_that_ends_the_process_are_compiled(monkeypatch):
  first, last = {"form": "gaf"}, {"form": "anchor"}
  commands = _fake_processes(monkeypatch, ([first], -9), ([last], 0))
  rows = accelerators.measured(
    "v5e:2x4", "small", ["gaf", "leaf", "anchor", "k2"], 3, 4
  )
  died = {"form": "leaf", "error": "the process ended: SIGKILL, of 3 GiB and 4 s"}
  assert rows == [first, died, last]
  assert [c[c.index("--forms") + 1 :] for c in commands] == [
    ["gaf", "leaf", "anchor"],
    ["anchor"],
  ]


def test_targets_that_cannot_be_opened_are_named(monkeypatch, tmp_path, capsys):
  _fake_processes(monkeypatch, ([{"unavailable": "no such topology"}], 0))
  path = tmp_path / "new" / "accelerators.md"
  accelerators.main(["v9:1x1", "--out", str(path)])
  assert "## v9:1x1\n\nLeft out: no such topology." in path.read_text()
  assert path.read_text().splitlines()[0] in capsys.readouterr().out


def test_a_table(monkeypatch, tmp_path):
  cost = dict.fromkeys(("sent", "temporary", "peak", "copies"), 10) | {
    "collectives": {"all-reduce": 2, "all-to-all": 1},
    **dict.fromkeys(("rare", "asynchronous", "lower", "compile"), 1),
    **dict.fromkeys(("accessed", "code"), None),
  }
  row = {"form": "gaf", "devices": 8, "size": 10, "own": cost, "mean": cost}
  other = {"form": "leaf", "error": "out of memory"}
  _fake_processes(monkeypatch, ([row, other], 0))
  path = tmp_path / "accelerators.md"
  accelerators.main(["v5e:2x4", "--forms", "gaf", "leaf", "--out", str(path)])
  lines = [x for x in path.read_text().splitlines() if x.startswith("|")]
  assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
  assert "| 1.0000 | 2 all-reduce, 1 all-to-all / 2 all-reduce, 1 all" in lines[2]
  assert "out of memory" in lines[3]


def test_without_the_extra(monkeypatch):
  monkeypatch.setattr(accelerators.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(accelerators.Unavailable, match="libtpu is not installed"):
    accelerators.measured("v5e:2x4")
  assert accelerators.missing("h100:1") == "jax-cuda12-plugin is not installed"
