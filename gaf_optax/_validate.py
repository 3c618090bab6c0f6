"""Checks of arguments, made as soon as their values are known."""

import math
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


def scalar(hint: str = "", **arguments: Any) -> None:
  """Raises unless each argument is a real number or a scalar array of one."""
  for name, value in arguments.items():
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    is_array = (
      isinstance(value, np.ndarray | np.generic | jax.Array)
      and value.shape == ()
      and jnp.issubdtype(value.dtype, np.number)
      and not jnp.issubdtype(value.dtype, np.complexfloating)
    )
    if not (is_number or is_array):
      raise ValueError(f"{name} must be a number, got {value!r}.{hint}")


def in_interval(
  low: float, high: float, hint: str = "", *, open_end: bool = False, **arguments
) -> None:
  """Raises unless each concrete argument is in [low, high], or [low, high)."""
  for name, value in arguments.items():
    scalar(hint, **{name: value})
    if not is_concrete(value):
      continue
    number = float(value)
    inside = low <= number < high if open_end else low <= number <= high
    if not inside:  # NaN is not inside.
      interval = f"[{low}, {high}{')' if open_end else ']'}"
      raise ValueError(f"{name} must be in {interval}, got {number}.{hint}")


def non_negative(**arguments: Any) -> None:
  in_interval(0, math.inf, open_end=True, **arguments)


def positive(**arguments: Any) -> None:
  non_negative(**arguments)
  for name, value in arguments.items():
    if is_concrete(value) and float(value) == 0:
      raise ValueError(f"{name} must be positive, got {float(value)}.")


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
        f"{name} must be a Python int, since it sets shapes, got an array. Under"
        " optax.inject_hyperparams, add it to static_args."
      )
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
      raise ValueError(f"{name} must be an int, got {value!r}.{hint}")
    if value < minimum:
      raise ValueError(f"{name} must be at least {minimum}, got {value}.{hint}")


def weights(shape: tuple[int, ...], **arguments: Any) -> jax.Array:
  """The argument as a float array of this shape, with 0 for negative values and NaN.

  Raises:
    ValueError: for another shape, or concrete values that are negative, NaN or Inf.
  """
  ((name, value),) = arguments.items()
  array = jnp.asarray(value)
  if array.shape != shape:
    raise ValueError(
      f"{name} must have shape {shape}, one number for each micro-gradient here, got"
      f" {array.shape}."
    )
  if is_concrete(array):
    values = np.asarray(array)
    if not np.all(np.isfinite(values) & (values >= 0)):
      raise ValueError(f"{name} must be finite and at least 0, got {values}.")
  array = array.astype(float)
  return jnp.where((array > 0) & jnp.isfinite(array), array, 0)
