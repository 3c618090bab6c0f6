"""Paper: every figure is planned as it says, and drawn from a run that may be cut."""

import csv
import dataclasses
import json
import os
import pickle
import signal

import jax
import numpy as np
import pytest

import charts
import figures
import models
import optimizers
import paper
import plan
from common import arms, experiment, storage
from common.arms import RIGHT
from common.command import UserError

pytestmark = [
  pytest.mark.experiments,
  pytest.mark.usefixtures("quickly_compiled", "compiled_once"),
]
_TINY = ("--seeds", "3", "--width", "8", "--steps", "6", "--eval-every", "3")
_ROWS = {"digits": 1_197, "cifar10": 50_000, "cifar100": 50_000}
_CIFAR = ("cifar10", "cifar100")
_CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100}
_BY_EXAMPLE = ("by-example", "batch-size", "kept-share", "skew")
# Nobody labelled the digits wrong, features are no images, BatchNorm mixes examples.
_REFUSED = {("human", "digits"), ("vit", "patches")} | {
  (name, setting) for name in _BY_EXAMPLE for setting in _CIFAR
}
_PLANNED = [
  (name, setting)
  for name in figures.FIGURES
  for setting in figures.SETTINGS
  if (name, setting) not in _REFUSED
]


def _parts(name, *argv):
  return paper.parts(paper.parse([name, *argv]))


@pytest.mark.parametrize("name, setting", _PLANNED)
def test_plans(name, setting):
  parts = _parts(name, "--setting", setting)
  assert len({part.name for part in parts}) == len(parts)
  assert len({part.title for part in parts}) == len(parts)
  for part in parts:
    assert len({arm.name for arm in part.arms}) == len(part.arms)
    assert len({arm.label for arm in part.arms}) == len(part.arms)
    assert part.arms[0] == plan.PLAIN
    assert part.dataset == figures.SETTINGS[setting].base["dataset"]
    spared = bool(part.wrong_sources) and not part.persistent
    if name == "by-example":
      spared = bool(part.label_noise or part.noisy_labels)
    assert (plan.CLEAN in part.arms) is spared
    assert (RIGHT in part.arms) is part.persistent
    chance = set()
    for arm in part.arms:
      # Names become folders.
      assert not set(arm.name) & set("/ %")
      controls = part.controls(arm.name)
      if not arm.is_gaf:
        assert set(controls) == (
          {"right"} if RIGHT in part.arms[1:] and arm == plan.PLAIN else set()
        )
        continue
      if part.num_microbatches == 2 and not arm.by_example:
        # Random choice would be GAF itself.
        assert list(controls) == ["steps"]
      assert set(controls) <= {"choice", "steps", "loss"}
      chance |= {*controls} - {"loss"}
      for control in controls.values():
        assert part.arms.index(control) > part.arms.index(arm)
        same = dict(name="", label="", imitates=None, control=None)
        ours, theirs = (dataclasses.replace(one, **same) for one in (arm, control))
        assert ours == theirs
    assert chance or name == "microbatch-distance"
    # What would only come out when it runs.
    rows = part.train_images or _ROWS[part.dataset]
    assert part.microbatch_size * part.num_microbatches <= rows - rows // 6
    if part.balanced:
      assert part.microbatch_size % _CLASSES[part.dataset] == 0
      assert not part.skew
    assert not part.augment or part.dataset != "digits"
    assert (part.width or 64) % models.KINDS[part.model].divisor == 0
    assert part.optimizer in optimizers.OPTIMIZERS
    assert part.wrong_kind in plan.CORRUPTIONS
    assert part.noisy_labels_key is None or part.noisy_labels


@pytest.mark.parametrize(
  "name, setting",
  [(name, "cifar10") for name in _BY_EXAMPLE] + [("skew", "cifar100")],
)
def test_single_examples_need_a_model_without_batchnorm(name, setting):
  with pytest.raises(UserError, match="BatchNorm in resnet18"):
    _parts(name, "--setting", setting)
  assert _parts(name, "--setting", setting, "--model", "mlp")


def test_a_vision_transformer_takes_images():
  with pytest.raises(UserError, match="takes images"):
    _parts("vit", "--setting", "patches")


