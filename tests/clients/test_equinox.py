"""As in Equinox, a model is a pytree, and gradients of non-array leaves are None."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gaf_optax
from clients import toy_task


def module(*static):
  """A dataclass that is a pytree, with these static fields."""

  def register(cls):
    cls = dataclasses.dataclass(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.name not in static]
    return jax.tree_util.register_dataclass(
      cls, data_fields=names, meta_fields=list(static)
    )

  return register


@module("name")
class Linear:
  kernel: jax.Array
  bias: jax.Array | None
  name: str


@module()
class Network:
  hidden: Linear
  out: Linear
  activation: Callable  # A leaf, as in eqx.nn.MLP.
  version: jax.Array  # Integers, which are not trained.

  def __call__(self, x):
    hidden = self.activation(x @ self.hidden.kernel + self.hidden.bias)
    return hidden @ self.out.kernel


def network():
  params = toy_task.params()
  return Network(
    Linear(**params["hidden"], name="hidden"),
    Linear(params["out"]["kernel"], None, "out"),
    jnp.tanh,
    jnp.arange(3),
  )


def is_inexact(leaf):
  return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def partition(tree):
  """The trained leaves and the others, each with None in place of the rest."""
  pick = lambda keep: jax.tree.map(lambda x: x if is_inexact(x) == keep else None, tree)
  return pick(True), pick(False)


def combine(params, static):
  is_none = lambda leaf: leaf is None
  choose = lambda a, b: b if a is None else a
  return jax.tree.map(choose, params, static, is_leaf=is_none)


def loss(model, x, y):
  return jnp.mean((model(x) - y) ** 2)


def train(tau):
  model = network()
  tx = toy_task.ADAM if tau is None else optax.chain(gaf_optax.gaf(tau), toy_task.ADAM)

  # As eqx.filter_jit, filter_vmap, filter_value_and_grad and apply_updates do.
  params, static = partition(model)

  @jax.jit
  def step(params, state, x, y):
    of_params = lambda params, x, y: loss(combine(params, static), x, y)
    if tau is None:
      value, grads = jax.value_and_grad(of_params)(params, x, y)
    else:
      each = jax.vmap(jax.value_and_grad(of_params), (None, 0, 0))
      value, grads = each(params, x, y)
    assert grads.activation is grads.version is grads.out.bias is None
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, jnp.mean(value)

  state, losses, accepted = tx.init(params), [], []
  for batch in toy_task.batches():
    batch = toy_task.whole(batch) if tau is None else batch
    params, state, value = step(params, state, *batch)
    losses.append(value)
    if tau is not None:
      accepted.append(gaf_optax.metrics(state)["num_accepted"])
  trained = combine(params, static)
  assert trained.activation is jnp.tanh and trained.hidden.name == "hidden"
  np.testing.assert_array_equal(trained.version, jnp.arange(3))
  return toy_task.Run(losses, params, accepted)


def wanted():
  """The stacked form on a list of the trained arrays."""
  params, static = partition(network())
  leaves, treedef = jax.tree.flatten(params)
  of_leaves = lambda p, x, y: loss(combine(treedef.unflatten(p), static), x, y)
  run = toy_task.stacked(of_leaves, leaves, toy_task.ADAM)
  return run._replace(params=treedef.unflatten(run.params))


def test_as_the_mean_and_as_stacked_on_one_device():
  toy_task.assert_trains(train, wanted())


def test_equinox_itself():
  eqx = pytest.importorskip("equinox")

  def train(tau):
    model = eqx.nn.MLP(
      toy_task.FEATURES,
      1,
      toy_task.HIDDEN,
      1,
      activation=jnp.tanh,
      key=jax.random.key(0),
    )
    tx = (
      toy_task.ADAM if tau is None else optax.chain(gaf_optax.gaf(tau), toy_task.ADAM)
    )
    loss = lambda model, x, y: jnp.mean((jax.vmap(model)(x) - y) ** 2)

    @eqx.filter_jit
    def step(model, state, x, y):
      if tau is None:
        value, grads = eqx.filter_value_and_grad(loss)(model, x, y)
      else:
        each = eqx.filter_vmap(eqx.filter_value_and_grad(loss), in_axes=(None, 0, 0))
        value, grads = each(model, x, y)
      params = eqx.filter(model, eqx.is_inexact_array)
      updates, state = tx.update(grads, state, params)
      return eqx.apply_updates(model, updates), state, jnp.mean(value)

    state, losses, accepted = tx.init(eqx.filter(model, eqx.is_array)), [], []
    for batch in toy_task.batches():
      batch = toy_task.whole(batch) if tau is None else batch
      model, state, value = step(model, state, *batch)
      losses.append(value)
      if tau is not None:
        accepted.append(gaf_optax.metrics(state)["num_accepted"])
    return toy_task.Run(losses, eqx.filter(model, eqx.is_array), accepted)

  toy_task.assert_trains(train)
