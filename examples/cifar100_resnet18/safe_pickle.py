"""Safe pickle: reads pickles of numbers and NumPy arrays that may be hostile."""

import io
import pickle

import numpy as np

from common.command import UserError

# NumPy's plain number types: no objects, no records.
_NUMBERS = {*"?bBhHiIlLqQfd", "b1", "i1", "i2", "i4", "i8"}
_NUMBERS |= {"u1", "u2", "u4", "u8", "f4", "f8"}


def _dtype(name, *copy_and_align):
  if name not in _NUMBERS:
    raise pickle.UnpicklingError(f"an array of dtype {name!r} is not allowed")
  return np.dtype(name, *copy_and_align)


def _reconstruct(kind, shape, typecode):
  if kind is not np.ndarray or tuple(shape) != (0,):
    raise pickle.UnpicklingError("only plain arrays are allowed")
  del typecode  # The array's state, which follows, says its dtype.
  return np.ndarray(shape, np.int8)


def _encode(text, encoding="latin1"):
  if encoding != "latin1":
    raise pickle.UnpicklingError(f"the encoding {encoding!r} is not allowed")
  return text.encode("latin1")


# What a pickle may call: stand-ins that do what NumPy's pickles need, and no more.
_ALLOWED = {
  "numpy.core.multiarray._reconstruct": _reconstruct,
  "numpy._core.multiarray._reconstruct": _reconstruct,
  "numpy.ndarray": np.ndarray,
  "numpy.dtype": _dtype,
  "_codecs.encode": _encode,
  "builtins.bytes": bytes,
  "__builtin__.bytes": bytes,
}


class _Unpickler(pickle.Unpickler):
  def find_class(self, module, name):
    if f"{module}.{name}" not in _ALLOWED:
      raise pickle.UnpicklingError(f"it asks for {module}.{name}")
    return _ALLOWED[f"{module}.{name}"]


def loads(content: bytes, source: str):
  """The object in a pickle of dicts, lists, numbers, strings and number arrays.

  Nothing that the pickle names is imported or called, NumPy's own array
  reconstruction excepted. Strings of Python 2 are read as latin1.
  """
  try:
    return _Unpickler(io.BytesIO(content), encoding="latin1").load()
  # A broken pickle can raise nearly anything; all of it means the same here.
  except Exception as error:
    raise UserError(
      f"{source} is not a readable pickle of arrays (truncated, damaged, or not a"
      f" data file): {error or type(error).__name__}."
    ) from error
