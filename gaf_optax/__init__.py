"""Gradient Agreement Filtering (arXiv 2412.18052) as an Optax transformation."""

from gaf_optax import rules
from gaf_optax._by_example import example_weights
from gaf_optax._gaf import (
  ApplyIfAgreedState,
  ApplyIfNonzeroState,
  apply_if_agreed,
  apply_if_nonzero,
  gaf,
)
from gaf_optax._inner_products import cosine_distance
from gaf_optax._multi_steps import MultiStepsState, multi_steps
from gaf_optax._state import Agreement, GafState, metrics, sources
from gaf_optax._threshold import (
  AdaptiveTau,
  TargetAcceptRate,
  TauQuantile,
  adaptive_tau,
  target_accept_rate,
  tau_quantile,
)
from gaf_optax._value_and_grad import value_and_grad
from gaf_optax.rules import Decision

__version__ = "0.1.0"

__all__ = [
  "AdaptiveTau",
  "Agreement",
  "ApplyIfAgreedState",
  "ApplyIfNonzeroState",
  "Decision",
  "GafState",
  "MultiStepsState",
  "TargetAcceptRate",
  "TauQuantile",
  "adaptive_tau",
  "apply_if_agreed",
  "apply_if_nonzero",
  "cosine_distance",
  "example_weights",
  "gaf",
  "metrics",
  "multi_steps",
  "rules",
  "sources",
  "target_accept_rate",
  "tau_quantile",
  "value_and_grad",
]
