"""Every form of the filter against one NumPy float64 oracle, over drawn inputs."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

import forms
import oracle
from gaf_optax import rules

SHAPES = {
  "vector": [(3,)],
  "net": [(4, 5), (5,), ()],
  "odd": [(1,), (7, 3, 2), (0, 2), (17,)],
}
# Relative rounding of a stored value, and of a distance computed from such values.
EPS = {"float32": 3e-6, "bfloat16": 1e-2, "float16": 2e-3, "complex64": 3e-6}
SPAN = {"float32": 13, "bfloat16": 13, "float16": 2, "complex64": 13}


@st.composite
def stacks(draw, dtypes=("float32", "bfloat16", "float16", "complex64")):
  """Four trees of leaves `[k, *shape]` of the same shapes, one compilation's worth.

  They have structure: a common direction, copies, opposites, bad rows, and scales
  that are the same for all rows or each row's own.
  """
  k = draw(st.sampled_from([2, 3, 5, 9]))
  shapes = SHAPES[draw(st.sampled_from(sorted(SHAPES)))]
  dtype = draw(st.sampled_from(dtypes))
  return [draw(stack(k, shapes, dtype)) for _ in range(4)]


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
kinds = st.sampled_from(["cosine", "euclidean"])
softnesses = st.sampled_from([0.0, 0.1])


def check(filtered, expected, leaves):
  dtype = str(leaves[0].dtype)
  error = 1e-5 / max(expected.condition, 1e-12)
  if expected.margin < error:
    return  # Nearer to tau than rounding: either decision is right.
  assert filtered.agreed == expected.agreed
  assert filtered.accepted == expected.accepted.sum()
  assert filtered.nonfinite == (~expected.finite).sum()
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
    # Terms that cancel leave rounding of the size of the largest of them.
    largest = np.abs(oracle.wide(leaf)[kept]).max(initial=0)
    np.testing.assert_allclose(
      oracle.wide(got), want, rtol=0, atol=EPS[dtype] * largest + 1e-37
    )


@settings(max_examples=40)
@given(
  stacks(),
  taus,
  kinds,
  softnesses,
  st.sampled_from(
    [
      "sequential",
      "running_average",
      "leave_one_out",
      "most_neighbors",
      "min_neighbors",
    ]
  ),
)
def test_stacked_form_is_the_oracles(drawn, tau, kind, softness, name):
  event(name)
  arguments = {"distance": kind}
  if name in ("running_average", "min_neighbors"):
    softness = 0.0
  else:
    arguments["softness"] = softness
  fraction = None
  if name == "min_neighbors":
    fraction = arguments["fraction"] = 0.5
  rule = getattr(rules, name)(**arguments)
  for leaves in drawn:
    expected = oracle.gaf(
      leaves, tau, name, kind=kind, softness=softness, fraction=fraction
    )
    check(forms.stacked(leaves, tau, rule=rule), expected, leaves)


@settings(max_examples=12)
@given(
  st.sampled_from([31, 32, 40]),
  st.sampled_from(["float32", "bfloat16", "complex64"]),
  st.data(),
  taus,
  kinds,
  st.sampled_from(["sequential", "running_average"]),
)
def test_stacks_of_many_are_the_oracles(k, dtype, data, tau, kind, name):
  """From 32 on they are compared with a running sum on CPU, not by the Gram matrix."""
  rule = getattr(rules, name)(kind)
  for _ in range(3):
    leaves = data.draw(stack(k, SHAPES["net"], dtype))
    expected = oracle.gaf(leaves, tau, name, kind=kind)
    check(forms.stacked(leaves, tau, rule=rule), expected, leaves)


@pytest.mark.parametrize("k", [3, 32])
@pytest.mark.parametrize("options", [{}, {"anchor_decay": 0.5}], ids=str)
def test_leaves_of_all_sizes(k, options):
  """Small leaves are joined, up to a size; large ones and other dtypes are not."""
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
  result = forms.stacked(leaves, 0.97, **options)
  assert result.accepted == accepted
  for got, expected, leaf in zip(result.gradient, want, leaves):
    assert got.dtype == leaf.dtype and got.shape == leaf.shape[1:]
    np.testing.assert_allclose(oracle.wide(got), expected, atol=4 * EPS[str(got.dtype)])


@settings(max_examples=24)
@given(
  stacks(dtypes=("float32", "bfloat16")),
  taus,
  kinds,
  softnesses,
  st.sampled_from(["sequential", "running_average"]),
  st.sampled_from(["streamed", "scanned"]),
)
def test_streamed_forms_are_the_oracles(drawn, tau, kind, softness, name, form):
  event(form)
  arguments = {"distance": kind}
  if name == "running_average":
    softness = 0.0
  else:
    arguments["softness"] = softness
  rule = getattr(rules, name)(**arguments)
  for leaves in drawn:
    expected = oracle.gaf(leaves, tau, name, kind=kind, softness=softness)
    check(forms.ALL[form](leaves, tau, rule=rule), expected, leaves)


@settings(max_examples=5)
@given(stacks(dtypes=("float32",)), taus)
def test_embedding_enters_the_distances_alone(drawn, tau):
  for leaves in drawn:
    expected = oracle.gaf(leaves, tau, embed=np.sign)
    check(forms.stacked(leaves, tau, embed=jnp.sign), expected, leaves)


@pytest.mark.parametrize("form", sorted(forms.ALL))
@settings(max_examples=5)
@given(stacks(dtypes=("float32",)))
def test_tau_2_is_the_mean_of_the_finite_ones(form, drawn):
  for leaves in drawn:
    filtered = forms.ALL[form](leaves, 2.0)
    finite = np.flatnonzero(oracle.gaf(leaves, 2.0).finite)
    assert filtered.agreed == (len(finite) > 1)
    for got, leaf in zip(filtered.gradient, leaves):
      want = np.zeros(leaf.shape[1:])
      if len(finite) > 1:
        want = oracle.wide(leaf)[finite].mean(0)
      largest = np.abs(oracle.wide(leaf)[finite]).max(initial=0)
      np.testing.assert_allclose(
        np.asarray(got), want, rtol=0, atol=3e-6 * largest + 1e-37
      )


@pytest.mark.parametrize("name", ["sequential", "running_average"])
@pytest.mark.parametrize("kind", ["cosine", "euclidean"])
@pytest.mark.parametrize("form", [*sorted(forms.ALL), "stacked, k = 40"])
@pytest.mark.parametrize("cancels", [True, False])
def test_a_sum_that_cancels_is_zero_in_every_form(form, kind, name, cancels):
  """Down to rounding of its terms: what is left has no direction to agree with."""
  rng = np.random.default_rng(0)
  first, rest = rng.standard_normal((2, 50))
  rest *= 1e-4 if cancels else 1e-2
  rows = [first, -first + rest, rest if kind == "cosine" else rest / 2]
  if "40" in form:
    rows += [first] * 37
  rows = jnp.asarray(np.stack(rows), jnp.float32)
  result = forms.ALL[form.split(",")[0]]([rows], 2.0, rule=getattr(rules, name)(kind))
  assert result.distances[2] == pytest.approx(1.0 if cancels else 0.0, abs=1e-2)
