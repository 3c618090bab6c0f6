"""Command: options, refusals in one sentence, and orderly stops."""

import argparse
import contextlib
import dataclasses
import math
import signal
import sys
from collections.abc import Callable, Collection
from typing import Any

# These say where and how, not what: a run may be resumed with others.
_UNCOMPARED = {
  *("out", "resume", "download", "data_dir", "checkpoint_seconds", "tensorboard"),
  *("wandb", "processes", "coordinator", "process_id", "name", "keep", "said"),
}


class UserError(Exception):
  """An option, a file or a directory is wrong; the message is what the user reads."""


class Parser(argparse.ArgumentParser):
  def error(self, message):
    self.exit(2, f"{self.prog}: {message.rstrip('.')}. See {self.prog} --help.\n")


def number(kind: type, what: str, accept: Callable[[Any], bool]):
  """The `type` of an option that has to be a number."""

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


COUNT = number(int, "a whole number of at least 1", lambda n: n >= 1)
INDEX = number(int, "a whole number of at least 0", lambda n: n >= 0)
SEVERAL = number(int, "a whole number of at least 2", lambda n: n >= 2)
SHARE = number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)
FRACTION = number(float, "a number above 0, at most 1", lambda x: 0 < x <= 1)
POSITIVE = number(float, "a number above 0", lambda x: 0 < x < math.inf)
NOT_NEGATIVE = number(float, "a number of at least 0", lambda x: 0 <= x < math.inf)
DECAY = number(float, "a number from 0 to below 1", lambda x: 0 <= x < 1)
TAU = number(
  float,
  "a cosine distance from 0 to below 2 (2 is the plain mean, which always runs)",
  lambda x: 0 <= x < 2,
)


def option(default: Any, help: str | None = None, kind=None, **arguments) -> Any:
  """A dataclass field that is an option of the command line, too, None if not given.

  Args:
    default: of the field.
    help: says what it is; the field's documentation.
    kind: the option's `type`; True for one that is there or not.
    **arguments: others of `add_argument`; `flag` for another name, `rivals` for
      the name of a group of which only one can be given.
  """
  if kind is True:
    arguments |= {"action": "store_const", "const": True}
  elif kind is not None:
    arguments["type"] = kind
  return dataclasses.field(default=default, metadata={"help": help, **arguments})


def options_of(cls: type) -> list[str]:
  """The names of the fields that are options."""
  return [field.name for field in dataclasses.fields(cls) if field.metadata]


def add_options(parser, cls: type, names: Collection[str], **helps: str) -> None:
  """Adds some of the options that a dataclass declares, with other helps if given."""
  groups: dict[str, Any] = {}
  for field in dataclasses.fields(cls):
    if field.name in names:
      arguments = {**field.metadata, "dest": field.name}
      flag = arguments.pop("flag", f"--{field.name.replace('_', '-')}")
      group, rivals = parser, arguments.pop("rivals", None)
      if rivals:
        if rivals not in groups:
          groups[rivals] = parser.add_mutually_exclusive_group()
        group = groups[rivals]
      arguments["help"] = helps.get(field.name, arguments["help"])
      group.add_argument(flag, **arguments)


def add_output(group, name: str) -> None:
  """The options of what is written; `name` says where, without --out."""
  group.add_argument("--out", help=f"output directory; default {name}")
  group.add_argument(
    "--resume", action="store_true", help="go on with the (newest) run there"
  )
  group.add_argument(
    "--checkpoint-seconds",
    default=10.0,
    metavar="SECONDS",
    type=NOT_NEGATIVE,
    help="time between checkpoints; default 10",
  )
  group.add_argument(
    "--tensorboard", action="store_true", help="curves in OUT/tensorboard too"
  )
  group.add_argument(
    "--wandb", metavar="PROJECT", help="curves in a project of Weights & Biases too"
  )


def compared(options: argparse.Namespace) -> dict:
  """The options by flag, in which a resumed run must agree with its beginning."""
  return {
    name if name.isupper() else "--" + name.replace("_", "-"): value
    for name, value in sorted(vars(options).items())
    if name not in _UNCOMPARED
  }


def guarded(prog: str, action: Callable[[list[int]], int]) -> int:
  """Runs a command; what the user has to know ends it with one sentence.

  `action` takes a list that the first SIGINT or SIGTERM is put in. The exit code is
  that of `action`, 2 after a `UserError`, or 130 after a second Ctrl-C.
  """
  try:
    with _stop_signals() as received:
      return action(received)
  except UserError as error:
    print(f"{prog}: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:  # The second one: not even the checkpoint is waited for.
    print(f"{prog}: stopped at once; --resume goes on.", file=sys.stderr)
    return 128 + signal.SIGINT


@contextlib.contextmanager
def _stop_signals():
  """A list that the first SIGINT or SIGTERM is put in; a second one acts as usual."""
  received: list[int] = []

  def note(number, frame):
    del frame
    received.append(number)
    signal.signal(number, before[number])

  before = {
    number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)
  }
  try:
    yield received
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
