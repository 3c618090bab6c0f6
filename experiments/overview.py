"""Tables and pictures of the kept results; nothing is trained.

`python experiments/overview.py` counts in how many settings GAF beats chance and the
best rival, and draws the pictures that follow from the csv files of `results`;
`python experiments/overview.py NAME` prints all scores of one file.
"""

import argparse
import pathlib
import re
from collections.abc import Sequence

import numpy as np

import charts
import figures
import paper
import report
import runs
from report import SCORES, Setting, aligned
from shared import UserError

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
_TOLD_APART = "told-apart"
# The claim of each file's settings; other files hold no rivals.
CLAIMS = {
  "memory": "Sources that persist, compared with a memory",
  "by-example": "Labels wrong here and there, single examples compared",
  "noise": "Labels wrong here and there, two microbatches compared, as in the paper",
}
_VERDICTS = ("beats", "ties", "loses")
_BEHIND = ("mean", "worst")


def claim_of(name: str, title: str = "") -> str | None:
  """The claim that a setting of a file is about; None for a file without rivals."""
  if name.startswith("by-example") or re.search(r"document|spread evenly", title):
    return "by-example"
  if name.startswith(("memory", "byte", "tabular")):
    return "memory"
  return "noise" if name.startswith(("noise", "human")) else None


def claims(folder: pathlib.Path = RESULTS) -> dict[str, list[Setting]]:
  """Settings of all files by claim, without GAF arms that have no control."""
  found: dict[str, list[Setting]] = {claim: [] for claim in CLAIMS}
  for path in sorted(folder.glob("*.csv")):
    if _TOLD_APART in path.stem or not claim_of(path.stem):
      continue
    for setting in report.settings(path):
      imitated = {one.imitates for one in setting.values() if one.role == "chance"}
      title = next(iter(setting.values())).title
      found[claim_of(path.stem, title)].append(
        {
          arm: one
          for arm, one in setting.items()
          if one.role != "gaf" or arm in imitated
        }
      )
  return found


def counts(found: dict[str, list[Setting]]) -> str:
  """A Markdown table of the verdicts on all GAF arms, with and without weight EMA."""
  lines = [["", *(f"{score}: {verdict}" for score in SCORES for verdict in _VERDICTS)]]
  for claim, settings in found.items():
    for averaged in (False, True):
      verdicts = [
        [
          gain.verdict
          for setting in settings
          for gain in report.gains(setting, score)
          if gain.result.label.endswith("weight EMA") == averaged
        ]
        for score in SCORES
      ]
      if verdicts[0]:
        also = ", with weight EMA" * averaged
        numbers = [str(some.count(one)) for some in verdicts for one in _VERDICTS]
        lines.append([f"{CLAIMS[claim]}{also} ({len(verdicts[0])})", *numbers])
  return aligned(lines)


def regrets(settings: Sequence[Setting]) -> str:
  """A Markdown table of the cost of training in one way in all settings.

  The cost in a score is the distance to the best arm of each setting, on average and at
  worst. Chance and arms that need the truth are excluded. Arms that are told the share
  of right examples are one way; where nothing is wrong they are the plain mean.
  """
  settings = [_one_name(setting) for setting in settings]
  told = {arm for setting in settings for arm in setting if "quantile" in arm}
  settings = [
    {arm: setting["ema" if "_ema" in arm else "plain"] for arm in told} | setting
    for setting in settings
  ]
  open_to_all = lambda setting: {
    arm: one for arm, one in setting.items() if one.role in ("gaf", "rival")
  }
  in_all = set.intersection(*(set(open_to_all(setting)) for setting in settings))
  rows = []
  for arm in in_all:
    label = report.short(settings[-1][arm].label)
    row, means = [re.sub(r"(best|of) [0-9.]+%", "of the right share", label)], []
    for score in SCORES:
      behind = [
        max(one.mean(score) for one in open_to_all(setting).values())
        - setting[arm].mean(score)
        for setting in settings
      ]
      means.append(np.mean(behind))
      row += [f"{means[-1]:.3f}", f"{max(behind):.3f}"]
    rows.append((means, row))
  header = ["", *(f"{score}: {which}" for score in SCORES for which in _BEHIND)]
  return aligned([header, *(row for _, row in sorted(rows))])


def _one_name(setting):
  return {re.sub(r"quantile[0-9.]+", "quantile", arm): x for arm, x in setting.items()}


def draw(out: pathlib.Path, folder: pathlib.Path = RESULTS) -> None:
  """Writes the pictures that need only the csv files of `folder`."""
  out.mkdir(parents=True, exist_ok=True)
  for claim, settings in claims(folder).items():
    kinds = ("chance", "rival")
    path = out / f"claim-{claim}.png"
    charts.forest(path, CLAIMS[claim], settings, kinds)
  for name in ("noise", "tau", "batch-size-patches", "kept-share-patches"):
    found = report.settings(folder / f"{name}.csv")
    paper.draw(out / f"{name}.png", name, found, ())
  lines = [
    line
    for path in sorted(folder.glob(f"by-example*{_TOLD_APART}.csv"))
    for line in report.read_csv(path)
  ]
  charts.areas(out / "claim-told-apart.png", lines, paper.SIGNALS)


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("name", nargs="?", help="a csv file of results, without .csv")
  parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="for pictures")
  options = parser.parse_args(argv)
  if options.name:
    path = RESULTS / f"{options.name}.csv"
    if not path.exists() or _TOLD_APART in path.stem:
      raise UserError(f"{path} is not a file of results.")
    print(report.table(report.settings(path)))
    return
  print(counts(claims()))
  for name in figures.FIGURES:
    settings = report.settings(RESULTS / f"{name}.csv")
    if claim_of(name) and len(settings) > 1:
      print(f"\nOne way for all settings of {name}, behind the best of each:\n")
      print(regrets(settings))
  draw(options.out)


if __name__ == "__main__":
  runs.main(main)
