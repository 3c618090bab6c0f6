"""Every form of the filter against one NumPy float64 oracle, on drawn inputs."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

import oracle
import reference_forms
from gaf_optax import rules

SHAPES = {
  "vector": [(3,)],
  "net": [(4, 5), (5,), ()],
  "odd": [(1,), (7, 3, 2), (0, 2), (17,)],
}
# Relative rounding error of stored values and of distances computed from them.
EPS = {"float32": 3e-6, "bfloat16": 1e-2, "float16": 2e-3, "complex64": 3e-6}
SPAN = {"float32": 13, "bfloat16": 13, "float16": 2, "complex64": 13}


class Layout(NamedTuple):
  """The static inputs of the compiled program, except the rule."""

  k: int
  shapes: str
  dtype: str

  def __str__(self):
    return "-".join(map(str, self))


LAYOUTS = [
  Layout(2, "vector", "float32"),
  Layout(5, "net", "float32"),
  Layout(9, "odd", "bfloat16"),
  Layout(3, "net", "float16"),
  Layout(4, "odd", "complex64"),
]


@st.composite
def stacks(draw, layout, number=1):
  """`number` trees of leaves `[k, *shape]`.

  They contain a common direction, copies, opposites, bad rows, and a scale for all rows
  or for each row.
  """
  k, shapes, dtype = layout
  return [draw(stack(k, SHAPES[shapes], dtype)) for _ in range(number)]


@st.composite
def microbatch_weights(draw, k):
  """Weights of any scale, some of them 0."""
  scale = draw(st.sampled_from([1e-6, 1.0, 1e6]))
  some = st.one_of(st.just(0.0), st.integers(1, 50).map(float))
  return scale * np.array(draw(st.lists(some, min_size=k, max_size=k)))


@st.composite
def stack(draw, k, shapes, dtype):
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  common = draw(st.sampled_from([0.0, 0.3, 1.0, 3.0]))
  span = SPAN[dtype]
  if draw(st.booleans()):
    scales = np.full(k, 10.0 ** draw(st.integers(-span, span)))
  else:
    scales = 10.0 ** rng.integers(-span, span + 1, k)
  fates = draw(
    st.lists(
      st.sampled_from(["good"] * 6 + ["nan", "inf", "zero", "copy", "opposed"]),
      min_size=k,
      max_size=k,
    )
  )
  leaves = []
  for number, shape in enumerate(shapes):
    x = rng.standard_normal((k, *shape)) + common * rng.standard_normal(shape)
    if dtype == "complex64":
      x = x + 1j * rng.standard_normal((k, *shape))
    x = x * scales.reshape((k,) + (1,) * len(shape))
    for i, fate in enumerate(fates):
      if fate == "zero":
        x[i] = 0
      elif fate in ("copy", "opposed"):
        x[i] = x[0] if fate == "copy" else -x[0]
      elif fate in ("nan", "inf") and number == 0:
        x[i].flat[rng.integers(x[i].size)] = np.nan if fate == "nan" else -np.inf
    leaves.append(jnp.asarray(x).astype(dtype))
  return leaves


taus = st.one_of(st.floats(0, 2), st.sampled_from([0.0, 0.92, 0.97, 1.0, 2.0]))


def check(filtered, expected, leaves, nonfinite=None):
  """Compares all fields; False if rounding may decide."""
  dtype = str(leaves[0].dtype)
  error = 1e-5 / max(expected.condition, 1e-12)
  if expected.margin < error:
    return False
  assert filtered.agreed == expected.agreed
  assert filtered.accepted == expected.accepted.sum()
  if nonfinite is not None:
    assert filtered.nonfinite == nonfinite
  np.testing.assert_allclose(
    filtered.distances, expected.distances, rtol=0, atol=min(error, 2)
  )
  np.testing.assert_allclose(
    filtered.weights, expected.weights, rtol=0, atol=min(10 * error + 1e-6, 1)
  )
  kept = expected.finite
  for got, want, leaf in zip(filtered.gradient, expected.gradient, leaves):
    assert got.shape == want.shape
    assert str(got.dtype) == dtype
    # If terms cancel, the rounding error is relative to the largest of them.
    largest = np.abs(oracle.wide(leaf)[kept]).max(initial=0)
    np.testing.assert_allclose(
      oracle.wide(got), want, rtol=0, atol=EPS[dtype] * largest + 1e-37
    )
  return True


PAIRWISE = (
  {"rule": rules.min_neighbors(0.5)},
  {"rule": "min_neighbors", "fraction": 0.5},
)


@pytest.mark.parametrize(
  "which, layout",
  [
    *(("weighted", layout) for layout in LAYOUTS),
    ("plain", LAYOUTS[1]),
    ("plain", LAYOUTS[4]),
    ("pairwise", LAYOUTS[1]),
    ("pairwise", LAYOUTS[2]),
  ],
  ids=str,
)
def test_stacked_form_is_the_oracles(which, layout):
  """Several updates; each starts the sequence one place further on."""
  k = layout.k

  @settings(max_examples=12)
  @given(
    stacks(layout, number=3),
    taus,
    microbatch_weights(k),
    st.sampled_from([1.0, 1.5, 4.0]),
  )
  def run(drawn, tau, weights, ratio):
    options, of_oracle = PAIRWISE if which == "pairwise" else ({}, {})
    own, num_present = {}, np.ones(k)
    if which != "plain":
      own = {"microbatch_weights": weights, "max_norm_ratio": ratio}
      num_present = weights > 0
    nonfinite = 0
    results = reference_forms.stacked_steps(drawn, tau, **options, **own)
    for step, (leaves, result) in enumerate(zip(drawn, results)):
      start = {} if which == "pairwise" else {"start": step % k}
      expected = oracle.gaf(leaves, tau, **of_oracle, **own, **start)
      nonfinite += np.sum(~expected.finite & (num_present > 0))
      event(str(check(result, expected, leaves, nonfinite)))

  run()


@pytest.mark.parametrize("options", [{}, {"anchor_decay": 0.5}], ids=str)
def test_leaves_of_all_sizes(options):
  """Small leaves are joined up to a size; large ones and other dtypes are not."""
  k = 3
  sizes = [5000, 4096, 1, 4096, 4096, 0, 17, 4096, 4096, 70_000, 3]
  rng = np.random.default_rng(0)
  leaves = []
  for i, size in enumerate(sizes):
    shape = (size // 4, 4) if size % 4 == 0 else (size,)
    x = rng.standard_normal((k, *shape)) + rng.standard_normal(shape)
    x[1] *= -1
    leaves.append(jnp.asarray(x).astype("bfloat16" if i % 4 == 3 else "float32"))
  if options:  # The first step accepts all.
    accepted, want = k, [oracle.wide(leaf).mean(0) for leaf in leaves]
  else:
    accepted, want = k - 1, oracle.gaf(leaves, 0.97).gradient
  result = reference_forms.stacked(leaves, 0.97, **options)
  assert result.accepted == accepted
  for got, expected, leaf in zip(result.gradient, want, leaves):
    assert got.dtype == leaf.dtype and got.shape == leaf.shape[1:]
    np.testing.assert_allclose(oracle.wide(got), expected, atol=4 * EPS[str(got.dtype)])


@pytest.mark.parametrize(
  "weighted, layout",
  [(True, LAYOUTS[1]), (True, LAYOUTS[2]), (False, LAYOUTS[0])],
  ids=str,
)
@pytest.mark.parametrize("form", [reference_forms.streamed, reference_forms.scanned])
def test_streamed_forms_are_the_oracles(layout, weighted, form):
  @settings(max_examples=15)
  @given(stacks(layout), taus, microbatch_weights(layout.k))
  def run(drawn, tau, weights):
    own = {"microbatch_weights": weights} if weighted else {}
    (leaves,) = drawn
    expected = oracle.gaf(leaves, tau, **own)
    is_counted = weights > 0 if weighted else True
    nonfinite = np.sum(~expected.finite & is_counted)
    event(str(check(form(leaves, tau, **own), expected, leaves, nonfinite)))

  run()


def test_streamed_rules_are_the_oracles():
  """Other sequential rule, distance and softness; in one layout."""
  layout, drawn = LAYOUTS[1], []

  @settings(max_examples=10)
  @given(stacks(layout))
  def gather(leaves):
    drawn.extend(leaves)

  gather()
  for name, kind, softness in [
    ("sequential", "euclidean", 0.1),
    ("running_average", "euclidean", 0.0),
  ]:
    soft = {"softness": softness} if softness else {}
    rule = getattr(rules, name)(kind, **soft)
    for form in (reference_forms.streamed, reference_forms.scanned):
      decided = 0
      for i, stack in enumerate(drawn):
        tau = (0.3, 0.97, 1.4)[i % 3]
        expected = oracle.gaf(stack, tau, name, kind=kind, softness=softness)
        decided += check(form(stack, tau, rule=rule), expected, stack)
      assert decided > 5


@settings(max_examples=8)
@given(stacks(LAYOUTS[1]), taus)
def test_embedding_enters_the_distances_alone(drawn, tau):
  for leaves in drawn:
    expected = oracle.gaf(leaves, tau, embed=np.sign)
    check(reference_forms.stacked(leaves, tau, embed=jnp.sign), expected, leaves)


@pytest.mark.parametrize("form", sorted(reference_forms.ALL))
def test_a_sum_that_cancels_is_zero_in_every_form(form):
  """Up to rounding of its terms; the remainder has no meaningful direction."""
  first, rest = np.random.default_rng(0).standard_normal((2, 50))
  for name, kind in [("sequential", "cosine"), ("running_average", "euclidean")]:
    for scale, distance in [(1e-4, 1.0), (1e-2, 0.0)]:
      left = scale * rest
      rows = [first, -first + left, left if kind == "cosine" else left / 2]
      rows = jnp.asarray(np.stack(rows), jnp.float32)
      rule = getattr(rules, name)(kind)
      result = reference_forms.ALL[form]([rows], 2.0, rule=rule)
      assert result.distances[2] == pytest.approx(distance, abs=1e-2)
