"""Plan: what a part of a command runs, and which arms stand side by side in it."""

import dataclasses
from collections.abc import Sequence

from gaf_optax import rules

RULES = {
  "sequential": rules.sequential,
  "running_average": rules.running_average,
  "leave_one_out": rules.leave_one_out,
  "most_neighbors": rules.most_neighbors,
  "min_neighbors": lambda: rules.min_neighbors(0.5),
}
SOFT_RULES = ("sequential", "leave_one_out", "most_neighbors")
# What can be wrong with a source, in words for titles.
CORRUPTIONS = {
  "shifted-labels": "every label shifted by one",
  "random-labels": "random labels",
  "pixels": "scrambled pixels",
  "normalization": "unnormalized pixels",
  "stale": "parameters up to 100 steps old",
}


@dataclasses.dataclass(frozen=True)
class Arm:
  """One way to train, on the same microbatches as the others of its part.

  Attributes:
    name: short, for files.
    label: for people.
    tau: the threshold; at 2 every micro-gradient is accepted: the plain mean.
    target: the accept rate that tau is steered to, instead of `tau`.
    rule: a key of `RULES`.
    softness: of the rule; see `gaf_optax.rules`.
    anchor_decay: compare with a moving average instead; see `gaf_optax.gaf`.
    by_leaf: whether each parameter array is filtered on its own.
    imitates: name of the arm of which this one is a control.
    control: how it imitates: 'choice' keeps as many micro-gradients in each step,
      drawn at random; 'steps' takes as many steps with all micro-gradients, at
      random times.
    clean: whether this arm is spared the wrong sources.
  """

  name: str
  label: str
  tau: float = 2.0
  target: float | None = None
  rule: str = "sequential"
  softness: float = 0.0
  anchor_decay: float | None = None
  by_leaf: bool = False
  imitates: str | None = None
  control: str | None = None
  clean: bool = False

  @property
  def is_gaf(self) -> bool:
    return self.imitates is None and (self.target is not None or self.tau < 2)


@dataclasses.dataclass(frozen=True)
class Part:
  """A setting and its arms; an arm that imitates comes after the one it imitates.

  Attributes:
    name: short, for files.
    title: for people.
    arms: what is compared.
    dataset: see `data.load`.
    label_noise: share of the training labels that is flipped.
    random_labels: whether all training labels are drawn evenly at random.
    train_images: how many of the training images are used, from the first on; None
      for all.
    noisy_labels: a file of labels to train on, or None.
    noisy_labels_key: which array of that file.
    wrong_sources: how many of each step's microbatches have something wrong.
    wrong_kind: what, a key of `CORRUPTIONS`.
    model: a key of `models.KINDS`.
    width: see `models.make`.
    depth: see `models.make`.
    optimizer: a key of `training.OPTIMIZERS`.
    learning_rate: above 0.
    weight_decay: at least 0; None for the optimizer's usual one.
    plateau_patience: evaluations without a lower test loss before the learning rate
      is divided by ten, with an optimizer that does this.
    augment: whether images are cropped and mirrored at random.
    balanced: whether a microbatch has equally many images of each class.
    microbatch_size: images in a microbatch.
    num_microbatches: microbatches in a step.
    devices: how many share these equally; None for a run on one, without a mesh.
    steps: number of steps.
    seeds: number of seeds, from 0 on.
    eval_every: steps between evaluations.
  """

  name: str
  title: str
  arms: tuple[Arm, ...]
  dataset: str = "digits"
  label_noise: float = 0.0
  random_labels: bool = False
  train_images: int | None = None
  noisy_labels: str | None = None
  noisy_labels_key: str | None = None
  wrong_sources: int = 0
  wrong_kind: str = "shifted-labels"
  model: str = "mlp"
  width: int | None = None
  depth: int | None = None
  optimizer: str = "momentum"
  learning_rate: float = 0.02
  weight_decay: float | None = None
  plateau_patience: int = 10
  augment: bool = False
  balanced: bool = False
  microbatch_size: int = 10
  num_microbatches: int = 2
  devices: int | None = None
  steps: int = 4_000
  seeds: int = 3
  eval_every: int = 100

  def arm(self, name: str) -> Arm:
    return next(arm for arm in self.arms if arm.name == name)

  def controls(self, name: str) -> dict[str, Arm]:
    """The controls of an arm by their kind."""
    return {arm.control: arm for arm in self.arms if arm.imitates == name}


PLAIN = Arm("plain", "plain mean")
CLEAN = Arm("clean", "plain mean, nothing wrong", clean=True)


