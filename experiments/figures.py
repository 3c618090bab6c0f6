"""Image experiments whose results are kept, one function for each figure."""

import dataclasses
from collections.abc import Callable, Sequence

from arms import (
  CLEAN,
  EMA_DECAY,
  GEOMETRIC_MEDIAN,
  PLAIN,
  RIGHT,
  RIVALS,
  gaf_arms,
)
from arms import Part as _Part
from schedule import HUMAN
from shared import CONFUSED
from training import OPTIMIZERS

# Corruptions of a source, in words for titles.
CORRUPTIONS = {
  "shifted-labels": "every label shifted by one",
  "random-labels": "random labels",
  "pixels": "scrambled pixels",
  "stale": "parameters up to 100 steps old",
  HUMAN: "labels that people got wrong",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part(_Part):
  """A setting of the image experiments, and its arms."""

  title: str = ""  # Filled by `titled`
  dataset: str = "digits"
  train_images: int | None = None  # Use only the first ones
  label_noise: float = 0.0  # Share of the training labels given another class
  asymmetric: bool = False  # Give them the class that each is usually mistaken for
  random_labels: bool = False  # All training labels
  noisy_labels_key: str | None = None  # Array of labels by people (CIFAR-10N)
  wrong_kind: str = "shifted-labels"  # Corruption of wrong sources
  skew: float = 0.0  # Share of each source's images from three classes
  model: str = "mlp"
  width: int | None = None
  optimizer: str = "momentum"
  learning_rate: float = 0.02
  eval_every: int = 50
  seeds: int = 5


DIGITS = dict(dataset="digits", steps=2_000)
PATCHES = dict(
  dataset="cifar10",
  model="patches-mlp",
  train_images=12_000,
  microbatch_size=50,
  steps=800,
)
CIFAR10 = dict(
  dataset="cifar10",
  model="resnet18",
  width=16,
  train_images=6_000,
  microbatch_size=50,
  optimizer="nesterov",
  steps=600,
  seeds=3,
  eval_every=100,
)
_BY_EXAMPLE = dict(by_example=True, rule="nearest_neighbors")
_MEMORY = dict(memory_decay=0.98, rule="majority")
_FLIPPED = 0.4
_HALF = dict(DIGITS, steps=1_000)  # Fewer steps, since there are many arms or parts.


def _distance(**setting):
  arms = PLAIN, *gaf_arms(2, tau=0.97)
  return (
    Part(name="clean", arms=arms, **setting),
    Part(name="noisy", arms=arms, label_noise=_FLIPPED, **setting),
  )


def distance():
  return _distance(**DIGITS)


def vit():
  adam = dict(model="vit", optimizer="adam", learning_rate=1e-3)
  return _distance(**DIGITS | adam | dict(steps=600))


def microbatch_distance():
  return tuple(
    Part(name=f"size{size}", arms=(PLAIN,), microbatch_size=size, **DIGITS)
    for size in (5, 10, 25, 50, 100)
  )


def random_labels():
  arms = PLAIN, *gaf_arms(2, tau=0.97)
  return (Part(name="random_labels", arms=arms, random_labels=True, **DIGITS),)


def tau():
  taus = (0.9, 0.92, 0.95, 0.97, 0.99, 1.0, 1.02, 1.05, 1.1, 1.2, 1.5)
  arms = PLAIN, *(arm for value in taus for arm in gaf_arms(2, tau=value))
  return tuple(
    Part(name=f"flipped{share:g}", arms=arms, label_noise=share, **_HALF)
    for share in (0.0, _FLIPPED)
  )


def _compared(*taus):
  """The plain mean, and GAF and its controls at some thresholds."""
  return PLAIN, *(arm for tau in taus for arm in gaf_arms(2, tau=tau))


def microbatch_size():
  arms = *_compared(0.97, 0.8), *gaf_arms(2, target=0.1)
  return tuple(
    Part(
      name=f"size{size}",
      arms=arms,
      microbatch_size=size,
      label_noise=_FLIPPED,
      **_HALF,
    )
    for size in (5, 10, 25, 50, 100)
  )


def noise():
  arms = *_compared(0.97, 0.8), *RIVALS
  return tuple(
    Part(name=f"flipped{share:g}", arms=arms, label_noise=share, **_HALF)
    for share in (0.0, 0.05, 0.15, 0.3, 0.4, 0.5, 0.6, 0.75, 0.8, 0.9)
  )


def human():
  arms = *_compared(0.97, 0.9), *RIVALS
  return (Part(name="human", arms=arms, noisy_labels_key="worse_label", **CIFAR10),)


def optimizers():
  rates = {"sgd": 0.1, "adam": 1e-3, "adamw": 1e-3, "rmsprop": 1e-3}
  return tuple(
    Part(
      name=name,
      arms=_compared(0.97, 0.8),
      optimizer=name,
      learning_rate=rates.get(name, 0.02),
      label_noise=_FLIPPED,
      **_HALF,
    )
    for name in OPTIMIZERS
  )


def _by_example(people: dict[str, float], **setting):
  """`people`: share of right labels by array of labels by people."""

  def part(name, right, **changed):
    arms = [PLAIN, *RIVALS]
    if right < 1:
      told = dict(quantile=right, **_BY_EXAMPLE)
      arms += [*gaf_arms(2, **told), *gaf_arms(2, ema_decay=EMA_DECAY, **told)]
    adaptive = dict(adaptive=True, **_BY_EXAMPLE)
    arms += gaf_arms(2, ["choice"], **adaptive)
    arms += gaf_arms(2, ema_decay=EMA_DECAY, **adaptive)
    arms += [CLEAN] * (right < 1)
    return Part(name=name, arms=tuple(arms), **setting | changed)

  pairs = CONFUSED[setting["dataset"]]
  right = 1 - _FLIPPED * len(pairs) / 10  # Of ten classes
  return (
    *(part(f"flipped{x:g}", 1 - x, label_noise=x) for x in (0.0, 0.2, _FLIPPED, 0.6)),
    part("confused", right, label_noise=_FLIPPED, asymmetric=True),
    *(part(key, right, noisy_labels_key=key) for key, right in people.items()),
  )


_EXAMPLES = dict(PATCHES, microbatch_size=64, steps=600)


def by_example():
  return _by_example({}, **DIGITS | dict(microbatch_size=64, steps=1_000))


def by_example_patches():
  people = {"aggre_label": 0.9, "random_label1": 0.8, "worse_label": 0.6}
  return _by_example(people, **_EXAMPLES)


def _one_share(*shares):
  """Arms that are told a share of examples to keep, or nothing."""
  compared = dict(ema_decay=EMA_DECAY, **_BY_EXAMPLE)
  arms = [PLAIN, *RIVALS]
  for share in shares:
    arms += gaf_arms(2, quantile=share, **compared)
  return (*arms, *gaf_arms(2, ["choice"], adaptive=True, **compared))


def batch_size():
  arms = _one_share(1 - _FLIPPED)
  return tuple(
    Part(
      name=f"size{size}",
      arms=arms,
      label_noise=_FLIPPED,
      **_EXAMPLES | dict(microbatch_size=size // 2),
    )
    for size in (32, 64, 128, 256, 512)
  )


def kept_share():
  arms = _one_share(0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
  return (Part(name="share", arms=arms, label_noise=_FLIPPED, **_EXAMPLES),)


def _persistent(name, arms, number, **setting):
  """Eight sources; the same `number` are wrong in each step."""
  return Part(
    name=name,
    arms=(*arms, *[RIGHT] * bool(number)),
    wrong_sources=number,
    persistent=bool(number),
    num_microbatches=8,
    **setting,
  )


_SOURCES = dict(DIGITS, microbatch_size=10, steps=500)
_SOURCES_PATCHES = dict(
  PATCHES, microbatch_size=12, learning_rate=0.01, width=64, steps=500
)


def _memory(wrong: dict[str, Sequence[int]], **setting):
  """`wrong`: numbers of wrong sources among eight, by corruption."""
  adaptive = dict(adaptive=True, **_MEMORY)
  median = dict(ema_decay=EMA_DECAY, rule="geometric_median")
  arms = [
    PLAIN,
    *RIVALS[:-1],
    GEOMETRIC_MEDIAN,
    dataclasses.replace(
      GEOMETRIC_MEDIAN,
      name="geometric_median_ema",
      label=f"geometric median, weight EMA {EMA_DECAY:g}",
      **median,
    ),
    *gaf_arms(8, [], tau=0.97, rule="most_neighbors"),
    *gaf_arms(8, ["choice", "loss"], **adaptive),
    *gaf_arms(8, ["choice", "loss"], ema_decay=EMA_DECAY, **adaptive),
  ]
  parts = [_persistent("none", arms, 0, **setting)]
  for kind, numbers in wrong.items():
    key = {"noisy_labels_key": "worse_label"} if kind == HUMAN else {}
    parts += [
      _persistent(f"{kind}{n}", arms, n, wrong_kind=kind, **key, **setting)
      for n in numbers
    ]
  return tuple(parts)


def memory():
  kinds = ("shifted-labels", "random-labels", "pixels", "stale")
  return _memory(dict.fromkeys(kinds, (1, 2, 3)), **_SOURCES)


def memory_patches():
  wrong = {"shifted-labels": (1, 2, 3), "random-labels": (2,), "pixels": (2,)}
  return _memory(wrong | {"stale": (2,), HUMAN: (1, 2, 3)}, **_SOURCES_PATCHES)


def skew():
  arms = [
    PLAIN,
    *gaf_arms(8, [], quantile=6 / 8, **_MEMORY),
    *gaf_arms(8, ["choice"], adaptive=True, **_MEMORY),
    *gaf_arms(8, [], adaptive=True, **_BY_EXAMPLE),
  ]
  return tuple(
    _persistent(f"skew{share:g}_{n}", arms, n, skew=share, **_SOURCES_PATCHES)
    for share in (0.3, 0.7)
    for n in (0, 2)
  )


@dataclasses.dataclass(frozen=True)
class Figure:
  """An experiment that has a name on the command line.

  Attributes:
    parts: returns the parts, still without titles.
    title: for people, with the place in the paper.
    draw: 'curves' over steps, 'over' a number, or 'forest' of differences.
    x: of 'over', the field of `Part` or `Arm` on the x axis.
  """

  parts: Callable[[], tuple[Part, ...]]
  title: str
  draw: str = "forest"
  x: str = ""


FIGURES = {
  "distance": Figure(distance, "Distance and accuracy (Figure 1)", "curves"),
  "vit": Figure(vit, "Distances of a vision transformer (Figure 3)", "curves"),
  "microbatch-distance": Figure(
    microbatch_distance, "Distance by microbatch size (Figure 4)", "curves"
  ),
  "random-labels": Figure(random_labels, "Random labels (Figure 5)", "curves"),
  "tau": Figure(tau, "Accuracy against tau (Figure 7)", "over", "tau"),
  "microbatch-size": Figure(
    microbatch_size, "Accuracy against microbatch size", "over", "microbatch_size"
  ),
  "noise": Figure(
    noise, "Accuracy against label noise (Table 1)", "over", "label_noise"
  ),
  "human-cifar10": Figure(human, "Labels that people got wrong", "curves"),
  "optimizers": Figure(optimizers, "Across optimizers"),
  "by-example": Figure(by_example, "Single examples compared"),
  "by-example-patches": Figure(by_example_patches, "Single examples compared"),
  "batch-size-patches": Figure(batch_size, "Single examples, by size of the batch"),
  "kept-share-patches": Figure(kept_share, "Single examples, by the share kept"),
  "memory": Figure(memory, "Eight sources that persist, some always wrong"),
  "memory-patches": Figure(
    memory_patches, "Eight sources that persist, some always wrong"
  ),
  "skew-patches": Figure(skew, "Eight sources with classes of their own"),
}


def parts(name: str) -> list[Part]:
  """The parts of a figure, with titles that name the setting and the differences."""
  found = FIGURES[name].parts()
  differing = {"optimizer": "{}", "microbatch_size": "microbatches of {}"}
  said = {
    field: text
    for field, text in differing.items()
    if len({getattr(part, field) for part in found}) > 1
  }
  return [
    dataclasses.replace(
      part,
      title=", ".join(
        [*_title(part), *(text.format(getattr(part, f)) for f, text in said.items())]
      ),
    )
    for part in found
  ]


def _title(part):
  said = [f"{part.dataset}, {part.model}"]
  if part.train_images:
    said.append(f"{part.train_images:,} training images")
  if part.noisy_labels_key and part.wrong_kind != HUMAN:
    said.append(f"noisy labels ({part.noisy_labels_key})")
  if part.label_noise:
    how = "confused" if part.asymmetric else "flipped"
    said.append(f"{part.label_noise:.0%} of the training labels {how}")
  if part.random_labels:
    said.append("random training labels")
  if part.skew:
    said.append(f"{part.skew:.0%} of each source's images from classes of its own")
  if part.wrong_sources:
    always = "always " * part.persistent
    said.append(
      f"{always}{part.wrong_sources} of {part.num_microbatches} microbatches with"
      f" {CORRUPTIONS[part.wrong_kind]}"
    )
  return said
