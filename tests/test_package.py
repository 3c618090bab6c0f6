"""The package: its PyPI page, its sdist, and the project's addresses."""

import pathlib
import re

import pytest

import gaf_optax

ROOT = pathlib.Path(__file__).resolve().parent.parent
# In a link around an image, such as a badge, the image comes first.
LINK = re.compile(r"(!?)(?:\[[^\[\]]*|(?<=\)))\]\(([^)\s]+)\)")
NOTEBOOK = "examples/cifar100_resnet18/gaf_colab.ipynb"


@pytest.fixture
def sdist(monkeypatch):
  reason = "what builds the package is not installed; it is in the extra 'dev'"
  pytest.importorskip("hatch_fancy_pypi_readme", reason=reason)
  builders = pytest.importorskip("hatchling.builders.sdist", reason=reason)
  monkeypatch.chdir(ROOT)  # Builds run in this directory.
  return builders.SdistBuilder(str(ROOT))


def read(name):
  return (ROOT / name).read_text(encoding="utf-8")


def repository(name="pyproject.toml"):
  """Owner and name, which must be the same in all addresses of the file."""
  hosts = r"github\.com|githubusercontent\.com|colab\.research\.google\.com/github"
  (found,) = set(re.findall(rf"(?:{hosts})/([\w.-]+/[\w.-]+)", read(name)))
  return found


def test_page_on_pypi_is_the_readme_with_absolute_links(sdist):
  ours, page = read("README.md"), sdist.metadata.core.readme
  tag = f"v{gaf_optax.__version__}"
  images = f"https://raw.githubusercontent.com/{repository()}/{tag}"
  files = f"https://github.com/{repository()}/blob/{tag}"

  def expected(bang, target):
    if target.startswith(("https://", "#")):
      return bang, target
    return bang, f"{images if bang else files}/{target}"

  links = LINK.findall(ours)
  assert len(links) == ours.count("](") > 20
  assert LINK.findall(page) == [expected(*link) for link in links]
  assert LINK.sub("", page) == LINK.sub("", ours)
  assert "<img" not in page and "href=" not in page


def test_links_of_the_readme_lead_to_files():
  targets = {target.partition("#")[0] for _, target in LINK.findall(read("README.md"))}
  files = {target for target in targets if target and "://" not in target}
  assert len(files) > 10
  assert not [file for file in files if not (ROOT / file).is_file()]


def test_sdist_has_the_library_and_no_experiments(sdist):
  files = {file.relative_path for file in sdist.recurse_included_files()}
  assert {"gaf_optax/_gaf.py", "tests/oracle.py", "examples/byte_lm/train.py"} <= files
  assert not [file for file in files if "experiments" in file.split("/")]


def test_addresses_of_the_project_are_of_one_repository(sdist):
  urls = sdist.metadata.core.urls
  home = f"https://github.com/{repository()}"
  assert urls["Repository"] == home
  assert all(url == home or url.startswith(f"{home}/") for url in urls.values())
  for url in urls.values():
    if path := re.sub(r"^/(blob|tree)/main/", "", url.removeprefix(home)).strip("/"):
      assert path == "issues" or (ROOT / path).exists()


def test_badge_opens_the_notebook(sdist):
  page = f"https://colab.research.google.com/github/{repository()}/blob/main/{NOTEBOOK}"
  image = "https://colab.research.google.com/assets/colab-badge.svg"
  badge = f"[![Open in Colab]({image})]({page})"
  for text in (read("README.md"), sdist.metadata.core.readme):
    assert text.splitlines()[2] == badge
  assert (ROOT / NOTEBOOK).is_file()


def test_addresses_in_the_notebook_are_of_the_repository():
  assert repository(NOTEBOOK) == repository()
  files = rf"{repository()}/(?:blob|tree)/main/([\w./-]+)"
  paths = re.findall(files, read(NOTEBOOK))
  assert len(paths) >= 3
  assert not [path for path in paths if not (ROOT / path).exists()]
