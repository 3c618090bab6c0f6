"""Report: conclusions come from the numbers that they are about."""

import numpy as np
import pytest

import options
import plots
import report
from report import Difference


def _summary(final, accepted=0.5, from_wrong=None):
  final = np.asarray(final, float)
  same = np.full(len(final), accepted)
  if from_wrong is not None:
    from_wrong = np.full(len(final), from_wrong)
  return report.Summary(final + 0.01, final, same, same, from_wrong)


def _conclusion(plain, gaf, control):
  versus = {
    "GAF x": (
      Difference.of(np.array(gaf), np.array(plain)),
      Difference.of(np.array(gaf), np.array(control)),
    )
  }
  return report.conclusion("final", len(plain), versus)


_LOW, _MIDDLE, _HIGH = [0.50, 0.52, 0.51], [0.60, 0.62, 0.63], [0.71, 0.72, 0.70]


@pytest.mark.parametrize(
  "plain, gaf, control, said",
  [
    (_LOW, _HIGH, _MIDDLE, "above the plain mean and above its random control"),
    (_LOW, _HIGH, _HIGH, "above the plain mean, but not told apart from its"),
    (_LOW, _MIDDLE, _HIGH, "above the plain mean, but below its random control"),
    (_MIDDLE, _MIDDLE, _LOW, "not told apart from the plain mean, though above"),
    (_LOW, _LOW, _LOW, "told apart neither"),
    (_LOW, _LOW, _HIGH, "not told apart from the plain mean, and below"),
    (_HIGH, _MIDDLE, _LOW, "below the plain mean, though above"),
    (_HIGH, _LOW, _LOW, "below the plain mean, and not told apart"),
    (_HIGH, _LOW, _MIDDLE, "below the plain mean and below its random control"),
  ],
)
def test_conclusion_in_every_direction(plain, gaf, control, said):
  text = _conclusion(plain, gaf, control)
  assert text.startswith("Final accuracy: counting only differences larger than")
  assert f"GAF x is {said}" in text
  assert text.count("GAF x") == 1


@pytest.mark.parametrize("seeds, said", [(1, "one seed gives"), (2, "2 seeds give")])
def test_too_few_seeds_for_a_spread(seeds, said):
  text = _conclusion(_LOW[:seeds], _HIGH[:seeds], _MIDDLE[:seeds])
  assert said in text and "no conclusion" in text and "above" not in text


def test_difference_is_paired():
  # Far apart from seed to seed, yet every time better by nearly the same.
  theirs = np.array([0.1, 0.5, 0.9])
  difference = Difference.of(theirs + [0.02, 0.03, 0.04], theirs)
  assert difference.mean == pytest.approx(0.03)
  assert difference.spread == pytest.approx(0.01)
  assert difference.sign == 1 and str(difference) == "+0.030 ± 0.010"
  assert Difference.of(theirs, theirs + [0.02, -0.03, 0.04]).sign == 0
  assert Difference.of(theirs, theirs + [0.02, 0.03, 0.04]).sign == -1


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_chance_of_exceeding_the_spread(seeds):
  values = np.random.default_rng(0).normal(size=(200_000, seeds))
  share = np.mean(np.abs(values.mean(axis=1)) > values.std(axis=1, ddof=1))
  assert report.chance_of_exceeding(seeds) == pytest.approx(share, abs=0.005)


def test_tables_and_wrong_sources():
  argv = "--num-microbatches 4 --wrong-sources 1 --tau 0.9 --seeds 3"
  (part,) = options.parts(options.parse(argv.split()))
  summaries = {
    "plain": _summary(_MIDDLE, 1.0, 0.25),
    "sequential_tau0.9": _summary(_HIGH, 0.5, 0.125),
    "sequential_tau0.9_control": _summary(_LOW, 0.5, 0.25),
    "clean": _summary(np.array(_HIGH) + [0.1, 0.11, 0.09], 1.0),
  }
  table = report.results_table(part, summaries).splitlines()
  assert len(table) == 2 + 4 and len({len(line) for line in table}) == 1
  assert "0.710 ± 0.010" in table[3] and "0.12" in table[3]
  text = report.comparison(part, summaries)
  assert "+0.093 ± 0.021" in text  # to the plain mean, by hand
  assert "+0.200 ± 0.010" in text  # to the control
  assert "they gave 25% of all micro-gradients; 12% of what GAF" in text
  assert "-0.100 ± 0.010 against the plain mean with nothing wrong (below it)" in text


def test_nothing_accepted_at_all():
  argv = "--num-microbatches 4 --wrong-sources 1 --tau 0 --seeds 3"
  (part,) = options.parts(options.parse(argv.split()))
  summaries = {
    arm.name: _summary(_LOW, 0.0, None if arm.clean else np.nan) for arm in part.arms
  }
  text = report.comparison(part, summaries)
  assert "told apart neither" in text
  assert "Wrong sources: they gave 25% of all micro-gradients.\n" in text


def test_rolling_mean():
  rng = np.random.default_rng(0)
  values = rng.normal(size=(3, 50))
  values[rng.random((3, 50)) < 0.3] = np.nan
  values[:, 20:30] = np.nan
  found = plots._rolling(values, 7)
  for step in range(50):
    window = values[:, max(0, step - 6) : step + 1]
    finite = window[np.isfinite(window)]
    if len(finite):
      assert found[step] == pytest.approx(finite.mean())
    else:
      assert np.isnan(found[step])
  assert np.isnan(found[26:30]).all()
