"""Arms: the ways to train that are compared, and what their controls keep."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gaf_optax
from gaf_optax import Decision, rules

RULES = {
  "sequential": rules.sequential,
  "most_neighbors": rules.most_neighbors,
  "majority": rules.majority,
  "nearest_neighbors": lambda: rules.nearest_neighbors(5),
  "geometric_median": rules.geometric_median,
}
# By kind of control: its name, and how it imitates.
IMITATIONS = {
  "choice": ("random choice", "as much as"),
  "steps": ("random steps", "as many as"),
  "loss": ("smallest loss", "as many as"),
}
# Random steps are drawn within windows of this many steps, so that they are as
# frequent early and late as GAF's.
_WINDOW = 50


@dataclasses.dataclass(frozen=True)
class Arm:
  """One way to train, on the same microbatches as the other arms of its part.

  Attributes:
    name: short, for files.
    label: for people.
    tau: the threshold; 2 is the plain mean.
    target: share of micro-gradients that a threshold over steps aims to accept.
    quantile: share of each step's micro-gradients to accept.
    adaptive: whether tau is derived from each step's distances.
    rule: a key of `RULES`.
    memory_decay: see `gaf_optax.gaf`.
    by_example: whether single examples are compared, by their last-layer gradients.
    smoothing: share of each label that is spread over all classes.
    mixup: whether pairs of examples and their labels are mixed.
    ema_decay: of a moving average of the weights, which is then evaluated.
    imitates: name of the arm that this one is a control of.
    control: 'choice' keeps as many micro-gradients per step, drawn at random; 'steps'
      takes as many steps at random times; 'loss' keeps as many per step, those with
      the smallest loss (or running mean of losses, for persistent sources), after a
      warm-up with all; 'right' keeps the sources that are not wrong.
    clean: whether nothing is wrong in this arm.
  """

  name: str
  label: str
  tau: float = 2.0
  target: float | None = None
  quantile: float | None = None
  adaptive: bool = False
  rule: str = "sequential"
  memory_decay: float | None = None
  by_example: bool = False
  smoothing: float = 0.0
  mixup: bool = False
  ema_decay: float | None = None
  imitates: str | None = None
  control: str | None = None
  clean: bool = False

  @property
  def is_gaf(self) -> bool:
    chooses = self.target is not None or self.quantile is not None or self.adaptive
    return self.imitates is None and (chooses or self.tau < 2)

  @property
  def role(self) -> str:
    """'gaf', 'rival' (anybody can use it), 'chance', or 'ideal' (needs the truth)."""
    if self.clean or self.control == "right":
      return "ideal"
    if self.control in ("choice", "steps"):
      return "chance"
    return "gaf" if self.is_gaf else "rival"

  @property
  def has_memory(self) -> bool:
    """Whether its state holds mean cosines; a control's does not."""
    return self.memory_decay is not None and self.imitates is None

  def compiled(self) -> "Arm":
    """The same arm without the fields that do not affect its compiled program."""
    if self.imitates is None:
      return dataclasses.replace(self, name="", label="", tau=2.0, clean=False)
    ways = ("by_example", "smoothing", "mixup", "ema_decay")
    kept = {name: getattr(self, name) for name in ways}
    control = "loss" if self.control == "loss" else "choice"
    return Arm("", "", imitates="", control=control, **kept)


EMA_DECAY = 0.995
PLAIN = Arm("plain", "plain mean")
CLEAN = Arm("clean", "plain mean, nothing wrong", clean=True)
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
  """A setting and its arms; a control comes after the arm that it imitates."""

  name: str  # Short, for files
  title: str  # For people
  arms: tuple[Arm, ...]
  wrong_sources: int = 0  # Number of each step's microbatches with something wrong
  persistent: bool = False  # Whether they are the same ones in every step
  microbatch_size: int = 10
  num_microbatches: int = 2
  steps: int = 4_000
  seeds: int = 3
  eval_every: int = 100


