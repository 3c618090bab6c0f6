"""Options: bad ones end with one sentence, good ones become the right arms."""

import pytest

import options
import plan
from common import arms


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
    (
      "--microbatch-size 500",
      "more than the 998 training images that are left of 1197",
    ),
    ("--wrong-sources 1 --wrong-kind fog", "fog"),
    ("--wrong-kind pixels", "--wrong-kind goes with --wrong-sources"),
    ("--wrong-sources 0 --wrong-kind pixels", "goes with --wrong-sources"),
    ("--augment", "--augment goes with --dataset cifar10 or cifar100"),
    ("--augment --dataset digits", "--augment goes with --dataset"),
    ("--plateau-patience 3", "goes with --optimizer nesterov-plateau"),
    ("--plateau-patience 3 --optimizer adam", "goes with --optimizer"),
    ("--plateau-patience 0 --optimizer nesterov-plateau", "at least 1"),
    ("--softness -0.1", "at least 0"),
    ("--softness 0.1 --rule running_average", "--softness goes with --rule"),
    ("--softness 0.1 --rule min_neighbors", "leave_one_out, most_neighbors"),
    ("--anchor-decay 1", "from 0 to below 1"),
    ("--anchor-decay 0.9 --rule sequential", "replaces --rule and --softness"),
    ("--anchor-decay 0.9 --softness 0.1", "replaces --rule and --softness"),
    ("--weight-decay -1", "at least 0"),
    ("--label-noise 0.1 --random-labels", "not allowed with"),
    ("--model vit --width 24", "--width 24 is not a multiple of 16, as vit needs"),
    ("--model vit-l16 --width 32", "not a multiple of 64"),
    ("--depth 0", "at least 1"),
    ("--train-images 0", "at least 1"),
    ("--train-images 1198", "1198 training images are more than the 1197"),
    ("--train-images 15", "2 microbatches of 10 are more than the 13"),
    ("--balanced --microbatch-size 12", "--microbatch-size 12 must be a multiple"),
    ("--balanced --microbatch-size 500", "more than the 998"),
    ("--balanced --train-images 30", "need 2 images of each class, but class"),
    ("--skew 0.5 --balanced", "not allowed with"),
    ("--skew 1.5", "0 to 1"),
    ("--persistent", "--persistent goes with --wrong-sources"),
    ("--tau-quantile 0 --rule majority", "above 0, at most 1"),
    ("--tau-quantile 0.5", "--tau-quantile goes with --rule leave_one_out"),
    ("--adaptive-tau --rule most_neighbors", "--adaptive-tau goes with --rule"),
    ("--adaptive-tau --tau-quantile 0.5", "not allowed with"),
    ("--by-example --devices 2", "does not go with --devices"),
    ("--by-example --target-accept-rate 0.5", "go with --target-accept-rate"),
    ("--by-example --model resnet18", "without BatchNorm"),
    ("--by-example --wrong-sources 1 --wrong-kind stale", "--wrong-kind stale"),
    ("--memory-decay 0.9 --anchor-decay 0.9", "does not go with --anchor-decay"),
    ("--memory-decay 1", "from 0 to below 1"),
    ("--model patches-mlp --wrong-sources 1 --wrong-kind normalization", "no pixels"),
    ("--validation-images 0", "at least 1"),
    ("--validation-images 1180", "more than the 17 training images that are left"),
    ("--label-smoothing 1.1", "0 to 1"),
    ("--ema-decay 1", "from 0 to below 1"),
    ("--mixup --microbatch-size 1", "--mixup goes with microbatches of at least 2"),
    ("--skew 0.5 --train-images 8 --microbatch-size 1", "none of the 7 training"),
    ("--validation-images 1198", "more than the 0 training images that are left"),
    ("--train-images 5 --microbatch-size 3", "more than the 4 training images"),
    ("--mixup --devices 2", "--mixup does not go with --devices"),
    ("--asymmetric", "--asymmetric goes with --label-noise"),
    ("--asymmetric --random-labels", "--asymmetric goes with --label-noise"),
    (
      "--asymmetric --label-noise 0.4 --dataset cifar100",
      "--asymmetric goes with --dataset digits or cifar10",
    ),
    ("--wrong-kind human-labels", "--wrong-kind goes with --wrong-sources"),
    (
      "--wrong-kind human-labels --wrong-sources 1 --dataset cifar10",
      "--wrong-kind human-labels goes with --noisy-labels",
    ),
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


