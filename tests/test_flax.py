"""The filter in Flax's TrainState; clients/test_nnx.py has its other optimizer."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gaf_optax

# Optax's optimizers and schedules mix dtypes.
pytestmark = pytest.mark.usefixtures("standard_promotion")

with warnings.catch_warnings():
  # The oldest supported Flax uses a name that the oldest supported JAX deprecates.
  warnings.simplefilter("ignore", DeprecationWarning)
  from flax import linen as nn
  from flax.training import train_state

TAU = 0.9
K, ROWS, FEATURES = 3, 4, 5


def batches(step):
  """Inputs `[K, ROWS, FEATURES]` and targets for a linear model, which NumPy can solve.

  The targets are wrong in the microbatch that the filter visits last in this step.
  """
  rng = np.random.default_rng(step)
  x = rng.normal(size=(K, ROWS, FEATURES))
  y = x @ np.linspace(1, 2, FEATURES)[:, None]
  y[step - 1] *= -1
  return x.astype(np.float32), y.astype(np.float32)


def filtered_gradient(kernel, x, y, step):
  """The mean over the microbatches within TAU, from the definition."""
  kernel, x, y = (np.asarray(a, np.float64) for a in (kernel, x, y))
  x, y = (np.roll(a, -step, axis=0) for a in (x, y))
  rows = [2 / ROWS * a.T @ (a @ kernel - b) for a, b in zip(x, y)]
  total, number = rows[0], 1
  for row in rows[1:]:
    cosine = np.sum(total * row) / np.linalg.norm(total) / np.linalg.norm(row)
    if 1 - cosine <= TAU:
      total, number = total + row, number + 1
  return (total / number if number > 1 else 0 * total), number


def test_linen_train_state_trains_on_stacked_gradients():
  model = nn.Dense(1, use_bias=False)
  params = model.init(jax.random.key(0), jnp.zeros((1, FEATURES)))["params"]
  state = train_state.TrainState.create(
    apply_fn=model.apply,
    params=params,
    tx=optax.chain(gaf_optax.gaf(TAU), optax.sgd(0.05)),
  )

  @jax.jit
  def train_step(state, x, y):
    def loss(params, x, y):
      return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)

    grads = jax.vmap(jax.grad(loss), (None, 0, 0))(state.params, x, y)
    return state.apply_gradients(grads=grads)

  expected = np.asarray(params["kernel"])
  for step in range(3):
    x, y = batches(step)
    gradient, _ = filtered_gradient(expected, x, y, step)
    state = train_step(state, x, y)
    expected = expected - 0.05 * gradient
    np.testing.assert_allclose(state.params["kernel"], expected, rtol=1e-4, atol=1e-5)
  chex.assert_trees_all_equal_shapes_and_dtypes(state.params, params)
  assert int(state.step) == 3
  assert float(gaf_optax.metrics(state.opt_state)["num_accepted"]) == 2


def test_linen_train_state_takes_one_micro_gradient_a_call_with_multi_steps():
  params = {"kernel": jnp.zeros((FEATURES, 1))}
  state = train_state.TrainState.create(
    apply_fn=None, params=params, tx=gaf_optax.multi_steps(optax.sgd(0.05), K, TAU)
  )
  x, y = batches(0)
  gradient, _ = filtered_gradient(params["kernel"], x, y, 0)
  for a, b in zip(x, y):
    assert not np.any(state.params["kernel"])
    row = 2 / ROWS * a.T @ (a @ params["kernel"] - b)
    state = state.apply_gradients(grads={"kernel": row})
  np.testing.assert_allclose(
    state.params["kernel"], -0.05 * gradient, rtol=1e-4, atol=1e-6
  )
