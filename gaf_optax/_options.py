"""The arguments shared by all forms of the filter, validated once."""

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
  """The static part of a step, hashable: functions, layout and axes."""

  rule: Any
  embed: _tree.Embed | None
  layout: _tree.Layout
  axes: _mesh.Axes


@dataclasses.dataclass
class Options:
  """The arguments of `gaf`, validated as far as possible without data.

  Attributes:
    stacked: whether the leaves have a micro-gradient axis.
    param_axes: axis names, as a tuple.
    axis_names: `axis_name` as a tuple, () for None.
    param_specs: the argument `param_axes` if it is a tree of `PartitionSpec`.
  """

  tau: Any
  _: dataclasses.KW_ONLY
  rule: Any = None
  embed: _tree.Embed | None = None
  axis_name: Any = None
  param_axes: Any = ()
  stacked: Any = None
  groups: Groups | None = None
  anchor_decay: Any = None
  memory_decay: Any = None
  num_microbatches: int | None = None
  max_norm_ratio: Any = None
  axis_names: tuple[Hashable, ...] = dataclasses.field(default=(), init=False)
  param_specs: Any = dataclasses.field(default=None, init=False)

  def __post_init__(self):
    self.tau = _tau.as_tau(self.tau)
    self._normalize_axes()
    if self.anchor_decay is not None:
      _validate.in_interval(0, 1, anchor_decay=self.anchor_decay, open_end=True)
      if self.rule is not None:
        raise ValueError(
          "anchor_decay and rule exclude each other: the anchor replaces the rule. Got"
          f" anchor_decay={self.anchor_decay!r} and rule={self.rule!r}."
        )
    self._check_rule()
    if self.memory_decay is not None:
      self._check_memory()
    if self.max_norm_ratio is not None:
      hint = " Norms are limited to this multiple of the median norm."
      ratio = {"max_norm_ratio": self.max_norm_ratio}
      _validate.in_interval(1, math.inf, hint, open_end=True, **ratio)
    if self.embed is not None:
      hint = " Pass an elementwise function such as jnp.sign."
      _validate.function(hint, embed=self.embed)
      self.embed = _hashable(self.embed)
    if self.groups is not None and self.groups != "leaf":
      hint = " Expected None, 'leaf', or a function (path, leaf) -> label."
      _validate.function(hint, groups=self.groups)
    if self.num_microbatches is not None:
      minimum = self.min_accepted
      hint = " With anchor_decay, 1 is allowed."
      hint = hint if minimum > 1 else ""
      _validate.count(minimum, hint, num_microbatches=self.num_microbatches)
      self.num_microbatches = int(self.num_microbatches)

  def _normalize_axes(self):
    if self.axis_name is not None:
      self.axis_names = normalize_axis_names("axis_name", self.axis_name)
      if not self.axis_names:
        raise ValueError("axis_name must name at least one axis, got ().")
    if _holds_specs(self.param_axes):
      self.param_specs = self.param_axes
      self.param_axes = _mesh.spec_axes(self.param_axes)
    self.param_axes = normalize_axis_names("param_axes", self.param_axes)
    both = set(self.axis_names) & set(self.param_axes)
    if both:
      raise ValueError(
        f"axis {min(both, key=str)!r} is in axis_name and in param_axes, but"
        " micro-gradients of different parameters cannot be compared. Gather the"
        " parameters before jax.grad, or use separate axes for microbatches and"
        " parameters."
      )
    if self.stacked is not None and not isinstance(self.stacked, bool):
      raise ValueError(f"stacked must be True, False or None, got {self.stacked!r}.")
    if self.stacked is False and not self.axis_names:
      raise ValueError(
        "stacked=False needs an axis_name: without one, the first axis of every leaf is"
        " the micro-gradient axis. For one micro-gradient per call use multi_steps."
      )
    self.stacked = not self.axis_names or bool(self.stacked)

  def _check_rule(self):
    self.rule = _rules.Sequential() if self.rule is None else self.rule
    hint = " gaf_optax.rules creates rules, for instance rules.most_neighbors()."
    _validate.function(hint, rule=self.rule)
    if getattr(self.rule, "__module__", "") == f"{__package__}.rules":
      raise ValueError(
        "rule must be a rule, not the function that creates it, got"
        f" {self.rule!r}. Add the call, as in rules.most_neighbors()."
      )
    depends_on_tau = isinstance(self.rule, _rules.Sequential | _rules.MostNeighbors)
    from_distances = isinstance(self.tau, _tau.FromDistances)
    if from_distances and depends_on_tau and self.anchor_decay is None:
      raise ValueError(
        f"tau {self.tau!r} is computed from the distances in a step, but the distances"
        f" of rule {self.rule!r} depend on tau themselves. Use another rule, for"
        " instance rules.majority() or rules.nearest_neighbors(5)."
      )
    self.rule = _hashable(self.rule)

  def _check_memory(self):
    _validate.in_interval(0, 1, memory_decay=self.memory_decay, open_end=True)
    if self.anchor_decay is not None:
      raise ValueError(
        "memory_decay and anchor_decay exclude each other: an anchor does not compare"
        " micro-gradients with each other. Got"
        f" memory_decay={self.memory_decay!r} and anchor_decay={self.anchor_decay!r}."
      )
    if self.num_microbatches is None:
      raise ValueError(
        f"memory_decay={self.memory_decay!r} needs num_microbatches=k, the number of"
        " sources, since the state stores a number for each pair of them."
      )

  @property
  def min_accepted(self) -> int:
    """Minimum number of accepted micro-gradients in a step with agreement."""
    return 2 if self.anchor_decay is None else 1

  def spec(self, leaves: _tree.Leaves) -> StepSpec:
    """The `StepSpec` for these leaves; raises as `_mesh.check_axes`."""
    axes = _mesh.check_axes(leaves.layout.paths, leaves.arrays, self)
    return StepSpec(self.rule, self.embed, leaves.layout, axes)

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


