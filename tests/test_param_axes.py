"""Sharded parameters: the decision must be the same as for whole ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import device_mappings
import exchange
import gaf_optax
import oracle
import reference_forms

TAU = 0.8
# in_specs of shard_map; 'whole' and 'scalar' are replicated over 'model'.
SPECS = {"columns": P(None, "model"), "rows": P("model"), "scalar": P(), "whole": P()}


SHAPES = {"columns": (3, 8), "rows": (16,), "scalar": (), "whole": (11,)}


def assert_is_oracle(gradient, distances, tree, tau=TAU, **options):
  want = oracle.gaf(list(tree.values()), tau, **options)
  assert want.margin > 1e-3
  np.testing.assert_allclose(
    reference_forms.compared(distances), want.distances, atol=1e-5
  )
  for name, y in zip(tree, want.gradient):
    np.testing.assert_allclose(gradient[name], y, atol=2e-6)


def mapped(member, tree, shape, check, specs=SPECS, names=("data", "model"), out=None):
  """Maps `member` over the rows along 'data' of a tree with sharded leaves.

  `out` defaults to the specs of a gradient and replicated values.
  """
  grid = device_mappings.mesh(shape, names)
  in_specs = jax.tree.map(lambda s: P("data", *s), specs)
  tree = jax.tree.map(
    lambda x, s: jax.device_put(x, NamedSharding(grid, s)), tree, in_specs
  )
  run = jax.shard_map(
    lambda rows: member(jax.tree.map(lambda x: x[0], rows)),
    mesh=grid,
    in_specs=(in_specs,),
    out_specs=(specs, P()) if out is None else out,
    check_vma=check,
  )
  return jax.jit(run)(tree)


def update(tx):
  def member(mine):
    params = jax.tree.map(jnp.zeros_like, mine)
    gradient, state = tx.update(mine, tx.init(params), params)
    return gradient, state._replace(anchor=None)

  return member


@pytest.mark.parametrize("check", [True, False])
def test_the_decision_of_the_unsharded_case(check):
  """Over two axes, and with options that read the leaves in other ways."""
  specs = {
    "columns": P(None, ("fsdp", "model")),
    "rows": P("model"),
    "scalar": P(),
    "whole": P(),
  }
  trees = [device_mappings.stack(2, SHAPES, seed) for seed in (2, 3)]
  bad = device_mappings.stack(2, SHAPES, 4)
  bad["rows"][1, 9] = np.nan  # In one shard only.
  # Without the check, types do not show replication, but the specs do.
  axes = ("fsdp", "model") if check else specs
  make = functools.partial(
    gaf_optax.gaf, TAU, axis_name="data", param_axes=axes, num_microbatches=2
  )

  def member(mine):
    one, two, bad = mine
    anchored = make(anchor_decay=0.5)
    params = jax.tree.map(jnp.zeros_like, one)
    state = anchored.init(params)
    _, state = anchored.update(one, state, params)
    results = {
      "plain": update(make())(one),
      "leaf": update(make(groups="leaf"))(one),
      "embed": update(make(embed=jnp.sign))(two),
      "bad": update(make())(bad),
      "anchor": anchored.update(two, state, params),
    }
    gradients = {name: gradient for name, (gradient, _) in results.items()}
    return gradients, {name: state.distances for name, (_, state) in results.items()}

  out = dict.fromkeys(("plain", "leaf", "embed", "bad", "anchor"), specs), P()
  names = ("data", "fsdp", "model")
  gradients, distances = mapped(
    member, (*trees, bad), (2, 2, 2), check, (specs,) * 3, names, out
  )
  assert_is_oracle(gradients["plain"], distances["plain"], trees[0])
  assert_is_oracle(gradients["embed"], distances["embed"], trees[1], embed=np.sign)
  assert_is_oracle(gradients["bad"], distances["bad"], bad)
  for name, x in trees[0].items():
    want = oracle.gaf([x], TAU).gradient[0]
    np.testing.assert_allclose(gradients["leaf"][name], want, atol=2e-6)
  first, second = (oracle.vectors(list(tree.values())) for tree in trees)
  expected = [oracle.distance(first.mean(0), row) for row in second]
  np.testing.assert_allclose(distances["anchor"], expected, atol=1e-5)


def test_counting_a_replicated_leaf_twice_would_be_another_decision():
  """So that the tests above can fail."""
  tree = device_mappings.stack(2, SHAPES, 2)
  twice = [*tree.values(), tree["whole"], tree["scalar"]]
  distances = [oracle.gaf(x, TAU).distances[1] for x in (list(tree.values()), twice)]
  assert abs(distances[0] - distances[1]) > 1e-3


def test_names_alone_need_the_check():
  tx = gaf_optax.gaf(TAU, axis_name="data", param_axes="model")
  with pytest.raises(ValueError, match="cannot see which leaves are replicated"):
    mapped(update(tx), device_mappings.stack(2, SHAPES), (2, 4), check=False)


def test_specs_are_a_prefix_of_the_tree():
  tree = device_mappings.stack(2, {"rows": (16,), "columns": (8, 3)})
  specs = {"rows": P("model"), "columns": P("model")}
  tx = gaf_optax.gaf(TAU, axis_name="data", param_axes=P("model"), num_microbatches=2)
  gradient, state = mapped(update(tx), tree, (2, 4), False, specs)
  assert_is_oracle(gradient, state.distances, tree)
  tx = gaf_optax.gaf(TAU, axis_name="data", param_axes={"rows": P("model")})
  with pytest.raises(ValueError, match=r"no PartitionSpec for leaf \['columns'\]"):
    mapped(update(tx), tree, (2, 4), False, specs)


@pytest.mark.parametrize("check", [True, False])
def test_micro_gradients_that_are_all_on_each_device(check):
  """The forms without axis_name also sum over the parameters' axes."""
  k = 3
  tree = device_mappings.stack(k, SHAPES, 3)
  axes = "model" if check else SPECS
  options = dict(param_axes=axes, num_microbatches=k)
  stack_specs = jax.tree.map(lambda s: P(None, *s), SPECS)

  def run(rows):
    params = device_mappings.params_of(rows)
    tx = gaf_optax.gaf(TAU, **options)
    stacked, state = tx.update(rows, tx.init(params), params)
    multi = gaf_optax.multi_steps(optax.identity(), k, TAU, **options)
    multi_state = multi.init(params)
    for i in range(k):
      one = jax.tree.map(lambda x: x[i], rows)
      streamed, multi_state = multi.update(one, multi_state, params)
    return (stacked, streamed), (state.distances, multi_state.gaf_state.distances)

  grid = device_mappings.mesh((8,), ("model",))
  found = jax.jit(
    jax.shard_map(
      run,
      mesh=grid,
      in_specs=(stack_specs,),
      out_specs=((SPECS, SPECS), P()),
      check_vma=check,
    )
  )(tree)
  for gradient, distances in zip(*found):
    assert_is_oracle(gradient, distances, tree)


