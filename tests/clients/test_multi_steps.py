"""Code that reads the state of optax.MultiSteps runs over multi_steps as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gaf_optax
from clients import task

SCHEDULES = {
  "int": task.K,
  "function": lambda gradient_step: jnp.where(gradient_step < 4, 2, 4),
}


def log_of(make, every_k, transformation=False):
  """Trains on one microbatch after the other, and what is read on the way."""
  tx = make(every_k)
  update = (tx.gradient_transformation() if transformation else tx).update

  @jax.jit
  def step(params, state, x, y):
    grads = jax.grad(task.loss)(params, x, y)
    updates, state = update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params = task.params()
  state = tx.init(params)
  log = []
  for batch in task.batches()[:2]:
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
  return optax.MultiSteps(task.ADAM, every_k)


@pytest.mark.parametrize(
  "schedule, transformation", [("int", True), ("function", False)]
)
def test_accepting_all_is_the_mean(schedule, transformation):
  every_k = SCHEDULES[schedule]
  ours = lambda every_k: gaf_optax.multi_steps(task.ADAM, every_k, 2.0)
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
  ours = lambda every_k: gaf_optax.multi_steps(task.ADAM, every_k, task.TAU)
  log = log_of(ours, every_k)
  # The same cycles, each a stack.
  tx = gaf_optax.apply_if_agreed(task.ADAM, task.TAU)
  params = task.params()
  state = tx.init(params)
  step = task.stacked_step(tx)
  x, y = (np.concatenate(a) for a in zip(*task.batches()[:2]))
  start = cycle = 0
  shares = set()
  while start < len(log):
    k = every_k if schedule == "int" else int(every_k(cycle))
    # In the order of arrival: a stack's sequence starts one further at each step.
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
  # Some are rejected, and not all; in cycles of two, once none agree.
  assert any(0 < share < 1 for share in shares) and (0 in shares) == (schedule != "int")
