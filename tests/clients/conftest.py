"""Training scripts run with JAX's default settings."""

import jax
import pytest


@pytest.fixture(autouse=True)
def usual_settings():
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield
