"""Options: the arguments that every form of the filter shares, checked once."""

import dataclasses
import inspect
from collections.abc import Callable, Hashable
from typing import (
  Any,
  Literal,
  NamedTuple,
  TypeAlias,
  TypedDict,
  TypeVar,
  get_type_hints,
)

import jax

from gaf_optax import _mesh, _threshold, _tree, _validate, rules

# An `optax.Schedule`, spelt out: where Optax has no types, as for mypy, its name would
# let everything pass.
Schedule: TypeAlias = Callable[[jax.Array], jax.typing.ArrayLike]
# A float, an array of one, a schedule, a `target_accept_rate`, or a tau that is read
# off each step's distances.
Tau: TypeAlias = (
  float | jax.Array | Schedule | _threshold.TargetAcceptRate | rules.StepTau
)
AxisNames: TypeAlias = Hashable | tuple[Hashable, ...]
# Names of axes, or a tree of `PartitionSpec`.
ParamAxes: TypeAlias = Any
Groups: TypeAlias = Literal["leaf"] | _tree.GroupsFn

_Function = TypeVar("_Function", bound=Callable[..., Any])


class SharedOptions(TypedDict, total=False):
  """Options of `gaf` that every form takes."""

  rule: rules.RuleFn | None
  embed: Callable[[jax.Array], jax.Array] | None
  param_axes: ParamAxes
  groups: Groups | None


class BatchOptions(SharedOptions, total=False):
  """Those of `value_and_grad`, which keeps no state."""

  axis_name: AxisNames | None


class StreamOptions(SharedOptions, total=False):
  """Those of `multi_steps`, which sees one micro-gradient after the other."""

  anchor_decay: float | None
  num_microbatches: int | None


class StackOptions(StreamOptions, total=False):
  """Those of `apply_if_agreed`: all."""

  axis_name: AxisNames | None
  stacked: bool | None
  memory_decay: float | None


class Plan(NamedTuple):
  """What is fixed when a step is traced; hashable.

  Attributes:
    rule: an `AnchorRule` with an anchor, a `RememberingRule` with a memory.
    embed: a function or None.
    layout: which leaves take part in which decision.
    axes: over which devices they are spread.
    steering: how tau moves, if it is steered.
    step_tau: how tau is read off a step's distances, if it is.
  """

  rule: Any
  embed: Callable[[jax.Array], jax.Array] | None
  layout: _tree.Layout
  axes: _mesh.Axes
  steering: _threshold.TargetAcceptRate | None
  step_tau: rules.StepTau | None


@dataclasses.dataclass(frozen=True)
class Options:
  """Checked arguments of `gaf`.

  Attributes:
    tau: as it was given.
    rule: a rule, an `AnchorRule` with an anchor, a `RememberingRule` with a memory.
    embed: hashable, or None.
    axis_names: names of the axes along which the micro-gradients lie, () without.
    stacked: whether a device holds several micro-gradients, on a leading axis.
    param_axes: names of the axes over which the parameters are sharded.
    param_specs: a tree of `PartitionSpec` of the parameters, or None.
    groups: None, 'leaf' or a function.
    anchor_decay: None without an anchor.
    memory_decay: None without a memory.
    num_microbatches: None, or how many micro-gradients a step has.
  """

  tau: Any
  rule: Any
  embed: Callable[[jax.Array], jax.Array] | None
  axis_names: tuple[Hashable, ...]
  stacked: bool
  param_axes: tuple[Hashable, ...]
  param_specs: Any
  groups: Groups | None
  anchor_decay: Any
  memory_decay: Any
  num_microbatches: int | None

  @property
  def min_accepted(self) -> int:
    """How many micro-gradients a step needs, and a decision of streamed ones."""
    return 2 if self.anchor_decay is None else 1

  def threshold(self, num_updates, steered) -> jax.Array:
    """Tau of a step, a scalar; see `_threshold.value`."""
    return _threshold.value(self.tau, num_updates, steered)

  def plan(self, leaves: _tree.Leaves) -> Plan:
    """What is fixed for a step on these leaves.

    Raises:
      ValueError: see `_mesh.axes`.
    """
    axes = _mesh.axes(
      leaves, self.axis_names, self.stacked, self.param_axes, self.param_specs
    )
    steered = isinstance(self.tau, _threshold.TargetAcceptRate)
    return Plan(
      self.rule,
      self.embed,
      leaves.layout,
      axes,
      self.tau if steered else None,
      self.tau if _threshold.is_step_tau(self.tau) else None,
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
) -> Options:
  """Checks the arguments of `gaf` as far as they can be known without data.

  Raises:
    ValueError: naming the argument, what was found and what was expected.
  """
  _threshold.check(tau)
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
    if rule is not None:
      raise ValueError(
        "anchor_decay and rule exclude each other: an anchor replaces the"
        f" comparison among micro-gradients. Got anchor_decay={anchor_decay!r}"
        f" and rule={rule!r}."
      )
    _validate.in_interval(0, 1, anchor_decay=anchor_decay, open_end=True)
    rule = rules.AnchorRule()
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
  if _threshold.is_step_tau(tau):
    _check_step_tau(tau, rule)
  if memory_decay is not None:
    _check_memory(memory_decay, anchor_decay, num_microbatches)
    rule = rules.RememberingRule(_hashable(rule))
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
  )


def shown(
  like: Callable[..., Any], options: type[SharedOptions]
) -> Callable[[_Function], _Function]:
  """A decorator: `**options` becomes options of `like` in the signature.

  For `help`, and for `optax.inject_hyperparams`, which binds by the signature.

  Args:
    like: a function.
    options: which of its keyword arguments.
  """
  names = get_type_hints(options)

  def decorate(function: _Function) -> _Function:
    own = inspect.signature(function)
    parameters = [p for p in own.parameters.values() if p.kind != p.VAR_KEYWORD]
    parameters += [
      p
      for name, p in inspect.signature(like).parameters.items()
      if name in names and name not in own.parameters
    ]
    decorated: Any = function
    decorated.__signature__ = own.replace(parameters=parameters)
    return function

  return decorate


def _check_step_tau(tau, rule):
  if isinstance(rule, rules.SequentialRule | rules.MostNeighborsRule):
    raise ValueError(
      f"tau {tau!r} is read off the distances of a step, which for rule {rule!r} depend"
      " on tau themselves. Use a rule whose distances do not, for instance"
      " rules.leave_one_out(), rules.min_neighbors(0.5) or rules.nearest_neighbors(5)."
    )


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