def test_setting_of_the_paper():
  for name in {*figures.FIGURES} - {*_BY_EXAMPLE}:
    for part in _parts(name, "--setting", "cifar100"):
      if name != "vit":
        assert part.model == "resnet18" and part.width is part.depth is None
      if name not in ("vit", "optimizers"):
        assert part.optimizer == optimizers.PLATEAU
      if name not in ("microbatch-size", "microbatch-distance"):
        assert part.microbatch_size == 100
      assert part.balanced and part.augment
      assert part.weight_decay == 0.01 and part.train_images is None
  (_, vit) = _parts("vit", "--setting", "cifar100")
  assert vit.model == "vit-l16"
  sizes = [
    p.microbatch_size for p in _parts("microbatch-size", "--setting", "cifar100")
  ]
  assert sizes == list(range(100, 1001, 100))


def test_what_the_figures_vary():
  taus = [arm.tau for arm in _parts("tau")[0].arms if arm.is_gaf]
  assert len(taus) > 5 and taus == sorted(taus)
  assert [part.label_noise for part in _parts("tau")] == [0.0, 0.4]
  assert [part.optimizer for part in _parts("optimizers")] == list(
    optimizers.OPTIMIZERS
  )
  shares = [part.label_noise for part in _parts("noise")]
  assert len(shares) > 5 and shares == sorted(shares) and shares[0] == 0
  (random,) = _parts("random-labels")
  assert random.random_labels
  for part in _parts("noise") + _parts("human", "--setting", "patches"):
    assert {*plan.RIVALS} < {*part.arms}
  for setting in ("digits", "patches"):
    sources = _parts("memory", "--setting", setting)
    people = {plan.HUMAN} if setting == "patches" else set()
    kinds = {part.wrong_kind for part in sources if part.wrong_sources}
    assert kinds == {"shifted-labels", "random-labels", "pixels", "stale"} | people
    for part in sources:
      assert part.num_microbatches == 8 and part.wrong_sources in (0, 1, 2, 3)
      assert part.persistent is bool(part.wrong_sources)
      assert bool(part.noisy_labels) is (part.wrong_kind == plan.HUMAN)
      assert {arms.GEOMETRIC_MEDIAN, *plan.RIVALS[:3]} < {*part.arms}
      assert [arm.control for arm in part.arms].count("loss") == 2
      assert any(arm.memory_decay and arm.ema_decay for arm in part.arms)
    examples = _parts("by-example", "--setting", setting)
    assert [part.name for part in examples if part.asymmetric] == ["confused"]
    assert {p.noisy_labels_key for p in examples} == (
      {None, "aggre_label", "random_label1", "worse_label"} if people else {None}
    )
    for part in examples:
      assert {*plan.RIVALS} < {*part.arms}
      assert any(arm.is_gaf and arm.ema_decay for arm in part.arms)
  sizes = [2 * part.microbatch_size for part in _parts("batch-size")]
  assert sizes == [32, 64, 128, 256, 512]
  (share,) = _parts("kept-share")
  shares = [arm.quantile for arm in share.arms if arm.is_gaf and arm.quantile]
  assert len(shares) > 5 and shares == sorted(shares)
  for part in _parts("rules"):
    rules = {arm.rule for arm in part.arms if arm.is_gaf}
    assert rules == {"sequential", "leave_one_out", "min_neighbors", "most_neighbors"}
    gaf = [arm for arm in part.arms if arm.is_gaf]
    assert any(arm.softness for arm in gaf) and any(arm.by_leaf for arm in gaf)
    assert any(arm.anchor_decay for arm in gaf)
  for name, figure in figures.FIGURES.items():
    assert figure.draw in charts.DRAW
    if figure.draw == "over_x":
      x = [getattr(part, figure.x) for part in _parts(name)]
      assert x == sorted(set(x)) and len(x) > 3


def test_options_change_all_parts():
  argv = "--steps 40 --seeds 4 --eval-every 8 --width 16 --depth 3"
  for part in _parts("memory", "--setting", "cifar10", *argv.split()):
    assert (part.steps, part.seeds, part.eval_every) == (40, 4, 8)
    assert (part.model, part.width, part.depth) == ("resnet18", 16, 3)
  for part in _parts("vit", "--setting", "cifar10", "--model", "resnet34-cifar"):
    # The setting's width is of its own model.
    assert (part.model, part.width, part.depth) == ("resnet34-cifar", None, None)
  quick = _parts("memory", "--quick")
  for part, usual in zip(quick, _parts("memory")):
    assert part.steps == usual.steps // 10 and part.seeds == 2
  for part in _parts("tau", "--quick", "--steps", "77", "--seeds", "5"):
    assert (part.steps, part.seeds) == (77, 5)
  some = _parts("noise", "--only", "flipped0.4", "flipped0.05")
  assert [part.name for part in some] == ["flipped0.05", "flipped0.4"]


