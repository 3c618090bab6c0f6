"""Plain English: patterns that make a sentence hard to read, in library and docs."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
PAGES += sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))
PAGES += sorted(f"gaf_optax/{p.name}" for p in (ROOT / "gaf_optax").glob("*.py"))

# Each with what to write instead.
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
  "What it cannot wrap",
  "What is guaranteed",
  "What a step did",
  "what a step did",
  "what it skips",
)


def hits(line):
  for exception in EXCEPTIONS:
    line = line.replace(exception, "")
  return [instead for p, instead in PATTERNS.items() if re.search(p, line)]


def test_no_sentence_has_to_be_parsed():
  found = []
  for page in PAGES:
    for number, line in enumerate((ROOT / page).read_text("utf-8").splitlines(), 1):
      found += [f"{page}:{number}: {line.strip()} ({x})" for x in hits(line)]
  assert not found, "\n".join(found)


def test_so_that_the_test_above_can_fail():
  for line in ("Of what is left, take one.", "It is left out.", "It sees it, too."):
    assert hits(line)
  assert not hits("What it costs is in a table.")
