"""Models: an MLP, ResNets and vision transformers for small images, in Flax Linen."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp


class MLP(nn.Module):
  """Hidden layers of `width` on the flattened image."""

  num_classes: int
  width: int = 256
  depth: int = 2

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    del train
    x = x.reshape(len(x), -1)
    for _ in range(self.depth):
      x = nn.relu(nn.Dense(self.width)(x))
    return nn.Dense(self.num_classes, name="head")(x)


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


class ResNet(nn.Module):
  """ResNet of basic blocks (arXiv 1512.03385) in four stages."""

  num_classes: int  # Number of outputs
  width: int = 64  # Channels of the first stage; each later one has twice as many
  # In each stage; (2, 2, 2, 2) is ResNet-18, (3, 4, 6, 3) ResNet-34.
  blocks: tuple[int, ...] = (2, 2, 2, 2)
  # A 3x3 convolution, usual for CIFAR, instead of torchvision's 7x7 of stride 2 with
  # max-pooling.
  small_stem: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    size, stride = (3, 1) if self.small_stem else (7, 2)
    x = nn.relu(_norm(train)(_convolution(self.width, size, stride)(x)))
    if not self.small_stem:
      x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    for stage, blocks in enumerate(self.blocks):
      for block in range(blocks):
        stride = 2 if stage > 0 and block == 0 else 1
        x = _Block(self.width * 2**stage, stride)(x, train)
    return nn.Dense(self.num_classes, name="head")(jnp.mean(x, axis=(1, 2)))


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


class ViT(nn.Module):
  """Vision transformer (arXiv 2010.11929), without dropout."""

  num_classes: int  # Number of outputs
  width: int = 64  # Of the tokens; the hidden layers have four times as many
  depth: int = 4  # Layers
  head_width: int = 16  # Of an attention head, a divisor of `width`
  patch_size: int | None = None  # Pixels of a side; None for a quarter of the image's
  # What images are scaled to first, pixels of a side; None for as they are.
  image_size: int | None = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    del train
    if self.image_size is not None:
      x = jax.image.resize(
        x, (len(x), self.image_size, self.image_size, x.shape[-1]), "bilinear"
      )
    patch = self.patch_size or x.shape[1] // 4
    x = nn.Conv(self.width, (patch, patch), strides=(patch, patch), padding="VALID")(x)
    x = x.reshape(len(x), -1, self.width)
    first = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
    x = jnp.concatenate([jnp.tile(first, (len(x), 1, 1)), x], axis=1)
    x += self.param(
      "position", nn.initializers.normal(0.02), (1, x.shape[1], self.width)
    )
    for _ in range(self.depth):
      y = nn.LayerNorm(epsilon=1e-6)(x)
      x += nn.MultiHeadDotProductAttention(self.width // self.head_width)(y)
      y = nn.LayerNorm(epsilon=1e-6)(x)
      y = nn.gelu(nn.Dense(4 * self.width)(y), approximate=False)
      x += nn.Dense(self.width)(y)
    x = nn.LayerNorm(epsilon=1e-6)(x)[:, 0]
    return nn.Dense(self.num_classes, name="head")(x)


@dataclasses.dataclass(frozen=True)
class Kind:
  """A model by name."""

  # From the number of classes and `width` and `depth`, where given.
  build: Callable[..., nn.Module]
  longest: int = 10  # Number of steps between two looks at whether to stop, at most
  divisor: int = 1  # What a width must be a multiple of
  convolves: bool = False  # Whether most of its work is convolutions
  normalizes: bool = False  # Whether it has BatchNorm
  on_patches: bool = False  # Whether it takes `features.of_patches`


def _resnet(default, small_stem):
  def build(num_classes, depth=None, **kwargs):
    blocks = default if depth is None else (depth,) * 4
    return ResNet(num_classes, blocks=blocks, small_stem=small_stem, **kwargs)

  return Kind(build, convolves=True, normalizes=True)


_R18, _R34 = (2, 2, 2, 2), (3, 4, 6, 3)
KINDS = {
  "mlp": Kind(MLP, longest=100),
  "patches-mlp": Kind(functools.partial(MLP, depth=1), longest=100, on_patches=True),
  "resnet18": _resnet(_R18, small_stem=False),
  "resnet34": _resnet(_R34, small_stem=False),
  "resnet18-cifar": _resnet(_R18, small_stem=True),
  "resnet34-cifar": _resnet(_R34, small_stem=True),
  "vit": Kind(ViT, divisor=16),
  "vit-l16": Kind(
    functools.partial(
      ViT, width=1024, depth=24, head_width=64, patch_size=16, image_size=224
    ),
    divisor=64,
    longest=1,
  ),
}


def make(
  name: str, num_classes: int, width: int | None = None, depth: int | None = None
) -> nn.Module:
  """A model whose `apply` takes images `[n, height, width, channels]` and `train`.

  `width` and `depth` are None for the usual ones.
  """
  given = {"width": width, "depth": depth}
  given = {name: value for name, value in given.items() if value is not None}
  return KINDS[name].build(num_classes, **given)
