"""ResNet-18 and ResNet-34 for small images, and an MLP, in Flax Linen."""

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

  num_classes: int
  width: int = 64  # Channels of the first stage; each later stage has twice as many
  blocks: tuple[int, ...] = (2, 2, 2, 2)  # Per stage; ResNet-34 has (3, 4, 6, 3)
  # A 3x3 convolution, usual for 32 x 32 images, instead of torchvision's 7x7 of
  # stride 2 with max-pooling.
  small_stem: bool = True

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


BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
MODELS = ("mlp", *BLOCKS)


def make(
  name: str, num_classes: int, width: int | None = None, small_stem: bool = True
) -> nn.Module:
  """A model whose `apply` takes images `[n, height, width, channels]` and `train`.

  Its last layer is called "head". A `width` of None is the usual one.
  """
  given = {} if width is None else {"width": width}
  if name == "mlp":
    return MLP(num_classes, **given)
  return ResNet(num_classes, blocks=BLOCKS[name], small_stem=small_stem, **given)


def augmented(seed, step, images: jax.Array) -> jax.Array:
  """Images uint8 `[k, rows, height, width, channels]`, shifted and mirrored at random.

  An image moves by up to 4 pixels over a black border, as usual for CIFAR.
  """
  flat = images.reshape(-1, *images.shape[2:])
  shift_key, mirror_key = jax.random.split(
    jax.random.fold_in(jax.random.key(seed), step)
  )
  shifts = jax.random.randint(shift_key, (len(flat), 2), 0, 9)
  mirrored = jax.random.bernoulli(mirror_key, shape=(len(flat),))

  def augment(image, shift, mirror):
    padded = jnp.pad(image, ((4, 4), (4, 4), (0, 0)))
    image = jax.lax.dynamic_slice(padded, (*shift, 0), image.shape)
    return jnp.where(mirror, image[:, ::-1], image)

  return jax.vmap(augment)(flat, shifts, mirrored).reshape(images.shape)
