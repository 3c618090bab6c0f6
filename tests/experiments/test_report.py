"""Report and overview: statistics by hand, and the kept results."""

import csv
import re

import numpy as np
import pytest
from scipy import stats

import figures
import overview
import report
from report import Difference

pytestmark = pytest.mark.experiments

_LOW, _HIGH = [0.50, 0.52, 0.51, 0.53], [0.71, 0.72, 0.70, 0.74]


def test_differences_are_paired():
  # Scores vary with the seed, but the gain hardly does.
  theirs = np.array([0.1, 0.5, 0.9])
  difference = Difference.of(theirs + [0.02, 0.03, 0.04], theirs)
  assert difference.mean == pytest.approx(0.03)
  # 4.303 / sqrt(3) standard deviations of 0.01.
  assert difference.margin == pytest.approx(0.02484, abs=1e-5)
  assert difference.sign == 1 and str(difference) == "**+0.030 ± 0.025**"
  assert Difference.of(theirs, theirs + [0.02, -0.03, 0.04]).sign == 0
  assert Difference.of(theirs, theirs + [0.02, 0.03, 0.04]).sign == -1
  few = Difference.of([0.9, 0.8], [0.5, 0.5])
  assert (few.margin, few.sign, str(few)) == (None, 0, "+0.350")
  rng = np.random.default_rng(0)
  for seeds in (3, 5, 10):
    ours, theirs = rng.normal(0.5, 1, seeds), rng.normal(0, 1, seeds)
    found = Difference.of(ours, theirs)
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found.mean - found.margin == pytest.approx(low)
    assert found.mean + found.margin == pytest.approx(high)
    assert found.sign == int(low > 0) - int(high < 0)


def test_spreads():
  assert report.spread(np.array([0.4, 0.5, 0.9])) == "0.600 ± 0.265"
  assert report.spread(np.array([0.4, 0.5])) == "0.450"


def _write(path, arms, part="p"):
  """A file of one setting: by arm its role and scores."""
  fields = ("part", "title", "arm", "label", "role", "imitates", "seed")
  with open(path, "a", newline="") as file:
    writer = csv.DictWriter(file, (*fields, *report.SCORES, "accepted", "from_wrong"))
    if file.tell() == 0:
      writer.writeheader()
    for arm, (role, final, picked) in arms.items():
      for seed, scores in enumerate(zip(final, picked)):
        names = dict(part=part, title="a setting", arm=arm, label=f"GAF {arm}")
        names |= dict(role=role, imitates="ours" if role == "chance" else "", seed=seed)
        found = dict(accepted=0.5, from_wrong="" if role == "rival" else 0.25)
        writer.writerow(names | dict(zip(report.SCORES, scores)) | found)
  return path


def _arms(ours=_HIGH, chance=_LOW, ema=_LOW):
  return {
    "plain": ("rival", _LOW, _HIGH),
    "ema": ("rival", ema, _LOW),
    "ours": ("gaf", ours, ours),
    "random": ("chance", chance, _LOW),
    "alone": ("gaf", _HIGH, _HIGH),
    "right": ("ideal", [1, 1, 1, 1], [1, 1, 1, 1]),
  }


def test_gains_by_hand(tmp_path):
  ema = np.array(_LOW) + [0.02, 0.01, 0.04, 0.03]
  (setting,) = report.settings(_write(tmp_path / "memory-x.csv", _arms(ema=ema)))
  gain, alone = report.gains(setting, "final")
  assert (gain.result.label, gain.best) == ("GAF ours", "GAF ema")
  low, high = stats.ttest_rel(_HIGH, ema).confidence_interval(0.95)
  assert gain.rival.mean == pytest.approx((low + high) / 2)
  assert gain.rival.margin == pytest.approx((high - low) / 2)
  expected = np.subtract(_HIGH, _LOW).mean()
  assert gain.plain.mean == pytest.approx(expected) == gain.chance.mean
  assert gain.verdict == "beats" and alone.chance is None
  # The plain mean, stopped where a user would, is as good.
  picked, _ = report.gains(setting, "picked")
  assert (picked.best, picked.rival.mean, picked.verdict) == ("GAF plain", 0, "ties")
  header, _, heading, *lines = report.table([setting]).splitlines()
  cells = lambda line: [cell.strip() for cell in line.split("|")[1:-1]]
  assert "**a setting**" in heading and len(lines) == 5  # All except chance.
  ours = dict(zip(cells(header), cells(lines[2])))
  assert (ours[""], ours["accepted"], ours["of these wrong"]) == (
    "GAF ours",
    "0.50",
    "0.25",
  )
  assert ours["final"] == "0.718 ± 0.017"
  # Losses are better when lower.
  (setting,) = report.settings(_write(tmp_path / "byte-lm.csv", _arms(ema=ema)))
  gain, _ = report.gains(setting, "final")
  assert (gain.best, gain.verdict) == ("GAF plain", "loses")


