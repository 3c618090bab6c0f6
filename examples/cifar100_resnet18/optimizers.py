"""Optimizers: the inner ones by name, as in the authors' scripts and in PyTorch."""

import functools

import optax

_momentum = functools.partial(optax.sgd, momentum=0.9)
_nesterov = functools.partial(_momentum, nesterov=True)
OPTIMIZERS = {
  "sgd": optax.sgd,
  "momentum": _momentum,
  "nesterov": _nesterov,
  "nesterov-plateau": _nesterov,
  "adam": optax.adam,
  "adamw": optax.adamw,
  "rmsprop": functools.partial(optax.rmsprop, decay=0.99),
}
# The one that lowers the learning rate where the test loss no longer falls.
PLATEAU = "nesterov-plateau"
_ADAMW_DECAY = 0.01  # As in PyTorch; the others have none unless asked for.


def make(
  name: str, learning_rate: float, decay: float | None
) -> optax.GradientTransformation:
  """The optimizer `name`; a `decay` of None is its usual one."""
  optimizer = OPTIMIZERS[name]
  if name == "adamw":
    decay = _ADAMW_DECAY if decay is None else decay
    return optimizer(learning_rate, weight_decay=decay)
  if decay:
    return optax.chain(optax.add_decayed_weights(decay), optimizer(learning_rate))
  return optimizer(learning_rate)
