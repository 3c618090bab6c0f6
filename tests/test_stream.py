"""The streamed forms: cycles, memory, splitting of batches, and skipped steps."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gaf_optax
import known_steps
import reference_forms
from gaf_optax import rules


def feed(update, state, micro_grads, params=None):
  """Feeds a streamed transformation; returns the updates and the final state."""
  emitted = []
  for g in micro_grads:
    updates, state = update(g, state, params)
    emitted.append(np.asarray(updates))
  return emitted, state


@pytest.mark.usefixtures("standard_promotion")
class TestMultiSteps:
  def test_is_apply_if_agreed_on_the_stack(self):
    """With and without agreement, the weights and the inner state are the same."""
    k, params = 3, jnp.ones(4)
    inner = optax.adamw(0.1)
    streamed = gaf_optax.multi_steps(inner, k, 0.6, num_microbatches=k)
    stacked = gaf_optax.apply_if_agreed(inner, 0.6, num_microbatches=k)
    a, b = streamed.init(params), stacked.init(params)
    agreed = []
    feed_one, update = jax.jit(streamed.update), jax.jit(stacked.update)
    for cycle in range(8):
      stack = jnp.asarray(known_steps.draw(cycle, k, 4, common=0.5), jnp.float32)
      emitted, a = feed(feed_one, a, stack, params)
      # Each update starts the sequence of the stack one place further on.
      updates, b = update(jnp.roll(stack, cycle, axis=0), b, params)
      np.testing.assert_allclose(emitted[-1], updates, rtol=1e-5, atol=1e-7)
      assert not np.any(emitted[:-1])
      agreed.append(bool(b.gaf_state.ready))
      chex.assert_trees_all_close(
        a.inner_opt_state, b.inner_state, rtol=1e-5, atol=1e-7
      )
      chex.assert_trees_all_equal_shapes_and_dtypes(a.gaf_state, b.gaf_state)
      # Streamed forms compare no pairs, so they have no noise scale.
      assert a.gaf_state.noise_scale == -1 and b.gaf_state.noise_scale > 0
      known = b.gaf_state._replace(
        noise_scale=a.gaf_state.noise_scale,
        accept_rates=a.gaf_state.accept_rates,  # In another order.
        **{
          name: jnp.roll(getattr(b.gaf_state, name), -cycle)
          for name in ("distances", "accepted", "weights")
        },
      )
      chex.assert_trees_all_close(a.gaf_state, known, atol=1e-5)
    assert 0 < sum(agreed) < 8, "the cases decide nothing"

  def test_rejected_ones_use_up_their_slots(self):
    tx = gaf_optax.multi_steps(optax.sgd(1.0), 3, 0.5)
    e = np.eye(2, dtype=np.float32)
    rows = [e[0], e[1], e[0], e[1], e[1], e[0]]
    emitted, state = feed(jax.jit(tx.update), tx.init(jnp.zeros(2)), rows)
    np.testing.assert_array_equal(
      emitted, [[0, 0], [0, 0], [-1, 0], [0, 0], [0, 0], [0, -1]]
    )
    assert int(state.gaf_state.num_updates) == 2

  def test_mini_step_and_metrics_speak_of_the_last_finished_cycle(self):
    tx = gaf_optax.multi_steps(optax.sgd(1.0), 2, 0.5)
    state = tx.init(jnp.zeros(2))
    one, update = jnp.array([1.0, 0.0]), jax.jit(tx.update)
    _, state = feed(update, state, [one])
    assert int(state.mini_step) == 1
    assert int(gaf_optax.metrics(state)["num_microbatches"]) == 0
    _, state = feed(update, state, [one])
    assert int(state.mini_step) == 0
    assert int(gaf_optax.metrics(state)["num_microbatches"]) == 2
    assert bool(gaf_optax.metrics(state)["agreed"])
    _, state = feed(update, state, [-one])
    assert bool(gaf_optax.metrics(state)["agreed"])

  def test_every_k_as_a_function_of_the_cycle(self):
    tx = gaf_optax.multi_steps(optax.sgd(1.0), lambda cycle: 2 + cycle, 0.97)
    state, rows = tx.init(jnp.zeros(1)), jnp.ones((9, 1))
    emitted, state = feed(jax.jit(tx.update), state, rows)
    assert [bool(e.any()) for e in emitted] == [n in (1, 4, 8) for n in range(9)]
    with pytest.raises(ValueError, match="every_k_schedule must be an int"):
      gaf_optax.multi_steps(optax.sgd(1.0), lambda c: 2, num_microbatches=2)

  def test_schedule_counts_cycles(self):
    tx = gaf_optax.multi_steps(
      optax.sgd(1.0), 2, optax.piecewise_constant_schedule(0.1, {2: 10.0})
    )
    state, update, seen = tx.init(jnp.zeros(1)), jax.jit(tx.update), []
    for _ in range(6):
      _, state = feed(update, state, jnp.ones((1, 1)))
      seen.append(float(gaf_optax.metrics(state)["threshold"]))
    np.testing.assert_allclose(seen, [0.1, 0.1, 0.1, 0.1, 0.1, 1.0])

  def test_stacked_micro_gradients_are_refused(self):
    tx = gaf_optax.multi_steps(optax.sgd(1.0), 2)
    params = {"w": jnp.zeros(3)}
    for known in (params, None):
      with pytest.raises(ValueError, match=r"\['w'\].*\(2, 3\).*stack"):
        tx.update({"w": jnp.ones((2, 3))}, tx.init(params), known)

  def test_dtypes_of_updates_are_those_of_the_inner_transformation(self):
    params = {"a": jnp.zeros(3, jnp.bfloat16), "b": jnp.zeros(2)}
    tx = gaf_optax.multi_steps(optax.sgd(0.1, momentum=0.9), 2)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(2):
      grads = jax.tree.map(jnp.ones_like, params)
      updates, new_state = update(grads, state, params)
      chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
      chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
      state = new_state


@pytest.mark.usefixtures("standard_promotion")
class TestValueAndGrad:
  @staticmethod
  def loss(params, x, y, scale=1.0):
    hidden = jnp.tanh(x @ params["w"])
    return scale * jnp.mean((hidden @ params["v"] - y) ** 2)

  def case(self, n=12):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((n, 3)), jnp.float32)
    y = jnp.asarray(rng.standard_normal(n), jnp.float32)
    params = {
      "w": jnp.asarray(rng.standard_normal((3, 5)), jnp.float32),
      "v": jnp.asarray(rng.standard_normal(5), jnp.float32),
    }
    return params, x, y

  def test_is_gaf_of_vmapped_gradients_of_every_fourth_row(self):
    rule = rules.running_average()
    params, x, y = self.case()
    split = lambda a: jnp.stack([a[i::4] for i in range(4)])
    micro = jax.vmap(jax.value_and_grad(self.loss), (None, 0, 0))
    values, grads = micro(params, split(x), split(y))
    tx = gaf_optax.gaf(0.5, rule=rule, num_microbatches=4)
    want, state = tx.update(grads, tx.init(params), params)
    filtered = gaf_optax.value_and_grad(
      self.loss, 4, 0.5, batch_argnums=(1, 2), rule=rule
    )
    value, got, agreement = jax.jit(filtered)(params, x, y)
    np.testing.assert_allclose(value, values.mean(), rtol=1e-6)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, params)
    assert 2 <= int(agreement.num_accepted) < 4, "the case decides nothing"
    assert float(agreement.num_accepted) == state.accepted.sum()
    np.testing.assert_allclose(agreement.distances, state.distances, atol=1e-6)

  def test_arrays_by_keyword_and_keys_are_split_too(self):
    """With and without `compare`; each microbatch has a different key."""
    params, x, y = self.case()
    shift = jnp.arange(12.0)

    def loss(params, x, y, *, shift, key, scale):
      return self.loss(params, x, y + shift["s"], scale), (
        shift["s"],
        jax.random.key_data(key),
      )

    for options in ({}, {"compare": lambda path, leaf: path[0].key == "v"}):
      run = jax.jit(
        gaf_optax.value_and_grad(loss, 4, 2.0, has_aux=True, **options),
        static_argnames="scale",
      )
      (value, (shifts, keys)), grads, _ = run(
        params, x, y, shift={"s": shift}, key=jax.random.key(3), scale=2.0
      )
      whole = functools.partial(self.loss, scale=2.0)
      want_value, want = jax.value_and_grad(whole)(params, x, y + shift)
      np.testing.assert_allclose(value, want_value, rtol=1e-5)
      chex.assert_trees_all_close(grads, want, rtol=1e-4, atol=1e-5)
      np.testing.assert_array_equal(shifts, [shift[i::4] for i in range(4)])
      split = jax.random.split(jax.random.key(3), 4)
      np.testing.assert_array_equal(keys, jax.random.key_data(split))
    wrong = {"shift": {"s": jnp.ones(5)}, "key": jax.random.key(3), "scale": 1.0}
    with pytest.raises(ValueError, match="has shape .*close over it"):
      run(params, x, y, **wrong)

  def test_aux_keywords_and_tuples_of_arguments(self):
    params, x, y = self.case()

    def loss(w, batch, v, *, scale):
      x, y = batch
      value = self.loss({"w": w, "v": v}, x, y, scale)
      return value, {"rows": x.shape[0], "first": y[0]}

    filtered = gaf_optax.value_and_grad(
      loss, 2, 2.0, argnums=(0, 2), batch_argnums=1, has_aux=True
    )
    (value, aux), (dw, dv), agreement = filtered(
      params["w"], (x, y), params["v"], scale=3.0
    )
    whole = jax.value_and_grad(functools.partial(self.loss, scale=3.0))
    want_value, want = whole(params, x, y)
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    np.testing.assert_allclose(dw, want["w"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dv, want["v"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(aux["first"], [y[0], y[1]])
    assert aux["rows"].shape == (2,)
    assert agreement.distances.shape == (2,) and bool(agreement.agreed)

  def test_traced_tau(self):
    params, x, y = self.case()

    @jax.jit
    def accepted(tau):
      filtered = gaf_optax.value_and_grad(self.loss, 4, tau, batch_argnums=(1, 2))
      return filtered(params, x, y)[2].num_accepted

    assert float(accepted(2.0)) == 4
    assert float(accepted(1e-6)) == 0

  def test_skipping_as_the_guide_shows(self):
    params, x, y = self.case()
    tx = optax.conditionally_transform(
      optax.adam(0.1),
      lambda step, agreed, **_: agreed,
      forward_extra_args=True,
    )
    state = tx.init(params)
    for tau, count in ((1e-6, 0), (2.0, 1), (1e-6, 1)):
      filtered = gaf_optax.value_and_grad(self.loss, 4, tau, batch_argnums=(1, 2))
      _, grads, agreement = filtered(params, x, y)
      updates, state = tx.update(grads, state, params, agreed=agreement.agreed)
      assert int(optax.tree.get(state, "count")) == count
      assert any(np.any(u) for u in jax.tree.leaves(updates)) == bool(agreement.agreed)

  def test_errors(self):
    params, x, y = self.case()
    filtered = gaf_optax.value_and_grad(self.loss, 5, batch_argnums=(1, 2))
    with pytest.raises(ValueError, match=r"argument 1 has shape \(12, 3\).* 5 micro"):
      filtered(params, x, y)
    filtered = gaf_optax.value_and_grad(self.loss, 2)
    with pytest.raises(
      ValueError, match="argument 2 has shape .*argument 1 has 12 rows"
    ):
      filtered(params, x, y[:6])
    with pytest.raises(ValueError, match="Is it a PRNG key"):
      gaf_optax.value_and_grad(self.loss, 4)(params, jax.random.PRNGKey(0), y)
    with pytest.raises(ValueError, match=r"shape \(\).* name the batch in batch_arg"):
      gaf_optax.value_and_grad(self.loss, 2)(params, 0.5, x, y)
    for batch in ((jax.random.PRNGKey(0), y), (y, jax.random.PRNGKey(0))):
      with pytest.raises(ValueError, match="rows. Is it a PRNG key"):
        gaf_optax.value_and_grad(self.loss, 2)(params, *batch)
    with pytest.raises(ValueError, match="argument 1 is named in argnums and"):
      gaf_optax.value_and_grad(self.loss, 2, argnums=1, batch_argnums=1)
    with pytest.raises(ValueError, match="argument 0 is named in argnums and"):
      gaf_optax.value_and_grad(self.loss, 2, batch_argnums=(-3, 1))(params, x, y)
    with pytest.raises(ValueError, match="argnums names argument 0, but there are 0"):
      gaf_optax.value_and_grad(self.loss, 2)(params=params, x=x, y=y)
    with pytest.raises(ValueError, match="batch_argnums names argument 3"):
      gaf_optax.value_and_grad(self.loss, 2, batch_argnums=3)(params, x, y)
    with pytest.raises(ValueError, match="schedule"):
      gaf_optax.value_and_grad(self.loss, 2, lambda step: 0.9)
    with pytest.raises(ValueError, match="there is no state to hold the average"):
      gaf_optax.value_and_grad(self.loss, 2, anchor_decay=0.9)
    with pytest.raises(ValueError, match="batch_argnums must be an int"):
      gaf_optax.value_and_grad(self.loss, 2, batch_argnums="x")


@pytest.mark.usefixtures("compiled_as_users_do")
class TestMemory:
  """The compiled program has one running sum for any k."""

  def test_value_and_grad(self):
    params = {"a": jnp.zeros((256, 512)), "b": jnp.zeros((512, 256))}
    loss = lambda p, x: jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"]) ** 2)

    def temporary(k):
      filtered = gaf_optax.value_and_grad(loss, k)
      compiled = jax.jit(filtered).lower(params, jnp.zeros((4 * k, 256))).compile()
      return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(32) <= 1.25 * temporary(4)

  def test_multi_steps_state_and_program_do_not_grow(self):
    params = {"a": jnp.zeros((256, 512)), "b": jnp.zeros((512, 256))}

    def state_and_program(k):
      tx = gaf_optax.multi_steps(optax.sgd(0.1), k)
      state = tx.init(params)
      text = jax.jit(tx.update).lower(params, state, params).as_text()
      return known_steps.describe(state), text.replace(
        f"dense<{k}> : tensor<i32>", "dense<k>"
      )

    assert state_and_program(32) == state_and_program(29)


def test_bf16_running_mean_is_kept_in_float32():
  """63 times the next number above 1, which a sum in bfloat16 would lose."""
  stack = jnp.full((64, 3), 1 + 2**-7).astype(jnp.bfloat16).at[0].set(1)
  gradient = reference_forms.streamed({"w": stack}, 0.97).gradient["w"]
  np.testing.assert_array_equal(np.asarray(gradient, np.float32), 1 + 2**-7)