def gaf_arms(num_microbatches: int, **settings) -> tuple[Arm, ...]:
  """GAF and its controls.

  Args:
    num_microbatches: of a step. With two, all rules do the same, and as many
      micro-gradients are the same ones, so that there is only the control of as many
      steps.
    **settings: of the `Arm`; tau or target, rule, softness, anchor_decay, by_leaf.
  """
  arm = Arm("", "", **settings)
  if arm.target is None:
    text, name = f"tau {arm.tau:g}", f"tau{arm.tau:g}"
  else:
    text, name = f"steered to {arm.target:.0%}", f"target{arm.target:g}"
  rule = arm.rule
  if arm.anchor_decay is not None:
    rule = f"anchor {arm.anchor_decay:g}"
  elif arm.softness:
    rule = f"{rule} soft {arm.softness:g}"
  if arm.by_leaf:
    rule += " by leaf"
  if num_microbatches > 2 or rule != "sequential":
    text = f"{rule} {text}"
  name = f"{rule.replace(' ', '_')}_{name}"
  kinds = {"steps": "random steps, as many as"}
  if num_microbatches > 2:
    kinds = {"choice": "random choice, as much as", **kinds}
  arm = dataclasses.replace(arm, name=name, label=f"GAF {text}")
  return (
    arm,
    *(
      dataclasses.replace(
        arm,
        name=f"{name}_random_{kind}",
        label=f"{label} {text}",
        imitates=name,
        control=kind,
      )
      for kind, label in kinds.items()
    ),
  )


def main_job(steps: int | None, seeds: int | None, eval_every: int | None, quick):
  """The two parts that run when nothing else is asked for.

  Args:
    steps: for both parts; None for 4,000 and 1,500.
    seeds: for both parts; None for 5.
    eval_every: for both parts; None for 100 and 50.
    quick: whether the numbers above are small where they are None.
  """
  noise_arms = [PLAIN]
  for tau in (0.97, 0.9, 0.8):
    noise_arms += gaf_arms(2, tau=tau)
  noise_arms += gaf_arms(2, target=0.1)
  source_arms = [PLAIN]
  for rule in ("sequential", "most_neighbors"):
    source_arms += gaf_arms(8, tau=0.9, rule=rule)
  return (
    Part(
      name="label_noise",
      title="Label noise spread evenly: 40 % of the training labels flipped",
      label_noise=0.4,
      steps=steps or (400 if quick else 4_000),
      seeds=seeds or (2 if quick else 5),
      eval_every=eval_every or 100,
      arms=tuple(noise_arms),
    ),
    Part(
      name="wrong_sources",
      title="Some sources are wrong: 3 of 8 microbatches with shifted labels",
      wrong_sources=3,
      num_microbatches=8,
      steps=steps or (200 if quick else 1_500),
      seeds=seeds or (2 if quick else 5),
      eval_every=eval_every or 50,
      arms=(*source_arms, CLEAN),
    ),
  )


def titled(parts: Sequence[Part]) -> list[Part]:
  """The parts with titles that say what they are and what tells them apart."""
  differing = {
    "optimizer": "{}",
    "num_microbatches": "{} microbatches",
    "microbatch_size": "microbatches of {}",
  }
  said = {
    name: text
    for name, text in differing.items()
    if len({getattr(part, name) for part in parts}) > 1
  }
  return [
    dataclasses.replace(
      part,
      title=", ".join(
        [
          _title(part),
          *(text.format(getattr(part, name)) for name, text in said.items()),
        ]
      ),
    )
    for part in parts
  ]


def _title(part):
  """What a setting is, in words."""
  said = [f"{part.dataset}, {part.model}"]
  if part.train_images:
    said.append(f"{part.train_images:,} training images")
  if part.noisy_labels:
    key = part.noisy_labels_key
    said.append("noisy labels" + (f" ({key})" if key else ""))
  if part.label_noise:
    said.append(f"{part.label_noise:.0%} of the training labels flipped")
  if part.random_labels:
    said.append("random training labels")
  if part.wrong_sources:
    said.append(
      f"{part.wrong_sources} of {part.num_microbatches} microbatches with"
      f" {CORRUPTIONS[part.wrong_kind]}"
    )
  return ", ".join(said)


def single_job(settings, taus, target: float | None, **gaf) -> tuple[Part]:
  """One part with the settings of the command line.

  Args:
    settings: fields of `Part`, all but name, title and arms.
    taus: thresholds, an arm and its controls for each.
    target: an accept rate, instead of thresholds.
    **gaf: other settings of the `Arm`.
  """
  k = settings["num_microbatches"]
  arms = [PLAIN]
  if target is not None:
    arms += gaf_arms(k, target=target, **gaf)
  for tau in taus:
    arms += gaf_arms(k, tau=tau, **gaf)
  if settings["wrong_sources"]:
    arms += [CLEAN]
  part = Part(name="experiment", title="", arms=tuple(arms), **settings)
  return tuple(titled([part]))
