"""Shardings, dtypes and JAX checks that have troubled users of other training codes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import device_mappings
import gaf_optax
import known_steps
import oracle
import reference_forms
from gaf_optax import rules

TAU = 0.8


def placed(tree, specs):
  """Shards a tree over a mesh of Auto axes."""
  mesh = device_mappings.mesh()
  put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  return {name: put(x, specs[name]) for name, x in tree.items()}


class TestShardedGradients:
  """Auto axes, which do not appear in types, under plain jit."""

  K = device_mappings.N
  SHAPES = {"a": (3, 5), "b": (16, 5), "c": (3, 16), "d": (7,), "e": (40, 2)}
  SPECS = {"a": P(), "b": P("data"), "c": P(None, "data"), "d": P(), "e": P("data")}

  def test_stacks(self):
    """Sharded along every axis, including the leading one."""
    plain = device_mappings.stack(self.K, self.SHAPES)
    specs = {name: P(None, *spec) for name, spec in self.SPECS.items()}
    tree = placed(plain, specs | {"a": P("data"), "e": P("data")})
    options = {
      "plain": {},
      "leaf": dict(groups="leaf", anchor_decay=0.5),
      "memory": dict(memory_decay=0.9, rule=rules.leave_one_out()),
      "embed": dict(embed=jnp.sign),
    }

    @jax.jit
    def run(tree):
      params, results = device_mappings.params_of(tree), {}
      for name, own in options.items():
        tx = gaf_optax.gaf(TAU, num_microbatches=self.K, **own)
        results[name] = tx.update(tree, tx.init(params), params)
      return results

    found, leaves = run(tree), list(plain.values())
    expected = {
      "plain": oracle.gaf(leaves, TAU),
      "memory": oracle.gaf(oracle_units(leaves), TAU, "leave_one_out"),
      "embed": oracle.gaf(leaves, TAU, embed=np.sign),
    }
    for name, want in expected.items():
      gradient, state = found[name]
      assert want.margin > 1e-4
      distances = reference_forms.compared(state.distances)
      np.testing.assert_allclose(distances, want.distances, atol=1e-5)
      for leaf, x in plain.items():
        value = np.tensordot(want.weights, x.astype(np.float64), axes=1)
        np.testing.assert_allclose(gradient[leaf], value, atol=2e-6)
    gradient, state = found["leaf"]  # The first step accepts all.
    for leaf, x in plain.items():
      np.testing.assert_allclose(gradient[leaf], x.mean(0), atol=2e-6)
      np.testing.assert_allclose(state.anchor[leaf], x.mean(0) / 2, atol=2e-6)

  def test_one_at_a_time(self):
    k = 3
    plain = device_mappings.stack(k, self.SHAPES, 1)
    tx = gaf_optax.multi_steps(optax.sgd(1.0), k, TAU, num_microbatches=k)
    params = placed(
      {n: np.zeros(x.shape[1:], x.dtype) for n, x in plain.items()}, self.SPECS
    )
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(k):
      row = placed({name: x[i] for name, x in plain.items()}, self.SPECS)
      updates, state = jax.block_until_ready(update(row, state, params))
    want = oracle.gaf(list(plain.values()), TAU)
    distances = reference_forms.compared(state.gaf_state.distances)
    np.testing.assert_allclose(distances, want.distances, atol=1e-5)
    for leaf, value in zip(plain, want.gradient):
      np.testing.assert_allclose(updates[leaf], -value, atol=2e-6)


def oracle_units(leaves):
  """Micro-gradients, leaves `[k, ...]`, scaled to norm 1 as for the memory."""
  norms = np.linalg.norm(oracle.vectors(leaves), axis=1)
  return [x / norms.reshape(-1, *[1] * (x.ndim - 1)) for x in leaves]


@pytest.mark.parametrize("k", [2, 4, 8, 16])
def test_a_sharded_batch_stays_where_it_is(k):
  """Each of 8 devices computes 32 of the 256 rows, according to the compiled program.

  One parameter is replicated, the other is sharded over the same devices.
  """
  rows, inputs, outputs = 256, 24, 7
  batch = device_mappings.stack(rows, {"x": (inputs,), "y": (outputs,)})
  params = {"w": np.zeros((inputs, outputs), np.float32), "s": np.zeros(16, np.float32)}

  def loss(params, x, y):
    return jnp.mean((x @ params["w"] - y) ** 2) + jnp.sum(params["s"]) * x[0, 0]

  specs = {"w": P(), "s": P("data")}
  arguments = (
    placed(params, specs),
    *placed(batch, dict.fromkeys("xy", P("data"))).values(),
  )
  run = jax.jit(gaf_optax.value_and_grad(loss, k, TAU))
  compiled = run.lower(*arguments).compile()
  _, gradient, agreement = compiled(*arguments)
  products = re.findall(rf"= f32\[(\d+),{outputs}\]\S* dot\(", compiled.as_text())
  of_rows = {int(n) for n in products} - {inputs}
  assert of_rows == {rows // k // device_mappings.N}, (
    "rows of a microbatch on each device"
  )

  x, y = (np.swapaxes(a.reshape(rows // k, k, -1), 0, 1) for a in batch.values())
  grads = [-2 * np.swapaxes(x, 1, 2) @ y / (rows // k * outputs)]
  grads.append(np.repeat(x[:, :1, 0], 16, axis=1))
  want = oracle.gaf(grads, TAU)
  assert want.margin > 1e-4
  np.testing.assert_array_equal(agreement.accepted, want.accepted)
  np.testing.assert_allclose(gradient["w"], want.gradient[0], atol=1e-5)
  np.testing.assert_allclose(gradient["s"], want.gradient[1], atol=1e-5)


def test_a_zero_micro_gradient_changes_nothing_wherever_it_stands():
  """A microbatch of padding only does not change the decision on the others."""
  k, shapes = 5, {"a": (3, 5), "b": (7,)}
  others = device_mappings.stack(k - 1, shapes, 3)
  for x in others.values():
    x[2] *= -1
  want = oracle.gaf(list(others.values()), TAU)
  assert want.agreed and want.accepted.tolist() == [True, True, False, True]
  tx = gaf_optax.gaf(TAU, axis_name="data", num_microbatches=k)
  params = device_mappings.params_of(others)
  members = jax.jit(
    jax.vmap(lambda mine: tx.update(mine, tx.init(params), params), axis_name="data")
  )

  def by_axis(tree):
    gradient, state = jax.tree.map(lambda x: x[0], members(tree))
    return reference_forms.read(gradient, state)

  filters = {
    **{
      name: lambda tree, form=form: form(tree, TAU)
      for name, form in reference_forms.ALL.items()
    },
    "leaf": lambda tree: reference_forms.stacked(tree, TAU, groups="leaf"),
    "axis": by_axis,
  }
  by_leaf = [oracle.gaf([x], TAU).gradient[0] for x in others.values()]
  for place in range(k):
    tree = {name: np.insert(x, place, 0, axis=0) for name, x in others.items()}
    for name, filtered in filters.items():
      found = filtered(tree)
      assert found.agreed, (name, place)
      assert found.distances.ravel()[place] == pytest.approx(1), (name, place)
      assert found.weights.ravel()[place] == 0, (name, place)
      gradient = by_leaf if name == "leaf" else want.gradient
      for x, y in zip(found.gradient.values(), gradient):
        np.testing.assert_allclose(x, y, atol=2e-6, err_msg=f"{name} {place}")


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("form", ["apply_if_agreed", "multi_steps", "apply_if_nonzero"])
def test_float32_gradients_of_bfloat16_parameters(form):
  """As in loss scaling: each optimizer gives the same as without the filter."""
  inners = {
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "lion": optax.lion(0.1),
    "rmsprop": optax.rmsprop(0.1),
    "muon": optax.contrib.muon(0.1),
    "adafactor": optax.adafactor(0.1),
  }
  streamed = form == "multi_steps"
  if streamed:  # It has the same branches as apply_if_agreed.
    inners = {name: inners[name] for name in ("adam", "momentum", "adafactor")}
  params = known_steps.params(jnp.bfloat16)
  sequence = known_steps.sequence(("all", "none", "half"))

  def run(inner):
    feed = lambda tx, *args: tx.update(*args)
    if form == "apply_if_nonzero":
      tx, given = gaf_optax.apply_if_nonzero(inner), [step.mean for step in sequence]
    else:
      kind = known_steps.FORMS[form]
      tx, feed = kind.make(inner), kind.feed  # Streamed forms feed in a scan.
      given = [step.micro_grads for step in sequence]
    state, results = tx.init(params), []
    for grads in given:
      updates, state = feed(tx, grads, state, params)
      results.append(updates)
    return results

  def rounded(new, old):
    """Rounds like `optax.MultiSteps`, even if XLA elides a pair of conversions."""
    if old.dtype == jnp.bfloat16:
      new = jax.lax.reduce_precision(new, exponent_bits=8, mantissa_bits=7)
    return new.astype(old.dtype)

  def alone(inner):
    state, results = inner.init(params), []
    for step in sequence:
      mean = jax.tree.map(jnp.asarray, step.mean)
      updates = jax.tree.map(jnp.zeros_like, mean)
      if step.accepted:
        updates, new = inner.update(mean, state, params)
        state = jax.tree.map(rounded, new, state) if streamed else new
      results.append(updates)
    return results

  found, want = jax.jit(
    lambda: [{name: f(inner) for name, inner in inners.items()} for f in (run, alone)]
  )()
  for path, x in jax.tree_util.tree_leaves_with_path(found):
    y = dict(jax.tree_util.tree_leaves_with_path(want))[path]
    assert x.dtype == y.dtype == jnp.float32, path
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6, err_msg=str(path))


class TestKeywords:
  """Keyword arguments with a row per example are split like the batch."""

  def test_masks_and_keys(self):
    rows, k = 8, 4
    batch = device_mappings.stack(rows, {"x": (5,)}, 2)
    mask = np.arange(rows) % 3 > 0

    def loss(w, x, *, extra, key, scale):
      kept = jnp.where(extra["mask"], x @ w, 0).sum() * scale
      return kept, jax.random.uniform(key)

    run = jax.jit(
      lambda w, x, mask, key: gaf_optax.value_and_grad(loss, k, 2.0, has_aux=True)(
        w, x, extra={"mask": mask}, key=key, scale=0.5
      )
    )
    (value, drawn), grads, _ = run(jnp.ones(5), batch["x"], mask, jax.random.key(0))
    kept = 0.5 * (batch["x"] * mask[:, None]).sum(0) / k
    np.testing.assert_allclose(grads, kept, rtol=1e-5)
    np.testing.assert_allclose(value, kept.sum(), rtol=1e-4)
    assert len(set(np.asarray(drawn).tolist())) == k

  def test_what_has_no_row_for_each_example(self):
    loss = lambda w, x, scale: jnp.sum(x @ w * scale)
    run = gaf_optax.value_and_grad(loss, 2)
    with pytest.raises(ValueError, match=r"argument scale .*close over it"):
      run(jnp.ones(3), jnp.ones((4, 3)), scale=jnp.ones(3))


K = 4


def every_form(rows, x, y):
  """Runs each form once, on micro-gradients `[K, ...]` or the batch."""
  params = device_mappings.params_of(rows)
  sgd = optax.sgd(0.1)
  stacked = {
    "gaf": gaf_optax.gaf(0.97, num_microbatches=K, max_norm_ratio=2.0),
    "anchor": gaf_optax.gaf(0.97, anchor_decay=0.5, groups="leaf"),
    "memory": gaf_optax.gaf(
      gaf_optax.adaptive_tau(),
      rule=rules.majority(),
      memory_decay=0.9,
      num_microbatches=K,
      embed=jnp.sign,
    ),
    "steered": gaf_optax.apply_if_agreed(sgd, gaf_optax.target_accept_rate(0.5)),
  }
  results = {}
  for name, tx in stacked.items():
    weights = jnp.arange(1.0, K + 1)
    updates, state = tx.update(
      rows, tx.init(params), params, microbatch_weights=weights
    )
    results[name] = updates, state, gaf_optax.metrics(state)
  tx = gaf_optax.multi_steps(sgd, K, num_microbatches=K)

  def one(state, row):
    updates, state = tx.update(row, state, params)
    return state, updates

  results["multi_steps"] = jax.lax.scan(one, tx.init(params), rows)
  mapped = gaf_optax.gaf(axis_name="data", num_microbatches=K)
  results["axis"] = jax.vmap(
    lambda row: mapped.update(row, mapped.init(params), params), axis_name="data"
  )(rows)

  def loss(params, x, y):
    hidden = jnp.tanh(x @ params["hidden"])
    return jnp.mean((hidden @ params["out"] - y) ** 2)

  model = {"hidden": jnp.ones((3, 4)) / 4, "out": jnp.ones(4)}
  weigh = lambda x, y: jnp.sum(jnp.abs(y))
  for name, options in {
    "streamed": dict(microbatch_weights=weigh),
    "compared": dict(
      compare=lambda path, leaf: path[0].key == "out",
      rule=rules.nearest_neighbors(2),
      tau=gaf_optax.tau_quantile(0.5),
    ),
  }.items():
    results[name] = gaf_optax.value_and_grad(loss, K, **options)(model, x, y)
  tx = gaf_optax.apply_if_nonzero(sgd)
  results["nonzero"] = tx.update(results["streamed"][1], tx.init(model), model)
  results["distance"] = gaf_optax.cosine_distance(x, y[:, None] * x)
  return results


@pytest.mark.usefixtures("standard_promotion")
class TestChecksOfJax:
  def inputs(self, lost=()):
    rows = device_mappings.stack(K, {"a": (3, 5), "b": (7,)})
    for i in lost:
      rows["a"][i, 1, 2] = np.nan
      rows["b"][i, 1] = np.inf
    return rows, *device_mappings.stack(2 * K, {"x": (3,), "y": ()}).values()

  def test_no_tracer_leaks(self):
    with jax.checking_leaks():
      jax.eval_shape(every_form, *self.inputs())

  def test_a_compiled_step_moves_nothing_and_holds_no_nan(self):
    """With one micro-gradient lost, all but one, or all."""
    compiled = jax.jit(every_form).lower(*self.inputs()).compile()
    given = [jax.device_put(self.inputs(range(i))) for i in (0, 1, K - 1, K)]
    with jax.transfer_guard("disallow"):
      results = jax.block_until_ready([compiled(*inputs) for inputs in given])
    for path, x in jax.tree_util.tree_leaves_with_path(results):
      # Infinite in the metrics, which the state cannot store.
      may_be_infinite = jax.tree_util.DictKey("noise_scale") in path
      if jnp.issubdtype(x.dtype, jnp.inexact):
        assert not np.isnan(x).any(), path
        assert may_be_infinite or np.isfinite(x).all(), path

  def test_debug_nans_and_infs(self):
    rows = jax.device_put(self.inputs([0, 1, 2])[0])
    params = device_mappings.params_of(rows)
    txs = [gaf_optax.gaf(num_microbatches=K), gaf_optax.apply_if_agreed(optax.sgd(0.1))]
    with jax.debug_nans(True), jax.debug_infs(True):
      for tx in txs:
        jax.block_until_ready(tx.update(rows, tx.init(params), params))


class TestErrorsThatNameTheMistake:
  """Combinations with Optax's wrappers and Equinox's modules that users have tried."""

  PARAMS = {"w": jnp.ones(3), "b": jnp.zeros(())}
  GRADS = {"w": jnp.ones((4, 3)), "b": jnp.ones(4)}

  def test_lookahead_inside_the_chain(self):
    params = optax.LookaheadParams.init_synced(self.PARAMS)
    inner = optax.lookahead(optax.sgd(0.1), 5, 0.5)
    for tx in (
      optax.chain(gaf_optax.gaf(TAU), inner),
      gaf_optax.apply_if_agreed(inner, TAU),
      gaf_optax.multi_steps(inner, 4, TAU),
    ):
      with pytest.raises(ValueError, match=r"LookaheadParams.*optax.lookahead\(optax"):
        tx.init(params)

  @pytest.mark.parametrize("form", ["gaf", "apply_if_agreed"])
  def test_line_searches_with_stacks(self, form):
    search = optax.scale_by_backtracking_linesearch(10)
    tx = {
      "gaf": optax.chain(gaf_optax.gaf(TAU), search),
      "apply_if_agreed": gaf_optax.apply_if_agreed(search, TAU),
    }[form]
    state = tx.init(self.PARAMS)
    value_fn = lambda params: jnp.sum(params["w"]) + params["b"]
    for name, given in {
      "value": dict(value=jnp.ones(4), grad=self.PARAMS),
      "grad": dict(value=jnp.float32(1), grad=self.GRADS),
    }.items():
      with pytest.raises(ValueError, match=f"extra argument {name} .*value_and_grad"):
        tx.update(self.GRADS, state, self.PARAMS, value_fn=value_fn, **given)

  def test_a_module_with_functions_in_it(self):
    module = {"layer": jnp.ones(3), "activation": jax.nn.relu}
    loss = lambda module, x: jnp.mean(module["activation"](x @ module["layer"]))
    match = r"leaf \['activation'\] is .*eqx.partition"
    for compare in (None, lambda path, leaf: path[0].key == "layer"):
      with pytest.raises(ValueError, match=match):
        gaf_optax.value_and_grad(loss, 2, compare=compare)(module, jnp.ones((4, 3)))
    for tx in (
      gaf_optax.gaf(TAU, anchor_decay=0.9),
      gaf_optax.multi_steps(optax.identity(), 2, TAU),
    ):
      with pytest.raises(ValueError, match=match):
        tx.init(module)

  def test_keys_without_a_type_and_states_without_a_filter(self):
    loss = lambda w, x, key: jnp.mean(x @ w)
    with pytest.raises(ValueError, match="PRNG key.*wrap_key_data"):
      gaf_optax.value_and_grad(loss, 2)(
        jnp.ones(3), jnp.ones((4, 3)), jax.random.PRNGKey(0)
      )
    state = gaf_optax.apply_if_nonzero(optax.sgd(0.1)).init(self.PARAMS)
    with pytest.raises(ValueError, match="no GafState.*ApplyIfNonzeroState.*Agreement"):
      gaf_optax.metrics(state)

  def test_unknown_options_name_the_function_that_was_called(self):
    inner = optax.sgd(0.1)
    for name, make in {
      "gaf": lambda: gaf_optax.gaf(TAU, use_grad_mean=False),
      "apply_if_agreed": lambda: gaf_optax.apply_if_agreed(inner, use_grad_mean=False),
      "multi_steps": lambda: gaf_optax.multi_steps(inner, 2, use_grad_mean=False),
      "value_and_grad": lambda: gaf_optax.value_and_grad(abs, 2, use_grad_mean=False),
    }.items():
      with pytest.raises(TypeError, match=rf"^{name}\(\) got .*use_grad_mean"):
        make()
