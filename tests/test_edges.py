"""The contract's table "Meanings at the edges", in all forms that it applies to."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gaf_optax
import oracle
import reference_forms
from gaf_optax import rules

every_form = pytest.mark.parametrize(
  "form", reference_forms.ALL.values(), ids=reference_forms.ALL
)


def row(*values):
  return np.asarray(values, np.float32)


def tree(*rows):
  """Two leaves, so that a decision needs the whole tree.

  Most tests pass four rows of three values and share one program.
  """
  stack = np.stack(rows)
  return {"w": jnp.asarray(stack[:, :-1]), "b": jnp.asarray(stack[:, -1])}


def flat(gradient):
  return np.append(np.asarray(gradient["w"], np.float64), np.float64(gradient["b"]))


def assert_zero(gradient):
  chex.assert_trees_all_equal(gradient, jax.tree.map(jnp.zeros_like, gradient))


@every_form
def test_distance_equal_to_tau_is_accepted(form):
  for a, b, tau in [
    (row(1, 0, 0), row(0, 0, 2), 1.0),
    (row(1, 2, 3), row(1, 2, 3), 0.0),
    (row(1, 0, 2), row(-1, 0, -2), 2.0),
    (row(1, 0, 0), row(3, 0, 4), 0.4),
    (row(0, 3, 4), row(0, 4, 3), 0.04),
  ]:
    filtered = form(tree(a, a, b, b), tau)
    assert filtered.agreed and filtered.accepted == 4
    np.testing.assert_allclose(flat(filtered.gradient), (a + b) / 2, atol=1e-7)


@every_form
def test_the_same_vector_is_at_distance_0_whatever_its_rounding(form):
  for seed, tau in [(0, 0.0), (1, 0.0), (2, 1e-7), (3, 1e-6)]:
    g = np.random.default_rng(seed).standard_normal(1001).astype(np.float32)
    filtered = form(tree(*[g] * 5), tau)
    assert filtered.accepted == 5
    assert filtered.distances[1:].max() <= np.float32(tau)


@every_form
def test_none_agrees(form):
  rows = [row(1, 0, 0), row(-1, 0, 0), row(0, 0, 1), row(0, -1, 0)]
  filtered = form(tree(*rows), 0.5)
  assert not filtered.agreed
  assert filtered.accepted == 0
  assert_zero(filtered.gradient)
  assert not filtered.weights.any()
  np.testing.assert_allclose(filtered.distances, [np.nan, 2, 1, 1], atol=1e-6)


@every_form
def test_none_agrees_is_zero_in_leaves_without_a_label_too(form):
  opposed = {"w": jnp.array([[1.0, 0], [-1, 0]]), "free": jnp.array([1.0, 3.0])}
  for tau, free in [(0.5, 0), (2.0, 2)]:
    filtered = form(opposed, tau, groups=only_w)
    assert filtered.agreed == (tau == 2)
    np.testing.assert_array_equal(filtered.gradient["w"], [0, 0])
    np.testing.assert_allclose(filtered.gradient["free"], free)


def only_w(path, leaf):
  return "w" if path[0].key == "w" else None


def test_none_agrees_counts_as_skipped_and_nothing_as_accepted():
  tx = gaf_optax.gaf(0.5, num_microbatches=2)
  state = tx.init(None)
  for step in range(3):
    _, state = tx.update(jnp.array([[1.0, 0.0], [-1.0, 0.0]]), state)
    assert int(state.skipped_steps) == step + 1
    assert not state.ready and not state.accepted.any()
  _, state = tx.update(jnp.array([[1.0, 0.0], [1.0, 0.0]]), state)
  found = gaf_optax.metrics(state)
  assert int(found["skipped_steps"]) == 3 and bool(found["agreed"])
  assert float(found["accept_rate"]) == pytest.approx(0.25)


ZERO = row(0, 0, 0)


@every_form
def test_zeros_anywhere_are_at_distance_1_and_start_nothing(form):
  """With tau below 1, the zeros do not change the result of the others."""
  for places in ([0], [1], [2], [3], [0, 1], [1, 3], [2, 3]):
    others = [row(1, 2, 3), row(3, -2, 1), row(1, 2, 2.5)]
    if len(places) == 2:
      others.pop(1)
    rest = oracle.gaf(list(tree(*others).values()), 0.3)
    rows = list(others)
    for place in places:
      rows.insert(place, ZERO)
    is_zero = np.array([not r.any() for r in rows])
    filtered = form(tree(*rows), 0.3)
    assert filtered.accepted == 2 and filtered.nonfinite == 0
    np.testing.assert_array_equal(filtered.distances[is_zero], 1)
    np.testing.assert_allclose(filtered.distances[~is_zero], rest.distances, atol=1e-6)
    np.testing.assert_array_equal(filtered.weights[is_zero], 0)
    np.testing.assert_allclose(flat(filtered.gradient), (others[0] + others[-1]) / 2)
    # With tau of at least 1 they are accepted, and count in the mean.
    filtered = form(tree(*rows), 1.0)
    assert filtered.accepted == 4
    np.testing.assert_allclose(flat(filtered.gradient), np.mean(rows, 0), rtol=1e-6)


@every_form
def test_one_among_zeros_agrees_with_none_below_1(form):
  for tau in (0.97, 1.0):
    for place in (0, 3):
      rows = [ZERO] * 4
      rows[place] = row(1, 2, 3)
      filtered = form(tree(*rows), tau)
      assert filtered.agreed == (tau == 1)
      want = np.where(np.arange(4) == place, np.nan, 1)
      np.testing.assert_array_equal(filtered.distances, want)
    filtered = form(tree(*[ZERO] * 4), tau)
    assert filtered.agreed == (tau == 1) and filtered.nonfinite == 0
    np.testing.assert_array_equal(filtered.distances, 1)
    assert_zero(filtered.gradient)


@every_form
def test_nonfinite_micro_gradient_is_left_out(form):
  rng = np.random.default_rng(0)
  good = [row(1, 2, 3) + 0.1 * rng.standard_normal(3).astype("f4") for _ in range(4)]
  for bad in (np.nan, np.inf, -np.inf):
    for place, column in [(0, 0), (0, 2), (1, 1), (3, 2)]:
      rows = np.array(good)
      rows[place, column] = bad
      filtered = form(tree(*rows), 0.5)
      rest = np.delete(rows, place, axis=0)
      assert filtered.agreed and filtered.accepted == 3 and filtered.nonfinite == 1
      assert np.isnan(filtered.distances[place])
      # The first finite row starts the sequence.
      assert np.isnan(filtered.distances[1 if place == 0 else 0])
      np.testing.assert_allclose(flat(filtered.gradient), rest.mean(0), rtol=1e-6)


@every_form
def test_all_nonfinite(form):
  filtered = form(tree(*[row(np.nan, 0, 0), row(0, np.inf, 0)] * 2), 2.0)
  assert not filtered.agreed and filtered.nonfinite == 4
  assert_zero(filtered.gradient)
  assert np.isnan(filtered.distances).all()


BASE = [row(1, 2, 3), row(3, -2, 1), row(1, 2, 2.5), row(1.5, 2.5, 3)]


def assert_is_the_oracle(filtered, rows, tau):
  """Rows whose decision is not near tau; errors relative to the largest value."""
  want = oracle.gaf(list(tree(*rows).values()), tau)
  assert want.margin > 1e-3 and 1 < want.accepted.sum() < len(rows)
  assert filtered.accepted == want.accepted.sum() and filtered.nonfinite == 0
  np.testing.assert_allclose(filtered.distances, want.distances, atol=1e-6)
  np.testing.assert_allclose(filtered.weights, want.weights, atol=1e-6)
  gradient = np.append(want.gradient[0], want.gradient[1])
  atol = 1e-6 * np.abs(gradient).max()
  np.testing.assert_allclose(flat(filtered.gradient), gradient, rtol=1e-5, atol=atol)


@every_form
def test_norms_from_1e_15_to_1e15_alike_and_mixed(form):
  # The rows have norms of 3.4 to 4.2.
  for scale in (3e-16, 1e-15, 1e-8, 1e-3, 1e8, 1e14, 2e14):
    assert_is_the_oracle(form(tree(*BASE), 0.3), BASE, 0.3)
    rows = [np.float32(scale) * r for r in BASE]
    assert_is_the_oracle(form(tree(*rows), 0.3), rows, 0.3)
  for scales in (
    (3e-16, 1, 1, 1),
    (1, 1, 3e-16, 1),
    (2e14, 1, 1, 1),
    (1, 1, 1, 2e14),
    (3e-16, 2e14, 3e-16, 2e14),
    (2e14, 3e-16, 1e-7, 3e-16),
    (1e-7, 1e7, 1e-14, 1e14),
  ):
    rows = [np.float32(scale) * r for scale, r in zip(scales, BASE)]
    assert_is_the_oracle(form(tree(*rows), 0.3), rows, 0.3)


@every_form
def test_a_norm_whose_square_overflows_counts_as_not_finite(form):
  for huge in (2e19, 1e30, np.finfo(np.float32).max):
    for place in (0, 1, 3):
      rows = list(BASE)
      rows[place] = row(0, huge, 1)
      filtered = form(tree(*rows), 2.0)
      assert filtered.accepted == 3 and filtered.nonfinite == 1
      assert np.isnan(filtered.distances[place])
      want = np.delete(rows, place, axis=0).mean(0)
      np.testing.assert_allclose(flat(filtered.gradient), want, rtol=1e-6)
    # Here the square of each single value is finite.
    rows[place] = np.full(3, 1.3e19, np.float32)
    filtered = form(tree(*rows), 2.0)
    assert filtered.nonfinite == 1
    np.testing.assert_allclose(flat(filtered.gradient), np.mean(rows[:3], 0), rtol=1e-6)
  everything = form(tree(*[np.float32(1e20) * r for r in BASE]), 2.0)
  assert everything.nonfinite == 4 and not everything.agreed
  assert_zero(everything.gradient)


@every_form
def test_a_norm_whose_square_has_no_precision_counts_as_zero(form):
  for tiny in (1e-17, 1e-25, 1e-44):
    for place in (0, 1, 3):
      rows = list(BASE)
      rows[place] = row(0, tiny, 0)
      filtered = form(tree(*rows), 0.9)
      others = [BASE[i] for i in range(4) if i != place]
      want = oracle.gaf(list(tree(*others).values()), 0.9)
      assert filtered.accepted == want.accepted.sum() and filtered.nonfinite == 0
      assert filtered.distances[place] == 1
      gradient = np.append(*want.gradient)
      np.testing.assert_allclose(flat(filtered.gradient), gradient, rtol=1e-5)


@every_form
def test_the_range_is_wider_in_float64(form, x64):
  rows = [r.astype(np.float64) for r in BASE]
  for scales in (
    (1e-150,) * 4,
    (1e149,) * 4,
    (1e-150, 1, 1e149, 1),
    (1e149, 1e-150, 1e-3, 1e-150),
  ):
    scaled = [scale * r for scale, r in zip(scales, rows)]
    assert_is_the_oracle(form(tree(*scaled), 0.3), scaled, 0.3)
  for scale, is_finite in [(1e160, False), (1e-170, True)]:
    filtered = form(tree(*[scale * r for r in rows]), 0.3)
    assert filtered.nonfinite == (0 if is_finite else 4) and not filtered.agreed


@every_form
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_accumulates_in_float32(form, dtype):
  # 4,096 ones: a sum of squares kept in these dtypes stops at 2,048 or 256.
  size = 4096
  sign = np.where(np.arange(size) < 1024, -1, 1)
  rows = np.stack([np.ones(size), sign, *[np.ones(size)] * 3])
  filtered = form({"w": jnp.asarray(rows).astype(dtype)}, 0.4)
  assert filtered.gradient["w"].dtype == dtype and filtered.accepted == 4
  np.testing.assert_allclose(filtered.distances[1], 0.5, atol=1e-6)
  # Five times 1 + 2**-7 (or 2**-10): the mean must not be a rounded sum.
  step = 2.0**-7 if dtype == "bfloat16" else 2.0**-10
  near = jnp.full((5, size), 1 + step, dtype)
  gradient = form({"w": near}, 0.4).gradient["w"]
  np.testing.assert_array_equal(np.asarray(gradient, np.float64), 1 + step)
  # A sum of five of these overflows in float16.
  large = form({"w": jnp.full((5, size), 6e4, dtype)}, 0.4).gradient["w"]
  np.testing.assert_array_equal(large, jnp.full(size, 6e4, dtype))
  zeros = form({"w": jnp.zeros((5, size), dtype)}, 0.4)
  assert not zeros.agreed and zeros.nonfinite == 0


@every_form
def test_float64_leaves_accumulate_in_float64(form, x64):
  a = np.array([1.0, 0.0])
  b = np.array([1.0, 1e-5])  # cosine distance 5e-11, invisible in float32
  # Once without and once with a float32 leaf.
  for other in ({}, {"v": jnp.zeros((2, 1), jnp.float32)}):
    stack = {"w": jnp.asarray(np.stack([a, b])), **other}
    assert not form(stack, 1e-12).agreed
    filtered = form(stack, 1e-10)
    assert filtered.agreed and filtered.gradient["w"].dtype == jnp.float64
    np.testing.assert_allclose(filtered.gradient["w"], (a + b) / 2, rtol=1e-15)


stacked_and_streamed = pytest.mark.parametrize(
  "form",
  [reference_forms.stacked, reference_forms.streamed],
  ids=["stacked", "streamed"],
)


@stacked_and_streamed
def test_complex_leaves_use_the_real_part_of_the_hermitian_product(form):
  a = np.array([1 + 2j, 3 - 1j], np.complex64)
  b = np.array([2 - 1j, 1 + 1j], np.complex64)
  want = 1 - np.vdot(a, b).real / np.linalg.norm(a) / np.linalg.norm(b)
  filtered = form({"w": jnp.asarray(np.stack([a, b]))}, 2.0)
  np.testing.assert_allclose(filtered.distances[1], want, atol=1e-6)
  np.testing.assert_allclose(filtered.gradient["w"], (a + b) / 2, rtol=1e-6)
  assert filtered.gradient["w"].dtype == jnp.complex64
  # i g is orthogonal to g.
  filtered = form({"w": jnp.asarray(np.stack([a, 1j * a]))}, 0.97)
  np.testing.assert_allclose(filtered.distances[1], 1, atol=1e-6)


@stacked_and_streamed
def test_none_and_masked_nodes_pass_through(form):
  stack = {"w": jnp.ones((2, 3)), "n": None, "m": optax.MaskedNode()}
  filtered = form(stack, 0.97)
  assert filtered.gradient["n"] is None
  assert filtered.gradient["m"] == optax.MaskedNode()
  np.testing.assert_array_equal(filtered.gradient["w"], np.ones(3))


def test_a_tree_of_placeholders_is_no_step():
  tx = gaf_optax.gaf()
  for nothing in ({"a": None}, {"a": optax.MaskedNode(), "b": None}):
    state = tx.init(nothing)
    gradient, new_state = tx.update(nothing, state, nothing)
    assert gradient == nothing
    chex.assert_trees_all_equal(state, new_state)


def test_integer_and_float0_leaves_take_no_part():
  params = {"w": jnp.zeros(2), "i": jnp.arange(3), "f": jnp.arange(2)}
  stack = {
    "w": jnp.array([[1.0, 0.0], [1.0, 0.1]]),
    "i": jnp.array([[9, 9, 9], [-9, -9, -9]], jnp.int32),
    "f": np.zeros((2, 2), jax.dtypes.float0),
  }
  tx = gaf_optax.gaf(0.97, num_microbatches=2)
  gradient, state = tx.update(stack, tx.init(params), params)
  np.testing.assert_allclose(state.distances[1], 0.0049628, rtol=1e-4)
  np.testing.assert_allclose(gradient["w"], [1, 0.05])
  assert gradient["i"].dtype == jnp.int32 and gradient["i"].shape == (3,)
  assert not gradient["i"].any()
  assert gradient["f"].dtype == jax.dtypes.float0 and gradient["f"].shape == (2,)
  for leaf in ("i", "f"):  # Also in the streamed form.
    tx = gaf_optax.multi_steps(optax.identity(), 2)
    part = {"w": params["w"], leaf: params[leaf]}
    state, update = tx.init(part), jax.jit(tx.update)
    for n in range(2):
      one = {"w": stack["w"][n], leaf: stack[leaf][n]}
      gradient, state = update(one, state, part)
    np.testing.assert_allclose(gradient["w"], [1, 0.05])
    assert gradient[leaf].shape == params[leaf].shape


@pytest.mark.usefixtures("standard_promotion")
def test_gradients_of_integer_parameters_as_jax_gives_them():
  params = {"w": jnp.ones(3), "i": jnp.arange(3)}
  loss = lambda p, x: jnp.sum(p["w"] * p["i"] * x)
  grad = jax.grad(loss, allow_int=True)
  stack = jax.vmap(lambda x: grad(params, x))(jnp.ones((2, 3)))
  tx = gaf_optax.gaf()
  gradient, _ = tx.update(stack, tx.init(params), params)
  np.testing.assert_array_equal(gradient["w"], [0, 1, 2])
  assert gradient["i"].dtype == jax.dtypes.float0


class TestErrors:
  def update(self, stack, params=None, **options):
    tx = gaf_optax.gaf(0.97, **options)
    return jax.jit(tx.update)(stack, tx.init(params), params)

  def test_one_micro_gradient(self):
    with pytest.raises(ValueError, match=r"k = 1.*nothing to compare"):
      self.update({"w": jnp.ones((1, 3))})
    with pytest.raises(ValueError, match="every_k_schedule must be at least 2, got 1"):
      gaf_optax.multi_steps(optax.sgd(1.0), 1)
    tx = gaf_optax.multi_steps(optax.sgd(1.0), lambda cycle: 1)
    with pytest.raises(ValueError, match=r"every_k_schedule must be in \[2"):
      tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
    with pytest.raises(ValueError, match="num_microbatches must be at least 2"):
      gaf_optax.value_and_grad(lambda p, b: 0.0, 1)
    self.update({"w": jnp.ones((1, 3))}, {"w": jnp.ones(3)}, anchor_decay=0.9)
    gaf_optax.multi_steps(optax.sgd(1.0), 1, anchor_decay=0.9)

  def test_different_leading_sizes(self):
    with pytest.raises(ValueError) as caught:
      self.update({"b": jnp.ones((4,)), "w": jnp.ones((3, 4))})
    for part in ("['b']", "['w']", "(4,)", "(3, 4)", "vmap"):
      assert part in str(caught.value)

  def test_plain_gradients(self):
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(3)}  # Could be a batch of three.
    with pytest.raises(ValueError) as caught:
      self.update(params, params)
    for part in ("['b']", "shape (3,)", "vmap", "multi_steps"):
      assert part in str(caught.value)

  def test_scalar_leaf(self):
    with pytest.raises(ValueError, match=r"\['b'\] has shape \(\).*vmap"):
      self.update({"w": jnp.ones((2, 3)), "b": jnp.ones(())})
    with pytest.raises(ValueError, match="whole tree"):
      self.update(jnp.ones(()))

  def test_wrong_shape(self):
    with pytest.raises(ValueError) as caught:
      self.update({"w": jnp.ones((2, 4))}, {"w": jnp.ones(3)})
    for part in ("['w']", "(2, 4)", "(3,)"):
      assert part in str(caught.value)

  def test_axis_in_the_wrong_place(self):
    with pytest.raises(ValueError, match="comes first"):
      self.update({"w": jnp.ones((3, 5, 2))}, {"w": jnp.ones((3, 5))})

  def test_leaf_without_parameter_and_parameter_without_leaf(self):
    with pytest.raises(ValueError, match=r"\['v'\].*no counterpart.*\['w'\]"):
      self.update({"v": jnp.ones((2, 3))}, {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"parameter \['v'\].*has no"):
      self.update({"w": jnp.ones((2, 3))}, {"w": jnp.ones(3), "v": jnp.ones(3)})
    # Unless it is masked.
    self.update(
      {"w": jnp.ones((2, 3)), "v": None, "u": optax.MaskedNode()},
      {"w": jnp.ones(3), "v": {"x": jnp.ones(3)}, "u": jnp.ones(2)},
    )

  def test_empty_tree(self):
    for empty in ({}, [], ()):
      with pytest.raises(ValueError, match="empty"):
        self.update(empty, empty)

  def test_no_micro_gradients(self):
    with pytest.raises(ValueError, match=r"\(0, 3\).*no micro-gradients"):
      self.update({"w": jnp.ones((0, 3))})

  def test_tau_outside_its_range(self):
    for tau in (-0.1, 2.1, np.nan, np.inf, np.float32(3), jnp.array(-1.0)):
      for make in (
        lambda: gaf_optax.gaf(tau),
        lambda: gaf_optax.apply_if_agreed(optax.sgd(1.0), tau),
        lambda: gaf_optax.multi_steps(optax.sgd(1.0), 2, tau),
        lambda: gaf_optax.value_and_grad(lambda p, b: 0.0, 2, tau),
      ):
        with pytest.raises(ValueError, match=r"tau must be in \[0, 2\], got") as caught:
          make()
        assert str(float(tau)) in str(caught.value)

  def test_tau_of_a_wrong_kind(self):
    for tau in ("0.97", None, True, [0.97], jnp.ones(2), 1j):
      with pytest.raises(ValueError, match="tau must be a number"):
        gaf_optax.gaf(tau)

  def test_schedule_outside_the_range(self):
    with pytest.raises(ValueError, match=r"3\.0.*schedule"):
      gaf_optax.gaf(lambda step: 3.0).init(None)

  def test_num_microbatches(self):
    with pytest.raises(ValueError, match="num_microbatches is 3, but 2"):
      self.update({"w": jnp.ones((2, 3))}, num_microbatches=3)
    for wrong in (0, 1, 2.5, "2", True):
      with pytest.raises(ValueError, match="num_microbatches"):
        gaf_optax.gaf(num_microbatches=wrong)
    with pytest.raises(
      ValueError, match="num_microbatches is 3, but every_k_schedule is 2"
    ):
      gaf_optax.multi_steps(optax.sgd(1.0), 2, num_microbatches=3)

  def test_options(self):
    for options, words in [
      (dict(anchor_decay=0.9, rule=rules.sequential()), "exclude each other"),
      (dict(anchor_decay=1.0), r"anchor_decay must be in \[0, 1\), got 1.0"),
      (dict(anchor_decay=-0.1), "anchor_decay"),
      (dict(max_norm_ratio=0.5), r"max_norm_ratio must be in \[1, inf\), got 0.5"),
      (dict(max_norm_ratio=np.nan), "max_norm_ratio"),
      (dict(rule="sequential"), "rule must be callable"),
      (dict(rule=rules.most_neighbors), "call"),
      (dict(embed="sign"), "embed must be callable"),
      (dict(groups="layer"), "groups must be callable.*'leaf'"),
    ]:
      with pytest.raises(ValueError, match=words):
        gaf_optax.gaf(0.97, **options)
    with pytest.raises(ValueError, match="returned None for every leaf"):
      self.update({"w": jnp.ones((2, 3))}, groups=lambda path, leaf: None)
    with pytest.raises(ValueError, match=r"hashable label.*\['w'\]"):
      self.update({"w": jnp.ones((2, 3))}, groups=lambda path, leaf: [1])
    with pytest.raises(ValueError, match="elementwise"):
      self.update({"w": jnp.ones((2, 3))}, embed=lambda x: x.sum())
    with pytest.raises(TypeError):
      gaf_optax.apply_if_agreed(optax.sgd(1.0), 0.97, no_such_option=1)

  def test_streamed_forms_know_the_sequential_rules_only(self):
    for options, words in [
      ({"rule": rules.leave_one_out()}, "sequential"),
      ({"rule": rules.most_neighbors()}, "sequential"),
      ({"rule": rules.majority()}, "sequential"),
      ({"embed": jnp.sign}, "embed=.* is not supported"),
      ({"max_norm_ratio": 2.0}, "max_norm_ratio=2.0 is not supported"),
    ]:
      with pytest.raises(ValueError, match=words):
        gaf_optax.multi_steps(optax.sgd(1.0), 2, **options)
      with pytest.raises(ValueError, match=words):
        gaf_optax.value_and_grad(lambda p, b: 0.0, 2, **options)

  def test_target_accept_rate(self):
    for wrong in (
      dict(rate=1.1),
      dict(rate=-0.1),
      dict(rate=0.1, initial=2.5),
      dict(rate=0.1, step_size=0.0),
      dict(rate=0.1, minimum=0.5, maximum=0.4),
      dict(rate=0.1, initial=0.97, maximum=0.9),
      dict(rate=0.1, minimum=-1.0),
    ):
      with pytest.raises(ValueError):
        gaf_optax.target_accept_rate(**wrong)

  def test_metrics(self):
    with pytest.raises(ValueError, match="no GafState"):
      gaf_optax.metrics(optax.adam(1.0).init(jnp.ones(2)))
    two = optax.chain(gaf_optax.gaf(), gaf_optax.gaf()).init(jnp.ones(2))
    with pytest.raises(ValueError, match=r"2 GafStates.*\[0\].*\[1\]"):
      gaf_optax.metrics(two)
