"""Runs: from the parts of a command line to its results, stopped or not."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence

import data
import features
import labels
import models
import training
from batches import Schedule
from common import devices
from common.command import UserError
from common.experiment import Experiment, run_all
from plan import Part


def experiment(
  part: Part,
  dataset: data.Dataset,
  team: devices.Team | None = None,
  made: dict | None = None,
) -> Experiment:
  """One part, with as much of the data as it asks for.

  `made` keeps features, by dataset and number of images, for parts that share them.
  """
  base = right = dataset.train_labels
  if part.noisy_labels:
    base = labels.from_file(
      part.noisy_labels, part.noisy_labels_key, right, dataset.num_classes
    )
  rows = part.train_images or len(base)
  if rows > len(base):
    raise UserError(f"{rows} training images are more than the {len(base)} there are.")
  trained = rows - (part.validation_images or rows // 6)
  if part.microbatch_size * part.num_microbatches > trained:
    raise UserError(
      f"{part.num_microbatches} microbatches of {part.microbatch_size} are more than"
      f" the {trained} training images that are left of {rows} when the others are"
      " held out for validation."
    )
  base, images = base[:rows], dataset.train_images[:rows]
  dataset = dataclasses.replace(
    dataset,
    train_images=images[:trained],
    train_labels=right[:trained],
    validation_images=images[trained:],
    validation_labels=right[trained:rows],
  )
  if models.KINDS[part.model].on_patches:
    made, key = {} if made is None else made, (part.dataset, rows, trained)
    if key not in made:
      made[key] = features.of_patches(dataset)
    dataset = made[key]
  schedules = [Schedule(part, dataset, base, seed) for seed in range(part.seeds)]
  trainer = training.Trainer(part, dataset, team.mesh if team else None)
  return Experiment(part, schedules, trainer, team)


def run(
  prog: str,
  options: argparse.Namespace,
  parts: Sequence[Part],
  name: str,
  received: list[int],
  finish: Callable,
) -> int:
  """Runs all arms of all parts, or what is left of them; see `run_all`."""
  # All that can be wrong with the data comes out before a directory is made.
  datasets = {
    dataset: data.load(dataset, options.data_dir, options.download)
    for dataset in sorted({part.dataset for part in parts})
  }
  team, made = devices.join(options), {}
  if team.first:
    for dataset in datasets.values():
      for note in dataset.notes:
        print(f"{prog}: note: {note}", file=sys.stderr)
  experiments = team.together(
    lambda: [experiment(part, datasets[part.dataset], team, made) for part in parts]
  )
  team.check_same([(parts, one.schedules[0].labels.tobytes()) for one in experiments])
  return run_all(prog, options, name, experiments, received, finish)
