"""Figures: the experiments of the paper and those beyond it, one function each.

Each takes a `Setting` and gives the parts that run; `FIGURES` says how they are drawn.
"""

import dataclasses
from collections.abc import Callable

import labels
import optimizers as optimizers_lib
import plan
from common.arms import (
  CLEAN,
  EMA_DECAY,
  GEOMETRIC_MEDIAN,
  PLAIN,
  RIGHT,
  RIVALS,
  gaf_arms,
)
from common.command import UserError
from plan import Part

DIGITS, PATCHES, CIFAR10, CIFAR100 = "digits", "patches", "cifar10", "cifar100"
_FLIPPED = 0.4
_SHARES = (0.0, 0.2, _FLIPPED, 0.6)
_ALL = (1, 2, 3)
_LEARNING_RATES = {"sgd": 0.1, "adam": 1e-3, "adamw": 1e-3, "rmsprop": 1e-3}


@dataclasses.dataclass(frozen=True)
class Setting:
  """A data set, a model, and sizes that suit them."""

  base: dict  # Fields of `Part`
  # Fields of `Part` for labels that people got wrong, or flipped ones where there are
  # none.
  human: dict
  many: dict  # Fields of `Part` for more than two microbatches
  taus: tuple[float, ...]  # Thresholds of GAF where one or two are wanted
  sizes: tuple[int, ...]  # Of microbatches, from small to large
  learning_rates: dict  # By optimizer, where it is not that of `base`
  vit: dict  # Fields of `Part` for a vision transformer; empty for features
  # Fields of `Part` where single examples are compared, and shares of flipped labels.
  examples: dict = dataclasses.field(default_factory=dict)
  flipped: tuple[float, ...] = (0.0, _FLIPPED)
  # Share of right ones by array in the file of labels by people.
  people: dict = dataclasses.field(default_factory=dict)
  # How many of eight sources are wrong, by what is wrong with them.
  wrong: dict = dataclasses.field(default_factory=lambda: {"shifted-labels": _ALL})

  def part(self, name: str, arms, **changed) -> Part:
    """A part, still without a title, of this setting but for what is given."""
    return Part(name=name, title="", arms=tuple(arms), **{**self.base, **changed})


SETTINGS = {
  DIGITS: Setting(
    base=dict(dataset=DIGITS, steps=2_000, seeds=5, eval_every=50),
    human=dict(label_noise=_FLIPPED),
    many=dict(microbatch_size=10, steps=500),
    taus=(0.97, 0.8),
    sizes=(5, 10, 25, 50, 100),
    learning_rates=_LEARNING_RATES,
    vit=dict(model="vit", optimizer="adam", learning_rate=1e-3, steps=600),
    examples=dict(microbatch_size=64, steps=1_000),
    flipped=_SHARES,
    wrong=dict.fromkeys(("shifted-labels", "random-labels", "pixels", "stale"), _ALL),
  ),
  PATCHES: Setting(
    base=dict(
      dataset=CIFAR10,
      model="patches-mlp",
      train_images=12_000,
      microbatch_size=50,
      steps=800,
      seeds=5,
      eval_every=50,
    ),
    human=dict(noisy_labels_key="worse_label"),
    many=dict(microbatch_size=12, learning_rate=0.01, width=64, steps=500),
    taus=(0.97, 0.9),
    sizes=(10, 25, 50, 100, 200),
    learning_rates=_LEARNING_RATES,
    vit={},
    examples=dict(microbatch_size=64, steps=600),
    flipped=_SHARES,
    people={"aggre_label": 0.9, "random_label1": 0.8, "worse_label": 0.6},
    wrong={
      "shifted-labels": _ALL,
      "random-labels": (2,),
      "pixels": (2,),
      "stale": (2,),
      plan.HUMAN: _ALL,
    },
  ),
  CIFAR10: Setting(
    base=dict(
      dataset=CIFAR10,
      model="resnet18",
      width=16,
      depth=1,
      train_images=6_000,
      microbatch_size=50,
      optimizer="nesterov",
      steps=600,
      seeds=3,
      eval_every=100,
    ),
    human=dict(noisy_labels_key="worse_label"),
    many=dict(microbatch_size=12),
    taus=(0.97, 0.9),
    sizes=(10, 25, 50, 100, 200),
    learning_rates=_LEARNING_RATES,
    vit=dict(model="vit", optimizer="adam", learning_rate=1e-3, width=None, depth=None),
  ),
  CIFAR100: Setting(
    base=dict(
      dataset=CIFAR100,
      model="resnet18",
      microbatch_size=100,
      balanced=True,
      augment=True,
      optimizer=optimizers_lib.PLATEAU,
      plateau_patience=100,
      learning_rate=0.01,
      weight_decay=0.01,
      steps=50_000,
      seeds=3,
      eval_every=500,
    ),
    human=dict(noisy_labels_key="noisy_label"),
    many=dict(microbatch_size=100),
    taus=(0.97,),
    sizes=(100, 200, 300, 400, 500, 600, 700, 800, 900, 1_000),
    learning_rates={"adam": 1e-3, "adamw": 1e-3, "rmsprop": 1e-3},
    vit=dict(model="vit-l16", optimizer="adam", learning_rate=1e-4, steps=10_000),
  ),
}
# By data set.
LABEL_FILES = {CIFAR10: "cifar10n_human_labels.npz", CIFAR100: "CIFAR-100_human.pt"}


