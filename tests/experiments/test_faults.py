"""Faults and statistics of `faults.py` and rivals of `robust.py`, against NumPy."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import faults
import report
import robust

pytestmark = pytest.mark.experiments


def rows(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_faults_that_scale_or_replace():
  grads = rows(4, 10)
  healthy = jnp.array([False, True, True, True])
  step = faults.Step(jax.random.key(0), jnp.asarray(grads), slice(0, 6), healthy)
  found = {name: np.asarray(fault(step)) for name, fault in faults.FAULTS.items()}
  expected = {
    "none": grads,
    "sign flipped": -grads,
    "times -10": -10 * grads,
    "times 100": 100 * grads,
    "zero": 0 * grads,
    "duplicated": grads[[3, 3, 3, 3]],
    "NaN": np.nan * grads,
  }
  assert found.keys() == expected.keys() | {
    *("noise", "one layer noise", "a little, averaged")
  }
  for name, values in expected.items():
    np.testing.assert_array_equal(found[name], values)
  honest = grads[1:].astype(float)
  lie = honest.mean(axis=0) + 1.5 * honest.std(axis=0, ddof=1)
  np.testing.assert_allclose(found["a little, averaged"], [lie] * 4, rtol=1e-5)
  length = lambda x: np.linalg.norm(x.astype(float), axis=1)
  np.testing.assert_allclose(length(found["noise"]), length(grads), rtol=1e-5)
  cosine = np.sum(found["noise"] * grads, axis=1) / length(grads) ** 2
  assert np.all(np.abs(cosine) < 0.99) and len(np.unique(cosine)) == 4
  layer, others = np.split(found["one layer noise"], [6], axis=1)
  np.testing.assert_array_equal(others, grads[:, 6:])
  np.testing.assert_allclose(length(layer), 10 * length(grads[:, :6]), rtol=1e-5)


def differing_bits(a, b):
  a, b = (np.asarray(x, np.float32).view(np.uint32) for x in (a, b))
  return np.bitwise_count(a ^ b)


def test_bit_flips():
  x = rows(64, 64)
  flip = lambda rate, bf16: np.asarray(
    faults.flip_bits(jax.random.key(1), x, rate, bf16)
  )
  rounded = np.asarray(x.astype(jnp.bfloat16).astype(np.float32))
  np.testing.assert_array_equal(flip(0.0, False), x)
  np.testing.assert_array_equal(flip(0.0, True), rounded)
  for bf16, stored in ((False, x), (True, rounded)):
    assert np.all(differing_bits(flip(1.0, bf16), stored) == 1)
    share = np.mean(differing_bits(flip(0.25, bf16), stored))
    assert abs(share - 0.25) < 0.03
  # A bfloat16 has the upper 16 bits, and all of them are hit.
  changed = flip(1.0, True).view(np.uint32) ^ rounded.view(np.uint32)
  assert set(np.log2(changed.ravel())) == set(range(16, 32))
  changed = flip(1.0, False).view(np.uint32) ^ x.view(np.uint32)
  assert set(np.log2(changed.ravel())) == set(range(32))


def test_flaky_products_go_wrong_in_the_backward_pass_only():
  x, w, cotangent = rows(3, 5), rows(5, 4, seed=1), rows(3, 4, seed=2)
  right = cotangent @ w.T, x.T @ cotangent

  def products(rate):
    flaky = lambda x, w: faults.flaky_matmul(x, w, jax.random.key(0), rate, False)
    out, backward = jax.vjp(flaky, x, w)
    np.testing.assert_allclose(out, x @ w, rtol=1e-5)
    return backward(jnp.asarray(cotangent))

  for found, expected in zip(products(0.0), right):
    np.testing.assert_allclose(found, expected, rtol=1e-5)
  for wrong, found in zip(products(1.0), products(0.0)):
    assert np.all(differing_bits(wrong, found) == 1)


def test_attacks_use_the_healthy_workers_alone():
  sent, healthy = rows(6, 7), np.array([0, 1, 1, 0, 1, 1], bool)
  honest = sent[healthy].astype(np.float64)
  mean, deviation = honest.mean(axis=0), honest.std(axis=0, ddof=1)
  known = faults.honest_statistics(sent, healthy)
  found = {name: attack(*known) for name, attack in faults.ATTACKS.items()}
  np.testing.assert_allclose(found["-0.5 x mean"], -0.5 * mean, rtol=1e-5)
  np.testing.assert_allclose(found["a little"], mean + 1.5 * deviation, rtol=1e-5)
  # The example in ByzFL's documentation.
  example = np.arange(1, 10, dtype=np.float32).reshape(3, 3)
  known = faults.honest_statistics(example, np.ones(3, bool))
  np.testing.assert_allclose(faults.ATTACKS["a little"](*known), [8.5, 9.5, 10.5])


@pytest.mark.parametrize("k", [7, 8])
def test_median_and_trimmed_mean(k):
  x = rows(k, 50)
  np.testing.assert_array_equal(robust.in_order(x), np.sort(x, axis=0))
  np.testing.assert_allclose(robust.median(x), np.median(x, axis=0), rtol=1e-5)
  for number in (0, 1, 3):
    expected = np.sort(x.astype(float), axis=0)[number : k - number].mean(axis=0)
    found = robust.trimmed_mean(x, number)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_nearest_neighbor_mixing():
  x = rows(6, 9).astype(float)
  for number in (0, 2):
    expected = []
    for row in x:
      distances = [np.linalg.norm(row - other) for other in x]
      expected.append(x[np.argsort(distances)[: 6 - number]].mean(axis=0))
    found = robust.nearest_neighbor_mixing(x.astype(np.float32), number)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_centered_clipping_over_two_steps():
  x = 0.9 * rows(2, 5, 9)
  x[1, 0] = np.nan  # Counts as the last result.
  tx = robust.centered_clipping(2.5)
  state, center = tx.init(jnp.zeros(9)), np.zeros(9)
  for step in x:
    found, state = tx.update(jnp.asarray(step), state)
    away = np.where(np.isnan(step), 0, step.astype(float) - center)
    lengths = np.linalg.norm(away, axis=1)
    assert lengths.min() < 2.5 < lengths.max()
    scale = [min(1, 2.5 / length) if length else 1 for length in lengths]
    center = center + (away * np.array(scale)[:, None]).mean(axis=0)
    np.testing.assert_allclose(found, center, rtol=1e-4, atol=1e-6)


def test_rows_that_are_not_finite_count_as_zeros():
  x = rows(4, 3)
  x[1, 0], x[2, 1] = np.inf, 1e30  # The square of 1e30 overflows.
  found, _ = robust.robust(lambda x: jnp.mean(x, axis=0)).update(
    jnp.asarray(x), optax.EmptyState()
  )
  np.testing.assert_allclose(found, (x[0] + x[3]) / 4, rtol=1e-6)
  clipped = robust.clipped(np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]), 1.0)
  np.testing.assert_allclose(clipped, [[0.6, 0.8], [0.3, 0.4], [0, 0]], rtol=1e-6)


def test_jumps_are_skipped_with_the_optimizer():
  tx = robust.skip_jumps(optax.sgd(1.0, momentum=0.5))
  state, trace = tx.init(jnp.zeros(1)), 0.0
  for norm in [1.0] * 10 + [3.0, 1.0, np.nan, 1.5]:
    skipped = norm == 3.0 or np.isnan(norm)
    updates, state = tx.update(jnp.array([norm]), state)
    trace = trace if skipped else 0.5 * trace + norm
    np.testing.assert_allclose(updates, [0.0 if skipped else -trace], rtol=1e-6)


def test_workers_have_classes_of_their_own():
  y = np.arange(1000) % 10
  task = faults.Task(y[:, None], y, y[:, None], y, None, None, 50, 0.1, 1)
  for own in (0.0, 0.7, 1.0):
    drawn = faults.draw(task, faults.Setting(own=own), 20, 0)
    assert drawn.shape == (20, 8, 50) and drawn.dtype == np.int32
    for worker in range(8):
      counts = np.sort(np.bincount(y[drawn[:, worker]].ravel(), minlength=10))
      # Three of ten classes also get 0.3 of the other examples.
      assert abs(counts[-3:].sum() / 1000 - (own + 0.3 * (1 - own))) < 0.07


def test_how_far_behind_the_best_rival():
  names = "plain mean", "median", "gaf(0.97)"
  accuracies = {
    "none": ([0.9, 0.8, 0.7], [0.8, 0.8, 0.8], [0.7, 0.7, 0.7]),
    "noise": ([0.1, 0.1, 0.1], [0.6, 0.5, 0.4], [0.7, 0.6, 0.5]),
  }
  lines = [
    dict(task="digits", setting="2 of 8", fault=fault, arm=arm)
    | {f"accuracy {seed}": str(value) for seed, value in enumerate(values)}
    for fault, some in accuracies.items()
    for arm, values in zip(names, some)
  ]
  cases = faults.by_case(lines)
  found = faults.behind(cases)
  mean = lambda arm, fault: round(found[arm]["2 of 8", fault].mean, 6)
  assert [mean(arm, "none") for arm in names] == [0, 0, 0.1]
  assert [mean(arm, "noise") for arm in names] == [0.4, 0, -0.1]
  # t of 2 degrees of freedom is 4.3027; differences 0.2, 0.1, 0 have deviation 0.1.
  margin = found["gaf(0.97)"]["2 of 8", "none"].margin
  np.testing.assert_allclose(margin, 4.3027 * 0.1 / 3**0.5, rtol=1e-4)
  cells = [[c.strip() for c in x.split("|")] for x in faults.summary(cases).split("\n")]
  by_name = {cell[1]: cell[2:-1] for cell in cells}
  assert by_name["gaf(0.97)"][:2] == ["2", "+0.000"]
  assert by_name["gaf(0.97)"][2].startswith("+0.100 ± 0.248")
  assert by_name["plain mean"][1:] == ["+0.200", "**+0.400 ± 0.248**", "noise, 2 of 8"]
  assert "| plain mean | 0.800 | 0.100 |" in faults.table(cases, "2 of 8")


def test_scores_of_bytes_are_losses():
  losses = {"plain mean": (0.7, np.nan), "median": (1.4, 1.0), "gaf(0.97)": (0.7, 99)}
  lines = [
    dict(task="bytes", setting="2 of 8", fault="none", arm=arm)
    | {"accuracy 0": "0.5", "accuracy 1": "0.5"}
    | {f"loss {seed}": str(value) for seed, value in enumerate(values)}
    for arm, values in losses.items()
  ]
  cases = faults.by_case(lines)
  scores = cases["2 of 8", "none"]
  # Natural logarithms to base 2; at most the 8 bits of a guess.
  np.testing.assert_allclose(scores["median"], [-2.019773, -1.442695], rtol=1e-5)
  np.testing.assert_allclose(scores["plain mean"], [-1.009887, -8], rtol=1e-5)
  np.testing.assert_array_equal(scores["gaf(0.97)"], scores["plain mean"])
  found = faults.behind(cases)["gaf(0.97)"]["2 of 8", "none"]
  np.testing.assert_allclose(found.mean, 2.773710, rtol=1e-5)
  assert "| median     | 1.731 |" in faults.table(cases, "2 of 8")


def test_convolution():
  x, kernel = rows(2, 6, 6, 3), rows(27, 5, seed=1)
  expected = lambda stride: jax.lax.conv_general_dilated(
    *(x, kernel.reshape(3, 3, 3, 5), (stride, stride), [(1, 1), (1, 1)]),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  for stride in (1, 2):
    found = faults._convolution(x, kernel, stride)
    np.testing.assert_allclose(found, expected(stride), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["digits", "resnet", "bytes"])
def test_models(name):
  """One product can be replaced, and no example depends on another."""
  task = faults.load(name, "data")
  params = jax.jit(task.init)(jax.random.key(0))
  logits = lambda *args: jax.jit(lambda x: task.logits(params, x, *args[1:]))(args[0])
  x, y = task.x[:3], task.y[:3]
  out = logits(x)
  assert out.shape == (*y.shape, 256 if name == "bytes" else 10)
  np.testing.assert_allclose(logits(x[1:2]), out[1:2], rtol=1e-3, atol=1e-5)
  calls = []

  def product(a, b):
    calls.append((a.shape, b.shape))
    return a @ b

  np.testing.assert_allclose(logits(x, product), out, rtol=1e-3, atol=1e-5)
  ((a, b),) = calls
  assert len(a) == len(b) == 2 and a[1] == b[0]
  other = logits(x, lambda a, b: a[:, ::-1] @ b)
  assert not np.allclose(other, out, rtol=1e-2, atol=1e-2)


def test_the_first_kernel_of_flat_parameters():
  params = {"a": {"bias": np.full(3, 2.0), "kernel": np.full((2, 3), 7.0)}}
  params["b"] = {"kernel": np.full((3, 4), 5.0)}
  flat, _ = ravel_pytree(params)
  np.testing.assert_array_equal(flat[faults.first_kernel(params)], [7.0] * 6)


def test_bytes_are_predicted_from_those_before():
  task = faults.load("bytes", "data")
  np.testing.assert_array_equal(task.x[:, 1:], task.y[:, :-1])
  params, x = task.init(jax.random.key(0)), task.x[:1].copy()
  before = task.logits(params, x)
  x[0, 20] ^= 1
  changed = np.any(before != task.logits(params, x), axis=-1)[0]
  assert not changed[:20].any() and changed[20]


def test_who_is_accused():
  n, steps, k = 1, 120, 5
  agreement = np.full((n, steps, k), 0.4)
  agreement[:, 10:15, 0] = 0.1  # When hardly anything is known.
  agreement[:, 40:, 0] = 0.19
  agreement[:, 60, 0] = 0.21
  agreement[:, 90:95, 1] = 0.1
  agreement[:, 115:] /= 20  # Nobody agrees.
  accepted = np.ones((n, steps, k), bool)
  accepted[:, 30:, 1] = False
  memory = np.full((n, steps, 1, k, k), 0.3)
  memory[..., range(k), range(k)] = 1
  memory[:, 45:, 0, 2, 3] = memory[:, 45:, 0, 3, 2] = 0.85
  weight = np.minimum(1.0 + np.arange(steps), 50)[None, :, None] * np.ones(k)
  seen = dict(agreement=agreement, accepted=accepted, num_steps=weight)
  seen["memory"] = types.SimpleNamespace(mean=memory)
  found = faults.accused(seen)
  at = {
    signal: {w: np.flatnonzero(wrong[0, :, w]) for w in range(k) if wrong[..., w].any()}
    for signal, wrong in found.items()
  }
  span = lambda *parts: np.concatenate([np.arange(*part) for part in parts])
  expected = {
    "agreement low in 1 steps": {0: span((40, 60), (61, 115)), 1: span((90, 95))},
    "agreement low in 20 steps": {0: span((59, 60), (80, 115))},
    "agreement low in 50 steps": {0: span((110, 115))},
    "rejected in 50 steps": {1: span((79, 120))},
    "copy, cosine above 0.8": {2: span((45, 120)), 3: span((45, 120))},
    "copy, cosine above 0.9": {},
  }
  assert at.keys() == expected.keys()
  for signal, workers in expected.items():
    assert at[signal].keys() == workers.keys(), signal
    for worker, steps in workers.items():
      np.testing.assert_array_equal(at[signal][worker], steps, signal)
  low = found["agreement low in 20 steps"]
  np.testing.assert_array_equal(faults.delays(low[..., 0], 50), [10])
  np.testing.assert_array_equal(faults.delays(low[..., 1], 50), [np.inf])


@pytest.fixture
def few(monkeypatch):
  monkeypatch.setattr(faults, "STEPS", 30)
  arms = "plain mean", "momentum: recommended"
  settings = {"2 of 8": (faults.Setting(), arms, faults.NAMES)}
  monkeypatch.setitem(faults.TASKS, "digits", settings)
  monkeypatch.setattr(faults, "RECOMMENDED", arms[1:])


def test_command(few, tmp_path, capsys):
  faults.main(["--quick", "--keep", str(tmp_path)])
  lines = report.read_csv(tmp_path / "faults-digits.csv")
  assert len(lines) == 2 * len(faults.NAMES)
  for seed in "01":
    losses = {(x["arm"], x["fault"]): float(x[f"loss {seed}"]) for x in lines}
    assert losses["plain mean", "none"] < np.log(10)
    assert np.isnan(losses["plain mean", "NaN"])
    for fault in faults.NAMES:
      assert losses["momentum: recommended", fault] < np.log(10)
  assert (tmp_path / "faults-digits.png").stat().st_size > 10_000
  printed = capsys.readouterr().out
  assert "behind the best rival" in printed and "| momentum: recommended" in printed


def test_command_that_finds(few, tmp_path, capsys):
  faults.main(["--quick", "--find", "--keep", str(tmp_path)])
  lines = report.read_csv(tmp_path / "faults-digits-found.csv")
  assert len(lines) == (len(faults.NAMES) - 1 + 4) * 6
  flipped = {x["signal"]: x for x in lines if x["fault"] == "sign flipped"}
  assert float(flipped["agreement low in 1 steps"]["most"]) < 20
  assert "sign flipped, 0.0 own, 40 steps" in capsys.readouterr().out


def test_a_fault_that_never_begins_changes_nothing():
  task = faults.load("digits", "data")
  program = faults.make_train(task, "plain mean", 8, "sgd", 0)
  seeds, faulty = np.arange(1), np.arange(8) == 0
  drawn = np.stack([faults.draw(task, faults.Setting(), 12, 0)])
  run = lambda fault, *when: float(
    program(seeds, drawn, faults.NAMES.index(fault), faulty, *when)[1][0]
  )
  right = run("none", 1.0, 0)
  for fault in faults.NAMES[1:]:
    assert run(fault, 1.0, 12) == run(fault, 0.0, 0) == right
    assert run(fault, 1.0, 6) != right
  # Parameters are stale from the second step on.
  assert run("stale", 1.0, 0) == run("stale", 1.0, 1) != right


def test_patches_are_skipped_without_cifar(tmp_path, capsys):
  faults.main(["--task", "patches", "--data-dir", str(tmp_path)])
  assert "patches is skipped: found neither" in capsys.readouterr().out
