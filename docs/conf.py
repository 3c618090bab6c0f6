"""The documentation as a site; CONTRIBUTING.md has the command."""

import os
import pathlib
import re

import gaf_optax

project = "gaf_optax"
author = "the gaf_optax authors"
copyright = author
version = release = gaf_optax.__version__

extensions = [
  "myst_parser",
  "sphinx.ext.autodoc",
  "sphinx.ext.mathjax",
  "sphinx.ext.napoleon",
  "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
nitpicky = True  # A reference that leads nowhere is a warning.

# Docstrings: Google sections, single backticks for code. Their texts tell the types.
default_role = "code"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = False
napoleon_attr_annotations = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

html_theme = "furo"
html_title = "gaf_optax"
pygments_style = "friendly"  # Colours both sides of a diff.
html_copy_source = False
html_show_sourcelink = False

# Files of the repository that are pages here. Links are written for readers of the
# files, relative to where each is; here they lead to the page, or to a download.
_ROOT = pathlib.Path(__file__).resolve().parent.parent
_PAGES = {
  "README.md": "index.md",
  "CHANGELOG.md": "changelog.md",
  "CONTRIBUTING.md": "contributing.md",
  "benchmarks/RESULTS.md": "benchmarks.md",
  "examples/byte_lm/README.md": "byte_lm.md",
  "examples/cifar100_resnet18/README.md": "image_classifier.md",
  "experiments/README.md": "experiments.md",
  "experiments/RESULTS.md": "results.md",
  "experiments/results": "results.md",
}


def _relink(text, folder):
  """Markdown of a file in `folder`, with its links as seen from docs/."""

  def link(match):
    target, anchor = match[1], match[2] or ""
    path = os.path.normpath(os.path.join(folder, target))
    if not target or not (_ROOT / path).exists():
      return match[0]
    page = _PAGES.get(path) or _PAGES.get(f"{path}/README.md")
    return f"]({page or os.path.relpath(path, 'docs')}{anchor})"

  return re.sub(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", link, text)


def _read(app, docname, source):
  source[0] = _relink(source[0], "docs")


def _read_included(app, path, docname, source):
  source[0] = _relink(source[0], os.path.normpath(f"docs/{path.parent.as_posix()}"))


def setup(app):
  """Called by Sphinx."""
  app.connect("source-read", _read)
  app.connect("include-read", _read_included)