def test_an_inner_optimizer_with_sharded_state():
  """The branches that run and skip it return results of the same replication type."""
  tx = gaf_optax.apply_if_agreed(
    optax.sgd(1.0, momentum=0.9), 1.2, axis_name="data", param_axes="model"
  )

  def member(mine):
    params = jax.tree.map(jnp.zeros_like, mine)
    # A replicated state, such as one made of constants.
    state = tx.init(jax.tree.map(lambda x: jnp.zeros(x.shape), params))
    return tx.update(mine, state, params)[0]

  tree = device_mappings.stack(4, SHAPES, 4)
  for x in tree.values():  # The second pair does not agree.
    x[3] = -x[2]
  grid = device_mappings.mesh((2, 4), ("data", "model"))
  in_specs = jax.tree.map(lambda s: P("data", *s), SPECS)
  run = jax.jit(
    jax.shard_map(
      lambda rows: member(jax.tree.map(lambda x: x[0], rows)),
      mesh=grid,
      in_specs=(in_specs,),
      out_specs=SPECS,
    )
  )
  for pair, agreed in ((slice(0, 2), True), (slice(2, 4), False)):
    rows = {name: x[pair] for name, x in tree.items()}
    updates = jax.block_until_ready(run(rows))
    want = oracle.gaf(list(rows.values()), 1.2)
    assert want.agreed == agreed
    for name, y in zip(rows, want.gradient):
      np.testing.assert_allclose(updates[name], -y, atol=2e-6)


