"""Training: steps against independent computations, exact resuming, errors, reports."""

import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

K, ROWS = 4, 6
TINY = ("--steps", 6, "--eval-every", 2, "--seeds", 2, "--width", 8)


@pytest.fixture
def run(images_train, capsys):
  """A function that runs the command and returns its output."""

  def run(*argv, code=0):
    assert images_train.main([str(a) for a in argv]) == code, capsys.readouterr().err
    return capsys.readouterr().out

  return run


def files(path):
  """Metrics and final arrays of a run."""
  manager = ocp.CheckpointManager((path / "checkpoints").absolute())
  args = ocp.args.Composite(arrays=ocp.args.StandardRestore())
  arrays = manager.restore(manager.latest_step(), args=args)["arrays"]
  manager.close()
  leaves = {jax.tree_util.keystr(k): v for k, v in jax.tree.leaves_with_path(arrays)}
  return (path / "metrics.csv").read_bytes(), leaves


def assert_same_run(path, other):
  (metrics, arrays), (metrics_too, arrays_too) = files(path), files(other)
  assert metrics == metrics_too
  assert arrays.keys() == arrays_too.keys() and len(arrays) > 5
  for name, array in arrays.items():
    np.testing.assert_array_equal(array, arrays_too[name], name)


def start(images_train, **options):
  """A trainer, its state, microbatches of digits, and their micro-gradients."""
  digits = images_train.data.load("digits", "")
  model = images_train.models.make("mlp", 10, 8)
  network = images_train.Network(model, (16.0, (0.0,), (1.0,)))
  trainer = images_train.Trainer(network, K, 0.1, 0.0, **options)
  rows = np.arange(K * ROWS).reshape(K, ROWS)
  if options.get("last_layer"):
    rows = rows[:, :1]
  images, labels = digits.train_images[rows], digits.train_labels[rows]
  state = jax.tree.map(lambda x: x[0], trainer.init(np.arange(1), images[0]))
  images = images / 16

  def loss(params, x, y):
    logits = model.apply({"params": params}, x, train=True)
    losses = jax.nn.logsumexp(logits, axis=1) - logits[np.arange(len(y)), y]
    return losses.mean()

  grads = [jax.grad(loss)(state.params, x, y) for x, y in zip(images, labels)]
  return trainer, state, images, labels, grads


def assert_moved_by(images_train, trainer, state, images, labels, weights, expected):
  """Nesterov's first step: 1.9 times the gradient, at learning rate 0.1."""
  step = trainer.last_layer_step if trainer.last_layer else trainer.train_step
  args = [jnp.asarray(x, jnp.float32) for x in (images, weights)]
  new, found = jax.jit(step)(state, args[0], labels, args[1])
  moved = jax.tree.map(lambda p, g: p - 0.1 * 1.9 * g, state.params, expected)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), new.params, moved
  )
  return found


@pytest.mark.parametrize("last_layer", [False, True])
def test_tau_2_is_the_plain_mean(images_train, last_layer):
  """With weights, the weighted mean over the microbatches."""
  trainer, *seen, grads = start(images_train, last_layer=last_layer)
  for weights in (np.ones(K), np.array([1.0, 0.0, 1.0, 0.0])):
    mean = lambda *g: np.average(np.float64(g), axis=0, weights=weights)
    expected = jax.tree.map(mean, *grads)
    found = assert_moved_by(images_train, trainer, *seen, weights, expected)
    assert found["num_accepted"] == weights.sum()


@pytest.mark.parametrize("last_layer", [False, True])
def test_step_averages_what_agrees(images_train, last_layer):
  """The sequential rule in NumPy, and the last layer with single examples."""
  for tau in (0.5, 0.9, 1.1):
    trainer, *seen, grads = start(images_train, tau=tau, last_layer=last_layer)
    compared = [grad["head"] if last_layer else grad for grad in grads]
    flat = [
      np.concatenate([np.float64(x).ravel() for x in jax.tree.leaves(grad)])
      for grad in compared
    ]
    total, kept = flat[0], [0]
    for i in range(1, K):
      norms = np.linalg.norm(total) * np.linalg.norm(flat[i])
      if 1 - total @ flat[i] / norms <= tau:
        total, kept = total + flat[i], [*kept, i]
    kept = kept if len(kept) > 1 else []
    mean = lambda *g: np.mean([g[i] for i in kept], axis=0) if kept else 0.0 * g[0]
    expected = jax.tree.map(mean, *grads)
    found = assert_moved_by(images_train, trainer, *seen, np.ones(K), expected)
    assert found["num_accepted"] == len(kept)


def test_smallest_losses(images_train):
  trainer, state, images, labels, _ = start(images_train, smallest_loss=True)
  logits = [
    trainer.network.model.apply({"params": state.params}, x, train=True) for x in images
  ]
  losses = [
    optax.softmax_cross_entropy_with_integer_labels(*pair).mean()
    for pair in zip(logits, labels)
  ]
  weights = jnp.array([1.0, 1.0, 1.0, 0.0])
  _, kept = trainer.smallest_losses(state, jnp.float32(images), labels, weights)
  np.testing.assert_array_equal(kept, np.arange(K) != np.argmax(losses))


