"""The byte language model: gradient, sources, resuming, and options."""

import csv
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

_PATH = pathlib.Path(__file__).parents[2] / "examples" / "byte_lm" / "train.py"
_SPEC = importlib.util.spec_from_file_location("byte_lm_example_train", _PATH)
train = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(train)

_STEPS = 40


@pytest.fixture(scope="module", autouse=True)
def strict_promotion():
  """Off for this module: Adam and its schedule mix dtypes."""


@pytest.fixture(scope="module", autouse=True)
def small():
  """A tiny model, compiled once for all tests."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, "NUM_EVALUATIONS", 4)
    patch.setattr(train, "model", train.Decoder(width=16, depth=1, num_heads=2))
    yield


def _run(out, *argv):
  options = ["--steps", str(_STEPS), "--seeds", "1", "--out", str(out), *argv]
  return train.main(options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The directory of an uninterrupted run."""
  out = tmp_path_factory.mktemp("whole") / "run"
  assert _run(out) == 0
  return out


def _token_mean(params, inputs, targets, mask):
  """Mean over all valid tokens of documents `[n, t]`, in bits."""
  log_probs = jax.nn.log_softmax(train.model.apply(params, inputs))
  chosen = jnp.take_along_axis(log_probs, targets[..., None].astype(int), -1)[..., 0]
  return -jnp.where(mask, chosen, 0).sum() / mask.sum() / jnp.log(2)


def test_tau_2_is_the_token_mean_of_the_whole_batch():
  text = train.load_text()
  kinds = train.draw_kinds(0, 3)
  (batch,) = train.batches(text, kinds, 0, 5, 6)
  num_tokens = batch.mask.sum((1, 2))
  assert len(set(num_tokens.tolist())) > 4  # Otherwise a plain mean would be enough.
  without = np.arange(8) >= 2
  tx = train.make_optimizer(2.0, _STEPS)
  params, state = train.init(tx, 0)
  for mask in (batch.mask, batch.mask & without[:, None, None]):
    flat = [x.reshape(-1, x.shape[-1]) for x in (*batch[:2], mask)]
    value, expected = jax.value_and_grad(_token_mean)(params, *flat)
    masked = batch._replace(mask=mask)
    _, opt_state, mean_loss = train.train_step(tx, params, state, masked)
    np.testing.assert_allclose(mean_loss, value, rtol=1e-5)
    # Adam's first moment after one step is (1 - 0.9) times the gradient.
    moments = optax.tree.get(opt_state, "mu")
    for moment, grad in zip(jax.tree.leaves(moments), jax.tree.leaves(expected)):
      assert np.linalg.norm(grad) > 1e-6 or np.allclose(grad, 0, atol=1e-6)
      np.testing.assert_allclose(moment / 0.1, grad, rtol=1e-4, atol=1e-6)


def test_wrong_targets_are_as_described_and_inputs_are_right():
  text = train.load_text()
  kinds = train.draw_kinds(1, 3)
  assert sorted(kinds) == ["code page"] * 2 + ["right"] * 5 + ["shifted"]
  (batch,) = train.batches(text, kinds, 1, 0, 1)
  (right,) = train.batches(text, ["right"] * 8, 1, 0, 1)
  np.testing.assert_array_equal(batch.inputs, right.inputs)
  np.testing.assert_array_equal(batch.mask, right.mask)
  for i, kind in enumerate(kinds):
    for j in range(train.ROWS):
      length = right.mask[i, j].sum()
      assert right.mask[i, j, :length].all()
      seen, document = batch.targets[i, j, :length], right.targets[i, j, :length]
      np.testing.assert_array_equal(right.inputs[i, j, 1:length], document[:-1])
      if kind == "right":
        np.testing.assert_array_equal(seen, document)
      elif kind == "shifted":
        np.testing.assert_array_equal(seen[:-1], document[1:])
      else:
        assert bytes(seen).decode("cp037") == bytes(document).decode("latin-1")


def _rows(out):
  with open(out / "metrics.csv", newline="") as file:
    return list(csv.DictReader(file))


def test_sources_in_another_code_page_are_rejected(whole):
  text = (whole / "results.txt").read_text(encoding="utf-8")
  table = text.split("accept_rate")[1].splitlines()[1:9]
  agreements, rates = {}, {}
  for line in table:
    *label, agreement, rate, _ = line.split()
    kind = " ".join(label[1:])
    agreements.setdefault(kind, []).append(float(agreement))
    rates.setdefault(kind, []).append(float(rate))
  assert max(agreements["code page"]) < min(agreements["right"])
  assert max(rates["code page"]) < 0.5 < min(rates["right"])
  last = {row["line"]: row for row in _rows(whole) if int(row["step"]) == _STEPS}
  losses = {line: float(row["validation_loss"]) for line, row in last.items()}
  assert losses["gaf"] < losses["plain"] and losses["told"] < losses["plain"]
  assert len(_rows(whole)) == 3 * 4
  assert (whole / "plot.png").stat().st_size > 10_000


def test_interrupted_run_resumes_exactly(whole, tmp_path, monkeypatch, capsys):
  out, num_steps = tmp_path / "run", 0
  batches = train.batches

  def interrupted(*args):
    nonlocal num_steps
    for batch in batches(*args):
      if num_steps == _STEPS + 25:  # In the second line, after a checkpoint.
        raise KeyboardInterrupt
      num_steps += 1
      yield batch

  with monkeypatch.context() as patch:
    patch.setattr(train, "batches", interrupted)
    assert _run(out) == 130
  assert len(_rows(out)) < len(_rows(whole))
  capsys.readouterr()
  for argv in ((), ("--resume", "--tau", "1")):
    with pytest.raises(SystemExit, match="2"):
      _run(out, *argv)
    assert str(out) in _sentence(capsys)
  assert _run(out, "--resume") == 0
  for name in ("metrics.csv", "results.txt"):
    assert (out / name).read_bytes() == (whole / name).read_bytes()


def _sentence(capsys):
  printed = capsys.readouterr()
  assert printed.out == ""
  (line,) = printed.err.splitlines()
  assert line.startswith("train.py: ")
  return line


def test_bad_options_are_refused_in_one_sentence(tmp_path, capsys):
  file = tmp_path / "file"
  file.write_text("")
  cases = {
    "--steps 0": "'0'",
    "--seeds x": "'x'",
    "--tau 2.5": "'2.5'",
    "--tau nan": "'nan'",
    "--wrong-sources 4": "4",
    "--stepz 3": "--stepz 3",
    f"--out {file}/run": str(file),
    f"--resume --out {tmp_path}": str(tmp_path),
  }
  for argv, named in cases.items():
    with pytest.raises(SystemExit, match="2"):
      train.main(argv.split())
    assert named in _sentence(capsys)
