"""Report: conclusions come from the numbers that they are about."""

import dataclasses
import types

import numpy as np
import pytest
from scipy import stats

import figures
import options
import plan
import report
from common import plots
from common.tables import Difference


def _summary(final, accepted=0.5, from_wrong=None):
  final = np.asarray(final, float)
  same = np.full(len(final), accepted)
  if from_wrong is not None:
    from_wrong = np.full(len(final), from_wrong)
  return report.Summary(
    best=final + 0.01,
    final=final,
    accepted=same,
    updates=same,
    late_distance=final + 0.5,
    from_wrong=from_wrong,
  )


def _conclusion(plain, gaf, *controls):
  against = lambda other: Difference.of(np.array(gaf), np.array(other))
  versus = {"GAF x": (against(plain), [against(control) for control in controls])}
  return report.conclusion("final", len(plain), versus)


_LOW, _MIDDLE, _HIGH = [0.50, 0.52, 0.51], [0.60, 0.62, 0.63], [0.71, 0.72, 0.70]


@pytest.mark.parametrize(
  "plain, gaf, control, said",
  [
    (_LOW, _HIGH, _MIDDLE, "above the plain mean and above chance too"),
    (
      _LOW,
      _HIGH,
      _HIGH,
      "above the plain mean, but no different from chance",
    ),
    (_LOW, _MIDDLE, _HIGH, "above the plain mean, but below chance"),
    (
      _MIDDLE,
      _MIDDLE,
      _LOW,
      "no different from the plain mean, though above",
    ),
    (_LOW, _LOW, _LOW, "different neither"),
    (_LOW, _LOW, _HIGH, "no different from the plain mean, and below"),
    (_HIGH, _MIDDLE, _LOW, "below the plain mean, though above"),
    (_HIGH, _LOW, _LOW, "below the plain mean, and no different"),
    (_HIGH, _LOW, _MIDDLE, "below the plain mean and below chance"),
  ],
)
def test_conclusion_in_every_direction(plain, gaf, control, said):
  for controls in ([control], [control, control]):
    text = _conclusion(plain, gaf, *controls)
    assert text.startswith(
      "Final accuracy: counting only differences whose 95 % confidence interval over"
      " the 3 seeds excludes zero"
    )
    assert f"GAF x is {said}" in text
    assert text.count("GAF x") == 1


@pytest.mark.parametrize(
  "controls, sign",
  [
    ([_LOW, _LOW], 1),
    ([_LOW, _MIDDLE], 0),
    ([_MIDDLE, _LOW], 0),
    ([_MIDDLE, _MIDDLE], 0),
    ([_LOW, _HIGH], -1),
    ([_HIGH, _MIDDLE], -1),
    ([_HIGH, _HIGH], -1),
    ([_LOW], 1),
  ],
)
def test_chance_is_all_controls(controls, sign):
  """Above only where above each, below where below one."""
  against = [Difference.of(np.array(_MIDDLE), np.array(other)) for other in controls]
  assert report.against_all(against) == sign


@pytest.mark.parametrize("seeds, said", [(1, "one seed gives"), (2, "2 seeds give")])
def test_too_few_seeds_for_a_spread(seeds, said):
  text = _conclusion(_LOW[:seeds], _HIGH[:seeds], _MIDDLE[:seeds])
  assert said in text and "no conclusion" in text and "above" not in text


def _interval(ours, theirs):
  return stats.ttest_rel(ours, theirs).confidence_interval(0.95)


def test_difference_is_paired():
  # Far apart from seed to seed, yet every time better by nearly the same.
  theirs = np.array([0.1, 0.5, 0.9])
  difference = Difference.of(theirs + [0.02, 0.03, 0.04], theirs)
  assert difference.mean == pytest.approx(0.03)
  # 4.303 / sqrt(3) standard deviations of 0.01.
  assert difference.margin == pytest.approx(0.02484, abs=1e-5)
  assert difference.sign == 1 and str(difference) == "+0.030 ± 0.025"
  assert Difference.of(theirs, theirs + [0.02, -0.03, 0.04]).sign == 0
  assert Difference.of(theirs, theirs + [0.02, 0.03, 0.04]).sign == -1
  assert Difference.of(theirs, theirs).sign == 0


@pytest.mark.parametrize("seeds", [3, 4, 5, 10])
def test_interval_of_a_difference(seeds):
  rng = np.random.default_rng(seeds)
  signs = []
  for _ in range(50):
    ours, theirs = rng.normal(1, 1, seeds), rng.normal(0, 1, seeds)
    difference = Difference.of(ours, theirs)
    low, high = _interval(ours, theirs)
    assert difference.mean - difference.margin == pytest.approx(low)
    assert difference.mean + difference.margin == pytest.approx(high)
    assert difference.sign == int(low > 0) - int(high < 0)
    signs.append(difference.sign)
  assert {0, 1} <= set(signs)


