"""Compares examples by the gradients of dense layers, in closed form."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from gaf_optax import _compat, _decide, _kernels, _options, _state, _tau, rules


def example_weights(
  activations: jax.Array | Sequence[jax.Array],
  cotangents: jax.Array | Sequence[jax.Array],
  tau: float | jax.Array | _tau.Tau = 0.97,
  *,
  rule: rules.RuleFn | None = None,
) -> _state.Agreement:
  r"""Compares the examples of a batch by their gradients of one dense layer.

  For models whose examples cannot be separated (BatchNorm) and for handwritten losses.
  Example i has the input :math:`a_i` of the layer and the cotangent :math:`d_i` of its
  output. The gradient is :math:`d_i a_i^\top` for the kernel and :math:`d_i` for the
  bias, so the Gram matrix needs no gradient:

  .. math:: G = (A A^\top + 1) \odot (D D^\top)

  The matrices of several layers are added; usually the last layer is enough. A layer
  with inputs `[B, d]` and outputs `[B, c]` takes `B^2 (d + c)` multiplications.

  Args:
    activations: the inputs `[B, d]` of a dense layer with a bias; or a sequence of
      them, one for each layer.
    cotangents: the gradients `[B, c]` of each example's own loss (not of the mean)
      with respect to the layer's outputs; or a sequence of them. For the softmax
      cross-entropy of logits they are `softmax(logits) - one_hot(labels)`.
    tau: the largest accepted distance, in [0, 2], traced or not; or a
      :func:`tau_quantile` or :func:`adaptive_tau`.
    rule: see :func:`gaf`. With several classes use `rules.nearest_neighbors(5)`, since
      examples agree within a class.

  Returns:
    An :class:`Agreement` of the B examples. The filtered gradient is that of
    `sum(weights * losses)`. No gradient flows through the weights.

  Raises:
    ValueError: for arrays that are not `[B, features]` with the same B of at least 2,
      different numbers of layers, and arguments outside their ranges.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from gaf_optax import example_weights, rules, tau_quantile
    >>> inputs = jnp.array([[1., 0.], [1., .1], [.9, 0.], [1., 0.]])
    >>> logits, labels = jnp.zeros((4, 2)), jnp.array([0, 0, 0, 1])
    >>> cotangents = jax.nn.softmax(logits) - jax.nn.one_hot(labels, 2)
    >>> rule = rules.nearest_neighbors(2)
    >>> example_weights(inputs, cotangents, tau_quantile(.75), rule=rule).accepted
    Array([ True,  True,  True, False], dtype=bool)
  """
  layers = _layers(activations, cotangents)
  options = _options.Options(_tau.as_stateless_tau(tau), rule=rule)
  tau = options.tau.at(None, jnp.zeros((), jnp.int32))
  return _of_layers(layers, tau, rule=options.rule)


@functools.partial(jax.jit, static_argnames="rule")
def _of_layers(layers, tau, *, rule):
  gram = sum(_layer_gram(*layer) for layer in layers)
  gram, finite = _kernels.cleaned(gram[None], jnp.ones(gram.shape[0], bool))
  decided = _decide.decide(rule, gram, finite, _decide.Inputs(tau))
  return _state.agreement(_state.outcome(decided, gram, has_norms=True))


def _layer_gram(activations, cotangents):
  """The Gram matrix of one layer's per-example gradients, before `cleaned`."""
  dot = lambda x: jnp.matmul(x, x.mT, precision=lax.Precision.HIGHEST)
  wide = lambda x: x.astype(_compat.real_accumulator_dtype([x]))
  return (dot(wide(activations)) + 1) * dot(wide(cotangents))


def _layers(activations, cotangents):
  """Checked pairs of arrays `[B, features]`, through which no gradient flows."""
  several = [isinstance(x, list | tuple) for x in (activations, cotangents)]
  if any(several) and not (all(several) and len(activations) == len(cotangents) > 0):
    raise ValueError(
      "activations and cotangents must be two arrays, or two sequences of one array for"
      f" each layer, got {_described(activations)} and {_described(cotangents)}."
    )
  layers = list(zip(activations, cotangents)) if any(several) else None
  layers = layers or [(activations, cotangents)]
  size = jnp.shape(layers[0][0])[:1]
  for pair in layers:
    for name, x in zip(("activations", "cotangents"), pair):
      shape = jnp.shape(x)
      if len(shape) != 2 or shape[:1] != size:
        raise ValueError(
          f"{name} must have the shape [B, features], with the same B in every array"
          f" ({size[0] if size else 'unknown'} in the first), got {shape}. For a layer"
          " that is applied at several positions of an example (a convolution, for"
          " instance), compare a layer after the pooling instead."
        )
  if size[0] < 2:
    raise ValueError(f"activations need at least 2 examples to compare, got {size[0]}.")
  return jax.tree.map(lambda x: lax.stop_gradient(jnp.asarray(x)), layers)


def _described(value):
  if isinstance(value, list | tuple):
    return f"a sequence of {len(value)}"
  return f"an array of shape {jnp.shape(value)}"
