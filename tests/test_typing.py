"""Types: mypy and pyright find mistakes in a user's script, and nothing else.

The lines with mistakes in typing/mistakes.py end in `# error`.
"""

import importlib.util
import json
import pathlib
import re
import runpy
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = ["tests/typing/correct.py", "tests/typing/mistakes.py"]
CHECKERS = ["mypy", "basedpyright"]


def found_by(checker):
  """Pairs of a script's name and the number of a line with an error."""
  if importlib.util.find_spec(checker) is None:
    pytest.skip(f"{checker} is not installed; it is in the extra 'dev'")
  if not (ROOT / "gaf_optax").exists():
    pytest.skip("the checkers read the library's source, which is not beside the tests")
  command = [sys.executable, "-m", checker]
  if checker == "basedpyright":  # Only the checks of pyright.
    command += ["--outputjson", "--pythonpath", sys.executable]
  done = subprocess.run(
    [*command, *SCRIPTS], cwd=ROOT, capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 1, done.stdout + done.stderr
  if checker == "mypy":
    matches = re.findall(r"^(\S+):(\d+): error: ", done.stdout, re.MULTILINE)
    return {(pathlib.Path(file).name, int(line)) for file, line in matches}
  return {
    (pathlib.Path(found["file"]).name, found["range"]["start"]["line"] + 1)
    for found in json.loads(done.stdout)["generalDiagnostics"]
    if found["severity"] == "error"
  }


@pytest.mark.parametrize("checker", CHECKERS)
def test_mistakes_are_found_and_nothing_else(checker):
  lines = (ROOT / SCRIPTS[1]).read_text(encoding="utf-8").splitlines()
  marked = {i for i, line in enumerate(lines, 1) if line.endswith("# error")}
  assert len(marked) > 10
  assert found_by(checker) == {("mistakes.py", i) for i in marked}


@pytest.mark.usefixtures("standard_promotion")
def test_what_has_right_types_runs():
  runpy.run_path(str(ROOT / SCRIPTS[0]))
