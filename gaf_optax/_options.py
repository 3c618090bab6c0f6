"""Options: the arguments that every form of the filter shares, checked once."""

import dataclasses
from collections.abc import Hashable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax

from gaf_optax import _mesh, _rules, _tau, _tree, _validate

# A float, an array of one, a schedule, or what the functions of `_tau` return.
Tau: TypeAlias = float | jax.Array | _tau.Schedule | _tau.Tau
AxisNames: TypeAlias = Hashable | tuple[Hashable, ...]
# Names of axes, or a tree of `PartitionSpec`.
ParamAxes: TypeAlias = Any
Groups: TypeAlias = Literal["leaf"] | _tree.GroupsFn


class Plan(NamedTuple):
  """The options of a step on certain leaves, without values; hashable.

  Attributes:
    rule: a rule.
    tau: what kind of tau it is.
    embed: a function or None.
    layout: which leaves take part in which decision.
    axes: over which devices they are spread.
  """

  rule: Any
  tau: _tau.Tau
  embed: _tree.Embed | None
  layout: _tree.Layout
  axes: _mesh.Axes


@dataclasses.dataclass(frozen=True)
class Options:
  """Checked arguments of `gaf`.

  Attributes:
    tau: what kind of tau it is, with its value.
    rule: hashable.
    embed: hashable, or None.
    axis_names: names of the axes along which the micro-gradients lie, () without.
    stacked: whether a device holds several micro-gradients, on a leading axis.
    param_axes: names of the axes over which the parameters are sharded.
    param_specs: a tree of `PartitionSpec` of the parameters, or None.
    groups: None, 'leaf' or a function.
    anchor_decay: None without an anchor.
    memory_decay: None without a memory.
    num_microbatches: None, or how many micro-gradients a step has.
    max_norm_ratio: None, or how many times as long as the median one may be.
  """

  tau: _tau.Tau
  rule: Any
  embed: _tree.Embed | None
  axis_names: tuple[Hashable, ...]
  stacked: bool
  param_axes: tuple[Hashable, ...]
  param_specs: Any
  groups: Groups | None
  anchor_decay: Any
  memory_decay: Any
  num_microbatches: int | None
  max_norm_ratio: Any

  @property
  def min_accepted(self) -> int:
    """How many micro-gradients a step needs, and a decision of streamed ones."""
    return 2 if self.anchor_decay is None else 1

  def plan(self, leaves: _tree.Leaves) -> Plan:
    """The plan of a step on these leaves.

    Raises:
      ValueError: see `_mesh.axes`.
    """
    axes = _mesh.axes(
      leaves.layout.paths,
      leaves.arrays,
      self.axis_names,
      self.stacked,
      self.param_axes,
      self.param_specs,
    )
    return Plan(self.rule, self.tau.static(), self.embed, leaves.layout, axes)

  def check_number(self, k: int) -> None:
    """Raises for a number of micro-gradients that does not fit."""
    if k < self.min_accepted:
      raise ValueError(
        f"there is one micro-gradient (k = {k}) and nothing to compare it with. Split"
        " the batch into at least two microbatches, or give anchor_decay to compare"
        " with past steps."
      )
    if self.num_microbatches not in (None, k):
      raise ValueError(
        f"num_microbatches is {self.num_microbatches}, but {k} micro-gradients arrived."
      )


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
  memory_decay=None,
  num_microbatches=None,
  max_norm_ratio=None,
) -> Options:
  """Checks the arguments of `gaf` as far as they can be known without data.

  Raises:
    ValueError: naming the argument, what was found and what was expected.
  """
  tau = _tau.checked(tau)
  axis_names = () if axis_name is None else as_names("axis_name", axis_name)
  if axis_name is not None and not axis_names:
    raise ValueError("axis_name must name at least one axis, got ().")
  param_specs = None
  if _holds_specs(param_axes):
    param_specs, param_axes = param_axes, _mesh.spec_axes(param_axes)
  param_axes = as_names("param_axes", param_axes)
  both = set(axis_names) & set(param_axes)
  if both:
    raise ValueError(
      f"axis {min(both, key=str)!r} is in axis_name and in param_axes, but the"
      " micro-gradients of different replicas cannot be compared where each holds"
      " another part of the parameters. Gather the parameters before jax.grad, or"
      " use a mesh with one axis for the microbatches and one for the parameters."
    )
  _check_stacked(stacked, axis_name)
  if anchor_decay is not None:
    _check_anchor(anchor_decay, rule)
  rule = _rules.Sequential() if rule is None else _checked_rule(rule)
  if tau.reads_distances and isinstance(rule, _rules.Sequential | _rules.MostNeighbors):
    if anchor_decay is None:
      raise ValueError(
        f"tau {tau!r} is read off the distances of a step, which for rule {rule!r}"
        " depend on tau themselves. Use a rule whose distances do not, for instance"
        " rules.leave_one_out(), rules.majority() or rules.nearest_neighbors(5)."
      )
  if memory_decay is not None:
    _check_memory(memory_decay, anchor_decay, num_microbatches)
  if max_norm_ratio is not None:
    _validate.in_interval(
      1,
      float("inf"),
      " It is how many times as long as the median a micro-gradient may be.",
      open_end=True,
      max_norm_ratio=max_norm_ratio,
    )
  if embed is not None:
    _validate.function(" An elementwise function such as jnp.sign.", embed=embed)
  if groups is not None and groups != "leaf":
    _validate.function(
      " Expected None, 'leaf', or a function (path, leaf) -> label.",
      groups=groups,
    )
  if num_microbatches is not None:
    hint = (
      " One micro-gradient alone has nothing to compare with (anchor_decay compares it"
      " with the past)."
    )
    least = 2 if anchor_decay is None else 1
    _validate.count(least, hint if least > 1 else "", num_microbatches=num_microbatches)
  return Options(
    tau,
    _hashable(rule),
    _hashable(embed),
    axis_names,
    not axis_names or bool(stacked),
    param_axes,
    param_specs,
    groups,
    anchor_decay,
    memory_decay,
    None if num_microbatches is None else int(num_microbatches),
    max_norm_ratio,
  )


