"""The Python of each page runs as one program; README's commands are what CI runs."""

import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def blocks(language, page="README.md"):
  text = (ROOT / page).read_text(encoding="utf-8")
  return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/devices.md"])
def test_python_blocks_run(page, capsys):
  found = blocks("python", page)
  assert len(found) >= 5
  names = {}
  for block in found:
    exec(compile(block, page, "exec"), names)
  assert "accept_rate" in capsys.readouterr().out


@pytest.mark.parametrize("name, part", [("main", "train.py"), ("test", "pytest")])
def test_commands_are_found_by_ci(name, part):
  printed = subprocess.run(
    ["bash", str(ROOT / ".ci" / "readme_command"), name],
    capture_output=True,
    text=True,
    check=True,
    timeout=20,
  ).stdout.strip()
  assert part in printed
  assert printed in [block.strip() for block in blocks("bash")]
