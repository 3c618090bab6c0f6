"""Options: the command line, checked, and the plan that follows from it."""

import argparse
import dataclasses

import labels
import models
import optimizers
import plan
from common import command
from common.arms import CLEAN, FREE_OF_TAU, PLAIN, SOFT_RULES, Arm, gaf_arms
from common.command import COUNT, INDEX
from plan import Part

SIZE = ("steps", "seeds", "eval_every")
# Any of these makes the command run one experiment of its own instead of the main job.
_OF_PART = [name for name in command.options_of(Part) if name not in SIZE]
_OF_ARM = command.options_of(Arm)
_DEFAULT_TAU = 0.97
# Ways to train that go with GAF and with the plain mean.
_WAYS = ("smoothing", "mixup", "ema_decay")
# What takes the place of a number, by the name of its option.
_THRESHOLDS = {
  "target": "target-accept-rate",
  "quantile": "tau-quantile",
  "adaptive": "adaptive-tau",
}


def _address(text):
  host, _, port = text.rpartition(":")
  if not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
    raise argparse.ArgumentTypeError(f"expected HOST:PORT, got {text!r}")
  return text


def add_size(parser, **helps: str) -> None:
  """The options of the size, with what their defaults are where it differs."""
  size = parser.add_argument_group("size")
  command.add_options(size, Part, SIZE, **helps)
  size.add_argument(
    "--quick",
    action="store_true",
    help="a tenth of the steps and two seeds, to see that it runs",
  )


def add_files(parser) -> None:
  """The options of what is read and written."""
  files = parser.add_argument_group("files")
  files.add_argument(
    "--data-dir",
    default="data",
    help="holds the CIFAR archive or its folder; default data",
  )
  files.add_argument(
    "--download", action="store_true", help="fetch a missing CIFAR archive"
  )
  command.add_output(files, "a new runs/NAME-NUMBER")


def parse(argv: list[str] | None) -> argparse.Namespace:
  """The options, None where one was not given; a bad one ends the program."""
  parser = command.Parser(
    prog="train.py",
    description=(
      "Plain averaging, GAF and its random controls side by side on the same"
      " microbatches. Without options of the experiment it runs the main job on"
      " scikit-learn's digits: label noise, wrong sources, and nothing wrong."
    ),
  )
  shape = parser.add_argument_group("experiment (any of these replaces the main job)")
  command.add_options(shape, Part, _OF_PART)
  command.add_options(shape, Arm, _OF_ARM)
  add_size(parser)
  spread = parser.add_argument_group("processes (with --devices)")
  spread.add_argument(
    "--processes",
    type=COUNT,
    help="that have an equal share of the devices each; started on this machine,"
    " unless --process-id is given",
  )
  spread.add_argument(
    "--process-id",
    metavar="I",
    type=INDEX,
    help="start only this one, on this machine; number 0 writes the files",
  )
  spread.add_argument(
    "--coordinator",
    metavar="HOST:PORT",
    type=_address,
    help="where the processes find number 0, a free port of its machine",
  )
  add_files(parser)
  options = parser.parse_args(argv)
  if wrong := _wrong_together(options):
    parser.error(wrong)
  return options