def test_label_files(tmp_path):
  for setting, file in figures.LABEL_FILES.items():
    argv = ["--setting", setting, "--data-dir", str(tmp_path)]
    (part,) = _parts("human", *argv)
    assert part.noisy_labels == str(tmp_path / file)
    (part,) = _parts("human", *argv, "--noisy-labels", "mine.npz")
    assert part.noisy_labels == "mine.npz"
    with pytest.raises(UserError, match="nobody labelled the digits wrong"):
      _parts("human", "--setting", "digits")


# By kind of drawing: a figure, and parts of it that are enough.
_DRAWN = {
  "curves": ("random-labels", ["random_labels"]),
  "distances": ("microbatch-distance", ["size5", "size10"]),
  "over_tau": ("tau", ["flipped0.4"]),
  "over_x": ("noise", ["flipped0", "flipped0.4"]),
  # Of its arms one has a memory and an average, and one running losses.
  "forest": ("memory", ["shifted-labels1"]),
}


def _run(kind, path, *more):
  name, only = _DRAWN[kind]
  return paper.main([name, *_TINY, "--only", *only, "--out", str(path), *more])


@pytest.fixture(scope="module")
def over_x(tmp_path_factory, quickly_compiled, compiled_once):
  """A run that nothing interrupted."""
  path = tmp_path_factory.mktemp("over_x") / "run"
  assert _run("over_x", path) == 0
  return path


@pytest.fixture(scope="module")
def forest(tmp_path_factory, quickly_compiled, compiled_once):
  """Another one."""
  path = tmp_path_factory.mktemp("forest") / "run"
  assert _run("forest", path) == 0
  return path


@pytest.mark.parametrize("kind", list(charts.DRAW))
def test_from_the_command_to_the_chart(kind, tmp_path, request, capsys):
  path = tmp_path / "run"
  if kind in ("over_x", "forest"):
    path = request.getfixturevalue(kind)
  else:
    assert _run(kind, path) == 0
    text = (path / "results.md").read_text()
    assert capsys.readouterr().out.startswith(text)
  name, only = _DRAWN[kind]
  figure = figures.FIGURES[name]
  assert figure.draw == kind
  parts = _parts(name, *_TINY, "--only", *only)
  files = {p.name for p in path.iterdir()}
  outputs = {"config.json", "metrics.jsonl", "results.md", "results.csv", "checkpoints"}
  assert files == outputs | {f"{name}.png"}
  png = (path / f"{name}.png").read_bytes()
  assert png.startswith(b"\x89PNG") and len(png) > 10_000
  text = (path / "results.md").read_text()
  assert text.startswith(f"## {figure.title}\n\n")
  gaf = any(arm.is_gaf for arm in parts[0].arms)
  for part in parts:
    assert text.count(f"| **{part.title}**") == (3 if gaf else 0)
    shown = [arm.label for arm in part.arms if gaf and arm.role != "chance"]
    for label in shown:
      assert text.count(f"\n| {label} ") == 3 * len(parts)
  assert not gaf or "95 % confidence interval" in text
  rows = [
    json.loads(line) for line in (path / storage.METRICS).read_text().splitlines()
  ]
  with open(path / "results.csv") as file:
    table = list(csv.DictReader(file))
  expected = [
    (p.name, arm.name, str(seed)) for p in parts for arm in p.arms for seed in range(3)
  ]
  assert [(row["part"], row["arm"], row["seed"]) for row in table] == expected
  for line in table:
    own = [
      row
      for row in rows
      if (row["part"], row["arm"], str(row["seed"]))
      == (line["part"], line["arm"], line["seed"])
    ]
    first, second = own
    tested = [row["test_accuracy"] for row in own]
    assert float(line["final"]) == second["test_accuracy"]
    assert float(line["best"]) == max(tested)
    later = second["validation_accuracy"] > first["validation_accuracy"]
    assert float(line["picked"]) == tested[later]


