"""Checks arguments as soon as their values are known."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def leaf_name(path: Any) -> str:
  """A leaf's path for error messages."""
  return jax.tree_util.keystr(path) or "(the whole tree)"


def is_concrete(value: Any) -> bool:
  """Whether a value is known now; the value of a traced array is not."""
  return not isinstance(value, jax.core.Tracer)


def in_interval(
  low: float,
  high: float,
  hint: str = "",
  *,
  open_start: bool = False,
  open_end: bool = False,
  **arguments: Any,
) -> None:
  """Raises unless each argument is a number, and if concrete in [low, high].

  `open_start` and `open_end` exclude `low` and `high`.
  """
  for name, value in arguments.items():
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    is_scalar = (
      isinstance(value, np.ndarray | np.generic | jax.Array)
      and value.shape == ()
      and jnp.issubdtype(value.dtype, np.number)
      and not jnp.issubdtype(value.dtype, np.complexfloating)
    )
    if not (is_number or is_scalar):
      raise ValueError(f"{name} must be a number, got {value!r}.{hint}")
    if not is_concrete(value):
      continue
    number = float(value)
    above = low < number if open_start else low <= number  # False for NaN.
    below = number < high if open_end else number <= high
    if not (above and below):
      interval = f"{'(' if open_start else '['}{low}, {high}{')' if open_end else ']'}"
      raise ValueError(f"{name} must be in {interval}, got {number}.{hint}")


def one_of(choices: tuple[str, ...], **arguments: Any) -> None:
  for name, value in arguments.items():
    if not (isinstance(value, str) and value in choices):
      raise ValueError(
        f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}."
      )


def function(hint: str = "", **arguments: Any) -> None:
  for name, value in arguments.items():
    if not callable(value):
      raise ValueError(f"{name} must be callable, got {value!r}.{hint}")


def count(minimum: int, hint: str = "", **arguments: Any) -> None:
  """Raises unless each argument is a Python or NumPy integer >= minimum."""
  for name, value in arguments.items():
    if isinstance(value, jax.Array):
      raise ValueError(
        f"{name} must be a Python int, got an array. Under optax.inject_hyperparams,"
        " add it to static_args."
      )
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
      raise ValueError(f"{name} must be an int, got {value!r}.{hint}")
    if value < minimum:
      raise ValueError(f"{name} must be at least {minimum}, got {value}.{hint}")


def weights(shape: tuple[int, ...], **arguments: Any) -> jax.Array:
  """The argument as a float array of this shape; negative, NaN and Inf become 0.

  Raises:
    ValueError: for another shape, or concrete values that are negative, NaN or Inf.
  """
  ((name, value),) = arguments.items()
  array = jnp.asarray(value)
  if array.shape != shape:
    raise ValueError(
      f"{name} must have shape {shape}, one number per micro-gradient of this call, got"
      f" {array.shape}."
    )
  if is_concrete(array):
    values = np.asarray(array)
    if not np.all(np.isfinite(values) & (values >= 0)):
      raise ValueError(f"{name} must be finite and at least 0, got {values}.")
  array = array.astype(float)
  return jnp.where((array > 0) & jnp.isfinite(array), array, 0)
