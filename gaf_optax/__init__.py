"""Gradient Agreement Filtering (arXiv 2412.18052) as an Optax transformation."""

from gaf_optax import rules
from gaf_optax._gaf import ApplyIfAgreedState, apply_if_agreed, gaf
from gaf_optax._inner_products import cosine_distance
from gaf_optax._multi_steps import MultiStepsState, multi_steps
from gaf_optax._state import GafState, metrics
from gaf_optax._threshold import TargetAcceptRate, target_accept_rate
from gaf_optax._value_and_grad import Agreement, value_and_grad
from gaf_optax.rules import Decision

__version__ = "0.1.0"

__all__ = [
  "Agreement",
  "ApplyIfAgreedState",
  "Decision",
  "GafState",
  "MultiStepsState",
  "TargetAcceptRate",
  "apply_if_agreed",
  "cosine_distance",
  "gaf",
  "metrics",
  "multi_steps",
  "rules",
  "target_accept_rate",
  "value_and_grad",
]