def test_stopped_and_resumed(forest, tmp_path, monkeypatch, capsys, assert_same_run):
  """Twice, with an average to go on with, a memory, and means of losses."""
  path = tmp_path / "run"
  append = storage.RunDirectory.append_metrics
  remembering = "majority_memory_0.98_adaptive"
  stops = [f"{remembering}_ema", f"{remembering}_smallest_loss"]

  def stop(self, row):
    append(self, row)
    if row["arm"] in stops and (row["step"], row["seed"]) == (3, 0):
      stops.remove(row["arm"])
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(storage.RunDirectory, "append_metrics", stop)
    assert _run("forest", path) == 128 + signal.SIGTERM
    assert "paper.py: stopped" in capsys.readouterr().err
    assert not (path / "results.md").exists()
    assert _run("forest", path, "--resume") == 128 + signal.SIGTERM
  assert stops == [] and not (path / "results.md").exists()
  assert _run("forest", path, "--resume") == 0
  assert_same_run(path, forest, "shifted-labels1")
  assert (path / "memory.png").read_bytes() == (forest / "memory.png").read_bytes()


def test_programs_are_freed_after_the_last_part_that_needs_them(tmp_path, monkeypatch):
  """Those of many parts take more pieces of memory than a process may map."""
  happened = []

  class Trainer(experiment.Trainer):
    def forget(self):
      super().forget()
      happened.append(self)

  def run(self, _):
    happened.append(self.part.name)
    self.trainer._cached("a", lambda: jax.jit(lambda x: x + 1), 1)
    if self.part.name == "flipped0.3":
      raise experiment.Stopped

  monkeypatch.setattr(experiment.Experiment, "run", run)
  one, two, three = Trainer(), Trainer(), Trainer()
  options = paper.parse(["noise", "--out", str(tmp_path / "run")])
  parts = zip(_parts("noise"), (one, one, two, three))
  made = [experiment.Experiment(part, [], trainer) for part, trainer in parts]
  assert experiment.run_all("paper.py", options, "noise", made, [], None) > 128
  names = ("flipped0", "flipped0.05", one, "flipped0.15", two, "flipped0.3")
  assert happened == [*names]
  assert [bool(t._compiled) for t in (one, two, three)] == [False, False, True]


def test_what_is_kept(over_x, tmp_path, monkeypatch):
  """Table, picture and numbers, and the command that makes them again."""
  kept = tmp_path / "kept"
  kept.mkdir()
  more = ("--resume", "--keep", str(kept), "--data-dir", str(tmp_path))
  assert _run("over_x", over_x, *more) == 0
  names = {"noise.md", "noise.png", "noise.csv", "noise-told-apart.csv"}
  assert {path.name for path in kept.iterdir()} == names
  for name, theirs in (("noise.png",) * 2, ("noise.csv", "results.csv")):
    assert (kept / name).read_bytes() == (over_x / theirs).read_bytes()
  title, made, *rest = (kept / "noise.md").read_text().split("\n\n")
  before, *theirs = (over_x / "results.md").read_text().split("\n\n")
  assert f"#{title}" == before and rest == theirs
  said = " ".join(_TINY)
  assert made.startswith(
    f"Made by `python paper.py noise {said} --only flipped0 flipped0.4` on 20"
  )
  assert "CPU" in made and "Python 3" in made and "gaf_optax" in made
  with open(kept / "noise-told-apart.csv") as file:
    told = list(csv.DictReader(file))
  # Where nothing is flipped, nothing can be told.
  assert {line["part"] for line in told} == {"flipped0.4"} and len(told) == 2 * 3
  assert all(0 <= float(line["gradient norm"]) <= 1 for line in told)
  # Of another setting it has another name.
  monkeypatch.chdir(tmp_path)
  argv = "random-labels --setting cifar100 --model mlp --width 4 --depth 1 --steps 1"
  argv += f" --seeds 1 --keep kept --data-dir {_write_cifar(tmp_path, 'cifar100')}"
  assert paper.main(argv.split()) == 0
  names = {f"random-labels-cifar100{end}" for end in (".md", ".png", ".csv")}
  assert names < {path.name for path in kept.iterdir()}