@pytest.mark.parametrize("seeds", [1, 2])
def test_no_interval_of_too_few(seeds):
  difference = Difference.of(np.full(seeds, 0.9), np.full(seeds, 0.5))
  assert difference.margin is None and difference.sign == 0
  assert str(difference) == "+0.400"


def test_tables_and_wrong_sources():
  argv = "--num-microbatches 4 --wrong-sources 1 --tau 0.9 --seeds 3"
  (part,) = options.parts(options.parse(argv.split()))
  summaries = {
    "plain": _summary(_MIDDLE, 1.0, 0.25),
    "sequential_tau0.9": _summary(_HIGH, 0.5, 0.125),
    "sequential_tau0.9_random_choice": _summary(_LOW, 0.5, 0.25),
    "sequential_tau0.9_random_steps": _summary(_MIDDLE, 0.5, 0.25),
    "clean": _summary(np.array(_HIGH) + [0.1, 0.11, 0.09], 1.0),
  }
  table = report.results_table(part, summaries).splitlines()
  assert len(table) == 2 + 5 and len({len(line) for line in table}) == 1
  assert "0.710 ± 0.010" in table[3] and "0.12" in table[3]
  text = report.comparison(part, summaries)
  cells = [cell.strip() for cell in text.splitlines()[2].strip("|").split("|")]
  # By hand: standard deviations 0.0208 and 0.01 times 2.484.
  plain, choice = "+0.093 ± 0.052", "+0.200 ± 0.025"
  assert cells == ["GAF sequential tau 0.9", *[plain, choice, plain] * 2]
  assert "they gave 25% of all micro-gradients; 12% of what GAF" in text
  assert "-0.100 ± 0.025 against the plain mean with nothing wrong (below it)" in text
  # Final and best, against the plain mean and two controls.
  assert "so expect 0.3 of the 6 above" in text


@pytest.mark.parametrize("taus, number", [(1, 4), (3, 12)])
def test_how_many_intervals_leave_out_zero_by_chance(taus, number):
  argv = ["--tau", *map(str, (0.7, 0.8, 0.9)[:taus]), "--seeds", "3"]
  (part,) = options.parts(options.parse(argv))
  summaries = {arm.name: _summary(_LOW) for arm in part.arms}
  text = report.comparison(part, summaries)
  assert f"so expect {number / 20:.1f} of the {number} above" in text
  two = dataclasses.replace(part, seeds=2)
  summaries = {arm.name: _summary(_LOW[:2]) for arm in part.arms}
  assert "so expect" not in report.comparison(two, summaries)


def _of_figure(name, seeds=4):
  """The parts of a figure on digits with made-up accuracies."""
  rng = np.random.default_rng(0)
  results = []
  parts = figures.FIGURES[name].parts(figures.SETTINGS["digits"])
  for part in plan.titled(parts):
    part = dataclasses.replace(part, seeds=seeds)
    wrong = lambda arm: rng.random() if part.wrong_sources and not arm.clean else None
    summaries = {
      arm.name: _summary(
        rng.normal(rng.choice([0.3, 0.5, 0.7]), 0.04, seeds), rng.random(), wrong(arm)
      )
      for arm in part.arms
    }
    results.append((part, summaries))
  return results


@pytest.mark.parametrize("measure", ["final", "best"])
@pytest.mark.parametrize("name", ["num-microbatches", "noise"])
def test_overview(name, measure):
  """With and without controls of both kinds, wrong sources and two microbatches."""
  results = _of_figure(name)
  header, _, *lines = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in report.overview(measure, results).splitlines()
  ]
  sourced = name == "num-microbatches"
  kinds = ["choice", "steps"] if sourced else ["steps"]
  wrong = ["of these wrong"] * sourced
  assert header == [
    *["", "accepted", *wrong, "plain mean", "GAF", "GAF - plain"],
    *(f"GAF - random {kind}" for kind in kinds),
    *["GAF - nothing wrong"] * sourced,
  ]
  lines, bold = iter(lines), []
  for part, summaries in results:
    plain = getattr(summaries["plain"], measure)
    said = f"**{part.title}**"
    spread = lambda x: f"{x.mean():.3f} ± {np.std(x, ddof=1):.3f}"
    if part.wrong_sources:
      said += f"; nothing wrong {spread(getattr(summaries['clean'], measure))}"
    title = dict(zip(header, next(lines)))
    assert title.pop("") == said and title.pop("plain mean") == spread(plain)
    assert set(title.values()) == {""}
    for arm in filter(lambda arm: arm.is_gaf, part.arms):
      line, summary = dict(zip(header, next(lines))), summaries[arm.name]
      ours = getattr(summary, measure)
      assert line[""] == arm.label and line["GAF"] == spread(ours)
      assert line["accepted"] == f"{summary.accepted.mean():.2f}"
      assert line["plain mean"] == ""
      if sourced:
        share = summary.from_wrong
        expected = "" if share is None else f"{share.mean():.2f}"
        assert line["of these wrong"] == expected
      for kind in ("plain", *kinds):
        against = "plain" if kind == "plain" else f"{arm.name}_random_{kind}"
        cell = line[f"GAF - {kind}" if kind == "plain" else f"GAF - random {kind}"]
        if against not in summaries:
          assert part.num_microbatches == 2 and cell == ""
          continue
        theirs = getattr(summaries[against], measure)
        low, high = _interval(ours, theirs)
        number = f"{np.mean(ours - theirs):+.3f} ± {(high - low) / 2:.3f}"
        leaves_out_zero = low > 0 or high < 0
        assert cell == (f"**{number}**" if leaves_out_zero else number)
        bold.append(leaves_out_zero)
      if sourced:
        clean = summaries.get("clean")
        assert bool(line["GAF - nothing wrong"]) is (clean is not None)
        if clean is not None:
          gap = Difference.of(ours, getattr(clean, measure))
          assert line["GAF - nothing wrong"] == gap.marked
  assert next(lines, None) is None
  assert 0.1 < np.mean(bold) < 0.9


