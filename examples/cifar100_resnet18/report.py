"""Report: tables and sentences, computed from the metrics and traces of a run."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from common.arms import CONTROLS
from common.tables import FEWEST_SEEDS, Difference, aligned, spread, write_results

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
  ): "above the plain mean, but not told apart from chance: how much is left out is"
  " enough to explain it",
  (1, -1): "above the plain mean, but below chance: leaving out as much at random does"
  " better",
  (0, 1): "not told apart from the plain mean, though above chance",
  (0, 0): "told apart neither from the plain mean nor from chance",
  (0, -1): "not told apart from the plain mean, and below chance",
  (-1, 1): "below the plain mean, though above chance: it chooses well, but leaving out"
  " as much costs more",
  (-1, 0): "below the plain mean, and not told apart from chance",
  (-1, -1): "below the plain mean and below chance",
}


@dataclasses.dataclass(frozen=True)
class Summary:
  """What an arm came to; float arrays `[seeds]`.

  Attributes:
    best: the highest test accuracy of all evaluations.
    final: the test accuracy after the last step.
    accepted: the accepted share of all micro-gradients.
    updates: steps that changed the weights.
    late_distance: mean cosine distance in the last tenth of the steps; NaN if nothing
      was compared.
    from_wrong: the share of the accepted that came from wrong sources, NaN if
      nothing was accepted; None where no source is wrong.
  """

  best: np.ndarray
  final: np.ndarray
  accepted: np.ndarray
  updates: np.ndarray
  late_distance: np.ndarray
  from_wrong: np.ndarray | None = None


def write(path: pathlib.Path, experiments: list[Any], rows: list[dict]) -> str:
  """Writes `results.md` and `results.csv`; returns the text of the former.

  Args:
    path: of the output directory.
    experiments: what has run.
    rows: the lines of the metrics file.
  """
  texts, table = [], []
  for experiment in experiments:
    part, summaries = experiment.part, summarize(experiment, rows)
    paragraphs = f"## {part.title}", size(part), results_table(part, summaries)
    texts.append("\n\n".join([*paragraphs, comparison(part, summaries)]) + "\n")
    table += csv_rows(part, summaries)
  return write_results(path, "\n".join(texts), table)


def write_overview(path: pathlib.Path, title: str, results: list[Any]) -> str:
  """Writes `results.md` and `results.csv` of many parts; returns the former's text.

  Args:
    path: of the output directory.
    title: of the whole.
    results: experiments and their summaries.
  """
  of_parts = [(experiment.part, summaries) for experiment, summaries in results]
  paragraphs = [f"## {title}", _sizes([part for part, _ in of_parts])]
  if any(arm.is_gaf for arm in of_parts[0][0].arms):
    paragraphs.append(
      "Differences: paired by seed, mean ± half of the 95 % confidence interval, bold"
      " where it leaves out zero."
    )
    for measure in ("final", "best"):
      said = f"{measure.capitalize()} test accuracy:"
      paragraphs += [said, overview(measure, of_parts)]
  else:
    lines = [["plain mean", "best", "final", "distance in the last tenth"]]
    for part, summaries in of_parts:
      plain = summaries["plain"]
      values = plain.best, plain.final, plain.late_distance
      lines.append([part.title, *map(spread, values)])
    paragraphs.append(aligned(lines))
  table = [row for pair in of_parts for row in csv_rows(*pair)]
  return write_results(path, "\n\n".join(paragraphs) + "\n", table)


def _sizes(parts):
  """What parts share of how much was trained, and where they differ."""
  if len({size(part) for part in parts}) == 1:
    return size(parts[0])
  return "\n".join(f"- {part.title}: {size(part)}" for part in parts)


def csv_rows(part, summaries: dict[str, Summary]) -> list[dict]:
  """A dict for each arm and seed of a part."""
  columns = {
    "best_accuracy": "best",
    "final_accuracy": "final",
    "accepted": "accepted",
    "updates": "updates",
    "late_distance": "late_distance",
  }
  return [
    {"part": part.name, "arm": arm, "seed": seed}
    | {name: getattr(summary, field)[seed] for name, field in columns.items()}
    for arm, summary in summaries.items()
    for seed in range(part.seeds)
  ]


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


def summarize(experiment: Any, rows: list[dict]) -> dict[str, Summary]:
  """A `Summary` for each arm of a part, by name.

  Args:
    experiment: an `Experiment` that has run.
    rows: the lines of the metrics file.
  """
  part = experiment.part
  wrong = np.stack([schedule.wrong for schedule in experiment.schedules])
  curves: dict[tuple[str, int], list[float]] = {}
  for row in rows:
    if row["part"] == part.name:
      key = row["arm"], row["seed"]
      curves.setdefault(key, []).append(row["test_accuracy"])
  summaries = {}
  for arm in part.arms:
    accuracy = np.array([curves[arm.name, seed] for seed in range(part.seeds)])
    accepted = experiment.traces[arm.name].accepted
    number = accepted.sum(axis=(1, 2))
    from_wrong = None
    if part.wrong_sources and not arm.clean:
      share = (accepted & wrong).sum(axis=(1, 2)) / np.maximum(number, 1)
      from_wrong = np.where(number > 0, share, np.nan)
    summaries[arm.name] = Summary(
      best=accuracy.max(axis=1),
      final=accuracy[:, -1],
      accepted=accepted.mean(axis=(1, 2)),
      updates=accepted.any(axis=2).sum(axis=1),
      late_distance=_late(experiment.traces[arm.name].distance),
      from_wrong=from_wrong,
    )
  return summaries


def _late(distance):
  late = distance[:, -max(1, distance.shape[1] // 10) :]
  number = np.isfinite(late).sum(axis=1)
  total = np.sum(late, axis=1, where=np.isfinite(late))
  return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def results_table(part, summaries: dict[str, Summary]) -> str:
  """A Markdown table with a line for each arm."""
  header = ["", "best test accuracy", "final test accuracy", "accepted"]
  if part.wrong_sources:
    header.append("of these from wrong sources")
  lines = [header]
  for arm in part.arms:
    summary = summaries[arm.name]
    line = [
      arm.label,
      spread(summary.best),
      spread(summary.final),
      f"{summary.accepted.mean():.2f}",
    ]
    if part.wrong_sources:
      shares = summary.from_wrong
      line.append("" if shares is None else f"{shares.mean():.2f}")
    lines.append(line)
  return aligned(lines)


def comparison(part, summaries: dict[str, Summary]) -> str:
  """A Markdown table of paired differences and what they allow to conclude."""
  arms = [arm for arm in part.arms if arm.is_gaf]
  kinds = [kind for kind in CONTROLS if kind in part.controls(arms[0].name)]
  header = ["paired by seed"]
  lines: list[list[str]] = [[arm.label] for arm in arms]
  paragraphs = []
  for measure in ("final", "best"):
    header += [
      f"{measure}, against {name}"
      for name in ("plain", *(f"random {kind}" for kind in kinds))
    ]
    found = {}
    for arm, line in zip(arms, lines):
      plain, controls = differences(part, arm, summaries, measure)
      line += map(str, (plain, *(controls[kind] for kind in kinds)))
      found[arm.label] = plain, list(controls.values())
    paragraphs.append(conclusion(measure, part.seeds, found))
  if part.wrong_sources:
    paragraphs.append(_sources(part, summaries))
  number = (len(header) - 1) * len(lines)
  if part.seeds >= FEWEST_SEEDS:
    paragraphs.append(
      f"A 95 % interval leaves out zero by chance in 5 % of cases, so expect"
      f" {0.05 * number:.1f} of the {number} above to do so where there is no"
      " difference."
    )
  return "\n\n".join([aligned([header, *lines]), *paragraphs])


def overview(measure: str, results: list[tuple[Any, dict[str, Summary]]]) -> str:
  """A Markdown table with a line for each GAF arm of several parts.

  Args:
    measure: 'final' or 'best'.
    results: parts and their summaries.
  """
  parts = [part for part, _ in results]
  kinds = [
    kind
    for kind in CONTROLS
    if any(arm.control == kind for part in parts for arm in part.arms)
  ]
  sourced = any(part.wrong_sources for part in parts)
  header = ["", "accepted", *["of these wrong"] * sourced, "plain mean", "GAF"]
  header += [
    f"GAF - {name}" for name in ("plain", *(f"random {kind}" for kind in kinds))
  ]
  lines = [header]
  for part, summaries in results:
    plain = getattr(summaries["plain"], measure)
    clean = summaries.get("clean")
    said = f"**{part.title}**"
    if clean is not None:
      said += f"; with nothing wrong {getattr(clean, measure).mean():.3f}"
    arms = [arm for arm in part.arms if arm.is_gaf]
    empty = [""] * (len(header) - 4 - sourced)
    lines.append([said, "", *[""] * sourced, spread(plain), "", *empty])
    for arm in arms:
      summary = summaries[arm.name]
      against, controls = differences(part, arm, summaries, measure)
      wrong = "" if summary.from_wrong is None else f"{summary.from_wrong.mean():.2f}"
      lines.append(
        [
          arm.label,
          f"{summary.accepted.mean():.2f}",
          *[wrong] * sourced,
          "",
          spread(getattr(summary, measure)),
          against.marked,
          *(controls[kind].marked if kind in controls else "" for kind in kinds),
        ]
      )
  return aligned(lines)


def differences(part, arm, summaries: dict[str, Summary], measure: str):
  """Of an arm, to the plain mean and by kind to each control.

  Args:
    part: the setting.
    arm: a GAF arm of it.
    summaries: by name of the arm.
    measure: 'final' or 'best'.
  """
  of = lambda name: getattr(summaries[name], measure)
  controls = {
    kind: Difference.of(of(arm.name), of(control.name))
    for kind, control in part.controls(arm.name).items()
  }
  return Difference.of(of(arm.name), of("plain")), controls


def conclusion(
  measure: str,
  seeds: int,
  versus: dict[str, tuple[Difference, list[Difference]]],
) -> str:
  """The sentence on one measure.

  Args:
    measure: 'final' or 'best'.
    seeds: how many there are.
    versus: by arm, its difference to the plain mean and to each of its controls.
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
    " leaves out zero, and as chance all random controls, " + "; ".join(said) + "."
  )


def against_all(controls: list[Difference]) -> int:
  """1 where the difference to every control is above zero, -1 where one is below."""
  signs = [control.sign for control in controls]
  return -1 if -1 in signs else min(signs, default=0)


def _sources(part, summaries):
  """The sentence on what was accepted, and on how much of the harm remains."""
  words = {1: "above", 0: "not told apart from", -1: "below"}
  found = []
  for arm in part.arms:
    if not arm.is_gaf:
      continue
    ours = summaries[arm.name]
    if np.isnan(ours.from_wrong).all():
      continue  # Nothing was accepted.
    gap = Difference.of(ours.final, summaries["clean"].final)
    verdict = "" if gap.margin is None else f" ({words[gap.sign]} it)"
    found.append(
      f"{np.nanmean(ours.from_wrong):.0%} of what"
      f" {arm.label} accepted, whose final accuracy is"
      f" {gap} against the plain mean with nothing wrong{verdict}"
    )
  share = part.wrong_sources / part.num_microbatches
  return (
    "; ".join([f"Wrong sources: they gave {share:.0%} of all micro-gradients", *found])
    + "."
  )


def _listed(names):
  said = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
  return f"{said} {'is' if len(names) == 1 else 'are each'}"
