"""Arms: the ways to train that stand side by side, and what a control keeps."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gaf_optax
from common.command import (
  COUNT,
  DECAY,
  FRACTION,
  INDEX,
  NOT_NEGATIVE,
  SEVERAL,
  SHARE,
  TAU,
  option,
)
from gaf_optax import Decision, rules

RULES = {
  "sequential": rules.sequential,
  "running_average": rules.running_average,
  "leave_one_out": rules.leave_one_out,
  "most_neighbors": rules.most_neighbors,
  "min_neighbors": lambda: rules.min_neighbors(0.5),
  "majority": rules.majority,
  "nearest_neighbors": lambda: rules.nearest_neighbors(5),
  "geometric_median": rules.geometric_median,
}
# What tau_quantile and adaptive_tau work with: distances that do not depend on tau.
FREE_OF_TAU = ("leave_one_out", "min_neighbors", "majority", "nearest_neighbors")
# By control: its name, and how it imitates.
IMITATIONS = {
  "choice": ("random choice", "as much as"),
  "steps": ("random steps", "as many as"),
  "loss": ("smallest loss", "as many as"),
}
CONTROLS = tuple(IMITATIONS)
SOFT_RULES = ("sequential", "leave_one_out", "most_neighbors")
# The control of as many steps has them at random times within so many: as often as
# GAF, early and late.
_WINDOW = 50


@dataclasses.dataclass(frozen=True)
class Arm:
  """One way to train, on the same microbatches as the others of its part.

  Attributes:
    name: short, for files.
    label: for people.
    imitates: name of the arm of which this one is a control.
    control: how it imitates: 'choice' keeps as many micro-gradients in each step,
      drawn at random; 'steps' takes as many steps with all micro-gradients, at
      random times; 'loss' keeps as many in each step, those with the smallest loss, of
      persistent sources by its running mean, all of them in a warm-up;
      'right' keeps those of sources that are not wrong.
    clean: whether this arm is spared the wrong sources and labels.
  """

  name: str
  label: str
  tau: float = option(
    2.0, "one arm for each; default 0.97", TAU, nargs="+", rivals="threshold"
  )
  target: float | None = option(
    None,
    "steer tau to accept this share of the micro-gradients",
    SHARE,
    metavar="SHARE",
    flag="--target-accept-rate",
    rivals="threshold",
  )
  quantile: float | None = option(
    None,
    "accept this share of each step's, those with the smallest distances",
    FRACTION,
    metavar="SHARE",
    flag="--tau-quantile",
    rivals="threshold",
  )
  adaptive: bool = option(
    False,
    "read tau off each step's distances",
    True,
    flag="--adaptive-tau",
    rivals="threshold",
  )
  rule: str = option(
    "sequential",
    "default sequential; min_neighbors asks for half of them, majority for more than"
    " half, nearest_neighbors looks at 5",
    choices=tuple(RULES),
  )
  softness: float = option(
    0.0,
    "weights sigmoid((tau - distance) / S) instead of 0 and 1",
    NOT_NEGATIVE,
    metavar="S",
  )
  anchor_decay: float | None = option(
    None, "compare with a moving average of gradients instead", DECAY, metavar="DECAY"
  )
  memory_decay: float | None = option(
    None, "decide by the mean cosines of all steps so far", DECAY, metavar="DECAY"
  )
  by_leaf: bool = option(False, "filter each parameter array on its own", True)
  by_example: bool = option(
    False, "compare single examples by their gradients of the last layer", True
  )
  smoothing: float = option(
    0.0,
    "share of each label that is spread over all classes",
    SHARE,
    metavar="SHARE",
    flag="--label-smoothing",
  )
  mixup: bool = option(
    False, "train on mixtures of two images and of their labels", True
  )
  ema_decay: float | None = option(
    None, "test a moving average of the weights", DECAY, metavar="DECAY"
  )
  imitates: str | None = None
  control: str | None = None
  clean: bool = False

  @property
  def is_gaf(self) -> bool:
    chooses = self.target is not None or self.quantile is not None or self.adaptive
    return self.imitates is None and (chooses or self.tau < 2)

  @property
  def role(self) -> str:
    """What it is in a comparison.

    'gaf'; 'rival', one of the simple ways that anybody can use, the plain mean first;
    'chance'; or 'ideal', which knows what is wrong.
    """
    if self.clean or self.control == "right":
      return "ideal"
    if self.control in ("choice", "steps"):
      return "chance"
    return "gaf" if self.is_gaf else "rival"

  @property
  def has_memory(self) -> bool:
    """Whether its own gradients fill a memory."""
    return self.memory_decay is not None and self.decides_itself

  @property
  def decides_itself(self) -> bool:
    """Whether its choices depend on its own gradients.

    They do where a control draws within each leaf: what GAF accepted there is not in
    its trace.
    """
    return self.imitates is None or (self.by_leaf and self.control == "choice")


PLAIN = Arm("plain", "plain mean")
CLEAN = Arm("clean", "plain mean, nothing wrong", clean=True)
# The plain mean with what costs nothing and is known to help against wrong labels.
EMA_DECAY = 0.995
RIVALS = (
  Arm("smoothing", "label smoothing 0.2", smoothing=0.2),
  Arm("mixup", "mixup", mixup=True),
  Arm("ema", f"weight EMA {EMA_DECAY:g}", ema_decay=EMA_DECAY),
  Arm("mixup_ema", f"mixup, weight EMA {EMA_DECAY:g}", mixup=True, ema_decay=EMA_DECAY),
)
GEOMETRIC_MEDIAN = Arm("geometric_median", "geometric median", rule="geometric_median")
RIGHT = Arm(
  "right", "plain mean, right sources only", imitates="plain", control="right"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """A setting and its arms; an arm that imitates comes after the one it imitates."""

  name: str  # short, for files
  title: str  # for people
  arms: tuple[Arm, ...]
  wrong_sources: int = option(
    0,
    "how many of each step's microbatches, other ones each time, have something wrong",
    INDEX,
    metavar="N",
  )
  persistent: bool = option(
    False, "the wrong sources are the same ones in each step", True
  )
  microbatch_size: int = option(10, "images; default 10", COUNT)
  num_microbatches: int = option(
    2, "in a step; default 2, or one for each device", SEVERAL
  )
  steps: int = option(4_000, "default 4000 (main job: and 1500)", COUNT)
  seeds: int = option(3, "default 3 (main job: 5)", COUNT)
  eval_every: int = option(100, "default 100 (and 50)", COUNT, metavar="STEPS")

  def arm(self, name: str) -> Arm:
    return next(arm for arm in self.arms if arm.name == name)

  def controls(self, name: str) -> dict[str, Arm]:
    """The controls of an arm by their kind."""
    return {arm.control: arm for arm in self.arms if arm.imitates == name}


def gaf_arms(
  num_microbatches: int, kinds: Sequence[str] | None = None, **settings
) -> list[Arm]:
  """GAF and its controls.

  Args:
    num_microbatches: of a step.
    kinds: of the controls. By default the random ones; but with two microbatches all
      rules do the same, and as many micro-gradients are the same ones, so that there is
      only the control of as many steps; by example random choice and smallest loss.
    **settings: of the `Arm`; all but the last three and its names.
  """
  arm = Arm("", "", **settings)
  if arm.target is not None:
    text, name = f"steered to {arm.target:.0%}", f"target{arm.target:g}"
  elif arm.quantile is not None:
    text, name = f"best {100 * arm.quantile:g}%", f"quantile{arm.quantile:g}"
  elif arm.adaptive:
    text = name = "adaptive"
  else:
    text, name = f"tau {arm.tau:g}", f"tau{arm.tau:g}"
  rule = arm.rule
  if arm.anchor_decay is not None:
    rule = f"anchor {arm.anchor_decay:g}"
  elif arm.softness:
    rule = f"{rule} soft {arm.softness:g}"
  if arm.memory_decay is not None:
    rule += f" memory {arm.memory_decay:g}"
  if arm.by_leaf:
    rule += " by leaf"
  if arm.by_example:
    rule = f"by example {rule}"
  if arm.smoothing:
    text, name = f"{text}, smoothing {arm.smoothing:g}", f"{name}_smoothing"
  if arm.mixup:
    text, name = f"{text}, mixup", f"{name}_mixup"
  if arm.ema_decay is not None:
    text, name = f"{text}, weight EMA", f"{name}_ema"
  if num_microbatches > 2 or rule != "sequential":
    text = f"{rule} {text}"
  name = f"{rule.replace(' ', '_')}_{name}"
  arms = [dataclasses.replace(arm, name=name, label=f"GAF {text}")]
  if kinds is None:
    kinds = ("choice", "steps") if num_microbatches > 2 else ("steps",)
    kinds = ("choice", "loss") if arm.by_example else kinds
  for kind in kinds:
    what, how = IMITATIONS[kind]
    control = dict(
      name=f"{name}_{what.replace(' ', '_')}", label=f"{what}, {how} {text}"
    )
    arms.append(dataclasses.replace(arm, imitates=name, control=kind, **control))
  return arms


def rule_and_tau(arm: Arm, tau: Any) -> tuple[Any, Any]:
  """The rule of an arm, None with an anchor, and its tau, where not a number."""
  if arm.target is not None:
    tau = gaf_optax.target_accept_rate(arm.target)
  elif arm.quantile is not None:
    tau = gaf_optax.tau_quantile(arm.quantile)
  elif arm.adaptive:
    tau = gaf_optax.adaptive_tau()
  if arm.anchor_decay is not None:
    return None, tau
  softness = {"softness": arm.softness} if arm.rule in SOFT_RULES else {}
  return RULES[arm.rule](**softness), tau


class Chosen(NamedTuple):
  """What a control keeps; see `gaf_optax.Decision`."""

  accepted: Any  # bool `[n, k]`
  weights: Any  # float32 `[n, k]`


def random_choice(accepted: np.ndarray, weights: np.ndarray, *key: int) -> Chosen:
  """In each step as many micro-gradients as GAF accepted, and with its weights.

  Args:
    accepted: bool `[steps, k]`, what GAF accepted.
    weights: float32 `[steps, k]`, with which weights.
    *key: of the random numbers, with the seed of the run that is imitated.
  """
  order = np.argsort(np.random.default_rng(key).random(accepted.shape), axis=1)
  return Chosen(*(np.take_along_axis(x, order, axis=1) for x in (accepted, weights)))


def smallest_loss(
  losses: jax.Array, number: jax.Array, warming_up: jax.Array | bool = False
) -> Chosen:
  """The `number` micro-gradients or examples with the smallest losses `[k]`.

  While warming up all are kept: the losses of a new network say little, and what is
  left out from the first is not learned later.
  """
  number = jnp.where(warming_up, len(losses), number)
  kept = jnp.argsort(jnp.argsort(losses)) < number
  return Chosen(kept, kept.astype(jnp.float32))


def random_steps(accepted: np.ndarray, *key: int) -> Chosen:
  """All micro-gradients in as many steps of each window as GAF took, at random."""
  rng, taken = np.random.default_rng(key), accepted.any(axis=1)
  for start in range(0, len(taken), _WINDOW):
    rng.shuffle(taken[start : start + _WINDOW])
  keep = np.broadcast_to(taken[:, None], accepted.shape)
  return Chosen(keep.copy(), keep.astype(np.float32))


def relative(weights: jax.Array) -> jax.Array:
  """Weights `[k]` in proportion to the largest, so that equal ones are exactly 1."""
  largest = jnp.max(weights)
  return weights / jnp.where(largest > 0, largest, 1)


def or_nan(distances: jax.Array) -> jax.Array:
  """Distances, or another metric, with NaN for the -1 of what is not known."""
  return jnp.where(distances < 0, jnp.nan, distances)


def already_decided(chosen: Chosen):
  """A rule that keeps what was chosen, one step of a `Chosen`.

  Its distances are those of the sequential rule that accepts everything.
  """

  def rule(gram, valid, tau):
    distances = RULES["sequential"]()(gram, valid, tau).distances
    weights = chosen.weights.astype(distances.dtype)
    return Decision(weights, chosen.accepted & valid, distances)

  return rule
