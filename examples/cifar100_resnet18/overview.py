"""Overview: one table of all settings and a picture for each claim, from kept results.

    python overview.py

reads the csv files that `paper.py --keep results`, `../byte_lm/train.py` and
`../../benchmarks/tabular.py` have left, and writes `settings.md`, `table-1.md` and
`claim-*.png` into `results`. Nothing is trained.
"""

import argparse
import csv
import dataclasses
import itertools
import pathlib
import re
import sys
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

from common import plots
from common.storage import write_whole
from common.tables import Difference, aligned, spread

HERE = pathlib.Path(__file__).resolve().parent
SCORES = ("final", "picked")
# Where scores are losses.
_LOWER_IS_BETTER = HERE.parent / "byte_lm" / "results"
_FOLDERS = (
  HERE / "results",
  _LOWER_IS_BETTER,
  HERE.parents[1] / "benchmarks" / "results",
)
# By file, what its settings have in common; other files hold no simple rivals.
_CLAIMS = {
  "memory": "Sources that persist, compared with a memory",
  "by-example": "Labels wrong here and there, single examples compared",
  "noise": "Labels wrong here and there, two microbatches compared, as in the paper",
}
_AVERAGED = ", weight EMA"
_TOLD_APART = "told-apart"
_MARKERS = {"chance": ("#0072B2", "s"), "rival": ("#CC79A7", "v")}
# What goes without saying within the picture of a claim.
_UNSAID = (
  r"(, mlp|, patches-mlp, [0-9,]+ training images)\b"
  "|(by example nearest_neighbors|majority memory 0.98) "
)
_LINEAR = 0.02  # Most differences are smaller, and some twenty times as large.
_SIGNALS = {"distance": "#0072B2", "loss": "#009E73", "gradient norm": "#E69F00"}

_VERDICTS = ("beats", "ties", "loses")
_BEHIND = ("mean", "worst")
_HEADER = """# All settings

Made by `python overview.py` from the csv files of results. *Chance*: as many chosen at
random. *Best rival*: of the plain mean, label smoothing, mixup, weight EMA, the
smallest losses and the like the one with the highest mean score. *Final*: the score
after the last step; *picked*: where the score on noisy validation data is best, for
both. Paired by seed, ± half of the 95 % interval, bold where that excludes zero. It
*beats* chance and the best rival beyond it, *loses* to one of them beyond it, or
*ties*. Sorted by the final gain over the best rival. Accuracies; of diabetes the share
of variance explained, of text bits per byte saved.
"""
_ONE_WAY = """
## One way for all settings

Which way is best in a setting a user does not know before. To go the same way in all
settings of a file is so far behind the best way of each, on average and at worst (only
what knows the wrong ones, and chance, do not count). Ways that are told the right
share are the plain mean, or its moving average, where nothing is wrong:
"""
_TABLE_1 = {
  "best": "Highest test accuracy of all evaluations, as in the paper",
  "final": "After the last step",
  "picked": "Where the accuracy on noisy validation images is highest",
}
_TABLE_1_HEADER = """# By share of flipped labels

In the shape of the paper's Table 1, of digits: test accuracy by share of training
labels flipped, mean ± standard deviation over the seeds. Made by `python overview.py`
from the csv file of `python paper.py noise`."""


@dataclasses.dataclass(frozen=True)
class Gain:
  """What GAF gained in one setting, by `SCORES`; above zero is better.

  Attributes:
    claim: a key of `_CLAIMS`.
    setting: in words.
    label: of the GAF arm.
    kept: share of micro-gradients that it accepted.
    wrong: share of wrong ones among them; NaN where nothing is wrong.
    chance: over as much chosen at random.
    rival: over the simple rival with the best mean score.
    best: the name of that.
  """

  claim: str
  setting: str
  label: str
  kept: float
  wrong: float
  chance: dict[str, Difference]
  rival: dict[str, Difference]
  best: dict[str, str]

  @property
  def averaged(self) -> bool:
    """Whether it is GAF with a moving average of the weights."""
    return self.label.endswith(_AVERAGED)

  def verdict(self, score: str) -> str:
    """'beats' chance and rival beyond the interval, 'loses' to one, or 'ties'."""
    signs = self.chance[score].sign, self.rival[score].sign
    return "loses" if -1 in signs else "beats" if signs == (1, 1) else "ties"


