"""Settings: the command line, and the comparison that runs without options."""

import argparse
import contextlib
import importlib.util
import json
import math

import data
import gaf_optax
import model as models
from data import UserError


def within(kind, low, high=math.inf, below=math.inf):
  """The `type` of an option: a number of at least `low`, at most `high`."""

  def convert(text):
    with contextlib.suppress(ValueError):
      if low <= (value := kind(text)) <= high and value < below:  # False for NaN.
        return value
    said = f"a number of at least {low}"
    if min(high, below) < math.inf:
      said += f", at most {high}" if high < below else f", below {below}"
    raise argparse.ArgumentTypeError(f"expected {said}, found {text!r}")

  return convert


def tau(text):
  with contextlib.suppress(ValueError):
    if text == "adaptive":
      return gaf_optax.adaptive_tau()
    if text.endswith("%"):
      return gaf_optax.tau_quantile(float(text[:-1]) / 100)
    if 0 <= (value := float(text)) <= 2:
      return value
  said = "a number from 0 to 2, a share such as 60%, or adaptive"
  raise argparse.ArgumentTypeError(f"expected {said}, found {text!r}")


RULES = ("sequential", "running_average", "leave_one_out", "most_neighbors", "majority")
RULES += ("nearest_neighbors", "geometric_median")
COUNT, SHARE, NOT_NEGATIVE = within(int, 1), within(float, 0, 1), within(float, 0)
# Options of an experiment: type or choices, default on digits, default on CIFAR, help.
EXPERIMENT = {
  "dataset": (data.DATASETS, "digits", "digits", ""),
  "model": (models.MODELS, "mlp", "resnet18", ""),
  "width": (COUNT, None, None, "of the hidden layers or the first stage"),
  "small_stem": (
    bool,
    False,
    False,
    "ResNets: a 3x3 first convolution instead of a 7x7 one",
  ),
  "noise": (SHARE, 0.0, 0.0, "share of the training labels that are flipped"),
  "noisy_labels": (str, None, None, "file of labels to train on, as of CIFAR-N"),
  "noisy_labels_key": (str, None, None, "the array in that file"),
  "wrong_sources": (
    within(int, 0),
    0,
    0,
    "number of microbatches with every label shifted by one",
  ),
  "tau": (tau, 0.97, 0.97, "a number from 0 to 2, a share such as 60%, or adaptive"),
  "rule": (RULES, "sequential", "sequential", ""),
  "memory_decay": (
    within(float, 0, below=1),
    None,
    None,
    "compare the mean cosines of all steps, for persistent sources",
  ),
  "last_layer": (bool, False, False, "compare the last layer's gradients only"),
  "num_microbatches": (within(int, 2), 8, 2, "number in a step"),
  "microbatch_size": (COUNT, 4, 100, "number of images"),
  "balanced": (bool, False, True, "equally many of each class in a microbatch"),
  "augment": (bool, False, True, "crop and mirror the training images"),
  "learning_rate": (NOT_NEGATIVE, 0.02, 0.01, "constant"),
  "weight_decay": (NOT_NEGATIVE, 0.0, 0.01, ""),
  "devices": (
    COUNT,
    None,
    None,
    "number that share the microbatches; on a CPU virtual ones",
  ),
  "rivals": (bool, False, False, "also the plain mean, chance and the smallest loss"),
}
SIZE = {
  "steps": (COUNT, 600, 50_000, "number of steps"),
  "eval_every": (COUNT, 25, 500, "number of steps between evaluations"),
  "seeds": (COUNT, 5, 1, "number of seeds, trained together"),
}
# In the order of training: the last two keep as many microbatches as GAF did.
METHODS = ("GAF", "plain mean", "chance, as many as GAF", "smallest loss, as many")
# The three parts of the comparison.
SOURCES = dict(tau=gaf_optax.adaptive_tau(), rule="majority", memory_decay=0.98)
SINGLE = dict(num_microbatches=128, microbatch_size=1, last_layer=True)
SINGLE |= dict(tau=gaf_optax.adaptive_tau(), rule="nearest_neighbors")
SINGLE |= dict(learning_rate=0.05)  # Higher, so that the plain mean memorizes soon.
PARTS = {
  "40 % of the labels flipped": dict(noise=0.4, **SINGLE),
  "3 of 8 sources always wrong": dict(wrong_sources=3, **SOURCES),
  "Nothing wrong": SOURCES,
}


