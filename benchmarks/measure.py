"""Measurements of compiled programs, next to others in the same run."""

import datetime as dt
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

import jax


class Program(NamedTuple):
  """A function compiled for its arguments.

  Attributes:
    run: runs it and waits for the result.
    temporary: bytes of temporary memory.
  """

  run: Callable[[], Any]
  temporary: int


class Ratio(NamedTuple):
  """Time relative to the baseline, over pairs of consecutive runs.

  Attributes:
    median: median of the pairs.
    low: first quartile.
    high: third quartile.
  """

  median: float
  low: float
  high: float

  def __str__(self):
    return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def program(function: Callable[..., Any], *args: Any) -> Program:
  """Compiles `function` for `args`, which stay on the device."""
  compiled = jax.jit(function).lower(*args).compile()
  return Program(
    lambda: jax.block_until_ready(compiled(*args)),
    compiled.memory_analysis().temp_size_in_bytes,
  )


def compile_seconds(function: Callable[..., Any], *args: Any) -> float:
  """Seconds to trace and compile a function, without caches.

  Args:
    function: the Python function.
    *args: arrays or `jax.ShapeDtypeStruct`s.
  """
  jax.clear_caches()
  start = time.perf_counter()
  jax.jit(function).lower(*args).compile()
  return time.perf_counter() - start


def interleaved(
  runs: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, list[float]]:
  """Runs all programs in turn, `repeats` times; returns the seconds of each.

  The order rotates by one in each round, so that no program has a fixed place. The
  first round is not counted.
  """
  names = list(runs)
  seconds: dict[str, list[float]] = {name: [] for name in names}
  for repeat in range(repeats + 1):
    turn = repeat % len(names)
    for name in names[turn:] + names[:turn]:
      start = time.perf_counter()
      runs[name]()
      if repeat:
        seconds[name].append(time.perf_counter() - start)
  return seconds


def ratios(
  seconds: Mapping[str, list[float]], baseline: str
) -> tuple[float, dict[str, Ratio]]:
  """The baseline's median in milliseconds, and the others relative to it."""
  found = {}
  for name, own in seconds.items():
    if name != baseline:
      pairs = [a / b for a, b in zip(own, seconds[baseline])]
      low, middle, high = statistics.quantiles(pairs, n=4, method="inclusive")
      found[name] = Ratio(middle, low, high)
  return 1e3 * statistics.median(seconds[baseline]), found


def environment() -> str:
  """The machine, the versions and the date, in one line."""
  device = jax.devices()[0]
  kind = _processor() if device.platform == "cpu" else device.device_kind
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
  versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "optax"))
  return (
    f"{kind}, {cores or os.cpu_count()} cores, {platform.system()};"
    f" Python {platform.python_version()}, {versions};"
    f" {dt.datetime.now(dt.UTC):%Y-%m-%d}"
  )


def write(parts: list[str], path: pathlib.Path) -> None:
  """Writes the printed parts of a report to a file."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
  print(f"\nWritten to {path}.")


def table(header: list[str], rows: list[list[Any]]) -> str:
  """A Markdown table."""
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _processor():
  try:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
      names = [line for line in file if line.startswith("model name")]
    return names[0].partition(":")[2].strip()
  except (OSError, IndexError):
    return platform.processor() or platform.machine()