def claim_of(name: str, part: str = "") -> str | None:
  """The claim that a file's part is about, None for a file without rivals."""
  if name.startswith("by-example") or part == "documents":
    return "by-example"
  if name.startswith(("memory", "byte")):
    return "memory"
  return "noise" if name.startswith(("noise", "human")) else None


def read(path: pathlib.Path) -> list[Gain]:
  """The gains in all settings of a csv file of results."""
  sign = -1 if path.parent == _LOWER_IS_BETTER else 1
  return [gain for arms in _settings(path) for gain in _gains(path.stem, arms, sign)]


def _settings(path):
  """For each setting of a file, by arm the lines of its seeds."""
  with open(path, encoding="utf-8") as file:
    lines = list(csv.DictReader(file))
  found: dict[str, dict[str, list[dict]]] = {}
  for line in lines:
    found.setdefault(line["part"], {}).setdefault(line["arm"], []).append(line)
  return [*found.values()]


def regrets(path: pathlib.Path) -> str:
  """A Markdown table of what it costs to go one way in all settings of a file.

  By score how far an arm is, on average and at worst, behind the best one of each
  setting, those aside that know what is wrong or leave it to chance. Arms that are told
  each setting's share of right ones are one way.
  """
  settings = _under_one_name(_settings(path))
  eligible = lambda arms: {
    name: seeds for name, seeds in arms.items() if seeds[0]["role"] in ("gaf", "rival")
  }
  in_all = set.intersection(*(set(eligible(arms)) for arms in settings))
  lines = [["", *(f"{score}: {which}" for score in SCORES for which in _BEHIND)]]
  rows = []
  for name in in_all:
    label = _short(settings[-1][name][0]["label"])
    row, mean = [re.sub(r"(best|of) [0-9.]+%", "of the right share", label)], []
    for score in SCORES:
      of = lambda seeds: _numbers(seeds, score).mean()
      behind = [max(map(of, eligible(a).values())) - of(a[name]) for a in settings]
      mean.append(np.mean(behind))
      row += [f"{mean[-1]:.3f}", f"{max(behind):.3f}"]
    rows.append((mean, row))
  return aligned([*lines, *(row for _, row in sorted(rows))])


def _under_one_name(settings):
  """The settings; in all of them arms that are told a share have the same name.

  Where nothing is wrong that share is one, and they are the plain mean or its average.
  """
  settings = [
    {
      re.sub(r"quantile[0-9.]+", "quantile", name): seeds
      for name, seeds in arms.items()
    }
    for arms in settings
  ]
  told = {name for arms in settings for name in arms if "quantile" in name}
  return [
    {name: arms["ema" if "_ema" in name else "plain"] for name in told} | arms
    for arms in settings
  ]


def _gains(name, arms, sign):
  first = {arm: seeds[0] for arm, seeds in arms.items()}
  rivals = [arm for arm, line in first.items() if line["role"] == "rival"]
  found = []
  for arm, line in first.items():
    controls = [
      one
      for one, other in first.items()
      if other["role"] == "chance" and other["imitates"] == arm
    ]
    if line["role"] != "gaf" or not controls:
      continue
    chance, against, best = {}, {}, {}
    for score in SCORES:
      of = {one: sign * _numbers(seeds, score) for one, seeds in arms.items()}
      # Of two ways of chance the better one.
      control = max(controls, key=lambda one: of[one].mean())
      rival = max(rivals, key=lambda one: of[one].mean())
      chance[score] = Difference.of(of[arm], of[control])
      against[score] = Difference.of(of[arm], of[rival])
      best[score] = _short(first[rival]["label"])
    claim = line.get("claim") or claim_of(name, line["part"])
    kept, wrong = (
      _numbers(arms[arm], field).mean() for field in ("accepted", "from_wrong")
    )
    found.append(
      Gain(claim, line["title"], line["label"], kept, wrong, chance, against, best)
    )
  return found


