"""Parameters that are sharded too: the decision is that of the whole ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import across
import exchange
import gaf_optax
import oracle

TAU = 0.8
# As in_specs of shard_map; 'whole' and 'scalar' are replicated over 'model'.
SPECS = {"columns": P(None, "model"), "rows": P("model"), "scalar": P(), "whole": P()}


def stack(k, seed=0, times=1):
  rng = np.random.default_rng(seed)
  shapes = {
    "columns": (3, 8 * times),
    "rows": (16 * times,),
    "scalar": (),
    "whole": (11 * times,),
  }
  return {
    name: jnp.asarray(
      rng.standard_normal((k, *shape)) + rng.standard_normal(shape), jnp.float32
    )
    for name, shape in shapes.items()
  }


def filtered(tx, tree, shape, check, specs=SPECS, names=("data", "model")):
  """`tx.update` of members along 'data', each of whose leaves is sharded."""
  grid = across.mesh(shape, names)
  in_specs = jax.tree.map(lambda s: P("data", *s), specs)
  tree = jax.tree.map(
    lambda x, s: jax.device_put(x, NamedSharding(grid, s)), tree, in_specs
  )

  def member(rows):
    mine = jax.tree.map(lambda x: x[0], rows)
    params = jax.tree.map(jnp.zeros_like, mine)
    gradient, state = tx.update(mine, tx.init(params), params)
    return gradient, state._replace(anchor=None)

  mapped = jax.shard_map(
    member, mesh=grid, in_specs=(in_specs,), out_specs=(specs, P()), check_vma=check
  )
  return jax.jit(mapped)(tree)


@pytest.mark.parametrize(
  "shape, groups", [((2, 4), None), ((4, 2), None), ((2, 4), "leaf")]
)
@pytest.mark.parametrize("check", [True, False])
def test_the_decision_of_the_unsharded_case(shape, check, groups):
  tree = stack(shape[0])
  options = dict(groups=groups, num_microbatches=shape[0])
  # Without the check types say nothing of replication: the specs do.
  tx = gaf_optax.gaf(
    TAU, axis_name="data", param_axes="model" if check else SPECS, **options
  )
  gradient, state = filtered(tx, tree, shape, check)
  if groups is None:
    want = oracle.gaf(list(tree.values()), TAU)
    np.testing.assert_allclose(state.distances, want.distances, atol=1e-5)
    wanted = want.gradient
  else:
    wanted = [oracle.gaf([x], TAU).gradient[0] for x in tree.values()]
  for x, y in zip(gradient.values(), wanted):
    np.testing.assert_allclose(x, y, atol=2e-6)


def test_counting_a_replicated_leaf_twice_would_be_another_decision():
  """So that the tests above can fail."""
  tree = stack(2)
  twice = [*tree.values(), tree["whole"], tree["scalar"]]
  distances = [oracle.gaf(x, TAU).distances[1] for x in (list(tree.values()), twice)]
  assert abs(distances[0] - distances[1]) > 1e-3


@pytest.mark.parametrize(
  "check, option", [(True, "nan"), (False, "embed"), (True, "anchor"), (True, "embed")]
)
def test_the_rest_of_the_options(check, option):
  tree = stack(2, seed=1)
  options = dict(num_microbatches=2)
  if option == "nan":  # In one shard only.
    tree["rows"] = tree["rows"].at[1, 9].set(jnp.nan)
  elif option == "embed":
    options["embed"] = jnp.cos
  else:
    options["anchor_decay"] = 0.5
  params = jax.tree.map(lambda x: x[0], tree)
  tx = gaf_optax.gaf(TAU, **options)
  want, want_state = tx.update(tree, tx.init(params), params)
  axes = ("model",) if check else SPECS
  tx = gaf_optax.gaf(TAU, axis_name="data", param_axes=axes, **options)
  gradient, state = filtered(tx, tree, (2, 4), check)
  for name in tree:
    np.testing.assert_allclose(gradient[name], want[name], atol=2e-6)
  np.testing.assert_array_equal(state.accepted, want_state.accepted)
  np.testing.assert_allclose(state.distances, want_state.distances, atol=1e-5)


@pytest.mark.parametrize("check", [True, False])
def test_two_parameter_axes(check):
  specs = {
    "columns": P(None, ("fsdp", "model")),
    "rows": P("model"),
    "scalar": P(),
    "whole": P(),
  }
  tree = stack(2, seed=2)
  axes = ("fsdp", "model") if check else specs
  tx = gaf_optax.gaf(TAU, axis_name="data", param_axes=axes, num_microbatches=2)
  gradient, state = filtered(
    tx, tree, (2, 2, 2), check, specs, ("data", "fsdp", "model")
  )
  want = oracle.gaf(list(tree.values()), TAU)
  np.testing.assert_allclose(state.distances, want.distances, atol=1e-5)
  for x, y in zip(gradient.values(), want.gradient):
    np.testing.assert_allclose(x, y, atol=2e-6)


def test_names_alone_need_the_check():
  tx = gaf_optax.gaf(TAU, axis_name="data", param_axes="model")
  with pytest.raises(ValueError, match="cannot see which leaves are replicated"):
    filtered(tx, stack(2), (2, 4), check=False)


def test_specs_are_a_prefix_of_the_tree():
  tree = {name: stack(2)[name] for name in ("rows", "columns")}
  specs = {"rows": P("model"), "columns": P("model")}
  tree["columns"] = jnp.swapaxes(tree["columns"], 1, 2)
  tx = gaf_optax.gaf(TAU, axis_name="data", param_axes=P("model"), num_microbatches=2)
  _, state = filtered(tx, tree, (2, 4), False, specs)
  want = oracle.gaf(list(tree.values()), TAU)
  np.testing.assert_allclose(state.distances, want.distances, atol=1e-5)
  tx = gaf_optax.gaf(TAU, axis_name="data", param_axes={"rows": P("model")})
  with pytest.raises(ValueError, match=r"no PartitionSpec for leaf \['columns'\]"):
    filtered(tx, tree, (2, 4), False, specs)


@pytest.mark.parametrize("check", [True, False])
def test_micro_gradients_that_are_all_on_each_device(check):
  """The forms without axis_name sum over the parameters' axes, too."""
  k = 5
  tree = stack(k, seed=3)
  axes = "model" if check else SPECS
  stack_specs = jax.tree.map(lambda s: P(None, *s), SPECS)

  def run(rows):
    params = jax.tree.map(lambda x: jnp.zeros_like(x[0]), rows)
    tx = gaf_optax.gaf(TAU, param_axes=axes, num_microbatches=k)
    stacked, state = tx.update(rows, tx.init(params), params)

    multi = gaf_optax.multi_steps(
      optax.identity(), k, TAU, param_axes=axes, num_microbatches=k
    )
    multi_state = multi.init(params)
    for i in range(k):
      one = jax.tree.map(lambda x: x[i], rows)
      streamed, multi_state = multi.update(one, multi_state, params)
    return (stacked, streamed), (state.distances, multi_state.gaf_state.distances)

  grid = across.mesh((8,), ("model",))
  mapped = jax.shard_map(
    run,
    mesh=grid,
    in_specs=(stack_specs,),
    out_specs=((SPECS, SPECS), P()),
    check_vma=check,
  )
  results, distances = jax.jit(mapped)(tree)
  want = oracle.gaf(list(tree.values()), TAU)
  for found in distances:
    np.testing.assert_allclose(found, want.distances, atol=1e-5)
  for gradient in results:
    for x, y in zip(gradient.values(), want.gradient):
      np.testing.assert_allclose(x, y, atol=2e-6)


