"""Models: the MLP for small images and the ResNet-18 of the paper, in Flax Linen."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class MLP(nn.Module):
  """Two hidden layers of `width` on the flattened image."""

  num_classes: int
  width: int = 256

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    del train
    x = x.reshape(len(x), -1)
    for _ in range(2):
      x = nn.relu(nn.Dense(self.width)(x))
    return nn.Dense(self.num_classes)(x)


class _Block(nn.Module):
  """Two 3x3 convolutions around a shortcut."""

  width: int
  stride: int

  @nn.compact
  def __call__(self, x, train):
    shortcut = x
    x = _convolution(self.width, 3, self.stride)(x)
    x = nn.relu(_norm(train)(x))
    x = _norm(train)(_convolution(self.width, 3, 1)(x))
    if shortcut.shape != x.shape:
      shortcut = _convolution(self.width, 1, self.stride)(shortcut)
      shortcut = _norm(train)(shortcut)
    return nn.relu(x + shortcut)


class ResNet18(nn.Module):
  """ResNet-18 as in torchvision: 7x7 stem of stride 2, max-pool, 8 blocks.

  With width 64 and 100 classes it has 11,227,812 parameters.
  """

  num_classes: int
  width: int = 64

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = _convolution(self.width, 7, 2)(x)
    x = nn.relu(_norm(train)(x))
    x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    for stage in range(4):
      for block in range(2):
        stride = 2 if stage > 0 and block == 0 else 1
        x = _Block(self.width * 2**stage, stride)(x, train)
    return nn.Dense(self.num_classes)(jnp.mean(x, axis=(1, 2)))


def _convolution(width, size, stride):
  return nn.Conv(
    width,
    (size, size),
    strides=(stride, stride),
    padding=size // 2,
    use_bias=False,
    kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
  )


def _norm(train):
  return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)


DEFAULT_WIDTH = {"mlp": 256, "resnet18": 64}
_MODELS: dict[str, Any] = {"mlp": MLP, "resnet18": ResNet18}


def make(name: str, num_classes: int, width: int | None = None) -> nn.Module:
  """A model whose `apply` takes images `[n, height, width, channels]` and `train`.

  Args:
    name: 'mlp' or 'resnet18'.
    num_classes: number of outputs.
    width: of the hidden layers, or of the first stage; None for the usual one.
  """
  return _MODELS[name](num_classes, width or DEFAULT_WIDTH[name])
