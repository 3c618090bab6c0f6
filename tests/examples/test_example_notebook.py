"""The notebook runs from top to bottom, and holds the outputs of a whole run."""

import pathlib
import re
import tempfile

import pytest

needed = "to run the notebook; pip install -e '.[test]' brings it"
nbclient = pytest.importorskip("nbclient", reason=f"nbclient is needed {needed}")
nbformat = pytest.importorskip("nbformat", reason=f"nbformat is needed {needed}")
pytest.importorskip("ipykernel", reason=f"ipykernel is needed {needed}")

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "cifar100_resnet18" / "gaf_colab.ipynb"
# Cells that only set something.
SILENT = {"repository"}
# Folders that paths of machines begin with.
MACHINE = r"(?<![\w.:/])(/(work|tmp|home|root|usr|opt|var|mnt|content|Users)/|[A-Z]:\\)"


@pytest.fixture
def notebook():
  return nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)


def code_cells(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook, kind="text/plain"):
  """What each code cell printed or displayed as this kind, by its id."""
  found = {}
  for cell in code_cells(notebook):
    parts = [
      output.text if output.output_type == "stream" else output.data.get(kind, "")
      for output in cell.outputs
    ]
    found[cell.id] = "".join(parts)
  return found


def pictures(notebook, cell_id):
  (cell,) = (cell for cell in notebook.cells if cell.id == cell_id)
  return [o for o in cell.outputs if "image/png" in o.get("data", {})]


def files():
  """What lies beside the notebook, but for what other tests' imports leave there."""
  return {path.name for path in NOTEBOOK.parent.iterdir()} - {"__pycache__"}


def assert_whole_run(notebook):
  """Every code cell ran, in order, without an error, and says what it is for."""
  cells = code_cells(notebook)
  assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
  for cell in cells:
    assert bool(cell.outputs) == (cell.id not in SILENT), cell.id
    for output in cell.outputs:
      assert output.output_type != "error", (cell.id, output)
  said = texts(notebook)
  assert re.search(r"^jax \d", said["versions"], re.MULTILINE)
  for name in ("num_accepted: ", "mean_distance: ", "accept_rate: ", "skipped_steps: "):
    assert name in said["step"]
  assert re.search(r"accept rate 0\.\d\d, tau 0\.90\nskipped \d+ of", said["train"])
  assert len(pictures(notebook, "plot")) == 1
  # One line for each arm, in place of a progress bar.
  arms = said["main-job"].splitlines()
  assert arms[0] == "label_noise: plain"
  assert "wrong_sources: clean" in arms
  assert arms[-1].startswith("nothing_wrong: by_example")
  assert len(arms) == len(set(arms))
  results = texts(notebook, "text/markdown")["results"]
  for arm in ("plain mean", "GAF tau 0.97", "GAF by example", "GAF majority memory"):
    assert f"| {arm}" in results
  for control in ("random steps", "random choice", "smallest loss"):
    assert f"| {control}" in results
  assert len(pictures(notebook, "pictures")) == 4
  assert "the same on every device" in said["equal"]


@pytest.mark.long
def test_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
  # Neither the user's own settings nor files outside of tmp_path.
  for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
    monkeypatch.setenv(name, str(tmp_path / name.lower()))
  monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
  monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
  monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
  monkeypatch.delenv("MPLBACKEND", raising=False)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
  monkeypatch.setenv("GAF_NOTEBOOK_QUICK", "1")
  output = tmp_path / "output"
  output.mkdir()
  monkeypatch.setenv("GAF_NOTEBOOK_OUTPUT", str(output))
  before = files()

  client = nbclient.NotebookClient(
    notebook,
    timeout=600,
    startup_timeout=300,
    kernel_name="python3",
    resources={"metadata": {"path": str(NOTEBOOK.parent)}},
  )
  client.execute()

  assert_whole_run(notebook)
  said = texts(notebook)
  assert "8 microbatches on 2 x cpu, 4 on each" in said["pmap"]
  assert "There is no CIFAR-100" in said["tiny"]
  assert [path.name for path in output.iterdir()] == ["runs"]
  (run,) = (output / "runs").iterdir()
  assert (run / "results.md").is_file()
  assert files() == before


def test_committed_outputs(notebook):
  nbformat.validate(notebook)
  assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
  assert notebook.metadata.kernelspec.name == "python3"
  assert NOTEBOOK.stat().st_size < 600_000
  assert_whole_run(notebook)
  assert "over 5 seeds" in texts(notebook, "text/markdown")["results"]  # Not --quick.
  for cell in code_cells(notebook):
    assert not cell.metadata  # Such as the times of execution.
    for output in cell.outputs:
      assert output.get("name") != "stderr", (cell.id, output.text)
      kept = {k: v for k, v in output.get("data", {}).items() if k != "image/png"}
      said = output.get("text", "") + str(kept)
      assert not re.search(MACHINE, said), cell.id
      for folder in (ROOT, pathlib.Path.home(), pathlib.Path(tempfile.gettempdir())):
        assert f"{folder}/" not in said, cell.id
      assert "\r" not in said and "\x1b" not in said, cell.id
