"""Code that reads the state of optax.MultiSteps also works with multi_steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gaf_optax
from clients import toy_task

SCHEDULES = {
  "int": toy_task.K,
  "function": lambda gradient_step: jnp.where(gradient_step < 4, 2, 4),
}


def log_of(make, every_k, transformation=False):
  """Trains on one microbatch at a time; returns the values that such code reads."""
  tx = make(every_k)
  update = (tx.gradient_transformation() if transformation else tx).update

  @jax.jit
  def step(params, state, x, y):
    grads = jax.grad(toy_task.loss)(params, x, y)
    updates, state = update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params = toy_task.params()
  state = tx.init(params)
  log = []
  for batch in toy_task.batches()[:2]:
    for x, y in zip(*batch):
      params, state = step(params, state, x, y)
      read = {
        "mini_step": int(state.mini_step),
        "gradient_step": int(state.gradient_step),
        "has_updated": bool(tx.has_updated(state)),
      }
      arrays = params, state.inner_opt_state, state.acc_grads
      log.append((read, jax.tree.map(np.asarray, arrays)))
  return log


def plain(every_k):
  return optax.MultiSteps(toy_task.ADAM, every_k)


@pytest.mark.parametrize(
  "schedule, transformation", [("int", True), ("function", False)]
)
def test_accepting_all_is_the_mean(schedule, transformation):
  every_k = SCHEDULES[schedule]
  ours = lambda every_k: gaf_optax.multi_steps(toy_task.ADAM, every_k, 2.0)
  logs = [log_of(make, every_k, transformation) for make in (plain, ours)]
  for (read, arrays), (wanted_read, wanted) in zip(*reversed(logs)):
    assert read == wanted_read
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      arrays,
      wanted,
    )
  assert any(read["has_updated"] for read, _ in logs[0])
  assert max(read["gradient_step"] for read, _ in logs[0]) >= 2


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_as_stacked_on_one_device(schedule):
  every_k = SCHEDULES[schedule]
  ours = lambda every_k: gaf_optax.multi_steps(toy_task.ADAM, every_k, toy_task.TAU)
  log = log_of(ours, every_k)
  # The same cycles as stacks.
  tx = gaf_optax.apply_if_agreed(toy_task.ADAM, toy_task.TAU)
  params = toy_task.params()
  state = tx.init(params)
  step = toy_task.stacked_step(tx)
  x, y = (np.concatenate(a) for a in zip(*toy_task.batches()[:2]))
  start = cycle = 0
  shares = set()
  while start < len(log):
    k = every_k if schedule == "int" else int(every_k(cycle))
    # In order of arrival: each step starts the stack's sequence one place further on.
    rows = np.roll(np.arange(start, start + k), cycle)
    params, state, _ = step(params, state, x[rows], y[rows])
    start, cycle = start + k, cycle + 1
    found = gaf_optax.metrics(state)
    shares.add(float(found["num_accepted"] / k))
    read, (own_params, inner_state, _) = log[start - 1]
    assert read == {
      "mini_step": 0,
      "gradient_step": cycle,
      "has_updated": bool(found["agreed"]),
    }
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      (own_params, inner_state),
      (params, state.inner_state),
    )
  # Some are rejected, but not all; in cycles of two, sometimes none agree.
  assert any(0 < share < 1 for share in shares) and (0 in shares) == (schedule != "int")
