"""Runs the notebook at full size and stores its outputs, without noise.

`python tests/examples/run_notebook.py`, after changes to the notebook or the library.
Check the pictures and the numbers in the text before committing. The notebook runs in
an empty folder with the installed gaf_optax, as on Colab.
"""

import hashlib
import os
import pathlib
import tempfile

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples/cifar100_resnet18"
NOTEBOOK = EXAMPLE / "gaf_colab.ipynb"


def main():
  import nbclient
  import nbformat

  notebook = nbformat.read(NOTEBOOK, as_version=4)
  with tempfile.TemporaryDirectory() as settings, tempfile.TemporaryDirectory() as here:
    nbclient.NotebookClient(
      notebook,
      timeout=3600,
      kernel_name="python3",
      record_timing=False,
      coalesce_streams=True,
      resources={"metadata": {"path": here}},
    ).execute(env=_environment(settings))
  notebook.metadata["language_info"] = {"name": "python"}
  notebook.metadata["executed"] = digest(notebook)
  nbformat.validate(notebook)
  nbformat.write(notebook, NOTEBOOK)


def digest(notebook):
  """A hash of the code, stored with the outputs to show which code they belong to."""
  code = [[c.id, c.source] for c in notebook.cells if c.cell_type == "code"]
  return hashlib.sha256(repr(code).encode()).hexdigest()


def _environment(settings):
  kept = {k: v for k, v in os.environ.items() if k != "GAF_NOTEBOOK_QUICK"}
  return {**kept, "IPYTHONDIR": settings}


if __name__ == "__main__":
  main()