def distance(setting: Setting, **changed):
  arms = PLAIN, *gaf_arms(2, tau=setting.taus[0])
  return (
    setting.part("clean", arms, **changed),
    setting.part("noisy", arms, **{**setting.human, **changed}),
  )


def vit(setting: Setting):
  if not setting.vit:
    raise UserError("a vision transformer takes images; choose another --setting.")
  return distance(setting, **setting.vit)


def microbatch_distance(setting: Setting):
  return tuple(
    setting.part(f"size{size}", [PLAIN], microbatch_size=size) for size in setting.sizes
  )


def random_labels(setting: Setting):
  arms = PLAIN, *gaf_arms(2, tau=setting.taus[0])
  return (setting.part("random_labels", arms, random_labels=True),)


def tau(setting: Setting):
  taus = (0.9, 0.92, 0.95, 0.97, 0.99, 1.0, 1.02, 1.05, 1.1, 1.2, 1.5)
  arms = [PLAIN]
  for value in taus:
    arms += gaf_arms(2, tau=value)
  return tuple(
    setting.part(f"flipped{share:g}", arms, **_flipped(setting, share))
    for share in (0.0, _FLIPPED)
  )


def _compared(setting, k=2):
  """The plain mean, GAF and its controls at the setting's thresholds."""
  arms = [PLAIN]
  for value in setting.taus:
    arms += gaf_arms(k, tau=value)
  return arms


