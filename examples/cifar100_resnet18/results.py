"""Results: the output directory, and the final table, sentences and pictures."""

import csv
import pathlib
import re
import shutil
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import scipy.stats
from matplotlib.figure import Figure

import settings
from data import UserError

FIELDS = ("part", "method", "seed", "step", "train_loss", "test_loss", "test_accuracy")
FIELDS += ("kept", "skipped_steps", "cosine_distance")


class Run:
  """The output directory: options.json, checkpoints, metrics.csv, TensorBoard."""

  def __init__(self, options, name: str):
    ends = [p.name.rpartition("-")[2] for p in pathlib.Path("runs").glob(f"{name}-*")]
    newest = max((int(end) for end in ends if end.isdecimal()), default=0)
    usual = f"runs/{name}-{max(1, newest + (not options.resume))}"
    self.path, said = pathlib.Path(options.out or usual), settings.said(options)
    file = self.path / "options.json"
    try:
      if options.resume and not (file.is_file() and file.read_text() == said):
        raise UserError(f"{self.path} has no run with these options to resume.")
      self.path.mkdir(parents=True, exist_ok=True)
      if not options.resume and any(self.path.iterdir()):
        raise UserError(f"{self.path} is not empty; add --resume or change --out.")
      file.write_text(said)
    except OSError as error:
      raise UserError(f"{self.path} cannot be used: {error.strerror}.") from error
    self._checkpoints = ocp.CheckpointManager(
      (self.path / "checkpoints").absolute(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=1, enable_async_checkpointing=False
      ),
    )
    self._seconds, self._saved = options.checkpoint_seconds, time.monotonic()
    self.resumed_from = self._checkpoints.latest_step()
    self.rows, self._tensorboard = [], None
    self.progress = {"line": 0, "step": 0}
    if self.resumed_from is not None:
      self.progress = self._restore(ocp.args.JsonRestore(), "progress")
      self.rows = self.progress.pop("rows")
    if options.tensorboard:
      import tensorboardX  # Optional.

      shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
      self._tensorboard = tensorboardX.SummaryWriter(str(self.path / "tensorboard"))
    self._file = open(self.path / "metrics.csv", "w", newline="", encoding="utf-8")
    self._csv = csv.DictWriter(self._file, FIELDS)
    self._csv.writeheader()
    self._write(self.rows)

  def log(self, rows: list[dict]) -> None:
    self.rows += rows
    self._write(rows)

  def _write(self, rows):
    self._csv.writerows(rows)
    self._file.flush()
    for row in rows if self._tensorboard else ():
      for name in FIELDS[4:]:
        tag = f"{row['part']}/{row['method']}/{name}/seed {row['seed']}"
        self._tensorboard.add_scalar(tag, row[name], row["step"])

  def save(self, number: int, arrays, now: bool, **progress) -> None:
    """Saves a checkpoint if the newest one is old; `number` increases."""
    if now or time.monotonic() - self._saved >= self._seconds:
      progress = ocp.args.JsonSave({**progress, "rows": self.rows})
      arrays = ocp.args.StandardSave(jax.tree.map(np.asarray, arrays))
      args = ocp.args.Composite(arrays=arrays, progress=progress)
      self._checkpoints.save(number, args=args)
      self._saved = time.monotonic()

  def restore(self, like):
    """Restores arrays like those in `like` from the newest checkpoint."""
    like = jax.tree.map(np.asarray, like)
    return self._restore(ocp.args.StandardRestore(like), "arrays")

  def _restore(self, how, name):
    try:
      args = ocp.args.Composite(**{name: how})
      return self._checkpoints.restore(self.resumed_from, args=args)[name]
    except Exception as error:  # For a damaged one, Orbax can raise nearly anything.
      raise UserError(f"the checkpoint in {self.path} is damaged.") from error

  def close(self) -> None:
    self._file.close()
    self._checkpoints.close()
    if self._tensorboard:
      self._tensorboard.close()


# The methods in the order of the table; any color vision can tell the colors apart.
COLORS = {
  "plain mean": "black",
  "chance, as many as GAF": "#D55E00",
  "GAF": "#0072B2",
  "smallest loss, as many": "#009E73",
}


def curve(rows, part, method, field):
  """Steps `[n]` and values `[n, seeds]` of a field of the metrics."""
  rows = [row for row in rows if (row["part"], row["method"]) == (part, method)]
  steps = np.unique([int(row["step"]) for row in rows])
  return steps, np.array([row[field] for row in rows], float).reshape(len(steps), -1)


def report(rows: list[dict], out: pathlib.Path) -> str:
  """Draws a picture of each part; returns a table, a sentence for each, their names."""
  table = [("part", "method", "final test accuracy", "kept", "against chance")]
  table += [["---"] * len(table[0])]
  sentences, pictures = [], []
  for part in dict.fromkeys(row["part"] for row in rows):
    found = {row["method"] for row in rows if row["part"] == part}
    final = {
      method: curve(rows, part, method, "test_accuracy")[1][-1]
      for method in COLORS
      if method in found
    }
    chance = final.get("chance, as many as GAF")
    for i, (method, values) in enumerate(final.items()):
      spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
      kept = curve(rows, part, method, "kept")[1].mean()
      cells = f"{values.mean():.3f}{spread}", f"{kept:.0%}"
      against = "" if chance is None or values is chance else _said(values - chance)
      table.append(("" if i else part, method, *cells, against))
    sentences.append(f"{part}: GAF {_sentence(final)}.")
    pictures.append(_draw(rows, part, final, out))
  said = [*_aligned(table), "", *sentences, "", f"Plots: {', '.join(pictures)}"]
  return "\n".join(said)


def _half(differences):
  """Half of the 95 % interval of differences `[seeds]` (Student's t)."""
  n = len(differences)
  error = differences.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
  return scipy.stats.t.ppf(0.975, n - 1) * error


def _said(differences):
  spread = f" ± {_half(differences):.3f}" if len(differences) > 1 else ""
  return f"{differences.mean():+.3f}{spread}"


def _sentence(final):
  said = []
  for method, values in final.items():
    if method != "GAF":
      difference = final["GAF"] - values
      verb = "beats" if difference.mean() > 0 else "loses to"
      if not abs(difference.mean()) > _half(difference):  # Or there is one seed.
        verb = "ties with"
      name = method.split(",")[0]
      name = name if name == "chance" else f"the {name}"
      said.append(f"{verb} {name} ({_said(difference)})")
  return ", ".join(said) or f"ends at {final['GAF'].mean():.3f}"


def _aligned(table):
  widths = [max(map(len, column)) for column in zip(*table)]
  for row in table:
    padded = (
      f"{cell:{'-' if cell == '---' else ''}<{w}}" for cell, w in zip(row, widths)
    )
    yield f"| {' | '.join(padded)} |"


def _draw(rows, part, methods, out):
  figure = Figure(figsize=(6, 4), layout="constrained", dpi=150)
  axes = figure.subplots()
  for method in methods:
    steps, values = curve(rows, part, method, "test_accuracy")
    mean, color = values.mean(axis=1), COLORS[method]
    axes.plot(steps, mean, color=color, label=method)
    if values.shape[1] > 1:
      spread = values.std(axis=1, ddof=1)
      axes.fill_between(steps, mean - spread, mean + spread, color=color, alpha=0.15)
  axes.set(title=part, xlabel="step", ylabel="test accuracy, mean ± standard deviation")
  axes.grid(alpha=0.3)
  axes.legend(frameon=False)
  path = out / f"{re.sub(r'[^a-z0-9]+', '_', part.lower())}.png"
  figure.savefig(path)
  return str(path)
