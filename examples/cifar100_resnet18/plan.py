"""Plan: what a part of a command runs, and the options that say so."""

import dataclasses
from collections.abc import Sequence

import models
import optimizers
from common import arms as arms_lib
from common.arms import (
  CLEAN,
  EMA_DECAY,
  GEOMETRIC_MEDIAN,
  PLAIN,
  RIVALS,
  gaf_arms,
)
from common.command import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, option

HUMAN = "human-labels"
# What can be wrong with a source, in words for titles.
CORRUPTIONS = {
  "shifted-labels": "every label shifted by one",
  "random-labels": "random labels",
  "pixels": "scrambled pixels",
  "normalization": "unnormalized pixels",
  "stale": "parameters up to 100 steps old",
  HUMAN: "labels that people got wrong",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part(arms_lib.Part):
  """A setting, each field but name, title and arms an option, and its arms."""

  dataset: str = option("digits", choices=("digits", "cifar10", "cifar100"))
  train_images: int | None = option(
    None, "use only the first N of them", COUNT, metavar="N"
  )
  label_noise: float = option(
    0.0,
    "share of the training labels given another class at random",
    SHARE,
    metavar="SHARE",
    rivals="labels",
  )
  asymmetric: bool = option(
    False, "flip labels to the class that each is usually mistaken for", True
  )
  validation_images: int | None = option(
    None,
    "hold out the last N of the training images, with labels as wrong as the others;"
    " default a sixth of them",
    COUNT,
    metavar="N",
  )
  random_labels: bool = option(
    False, "draw all training labels at random, from all classes", True, rivals="labels"
  )
  noisy_labels: str | None = option(
    None,
    ".npz, .npy or .pt file of labels to train on (CIFAR-10N, CIFAR-100N)",
    metavar="FILE",
    rivals="labels",
  )
  noisy_labels_key: str | None = option(None, "which array of that file", metavar="KEY")
  wrong_kind: str = option(
    "shifted-labels",
    "what is wrong with them; default shifted-labels: each label by one",
    choices=tuple(CORRUPTIONS),
  )
  augment: bool = option(
    False, "crop (4 pixels around) and mirror the training images at random", True
  )
  model: str = option(
    "mlp", "mlp for digits, else resnet18", choices=tuple(models.KINDS)
  )
  width: int | None = option(
    None, "of hidden layers, the first stage or tokens; default: the usual one", COUNT
  )
  depth: int | None = option(
    None, "hidden layers, blocks of each stage or transformer layers", COUNT
  )
  optimizer: str = option(
    "momentum", "default momentum (0.9)", choices=tuple(optimizers.OPTIMIZERS)
  )
  learning_rate: float = option(0.02, "default 0.02", POSITIVE, metavar="RATE")
  weight_decay: float | None = option(
    None, "default 0, with adamw 0.01", NOT_NEGATIVE, metavar="DECAY"
  )
  plateau_patience: int = option(
    10,
    "evaluations without a lower test loss after which nesterov-plateau divides the"
    " learning rate by ten; default 10",
    COUNT,
    metavar="N",
  )
  balanced: bool = option(
    False,
    "equally many images of each class in a microbatch, drawn anew in each step",
    True,
    rivals="order",
  )
  skew: float = option(
    0.0,
    "share of each source's images that come from three classes of its own",
    SHARE,
    metavar="SHARE",
    rivals="order",
  )
  devices: int | None = option(
    None, "that share the microbatches of each step; on a CPU virtual ones", COUNT
  )


BY_EXAMPLE = dict(by_example=True, rule="nearest_neighbors")
MEMORY = dict(memory_decay=0.98, rule="majority")


def main_job() -> tuple[Part, ...]:
  """The parts that run when nothing else is asked for."""
  eight = dict(num_microbatches=8, microbatch_size=4, seeds=5, eval_every=50)
  by_example = dict(adaptive=True, **BY_EXAMPLE)
  remembered = dict(adaptive=True, **MEMORY)
  return (
    Part(
      name="label_noise",
      title="Label noise spread evenly: 40 % of the training labels flipped",
      label_noise=0.4,
      microbatch_size=64,
      steps=1_000,
      seeds=5,
      arms=(
        PLAIN,
        *RIVALS[2:],
        *gaf_arms(2, tau=0.97),
        *gaf_arms(2, **by_example),
        *gaf_arms(2, [], ema_decay=EMA_DECAY, **by_example),
      ),
    ),
    Part(
      name="wrong_sources",
      title="Some sources are always wrong: 3 of 8 with every label shifted by one",
      wrong_sources=3,
      persistent=True,
      steps=1_000,
      arms=(
        PLAIN,
        GEOMETRIC_MEDIAN,
        *gaf_arms(8, ["choice"], tau=0.9, rule="most_neighbors"),
        *gaf_arms(8, ["choice", "loss"], **remembered),
        CLEAN,
      ),
      **eight,
    ),
    Part(
      name="nothing_wrong",
      title="Nothing is wrong",
      steps=1_000,
      arms=(
        PLAIN,
        *gaf_arms(8, ["choice"], **remembered),
        *gaf_arms(8, ["choice"], **by_example),
      ),
      **eight,
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
  found = []
  for part in parts:
    own = [text.format(getattr(part, name)) for name, text in said.items()]
    title = ", ".join([*_title(part), *own])
    found.append(dataclasses.replace(part, title=title))
  return found


def _title(part):
  """What a setting is, in words."""
  said = [f"{part.dataset}, {part.model}"]
  if part.train_images:
    said.append(f"{part.train_images:,} training images")
  if part.noisy_labels and part.wrong_kind != HUMAN:
    key = part.noisy_labels_key
    said.append("noisy labels" + (f" ({key})" if key else ""))
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