# Why the streamed forms (`multi_steps`, `value_and_grad`) do not support an option.
_NOT_STREAMED = {
  "embed": "the running mean holds no embeddings. Stack the gradients and use gaf",
  "axis_name": (
    "each device filters its own micro-gradients. To filter across devices, pass the"
    " result to gaf(axis_name=...), or let each device stack them and use"
    " gaf(axis_name=..., stacked=True)"
  ),
  "stacked": "omit it, or stack them and use gaf",
  "memory_decay": "the memory needs the cosines of all pairs. Stack them and use gaf",
  "max_norm_ratio": "the median norm needs all norms. Stack them and use gaf",
}


def validate_streamed(tau, **options) -> Options:
  refuse(options, _NOT_STREAMED, "micro-gradients that arrive one at a time")
  if isinstance(tau, _tau.FromDistances):
    raise ValueError(
      f"tau {tau!r} is computed from all distances in a step, but here micro-gradients"
      " arrive one at a time. Stack them and use gaf, or value_and_grad with compare."
    )
  result = Options(tau, **options)
  if result.anchor_decay is None and not isinstance(result.rule, _rules.Sequential):
    raise ValueError(
      f"rule {result.rule!r} needs all micro-gradients at once, but here they arrive"
      " one at a time. Use rules.sequential() or rules.running_average(), or stack them"
      " and use gaf, or value_and_grad with compare."
    )
  return result


def refuse(options: dict[str, Any], reasons: dict[str, str], form: str) -> None:
  """Raises for options that are given but not supported with `form`."""
  for name, reason in reasons.items():
    if options.get(name) not in (None, ()):
      raise ValueError(
        f"{name}={options[name]!r} is not supported with {form}: {reason}."
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
  leaves = jax.tree.leaves(param_axes, is_leaf=_mesh.is_spec)
  found = [_mesh.is_spec(x) for x in leaves]
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
