"""Benchmarks: how times are taken and compared, and every section."""

import csv
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import measure
import run
import tabular

# Models that take long to compile.
LONG = {"by_example": pytest.mark.long}


@pytest.fixture
def clock(monkeypatch):
  """A clock that only moves when it is told to."""
  now = [0.0]
  monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
  return now


def test_programs_take_turns_and_the_first_round_does_not_count(clock):
  order = []

  def take(name, seconds):
    def run():
      order.append(name)
      # The first round, which compiles and warms up, is slower.
      clock[0] += seconds + (100 if len(order) <= 3 else 0)

    return run

  programs = {name: take(name, i + 1.0) for i, name in enumerate("abc")}
  seconds = measure.interleaved(programs, 3)
  assert seconds == {"a": [1] * 3, "b": [2] * 3, "c": [3] * 3}
  assert "".join(order) == "abc" + "bca" + "cab" + "abc"


def test_a_ratio_is_that_of_neighbours_and_not_of_medians():
  # The machine becomes 10 times slower in the middle; each pair says 2.
  seconds = {"base": [1, 1, 10, 10, 10], "other": [2, 2, 20, 20, 20]}
  milliseconds, ratios = measure.ratios(seconds, "base")
  assert milliseconds == 10_000
  assert ratios == {"other": (2, 2, 2)}
  spread = measure.ratios({"a": [1] * 5, "b": [1, 2, 3, 4, 5]}, "a")[1]["b"]
  assert spread == (3, 2, 4)
  assert str(spread) == "3.00 (2.00 to 4.00)"


def test_a_program_is_compiled_before_it_is_timed():
  traced = []

  def double(x):
    traced.append(None)
    return 2 * x

  program = measure.program(double, jnp.ones(3))
  assert len(traced) == 1
  assert program.run().tolist() == [2, 2, 2] and len(traced) == 1
  measure.compile_seconds(double, jax.ShapeDtypeStruct((3,), jnp.float32))
  assert len(traced) == 2


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
  "section",
  [pytest.param(name, marks=LONG.get(name, ())) for name in run.SECTIONS],
)
def test_each_section_makes_a_table(section, tmp_path, capsys):
  path = tmp_path / "new" / "benchmarks.md"
  run.main(["--quick", "--only", section, "--out", str(path)])
  text = path.read_text()
  assert text.splitlines()[0] in capsys.readouterr().out
  assert jax.__version__ in text
  if section == "peers" and "Left out" in text:
    pytest.skip("the packages of the extra `peers` are not installed here")
  header, _, *lines = [line for line in text.splitlines() if line.startswith("|")]
  assert lines and {line.count("|") for line in lines} == {header.count("|")}
  numbers = [float(x) for line in lines for x in re.findall(r"\d+\.\d+", line)]
  assert numbers and max(numbers) > 0


@pytest.mark.long
@pytest.mark.usefixtures("standard_promotion")
def test_tables_of_data_with_wrong_targets(tmp_path, monkeypatch):
  """A memory is better than chance, and the scores of all seeds are written."""
  monkeypatch.setattr(tabular, "SEEDS", 3)
  monkeypatch.setattr(tabular, "STEPS", 100)
  monkeypatch.setattr(tabular, "AUC_AT", (0, 1, 5))
  kept = ("plain mean", "as many at random", "smallest losses", "`tau_quantile(0.6)`")
  by_example = {name: tabular.BY_EXAMPLE[name] for name in kept}
  kept = ("plain mean", "five at random", "`memory_decay=0.98`", "right sources only")
  by_source = {name: tabular.BY_SOURCE[name] for name in kept}
  monkeypatch.setattr(tabular, "BY_EXAMPLE", by_example)
  monkeypatch.setattr(tabular, "BY_SOURCE", by_source)
  path = tmp_path / "new" / "tabular.md"
  with jax.numpy_rank_promotion("allow"):
    tabular.main(["--tasks", "wine", "--out", str(path)])
  text = path.read_text()
  assert "Wine, 40% of the targets wrong" in text and "Wine, targets of 3 of 8" in text
  with open(path.with_suffix(".csv")) as file:
    lines = list(csv.DictReader(file))
  assert len(lines) == (4 + 4) * 3
  finals = lambda arm: [float(one["final"]) for one in lines if one["arm"] == arm]
  ours, chance = finals("`memory_decay=0.98`"), finals("five at random")
  assert np.mean(ours) > np.mean(chance) + 0.05
  assert {one["role"] for one in lines} == {"gaf", "chance", "rival", "ideal"}
  told = [one["imitates"] for one in lines if one["role"] == "chance"]
  assert set(told) == {"`tau_quantile(0.6)`", "`memory_decay=0.98`"}
