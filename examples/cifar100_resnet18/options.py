"""Options: the command line, checked, and the plan that follows from it."""

import argparse
import dataclasses
import math

import models
import plan
import training

# Any of these makes the command run one experiment of its own, with these defaults
# for the rest, instead of the main job.
SHAPING = {
  **{
    field.name: field.default
    for field in dataclasses.fields(plan.Part)
    if field.name not in ("name", "title", "arms", "steps", "seeds", "eval_every")
  },
  "model": None,
  "tau": None,
  "target_accept_rate": None,
  "rule": "sequential",
  "softness": 0.0,
  "anchor_decay": None,
  "by_leaf": False,
}
_DEFAULT_TAU = 0.97
# These say where and how, not what: a run may be resumed with others.
_UNCOMPARED = (
  "out",
  "resume",
  "download",
  "checkpoint_seconds",
  "tensorboard",
  "wandb",
  "processes",
  "coordinator",
  "process_id",
)


class Parser(argparse.ArgumentParser):
  def error(self, message):
    self.exit(2, f"{self.prog}: {message.rstrip('.')}. See {self.prog} --help.\n")


class _Flag(argparse.Action):
  """True where the flag is given and None, not False, where it is not."""

  def __init__(self, option_strings, dest, **kwargs):
    super().__init__(option_strings, dest, nargs=0, **kwargs)

  def __call__(self, parser, namespace, values, option_string=None):
    setattr(namespace, self.dest, True)


def _number(kind, what, accept):
  def convert(text):
    try:
      value = kind(text)
    except ValueError:
      value = math.nan
    # NaN fails every comparison, and so every check.
    if not accept(value):
      raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
    return value

  return convert


_COUNT = _number(int, "a whole number of at least 1", lambda n: n >= 1)
_INDEX = _number(int, "a whole number of at least 0", lambda n: n >= 0)
_SHARE = _number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)


def _address(text):
  host, _, port = text.rpartition(":")
  if not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
    raise argparse.ArgumentTypeError(f"expected HOST:PORT, got {text!r}")
  return text


def add_model(group) -> None:
  """The options of the model."""
  group.add_argument(
    "--model", choices=tuple(models.KINDS), help="mlp for digits, else resnet18"
  )
  group.add_argument(
    "--width",
    type=_COUNT,
    help="of hidden layers, the first stage or tokens; default: the usual one",
  )
  group.add_argument(
    "--depth",
    type=_COUNT,
    help="hidden layers, blocks of each stage or transformer layers",
  )


def add_size(parser, steps: str, seeds: str, eval_every: str) -> None:
  """The options of the size, with what their defaults are, in words."""
  size = parser.add_argument_group("size")
  size.add_argument("--steps", type=_COUNT, help=f"default {steps}")
  size.add_argument("--seeds", type=_COUNT, help=f"default {seeds}")
  size.add_argument(
    "--eval-every",
    type=_COUNT,
    metavar="STEPS",
    help=f"default {eval_every}",
  )
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
  files.add_argument("--out", help="output directory; default a new runs/NAME-NUMBER")
  files.add_argument(
    "--resume",
    action="store_true",
    help="go on with the run in --out (default: the newest runs/NAME-NUMBER)",
  )
  files.add_argument(
    "--checkpoint-seconds",
    default=10.0,
    metavar="SECONDS",
    type=_number(float, "a number of at least 0", lambda x: 0 <= x < math.inf),
    help="time between checkpoints; default 10",
  )
  files.add_argument(
    "--tensorboard", action="store_true", help="curves in OUT/tensorboard too"
  )
  files.add_argument(
    "--wandb", metavar="PROJECT", help="curves in a project of Weights & Biases too"
  )