def test_multi_steps_of_each_member():
  """Each device filters its own; the state and both branches' results then vary."""
  k = 3
  tree = device_mappings.stack(2 * k, SHAPES, 5)
  tx = gaf_optax.multi_steps(optax.sgd(1.0, momentum=0.9), k, TAU)
  grid = device_mappings.mesh((2,), ("data",))

  def member(rows):
    params = device_mappings.params_of(rows)
    state = tx.init(params)
    for i in range(k):
      updates, state = tx.update(jax.tree.map(lambda x: x[i], rows), state, params)
    return jax.tree.map(lambda x: x[None], updates)

  run = jax.shard_map(member, mesh=grid, in_specs=P("data"), out_specs=P("data"))
  updates = jax.jit(run)(tree)
  for i in range(2):
    want = oracle.gaf([x[k * i : k * i + k] for x in tree.values()], TAU)
    for name, y in zip(tree, want.gradient):
      np.testing.assert_allclose(updates[name][i], -y, atol=2e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_map_over_some_axes_of_a_mesh(kind):
  """The compiler handles sharding over the other axes; Explicit ones are refused."""
  plain = device_mappings.stack(4, SHAPES)
  grid = device_mappings.mesh((4, 2), ("data", "model"), kind)
  tree = {
    name: jax.device_put(x, NamedSharding(grid, P("data", *SPECS[name])))
    for name, x in plain.items()
  }
  tx = gaf_optax.gaf(TAU, axis_name="data", num_microbatches=4)
  run = jax.jit(
    jax.shard_map(
      lambda rows: update(tx)(jax.tree.map(lambda x: x[0], rows)),
      mesh=grid,
      in_specs=P("data"),
      out_specs=P(),
      axis_names={"data"},
    )
  )
  if kind == AxisType.Explicit:
    with pytest.raises(ValueError, match=r"\['columns'\].*'model'.*does not map"):
      run(tree)
    return
  gradient, state = run(tree)
  assert_is_oracle(gradient, state.distances, plain)


class TestExplicitMesh:
  """Stacks with sharded types, under plain `jit`."""

  LARGE = {"columns": (3, 16_384), "rows": (32_768,), "scalar": (), "whole": (20_001,)}
  CASES = {
    "like_the_parameters": (
      (P("data", None, "model"), P("data", "model"), P("data"), P("data")),
      4,
    ),
    "over_two_axes": ((P(("data", "model")),) * 4, 8),
    "parameters_alone": ((P(None, None, "model"), P(None, "model"), P(), P()), 1),
    "some_leaves": ((P("data"), P(), P("data"), P()), 4),
  }
  OPTIONS = {
    "like_the_parameters": {"anchor_decay": 0.5},
    "some_leaves": {"groups": "leaf"},
  }

  def sharded(self, tree, specs):
    grid = device_mappings.mesh((4, 2), ("data", "model"), AxisType.Explicit)
    put = lambda x, s: jax.device_put(x, NamedSharding(grid, s))
    tree = {name: put(x, s) for (name, x), s in zip(tree.items(), specs)}
    params = {
      name: put(np.zeros(x.shape[1:], np.float32), P(*s[1:]))
      for (name, x), s in zip(tree.items(), specs)
    }
    return tree, params

  @pytest.mark.parametrize("name", CASES)
  @pytest.mark.usefixtures("compiled_as_users_do")
  def test_result_and_what_is_gathered(self, name):
    specs, members = self.CASES[name]
    options = dict(self.OPTIONS.get(name, {}), num_microbatches=8)
    tx = gaf_optax.apply_if_agreed(optax.sgd(1.0), TAU, **options)
    plain = [device_mappings.stack(8, self.LARGE, seed) for seed in (6, 7)]
    trees, params = zip(*(self.sharded(tree, specs) for tree in plain))
    state = tx.init(params[0])
    compiled = jax.jit(tx.update).lower(trees[0], state, params[0]).compile()
    updates, new_state = compiled(trees[0], state, params[0])
    distances = new_state.gaf_state.distances
    if "anchor_decay" in options:  # One more step, so that the anchor is not empty.
      updates, new_state = compiled(trees[1], new_state, params[0])
      first, second = (oracle.vectors(list(tree.values())) for tree in plain)
      expected = [oracle.distance(first.mean(0), row) for row in second]
      np.testing.assert_allclose(new_state.gaf_state.distances, expected, atol=1e-5)
    elif "groups" in options:
      for leaf, x in plain[0].items():
        want = oracle.gaf([x], TAU).gradient[0]
        np.testing.assert_allclose(updates[leaf], -want, atol=2e-6)
    else:
      updated = jax.tree.map(jnp.negative, updates)
      assert_is_oracle(updated, distances, plain[0])
    for leaf, spec in zip(trees[0], specs):
      ndim = updates[leaf].ndim
      entries = [*spec[1:], *[None] * ndim][:ndim]
      assert [*jax.typeof(updates[leaf]).sharding.spec] == entries
    # The state keeps its sharding, so a scan can carry it.
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(new_state)):
      old, new = (jax.typeof(x).sharding.spec for x in (before, after))
      assert (any(old) or any(new)) is False or old == new

    gathered = [
      size
      for operation, size, *_ in exchange.collectives(compiled.as_text(), 8)
      if operation == "all-gather"
    ]
    # One gradient (two with an anchor) of the eight in the stack, and the padding of
    # the exchange for each sharding.
    whole = 4 * sum(x.size for x in plain[0].values())
    times = 2 if "anchor_decay" in options else 1
    padding = 4 * 8 * (1024 * len(set(specs)) + 128 * len(specs))
    assert padding < whole / 8
    assert sum(gathered) <= times * (whole / 8 + padding)
    assert bool(gathered) == (members > 1)

  def test_eager(self):
    specs, _ = self.CASES["like_the_parameters"]
    plain = device_mappings.stack(8, SHAPES, 7)
    tree, params = self.sharded(plain, specs)
    tx = gaf_optax.gaf(TAU, num_microbatches=8)
    with jax.set_mesh(
      device_mappings.mesh((4, 2), ("data", "model"), AxisType.Explicit)
    ):
      updates, state = tx.update(tree, tx.init(params), params)
    assert_is_oracle(updates, state.distances, plain)

  def test_streamed_and_cosine_distance(self):
    specs, _ = self.CASES["parameters_alone"]
    plain = device_mappings.stack(4, SHAPES, 8)
    tree, params = self.sharded(plain, specs)
    tx = gaf_optax.multi_steps(optax.identity(), 4, TAU, num_microbatches=4)
    with jax.set_mesh(
      device_mappings.mesh((4, 2), ("data", "model"), AxisType.Explicit)
    ):
      rows = [jax.tree.map(lambda x: x[i], tree) for i in range(4)]
      state = tx.init(params)
      update = jax.jit(tx.update)
      for row in rows:
        updates, state = update(row, state, params)
      distance = jax.jit(gaf_optax.cosine_distance)(rows[0], rows[1])
    assert_is_oracle(updates, state.gaf_state.distances, plain)
    first, second = oracle.vectors([x[:2] for x in plain.values()])
    np.testing.assert_allclose(distance, oracle.distance(first, second), atol=1e-5)

  def test_errors(self):
    tx = gaf_optax.gaf(TAU)
    plain = device_mappings.stack(8, SHAPES)
    tree, params = self.sharded(plain, (P("data"), P("model"), P(), P()))
    with pytest.raises(ValueError, match="same mesh axes in every leaf"):
      tx.update(tree, tx.init(params))
    tree, params = self.sharded(plain, (P("data"), P(None, "data"), P(), P()))
    with pytest.raises(ValueError, match=r"axis 'data', and so .*\['rows'\]"):
      tx.update(tree, tx.init(params))
