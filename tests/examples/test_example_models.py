"""Models: as large as the published ones, for images of any size."""

import jax
import jax.numpy as jnp
import pytest

import models

pytestmark = pytest.mark.experiments


def _shapes(model, image=(32, 32, 3)):
  x = jnp.zeros((1, *image))
  return jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))


def _count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


_VIT_B16 = models.ViT(1000, width=768, depth=12, head_width=64, patch_size=16)


@pytest.mark.parametrize(
  "model, image, number",
  [
    # torchvision 0.20.
    (models.make("resnet18", 1000), 224, 11_689_512),
    (models.make("resnet18", 100), 32, 11_227_812),
    (models.make("resnet34", 1000), 224, 21_797_672),
    (models.make("vit-l16", 1000), 224, 304_326_632),
    (_VIT_B16, 224, 86_567_656),
    # github.com/kuangliu/pytorch-cifar.
    (models.make("resnet18-cifar", 10), 32, 11_173_962),
    (models.make("resnet34-cifar", 10), 32, 21_282_122),
  ],
)
def test_published_numbers_of_parameters(model, image, number):
  assert _count(_shapes(model, (image, image, 3))["params"]) == number


def test_resnet18_has_the_papers_statistics():
  # Mean and variance of the 4,800 channels of 20 norms.
  assert _count(_shapes(models.make("resnet18", 100))["batch_stats"]) == 2 * 4_800


def test_vit_l16_scales_images_to_its_own_size():
  model = models.make("vit-l16", 10, depth=1)
  large, small = (_shapes(model, (size, size, 3)) for size in (224, 32))
  assert jax.tree.map(jnp.shape, large) == jax.tree.map(jnp.shape, small)
  # 14 x 14 patches and the class token.
  assert small["params"]["position"].shape == (1, 197, 1024)


@pytest.mark.parametrize("name", list(models.KINDS))
def test_width_and_depth(name):
  divisor = models.KINDS[name].divisor
  count = lambda width, depth: _count(
    _shapes(models.make(name, 10, width, depth))["params"]
  )
  small = count(2 * divisor, 1)
  assert count(4 * divisor, 1) > 1.5 * small
  assert count(2 * divisor, 3) > small


def test_depth_by_hand():
  mlp = _shapes(models.make("mlp", 10, 7, 3), (8, 8, 1))["params"]
  assert _count(mlp) == (64 + 1) * 7 + 2 * (7 + 1) * 7 + (7 + 1) * 10
  # A block has two 3x3 convolutions and two norms; each stage gets one more.
  one, two = (
    _count(_shapes(models.make("resnet34", 10, 4, depth))["params"]) for depth in (1, 2)
  )
  assert two - one == sum(2 * 9 * w * w + 4 * w for w in (4, 8, 16, 32))
  # 4 w^2 + 4 w for attention, 8 w^2 + 5 w for the hidden layer, 4 w for the norms.
  one, two = (
    _count(_shapes(models.make("vit", 10, 16, depth))["params"]) for depth in (1, 2)
  )
  assert two - one == 12 * 16**2 + 13 * 16


@pytest.mark.parametrize("image", [(8, 8, 1), (32, 32, 3)])
@pytest.mark.parametrize("name", list(models.KINDS))
def test_outputs(name, image):
  model = models.make(name, 7, models.KINDS[name].divisor, 1)
  variables = _shapes(model, image)
  out = jax.eval_shape(
    lambda v: model.apply(v, jnp.zeros((3, *image)), train=False), variables
  )
  assert out.shape == (3, 7) and out.dtype == jnp.float32
