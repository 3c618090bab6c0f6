"""Flax NNX: nnx.Optimizer over the model's parameters, streamed and stacked."""

import functools
import warnings

import jax
import jax.numpy as jnp
import pytest

import gaf_optax
from clients import toy_task

with warnings.catch_warnings():
  # The oldest supported Flax uses a name that the oldest supported JAX deprecates.
  warnings.simplefilter("ignore", DeprecationWarning)
  from flax import nnx


class Network(nnx.Module):
  def __init__(self, rngs):
    self.hidden = nnx.Linear(toy_task.FEATURES, toy_task.HIDDEN, rngs=rngs)
    self.out = nnx.Linear(toy_task.HIDDEN, 1, rngs=rngs)

  def __call__(self, x):
    return self.out(nnx.tanh(self.hidden(x)))


def loss_fn(model, x, y):
  return jnp.mean((model(x) - y) ** 2)


def functional(model):
  """The loss as a function of a model's parameters, and these parameters."""
  graph, params, rest = nnx.split(model, nnx.Param, ...)

  def loss(params, x, y):
    # A copy, since the model's variables belong to the trace outside of vmap or scan.
    return loss_fn(nnx.merge(graph, params, rest, copy=True), x, y)

  return loss, params


def train(tau, form):
  model = Network(nnx.Rngs(0))
  tx = toy_task.ADAM
  if tau is not None and form == "value_and_grad":
    tx = gaf_optax.apply_if_nonzero(toy_task.ADAM)
  elif tau is not None:
    tx = gaf_optax.apply_if_agreed(toy_task.ADAM, tau)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  @nnx.jit
  def train_step(model, optimizer, x, y):
    loss, params = functional(model)
    if tau is None:
      value, grads = nnx.value_and_grad(loss_fn)(model, x, y)
      number = None
    elif form == "value_and_grad":
      now = tau(optimizer.step[...])
      filtered = gaf_optax.value_and_grad(loss, toy_task.K, now)
      value, grads, agreement = filtered(params, x, y)
      number = agreement.num_accepted
    else:
      each = jax.vmap(jax.value_and_grad(loss), (None, 0, 0))
      value, grads = each(params, x, y)
      number = None
    optimizer.update(model, grads)
    return jnp.mean(value), number

  losses, accepted = [], []
  for batch in toy_task.batches():
    if tau is None or form == "value_and_grad":
      batch = toy_task.interleaved(batch)
    value, number = train_step(model, optimizer, *batch)
    losses.append(value)
    if tau is not None and form == "stacked":
      number = gaf_optax.metrics(optimizer.opt_state)["num_accepted"]
    accepted += [] if tau is None else [number]
  return toy_task.Run(losses, nnx.state(model, nnx.Param), accepted)


@pytest.mark.parametrize("form", ["value_and_grad", "stacked"])
def test_as_the_mean_and_as_stacked_on_one_device(form):
  wanted = toy_task.stacked(*functional(Network(nnx.Rngs(0))), toy_task.ADAM)
  toy_task.assert_trains(functools.partial(train, form=form), wanted)


def test_metrics_are_read_inside_jit():
  """Here the leaves of the optimizer's state are variables that hold tracers."""
  model = Network(nnx.Rngs(0))
  optimizer = nnx.Optimizer(
    model, gaf_optax.apply_if_agreed(toy_task.ADAM), wrt=nnx.Param
  )
  x, y = toy_task.batches()[0]

  @nnx.jit
  def train_step(model, optimizer):
    loss, params = functional(model)
    grads = jax.vmap(jax.grad(loss), (None, 0, 0))(params, x, y)
    optimizer.update(model, grads)
    return gaf_optax.metrics(optimizer.opt_state)["num_accepted"]

  assert float(train_step(model, optimizer)) == toy_task.K - len(toy_task.WRONG)
