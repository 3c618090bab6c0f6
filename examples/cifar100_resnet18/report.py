"""Report: tables and sentences, computed from the metrics and traces of a run."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

import training
from common.arms import CONTROLS, IMITATIONS, PLAIN
from common.plots import curves
from common.tables import (
  FEWEST_SEEDS,
  Difference,
  aligned,
  seed_rows,
  spread,
  write_results,
)

# Of each run: by the name of a `Summary`'s field, what it is.
MEASURES = {
  "final": "Final test accuracy",
  "best": "Best test accuracy of all evaluations, which nobody can pick",
  "picked": "Test accuracy where that on the noisy validation images is highest",
}
# The shares of a run after which the signals are tabulated.
_TOLD_AT = (0.0, 0.05, 0.2, 0.5, 1.0)
# By control.
NAMES = {kind: name for kind, (name, _) in IMITATIONS.items()}
# By the signs of the significant differences to the plain mean and to chance.
_VERDICTS = {
  (
    1,
    1,
  ): "above the plain mean and above chance too: which micro-gradients are left out"
  " matters",
  (
    1,
    0,
  ): "above the plain mean, but no different from chance: how much is left out is"
  " enough to explain it",
  (1, -1): "above the plain mean, but below chance: leaving out as much at random does"
  " better",
  (0, 1): "no different from the plain mean, though above chance",
  (0, 0): "different neither from the plain mean nor from chance",
  (0, -1): "no different from the plain mean, and below chance",
  (-1, 1): "below the plain mean, though above chance: it chooses well, but leaving out"
  " as much costs more",
  (-1, 0): "below the plain mean, and no different from chance",
  (-1, -1): "below the plain mean and below chance",
}


@dataclasses.dataclass(frozen=True)
class Summary:
  """What an arm came to; float arrays `[seeds]`."""

  best: np.ndarray  # The highest test accuracy of all evaluations.
  final: np.ndarray  # The test accuracy after the last step.
  picked: (
    np.ndarray
  )  # The test accuracy where the noisy validation accuracy is highest.
  accepted: np.ndarray  # The accepted share of all micro-gradients.
  updates: np.ndarray  # Steps that changed the weights.
  # The mean cosine distance in the last tenth of the steps; NaN without any.
  late_distance: np.ndarray
  # The share of the accepted examples that are mislabeled or from wrong sources; NaN
  # where nothing was accepted, None where nothing is wrong.
  from_wrong: np.ndarray | None = None


Summaries = dict[str, Summary]


def summarize(experiment: Any, rows: list[dict]) -> Summaries:
  """By arm, what it came to in an `Experiment`; `rows` are of the metrics file."""
  part, summaries = experiment.part, {}
  wrong = np.stack([schedule.wrong_examples() for schedule in experiment.schedules])
  for arm in part.arms:
    accuracy = curves(rows, part, arm, "test_accuracy")[1]
    picked = curves(rows, part, arm, "validation_accuracy")[1].argmax(axis=1)
    trace = experiment.traces[arm.name]
    accepted = trace.accepted
    from_wrong = None
    if wrong.any() and not arm.clean:
      # Of each example `[..., k, b]`, though microbatches may have been chosen.
      each = accepted.reshape(*wrong.shape[:3], -1) & np.ones_like(wrong)
      from_wrong = _ratio((each & wrong).sum((1, 2, 3)), each.sum((1, 2, 3)))
    late = trace.distance[:, -max(1, part.steps // 10) :]
    finite = np.isfinite(late)
    summaries[arm.name] = Summary(
      best=accuracy.max(axis=1),
      final=accuracy[:, -1],
      picked=np.take_along_axis(accuracy, picked[:, None], axis=1)[:, 0],
      accepted=accepted.mean(axis=(1, 2)),
      updates=accepted.any(axis=2).sum(axis=1),
      late_distance=_ratio(np.sum(late, axis=1, where=finite), finite.sum(axis=1)),
      from_wrong=from_wrong,
    )
  return summaries


def _ratio(total, number):
  return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def write(path: pathlib.Path, experiments: list[Any], rows: list[dict]) -> str:
  """Writes `results.md` and `results.csv` into `path`; the text of the former."""
  texts, table = [], []
  for experiment in experiments:
    part, summaries = experiment.part, summarize(experiment, rows)
    paragraphs = [f"## {part.title}", size(part), results_table(part, summaries)]
    paragraphs.append(comparison(part, summaries))
    paragraphs += told_apart([part], rows)
    texts.append("\n\n".join(paragraphs) + "\n")
    table += _rows(part, summaries)
  return write_results(path, "\n".join(texts), table)


def write_overview(path: pathlib.Path, title: str, results: list[Any], rows) -> str:
  """The same of many parts; `results` are experiments and their summaries."""
  of_parts = [(experiment.part, summaries) for experiment, summaries in results]
  sizes = [size(part) for part, _ in of_parts]
  if len({*sizes}) > 1:
    sizes = [f"- {part.title}: {said}" for said, (part, _) in zip(sizes, of_parts)]
  paragraphs = [f"## {title}", "\n".join(dict.fromkeys(sizes))]
  if any(arm.is_gaf for arm in of_parts[0][0].arms):
    paragraphs.append(
      "Differences: paired by seed, mean ± half of the 95 % confidence interval, bold"
      " where it excludes zero. The best rival is the one with the highest mean, of the"
      " plain mean and the others that stand above GAF or imitate it by loss."
    )
    for measure, said in MEASURES.items():
      paragraphs += [f"{said}:", overview(measure, of_parts)]
  else:
    lines = [["plain mean", "best", "final", "distance in the last tenth"]]
    for part, summaries in of_parts:
      plain = summaries["plain"]
      values = plain.best, plain.final, plain.late_distance
      lines.append([part.title, *map(spread, values)])
    paragraphs.append(aligned(lines))
  paragraphs += told_apart([part for part, _ in of_parts], rows)
  table = [row for pair in of_parts for row in _rows(*pair)]
  return write_results(path, "\n\n".join(paragraphs) + "\n", table)


def _rows(part, summaries):
  return [row for arm in part.arms for row in seed_rows(part, arm, summaries[arm.name])]


def told_apart(parts: list[Any], rows: list[dict]) -> list[str]:
  """Paragraphs on how well wrong labels could be told, in runs of the plain mean."""
  names = [f"auc/{name}" for name in training.SIGNALS]
  lines = [["", "step", *training.SIGNALS]]
  for part in parts:
    if not any(names[0] in row and row["part"] == part.name for row in rows):
      continue
    found = [curves(rows, part, part.arm("plain"), name) for name in names]
    steps = found[0][0]
    at = [int(np.argmin(np.abs(steps - share * part.steps))) for share in _TOLD_AT]
    for i in sorted({*at}):
      areas = [Difference.of(values[:, i], np.zeros(part.seeds)) for _, values in found]
      said = [f"{area.mean:.3f}" + _plus_minus(area.margin) for area in areas]
      lines.append([part.title, str(steps[i]), *said])
  if len(lines) == 1:
    return []
  return [
    "Area under ROC of mislabeled training images by what a filter could see of each,"
    " in runs of the plain mean, mean ± half of its 95 % confidence interval:",
    aligned(lines),
  ]


def signals(parts: list[Any], rows: list[dict]) -> list[dict]:
  """A dict for each area under ROC in runs of the plain mean; see `told_apart`."""
  titles = {part.name: part.title for part in parts}
  names = {f"auc/{name}": name for name in training.SIGNALS}
  return [
    {"part": row["part"], "title": titles[row["part"]]}
    | {"seed": row["seed"], "step": row["step"]}
    | {name: row[field] for field, name in names.items()}
    for row in rows
    if row["arm"] == "plain" and names.keys() <= row.keys()
  ]


def _plus_minus(margin):
  return "" if margin is None else f" ± {margin:.3f}"


def size(part) -> str:
  """The sentence on how much was trained."""
  devices = ""
  if part.devices is not None:
    each = part.num_microbatches // part.devices
    devices = f", {each} on each of {part.devices} devices"
  seeds = "one seed" if part.seeds == 1 else f"mean over {part.seeds} seeds"
  if part.seeds >= FEWEST_SEEDS:
    seeds = f"mean ± standard deviation over {part.seeds} seeds"
  return (
    f"{part.num_microbatches} microbatches of {part.microbatch_size}{devices},"
    f" {part.steps} steps; {seeds}."
  )


def results_table(part, summaries: Summaries) -> str:
  """A Markdown table with a line for each arm."""
  header = ["", "best test accuracy", "final test accuracy", "picked", "accepted"]
  known = summaries["plain"].from_wrong is not None
  lines = [[*header, *["of these wrong"] * known]]
  for arm in part.arms:
    summary = summaries[arm.name]
    values = summary.best, summary.final, summary.picked
    line = [arm.label, *map(spread, values)]
    line.append(f"{summary.accepted.mean():.2f}")
    lines.append(line + [_share(summary.from_wrong)] * known)
  return aligned(lines)


def _share(values):
  return "" if values is None else f"{values.mean():.2f}"


def differences(part, arm, summaries: Summaries, measure: str):
  """Of a GAF arm, in one of `MEASURES`, to the plain mean and by kind to controls."""
  ours = summaries[arm.name]
  controls = {
    kind: _gap(ours, summaries[control.name], measure)
    for kind, control in part.controls(arm.name).items()
  }
  return _gap(ours, summaries["plain"], measure), controls


def comparison(part, summaries: Summaries) -> str:
  """A Markdown table of paired differences and what they allow to conclude."""
  arms = [arm for arm in part.arms if arm.is_gaf]
  used = {arm.control for arm in part.arms}
  kinds = [kind for kind in CONTROLS if kind in used]
  against = ["plain mean", *map(NAMES.get, kinds), "best rival"]
  lines = [["paired by seed", "accuracy", *(f"- {name}" for name in against)]]
  paragraphs = []
  for measure in MEASURES:
    found = {}
    for arm in arms:
      plain, controls = differences(part, arm, summaries, measure)
      rival, gap = against_best_rival(part, arm, summaries, measure)
      lines.append([arm.label, measure, str(plain)])
      lines[-1] += [str(controls.get(kind, "")) for kind in kinds]
      lines[-1].append(f"{gap} ({rival.label})")
      chance = [one for kind, one in controls.items() if kind != "loss"]
      if chance:
        found[arm.label] = plain, chance
    paragraphs.append(conclusion(measure, part.seeds, found))
  if part.wrong_sources:
    paragraphs.append(_sources(part, summaries))
  # The best rival is one of the others, or is compared for being the best.
  number = sum(bool(cell) for line in lines[1:] for cell in line[2:-1])
  if part.seeds >= FEWEST_SEEDS:
    paragraphs.append(
      f"A 95 % interval excludes zero by chance in 5 % of cases, so expect"
      f" {0.05 * number:.1f} of the {number} above to do so where there is no"
      " difference."
    )
  return "\n\n".join([aligned(lines), *paragraphs])


def overview(measure: str, results: list[tuple[Any, Summaries]]) -> str:
  """A Markdown table of a measure, a line for each arm of all parts but chance."""
  used = {arm.control for part, _ in results for arm in part.arms}
  kinds = [kind for kind in CONTROLS if kind in used]
  known = any(summaries["plain"].from_wrong is not None for _, summaries in results)
  header = ["", "accepted", *["of these wrong"] * known, "accuracy"]
  header += [f"- {name}" for name in ("plain", *map(NAMES.get, kinds), "best rival")]
  lines = [header]
  for part, summaries in results:
    lines.append([f"**{part.title}**", *[""] * (len(header) - 1)])
    for arm in part.arms:
      if arm.role == "chance":
        continue
      summary = summaries[arm.name]
      line = [arm.label, f"{summary.accepted.mean():.2f}"]
      line += [_share(summary.from_wrong)] * known
      line.append(spread(getattr(summary, measure)))
      plain, controls = differences(part, arm, summaries, measure)
      line.append("" if arm is PLAIN else plain.marked)
      line += [controls[kind].marked if kind in controls else "" for kind in kinds]
      line.append("")
      if arm.is_gaf:
        rival, gap = against_best_rival(part, arm, summaries, measure)
        line[-1] = f"{gap.marked} ({rival.label})"
      lines.append(line)
  return aligned(lines)


def against_best_rival(part, arm, summaries: Summaries, measure: str):
  """The simple way with the highest mean of a measure, and the difference to it."""
  rivals = [arm for arm in part.arms if arm.role == "rival"]
  mean = lambda rival: getattr(summaries[rival.name], measure).mean()
  best = max(rivals, key=mean)
  return best, _gap(summaries[arm.name], summaries[best.name], measure)


def _gap(ours, theirs, measure):
  return Difference.of(getattr(ours, measure), getattr(theirs, measure))


def conclusion(
  measure: str, seeds: int, versus: dict[str, tuple[Difference, list[Difference]]]
) -> str:
  """The sentence on one of `MEASURES`.

  `versus` has by arm its difference to the plain mean and to each of its controls.
  """
  start = f"{measure.capitalize()} accuracy: "
  if seeds < FEWEST_SEEDS:
    number = "one seed gives" if seeds == 1 else f"{seeds} seeds give"
    return start + (
      f"{number} no interval to tell the differences from chance, so they allow no"
      " conclusion."
    )
  alike: dict[tuple[int, int], list[str]] = {}
  for label, (plain, controls) in versus.items():
    alike.setdefault((plain.sign, against_all(controls)), []).append(label)
  said = [
    f"{_listed(alike[signs])} {verdict}"
    for signs, verdict in _VERDICTS.items()
    if signs in alike
  ]
  return start + (
    f"counting only differences whose 95 % confidence interval over the {seeds} seeds"
    " excludes zero, and all random controls as chance, " + "; ".join(said) + "."
  )


def against_all(controls: list[Difference]) -> int:
  """1 where the difference to every control is above zero, -1 where one is below."""
  signs = [control.sign for control in controls]
  return -1 if -1 in signs else min(signs, default=0)


def _listed(names):
  said = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
  return f"{said} {'is' if len(names) == 1 else 'are each'}"


def _sources(part, summaries):
  """The sentence on what was accepted, and on how much of the harm remains."""
  words = {1: "above", 0: "no different from", -1: "below"}
  share = part.wrong_sources / part.num_microbatches
  if "clean" not in summaries:
    return f"Wrong sources: they gave {share:.0%} of all micro-gradients."
  found = [f"Wrong sources: they gave {share:.0%} of all micro-gradients"]
  for arm in filter(lambda arm: arm.is_gaf, part.arms):
    ours = summaries[arm.name]
    if np.isnan(ours.from_wrong).all():
      continue  # Nothing was accepted.
    gap = Difference.of(ours.final, summaries["clean"].final)
    verdict = "" if gap.margin is None else f" ({words[gap.sign]} it)"
    found.append(
      f"{np.nanmean(ours.from_wrong):.0%} of what {arm.label} accepted, whose final"
      f" accuracy is {gap} against the plain mean with nothing wrong{verdict}"
    )
  return "; ".join(found) + "."
