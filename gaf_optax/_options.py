"""Options: the arguments shared by all forms of the filter, validated once."""

import dataclasses
import math
from collections.abc import Hashable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax

from gaf_optax import _mesh, _rules, _tau, _tree, _validate

Tau: TypeAlias = float | jax.Array | _tau.Schedule | _tau.Tau
AxisNames: TypeAlias = Hashable | tuple[Hashable, ...]
ParamAxes: TypeAlias = Any  # Axis names, or a tree of `PartitionSpec`.
Groups: TypeAlias = Literal["leaf"] | _tree.GroupsFn


class StepSpec(NamedTuple):
  """The static part of a step: options without their values, and layout; hashable."""

  rule: Any
  tau: _tau.Tau
  embed: _tree.Embed | None
  layout: _tree.Layout
  axes: _mesh.Axes


@dataclasses.dataclass(frozen=True)
class Options:
  """The validated arguments of `gaf`.

  Attributes:
    axis_names: `axis_name` as a tuple.
    param_specs: `param_axes` if it was a tree of `PartitionSpec`.
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
    """Minimum number of accepted micro-gradients in a step with agreement."""
    return 2 if self.anchor_decay is None else 1

  def spec(self, leaves: _tree.Leaves) -> StepSpec:
    """The `StepSpec` for these leaves; raises as `_mesh.check_axes`."""
    axes = _mesh.check_axes(
      leaves.layout.paths,
      leaves.arrays,
      self.axis_names,
      self.stacked,
      self.param_axes,
      self.param_specs,
    )
    return StepSpec(self.rule, self.tau.static(), self.embed, leaves.layout, axes)

  def check_num_microbatches(self, k: int) -> None:
    """Raises if a step cannot have k micro-gradients."""
    if k < self.min_accepted:
      raise ValueError(
        f"there is one micro-gradient (k = {k}) and nothing to compare it with. Split"
        " the batch into at least two microbatches, or pass anchor_decay to compare"
        " with past steps."
      )
    if self.num_microbatches not in (None, k):
      raise ValueError(
        f"num_microbatches is {self.num_microbatches}, but {k} micro-gradients arrived."
      )


def validate(
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
  """Validates the arguments of `gaf`, as far as possible without data."""
  tau = _tau.as_tau(tau)
  axis_names: tuple[Hashable, ...] = ()
  if axis_name is not None:
    axis_names = normalize_axis_names("axis_name", axis_name)
    if not axis_names:
      raise ValueError("axis_name must name at least one axis, got ().")
  param_specs = None
  if _holds_specs(param_axes):
    param_specs, param_axes = param_axes, _mesh.spec_axes(param_axes)
  param_axes = normalize_axis_names("param_axes", param_axes)
  both = set(axis_names) & set(param_axes)
  if both:
    raise ValueError(
      f"axis {min(both, key=str)!r} is in axis_name and in param_axes, but"
      " micro-gradients of different parts of the parameters cannot be compared. Gather"
      " the parameters before jax.grad, or use a mesh with one axis for the"
      " microbatches and one for the parameters."
    )
  if stacked is not None and not isinstance(stacked, bool):
    raise ValueError(f"stacked must be True, False or None, got {stacked!r}.")
  if stacked is False and axis_name is None:
    raise ValueError(
      "stacked=False needs an axis_name: without one, the first axis of every leaf is"
      " the micro-gradient axis. For one micro-gradient per call use multi_steps."
    )
  if anchor_decay is not None:
    _validate.in_interval(0, 1, anchor_decay=anchor_decay, open_end=True)
    if rule is not None:
      raise ValueError(
        "anchor_decay and rule exclude each other: an anchor replaces the comparison"
        f" among micro-gradients. Got anchor_decay={anchor_decay!r} and rule={rule!r}."
      )
  rule = _rules.Sequential() if rule is None else rule
  _check_rule(rule, tau, anchor_decay)
  if memory_decay is not None:
    _check_memory(memory_decay, anchor_decay, num_microbatches)
  if max_norm_ratio is not None:
    hint = " Norms are limited to this multiple of the median norm."
    _validate.in_interval(
      1, math.inf, hint, open_end=True, max_norm_ratio=max_norm_ratio
    )
  if embed is not None:
    _validate.function(" Pass an elementwise function such as jnp.sign.", embed=embed)
  if groups is not None and groups != "leaf":
    hint = " Expected None, 'leaf', or a function (path, leaf) -> label."
    _validate.function(hint, groups=groups)
  if num_microbatches is not None:
    minimum, hint = 1, ""
    if anchor_decay is None:
      minimum, hint = 2, " Only with anchor_decay can there be one micro-gradient."
    _validate.count(minimum, hint, num_microbatches=num_microbatches)
    num_microbatches = int(num_microbatches)
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
    num_microbatches,
    max_norm_ratio,
  )


# Why the streamed forms do not support an option.
_NOT_STREAMED = {
  "embed": "the running mean is of gradients, not of embedded ones",
  "axis_name": (
    "each device filters its own. To filter across devices, pass the result to"
    " gaf(axis_name=...), or let each device stack its micro-gradients and use"
    " gaf(axis_name=..., stacked=True)"
  ),
  "stacked": "each call takes one. Stack them and use gaf",
  "memory_decay": "the memory needs the cosines of all pairs. Stack them and use gaf",
  "max_norm_ratio": "the median norm needs all norms. Stack them and use gaf",
}


def validate_streamed(tau, **options) -> Options:
  """Validates options for the streamed forms."""
  refuse(options, _NOT_STREAMED, "micro-gradients that arrive one at a time")
  if _tau.as_tau(tau).uses_distances:
    raise ValueError(
      f"tau {tau!r} is computed from all distances in a step, which are not available"
      " when micro-gradients are streamed. Stack them and use gaf."
    )
  result = validate(tau, **options)
  if result.anchor_decay is None and not isinstance(result.rule, _rules.Sequential):
    raise ValueError(
      f"rule {result.rule!r} needs all micro-gradients at once, but streamed ones are"
      " compared with a running mean. Use rules.sequential(), rules.running_average()"
      " or anchor_decay, or stack them and use gaf."
    )
  return result


def refuse(options: dict[str, Any], reasons: dict[str, str], form: str) -> None:
  """Raises for options that are given but not supported with `form`."""
  for name, reason in reasons.items():
    if options.get(name) not in (None, ()):
      raise ValueError(
        f"{name}={options[name]!r} is not supported with {form}: {reason}."
      )


def _check_rule(rule, tau, anchor_decay):
  _validate.function(
    " gaf_optax.rules creates rules, for instance rules.most_neighbors().", rule=rule
  )
  if getattr(rule, "__module__", "") == f"{__package__}.rules":
    raise ValueError(
      f"rule must be a rule, not the function that creates it, got {rule!r}. Add the"
      " call, as in rules.most_neighbors()."
    )
  depends_on_tau = isinstance(rule, _rules.Sequential | _rules.MostNeighbors)
  if tau.uses_distances and depends_on_tau and anchor_decay is None:
    raise ValueError(
      f"tau {tau!r} is computed from the distances in a step, but the distances of rule"
      f" {rule!r} depend on tau themselves. Use another rule, for instance"
      " rules.leave_one_out(), rules.majority() or rules.nearest_neighbors(5)."
    )


def _check_memory(memory_decay, anchor_decay, num_microbatches):
  _validate.in_interval(0, 1, memory_decay=memory_decay, open_end=True)
  if anchor_decay is not None:
    raise ValueError(
      "memory_decay and anchor_decay exclude each other: the memory stores the cosines"
      " of pairs of micro-gradients, which an anchor does not need. Got"
      f" memory_decay={memory_decay!r} and anchor_decay={anchor_decay!r}."
    )
  if num_microbatches is None:
    raise ValueError(
      f"memory_decay={memory_decay!r} needs num_microbatches, since the state stores a"
      " number for each pair of micro-gradients. Pass num_microbatches=k, the number of"
      " sources."
    )


def normalize_axis_names(argument, value) -> tuple[Hashable, ...]:
  """One axis name or several, as a tuple."""
  names = tuple(value) if isinstance(value, tuple | list) else (value,)
  for name in names:
    if not isinstance(name, Hashable) or name is None or callable(name):
      raise ValueError(
        f"{argument} must be the name of an axis, or a tuple of names, got {value!r}."
      )
  if len(set(names)) < len(names):
    raise ValueError(f"{argument} names an axis twice: {value!r}.")
  return names


def _holds_specs(param_axes):
  """Whether `param_axes` is a tree of `PartitionSpec`."""
  is_spec = lambda node: isinstance(node, jax.sharding.PartitionSpec)
  found = [is_spec(x) for x in jax.tree.leaves(param_axes, is_leaf=is_spec)]
  if any(found) and not all(found):
    raise ValueError(
      "param_axes must be the name of an axis, a tuple of names, or a tree of"
      f" PartitionSpecs like the parameters, not a mixture; got {param_axes!r}."
    )
  return any(found)


def _hashable(function):
  """The function, wrapped if its class cannot be hashed."""
  try:
    hash(function)
  except TypeError:
    return lambda *args: function(*args)
  return function