# Why a form of the filter that sees one micro-gradient at a time refuses an option.
_NOT_STREAMED = {
  "embed": "its running mean is of gradients, not of embedded ones",
  "axis_name": (
    "they are filtered on the device that they are on. To filter across devices give"
    " the result to gaf(axis_name=...), or let each device stack its micro-gradients"
    " and use gaf(axis_name=..., stacked=True)"
  ),
  "stacked": "there is one in each call. Stack them and use gaf",
  "memory_decay": (
    "it remembers how all pairs compare, but they are compared with a running mean"
    " alone. Stack them and use gaf"
  ),
  "max_norm_ratio": "the median norm is known at the end alone. Stack them and use gaf",
}


def checked_streamed(tau, **options) -> Options:
  """Checked options, without what needs all micro-gradients at once.

  Raises:
    ValueError: as `checked`, and for what streamed forms refuse.
  """
  refuse(options, _NOT_STREAMED, "micro-gradients that come one at a time")
  if _tau.checked(tau).reads_distances:
    raise ValueError(
      f"tau {tau!r} is read off the distances of all micro-gradients of a step, but"
      " streamed ones show one at a time. Stack them and use gaf."
    )
  result = checked(tau, **options)
  if result.anchor_decay is None and not isinstance(result.rule, _rules.Sequential):
    raise ValueError(
      f"rule {result.rule!r} has to see all micro-gradients at once. Streamed"
      " micro-gradients are compared with a running mean: use rules.sequential(),"
      " rules.running_average() or anchor_decay, or stack them and use gaf."
    )
  return result


def refuse(options: dict[str, Any], reasons: dict[str, str], what: str) -> None:
  """Raises for options that are given and have no meaning for `what`."""
  for name, reason in reasons.items():
    if options.get(name) not in (None, ()):
      raise ValueError(f"{name}={options[name]!r} does not go with {what}: {reason}.")


def _checked_rule(rule):
  _validate.function(
    " Rules are made by gaf_optax.rules, for instance rules.most_neighbors().",
    rule=rule,
  )
  if getattr(rule, "__module__", "") == f"{__package__}.rules":
    raise ValueError(
      f"rule must be a rule, not what makes one, got {rule!r}. Was the call"
      " forgotten, as in rules.most_neighbors()?"
    )
  return rule


def _check_anchor(anchor_decay, rule):
  if rule is not None:
    raise ValueError(
      "anchor_decay and rule exclude each other: an anchor replaces the"
      f" comparison among micro-gradients. Got anchor_decay={anchor_decay!r}"
      f" and rule={rule!r}."
    )
  _validate.in_interval(0, 1, anchor_decay=anchor_decay, open_end=True)


def _check_memory(memory_decay, anchor_decay, num_microbatches):
  _validate.in_interval(0, 1, memory_decay=memory_decay, open_end=True)
  if anchor_decay is not None:
    raise ValueError(
      "memory_decay and anchor_decay exclude each other: a memory is of the cosines"
      " among the micro-gradients, which an anchor does not compare. Got"
      f" memory_decay={memory_decay!r} and anchor_decay={anchor_decay!r}."
    )
  if num_microbatches is None:
    raise ValueError(
      f"memory_decay={memory_decay!r} needs num_microbatches, since the state holds a"
      " number for every pair of micro-gradients. Give num_microbatches=k, the number"
      " of sources."
    )


def as_names(argument, value):
  """One name, or several, as a tuple."""
  names = tuple(value) if isinstance(value, (tuple, list)) else (value,)
  for name in names:
    if not isinstance(name, Hashable) or name is None or callable(name):
      raise ValueError(
        f"{argument} must be the name of an axis, or a tuple of names, got {value!r}."
      )
  if len(set(names)) < len(names):
    raise ValueError(f"{argument} names an axis twice: {value!r}.")
  return names


def _holds_specs(param_axes):
  is_spec = lambda node: isinstance(node, jax.sharding.PartitionSpec)
  found = [is_spec(x) for x in jax.tree.leaves(param_axes, is_leaf=is_spec)]
  if any(found) and not all(found):
    raise ValueError(
      "param_axes must be the name of an axis, a tuple of names, or a tree of"
      f" PartitionSpecs like the parameters, not a mixture; got {param_axes!r}."
    )
  return any(found)


def _check_stacked(stacked, axis_name):
  if stacked is not None and not isinstance(stacked, bool):
    raise ValueError(f"stacked must be True, False or None, got {stacked!r}.")
  if stacked is False and axis_name is None:
    raise ValueError(
      "stacked=False needs an axis_name: without one the micro-gradients are on a"
      " leading axis of every leaf. For one micro-gradient per call use"
      " multi_steps."
    )


def _hashable(function):
  """The function itself, or a wrapper where its class cannot be hashed."""
  try:
    hash(function)
  except TypeError:
    return lambda *args: function(*args)
  return function
