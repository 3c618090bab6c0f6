"""The gradient noise scale in `metrics` against its definition in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gaf_optax
import oracle
from gaf_optax import rules


def noise_scale(leaves, **options):
  tx = gaf_optax.gaf(2.0, **options)
  params = [jnp.zeros(x.shape[1:], x.dtype) for x in leaves]
  _, state = jax.jit(tx.update)(leaves, tx.init(params))
  return float(gaf_optax.metrics(state)["noise_scale"])


def draw(k, scale=1.0, seed=0):
  rng = np.random.default_rng(seed)
  rows = rng.standard_normal((k, 60)) + rng.standard_normal(60)
  return [jnp.asarray(scale * x, jnp.float32) for x in (rows[:, :20], rows[:, 20:])]


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("k", [2, 7, 40])
@pytest.mark.parametrize("rule", ["sequential", "most_neighbors"])
def test_is_the_definition(k, scale, rule):
  """40 sequential ones are pushed into a stream on CPU, without a Gram matrix."""
  leaves = draw(k, scale)
  leaves[0] = leaves[0].at[0, 3].set(jnp.nan) if k == 7 else leaves[0]
  want = oracle.noise_scale(leaves)
  rule = getattr(rules, rule)()
  assert noise_scale(leaves, rule=rule) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(
  "options", [{"groups": "leaf"}, {"anchor_decay": 0.5}], ids=str
)
def test_groups_are_added_and_an_anchor_takes_no_part(options):
  leaves = draw(6)
  want = oracle.noise_scale(leaves)
  assert noise_scale(leaves, **options) == pytest.approx(want, rel=1e-4)


def test_nothing_in_common_is_infinite():
  assert noise_scale([jnp.array([[1.0, 0.0], [-1.0, 0.0]])]) == np.inf
  assert noise_scale([jnp.zeros((2, 3))]) == np.inf


def test_one_finite_tells_nothing():
  assert np.isnan(noise_scale([jnp.array([[1.0, 0.0], [jnp.nan, 0.0]])]))
