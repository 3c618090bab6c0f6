"""Options: the arguments that every form of the filter shares, checked once."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax

from gaf_optax import _threshold, _validate, rules


@dataclasses.dataclass(frozen=True)
class Options:
  """Checked arguments of `gaf`, without tau.

  Attributes:
    rule: None with an anchor.
    embed: hashable, or None.
    groups: None, 'leaf' or a function.
    anchor_decay: None without an anchor.
    num_microbatches: None, or how many micro-gradients a step has.
  """

  rule: Callable[..., rules.Decision] | None
  embed: Callable[[jax.Array], jax.Array] | None
  groups: Any
  anchor_decay: Any
  num_microbatches: int | None


def checked(
  tau,
  *,
  rule=None,
  embed=None,
  axis_name=None,
  param_axes=(),
  stacked=None,
  groups=None,
  anchor_decay=None,
  num_microbatches=None,
) -> Options:
  """Checks the arguments of `gaf` as far as they can be known without data.

  Raises:
    ValueError: naming the argument, what was found and what was expected.
    NotImplementedError: for the arguments that work across devices.
  """
  _threshold.check(tau)
  for name, value in (
    ("axis_name", axis_name),
    ("param_axes", param_axes or None),
    ("stacked", stacked),
  ):
    if value is not None:
      raise NotImplementedError(
        f"{name}={value!r}: filtering across devices is not implemented yet. Stack"
        " the micro-gradients on a leading axis."
      )
  if anchor_decay is not None:
    if rule is not None:
      raise ValueError(
        "anchor_decay and rule exclude each other: an anchor replaces the"
        f" comparison among micro-gradients. Got anchor_decay={anchor_decay!r}"
        f" and rule={rule!r}."
      )
    _validate.in_interval(0, 1, anchor_decay=anchor_decay, open_end=True)
  elif rule is None:
    rule = rules.sequential()
  else:
    _validate.function(
      " Rules are made by gaf_optax.rules, for instance rules.most_neighbors().",
      rule=rule,
    )
    if getattr(rules, getattr(rule, "__name__", ""), None) is rule:
      raise ValueError(
        f"rule must be a rule, not what makes one, got {rule!r}. Was the call"
        " forgotten, as in rules.most_neighbors()?"
      )
  if embed is not None:
    _validate.function(" An elementwise function such as jnp.sign.", embed=embed)
  if groups is not None and groups != "leaf":
    _validate.function(
      " Expected None, 'leaf', or a function (path, leaf) -> label.",
      groups=groups,
    )
  if num_microbatches is not None:
    least = 1 if anchor_decay is not None else 2
    _validate.count(
      least,
      ""
      if least == 1
      else " One micro-gradient alone has nothing to compare with"
      " (anchor_decay compares it with the past).",
      num_microbatches=num_microbatches,
    )
  return Options(
    _hashable(rule),
    _hashable(embed),
    groups,
    anchor_decay,
    None if num_microbatches is None else int(num_microbatches),
  )


def spelled_out(like):
  """A decorator: `**options` becomes the options of `like` in the signature.

  For `help`, and for `optax.inject_hyperparams`, which binds by the signature.
  """

  def decorate(function):
    own = inspect.signature(function)
    parameters = [p for p in own.parameters.values() if p.kind != p.VAR_KEYWORD]
    parameters += [
      p
      for name, p in inspect.signature(like).parameters.items()
      if p.kind == p.KEYWORD_ONLY and name not in own.parameters
    ]
    function.__signature__ = own.replace(parameters=parameters)
    return function

  return decorate


def _hashable(function):
  """The function itself, or a wrapper where its class cannot be hashed."""
  try:
    hash(function)
  except TypeError:
    return lambda *args: function(*args)
  return function
