"""Plain English: patterns that make a sentence hard to read."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATHS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "gaf_optax/*.py"]
PATHS += ["benchmarks/*.py", "benchmarks/*.md", "experiments/*.py", "experiments/*.md"]
PATHS += ["examples/*/*.md", "examples/*/*.py", "tests/**/*.py"]

# Patterns, and the remedy for each.
PATTERNS = {
  r"(^|[.;:] |# )(Of|From|With|By) (so many|what|rows|values|results|leaves)\b": (
    "subject and verb first"
  ),
  r"\b[Ww]hat (is|was|a|the|each|it|they|JAX|users)\b": "a noun instead of a clause",
  r"\b(left|leaving|leaves?) out\b": "exclude, skip or ignore",
  r"\b(takes? no part|takes up|goes on|go on|stays? as it was)\b": "a plain verb",
  r"\b(by itself|by themselves|for itself|a kind of)\b": "individually, separately",
  r"\b(of which|the other ones|one of one)\b": "repeat the noun",
  r", too\b|\btoo[.;]|\bbut for\b|\band no more\b": "also, except for, only",
  r"\bone (after|behind) the other\b": "sequentially, contiguously",
}
EXCEPTIONS = (
  "What it costs",
  "What is guaranteed",
  "what a step did",
  "what it skips",
)


def hits(line):
  for exception in EXCEPTIONS:
    line = line.replace(exception, "")
  return [instead for p, instead in PATTERNS.items() if re.search(p, line)]


def test_no_sentence_has_to_be_parsed():
  found = []
  for page in [page for pattern in PATHS for page in sorted(ROOT.glob(pattern))]:
    name = page.relative_to(ROOT).as_posix()
    if name == "tests/test_language.py":  # It has the patterns.
      continue
    for number, line in enumerate(page.read_text("utf-8").splitlines(), 1):
      found += [f"{name}:{number}: {line.strip()} ({x})" for x in hits(line)]
  assert not found, "\n".join(found)


def test_so_that_the_test_above_can_fail():
  for line in ("Of what is left, take one.", "It is left out.", "It sees it, too."):
    assert hits(line)
  assert not hits("What it costs is in a table.")