def test_verdicts(tmp_path):
  for i, (arms, verdict) in enumerate(
    (
      (_arms(), "beats"),
      (_arms(chance=_HIGH), "ties"),
      (_arms(ema=_HIGH), "ties"),
      (_arms(ours=_LOW, chance=_HIGH), "loses"),
      (_arms(ours=_LOW, ema=_HIGH), "loses"),
      # A gain over chance does not make up for a better rival.
      (_arms(ours=_LOW, chance=[0, 0.01, 0.02, 0], ema=_HIGH), "loses"),
    )
  ):
    (setting,) = report.settings(_write(tmp_path / f"{i}.csv", arms))
    assert report.gains(setting, "final")[0].verdict == verdict


def test_names_of_rivals_that_imitate():
  for label, expected in (
    ("mixup", "mixup"),
    ("smallest loss, as many as adaptive, weight EMA", "smallest loss, weight EMA"),
    ("smallest loss, as many as best 60%", "smallest loss of 60%"),
  ):
    assert report.short(label) == expected


def test_one_way_for_all_settings(tmp_path):
  """`a` is behind by 0 and 0.2, `b` by 0.1 and 0; arms told a share are one way."""
  same = lambda x: [x, x, x]
  ways = lambda a, b, told, name: {
    "plain": ("rival", same(a), same(a)),
    "b": ("rival", same(b), same(b)),
    name: ("gaf", same(told), same(told)),
    "right": ("ideal", same(1), same(1)),
  }
  path = tmp_path / "x.csv"
  _write(path, ways(0.6, 0.5, 0.5, "quantile0.6"), "p")
  _write(path, ways(0.6, 0.8, 0.7, "quantile0.8"), "q")
  _, _, *lines = overview.regrets(report.settings(path)).splitlines()
  cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
  assert cells == [
    ["GAF b", *["0.050", "0.100"] * 2],
    ["GAF plain", *["0.100", "0.200"] * 2],
    ["GAF quantile0.8", *["0.100", "0.100"] * 2],
  ]


def test_kept_results_are_those_that_the_texts_show(tmp_path):
  """Plans, pictures, and the count of verdicts."""
  text = (overview.RESULTS.parent / "RESULTS.md").read_text()
  linked = set(re.findall(r"\]\(results/([^)]+)\)", text))
  assert linked <= {path.name for path in overview.RESULTS.iterdir()}
  for name in (*figures.FIGURES, "byte-lm", "tabular"):
    assert f"{name}.csv" in linked
    settings = report.settings(overview.RESULTS / f"{name}.csv")
    assert len(next(iter(settings[0].values())).scores["final"]) in (3, 5, 10)
    if name in figures.FIGURES:
      # The kept results are of the arms that would run now.
      of_arm = lambda arm: (arm.name, arm.label, arm.role, arm.imitates or "")
      planned = [
        (part.name, part.title, [of_arm(arm) for arm in part.arms])
        for part in figures.parts(name)
      ]
      kept = [
        (
          next(iter(setting.values())).part,
          next(iter(setting.values())).title,
          [(one.arm, one.label, one.role, one.imitates) for one in setting.values()],
        )
        for setting in settings
      ]
      assert planned == kept
  # Cells are padded in only one of the tables.
  words = lambda text: re.sub(r" +", " ", re.sub(r"-+", "-", text))
  assert words(overview.counts(overview.claims())) in words(text)
  overview.draw(tmp_path)
  drawn = {path.name for path in tmp_path.iterdir()}
  assert {f"claim-{claim}.png" for claim in overview.CLAIMS} < drawn <= linked


def test_overview_of_one_file(capsys):
  overview.main(["skew-patches"])
  out = capsys.readouterr().out
  assert "70% of each source's images from classes of its own" in out