def test_main_job_has_its_parts_and_every_control():
  noise, sources, nothing = parts = options.parts(options.parse([]))
  assert noise.label_noise == 0.4 and not noise.wrong_sources
  assert sources.wrong_sources == 3 and sources.persistent
  assert not nothing.label_noise and not nothing.wrong_sources
  for part in parts:
    assert part.seeds == 5 and part.arms[0] == plan.PLAIN
    gaf = [arm for arm in part.arms if arm.is_gaf]
    assert len(gaf) > 1
    for arm in gaf:
      kinds = list(part.controls(arm.name))
      # With two microbatches random choice would be GAF itself. What is combined with
      # the simple ways is for those to be compared with.
      usual = ["choice"] if arm.by_example or part.num_microbatches > 2 else ["steps"]
      assert kinds[:1] == ([] if arm.ema_decay else usual)
      for control in part.controls(arm.name).values():
        before = part.arms[: part.arms.index(control)]
        assert arm in before and not control.is_gaf
  assert "loss" in noise.controls("by_example_nearest_neighbors_adaptive")
  assert "loss" in sources.controls("majority_memory_0.98_adaptive")
  rivals = lambda part: [arm.name for arm in part.arms if arm.role == "rival"]
  assert rivals(noise)[:3] == ["plain", "ema", "mixup_ema"]
  assert rivals(sources)[:2] == ["plain", "geometric_median"]
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
  # Each followed by its controls.
  for gaf, choice, steps in (arms[:3], arms[3:]):
    assert gaf.is_gaf and choice.imitates == steps.imitates == gaf.name
    assert (choice.control, steps.control) == ("choice", "steps")


def test_steered():
  (part,) = options.parts(options.parse(["--target-accept-rate", "0.2"]))
  _, gaf, control = part.arms
  assert gaf.target == 0.2 and gaf.is_gaf and control.imitates == gaf.name
  assert control.control == "steps"


def test_by_example_compares_with_the_nearest_unless_told_otherwise():
  argv = "--by-example --tau-quantile 0.5 --label-noise 0.4"
  (part,) = options.parts(options.parse(argv.split()))
  _, gaf, choice, loss = part.arms
  assert gaf.by_example and gaf.rule == "nearest_neighbors" and gaf.is_gaf
  assert gaf.label == "GAF by example nearest_neighbors best 50%"
  assert (choice.control, loss.control) == ("choice", "loss")
  (part,) = options.parts(options.parse([*argv.split(), "--rule", "majority"]))
  assert part.arms[1].rule == "majority"


def test_ways_that_anybody_can_use():
  argv = "--label-smoothing 0.1 --mixup --ema-decay 0.9 --num-microbatches 3"
  (part,) = options.parts(options.parse(argv.split()))
  plain, same, gaf, *controls = part.arms
  # The plain mean with and without them; GAF and its controls have them.
  assert plain == plan.PLAIN and same.role == "rival"
  for arm in (same, gaf, *controls):
    assert (arm.smoothing, arm.mixup, arm.ema_decay) == (0.1, True, 0.9)
  assert gaf.label == "GAF sequential tau 0.97, smoothing 0.1, mixup, weight EMA"
  assert gaf.name == "sequential_tau0.97_smoothing_mixup_ema"
  # Each alone and none of them GAF, which has a name of its own with each.
  kinds = [{}, {"smoothing": 0.1}, {"mixup": True}, {"ema_decay": 0.9}]
  names = {plan.gaf_arms(2, tau=0.9, **kind)[0].name for kind in kinds}
  assert len(names) == 4


def test_roles():
  gaf, *controls = arms.gaf_arms(3, ["choice", "steps", "loss"], tau=0.9)
  assert gaf.role == "gaf"
  assert [arm.role for arm in controls] == ["chance", "chance", "rival"]
  steered = arms.gaf_arms(3, [], target=0.5)
  assert steered[0].role == "gaf" and not arms.GEOMETRIC_MEDIAN.is_gaf
  for arm in (arms.PLAIN, *arms.RIVALS, arms.GEOMETRIC_MEDIAN):
    assert arm.role == "rival"
  assert arms.CLEAN.role == arms.RIGHT.role == "ideal"


