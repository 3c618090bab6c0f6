"""Cosine distance of two pytrees."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gaf_optax import _compat, _kernels, _rules
from gaf_optax._validate import leaf_name


def cosine_distance(a: Any, b: Any) -> jax.Array:
  r"""Cosine distance of two pytrees, each taken as one long vector.

  .. math::
    d(a, b) = 1 - \frac{\langle a, b \rangle}{|a| |b|}

  Inner products accumulate in at least float32; a norm above about 1e19 counts as not
  finite, one below about 3e-16 as zero. Complex leaves use the real part of the
  Hermitian product. Only leaves that are floating point or complex in both trees
  are compared.

  Args:
    a: a pytree of arrays.
    b: a pytree of the same structure and shapes.

  Returns:
    float32 scalar in [0, 2]: 0 for the same direction, 1 for orthogonal vectors
    or if either is zero, 2 for opposite ones; NaN if either is not finite.

  Raises:
    ValueError: if structures or shapes differ, or no leaf is floating point or complex.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gaf_optax import cosine_distance
    >>> a = {'w': jnp.array([1.0, 0.0]), 'b': jnp.array(0.0)}
    >>> b = {'w': jnp.array([0.0, 2.0]), 'b': jnp.array(0.0)}
    >>> float(cosine_distance(a, b))
    1.0

  References:
    Chaubard et al., `Beyond Gradient Averaging in Parallel Optimization
    <https://arxiv.org/abs/2412.18052>`_, 2024, equation 1.
  """
  structures: list[Any] = [jax.tree.structure(tree) for tree in (a, b)]
  if structures[0] != structures[1]:
    raise ValueError(
      "a and b must have the same tree structure, got "
      f"{structures[0]} and {structures[1]}."
    )
  pairs = []
  paths = jax.tree_util.tree_flatten_with_path(a)[0]
  for (path, x), y in zip(paths, jax.tree.leaves(b)):
    if jnp.shape(x) != jnp.shape(y):
      raise ValueError(
        "leaves of a and b must have the same shape, got "
        f"{jnp.shape(x)} and {jnp.shape(y)} at leaf {leaf_name(path)}."
      )
    pair = jnp.asarray(x), jnp.asarray(y)
    if all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in pair):
      pairs.append(pair)
  if not pairs:
    raise ValueError("a and b have no floating-point or complex leaf to compare.")
  stacks = []
  for x, y in pairs:
    if x.dtype != y.dtype:
      dtype = np.result_type(*(_compat.accumulator_dtype(z.dtype) for z in (x, y)))
      x, y = x.astype(dtype), y.astype(dtype)
    stacks.append(jnp.stack([x, y]))
  (gram,), finite = _kernels.gram(_kernels.Stack(stacks, [0] * len(stacks)))
  with jax.debug_nans(False):
    found = _rules.distance("cosine", gram[0, 1], gram[0, 0], gram[1, 1])
    return jnp.where(jnp.all(finite), found, jnp.nan).astype(jnp.float32)
