"""The notebook runs without the repository, and contains the outputs of a full run."""

import importlib.util
import pathlib
import re
import runpy
import shutil
import sys
import tomllib
import types

import pytest

import gaf_optax

needed = "to run the notebook; pip install -e '.[test]' installs it"
nbclient = pytest.importorskip("nbclient", reason=f"nbclient is needed {needed}")
nbformat = pytest.importorskip("nbformat", reason=f"nbformat is needed {needed}")
pytest.importorskip("ipykernel", reason=f"ipykernel is needed {needed}")

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "cifar100_resnet18" / "gaf_colab.ipynb"
SILENT = {"install", "plain", "gaf"}  # Cells without outputs
PICTURES = {"problem", "plot"}
# Absolute paths of machines begin with these folders.
MACHINE = r"(?<![\w.:/])(/(work|tmp|home|root|usr|opt|var|mnt|content|Users)/|[A-Z]:\\)"


@pytest.fixture
def notebook():
  return nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)


def code_cells(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook):
  """The printed output of each code cell, by its id."""
  return {
    cell.id: "\n".join(output.get("text", "") for output in cell.outputs)
    for cell in code_cells(notebook)
  }


def assert_ran(notebook):
  cells = code_cells(notebook)
  assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
  for cell in cells:
    assert bool(cell.outputs) == (cell.id not in SILENT), cell.id
    for output in cell.outputs:
      assert output.output_type != "error", (cell.id, output)
      assert output.get("name") != "stderr", (cell.id, output.text)
    drawn = any("image/png" in output.get("data", {}) for output in cell.outputs)
    assert drawn == (cell.id in PICTURES), cell.id
  said = texts(notebook)
  assert said["train"].count("test accuracy") == 3
  assert "num_accepted: " in said["metrics"]
  assert said["sources"].count("labels shifted by one") == 3


@pytest.mark.long
def test_runs_without_the_repository(notebook, tmp_path, monkeypatch):
  for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
    monkeypatch.setenv(name, str(tmp_path / name.lower()))
  monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
  monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
  monkeypatch.delenv("MPLBACKEND", raising=False)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("GAF_NOTEBOOK_QUICK", "1")
  # Only the package, as pip installs it.
  site, empty = tmp_path / "site", tmp_path / "empty"
  shutil.copytree(pathlib.Path(gaf_optax.__file__).parent, site / "gaf_optax")
  empty.mkdir()
  monkeypatch.setenv("PYTHONPATH", str(site))
  monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
  loaded = "import sys; print(*(m.__file__ for m in sys.modules.values()"
  loaded += " if getattr(m, '__file__', None)), sep='\\n')"
  notebook.cells.append(nbformat.v4.new_code_cell(loaded, id="loaded"))
  nbclient.NotebookClient(
    notebook,
    timeout=600,
    startup_timeout=300,
    kernel_name="python3",
    resources={"metadata": {"path": str(empty)}},
  ).execute()
  files = texts(notebook)["loaded"].splitlines()
  assert str(site / "gaf_optax" / "__init__.py") in files
  ours = [f"{ROOT / folder}/" for folder in ("gaf_optax", "examples", "tests")]
  assert not [file for file in files if file.startswith(tuple(ours))]
  assert not any(empty.iterdir())
  assert_ran(notebook)


@pytest.mark.parametrize("installed", [True, False])
def test_installs_the_package_where_it_is_missing(notebook, monkeypatch, installed):
  from IPython.core.inputtransformer2 import TransformerManager

  cell = code_cells(notebook)[0]
  spec = importlib.util.find_spec
  missing = lambda name: None if name == "gaf_optax" and not installed else spec(name)
  monkeypatch.setattr(importlib.util, "find_spec", missing)
  ran = []
  shell = types.SimpleNamespace(run_line_magic=lambda *args: ran.append(args))
  source = TransformerManager().transform_cell(cell.source)
  exec(compile(source, cell.id, "exec"), {"get_ipython": lambda: shell})
  project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
  address = project["project"]["urls"]["Repository"]
  assert ran == ([] if installed else [("pip", f"install -q git+{address}")])


def test_imports_only_what_colab_has_and_the_package(notebook):
  lines = "\n".join(cell.source for cell in code_cells(notebook))
  found = set(re.findall(r"^\s*(?:import|from) (\w+)", lines, re.MULTILINE))
  there = {"jax", "matplotlib", "numpy", "optax", "sklearn"}
  assert found - set(sys.stdlib_module_names) == there | {"gaf_optax"}


def test_committed_outputs(notebook):
  """From this code at full size, below 150 kB, without paths of a machine."""
  nbformat.validate(notebook)
  assert NOTEBOOK.stat().st_size < 150_000
  assert_ran(notebook)
  script = runpy.run_path(str(pathlib.Path(__file__).with_name("run_notebook.py")))
  assert notebook.metadata.executed == script["digest"](notebook), (
    "the outputs are of other code; run tests/examples/run_notebook.py"
  )
  for cell_id, said in texts(notebook).items():
    assert not re.search(MACHINE, said), cell_id
  (conclusion,) = [c.source for c in notebook.cells if c.id == "train-conclusion"]
  numbers = re.findall(r"\d\.\d{3}", conclusion)
  final = re.findall(r"accuracy (\d\.\d{3})", texts(notebook)["train"])
  assert numbers == final and len(final) == 3
  plain, chance, filtered = map(float, final)
  assert filtered > max(plain, chance) + 0.1
