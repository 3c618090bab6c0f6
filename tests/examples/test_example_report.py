"""Report: conclusions come from the numbers that they are about."""

import csv
import dataclasses
import types

import numpy as np
import pytest
from scipy import stats

import figures
import options
import plan
import report
from common import arms, plots
from common.tables import Difference

pytestmark = pytest.mark.experiments


def _summary(final, accepted=0.5, from_wrong=None):
  final = np.asarray(final, float)
  same = np.full(len(final), accepted)
  if from_wrong is not None:
    from_wrong = np.full(len(final), from_wrong)
  return report.Summary(
    best=final + 0.01,
    final=final,
    picked=final + np.linspace(0, 0.02, len(final)),
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


def _cells(line):
  return [cell.strip() for cell in line.strip().strip("|").split("|")]


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
  assert _cells(table[0]) == [
    *["", "best test accuracy", "final test accuracy", "picked", "accepted"],
    "of these wrong",
  ]
  assert _cells(table[3]) == [
    *["GAF sequential tau 0.9", "0.720 ± 0.010", "0.710 ± 0.010", "0.720 ± 0.010"],
    *["0.50", "0.12"],
  ]
  text = report.comparison(part, summaries)
  header, _, *lines = map(_cells, text.splitlines()[:5])
  assert header == [
    *["paired by seed", "accuracy", "- plain mean", "- random choice"],
    *["- random steps", "- best rival"],
  ]
  # By hand: standard deviations 0.0208 and 0.01 times 2.484. All three scores differ
  # by as much, seed by seed.
  plain, choice = "+0.093 ± 0.052", "+0.200 ± 0.025"
  for line, measure in zip(lines, ("final", "best", "picked")):
    rival = f"{plain} (plain mean)"
    assert line == ["GAF sequential tau 0.9", measure, plain, choice, plain, rival]
  assert "they gave 25% of all micro-gradients; 12% of what GAF" in text
  assert "-0.100 ± 0.025 against the plain mean with nothing wrong (below it)" in text
  # Three scores, against the plain mean and two controls.
  assert "so expect 0.5 of the 9 above" in text


@pytest.mark.parametrize("taus, number", [(1, 6), (3, 18)])
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


def _marked(ours, theirs):
  """A difference with its interval, bold where that leaves out zero."""
  low, high = _interval(ours, theirs)
  number = f"{np.mean(ours - theirs):+.3f} ± {(high - low) / 2:.3f}"
  return f"**{number}**" if low > 0 or high < 0 else number


@pytest.mark.parametrize("measure", ["final", "best", "picked"])
@pytest.mark.parametrize("name", ["memory", "noise"])
def test_overview(name, measure):
  """With and without wrong sources, persistent ones, and more than two microbatches."""
  results = _of_figure(name)
  header, _, *lines = map(_cells, report.overview(measure, results).splitlines())
  known = name == "memory"
  kinds = {"choice": "random choice", "loss": "smallest loss"}
  kinds = kinds if known else {"steps": "random steps"}
  assert header == [
    *["", "accepted", *["of these wrong"] * known, "accuracy", "- plain"],
    *(f"- {said}" for said in kinds.values()),
    "- best rival",
  ]
  lines, bold = iter(lines), []
  for part, summaries in results:
    title = next(lines)
    assert title[0] == f"**{part.title}**" and set(title[1:]) == {""}
    score = lambda one: getattr(summaries[one.name], measure)
    # Everything that nobody calls GAF, chance or knowing what is wrong.
    rivals = [
      arm
      for arm in part.arms
      if arm.control in (None, "loss") and not arm.is_gaf and not arm.clean
    ]
    assert len(rivals) > 4
    best = max(rivals, key=lambda one: score(one).mean())
    for arm in part.arms:
      if arm.control in ("choice", "steps"):
        continue  # Seen in the differences alone.
      line, summary = dict(zip(header, next(lines))), summaries[arm.name]
      ours = score(arm)
      assert line[""] == arm.label
      assert line["accuracy"] == f"{ours.mean():.3f} ± {np.std(ours, ddof=1):.3f}"
      assert line["accepted"] == f"{summary.accepted.mean():.2f}"
      if known:
        share = summary.from_wrong
        expected = "" if share is None else f"{share.mean():.2f}"
        assert line["of these wrong"] == expected
      plain = "" if arm == plan.PLAIN else _marked(ours, score(plan.PLAIN))
      assert line["- plain"] == plain
      bold += ["**" in plain] * bool(plain)
      for kind, said in kinds.items():
        control = part.controls(arm.name).get(kind)
        expected = "" if control is None else _marked(ours, score(control))
        assert line[f"- {said}"] == expected
      expected = ""
      if arm.is_gaf:
        expected = f"{_marked(ours, score(best))} ({best.label})"
      assert line["- best rival"] == expected
  assert next(lines, None) is None
  assert 0.1 < np.mean(bold) < 0.9


def test_best_rival():
  """The highest mean of the score that is asked for; never chance, GAF or ideal."""
  gaf, choice, loss = arms.gaf_arms(8, ["choice", "loss"], tau=0.9)
  everyone = (arms.PLAIN, *arms.RIVALS, gaf, choice, loss, arms.CLEAN, arms.RIGHT)
  part = plan.Part(name="x", title="", arms=everyone, seeds=3)
  summaries = {arm.name: _summary(_LOW) for arm in everyone}
  for arm in (gaf, choice, arms.CLEAN, arms.RIGHT):
    summaries[arm.name] = _summary(_HIGH)
  summaries["mixup"] = _summary(_MIDDLE)
  # Best of all at its best, yet not at its end.
  ends_badly = dataclasses.replace(_summary(_LOW), best=np.array([0.9, 0.8, 0.9]))
  summaries[loss.name] = ends_badly
  found = lambda measure: report.against_best_rival(part, gaf, summaries, measure)
  for measure, best, theirs in (
    ("final", "mixup", _MIDDLE),
    ("picked", "mixup", np.array(_MIDDLE) + [0, 0.01, 0.02]),
    ("best", loss.name, [0.9, 0.8, 0.9]),
  ):
    rival, gap = found(measure)
    ours = getattr(summaries[gaf.name], measure)
    assert rival.name == best
    assert gap.mean == pytest.approx(np.mean(ours - theirs))
    low, high = _interval(ours, theirs)
    assert gap.margin == pytest.approx((high - low) / 2)


def _results(name):
  return [
    (types.SimpleNamespace(part=part), summaries)
    for part, summaries in _of_figure(name)
  ]


def test_overview_is_written_with_a_line_for_each_seed(tmp_path):
  results = _results("memory")
  text = report.write_overview(tmp_path, "A title", results, [])
  assert (tmp_path / "results.md").read_text() == text
  # All have the same size.
  assert text.startswith("## A title\n\n8 microbatches of 10, ")
  for said in (
    "Final test accuracy",
    "Best test accuracy of all evaluations, which nobody can pick",
    "Test accuracy where that on the noisy validation images is highest",
  ):
    assert text.count(f"{said}:\n\n|") == 1
  assert "ROC" not in text  # Nothing was told apart.
  with open(tmp_path / "results.csv", newline="") as file:
    header, *lines = csv.reader(file)
  assert header == (
    "part,title,arm,label,role,imitates,seed,best,final,picked,accepted,updates,"
    "late_distance,from_wrong"
  ).split(",")
  expected = [
    [one.part.name, one.part.title, arm.name, arm.label, arm.role, arm.imitates or ""]
    + [str(seed), *map(str, numbers), "" if wrong is None else str(wrong[seed])]
    for one, summaries in results
    for arm in one.part.arms
    for s in [summaries[arm.name]]
    for wrong in [s.from_wrong]
    for seed, numbers in enumerate(
      zip(s.best, s.final, s.picked, s.accepted, s.updates, s.late_distance)
    )
  ]
  assert lines == expected


def test_overview_of_parts_of_other_sizes(tmp_path):
  results = _results("batch-size")
  text = report.write_overview(tmp_path, "A title", results, [])
  for one, _ in results:
    size = f"- {one.part.title}: 2 microbatches of {one.part.microbatch_size}, "
    assert text.count(size) == 1


def test_overview_of_plain_means_alone(tmp_path):
  results = _results("microbatch-distance")
  text = report.write_overview(tmp_path, "A title", results, [])
  assert "GAF" not in text
  lines = [line for line in text.splitlines() if line.startswith("|")]
  assert len(lines) == 2 + len(results)
  for line, (one, summaries) in zip(lines[2:], results):
    plain = summaries["plain"]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    values = plain.best, plain.final, plain.late_distance
    expected = [f"{x.mean():.3f} ± {np.std(x, ddof=1):.3f}" for x in values]
    assert cells == [one.part.title, *expected]


# By seed: test and noisy validation accuracies of four evaluations.
_EVALUATIONS = (
  ([0.5, 0.6, 0.9, 0.4], [0.1, 0.5, 0.4, 0.3]),
  ([0.1, 0.3, 0.6, 0.7], [0.1, 0.2, 0.3, 0.4]),
  ([0.8, 0.7, 0.6, 0.2], [0.5, 0.2, 0.5, 0.4]),
)


def test_late_distance_and_scores():
  """The mean of what is finite in the last tenth, by seed; and three accuracies."""
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
    {"part": part.name, "arm": arm.name, "seed": seed, "step": step}
    | {"test_accuracy": tested[i], "validation_accuracy": held_out[i]}
    for arm in part.arms
    for i, step in enumerate((10, 20, 30, 40))
    for seed, (tested, held_out) in enumerate(_EVALUATIONS)
  ]
  found = report.summarize(one, rows)["plain"]
  expected = [distance[0, 36:].mean(), distance[1, 36:38].mean(), np.nan]
  np.testing.assert_allclose(found.late_distance, expected, rtol=1e-6)
  np.testing.assert_array_equal(found.best, [0.9, 0.7, 0.8])
  np.testing.assert_array_equal(found.final, [0.4, 0.7, 0.2])
  # Where the noisy validation accuracy is highest, the first time.
  np.testing.assert_array_equal(found.picked, [0.6, 0.7, 0.8])
  assert found.from_wrong is None


