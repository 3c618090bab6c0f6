"""Lookahead, L-BFGS with its line search, and schedule-free training."""

import functools

import jax
import numpy as np
import optax
import pytest

import gaf_optax
from clients import toy_task

lookahead = functools.partial(optax.lookahead, sync_period=2, slow_step_size=0.5)
SCHEDULE_FREE = optax.contrib.schedule_free(optax.sgd(0.1), 0.1)
LBFGS = optax.lbfgs(memory_size=3)
EQUAL = np.full(toy_task.K, np.float32(1 / toy_task.K))


def mean_loss(weights, x, y):
  """The weighted mean loss of the microbatches, as a function of the parameters."""
  return lambda params: weights @ jax.vmap(toy_task.loss, (None, 0, 0))(params, x, y)


def with_lookahead(filtered):
  """Lookahead wraps the chain; gradients are computed at the fast parameters."""
  tx = lookahead(toy_task.SGD)
  if filtered:
    tx = lookahead(optax.chain(gaf_optax.gaf(toy_task.tau), toy_task.SGD))

  @jax.jit
  def step(params, state, i, weights, x, y):
    value = mean_loss(EQUAL, x, y)(params.fast)
    if filtered:
      grads = jax.vmap(jax.grad(toy_task.loss), (None, 0, 0))(params.fast, x, y)
    else:
      grads = jax.grad(mean_loss(weights, x, y))(params.fast)
    updates, state = tx.update(grads, state, params)
    number = gaf_optax.metrics(state)["num_accepted"] if filtered else None
    return optax.apply_updates(params, updates), state, value, number

  return tx, optax.LookaheadParams.init_synced(toy_task.params()), step


def on_a_batch(inner, search_on, filtered):
  tx = gaf_optax.apply_if_nonzero(inner) if filtered else inner

  @jax.jit
  def step(params, state, i, weights, x, y):
    if filtered:
      of_batch = gaf_optax.value_and_grad(toy_task.loss, toy_task.K, toy_task.tau(i))
      rows = [a.swapaxes(0, 1).reshape(-1, a.shape[-1]) for a in (x, y)]
      value, grads, agreement = of_batch(params, *rows)
      weights, number = agreement.weights, agreement.num_accepted
    else:
      value, number = mean_loss(EQUAL, x, y)(params), None
      grads = jax.grad(mean_loss(weights, x, y))(params)
    searched = {}
    if search_on is not None:
      own = mean_loss(weights if search_on == "accepted" else EQUAL, x, y)
      searched = dict(value=own(params), grad=grads, value_fn=own)
    updates, state = tx.update(grads, state, params, **searched)
    return optax.apply_updates(params, updates), state, value, number

  return tx, toy_task.params(), step


step_size = lambda state, params: optax.tree.get(state, "learning_rate")
# Maps each form to a function that makes its step, and one more value to compare.
FORMS = {
  "lookahead": (with_lookahead, lambda state, params: params.slow),
  "lbfgs": (functools.partial(on_a_batch, LBFGS, "accepted"), step_size),
  "lbfgs_on_the_whole": (functools.partial(on_a_batch, LBFGS, "whole"), step_size),
  "schedule_free": (
    functools.partial(on_a_batch, SCHEDULE_FREE, None),
    optax.contrib.schedule_free_eval_params,
  ),
}


@functools.cache
def made(form, filtered):
  return FORMS[form][0](filtered)


def run(form, tau=None, without=()):
  """The plain form drops the microbatches `without` after the first steps."""
  tx, params, step = made(form, tau is not None)
  state, losses, accepted, others = tx.init(params), [], [], []
  for i, batch in enumerate(toy_task.batches()):
    dropped = np.isin(np.arange(toy_task.K), without) & (i >= toy_task.ALL_STEPS)
    weights = np.float32(~dropped / np.sum(~dropped))
    params, state, value, number = step(params, state, i, weights, *batch)
    losses.append(value)
    accepted += [] if tau is None else [number]
    others.append(FORMS[form][1](getattr(state, "inner_state", state), params))
  return toy_task.Run(losses, (params, others), accepted)


@pytest.mark.parametrize("form", ["lookahead", "lbfgs", "schedule_free"])
def test_as_the_mean_and_as_without_the_wrong(form):
  train = functools.partial(run, form)
  toy_task.assert_trains(train, train(without=toy_task.WRONG))


def test_a_search_on_the_whole_batch_finds_no_step():
  """The trap: the direction only lowers the loss of the accepted microbatches."""
  _, sizes = run("lbfgs_on_the_whole", toy_task.tau).params
  assert sizes[0] == 1 and sizes[toy_task.ALL_STEPS] < 1e-3