@pytest.mark.parametrize("agreed", [True, False])
def test_an_inner_optimizer_with_sharded_state(agreed):
  """Branches that run it and leave it have results of one replication type."""
  tree = stack(2, seed=4)
  if not agreed:
    tree = jax.tree.map(lambda x: x.at[1].set(-x[0]), tree)
  tx = gaf_optax.apply_if_agreed(
    optax.sgd(1.0, momentum=0.9), 1.2, axis_name="data", param_axes="model"
  )
  grid = across.mesh((2, 4), ("data", "model"))
  in_specs = jax.tree.map(lambda s: P("data", *s), SPECS)

  def member(rows):
    mine = jax.tree.map(lambda x: x[0], rows)
    params = jax.tree.map(jnp.zeros_like, mine)
    # A state that does not vary, as one made from constants.
    state = tx.init(jax.tree.map(lambda x: jnp.zeros(x.shape), params))
    return tx.update(mine, state, params)[0]

  mapped = jax.shard_map(member, mesh=grid, in_specs=(in_specs,), out_specs=SPECS)
  updates = jax.jit(mapped)(tree)
  want = oracle.gaf(list(tree.values()), 1.2)
  assert want.agreed == agreed
  for x, y in zip(updates.values(), want.gradient):
    np.testing.assert_allclose(x, -y, atol=2e-6)