DESCRIPTION = "Trains an image classifier with Gradient Agreement Filtering (GAF)."
FLAG = dict(action=argparse.BooleanOptionalAction)


def parse(argv) -> argparse.Namespace:
  """The options, None where not given; a bad one ends the program with code 2."""
  parser = argparse.ArgumentParser(prog="train.py", description=DESCRIPTION)
  parser.error = lambda said: parser.exit(2, f"train.py: {said} (see --help).\n")
  group = parser.add_argument_group("experiment (replaces the comparison on digits)")
  for name, (kind, digits, cifar, said) in {**EXPERIMENT, **SIZE}.items():
    if name == "steps":
      group = parser.add_argument_group("size")
    how = dict(type=kind, metavar="X")
    if kind is bool or isinstance(kind, tuple):
      how = dict(choices=kind) if kind is not bool else FLAG
    if digits or cifar:
      said += f"; default {digits}" + (f", on CIFAR {cifar}" if cifar != digits else "")
    said = said.removeprefix("; ").replace("%", "%%")
    group.add_argument("--" + name.replace("_", "-"), help=said, **how)
  group.add_argument(
    "--quick", action="store_true", help="a tenth of the steps, two seeds"
  )
  files = parser.add_argument_group("files")
  files.add_argument("--out", help="output directory; default a new runs/NAME-NUMBER")
  files.add_argument(
    "--resume", action="store_true", help="continue the run in --out, or the newest"
  )
  files.add_argument(
    "--data-dir", default="data", help="has the CIFAR archive; default data"
  )
  files.add_argument("--download", action="store_true", help="fetch a missing archive")
  files.add_argument(
    "--tensorboard", action="store_true", help="write OUT/tensorboard also"
  )
  how = dict(type=NOT_NEGATIVE, metavar="X", default=10.0)
  files.add_argument("--checkpoint-seconds", help="between two; default 10", **how)
  return parser.parse_args(argv)


def said(options) -> str:
  """The options that must not change when a run is resumed, as text."""
  names = sorted({*EXPERIMENT, *SIZE, "quick"})
  return json.dumps({name: str(getattr(options, name)) for name in names}, indent=2)


def parts(options) -> list[argparse.Namespace]:
  """The settings of the comparison's parts, or of the requested experiment."""
  given = {name: value for name, value in vars(options).items() if value is not None}
  dataset = given.get("dataset", "digits")
  column = 1 if dataset == "digits" else 2
  usual = {name: row[column] for name, row in {**EXPERIMENT, **SIZE}.items()}
  planned = {title: {"rivals": True, **part} for title, part in PARTS.items()}
  if given.keys() & EXPERIMENT.keys():
    planned = {f"{dataset}, {given.get('model', usual['model'])}": {}}
  found = []
  for title, part in planned.items():
    part = argparse.Namespace(**{**usual, **part, **given}, title=title)
    if options.quick:
      part.steps = options.steps or max(1, part.steps // 10)
      part.seeds = options.seeds or 2
    part.methods = METHODS if part.rivals else METHODS[:1]
    _check(part)
    found.append(part)
  return found


def _check(part):
  """Raises a `UserError` for options that do not go together."""
  k, digits = part.num_microbatches, part.dataset == "digits"
  for wrong, said in (
    (
      part.tensorboard and not importlib.util.find_spec("tensorboardX"),
      '--tensorboard needs tensorboardX: pip install "gaf_optax[tensorboard]".',
    ),
    (digits and part.noisy_labels, "--noisy-labels goes with CIFAR."),
    (digits and part.augment, "--augment goes with CIFAR."),
    (part.noisy_labels and part.noise, "--noisy-labels does not go with --noise."),
    (part.noisy_labels_key and not part.noisy_labels, "--noisy-labels is missing."),
    (part.wrong_sources > k, f"--wrong-sources is more than {k} microbatches."),
    (part.devices and part.rivals, "--devices does not go with --rivals."),
    (part.devices and part.last_layer, "--devices does not go with --last-layer."),
    (part.devices and k % part.devices, f"--devices must be a divisor of {k}."),
  ):
    if wrong:
      raise UserError(said)