def gaf_arms(
  num_microbatches: int, kinds: Sequence[str] | None = None, **settings
) -> list[Arm]:
  """GAF and its controls.

  Args:
    num_microbatches: per step.
    kinds: of the controls. By default chance; with two microbatches only random steps,
      since a random choice among two is GAF itself; by example also the smallest loss.
    **settings: fields of `Arm`.
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
  if arm.memory_decay is not None:
    rule += f" memory {arm.memory_decay:g}"
  if arm.by_example:
    rule = f"by example {rule}"
  if arm.ema_decay is not None:
    text, name = f"{text}, weight EMA", f"{name}_ema"
  if num_microbatches > 2 or rule != "sequential":
    text = f"{rule} {text}"
  name = f"{rule.replace(' ', '_')}_{name}"
  if kinds is None:
    kinds = ("choice", "steps") if num_microbatches > 2 else ("steps",)
    kinds = ("choice", "loss") if arm.by_example else kinds
  arms = [dataclasses.replace(arm, name=name, label=f"GAF {text}")]
  for kind in kinds:
    what, how = IMITATIONS[kind]
    arms.append(
      dataclasses.replace(
        arm,
        name=f"{name}_{what.replace(' ', '_')}",
        label=f"{what}, {how} {text}",
        imitates=name,
        control=kind,
      )
    )
  return arms


def rule_and_tau(arm: Arm, tau: Any) -> tuple[Any, Any]:
  """The rule of an arm, and its tau where that is not a number."""
  if arm.target is not None:
    tau = gaf_optax.target_accept_rate(arm.target)
  elif arm.quantile is not None:
    tau = gaf_optax.tau_quantile(arm.quantile)
  elif arm.adaptive:
    tau = gaf_optax.adaptive_tau()
  return RULES[arm.rule](), tau


class Chosen(NamedTuple):
  """The micro-gradients that a control keeps; see `gaf_optax.Decision`."""

  accepted: Any  # bool `[n, k]`
  weights: Any  # float32 `[n, k]`


def random_choice(accepted: np.ndarray, weights: np.ndarray, *key: int) -> Chosen:
  """As many micro-gradients per step as GAF accepted, with the same weights."""
  order = np.argsort(np.random.default_rng(key).random(accepted.shape), axis=1)
  return Chosen(*(np.take_along_axis(x, order, axis=1) for x in (accepted, weights)))


def random_steps(accepted: np.ndarray, *key: int) -> Chosen:
  """All micro-gradients in as many steps of each window as GAF took."""
  rng, taken = np.random.default_rng(key), accepted.any(axis=1)
  for start in range(0, len(taken), _WINDOW):
    rng.shuffle(taken[start : start + _WINDOW])
  keep = np.broadcast_to(taken[:, None], accepted.shape)
  return Chosen(keep.copy(), keep.astype(np.float32))


def smallest_loss(
  losses: jax.Array, number: jax.Array, warming_up: jax.Array | bool = False
) -> Chosen:
  """The `number` micro-gradients or examples with the smallest losses `[k]`.

  A warm-up keeps all: the losses of a new network carry little information, and
  examples excluded from the start are not learned later.
  """
  number = jnp.where(warming_up, len(losses), number)
  kept = jnp.argsort(jnp.argsort(losses)) < number
  return Chosen(kept, kept.astype(jnp.float32))


def chosen_by(
  arm: Arm, accepted: np.ndarray, weights: np.ndarray, wrong: np.ndarray, key
) -> Chosen | None:
  """All choices of a control, from GAF's `[steps, k]`; None for other arms."""
  if arm.imitates is None:
    return None
  if arm.control == "right":
    return Chosen(~wrong, (~wrong).astype(np.float32))
  if arm.control == "loss":
    return Chosen(accepted, weights)
  if arm.control == "steps":
    return random_steps(accepted, *key)
  return random_choice(accepted, weights, *key)


def already_decided(chosen: Chosen):
  """A rule that returns one step of a `Chosen`, with sequential distances."""

  def rule(gram, valid, tau):
    distances = rules.sequential()(gram, valid, tau).distances
    weights = chosen.weights.astype(distances.dtype)
    return Decision(weights, chosen.accepted & valid, distances)

  return rule


def relative(weights: jax.Array) -> jax.Array:
  """Weights `[k]` divided by the largest, so that equal ones are exactly 1."""
  largest = jnp.max(weights)
  return weights / jnp.where(largest > 0, largest, 1)


def or_nan(distances: jax.Array) -> jax.Array:
  """Distances with NaN in place of -1, which the state stores for missing ones."""
  return jnp.where(distances < 0, jnp.nan, distances)