def test_how_well_wrong_labels_can_be_told():
  """At the evaluations that are nearest to some shares of a run of the plain mean."""
  (part,) = options.parts(
    options.parse("--label-noise 0.4 --steps 100 --seeds 3".split())
  )
  other = dataclasses.replace(part, name="other", title="nothing wrong")
  areas = {
    "distance": [0.7, 0.8, 0.9],
    "loss": [0.6, 0.6, 0.6],
    "gradient norm": [0.5, 0.4, 0.3],
  }
  rows = [
    {"part": part.name, "arm": arm.name, "seed": seed, "step": step}
    | {
      f"auc/{name}": one[seed] + (0.001 * step if arm == plan.PLAIN else 1)
      for name, one in areas.items()
    }
    for arm in part.arms
    for step in (10, 20, 30, 50, 90, 100)
    for seed in range(3)
  ] + [
    {"part": "other", "arm": "plain", "seed": seed, "step": 10, "test_accuracy": 0.5}
    for seed in range(3)
  ]
  said, table = report.told_apart([part, other], rows)
  assert said.startswith("Area under ROC of mislabeled training images")
  header, _, *lines = map(_cells, table.splitlines())
  assert header == ["", "step", "distance", "loss", "gradient norm"]
  # Of 0, 5, 20, 50 and 100 %; the first two are nearest to the same.
  assert [line[:2] for line in lines] == [
    [part.title, step] for step in ("10", "20", "50", "100")
  ]
  # 4.303 / sqrt(3) standard deviations of 0.1, as for differences.
  assert lines[2][2:] == ["0.850 ± 0.248", "0.650 ± 0.000", "0.450 ± 0.248"]
  assert report.told_apart([other], rows) == []
  # The same in a file, a line for each seed and evaluation.
  found = report.signals([part, other], rows)
  assert len(found) == 18
  assert [found[4][name] for name in ("part", "title", "seed", "step")] == [
    *[part.name, part.title, 1, 20]
  ]
  for name, area in (("distance", 0.82), ("loss", 0.62), ("gradient norm", 0.42)):
    assert found[4][name] == pytest.approx(area)


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