def _wrong_together(options) -> str | None:
  """What is wrong with options that go together, or None."""
  k, taus = _num_microbatches(options), options.tau or ()
  model = options.model or _default_model(options.dataset)
  cifar = None if _is_digits(options.dataset) else options.dataset
  rule = options.rule or _default_rule(options)
  mixed = options.by_example or options.microbatch_size != 1
  soft = not options.softness or rule in SOFT_RULES
  plateau = options.optimizer == optimizers.PLATEAU
  free, alone = rule in FREE_OF_TAU, not models.KINDS[model].normalizes
  free_rules = f"--rule {', '.join(FREE_OF_TAU)}"
  devices, processes, process = options.devices, options.processes, options.process_id
  confusable = (options.dataset or Part.dataset) in labels.CONFUSED
  cifars, soft_rules = "cifar10 or cifar100", ", ".join(SOFT_RULES)
  # Options and what each needs.
  for name, needed, said in (
    ("noisy_labels", cifar, f"--dataset {cifars}"),
    ("noisy_labels_key", options.noisy_labels, "--noisy-labels"),
    ("wrong_kind", options.wrong_sources, "--wrong-sources"),
    ("asymmetric", options.label_noise, "--label-noise"),
    ("asymmetric", confusable, f"--dataset {' or '.join(labels.CONFUSED)}"),
    ("augment", cifar, f"--dataset {cifars}"),
    ("mixup", mixed, "microbatches of at least 2 images"),
    ("plateau_patience", plateau, f"--optimizer {optimizers.PLATEAU}"),
    ("softness", soft, f"--rule {soft_rules}"),
    ("quantile", free, free_rules),
    ("adaptive", free, free_rules),
    ("persistent", options.wrong_sources, "--wrong-sources"),
    ("by_example", alone, "a model without BatchNorm, as mlp or vit"),
    ("coordinator", processes, "--processes"),
    ("process_id", processes, "--processes"),
    ("processes", devices, "--devices"),
  ):
    if getattr(options, name) is not None and not needed:
      return f"{_flag(name)} goes with {said}"
  # Options, and others that they do not go with.
  stateful = ("target", "anchor_decay", "memory_decay")
  for name, others in (
    ("by_example", (*stateful, "by_leaf", "devices")),
    ("memory_decay", ("anchor_decay",)),
    ("mixup", ("devices",)),
  ):
    for other in others:
      if getattr(options, name) is not None and getattr(options, other) is not None:
        return f"{_flag(name)} does not go with {_flag(other)}"
  if models.KINDS[model].on_patches:
    if options.augment or options.wrong_kind == "normalization":
      return f"--model {model} takes features, which have no pixels to change"
  if options.wrong_kind == plan.HUMAN and not options.noisy_labels:
    return f"--wrong-kind {plan.HUMAN} goes with --noisy-labels"
  if options.by_example and options.wrong_kind == "stale":
    return "--by-example does not go with --wrong-kind stale"
  if (options.wrong_sources or 0) > k:
    return f"--wrong-sources {options.wrong_sources} is more than the {k} microbatches"
  if options.anchor_decay is not None and (options.rule or options.softness):
    return "--anchor-decay replaces --rule and --softness"
  if len(set(taus)) < len(taus):
    return "--tau has the same value twice"
  if devices and k < 2:
    said = "leaves nothing to compare; give more of either"
    return f"--devices 1 with one microbatch {said}"
  if devices and k % devices:
    return f"--num-microbatches {k} is not a multiple of --devices {devices}"
  if processes and devices % processes:
    return f"--devices {devices} is not a multiple of --processes {processes}"
  if (options.coordinator is None) != (process is None):
    return "--coordinator and --process-id go together"
  if process is not None and process >= processes:
    return f"--process-id {process} is not below --processes {processes}"
  return wrong_width(model, options.width)


def _flag(name):
  return "--" + _THRESHOLDS.get(name, name).replace("_", "-")


def wrong_width(model: str, width: int | None) -> str | None:
  """What is wrong with a width of a model, or None."""
  divisor = models.KINDS[model].divisor
  if width and width % divisor:
    return f"--width {width} is not a multiple of {divisor}, as {model} needs"
  return None


def _is_digits(dataset):
  return (dataset or Part.dataset) == "digits"


def _default_model(dataset):
  return "mlp" if _is_digits(dataset) else "resnet18"


def _default_rule(options):
  return "nearest_neighbors" if options.by_example else "sequential"


def _num_microbatches(options):
  return options.num_microbatches or options.devices or Part.num_microbatches


def given(options: argparse.Namespace, names) -> dict:
  """What was given of some options."""
  values = {name: getattr(options, name) for name in names}
  return {name: value for name, value in values.items() if value is not None}


def is_main_job(options: argparse.Namespace) -> bool:
  return not given(options, [*_OF_PART, *_OF_ARM])


def run_name(options: argparse.Namespace) -> str:
  return "main" if is_main_job(options) else options.dataset or Part.dataset


def sized(part: Part, options: argparse.Namespace) -> Part:
  """The part with the size that the options ask for."""
  size = given(options, SIZE)
  if options.quick:
    size = {"steps": max(1, part.steps // 10), "seeds": 2, **size}
  return dataclasses.replace(part, **size)


def parts(options: argparse.Namespace) -> tuple[Part, ...]:
  """What the options ask for."""
  if is_main_job(options):
    return tuple(sized(part, options) for part in plan.main_job())
  settings = given(options, _OF_PART)
  settings["num_microbatches"] = k = _num_microbatches(options)
  settings.setdefault("model", _default_model(options.dataset))
  gaf = given(options, _OF_ARM)
  gaf.setdefault("rule", _default_rule(options))
  taus = gaf.pop("tau", [_DEFAULT_TAU])
  arms = [PLAIN]
  if also := {name: gaf[name] for name in _WAYS if name in gaf}:
    arms.append(Arm("plain_too", "plain mean, the same ways", **also))
  for one in [{}] if gaf.keys() & _THRESHOLDS else [{"tau": tau} for tau in taus]:
    arms += gaf_arms(k, **gaf, **one)
  if settings.get("wrong_sources"):
    arms.append(CLEAN)
  part = Part(name="experiment", title="", arms=tuple(arms), **settings)
  return tuple(plan.titled([sized(part, options)]))
