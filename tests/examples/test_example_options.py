"""Options: bad ones end with one sentence, good ones become the right arms."""

import pytest

import options
import plan


@pytest.mark.parametrize(
  "argv, said",
  [
    ("--tau 2.5", "--tau"),
    ("--tau nan", "--tau"),
    ("--tau 0.9 0.9", "twice"),
    ("--tau 0.9 --target-accept-rate 0.1", "not allowed with"),
    ("--target-accept-rate 1.1", "0 to 1"),
    ("--label-noise -0.1", "0 to 1"),
    ("--label-noise 0.1 --noisy-labels x.npy", "not allowed with"),
    ("--noisy-labels x.npy", "cifar10 or cifar100"),
    ("--noisy-labels-key x", "--noisy-labels"),
    ("--dataset mnist", "mnist"),
    ("--model vgg", "vgg"),
    ("--optimizer lion", "lion"),
    ("--rule best", "best"),
    ("--learning-rate 0", "above 0"),
    ("--learning-rate inf", "above 0"),
    ("--steps 0", "at least 1"),
    ("--steps 1.5", "at least 1"),
    ("--seeds none", "at least 1"),
    ("--num-microbatches 1", "at least 2"),
    ("--wrong-sources 3", "more than the 2"),
    ("--microbatch-size 600", "more than the 1197"),
    ("--resume", "no runs/main-NUMBER"),
    ("--no-such-option", "--no-such-option"),
  ],
)
def test_bad_options(refused, tmp_path, monkeypatch, argv, said):
  monkeypatch.chdir(tmp_path)
  # The microbatches that do not fit are found after the data is there.
  assert said in refused(*argv.split())
  assert list(tmp_path.iterdir()) == []


def test_directory_that_holds_something(refused, tmp_path):
  (tmp_path / "thesis.tex").write_text("x")
  assert "already holds something" in refused("--out", tmp_path)
  assert "can be resumed" in refused("--out", tmp_path, "--resume")
  assert (tmp_path / "thesis.tex").read_text() == "x"


def test_main_job_has_both_parts_and_every_control():
  noise, sources = options.parts(options.parse([]))
  assert (noise.label_noise, noise.steps, noise.seeds) == (0.4, 4000, 5)
  assert (sources.wrong_sources, sources.steps, sources.seeds) == (3, 1500, 5)
  for part in (noise, sources):
    gaf = [arm.name for arm in part.arms if arm.is_gaf]
    imitated = [arm.imitates for arm in part.arms if arm.imitates]
    assert gaf == imitated and gaf
  assert sources.arms[-1].clean and not noise.arms[-1].clean


def test_smaller_main_job():
  for part in options.parts(options.parse(["--steps", "7", "--seeds", "1"])):
    assert (part.steps, part.seeds) == (7, 1)
  for part in options.parts(options.parse(["--quick"])):
    assert part.steps <= 400 and part.seeds == 2


def test_single_experiment():
  argv = "--dataset cifar100 --tau 0.95 0.99 --rule most_neighbors"
  argv += " --num-microbatches 4 --wrong-sources 1"
  (part,) = options.parts(options.parse(argv.split()))
  assert part.model == "resnet18" and part.num_microbatches == 4
  plain, *arms, clean = part.arms
  assert plain == plan.PLAIN and clean.clean
  assert [arm.tau for arm in arms if arm.is_gaf] == [0.95, 0.99]
  assert all(arm.rule == "most_neighbors" for arm in arms if arm.is_gaf)
  assert [arm.imitates for arm in arms[1::2]] == [arm.name for arm in arms[::2]]


def test_steered():
  (part,) = options.parts(options.parse(["--target-accept-rate", "0.2"]))
  _, gaf, control = part.arms
  assert gaf.target == 0.2 and gaf.is_gaf and control.imitates == gaf.name
