"""Plan: which parts the command runs, and which arms stand side by side in each."""

import dataclasses

from gaf_optax import rules

RULES = {
  "sequential": rules.sequential,
  "running_average": rules.running_average,
  "leave_one_out": rules.leave_one_out,
  "most_neighbors": rules.most_neighbors,
  "min_neighbors": lambda: rules.min_neighbors(0.5),
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
    imitates: name of the arm whose choices this one makes at random: as many
      micro-gradients in as many steps.
    shuffled: whether the order of the imitated steps is random too; otherwise they
      are matched step by step.
    clean: whether this arm is spared the wrong sources.
  """

  name: str
  label: str
  tau: float = 2.0
  target: float | None = None
  rule: str = "sequential"
  imitates: str | None = None
  shuffled: bool = False
  clean: bool = False

  @property
  def is_gaf(self) -> bool:
    return self.target is not None or self.tau < 2


@dataclasses.dataclass(frozen=True)
class Part:
  """A setting and its arms; an arm that imitates comes after the one it imitates.

  Attributes:
    name: short, for files.
    title: for people.
    dataset: see `data.load`.
    label_noise: share of the training labels that is flipped.
    noisy_labels: a file of labels to train on, or None.
    noisy_labels_key: which array of that file.
    wrong_sources: how many of each step's microbatches have shifted labels.
    model: see `models.make`.
    width: see `models.make`.
    optimizer: a key of `training.OPTIMIZERS`.
    learning_rate: above 0.
    microbatch_size: images in a microbatch.
    num_microbatches: microbatches in a step.
    devices: how many share these equally; None for a run on one, without a mesh.
    steps: number of steps.
    seeds: number of seeds, from 0 on.
    eval_every: steps between evaluations.
    arms: what is compared.
  """

  name: str
  title: str
  dataset: str
  label_noise: float
  noisy_labels: str | None
  noisy_labels_key: str | None
  wrong_sources: int
  model: str
  width: int | None
  optimizer: str
  learning_rate: float
  microbatch_size: int
  num_microbatches: int
  devices: int | None
  steps: int
  seeds: int
  eval_every: int
  arms: tuple[Arm, ...]

  def arm(self, name: str) -> Arm:
    return next(arm for arm in self.arms if arm.name == name)


PLAIN = Arm("plain", "plain mean")


def gaf_arms(
  tau: float | None,
  target: float | None,
  rule: str,
  num_microbatches: int,
  shuffled: bool = True,
) -> tuple[Arm, Arm]:
  """GAF and, beside it, the control that chooses as much at random."""
  if target is None:
    setting, name = {"tau": tau}, f"{rule}_tau{tau:g}"
    text = f"tau {tau:g}"
  else:
    setting, name = {"target": target}, f"{rule}_target{target:g}"
    text = f"steered to {target:.0%}"
  # With two microbatches all rules do the same, and their name says nothing.
  if num_microbatches > 2:
    text = f"{rule} {text}"
  if num_microbatches == 2:
    control = "random steps, as many as"
  elif shuffled:
    control = "random choice, as much as"
  else:
    control = "random subsets, sized as"
  return (
    Arm(name, f"GAF {text}", rule=rule, **setting),
    Arm(f"{name}_control", f"{control} {text}", imitates=name, shuffled=shuffled),
  )


def main_job(steps: int | None, seeds: int | None, eval_every: int | None, quick):
  """The two parts that run when nothing else is asked for.

  Args:
    steps: for both parts; None for 4,000 and 1,500.
    seeds: for both parts; None for 5.
    eval_every: for both parts; None for 100 and 50.
    quick: whether the numbers above are small where they are None.
  """
  common = dict(
    dataset="digits",
    noisy_labels=None,
    noisy_labels_key=None,
    model="mlp",
    width=None,
    optimizer="momentum",
    learning_rate=0.02,
    microbatch_size=10,
    devices=None,
  )
  noise_arms = [PLAIN]
  for tau in (0.97, 0.9, 0.8):
    noise_arms += gaf_arms(tau, None, "sequential", 2)
  noise_arms += gaf_arms(None, 0.1, "sequential", 2)
  source_arms = [PLAIN]
  for rule in ("sequential", "most_neighbors"):
    source_arms += gaf_arms(0.9, None, rule, 8, shuffled=False)
  source_arms += [Arm("clean", "plain mean, nothing wrong", clean=True)]
  return (
    Part(
      name="label_noise",
      title="Label noise spread evenly: 40 % of the training labels flipped",
      label_noise=0.4,
      wrong_sources=0,
      num_microbatches=2,
      steps=steps or (400 if quick else 4_000),
      seeds=seeds or (2 if quick else 5),
      eval_every=eval_every or 100,
      arms=tuple(noise_arms),
      **common,
    ),
    Part(
      name="wrong_sources",
      title="Some sources are wrong: 3 of 8 microbatches with shifted labels",
      label_noise=0.0,
      wrong_sources=3,
      num_microbatches=8,
      steps=steps or (200 if quick else 1_500),
      seeds=seeds or (2 if quick else 5),
      eval_every=eval_every or 50,
      arms=tuple(source_arms),
      **common,
    ),
  )


def single_job(settings, taus, target: float | None, rule: str) -> tuple[Part]:
  """One part with the settings of the command line.

  Args:
    settings: fields of `Part`, all but name, title and arms.
    taus: thresholds, an arm and its control for each.
    target: an accept rate, instead of thresholds.
    rule: a key of `RULES`.
  """
  k = settings["num_microbatches"]
  arms = [PLAIN]
  if target is not None:
    arms += gaf_arms(None, target, rule, k)
  for tau in taus:
    arms += gaf_arms(tau, None, rule, k)
  if settings["wrong_sources"]:
    arms += [Arm("clean", "plain mean, nothing wrong", clean=True)]
  title = f"{settings['dataset']}, {settings['model']}"
  if settings["noisy_labels"]:
    key = settings["noisy_labels_key"]
    title += ", noisy labels" + (f" ({key})" if key else "")
  if settings["label_noise"]:
    title += f", {settings['label_noise']:.0%} of the training labels flipped"
  if settings["wrong_sources"]:
    title += f", {settings['wrong_sources']} of {k} microbatches with shifted labels"
  return (Part(name="experiment", title=title, arms=tuple(arms), **settings),)