def test_overview_is_written_with_a_line_for_each_seed(tmp_path):
  results = [
    (types.SimpleNamespace(part=part), summaries)
    for part, summaries in _of_figure("num-microbatches")
  ]
  text = report.write_overview(tmp_path, "A title", results)
  assert (tmp_path / "results.md").read_text() == text
  assert text.startswith("## A title\n\n- digits, mlp, ")
  for one, _ in results:
    size = f"- {one.part.title}: {one.part.num_microbatches} microbatches of 10, "
    assert text.count(size) == 1
  for measure in ("Final", "Best"):
    assert text.count(f"{measure} test accuracy:\n\n|") == 1
  header, *lines = (tmp_path / "results.csv").read_text().splitlines()
  assert header == (
    "part,arm,seed,best_accuracy,final_accuracy,accepted,updates,late_distance"
  )
  expected = [
    [one.part.name, arm.name, str(seed), *map(str, numbers)]
    for one, summaries in results
    for arm in one.part.arms
    for s in [summaries[arm.name]]
    for seed, numbers in enumerate(
      zip(s.best, s.final, s.accepted, s.updates, s.late_distance)
    )
  ]
  assert [line.split(",") for line in lines] == expected


def test_overview_of_plain_means_alone(tmp_path):
  results = [
    (types.SimpleNamespace(part=part), summaries)
    for part, summaries in _of_figure("microbatch-distance")
  ]
  text = report.write_overview(tmp_path, "A title", results)
  assert "GAF" not in text
  lines = [line for line in text.splitlines() if line.startswith("|")]
  assert len(lines) == 2 + len(results)
  for line, (one, summaries) in zip(lines[2:], results):
    plain = summaries["plain"]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    values = plain.best, plain.final, plain.late_distance
    expected = [f"{x.mean():.3f} ± {np.std(x, ddof=1):.3f}" for x in values]
    assert cells == [one.part.title, *expected]


def test_late_distance():
  """The mean of what is finite in the last tenth, by seed."""
  (part,) = options.parts(
    options.parse(["--tau", "0.9", "--steps", "40", "--seeds", "3"])
  )
  distance = np.random.default_rng(0).random((3, 40)).astype(np.float32)
  distance[1, -2:] = np.nan
  distance[2, -4:] = np.nan
  accepted, wrong = np.ones((3, 40, 2), bool), np.zeros((40, 2, 10), bool)
  trace = types.SimpleNamespace(distance=distance, accepted=accepted)
  one = types.SimpleNamespace(
    part=part,
    schedules=[types.SimpleNamespace(wrong_examples=lambda: wrong)] * 3,
    traces={arm.name: trace for arm in part.arms},
  )
  rows = [
    {"part": part.name, "arm": arm.name, "seed": seed, "test_accuracy": 0.5}
    for arm in part.arms
    for seed in range(3)
  ]
  found = report.summarize(one, rows)["plain"].late_distance
  expected = [distance[0, 36:].mean(), distance[1, 36:38].mean(), np.nan]
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_nothing_accepted_at_all():
  argv = "--num-microbatches 4 --wrong-sources 1 --tau 0 --seeds 3"
  (part,) = options.parts(options.parse(argv.split()))
  summaries = {
    arm.name: _summary(_LOW, 0.0, None if arm.clean else np.nan) for arm in part.arms
  }
  text = report.comparison(part, summaries)
  assert "different neither" in text
  assert "Wrong sources: they gave 25% of all micro-gradients.\n" in text


def test_rolling_mean():
  rng = np.random.default_rng(0)
  values = rng.normal(size=(3, 50))
  values[rng.random((3, 50)) < 0.3] = np.nan
  values[:, 20:30] = np.nan
  found = plots.rolling(values, 7)
  for step in range(50):
    window = values[:, max(0, step - 6) : step + 1]
    finite = window[np.isfinite(window)]
    if len(finite):
      assert found[step] == pytest.approx(finite.mean())
    else:
      assert np.isnan(found[step])
  assert np.isnan(found[26:30]).all()
