"""The notebook runs without the repository, and holds the outputs of a whole run."""

import importlib.util
import pathlib
import re
import runpy
import shutil
import sys
import tempfile
import tomllib
import types

import pytest

import gaf_optax

needed = "to run the notebook; pip install -e '.[test]' brings it"
nbclient = pytest.importorskip("nbclient", reason=f"nbclient is needed {needed}")
nbformat = pytest.importorskip("nbformat", reason=f"nbformat is needed {needed}")
pytest.importorskip("ipykernel", reason=f"ipykernel is needed {needed}")

pytestmark = pytest.mark.experiments
ROOT = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "cifar100_resnet18" / "gaf_colab.ipynb"
# Cells that only set something.
SILENT = {"install"}
# How many pictures each cell draws that draws any.
PICTURES = {
  "distances": 1,
  "plot-sources": 1,
  "memory": 1,
  "plot-labels": 1,
  "train-clean": 1,
}
# Folders that paths of machines begin with.
MACHINE = r"(?<![\w.:/])(/(work|tmp|home|root|usr|opt|var|mnt|content|Users)/|[A-Z]:\\)"
# Run by the kernel before the notebook: nothing of the clone may be read, but for a
# virtual environment in it.
GUARD = """
import os, sys

def _guard(event, args):
  if event == "open" and isinstance(args[0], str):
    path = os.path.abspath(args[0])
    if path.startswith({clone!r}) and not path.startswith(sys.prefix + os.sep):
      raise PermissionError(f"a file of the repository: {{path}}")

sys.addaudithook(_guard)
"""


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
    found[cell.id] = "\n".join(parts)
  return found


def tables(notebook):
  """The rows of the table that each cell displays, by its id and by their name."""
  found = {}
  for cell_id, text in texts(notebook, "text/markdown").items():
    rows = [
      [cell.strip() for cell in line.strip("|").split("|")]
      for line in text.splitlines()
      if line.startswith("|")
    ]
    found[cell_id] = {row[0]: row[1:] for row in rows[2:]}
  return found


def bounds(cell):
  """The 95 % interval that a cell of a table states."""
  mean, half = map(float, cell.strip("*").split(" ± "))
  return mean - half, mean + half


def assert_whole_run(notebook):
  """Every code cell ran, in order, without an error, and says what it is for."""
  cells = code_cells(notebook)
  assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
  for cell in cells:
    assert bool(cell.outputs) == (cell.id not in SILENT), cell.id
    for output in cell.outputs:
      assert output.output_type != "error", (cell.id, output)
    drawn = sum("image/png" in output.get("data", {}) for output in cell.outputs)
    assert drawn == PICTURES.get(cell.id, 0), cell.id
  said, shown = texts(notebook), tables(notebook)
  assert re.search(r"^jax \d", said["versions"], re.MULTILINE)
  for name in ("num_accepted: ", "mean_distance: ", "accept_rate: ", "skipped_steps: "):
    assert name in said["step"]
  arms = {"plain mean", "five at random", "geometric median", "GAF, memory"}
  assert arms < set(shown["train-sources"])
  assert [*shown["memory"]] == [str(i) for i in range(8)]
  arms = {"plain mean", "mixup, EMA", "as many steps at random", "half at random"}
  arms |= {"half with smallest losses", "by example, `adaptive_tau()`"}
  assert arms < set(shown["train-labels"])
  assert len(shown["plot-labels"]) == 4
  assert "plain mean, EMA" in shown["train-clean"]
  assert "the same on every device" in said["equal"]