def test_multi_steps_of_each_member():
  """Each filters its own; the state varies, and so do both branches' results."""
  tree = stack(8, seed=5)
  tx = gaf_optax.multi_steps(optax.sgd(1.0, momentum=0.9), 4, TAU)
  grid = across.mesh((2,), ("data",))

  def member(rows):
    params = jax.tree.map(lambda x: jnp.zeros(x.shape[1:]), rows)
    state = tx.init(params)
    for i in range(4):
      updates, state = tx.update(jax.tree.map(lambda x: x[i], rows), state, params)
    return jax.tree.map(lambda x: x[None], updates)

  mapped = jax.shard_map(member, mesh=grid, in_specs=P("data"), out_specs=P("data"))
  updates = jax.jit(mapped)(tree)
  for i in range(2):
    want = oracle.gaf([x[4 * i : 4 * i + 4] for x in tree.values()], TAU)
    for x, y in zip(updates.values(), want.gradient):
      np.testing.assert_allclose(x[i], -y, atol=2e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_map_over_some_axes_of_a_mesh(kind):
  """What is sharded over the others is the compiler's business, or refused."""
  tree = stack(4)
  grid = across.mesh((4, 2), ("data", "model"), kind)
  tree = {
    name: jax.device_put(x, NamedSharding(grid, P("data", *SPECS[name])))
    for name, x in tree.items()
  }
  tx = gaf_optax.gaf(TAU, axis_name="data")

  def member(rows):
    mine = jax.tree.map(lambda x: x[0], rows)
    return tx.update(mine, tx.init(mine), mine)[0]

  mapped = jax.jit(
    jax.shard_map(
      member, mesh=grid, in_specs=P("data"), out_specs=P(), axis_names={"data"}
    )
  )
  if kind == AxisType.Explicit:
    with pytest.raises(ValueError, match=r"\['columns'\].*'model'.*does not map"):
      mapped(tree)
    return
  want = oracle.gaf(list(tree.values()), TAU)
  for x, y in zip(mapped(tree).values(), want.gradient):
    np.testing.assert_allclose(x, y, atol=2e-6)


class TestExplicitMesh:
  """Stacks whose types say that they are sharded, under a plain `jit`."""

  CASES = {
    "replicated": ((P("data"), P("data"), P("data"), P("data")), 4),
    "like_the_parameters": (
      (P("data", None, "model"), P("data", "model"), P("data"), P("data")),
      4,
    ),
    "over_two_axes": ((P(("data", "model")),) * 4, 8),
    "parameters_alone": ((P(None, None, "model"), P(None, "model"), P(), P()), 1),
    "some_leaves": ((P("data"), P(), P("data"), P()), 4),
  }

  def sharded(self, tree, specs):
    grid = across.mesh((4, 2), ("data", "model"), AxisType.Explicit)
    put = lambda x, s: jax.device_put(x, NamedSharding(grid, s))
    tree = {name: put(x, s) for (name, x), s in zip(tree.items(), specs)}
    params = {
      name: put(jnp.zeros(x.shape[1:]), P(*s[1:]))
      for (name, x), s in zip(tree.items(), specs)
    }
    return tree, params

  @pytest.mark.parametrize(
    "name, options",
    [
      *((name, {}) for name in sorted(CASES)),
      ("like_the_parameters", {"anchor_decay": 0.9}),
      ("replicated", {"groups": "leaf"}),
    ],
    ids=str,
  )
  @pytest.mark.usefixtures("compiled_as_users_do")
  def test_result_and_what_is_gathered(self, name, options):
    specs, members = self.CASES[name]
    plain = stack(8, seed=6, times=512)
    tree, params = self.sharded(plain, specs)
    options = dict(options, num_microbatches=8)
    tx = gaf_optax.apply_if_agreed(optax.sgd(1.0, momentum=0.9), TAU, **options)
    state = tx.init(params)
    compiled = jax.jit(tx.update).lower(tree, state, params).compile()
    updates, new_state = compiled(tree, state, params)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape[1:]), plain)
    want, want_state = tx.update(plain, tx.init(zeros), zeros)
    for leaf, spec in zip(tree, specs):
      np.testing.assert_allclose(updates[leaf], want[leaf], atol=2e-6)
      entries = [*spec[1:], *[None] * zeros[leaf].ndim][: zeros[leaf].ndim]
      assert [*jax.typeof(updates[leaf]).sharding.spec] == entries
    np.testing.assert_allclose(
      new_state.gaf_state.distances, want_state.gaf_state.distances, atol=1e-5
    )
    # Nothing of the state changes its sharding, so that it can be carried.
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(new_state)):
      old, new = (jax.typeof(x).sharding.spec for x in (before, after))
      assert (any(old) or any(new)) is False or old == new

    gathered = [
      size
      for operation, size, *_ in exchange.collectives(compiled.as_text(), 8)
      if operation == "all-gather"
    ]
    # One gradient (two with an anchor), of eight in the stack, and padding to 128
    # values a device of what leaves sharded in one way are exchanged in.
    whole = 4 * sum(x.size for x in tree.values())
    times = 2 if "anchor_decay" in options else 1
    padding = 4 * 8 * (128 * len(set(specs)) + len(tree))
    assert padding < whole / 8
    assert sum(gathered) <= times * (whole / 8 + padding)
    assert bool(gathered) == (members > 1)

  def test_eager_and_under_set_mesh(self):
    specs, _ = self.CASES["like_the_parameters"]
    plain = stack(8, seed=7)
    tree, params = self.sharded(plain, specs)
    want = oracle.gaf(list(plain.values()), TAU)
    tx = gaf_optax.gaf(TAU)
    grid = across.mesh((4, 2), ("data", "model"), AxisType.Explicit)
    with jax.set_mesh(grid):
      for run in (tx.update, jax.jit(tx.update)):
        updates, _ = run(tree, tx.init(params), params)
        for x, y in zip(updates.values(), want.gradient):
          np.testing.assert_allclose(x, y, atol=2e-6)

  def test_streamed_and_cosine_distance(self):
    specs, _ = self.CASES["parameters_alone"]
    plain = stack(4, seed=8)
    tree, params = self.sharded(plain, specs)
    grid = across.mesh((4, 2), ("data", "model"), AxisType.Explicit)
    with jax.set_mesh(grid):
      rows = [jax.tree.map(lambda x: x[i], tree) for i in range(4)]
      tx = gaf_optax.multi_steps(optax.identity(), 4, TAU, num_microbatches=4)
      state = tx.init(params)
      for row in rows:
        updates, state = jax.jit(tx.update)(row, state, params)
      distance = gaf_optax.cosine_distance(rows[0], rows[1])
    want = oracle.gaf(list(plain.values()), TAU)
    np.testing.assert_allclose(state.gaf_state.distances, want.distances, atol=1e-5)
    np.testing.assert_allclose(distance, want.distances[1], atol=1e-5)
    for x, y in zip(updates.values(), want.gradient):
      np.testing.assert_allclose(x, y, atol=2e-6)

  def test_errors(self):
    tx = gaf_optax.gaf(TAU)
    specs = (P("data"), P("model"), P(), P())
    tree, params = self.sharded(stack(8), specs)
    with pytest.raises(ValueError, match="same mesh axes in every leaf"):
      tx.update(tree, tx.init(params))
    specs = (P("data"), P(None, "data"), P(), P())
    tree, params = self.sharded(stack(8), specs)
    with pytest.raises(ValueError, match=r"axis 'data', and so .*\['rows'\]"):
      tx.update(tree, tx.init(params))