def test_noise_like_that_of_people():
  argv = "--label-noise 0.4 --asymmetric --validation-images 100"
  (part,) = options.parts(options.parse(argv.split()))
  assert part.asymmetric and part.validation_images == 100
  assert part.title == "digits, mlp, 40% of the training labels confused"
  argv = "--dataset cifar10 --model mlp --wrong-sources 1 --wrong-kind human-labels"
  argv += " --noisy-labels x.npz --noisy-labels-key worse_label"
  (part,) = options.parts(options.parse(argv.split()))
  assert part.wrong_kind == plan.HUMAN and part.noisy_labels == "x.npz"
  # They are not everybody's.
  assert part.title == (
    "cifar10, mlp, 1 of 2 microbatches with labels that people got wrong"
  )


def test_sources_that_persist():
  argv = "--wrong-sources 2 --persistent --num-microbatches 8 --skew 0.5"
  argv += " --memory-decay 0.98 --rule majority --adaptive-tau"
  (part,) = options.parts(options.parse(argv.split()))
  assert part.persistent and part.skew == 0.5
  assert part.title == (
    "digits, mlp, 50% of each source's images from classes of its own, always 2 of 8"
    " microbatches with every label shifted by one"
  )
  assert part.arms[1].label == "GAF majority memory 0.98 adaptive"
  assert part.arms[1].adaptive and part.arms[1].memory_decay == 0.98


def test_new_kinds_of_experiment():
  argv = "--dataset cifar10 --train-images 500 --random-labels --augment --balanced"
  argv += " --model resnet34-cifar --width 8 --depth 1 --optimizer nesterov-plateau"
  argv += " --plateau-patience 3 --weight-decay 0.5 --microbatch-size 20"
  argv += " --num-microbatches 4 --wrong-sources 2 --wrong-kind stale"
  (part,) = options.parts(options.parse(argv.split()))
  asked = dict(
    dataset="cifar10",
    train_images=500,
    random_labels=True,
    augment=True,
    balanced=True,
    model="resnet34-cifar",
    width=8,
    depth=1,
    optimizer="nesterov-plateau",
    plateau_patience=3,
    weight_decay=0.5,
    microbatch_size=20,
    num_microbatches=4,
    wrong_sources=2,
    wrong_kind="stale",
  )
  assert {name: getattr(part, name) for name in asked} == asked
  assert part.title == (
    "cifar10, resnet34-cifar, 500 training images, random training labels, 2 of 4"
    " microbatches with parameters up to 100 steps old"
  )


def test_what_is_not_asked_for_is_off():
  (part,) = options.parts(options.parse(["--tau", "0.9"]))
  given = {"title": part.title, "arms": part.arms}
  assert part == plan.Part(name="experiment", **given)


@pytest.mark.parametrize(
  "argv, asked, label",
  [
    ("--rule leave_one_out --softness 0.1", {"softness": 0.1}, "soft 0.1 tau 0.97"),
    ("--anchor-decay 0", {"anchor_decay": 0.0}, "anchor 0 tau 0.97"),
    ("--by-leaf --tau 0.8", {"by_leaf": True, "tau": 0.8}, "by leaf tau 0.8"),
    (
      "--target-accept-rate 0.5 --rule min_neighbors",
      {"target": 0.5, "rule": "min_neighbors"},
      "min_neighbors steered to 50%",
    ),
  ],
)
@pytest.mark.parametrize("k", [2, 3])
def test_ways_to_filter(argv, asked, label, k):
  argv = [*argv.split(), "--num-microbatches", str(k)]
  (part,) = options.parts(options.parse(argv))
  plain, gaf, *controls = part.arms
  assert [arm.control for arm in controls] == ["choice", "steps"][k == 2 :]
  for name, value in asked.items():
    assert getattr(gaf, name) == value and getattr(plain, name) != value
  for arm in (gaf, *controls):
    assert arm.label.endswith(label)
  assert len({arm.name for arm in part.arms}) == len({a.label for a in part.arms})
  assert len({arm.name for arm in part.arms}) == len(part.arms)
