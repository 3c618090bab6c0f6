"""The Python of each page runs as one program; README's commands are what CI runs."""

import doctest
import pathlib
import re
import subprocess
import warnings

import pytest

import gaf_optax

with warnings.catch_warnings():
  # The oldest Flax that is admitted reads a name that the oldest JAX has deprecated.
  warnings.simplefilter("ignore", DeprecationWarning)
  from flax import linen, nnx  # noqa: F401

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]

# How many blocks of Python a page has at least; the other pages have none.
LEAST = {
  "README.md": 1,
  "docs/choosing.md": 3,
  "docs/comparison.md": 4,
  "docs/devices.md": 7,
  "docs/how_it_works.md": 3,
  "docs/recipes.md": 33,
  "docs/sharding.md": 8,
  "docs/trainers.md": 1,
  "docs/troubleshooting.md": 24,
}

SAME = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(language, page="README.md"):
  text = (ROOT / page).read_text(encoding="utf-8")
  return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def programs(page):
  """Blocks of Python, each with the block of output that follows it, or None."""
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


def test_every_public_name_is_in_the_api_reference_once():
  text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
  documented = re.findall(r"auto(?:function|class|module):: (\S+)", text)
  rules = gaf_optax.rules
  public = {f"gaf_optax.rules.{name}" for name in rules.__all__}
  public |= {  # What both modules export is documented with the rules.
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