def _short(label):
  """The label of an arm without what it imitates, but with a share that it is told."""
  what, _, imitated = label.partition(", as m")
  if told := re.search(r"best (\S+%)", imitated):
    what += f" of {told[1]}"
  return what + _AVERAGED if imitated.endswith(_AVERAGED) else what


def _numbers(seeds, field):
  return np.array([float(line.get(field) or "nan") for line in seeds])


def _files(folder):
  """The csv files of a folder that hold simple rivals."""
  return [
    path
    for path in sorted(folder.glob("*.csv"))
    if not path.stem.endswith(_TOLD_APART)
    and (claim_of(path.stem) or path.stem == "tabular")
  ]


def everything(folders: Sequence[pathlib.Path] = _FOLDERS) -> list[Gain]:
  """The gains of all kept results, the best against simple rivals first."""
  gains = [gain for folder in folders for path in _files(folder) for gain in read(path)]
  return sorted(gains, key=lambda gain: -gain.rival["final"].mean)


def table(gains: Sequence[Gain]) -> str:
  """A Markdown table with a line for each gain, after a count of the verdicts."""
  counts = [["", *(f"{score}: {verdict}" for score in SCORES for verdict in _VERDICTS)]]
  for (claim, said), averaged in itertools.product(_CLAIMS.items(), (False, True)):
    ours = [g for g in gains if (g.claim, g.averaged) == (claim, averaged)]
    if not ours:
      continue
    also = ", with weight EMA" * averaged
    counts.append([f"{said}{also} ({len(ours)})"])
    for score in SCORES:
      verdicts = [gain.verdict(score) for gain in ours]
      counts[-1] += [str(verdicts.count(verdict)) for verdict in _VERDICTS]
  header = ["setting", "GAF", "kept", "of these wrong"]
  for score in SCORES:
    header += [f"{score}: - chance", f"- best rival ({score})"]
  lines = [header]
  for gain in gains:
    wrong = "" if np.isnan(gain.wrong) else f"{gain.wrong:.2f}"
    kept = "" if np.isnan(gain.kept) else f"{gain.kept:.2f}"
    line = [gain.setting, gain.label.removeprefix("GAF "), kept, wrong]
    for score in SCORES:
      line.append(gain.chance[score].marked)
      line.append(f"{gain.rival[score].marked} ({gain.best[score]})")
    lines.append(line)
  return f"{aligned(counts)}\n\n{aligned(lines)}"


def one_way() -> str:
  """Paragraphs and tables of `regrets`, for each file of the paper's experiments."""
  files = [path for path in _files(_FOLDERS[0]) if len(_settings(path)) > 1]
  return "\n\n".join(f"{path.stem}:\n\n{regrets(path)}" for path in files)


def table_1(path: pathlib.Path) -> str:
  """What the paper's Table 1 shows: accuracy by share of flipped labels, by arm."""
  settings = _settings(path)
  shares = [next(iter(arms.values()))[0]["part"] for arms in settings]
  header = ["", *(f"{float(name.removeprefix('flipped')):.0%}" for name in shares)]
  tables = []
  for score, said in _TABLE_1.items():
    lines = [header]
    for name, (first, *_) in settings[0].items():
      cells = [spread(_numbers(arms[name], score)) for arms in settings]
      lines.append([first["label"], *cells])
    tables.append(f"{said}:\n\n{aligned(lines)}")
  return "\n\n".join([_TABLE_1_HEADER, *tables]) + "\n"


def text(gains: Sequence[Gain]) -> str:
  """All of `settings.md`."""
  return f"{_HEADER}\n{table(gains)}\n{_ONE_WAY}\n{one_way()}\n"