@pytest.mark.long
def test_runs_without_the_repository(notebook, tmp_path, monkeypatch):
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
  # The package alone, as pip installs it.
  site = tmp_path / "site"
  package = pathlib.Path(gaf_optax.__file__).parent
  shutil.copytree(package, site / "gaf_optax")
  monkeypatch.setenv("PYTHONPATH", str(site))
  startup = tmp_path / "ipythondir" / "profile_default" / "startup"
  startup.mkdir(parents=True)
  (startup / "guard.py").write_text(GUARD.format(clone=f"{ROOT}/"), encoding="utf-8")
  empty = tmp_path / "empty"
  empty.mkdir()

  notebook.cells.append(
    nbformat.v4.new_code_cell(
      "print(gaf_optax.__file__)\n"
      "try:\n"
      f"  open({str(NOTEBOOK)!r})\n"
      "except PermissionError as error:\n"
      "  print(error)",
      id="guarded",
    )
  )
  client = nbclient.NotebookClient(
    notebook,
    timeout=600,
    startup_timeout=300,
    kernel_name="python3",
    resources={"metadata": {"path": str(empty)}},
  )
  client.execute()

  guarded = texts(notebook)["guarded"]
  assert guarded.splitlines() == [
    str(site / "gaf_optax" / "__init__.py"),
    f"a file of the repository: {NOTEBOOK}",
  ]
  assert_whole_run(notebook)
  assert "8 microbatches on 2 x cpu, 4 on each" in texts(notebook)["pmap"]
  assert not any(empty.iterdir())


@pytest.mark.parametrize("installed", [True, False])
def test_installs_the_package_where_it_is_missing(notebook, monkeypatch, installed):
  from IPython.core.inputtransformer2 import TransformerManager

  cell = code_cells(notebook)[0]
  spec = importlib.util.find_spec
  missing = lambda name: None if name == "gaf_optax" and not installed else spec(name)
  monkeypatch.setattr(importlib.util, "find_spec", missing)
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
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
  there = {"IPython", "jax", "matplotlib", "numpy", "optax", "scipy", "sklearn"}
  assert found - set(sys.stdlib_module_names) == there | {"gaf_optax"}


def test_committed_outputs(notebook):
  nbformat.validate(notebook)
  assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
  assert notebook.metadata.kernelspec.name == "python3"
  assert NOTEBOOK.stat().st_size < 600_000
  assert_whole_run(notebook)
  script = runpy.run_path(str(pathlib.Path(__file__).with_name("run_notebook.py")))
  assert notebook.metadata.executed == script["digest"](notebook), (
    "the outputs are of other code; run tests/examples/run_notebook.py"
  )
  assert "5 seeds, 1,000 steps" in texts(notebook)["training"]  # Not quick.
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


def test_conclusions_state_numbers_of_the_outputs(notebook):
  said = "\n".join(texts(notebook, "text/markdown").values()).replace("*", "")
  said += "\n".join(texts(notebook).values())
  stated = []
  for cell in notebook.cells:
    if cell.cell_type == "markdown" and cell.id.endswith("-conclusion"):
      stated += re.findall(r"[+-]?\d\.\d+(?: ± \d\.\d+)?", cell.source)
  assert len(stated) > 15
  assert not [number for number in stated if number not in said]


def test_conclusions_hold_in_the_outputs(notebook):
  shown = tables(notebook)
  less = {name: row[1] for name, row in shown["train-sources"].items()}
  for rival in ("plain mean", "five at random", "geometric median", "GAF, one step"):
    assert bounds(less[rival])[0] > 0, rival
  for equal in ("five smallest losses", "right sources only"):
    assert bounds(less[equal])[0] < 0 < bounds(less[equal])[1], equal
  for _, _, verdict, truth in shown["memory"].values():
    assert (verdict == "**wrong**") == (truth == "shifted by one")

  final = {name: row[1] for name, row in shown["train-labels"].items()}
  picked = {name: row[3] for name, row in shown["train-labels"].items()}
  for found in (final, picked):
    for rival in ("plain mean", "half at random", "half with smallest losses"):
      assert bounds(found[rival])[0] > 0, rival
  warm = "half with smallest losses, after 100 steps"
  assert bounds(final[warm])[1] < 0
  assert bounds(picked[warm])[0] < 0 < bounds(picked[warm])[1]

  clean = {name: row[0] for name, row in shown["train-clean"].items()}
  costly = [name for name, cell in clean.items() if bounds(cell)[1] < 0]
  assert "GAF, memory" not in costly and "by example, `adaptive_tau()`" in costly
  assert float(clean[warm].strip("*").split()[0]) < -0.1
