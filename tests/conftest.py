"""Every test sees 8 CPU devices and JAX's strict settings."""

import contextlib
import os

import jax
import pytest
from hypothesis import Phase, settings

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
  """64-bit types are enabled during the test."""
  with contextlib.ExitStack() as stack:
    stack.callback(jax.config.update, "jax_enable_x64", False)
    jax.config.update("jax_enable_x64", True)
    yield


# The same examples each time, so that a red test is a changed program. To look for
# new ones: HYPOTHESIS_PROFILE=explore python -m pytest
settings.register_profile(
  "fixed", deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate]
)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
