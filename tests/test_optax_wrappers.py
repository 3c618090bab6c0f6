"""The filter inside Optax's wrappers, and Optax's queries of its state."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gaf_optax
import known_steps

# Optax's optimizers and schedules mix dtypes.
pytestmark = pytest.mark.usefixtures("standard_promotion")

FORMS = pytest.mark.parametrize("form", known_steps.FORMS)


def test_named_chain_is_the_chain():
  params = known_steps.params()
  inner = optax.sgd(0.1, momentum=0.9)
  named = optax.named_chain(("filter", gaf_optax.gaf(known_steps.TAU)), ("sgd", inner))
  state, plain_state = named.init(params), inner.init(params)
  for i, step in enumerate(known_steps.sequence(("all", "none", "half"))):
    updates, state = named.update(
      known_steps.in_order(step.micro_grads, i), state, params
    )
    expected, plain_state = inner.update(step.mean, plain_state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
  assert isinstance(state["filter"], gaf_optax.GafState)
  assert float(gaf_optax.metrics(state)["num_accepted"]) == 2


@FORMS
def test_partition_decides_for_each_label(form):
  """'w' agrees where 'b' does not; 'nowhere' has no leaf."""
  kind = known_steps.FORMS[form]
  tx = optax.partition(
    {
      "weights": kind.make(optax.sgd(1.0)),
      "biases": kind.make(optax.sgd(2.0)),
      "nowhere": kind.make(optax.sgd(3.0)),
    },
    {"w": "weights", "b": "biases"},
  )
  params = known_steps.params()
  state = tx.init(params)
  before = known_steps.describe(state)
  agreeing, not_agreeing = known_steps.make("half", 1), known_steps.make("none", 2)
  micro_grads = {
    "w": agreeing.micro_grads["w"],
    "b": not_agreeing.micro_grads["b"],
  }
  updates, state = kind.feed(tx, micro_grads, state, params)
  np.testing.assert_array_equal(updates["w"], -agreeing.mean["w"])
  np.testing.assert_array_equal(updates["b"], np.zeros(3))
  chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
  assert known_steps.describe(state) == before
  found = {label: gaf_optax.metrics(part) for label, part in state.inner_states.items()}
  assert float(found["weights"]["num_accepted"]) == 2
  assert bool(found["weights"]["agreed"])
  assert float(found["biases"]["num_accepted"]) == 0
  assert int(found["biases"]["skipped_steps"]) == 1
  assert int(found["nowhere"]["skipped_steps"]) == 0


def two_at(distance):
  """Two unit micro-gradients `[2, 2]` at this distance."""
  cosine = 1 - distance
  return jnp.array([[1.0, 0.0], [cosine, np.sqrt(1 - cosine**2)]])


def test_an_injected_tau_can_be_read_and_changed():
  tx = optax.chain(optax.inject_hyperparams(gaf_optax.gaf)(tau=0.5), optax.sgd(1.0))
  params = jnp.zeros(2)
  state = tx.init(params)
  assert float(optax.tree.get(state, "tau")) == 0.5
  step = jax.jit(tx.update)
  _, state = step(two_at(0.75), state, params)
  assert not gaf_optax.metrics(state)["agreed"]
  state = optax.tree.set(state, tau=jnp.float32(0.875))
  updates, state = step(two_at(0.75), state, params)
  assert gaf_optax.metrics(state)["agreed"]
  assert float(gaf_optax.metrics(state)["threshold"]) == 0.875
  np.testing.assert_allclose(updates, -np.mean(two_at(0.75), axis=0), rtol=1e-6)


def test_an_injected_schedule_of_tau_moves():
  tx = optax.inject_hyperparams(gaf_optax.gaf)(tau=lambda count: 0.25 * (1 + count))
  params = jnp.zeros(2)
  state = tx.init(params)
  used = []
  for _ in range(3):
    _, state = tx.update(two_at(0.6), state, params)
    found = gaf_optax.metrics(state)
    used.append((float(found["threshold"]), bool(found["agreed"])))
  assert used == [(0.25, False), (0.5, False), (0.75, True)]


def test_bfloat16_parameters_and_an_injected_tau_of_its_own_dtype():
  # The distance is 1 - 1 / sqrt(1 + 32.5**2) = 0.96925, between 0.97 and its bfloat16
  # value, 0.96875.
  micro_grads = jnp.array([[1.0, 0.0], [1.0, 32.5]], jnp.bfloat16)
  params = jnp.zeros(2, jnp.bfloat16)
  agreed = {}
  for dtype in (None, jnp.float32):
    tx = optax.inject_hyperparams(gaf_optax.gaf, hyperparam_dtype=dtype)(tau=0.97)
    state = tx.init(params)
    before = known_steps.describe(state)
    updates, state = tx.update(micro_grads, state, params)
    assert updates.dtype == jnp.bfloat16
    assert known_steps.describe(state) == before
    agreed[dtype] = bool(gaf_optax.metrics(state)["agreed"])
  assert agreed == {None: False, jnp.float32: True}


def test_injected_options_that_are_no_hyperparameters_go_through_static_args():
  inject = optax.inject_hyperparams(
    gaf_optax.gaf, static_args=("num_microbatches", "rule", "embed", "groups")
  )
  tx = inject(
    tau=0.9,
    num_microbatches=known_steps.K,
    rule=gaf_optax.rules.most_neighbors(),
    embed=jnp.sign,
    groups=lambda path, leaf: "all",
  )
  params = known_steps.params()
  step = known_steps.make("half", 3)
  mean, state = tx.update(step.micro_grads, tx.init(params), params)
  chex.assert_trees_all_equal(mean, jax.tree.map(jnp.asarray, step.mean))
  assert known_steps.gaf_state(state).accepted.tolist() == [True, False, True, False]


def test_an_injected_number_of_microbatches_says_to_use_static_args():
  tx = optax.inject_hyperparams(gaf_optax.gaf)(tau=0.9, num_microbatches=4)
  with pytest.raises(ValueError, match="num_microbatches.*static_args"):
    tx.init(known_steps.params())


def test_an_injected_anchor_decay_is_used():
  tx = optax.inject_hyperparams(gaf_optax.gaf)(tau=0.9, anchor_decay=0.75)
  state = tx.init(jnp.zeros(2))
  for _ in range(2):
    _, state = tx.update(jnp.array([[4.0, 8.0]]), state)
  # From zero: a quarter of the way, twice.
  np.testing.assert_array_equal(known_steps.gaf_state(state).anchor, [1.75, 3.5])


@pytest.mark.parametrize("factory", ["apply_if_agreed", "multi_steps"])
def test_the_wrapping_forms_take_an_injected_tau(factory):
  fixed = {"every_k_schedule": 2} if factory == "multi_steps" else {}
  inject = optax.inject_hyperparams(getattr(gaf_optax, factory), tuple(fixed))
  tx = inject(optax.sgd(1.0), tau=0.5, **fixed)
  params = jnp.zeros(2)
  state = tx.init(params)
  seen = []
  for tau in (0.5, 0.875):
    state.hyperparams["tau"] = jnp.float32(tau)
    _, state = known_steps.FORMS[factory].feed(tx, two_at(0.75), state, params)
    seen.append(bool(gaf_optax.metrics(state)["agreed"]))
  assert seen == [False, True]


def test_process_skips_its_postprocessor_without_agreement():
  experimental = pytest.importorskip(
    "optax.experimental", reason="optax 0.2.6 has no experimental.aggregating"
  )
  inner = optax.adam(0.1)
  tx = experimental.aggregating.process(
    optax.identity(), gaf_optax.gaf(known_steps.TAU), inner
  )
  params = known_steps.params()
  state, plain_state = tx.init(params), inner.init(params)
  for i, step in enumerate(known_steps.sequence(("all", "none", "lost", "half"))):
    before = state
    updates, state = tx.update(known_steps.in_order(step.micro_grads, i), state, params)
    if step.accepted:
      expected, plain_state = inner.update(step.mean, plain_state)
      chex.assert_trees_all_close(updates, expected, rtol=1e-5)
    else:
      chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
      chex.assert_trees_all_equal(state[2], before[2])
  assert int(optax.tree.get(state, "count")) == 2


def test_process_skips_its_postprocessor_within_a_cycle():
  experimental = pytest.importorskip(
    "optax.experimental", reason="optax 0.2.6 has no experimental.aggregating"
  )
  tx = experimental.aggregating.process(
    optax.identity(),
    gaf_optax.multi_steps(optax.identity(), known_steps.K, known_steps.TAU),
    optax.adam(0.1),
  )
  params = known_steps.params()
  state = tx.init(params)
  for step in known_steps.sequence(("all", "none", "half")):
    _, state = known_steps.FORMS["multi_steps"].feed(
      tx, step.micro_grads, state, params
    )
  assert int(optax.tree.get(state, "count")) == 2


@FORMS
def test_unknown_extra_args_are_ignored(form):
  kind = known_steps.FORMS[form]
  params, step = known_steps.params(), known_steps.make("half", 1)
  tx = kind.make(optax.sgd(1.0))
  updates, _ = kind.feed(
    tx, step.micro_grads, tx.init(params), params, nobody_knows=1, loss=None
  )
  chex.assert_trees_all_equal(updates, jax.tree.map(lambda x: -x, step.mean))


def test_gaf_alone_takes_unknown_extra_args():
  tx = gaf_optax.gaf(known_steps.TAU)
  params, step = known_steps.params(), known_steps.make("half", 1)
  mean, _ = tx.update(
    step.micro_grads, tx.init(params), params, value=1.0, nobody_knows=print
  )
  chex.assert_trees_all_equal(mean, jax.tree.map(jnp.asarray, step.mean))


@FORMS
def test_extra_args_reach_the_inner_optimizer(form):
  kind = known_steps.FORMS[form]
  tx = kind.make(
    optax.chain(
      optax.sgd(1.0),
      optax.contrib.reduce_on_plateau(
        factor=0.5, patience=1, cooldown=0, accumulation_size=1
      ),
    )
  )
  params = known_steps.params()
  state = tx.init(params)
  feed = jax.jit(lambda *args, value: kind.feed(tx, *args, value=value))
  for step in known_steps.sequence(("all",) * 4):  # The loss stays constant.
    updates, state = feed(step.micro_grads, state, params, value=jnp.float32(1.0))
  scale = float(optax.tree.get(state, "scale"))
  assert scale < 1
  chex.assert_trees_all_close(
    updates, jax.tree.map(lambda x: -scale * x, step.mean), rtol=1e-6
  )


@FORMS
def test_a_function_as_extra_arg_reaches_the_inner_optimizer(form):
  def update(updates, state, params, *, rescale, **extra_args):
    del params, extra_args
    return jax.tree.map(rescale, updates), state

  kind = known_steps.FORMS[form]
  tx = kind.make(
    optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
  )
  params, step = known_steps.params(), known_steps.make("half", 1)
  updates, _ = jax.jit(lambda g, s, p: kind.feed(tx, g, s, p, rescale=lambda x: 4 * x))(
    step.micro_grads, tx.init(params), params
  )
  chex.assert_trees_all_equal(updates, jax.tree.map(lambda x: 4 * x, step.mean))


@FORMS
def test_look_ups_by_name_find_one(form):
  kind = known_steps.FORMS[form]
  tx = kind.make(optax.adam(0.1), anchor_decay=0.9, num_microbatches=known_steps.K)
  params = known_steps.params()
  state = tx.init(params)
  step = known_steps.make("half", 1)
  for _ in range(2):
    _, state = kind.feed(tx, step.micro_grads, state, params)
  assert int(optax.tree.get(state, "count")) == 2
  assert bool(optax.tree.get(state, "ready"))
  gaf_state = known_steps.gaf_state(state)
  for name in gaf_optax.GafState._fields:
    value = getattr(gaf_state, name)
    if value is not None:
      chex.assert_trees_all_equal(optax.tree.get(state, name), value)


def test_the_state_of_multi_steps_has_the_attributes_of_optax():
  state = gaf_optax.multi_steps(optax.sgd(1.0), 2).init(jnp.zeros(2))
  for name in optax.MultiStepsState._fields:
    assert hasattr(state, name), name


@pytest.mark.parametrize(
  "state",
  [
    gaf_optax.GafState,
    gaf_optax.ApplyIfAgreedState,
    gaf_optax.MultiStepsState,
  ],
)
def test_no_field_has_the_name_of_an_argument_or_of_a_counter(state):
  taken = {"count"}
  for factory in (gaf_optax.gaf, gaf_optax.apply_if_agreed, gaf_optax.multi_steps):
    taken |= set(inspect.signature(factory).parameters)
  assert not taken & set(state._fields)


@FORMS
def test_tree_map_params_finds_the_parts_like_the_parameters(form):
  kind = known_steps.FORMS[form]
  tx = kind.make(optax.adam(0.1), anchor_decay=0.9)
  params = known_steps.params()
  state = tx.init(params)
  labels = {"w": "sharded", "b": "whole"}
  marked = optax.tree_map_params(
    tx,
    lambda _, label: label,
    state,
    labels,
    transform_non_params=lambda _: "scalar",
  )
  assert known_steps.gaf_state(marked).anchor == labels
  assert known_steps.gaf_state(marked).num_updates == "scalar"
  assert optax.tree.get(marked, "mu") == labels


def test_flatten_around_the_chain_says_to_put_it_inside():
  tx = optax.flatten(optax.chain(gaf_optax.gaf(), optax.sgd(1.0)))
  params, step = known_steps.params(), known_steps.make("all", 1)
  with pytest.raises(ValueError, match="optax.flatten around gaf"):
    tx.update(step.micro_grads, tx.init(params), params)


def test_flatten_inside_the_chain_works():
  tx = optax.chain(gaf_optax.gaf(), optax.flatten(optax.sgd(1.0)))
  params, step = known_steps.params(), known_steps.make("half", 1)
  updates, _ = tx.update(step.micro_grads, tx.init(params), params)
  chex.assert_trees_all_equal(updates, jax.tree.map(lambda x: -x, step.mean))


def test_apply_if_finite_around_the_chain_raises():
  tx = optax.apply_if_finite(
    optax.chain(gaf_optax.gaf(), optax.sgd(1.0)), max_consecutive_errors=2
  )
  params, step = known_steps.params(), known_steps.make("all", 1)
  # Its zero update has the shape of its input, a stack.
  with pytest.raises(TypeError, match="cond"):
    tx.update(step.micro_grads, tx.init(params), params)


def test_apply_if_finite_inside_the_chain_works():
  tx = optax.chain(
    gaf_optax.gaf(), optax.apply_if_finite(optax.sgd(1.0), max_consecutive_errors=2)
  )
  params, step = known_steps.params(), known_steps.make("bad", 1)
  updates, state = tx.update(step.micro_grads, tx.init(params), params)
  chex.assert_trees_all_equal(updates, jax.tree.map(lambda x: -x, step.mean))
  assert int(gaf_optax.metrics(state)["nonfinite"]) == 1


def test_optax_multi_steps_around_the_chain_raises():
  tx = optax.MultiSteps(
    optax.chain(gaf_optax.gaf(), optax.sgd(1.0)), every_k_schedule=2
  ).gradient_transformation()
  params, step = known_steps.params(), known_steps.make("all", 1)
  with pytest.raises((TypeError, ValueError)):
    tx.update(step.micro_grads, tx.init(params), params)