def forest(path: pathlib.Path, title: str, gains: Sequence[Gain]) -> None:
  """A picture of gains: a line for each, final at the left, picked at the right."""
  size = (12, 2.2 + 0.3 * len(gains))
  figure = Figure(figsize=size, dpi=100, layout="constrained")
  figure.suptitle(
    f"{title}: what GAF gains\nmean of paired seeds and its 95 % confidence interval;"
    f" hollow: not significant; logarithmic beyond ±{_LINEAR}",
    fontsize=10,
  )
  axes = figure.subplots(1, 2, sharey=True)
  for ax, score in zip(axes, SCORES):
    for at, gain in enumerate(gains):
      for row, (kind, (color, marker)) in enumerate(_MARKERS.items()):
        one = getattr(gain, kind)[score]
        plots.interval(ax, at + 0.24 * (row - 0.5), one, color, marker)
    ax.axvline(0, color="gray", linewidth=0.8, zorder=1)
    ax.grid(alpha=0.3)
    ax.set_xscale("symlog", linthresh=_LINEAR, linscale=0.8)
    ax.set_xticks([-0.3, -0.1, -_LINEAR, 0, _LINEAR, 0.1, 0.3], minor=False)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel(f"{score}: difference")
  names = [
    re.sub(_UNSAID, "", f"{gain.setting}: {gain.label.removeprefix('GAF ')}")
    for gain in gains
  ]
  axes[0].set_yticks(range(len(gains)), names, fontsize=7)
  axes[0].set_ylim(len(gains) - 0.4, -0.6)
  for kind, said in (("chance", "as much at random"), ("rival", "the best rival")):
    color, marker = _MARKERS[kind]
    axes[0].plot([], [], color=color, marker=marker, label=f"GAF - {said}")
  plots.save(figure, axes[0], path)


def areas(path: pathlib.Path, files: Sequence[pathlib.Path]) -> None:
  """A picture of how well wrong labels can be told over training, a panel for each."""
  panels: dict[str, dict[int, list[dict]]] = {}
  for file in files:
    with open(file, encoding="utf-8") as stream:
      for line in csv.DictReader(stream):
        of_part = panels.setdefault(line["title"], {})
        of_part.setdefault(int(line["step"]), []).append(line)
  columns = min(3, len(panels))
  rows = -(-len(panels) // columns)
  figure = Figure(figsize=(4 * columns, 1 + 2.8 * rows), dpi=100, layout="constrained")
  figure.suptitle(
    "Which training labels are wrong: area under ROC of what can be seen of an example,"
    "\nin runs of the plain mean; mean of the seeds, band: one standard deviation",
    fontsize=10,
  )
  axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
  for ax, (title, steps) in zip(axes.flat, panels.items()):
    for name, color in _SIGNALS.items():
      values = np.array([_numbers(seeds, name) for seeds in steps.values()]).T
      plots.band(ax, [*steps], values, name, {"color": color})
    ax.axhline(0.5, color="gray", linewidth=0.8)
    half = len(title) // 2 + title[len(title) // 2 :].find(" ")
    ax.set_title(f"{title[:half]}\n{title[half + 1 :]}", fontsize=7)
    ax.set_xlabel("step", fontsize=8)
    ax.grid(alpha=0.3)
  for ax in axes.flat[len(panels) :]:
    ax.set_axis_off()
  plots.save(figure, axes[0, 0], path)


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
  out = parser.parse_args(argv).out
  gains = everything()
  write_whole(out / "settings.md", text(gains))
  write_whole(out / "table-1.md", table_1(_FOLDERS[0] / "noise.csv"))
  for claim, title in _CLAIMS.items():
    ours = [gain for gain in gains if gain.claim == claim]
    if ours:
      forest(out / f"claim-{claim}.png", title, ours)
  # Other files have runs of the same settings with other batches.
  if files := sorted((HERE / "results").glob(f"by-example*{_TOLD_APART}.csv")):
    areas(out / "claim-told-apart.png", files)


if __name__ == "__main__":
  main()
