"""Model: a small decoder-only transformer on bytes."""

import flax.linen as nn
import jax
import jax.numpy as jnp

VOCABULARY = 256
# Wavelengths of the rotations: from one radian a byte to this many times slower.
_SLOWEST = 100.0


class ByteTransformer(nn.Module):
  """Pre-norm decoder with rotary positions; its output layer is called `head`."""

  width: int = 96  # Of the residual stream, a multiple of twice the number of heads
  depth: int = 2  # Number of blocks
  heads: int = 4  # Of the attention

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Logits float32 `[b, t, 256]` of the byte after each of `tokens` `[b, t]`."""
    small = nn.initializers.normal(0.02)
    x = nn.Embed(VOCABULARY, self.width, embedding_init=small)(tokens)
    for _ in range(self.depth):
      x = x + self._attention(nn.LayerNorm()(x))
      hidden = nn.relu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
      x = x + nn.Dense(self.width)(hidden)
    head = nn.Dense(VOCABULARY, use_bias=False, kernel_init=small, name="head")
    return head(nn.LayerNorm()(x))

  def _attention(self, x):
    of_heads = (3, self.heads, self.width // self.heads)
    projected = nn.Dense(3 * self.width, use_bias=False)(x)
    query, key, value = jnp.moveaxis(
      projected.reshape(*x.shape[:2], *of_heads), 2, 0
    )  # [b, t, heads, d] each
    scores = jnp.einsum("bqhd,bkhd->bhqk", _rotated(query), _rotated(key))
    earlier = jnp.tril(jnp.ones(scores.shape, bool))
    scores = jnp.where(earlier, scores / of_heads[-1] ** 0.5, -jnp.inf)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), value)
    return nn.Dense(self.width, use_bias=False)(mixed.reshape(x.shape))


def _rotated(x):
  """Pairs of `[b, t, heads, d]` turned by angles that grow with the position."""
  half = x.shape[-1] // 2
  speeds = _SLOWEST ** (-jnp.arange(half) / half)
  angles = jnp.arange(x.shape[1])[:, None] * speeds[None, :]
  cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
  a, b = x[..., :half], x[..., half:]
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
