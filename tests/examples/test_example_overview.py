"""Overview: gains and verdicts by hand, and what is kept is what the command makes."""

import csv

import numpy as np
import pytest
from scipy import stats

import overview

pytestmark = pytest.mark.experiments

_FIELDS = (
  *("part", "title", "arm", "label", "role", "imitates", "seed"),
  *("best", "final", "picked", "accepted", "from_wrong"),
)
_PLAIN = [0.50, 0.52, 0.51, 0.53]
_HIGH = [0.71, 0.72, 0.70, 0.74]


def _write(path, arms):
  """A file of one setting: by arm its role and scores."""
  with open(path, "w", newline="") as file:
    writer = csv.DictWriter(file, _FIELDS)
    writer.writeheader()
    for arm, (role, final, picked) in arms.items():
      for seed, scores in enumerate(zip(final, picked)):
        writer.writerow(
          dict(part="p", title="a setting", arm=arm, label=f"GAF {arm}", role=role)
          | dict(imitates="ours" if role == "chance" else "", seed=seed)
          | dict(zip(("final", "picked"), scores), best=max(scores))
          | dict(accepted=0.5, from_wrong="" if role == "rival" else 0.25)
        )


def _arms(ours=_HIGH, chance=_PLAIN, ema=_PLAIN):
  return {
    "plain": ("rival", _PLAIN, _HIGH),
    "ema": ("rival", ema, _PLAIN),
    "ours": ("gaf", ours, ours),
    "random": ("chance", chance, _PLAIN),
    "alone": ("gaf", _HIGH, _HIGH),  # Without a control: not in the table.
    "right": ("ideal", [1, 1, 1, 1], [1, 1, 1, 1]),
  }


def test_gains_by_hand(tmp_path):
  path = tmp_path / "memory-x.csv"
  ema = np.array(_PLAIN) + [0.02, 0.01, 0.04, 0.03]
  _write(path, _arms(ema=ema))
  (gain,) = overview.read(path)
  assert (gain.claim, gain.setting, gain.label) == ("memory", "a setting", "GAF ours")
  assert (gain.kept, gain.wrong) == (0.5, 0.25)
  assert gain.best == {"final": "GAF ema", "picked": "GAF plain"}
  low, high = stats.ttest_rel(_HIGH, ema).confidence_interval(0.95)
  assert gain.rival["final"].mean == pytest.approx((low + high) / 2)
  assert gain.rival["final"].margin == pytest.approx((high - low) / 2)
  assert gain.chance["final"].mean == pytest.approx(np.subtract(_HIGH, _PLAIN).mean())
  # The plain mean, stopped where a user would, is as good.
  assert gain.rival["picked"].mean == 0
  assert gain.verdict("final") == "beats" and gain.verdict("picked") == "ties"


@pytest.mark.parametrize(
  "arms, verdict",
  [
    (_arms(), "beats"),
    (_arms(chance=_HIGH), "ties"),
    (_arms(ema=_HIGH), "ties"),
    (_arms(ours=_PLAIN, chance=_HIGH), "loses"),
    (_arms(ours=_PLAIN, ema=_HIGH), "loses"),
    # Above chance alone does not make up for a better rival.
    (_arms(ours=_PLAIN, chance=[0, 0.01, 0.02, 0], ema=_HIGH), "loses"),
  ],
)
def test_verdicts(tmp_path, arms, verdict):
  path = tmp_path / "by-example.csv"
  _write(path, arms)
  (gain,) = overview.read(path)
  assert gain.verdict("final") == verdict


@pytest.mark.parametrize(
  "label, short",
  [
    ("mixup", "mixup"),
    ("random choice, as many as adaptive", "random choice"),
    ("smallest loss, as many as adaptive, weight EMA", "smallest loss, weight EMA"),
    (
      "smallest loss, as many as best 60%, weight EMA",
      "smallest loss of 60%, weight EMA",
    ),
  ],
)
def test_names_of_rivals(label, short):
  """Two that imitate GAF are told apart by the share that one of them is told."""
  assert overview._short(label) == short


def test_accuracy_by_share_of_flipped_labels(tmp_path):
  path = tmp_path / "noise.csv"
  _write(path, {"plain": ("rival", [0.459, 0.6, 0.741], [0.4, 0.4, 0.4])})
  first = path.read_text().replace("\np,", "\nflipped0.05,")
  _write(path, {"plain": ("rival", [0.3, 0.3, 0.3], [0.15, 0.319, 0.431])})
  second = path.read_text().replace("\np,", "\nflipped0.6,").partition("\n")[2]
  path.write_text(first + second)
  _, best, after, where = overview.table_1(path).split(":\n\n")
  cells = lambda text: [
    [cell.strip() for cell in line.split("|")[1:-1]]
    for line in text.splitlines()
    if line.startswith("|")
  ]
  header, _, plain = cells(after)
  assert header == ["", "5%", "60%"]
  assert plain == ["GAF plain", "0.600 ± 0.141", "0.300 ± 0.000"]
  assert cells(best)[2] == ["GAF plain", "0.600 ± 0.141", "0.350 ± 0.071"]
  assert cells(where)[2] == ["GAF plain", "0.400 ± 0.000", "0.300 ± 0.141"]


