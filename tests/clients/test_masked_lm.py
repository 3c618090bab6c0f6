"""A masked language model under jit on a mesh of Auto axes, FSDP by inferred specs.

The loss is per token, and microbatches have different numbers of masked tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gaf_optax
from clients import toy_task

LENGTH, VOCABULARY, WIDTH = 12, 16, 16
ADAMW = optax.adamw(0.5, eps=1.0)  # Large, so that the length of a gradient matters.


@functools.cache
def batches():
  """Tokens and a mask, each `[K * ROWS, LENGTH]`; row r is in microbatch r % K.

  In microbatch i, each position is masked with probability (i + 1) / (K + 1).
  """
  rng = np.random.default_rng(0)
  size = toy_task.STEPS, toy_task.ROWS, toy_task.K, LENGTH
  tokens = 1 + (rng.integers(7, size=(*size[:-1], 1)) + np.arange(LENGTH)) % 7
  tokens[:, :, toy_task.WRONG] += 8
  mask = rng.random(size) < np.linspace(0, 1, toy_task.K + 2)[1:-1, None]
  flat = lambda x: x.reshape(toy_task.STEPS, -1, LENGTH)
  return [*zip(flat(tokens), flat(mask.astype(np.float32)))]


def params():
  rng = np.random.default_rng(1)
  normal = lambda *shape: np.float32(rng.normal(size=shape) / 4)
  return {
    "embedding": normal(VOCABULARY, WIDTH),
    "layer": normal(WIDTH, WIDTH),
    "bias": normal(VOCABULARY),
    "scale": np.float32(1),
  }


def loss(params, tokens, mask):
  inputs = jnp.where(mask > 0, 0, tokens)
  embedded = params["embedding"][inputs]
  neighbors = jnp.roll(embedded, 1, axis=1) + jnp.roll(embedded, -1, axis=1)
  hidden = params["scale"] * jnp.tanh(neighbors @ params["layer"])
  logits = hidden @ params["embedding"].T + params["bias"]
  each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
  return jnp.sum(mask * each) / jnp.sum(mask)


def infer_sharding(shapes):
  """Shards the largest dimension that the number of devices divides."""

  def spec(leaf):
    sizes = [size * (size % toy_task.K == 0) for size in leaf.shape]
    where = int(np.argmax(sizes)) if any(sizes) else None
    return P() if where is None else P(*[None] * where, "data")

  return jax.tree.map(spec, shapes)


def in_turn(x):
  """Splits a batch into `[K, rows, ...]`; microbatch i has the rows i, i + K, ..."""
  return jnp.swapaxes(x.reshape(-1, toy_task.K, *x.shape[1:]), 0, 1)


def train(tau, form, without=frozenset()):
  """The plain form drops the microbatches `without` after the first steps."""
  mesh = jax.make_mesh((toy_task.K,), ("data",), axis_types=(AxisType.Auto,))
  placed = functools.partial(jax.tree.map, lambda spec: NamedSharding(mesh, spec))
  tx = ADAMW
  if tau is not None and form == "value_and_grad":
    tx = gaf_optax.apply_if_nonzero(ADAMW)
  elif tau is not None:
    gaf = gaf_optax.gaf(tau, param_axes="data", num_microbatches=toy_task.K)
    tx = gaf_optax.on_shards(optax.chain(gaf, ADAMW), mesh, infer_sharding)

  @jax.jit
  def step(params, state, i, tokens, mask):
    weights, number = {}, None
    if tau is None:
      dropped = jnp.isin(jnp.arange(len(mask)) % toy_task.K, jnp.array([*without], int))
      kept = jnp.where((i >= toy_task.ALL_STEPS) & dropped[:, None], 0, mask)
      grads = jax.grad(loss)(params, tokens, kept)
      value = loss(params, tokens, mask)
    elif form == "value_and_grad":
      num_valid = lambda tokens, mask: jnp.sum(mask)
      filtered = gaf_optax.value_and_grad(
        loss, toy_task.K, tau(i), microbatch_weights=num_valid
      )
      value, grads, agreement = filtered(params, tokens, mask)
      number = agreement.num_accepted
    else:
      of_each = jax.vmap(jax.value_and_grad(loss), (None, 0, 0))
      values, grads = of_each(params, in_turn(tokens), in_turn(mask))
      num_valid = jnp.sum(in_turn(mask), axis=(1, 2))
      value = num_valid @ values / jnp.sum(num_valid)
      weights["microbatch_weights"] = num_valid
    updates, state = tx.update(grads, state, params, **weights)
    return optax.apply_updates(params, updates), state, value, number

  create = lambda: (params(), tx.init(params()))
  specs = infer_sharding(jax.eval_shape(create))
  own, state = jax.jit(create, out_shardings=placed(specs))()
  losses, accepted = [], []
  for i, batch in enumerate(batches()):
    batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
    own, state, value, number = jax.block_until_ready(step(own, state, i, *batch))
    losses.append(value)
    if tau is not None and form == "stacked":
      number = gaf_optax.metrics(state)["num_accepted"]
    accepted += [] if tau is None else [number]
  # Each device holds an eighth of each matrix and of Adam's moments.
  for tree in own, optax.tree.get(state, "mu"):
    assert tree["layer"].addressable_shards[0].data.size == WIDTH * WIDTH // toy_task.K
  return toy_task.Run(losses, jax.device_get(own), accepted)


@pytest.mark.parametrize("form", ["value_and_grad", "stacked"])
def test_as_the_loss_per_token_and_as_without_the_wrong_tokens(form):
  wanted = train(None, form, without=frozenset(toy_task.WRONG))
  toy_task.assert_trains(functools.partial(train, form=form), wanted)


def test_without_weights_it_is_another_step():
  """The trap: the mean of the microbatches' means is not the mean over the tokens."""
  batch = params(), *batches()[0]
  unweighted = jax.jit(gaf_optax.value_and_grad(loss, toy_task.K, 2.0))(*batch)[1]
  whole = jax.jit(jax.grad(loss))(*batch)
  assert toy_task.relative_difference(unweighted, whole) == pytest.approx(
    0.636, abs=0.005
  )