def test_chance_keeps_as_many(images_train):
  numbers = np.random.default_rng(0).integers(0, 9, 120)
  draw = lambda: np.stack(
    [images_train.as_many_at_random(numbers, 3, step, 8) for step in range(120)]
  )
  kept = draw()
  np.testing.assert_array_equal(kept, draw())
  for begin in (0, 50, 100):
    window = slice(begin, begin + 50)
    np.testing.assert_array_equal(
      np.sort(kept[window].sum(axis=1)), np.sort(numbers[window])
    )
  assert np.ptp(kept.mean(axis=0)) < 0.2  # No position is preferred.


def test_augmented(images_train):
  """Shifted by up to 4 pixels and maybe mirrored, differently in each step."""
  images = np.random.default_rng(0).integers(1, 256, (2, 20, 8, 8, 1), np.uint8)
  found = np.asarray(images_train.models.augmented(0, 5, images))
  ways = set()
  for image, new in zip(images.reshape(-1, 8, 8), found.reshape(-1, 8, 8)):
    padded = np.pad(image, 4)
    matching = [
      (y, x, mirror)
      for y in range(9)
      for x in range(9)
      for mirror in (1, -1)
      if np.array_equal(padded[y : y + 8, x : x + 8][:, ::mirror], new)
    ]
    ways.update(matching)
    assert matching
  assert len(ways) > 30 and {mirror for *_, mirror in ways} == {1, -1}
  other = images_train.models.augmented(0, 6, images)
  assert not np.array_equal(found, other)


def test_devices(run, tmp_path):
  """Eight devices give the same as one, up to rounding."""
  argv = ("--tau", "adaptive", "--rule", "majority", "--memory-decay", 0.9, *TINY)
  for name, devices in (("one", ()), ("eight", ("--devices", 8))):
    run(*argv, *devices, "--out", tmp_path / name)
  (_, one), (_, eight) = files(tmp_path / "one"), files(tmp_path / "eight")
  for name, array in one.items():
    np.testing.assert_allclose(array, eight[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_resumed_run_is_the_same(images_train, run, tmp_path, monkeypatch):
  """Interrupted in each of the four methods, with TensorBoard, which starts anew."""
  pytest.importorskip("tensorboardX", reason="needs gaf_optax[tensorboard]")
  argv = ("--rivals", "--wrong-sources", 3, *TINY, "--tensorboard")
  argv += ("--checkpoint-seconds", 0, "--out")
  said = run(*argv, tmp_path / "whole")
  step, calls = images_train.Trainer.step, [0]

  def interrupted(*args):
    calls[0] += 1
    if calls[0] == 7:  # Of 24; the steps after the last checkpoint are repeated.
      raise KeyboardInterrupt
    return step(*args)

  monkeypatch.setattr(images_train.Trainer, "step", interrupted)
  out, interruptions = tmp_path / "resumed", 0
  options = ()
  while images_train.main([str(a) for a in (*argv, out, *options)]) == 130:
    calls, options, interruptions = [0], ("--resume",), interruptions + 1
  assert interruptions == 3
  assert_same_run(tmp_path / "whole", out)
  found = run(*argv, out, "--resume")
  assert found.replace(str(out), str(tmp_path / "whole")).endswith(said)
  assert len(list((out / "tensorboard").iterdir())) == 1


def test_refusals(run, refused, tmp_path):
  for argv, said in (
    (("--tau", 2.5), "from 0 to 2, a share"),
    (("--tau", "nan"), "from 0 to 2"),
    (("--tau", "120%"), "from 0 to 2"),
    (("--tau", "adaptive"), "rules.majority()"),
    (("--noise", 1.5), "at most 1"),
    (("--steps", 0), "at least 1"),
    (("--steps", "many"), "at least 1"),
    (("--memory-decay", 1), "below 1"),
    (("--rule", "best"), "invalid choice"),
    (("--unknown",), "unrecognized"),
    (("--last-layer", "--memory-decay", 0.9), "memory_decay"),
    (("--wrong-sources", 9), "more than 8"),
    (("--devices", 3), "divisor of 8"),
    (("--devices", 16, "--num-microbatches", 16), "JAX has 8"),
    (("--devices", 2, "--rivals"), "does not go with --rivals"),
    (("--augment",), "CIFAR"),
    (("--noisy-labels", "x.npz"), "CIFAR"),
    (("--balanced", "--microbatch-size", 15), "multiple of 10"),
    (("--dataset", "cifar100", "--data-dir", tmp_path), "--download"),
  ):
    assert said in refused(*argv, "--out", tmp_path / "out"), argv
  assert not (tmp_path / "out").exists()

  out, options = tmp_path / "run", ("--tau", 2, *TINY)
  run(*options, "--out", out)
  assert "not empty" in refused(*options, "--out", out)
  assert "these options" in refused("--tau", 1, *TINY, "--out", out, "--resume")
  assert "these options" in refused(*options, "--out", tmp_path, "--resume")
  file = tmp_path / "file"
  file.write_text("")
  assert "cannot be used" in refused(*options, "--out", file)
  for path in sorted(out.glob("checkpoints/*/arrays/**/*")):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:10])
  assert "damaged" in refused(*options, "--out", out, "--resume")


