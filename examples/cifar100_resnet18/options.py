"""Options: the command line, checked, and the plan that follows from it."""

import argparse
import math

import models
import plan
import training

# Any of these makes the command run one experiment of its own, with these defaults
# for the rest, instead of the main job.
SHAPING = {
  "dataset": "digits",
  "label_noise": 0.0,
  "noisy_labels": None,
  "noisy_labels_key": None,
  "wrong_sources": 0,
  "model": None,
  "width": None,
  "optimizer": "momentum",
  "learning_rate": 0.02,
  "tau": None,
  "target_accept_rate": None,
  "rule": "sequential",
  "microbatch_size": 10,
  "num_microbatches": 2,
  "devices": None,
}
_DEFAULT_TAU = 0.97
# These say where and how, not what: a run may be resumed with others.
_UNCOMPARED = (
  "out",
  "resume",
  "download",
  "checkpoint_seconds",
  "processes",
  "coordinator",
  "process_id",
)


class _Parser(argparse.ArgumentParser):
  def error(self, message):
    self.exit(2, f"{self.prog}: {message.rstrip('.')}. See {self.prog} --help.\n")


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


def parse(argv: list[str] | None) -> argparse.Namespace:
  """The options; a bad one ends the program with a sentence and exit code 2.

  Args:
    argv: the command line without the program, None for the process's own.

  Returns:
    A namespace with one value for each option, None where it was not given.
  """
  parser = _Parser(
    prog="train.py",
    description=(
      "Plain averaging, GAF and its random control side by side on the same"
      " microbatches. Without options of the experiment it runs the main job on"
      " scikit-learn's digits: label noise, then wrong sources."
    ),
  )
  shape = parser.add_argument_group("experiment (any of these replaces the main job)")
  shape.add_argument("--dataset", choices=("digits", "cifar10", "cifar100"))
  noise = shape.add_mutually_exclusive_group()
  noise.add_argument(
    "--label-noise",
    type=_SHARE,
    metavar="SHARE",
    help="share of the training labels given another class at random",
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
    help="how many of each step's microbatches have every label shifted by one",
  )
  shape.add_argument(
    "--model", choices=("mlp", "resnet18"), help="mlp for digits, else resnet18"
  )
  shape.add_argument(
    "--width",
    type=_COUNT,
    help=f"of the hidden layers or the first stage; default {models.DEFAULT_WIDTH}",
  )
  shape.add_argument(
    "--optimizer", choices=tuple(training.OPTIMIZERS), help="default momentum (0.9)"
  )
  shape.add_argument(
    "--learning-rate",
    metavar="RATE",
    help="default 0.02",
    type=_number(float, "a number above 0", lambda x: 0 < x < math.inf),
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
  shape.add_argument("--microbatch-size", type=_COUNT, help="images; default 10")
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

  size = parser.add_argument_group("size")
  size.add_argument("--steps", type=_COUNT, help="default 4000 (main job: and 1500)")
  size.add_argument("--seeds", type=_COUNT, help="default 3 (main job: and 5)")
  size.add_argument(
    "--eval-every",
    type=_COUNT,
    metavar="STEPS",
    help="default 100 (main job: and 50)",
  )
  size.add_argument(
    "--quick",
    action="store_true",
    help="a tenth of the steps and two seeds, to see that it runs",
  )

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
  rule = settings.pop("rule")
  if target is None and taus is None:
    taus = (_DEFAULT_TAU,)
  if settings["model"] is None:
    settings["model"] = "mlp" if settings["dataset"] == "digits" else "resnet18"
  settings["steps"] = options.steps or (400 if options.quick else 4_000)
  settings["seeds"] = options.seeds or (2 if options.quick else 3)
  settings["eval_every"] = options.eval_every or 100
  return plan.single_job(settings, taus or (), target, rule)


def compared(options: argparse.Namespace) -> dict:
  """The options by flag, in which a resumed run must agree with its beginning."""
  return {
    "--" + name.replace("_", "-"): value
    for name, value in sorted(vars(options).items())
    if name not in _UNCOMPARED
  }
