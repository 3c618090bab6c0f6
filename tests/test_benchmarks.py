"""Benchmarks: timing, comparison, and every section."""

import re

import jax
import jax.numpy as jnp
import pytest

import measure
import run

# Models that take long to compile.
LONG = {"by_example": pytest.mark.long}


@pytest.fixture
def clock(monkeypatch):
  """A clock that the test sets."""
  now = [0.0]
  monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
  return now


def test_programs_take_turns_and_the_first_round_does_not_count(clock):
  order = []

  def take(name, seconds):
    def run():
      order.append(name)
      # The first round compiles and warms up, so it is slower.
      clock[0] += seconds + (100 if len(order) <= 3 else 0)

    return run

  programs = {name: take(name, i + 1.0) for i, name in enumerate("abc")}
  seconds = measure.interleaved(programs, 3)
  assert seconds == {"a": [1] * 3, "b": [2] * 3, "c": [3] * 3}
  assert "".join(order) == "abc" + "bca" + "cab" + "abc"


def test_a_ratio_is_that_of_neighbours_and_not_of_medians():
  # The machine slows down by 10 in the middle; the ratio is 2 in each pair.
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