def test_resume_with_other_parts(over_x, refused):
  """They would take the place of the first ones' metrics."""
  before = (over_x / "metrics.jsonl").read_bytes()
  argv = ("noise", *_TINY, "--only", "flipped0.9", "--out", over_x, "--resume")
  assert "--only was flipped0 flipped0.4" in refused(*argv, command="paper")
  assert (over_x / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
  "argv, said",
  [
    (("tau", *_TINY), "NAME was noise, now it is tau"),
    (("noise", *_TINY, "--setting", "cifar10"), "--setting was digits"),
    (("noise", *_TINY[2:], "--seeds", "4"), "--seeds was 3, now it is 4"),
  ],
)
def test_resume_of_something_else(over_x, refused, argv, said, tmp_path):
  if "cifar10" in argv:
    argv = (*argv, "--data-dir", _write_cifar(tmp_path, "cifar10"))
  only = ("--only", "flipped0", "flipped0.4", "--out", over_x, "--resume")
  assert said in refused(*argv, *only, command="paper")


def _write_cifar(root, name):
  """Small archives in the official layout."""
  rng = np.random.default_rng(0)
  folder, files, key = {
    "cifar10": (
      "cifar-10-batches-py",
      [f"data_batch_{i}" for i in range(1, 6)],
      "labels",
    ),
    "cifar100": ("cifar-100-python", ["train"], "fine_labels"),
  }[name]
  path = root / folder
  path.mkdir()
  for file in (*files, "test" if name == "cifar100" else "test_batch"):
    rows = 1_200
    batch = {
      key: (np.arange(rows) % _CLASSES[name]).tolist(),
      "data": rng.integers(0, 256, (rows, 3072)).astype(np.uint8),
    }
    (path / file).write_bytes(pickle.dumps(batch, protocol=2))
  return root


@pytest.mark.parametrize(
  "argv, said",
  [
    ("nothing", "nothing"),
    ("", "NAME"),
    ("tau --setting mnist", "mnist"),
    ("tau --only flipped0.5", "--only flipped0.5: the parts are flipped0, flipped0.4."),
    ("tau --only flipped0 nothing", "--only nothing: the parts are"),
    ("human", "nobody labelled the digits wrong; choose another --setting."),
    ("human --setting cifar100", "cifar-100-python"),
    ("tau --setting cifar10", "cifar-10-python.tar.gz"),
    ("tau --seeds 0", "at least 1"),
    ("tau --model vgg", "vgg"),
    (
      "vit --steps 1 --seeds 1 --width 10",
      "--width 10 is not a multiple of 16, as vit needs",
    ),
    (
      "tau --steps 1 --model vit --width 10",
      "--width 10 is not a multiple of 16, as vit needs",
    ),
    ("vit --setting cifar100 --width 96", "not a multiple of 64, as vit-l16 needs"),
    ("tau --resume", "there is no runs/tau-digits-NUMBER"),
  ],
)
def test_refusals(refused, tmp_path, monkeypatch, argv, said):
  monkeypatch.chdir(tmp_path)
  assert said in refused(*argv.split(), command="paper")
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("setting", ["cifar10", "cifar100"])
def test_missing_label_file(refused, tmp_path, monkeypatch, setting):
  monkeypatch.chdir(tmp_path)
  _write_cifar(tmp_path, setting)
  argv = ("human", "--setting", setting, "--data-dir", tmp_path, "--width", "4")
  said = refused(*argv, command="paper")
  path = tmp_path / figures.LABEL_FILES[setting]
  assert f"{path} cannot be read: No such file or directory." in said
  assert not (tmp_path / "runs").exists()


def test_train_does_not_resume_a_run_of_the_paper(over_x, refused):
  assert "begun with other options" in refused("--out", over_x, "--resume")


def test_default_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  argv = ["microbatch-distance", *_TINY, "--only", "size10"]
  for number in (1, 2):
    assert paper.main(argv) == 0
    path = tmp_path / "runs" / f"microbatch-distance-digits-{number}"
    assert (path / "microbatch-distance.png").exists()


@pytest.mark.parametrize("spelt", ["--out {} --keep {} --data-dir {}"] + ["--out={}"])
def test_the_command_that_is_kept(spelt):
  argv = f"tau {spelt.replace('{}', 'x')} --resume --seeds 3 --only flipped0.4"
  said = paper.parse(argv.split()).said
  assert said == "python paper.py tau --seeds 3 --only flipped0.4"


def test_confused_labels_are_of_data_whose_classes_are_known():
  names = {part.name for part in _parts("by-example", "--setting", "patches")}
  assert "confused" in names and "worse_label" in names
  argv = ("--setting", "cifar100", "--model", "mlp")
  assert "confused" not in {part.name for part in _parts("by-example", *argv)}