def test_losses_are_better_when_lower(tmp_path, monkeypatch):
  monkeypatch.setattr(overview, "_LOWER_IS_BETTER", tmp_path)
  path = tmp_path / "byte-lm.csv"
  _write(path, _arms(ours=_PLAIN, chance=_HIGH, ema=_HIGH))
  (gain,) = overview.read(path)
  assert gain.chance["final"].mean > 0 and gain.best["final"] == "GAF plain"


def test_the_better_way_of_chance_counts(tmp_path):
  arms = _arms()
  arms["steps"] = ("chance", np.array(_HIGH) - 0.01, _PLAIN)
  path = tmp_path / "noise.csv"
  _write(path, arms)
  (gain,) = overview.read(path)
  assert gain.chance["final"].mean == pytest.approx(0.01)


def test_one_way_for_all_settings(tmp_path):
  """How far each way is behind the best of each setting, but those that know it."""
  path = tmp_path / "memory.csv"
  _write(path, {"a": ("rival", [0.5], [0.9]), "b": ("gaf", [0.8], [0.6])})
  more = {
    "a": ("rival", [0.7], [0.5]),
    "b": ("gaf", [0.6], [0.6]),
    "c": ("gaf", [0.9], [0.5]),  # Best, but not in both settings.
    "d": ("ideal", [1.0], [1.0]),
    "e": ("chance", [1.0], [1.0]),
  }
  _write(tmp_path / "more.csv", more)
  second = (tmp_path / "more.csv").read_text().replace("\np,", "\nq,")
  path.write_text(path.read_text() + second.partition("\n")[2])
  _, _, *lines = overview.regrets(path).splitlines()
  cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
  assert cells == [
    ["GAF b", "0.150", "0.300", "0.150", "0.300"],
    ["GAF a", "0.250", "0.300", "0.050", "0.100"],
  ]


def test_the_right_share_is_one_way(tmp_path):
  """Whatever it is; where nothing is wrong it is all, plain or averaged."""
  path = tmp_path / "by-example.csv"
  _write(path, {"plain": ("rival", [0.9], [0.9]), "ema": ("rival", [0.8], [0.8])})
  found = path.read_text()
  for part, name, share in (("q", "0.75", "75%"), ("r", "0.6", "60%")):
    arms = {
      "plain": ("rival", [0.5], [0.5]),
      "ema": ("rival", [0.5], [0.5]),
      f"x_quantile{name}": ("gaf", [0.6], [0.6]),
      f"x_quantile{name}_ema": ("gaf", [0.7], [0.7]),
    }
    _write(path, arms)
    text = path.read_text().replace("\np,", f"\n{part},").partition("\n")[2]
    text = text.replace(f"GAF x_quantile{name}_ema", f"GAF best {share} averaged")
    found += text.replace(f"GAF x_quantile{name}", f"GAF best {share}")
  path.write_text(found)
  _, _, *lines = overview.regrets(path).splitlines()
  cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
  behind = {name: float(worst) for name, _, worst, *_ in cells}
  assert behind == {
    "GAF of the right share": 0.1,
    "GAF of the right share averaged": 0.1,
    "GAF plain": 0.2,
    "GAF ema": 0.2,
  }


def test_from_files_to_table_and_pictures(tmp_path):
  for name in ("memory", "by-example", "rules"):
    _write(tmp_path / f"{name}.csv", _arms())
  with open(tmp_path / "by-example-told-apart.csv", "w") as file:
    file.write("part,title,seed,step,distance,loss,gradient norm\n")
    for seed, step in np.ndindex(3, 4):
      file.write(f"p,a long title of it,{seed},{step},0.9,0.8,0.7\n")
  gains = overview.everything([tmp_path])
  assert sorted(gain.claim for gain in gains) == ["by-example", "memory"]  # Not rules.
  counts, _, table = overview.table(gains).partition("\n\n")
  assert [cell.strip() for cell in counts.splitlines()[2].split("|")[2:8]] == [
    *["1", "0", "0"],
    *["0", "1", "0"],
  ]
  assert table.count("a setting") == 2
  overview.forest(tmp_path / "forest.png", "A title", gains)
  overview.areas(tmp_path / "areas.png", sorted(tmp_path.glob("*told-apart.csv")))
  for name in ("forest", "areas"):
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_kept_is_what_the_command_makes():
  """The table of all settings is that of the csv files, and RESULTS.md counts them."""
  gains = overview.everything()
  kept = (overview.HERE / "results" / "settings.md").read_text(encoding="utf-8")
  assert kept == overview.text(gains)
  noise = overview.HERE / "results" / "noise.csv"
  kept = (overview.HERE / "results" / "table-1.md").read_text(encoding="utf-8")
  assert kept == overview.table_1(noise)
  counts = overview.table(gains).partition("\n\n")[0]
  assert counts in (overview.HERE / "RESULTS.md").read_text(encoding="utf-8")