def _flipped(setting, share=_FLIPPED):
  """Flipped labels, and fewer steps, since there are many parts or arms."""
  return dict(label_noise=share, steps=setting.base["steps"] // 2)


def microbatch_size(setting: Setting):
  arms = [*_compared(setting), *gaf_arms(2, target=0.1)]
  return tuple(
    setting.part(f"size{size}", arms, microbatch_size=size, **_flipped(setting))
    for size in setting.sizes
  )


def noise(setting: Setting):
  shares = (0.0, 0.05, 0.15, 0.3, 0.4, 0.5, 0.6, 0.75, 0.8, 0.9)
  arms = [*_compared(setting), *RIVALS]
  return tuple(
    setting.part(f"flipped{share:g}", arms, **_flipped(setting, share))
    for share in shares
  )


def human(setting: Setting):
  if "noisy_labels_key" not in setting.human:
    raise UserError("nobody labelled the digits wrong; choose another --setting.")
  arms = [*_compared(setting), *RIVALS]
  return (setting.part("human", arms, **setting.human),)


def optimizers(setting: Setting):
  usual = setting.base.get("learning_rate", 0.02)
  return tuple(
    setting.part(
      name,
      _compared(setting),
      optimizer=name,
      learning_rate=setting.learning_rates.get(name, usual),
      **_flipped(setting),
    )
    for name in optimizers_lib.OPTIMIZERS
  )


# What can be changed about a rule.
_MORE = ({}, {"softness": 0.05}, {"by_leaf": True})


def rules(setting: Setting):
  ways = [
    *({"rule": rule} for rule in ("sequential", "leave_one_out", "min_neighbors")),
    *({"anchor_decay": decay} for decay in (0.9, 0.99)),
    *({"rule": "most_neighbors", **more} for more in _MORE),
  ]
  arms = [PLAIN]
  for way in ways:
    arms += gaf_arms(8, ["choice"], tau=0.8, **way)
  eight = dict(num_microbatches=8, **setting.many)
  return (
    setting.part("even", arms, label_noise=_FLIPPED, **eight),
    setting.part("sources", [*arms, CLEAN], wrong_sources=3, **eight),
  )


def by_example(setting: Setting):
  def part(name, right, **changed):
    arms = [PLAIN, *RIVALS]
    if right < 1:
      told = dict(quantile=right, **plan.BY_EXAMPLE)
      arms += [*gaf_arms(2, **told), *gaf_arms(2, ema_decay=EMA_DECAY, **told)]
    adaptive = dict(adaptive=True, **plan.BY_EXAMPLE)
    arms += gaf_arms(2, ["choice"], **adaptive)
    arms += gaf_arms(2, ema_decay=EMA_DECAY, **adaptive)
    clean = [CLEAN] * (right < 1)
    return setting.part(name, [*arms, *clean], **{**setting.examples, **changed})

  parts = [
    part(f"flipped{share:g}", 1 - share, label_noise=share) for share in setting.flipped
  ]
  if pairs := labels.CONFUSED.get(setting.base["dataset"]):
    right = 1 - _FLIPPED * len(pairs) / 10  # Of ten classes
    parts.append(part("confused", right, label_noise=_FLIPPED, asymmetric=True))
  return (
    *parts,
    *(part(key, right, noisy_labels_key=key) for key, right in setting.people.items()),
  )


def batch_size(setting: Setting):
  """Single examples of batches that have `2 * microbatch_size`."""
  compared = dict(ema_decay=EMA_DECAY, **plan.BY_EXAMPLE)
  arms = [
    PLAIN,
    *RIVALS,
    *gaf_arms(2, quantile=1 - _FLIPPED, **compared),
    *gaf_arms(2, ["choice"], adaptive=True, **compared),
  ]
  return tuple(
    setting.part(
      f"size{size}",
      arms,
      label_noise=_FLIPPED,
      **{**setting.examples, "microbatch_size": size // 2},
    )
    for size in (32, 64, 128, 256, 512)
  )


def kept_share(setting: Setting):
  compared = dict(ema_decay=EMA_DECAY, **plan.BY_EXAMPLE)
  arms = [PLAIN, *RIVALS]
  for share in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
    arms += gaf_arms(2, quantile=share, **compared)
  arms += gaf_arms(2, ["choice"], adaptive=True, **compared)
  return (setting.part("share", arms, label_noise=_FLIPPED, **setting.examples),)


def _persistent(setting, name, arms, number, **changed):
  """Eight sources of which the same `number` are wrong in each step."""
  arms = [*arms, *[RIGHT] * bool(number)]
  wrong = dict(wrong_sources=number, persistent=bool(number), num_microbatches=8)
  return setting.part(name, arms, **{**wrong, **setting.many, **changed})


def memory(setting: Setting):
  # The plain mean with nothing wrong is that of the first part.
  adaptive = dict(adaptive=True, **plan.MEMORY)
  arms = [
    PLAIN,
    *RIVALS[:-1],
    GEOMETRIC_MEDIAN,
    dataclasses.replace(
      GEOMETRIC_MEDIAN,
      name="geometric_median_ema",
      label=f"geometric median, weight EMA {EMA_DECAY:g}",
      ema_decay=EMA_DECAY,
    ),
    *gaf_arms(8, [], tau=0.97, rule="most_neighbors"),
    *gaf_arms(8, ["choice", "loss"], **adaptive),
    *gaf_arms(8, ["choice", "loss"], ema_decay=EMA_DECAY, **adaptive),
  ]
  parts = [_persistent(setting, "none", arms, 0)]
  for kind, numbers in setting.wrong.items():
    changed = dict(wrong_kind=kind)
    if kind == plan.HUMAN:
      changed |= dict(noisy_labels_key=setting.human["noisy_labels_key"])
    parts += [
      _persistent(setting, f"{kind}{number}", arms, number, **changed)
      for number in numbers
    ]
  return tuple(parts)


def skew(setting: Setting):
  arms = [
    PLAIN,
    *gaf_arms(8, [], quantile=6 / 8, **plan.MEMORY),
    *gaf_arms(8, ["choice"], adaptive=True, **plan.MEMORY),
    *gaf_arms(8, [], adaptive=True, **plan.BY_EXAMPLE),
  ]
  return tuple(
    _persistent(
      setting, f"skew{share:g}_{number}", arms, number, skew=share, balanced=False
    )
    for share in (0.3, 0.7)
    for number in (0, 2)
  )


@dataclasses.dataclass(frozen=True)
class Figure:
  """An experiment that has a name on the command line."""

  parts: Callable[[Setting], tuple[Part, ...]]  # From a setting to what runs
  draw: str  # A key of `charts.DRAW`
  title: str  # What it shows, and where it is in the paper
  x: str | None = None  # For charts over a number, the field of `Part` that it is


FIGURES = {
  "distance": Figure(distance, "curves", "Distance and accuracy (Figure 1)"),
  "vit": Figure(vit, "curves", "Distances of a vision transformer (Figure 3)"),
  "microbatch-distance": Figure(
    microbatch_distance, "distances", "Distance by microbatch size (Figure 4)"
  ),
  "random-labels": Figure(random_labels, "curves", "Random labels (Figure 5)"),
  "tau": Figure(tau, "over_tau", "Accuracy against tau (Figure 7)"),
  "microbatch-size": Figure(
    microbatch_size, "over_x", "Accuracy against microbatch size", "microbatch_size"
  ),
  "noise": Figure(
    noise, "over_x", "Accuracy against label noise (Table 1)", "label_noise"
  ),
  "human": Figure(human, "curves", "Labels that people got wrong"),
  "optimizers": Figure(optimizers, "forest", "Across optimizers"),
  "rules": Figure(rules, "forest", "Rules, eight microbatches"),
  "by-example": Figure(by_example, "forest", "Single examples compared"),
  "batch-size": Figure(batch_size, "forest", "Single examples, by size of the batch"),
  "kept-share": Figure(kept_share, "forest", "Single examples, by the share kept"),
  "memory": Figure(memory, "forest", "Eight sources that persist, some always wrong"),
  "skew": Figure(skew, "forest", "Eight sources with classes of their own"),
}