def test_report(images_train, tmp_path):
  """Three seeds: differences and intervals by hand, and a tie."""
  final = {
    "plain mean": (0.5, 0.6, 0.7),
    "chance, as many as GAF": (0.8, 0.4, 0.9),
    "GAF": (0.7, 0.8, 0.8),
    "smallest loss, as many": (0.9, 0.95, 0.97),
  }
  row = lambda **values: {**dict(part="P", kept=0.5), **values}
  rows = [
    row(method=method, seed=seed, step=step, test_accuracy=value if step == 20 else 0)
    for method, values in final.items()
    for step in (10, 20)
    for seed, value in enumerate(values)
  ]
  said = images_train.results.report(rows, tmp_path)
  lines = [line for line in said.splitlines() if line.startswith("|")][2:]
  assert len(lines) == 4
  # GAF - chance: -0.1, 0.4, -0.1; mean 0.0667, deviation 0.2887, t(0.975, 2) = 4.303.
  assert "0.767 ± 0.058" in lines[2] and "+0.067 ± 0.717" in lines[2]
  # GAF - plain mean: 0.2, 0.2, 0.1; GAF - smallest loss: -0.2, -0.15, -0.17.
  assert (
    "P: GAF beats the plain mean (+0.167 ± 0.143), ties with chance (+0.067 ± 0.717),"
    " loses to the smallest loss (-0.173 ± 0.063)."
  ) in said
  assert said.endswith(f"Plots: {tmp_path / 'p.png'}")
  assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def command(*argv):
  path = os.path.join(os.path.dirname(__file__), "../../examples/cifar100_resnet18")
  argv = [sys.executable, os.path.join(path, "train.py"), *map(str, argv)]
  # Background jobs and their children ignore interrupts.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  quiet = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  return subprocess.Popen(argv, **quiet)


@pytest.mark.long
def test_killed_run_is_resumed(tmp_path):
  """Terminated, interrupted and killed in turn; the result is the same."""
  argv = ("--rivals", "--seeds", 1, "--width", 8, "--checkpoint-seconds", 0)
  argv += ("--steps", 200, "--eval-every", 10, "--out")
  whole = command(*argv, tmp_path / "whole")
  said, error = whole.communicate()
  assert whole.returncode == 0, error
  out, options = tmp_path / "killed", ()
  metrics, lines = out / "metrics.csv", 1
  for number, code in (
    (signal.SIGTERM, 128 + signal.SIGTERM),
    (signal.SIGINT, 128 + signal.SIGINT),
    (signal.SIGKILL, -signal.SIGKILL),
  ):
    killed, lines = command(*argv, out, *options), lines + 15
    while not metrics.exists() or metrics.read_text().count("\n") < lines:
      assert killed.poll() is None, killed.communicate()[1]
      time.sleep(0.02)
    killed.send_signal(number)
    _, error = killed.communicate()
    assert killed.returncode == code, error
    options = ("--resume",)
  resumed = command(*argv, out, *options)
  found, error = resumed.communicate()
  assert resumed.returncode == 0, error
  assert found.replace(str(out), str(tmp_path / "whole")) == said
  assert_same_run(tmp_path / "whole", out)


@pytest.mark.long
def test_main_command(tmp_path):
  """Twelve lines, a sentence for each part and three pictures."""
  main = command("--quick", "--out", tmp_path / "main")
  said, error = main.communicate()
  assert main.returncode == 0, error
  lines = said.splitlines()
  assert sum(line.startswith("|") for line in lines) == 2 + 12
  assert sum(": GAF " in line for line in lines) == 3
  pictures = lines[-1].removeprefix("Plots: ").split(", ")
  assert len(pictures) == 3 and all(map(os.path.exists, pictures))


@pytest.mark.long
def test_the_papers_setting_at_tiny_size(run, write_batch, tmp_path):
  """Class-balanced, augmented, with averaged BatchNorm; the same on two devices."""
  for name, rows in (("train", 400), ("test", 50)):
    batch = tmp_path / "cifar-100-python" / name
    write_batch(batch, rows, 100, "fine_labels", balanced=name == "train")
  argv = ("--dataset", "cifar100", "--model", "resnet18", "--noise", 0.4, "--tau", 0.97)
  argv += ("--data-dir", tmp_path, "--width", 2, "--steps", 2, "--eval-every", 2)
  run(*argv, "--out", tmp_path / "one")
  run(*argv, "--devices", 2, "--out", tmp_path / "two")
  (_, one), (_, two) = files(tmp_path / "one"), files(tmp_path / "two")
  assert any("batch_stats" in name for name in one)
  for name, array in one.items():
    np.testing.assert_allclose(array, two[name], rtol=1e-2, atol=1e-3, err_msg=name)
