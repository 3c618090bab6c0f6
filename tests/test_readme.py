"""The Python of each page runs as one program, and CI runs README's commands."""

import doctest
import pathlib
import re
import subprocess
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gaf_optax

with warnings.catch_warnings():
  # The oldest supported Flax uses a name that the oldest supported JAX deprecates.
  warnings.simplefilter("ignore", DeprecationWarning)
  from flax import linen, nnx  # noqa: F401

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]

# Minimum number of Python blocks of each page; other pages have none.
LEAST = {
  "docs/choosing.md": 1,
  "docs/comparison.md": 3,
  "docs/devices.md": 12,
  "docs/how_it_works.md": 2,
  "docs/plain_step.md": 4,
  "docs/recipes.md": 18,
  "docs/trainers.md": 1,
}

SAME = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(language, page="README.md"):
  text = (ROOT / page).read_text(encoding="utf-8")
  return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def programs(page):
  """Python blocks, each with the output block that follows it, or None."""
  text = (ROOT / page).read_text(encoding="utf-8")
  pattern = r"```python\n(.*?)```(?:\s*```text\n(.*?)```)?"
  return [match.groups() for match in re.finditer(pattern, text, re.DOTALL)]


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_and_print_what_the_page_says(page, capsys):
  found = programs(page)
  assert len(found) >= LEAST.get(page, 0)
  assert (page in LEAST) == bool(found)
  names = {}
  for code, expected in found:
    exec(compile(code, page, "exec"), names)
    printed = capsys.readouterr().out
    if expected is not None:
      if not doctest.OutputChecker().check_output(expected, printed, SAME):
        pytest.fail(f"{page}\n{code}\nsays\n{expected}\nand prints\n{printed}")


def sides(diff):
  """The programs before and after a diff."""
  lines = diff.splitlines()
  side = lambda other: "\n".join(x[1:] for x in lines if not x.startswith(other))
  return side("+"), side("-")


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("number, mapped", [(0, False), (1, True)])
def test_the_diffs_of_the_readme(number, mapped):
  """Both take the same steps with tau = 2; GAF skips steps without agreement."""
  before, after = sides(blocks("diff")[number])
  n = jax.device_count()
  rng = np.random.default_rng(0)
  x = rng.normal(size=(8 * n, 3)).astype(np.float32)
  y = x @ np.array([1.0, -2.0, 3.0], np.float32)
  loss_fn = lambda params, x, y: jnp.mean((x @ params["w"] - y) ** 2)

  def train(program, y):
    names = dict(jax=jax, optax=optax, gaf_optax=gaf_optax, loss_fn=loss_fn)
    names["params"] = params = {"w": jnp.zeros(3)}
    exec(program, names)
    step, state, batch = names["train_step"], names["opt_state"], (x, y)
    if mapped:
      step = jax.pmap(step, axis_name="data")
      copies = lambda tree: jax.tree.map(lambda leaf: jnp.stack([leaf] * n), tree)
      params, state = copies((params, state))
      batch = [a.reshape(n, -1, *a.shape[1:]) for a in batch]
    for _ in range(5):
      params, state = step(params, state, *batch)
    return np.asarray(params["w"])[0] if mapped else np.asarray(params["w"])

  plain = train(before, y)
  assert np.abs(plain).max() > 1e-3
  np.testing.assert_allclose(train(after.replace("0.97", "2.0"), y), plain, rtol=1e-4)
  opposed = np.repeat(np.where(np.arange(8) % 2, 1, -1), len(y) // 8) * y
  assert "0.97" in after
  filtered = train(after.replace("0.97", "0.0"), opposed)
  np.testing.assert_array_equal(filtered, 0)


def test_every_public_name_is_in_the_api_reference_once():
  text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
  documented = re.findall(r"auto(?:function|class|module):: (\S+)", text)
  rules = gaf_optax.rules
  public = {f"gaf_optax.rules.{name}" for name in rules.__all__}
  public |= {  # Exports of both modules are documented with the rules.
    f"gaf_optax.{name}" for name in gaf_optax.__all__ if name not in rules.__all__
  }
  assert sorted(documented) == sorted(public)


@pytest.mark.parametrize("name, part", [("main", "train.py"), ("test", "pytest")])
def test_commands_are_found_by_ci(name, part):
  printed = subprocess.run(
    ["bash", str(ROOT / ".ci" / "readme_command"), name],
    capture_output=True,
    text=True,
    check=True,
    timeout=20,
  ).stdout.strip()
  assert part in printed
  assert printed in [block.strip() for block in blocks("bash")]