def parse(argv: list[str] | None) -> argparse.Namespace:
  """The options; a bad one ends the program with a sentence and exit code 2.

  Args:
    argv: the command line without the program, None for the process's own.

  Returns:
    A namespace with one value for each option, None where it was not given.
  """
  parser = Parser(
    prog="train.py",
    description=(
      "Plain averaging, GAF and its random control side by side on the same"
      " microbatches. Without options of the experiment it runs the main job on"
      " scikit-learn's digits: label noise, then wrong sources."
    ),
  )
  shape = parser.add_argument_group("experiment (any of these replaces the main job)")
  shape.add_argument("--dataset", choices=("digits", "cifar10", "cifar100"))
  shape.add_argument(
    "--train-images", metavar="N", type=_COUNT, help="use only the first N of them"
  )
  noise = shape.add_mutually_exclusive_group()
  noise.add_argument(
    "--label-noise",
    type=_SHARE,
    metavar="SHARE",
    help="share of the training labels given another class at random",
  )
  noise.add_argument(
    "--random-labels",
    action=_Flag,
    help="draw all training labels at random, from all classes",
  )
  noise.add_argument(
    "--noisy-labels",
    metavar="FILE",
    help=".npz, .npy or .pt file of labels to train on (CIFAR-10N, CIFAR-100N)",
  )
  shape.add_argument(
    "--noisy-labels-key", metavar="KEY", help="which array of that file"
  )
  shape.add_argument(
    "--wrong-sources",
    metavar="N",
    type=_INDEX,
    help="how many of each step's microbatches, other ones each time, have something"
    " wrong",
  )
  shape.add_argument(
    "--wrong-kind",
    choices=tuple(plan.CORRUPTIONS),
    help="what is wrong with them; default shifted-labels: each label by one",
  )
  shape.add_argument(
    "--augment",
    action=_Flag,
    help="crop (4 pixels around) and mirror the training images at random",
  )
  add_model(shape)
  shape.add_argument(
    "--optimizer", choices=tuple(training.OPTIMIZERS), help="default momentum (0.9)"
  )
  shape.add_argument(
    "--learning-rate",
    metavar="RATE",
    help="default 0.02",
    type=_number(float, "a number above 0", lambda x: 0 < x < math.inf),
  )
  shape.add_argument(
    "--weight-decay",
    metavar="DECAY",
    help="default 0, with adamw 0.01",
    type=_number(float, "a number of at least 0", lambda x: 0 <= x < math.inf),
  )
  shape.add_argument(
    "--plateau-patience",
    metavar="N",
    type=_COUNT,
    help="evaluations without a lower test loss after which nesterov-plateau divides"
    " the learning rate by ten; default 10",
  )
  threshold = shape.add_mutually_exclusive_group()
  threshold.add_argument(
    "--tau",
    nargs="+",
    help=f"one arm for each; default {_DEFAULT_TAU}",
    type=_number(
      float,
      "a cosine distance from 0 to below 2 (2 is the plain mean, which always runs)",
      lambda x: 0 <= x < 2,
    ),
  )
  threshold.add_argument(
    "--target-accept-rate",
    type=_SHARE,
    metavar="SHARE",
    help="steer tau to accept this share of the micro-gradients",
  )
  shape.add_argument(
    "--rule",
    choices=tuple(plan.RULES),
    help="default sequential; min_neighbors asks for half of them",
  )
  shape.add_argument(
    "--softness",
    metavar="S",
    help="weights sigmoid((tau - distance) / S) instead of 0 and 1",
    type=_number(float, "a number of at least 0", lambda x: 0 <= x < math.inf),
  )
  shape.add_argument(
    "--anchor-decay",
    metavar="DECAY",
    help="compare with a moving average of gradients instead",
    type=_number(float, "a number from 0 to below 1", lambda x: 0 <= x < 1),
  )
  shape.add_argument(
    "--by-leaf", action=_Flag, help="filter each parameter array on its own"
  )
  shape.add_argument("--microbatch-size", type=_COUNT, help="images; default 10")
  shape.add_argument(
    "--balanced",
    action=_Flag,
    help="equally many images of each class in a microbatch, drawn anew in each step",
  )
  shape.add_argument(
    "--num-microbatches",
    help="in a step; default 2, or one for each device",
    type=_number(int, "a whole number of at least 2", lambda n: n >= 2),
  )
  shape.add_argument(
    "--devices",
    type=_COUNT,
    help="that share the microbatches of each step; on a CPU virtual ones",
  )

  add_size(parser, "4000 (main job: and 1500)", "3 (main job: 5)", "100 (and 50)")

  spread = parser.add_argument_group("processes (with --devices)")
  spread.add_argument(
    "--processes",
    type=_COUNT,
    help="that have an equal share of the devices each; started on this machine,"
    " unless --process-id is given",
  )
  spread.add_argument(
    "--process-id",
    metavar="I",
    type=_INDEX,
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
  _check_together(parser, options)
  return options


def _check_together(parser, options):
  if options.noisy_labels and options.dataset not in ("cifar10", "cifar100"):
    parser.error("--noisy-labels goes with --dataset cifar10 or cifar100")
  if options.noisy_labels_key and not options.noisy_labels:
    parser.error("--noisy-labels-key goes with --noisy-labels")
  k = _num_microbatches(options)
  if (options.wrong_sources or 0) > k:
    parser.error(
      f"--wrong-sources {options.wrong_sources} is more than the {k} microbatches"
    )
  if options.wrong_kind and not options.wrong_sources:
    parser.error("--wrong-kind goes with --wrong-sources")
  if options.augment and (options.dataset or "digits") == "digits":
    parser.error("--augment goes with --dataset cifar10 or cifar100")
  if options.plateau_patience and options.optimizer != training.PLATEAU:
    parser.error(f"--plateau-patience goes with --optimizer {training.PLATEAU}")
  if options.softness and (options.rule or "sequential") not in plan.SOFT_RULES:
    parser.error(f"--softness goes with --rule {', '.join(plan.SOFT_RULES)}")
  if options.anchor_decay is not None and (options.rule or options.softness):
    parser.error("--anchor-decay replaces --rule and --softness")
  if wrong := wrong_width(
    options.model or default_model(options.dataset), options.width
  ):
    parser.error(wrong)
  if options.tau and len(set(options.tau)) < len(options.tau):
    parser.error("--tau has the same value twice")
  if options.devices is not None:
    if k < 2:
      parser.error(
        "--devices 1 with one microbatch leaves nothing to compare; give more of either"
      )
    if k % options.devices:
      parser.error(
        f"--num-microbatches {k} is not a multiple of --devices {options.devices}"
      )
  _check_processes(parser, options)


def wrong_width(model: str, width: int | None) -> str | None:
  """What is wrong with a width of a model, or None."""
  divisor = models.KINDS[model].divisor
  if width and width % divisor:
    return f"--width {width} is not a multiple of {divisor}, as {model} needs"
  return None


def default_model(dataset: str | None) -> str:
  return "mlp" if (dataset or "digits") == "digits" else "resnet18"


def _check_processes(parser, options):
  if options.processes is None:
    for name in ("coordinator", "process_id"):
      if getattr(options, name) is not None:
        parser.error(f"--{name.replace('_', '-')} goes with --processes")
    return
  if options.devices is None:
    parser.error("--processes goes with --devices")
  if options.devices % options.processes:
    parser.error(
      f"--devices {options.devices} is not a multiple of"
      f" --processes {options.processes}"
    )
  if (options.coordinator is None) != (options.process_id is None):
    parser.error("--coordinator and --process-id go together")
  if options.process_id is not None and options.process_id >= options.processes:
    parser.error(
      f"--process-id {options.process_id} is not below --processes {options.processes}"
    )


def _num_microbatches(options):
  return options.num_microbatches or options.devices or SHAPING["num_microbatches"]


def is_main_job(options: argparse.Namespace) -> bool:
  return all(getattr(options, name) is None for name in SHAPING)


def run_name(options: argparse.Namespace) -> str:
  return "main" if is_main_job(options) else options.dataset or SHAPING["dataset"]


def parts(options: argparse.Namespace) -> tuple[plan.Part, ...]:
  """What the options ask for."""
  if is_main_job(options):
    return plan.main_job(
      options.steps, options.seeds, options.eval_every, options.quick
    )
  given = {name: getattr(options, name) for name in SHAPING}
  settings = {
    name: default if given[name] is None else given[name]
    for name, default in SHAPING.items()
  }
  settings["num_microbatches"] = _num_microbatches(options)
  taus, target = settings.pop("tau"), settings.pop("target_accept_rate")
  gaf = {n: settings.pop(n) for n in ("rule", "softness", "anchor_decay", "by_leaf")}
  if target is None and taus is None:
    taus = (_DEFAULT_TAU,)
  if settings["model"] is None:
    settings["model"] = default_model(settings["dataset"])
  settings["steps"] = options.steps or (400 if options.quick else 4_000)
  settings["seeds"] = options.seeds or (2 if options.quick else 3)
  settings["eval_every"] = options.eval_every or 100
  return plan.single_job(settings, taus or (), target, **gaf)


def compared(options: argparse.Namespace) -> dict:
  """The options by flag, in which a resumed run must agree with its beginning."""
  return {
    "--" + name.replace("_", "-"): value
    for name, value in sorted(vars(options).items())
    if name not in _UNCOMPARED
  }
