"""Gradient Agreement Filtering (arXiv 2412.18052) as an Optax transformation."""

from gaf_optax import rules
from gaf_optax._conditional import (
  ApplyIfAgreedState,
  ApplyIfNonzeroState,
  apply_if_agreed,
  apply_if_nonzero,
)
from gaf_optax._cosine_distance import cosine_distance
from gaf_optax._example_weights import example_weights
from gaf_optax._gaf import gaf
from gaf_optax._metrics import metrics, sources
from gaf_optax._multi_steps import MultiStepsState, multi_steps
from gaf_optax._on_shards import on_shards
from gaf_optax._state import Agreement, GafState
from gaf_optax._tau import adaptive_tau, target_accept_rate, tau_quantile
from gaf_optax._value_and_grad import value_and_grad
from gaf_optax._worker_momentum import WorkerMomentumState, worker_momentum
from gaf_optax.rules import Decision

__version__ = "0.1.0"

__all__ = [
  "Agreement",
  "ApplyIfAgreedState",
  "ApplyIfNonzeroState",
  "Decision",
  "GafState",
  "MultiStepsState",
  "WorkerMomentumState",
  "adaptive_tau",
  "apply_if_agreed",
  "apply_if_nonzero",
  "cosine_distance",
  "example_weights",
  "gaf",
  "metrics",
  "multi_steps",
  "on_shards",
  "rules",
  "sources",
  "target_accept_rate",
  "tau_quantile",
  "value_and_grad",
  "worker_momentum",
]
