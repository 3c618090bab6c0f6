"""The example's modules are importable, and its command runs in the test's process."""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "cifar100_resnet18"
sys.path.insert(0, str(EXAMPLE))


@pytest.fixture(scope="session")
def example_dir():
  return EXAMPLE


@pytest.fixture
def shared_data():
  """Real files that some machines have beside the repository."""
  path = ROOT.parent / "shared" / "data"
  if not path.is_dir():
    pytest.skip(f"there is no {path} with real data on this machine")
  return path


@pytest.fixture
def refused(capsys):
  """A function that runs the command and returns its one sentence of refusal."""
  import train

  def run(*argv):
    try:
      code = train.main([str(a) for a in argv])
    except SystemExit as error:
      code = error.code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if ": note: " not in line]
    assert code == 2, err
    assert out == ""
    assert len(lines) == 1 and lines[0].startswith("train.py: "), err
    return lines[0]

  return run
