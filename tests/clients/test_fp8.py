"""Flax's fp8 layers, which pass histories of maxima as gradients."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gaf_optax
import oracle

with warnings.catch_warnings():
  # The oldest supported Flax uses a name that the oldest supported JAX deprecates.
  warnings.simplefilter("ignore", DeprecationWarning)
  from flax import linen as nn
  from flax.training import train_state

K, STEPS, TAU = 4, 2, 0.9
HISTORY = "_overwrite_with_gradient"


def test_histories_neither_decide_nor_are_averaged():
  model = nn.Dense(4, dot_general_cls=nn.Fp8DirectDotGeneralOp)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(STEPS, K, 16, 8)).astype(np.float32)
  y = x @ rng.normal(size=(8, 4)).astype(np.float32)
  y[:, 2] *= -1
  loss = lambda variables, x, y: jnp.mean((model.apply(variables, x) - y) ** 2)
  micro_gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))
  in_groups = gaf_optax.value_and_grad(
    loss, K, TAU, groups=lambda path, _: None if path[0].key == HISTORY else "params"
  )

  @jax.jit
  def train_step(state, grads):
    largest = jax.tree.map(lambda x: jnp.max(x, axis=0), grads[HISTORY])
    return state.apply_gradients(grads={**grads, HISTORY: largest})

  tx = optax.chain(gaf_optax.gaf(TAU, num_microbatches=K), optax.sgd(0.1))
  variables = jax.jit(model.init)(jax.random.key(0), x[0, 0])
  state = train_state.TrainState.create(apply_fn=None, params=variables, tx=tx)
  for step in range(STEPS):
    variables = state.params
    grads = micro_gradients(variables, x[step], y[step])
    state = train_step(state, grads)
    found = state.opt_state[0]
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(grads["params"])]
    want = oracle.gaf(leaves, TAU, start=step)
    np.testing.assert_array_equal(found.accepted, want.accepted)
    np.testing.assert_allclose(found.weights, want.weights, atol=1e-6)
    assert 1 < np.sum(want.accepted) < K
    jax.tree.map(
      lambda new, stack: np.testing.assert_array_equal(new, np.max(stack, axis=0)),
      state.params[HISTORY],
      grads[HISTORY],
    )
  # Microbatch i of the streamed form has the rows i, i + K, ...
  rows = lambda a: np.swapaxes(a[-1], 0, 1).reshape(K * 16, -1)
  _, mean, agreement = in_groups(variables, rows(x), rows(y))
  want = oracle.gaf(leaves, TAU)
  np.testing.assert_array_equal(agreement.accepted, want.accepted)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, np.mean(b, axis=0), rtol=1e-5),
    mean[HISTORY],
    grads[HISTORY],
  )
