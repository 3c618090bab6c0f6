"""All tests run on 8 CPU devices with JAX's strict settings, and compile quickly."""

import contextlib
import gc
import os

import jax
import pytest
from hypothesis import Phase, settings

# Scripts for type checkers (test_typing.py), one of them full of mistakes.
collect_ignore = ["typing"]

# Tests spend most of their time compiling, and such small programs gain nothing from
# optimization. XLA options that save time, with their default values, which
# GAF_TESTS_COMPILE=full keeps.
QUICK = {
  "xla_backend_optimization_level": (0, 3),
  "xla_cpu_parallel_codegen_split_count": (1, 32),
}
if jax.__version_info__ < (0, 11):  # Newer versions abort on this option.
  QUICK["xla_cpu_use_fusion_emitters"] = (False, True)
if os.environ.get("GAF_TESTS_COMPILE", "quick") == "full":
  QUICK = {}
# JAX reads this at the first compilation, also in processes that tests start.
FLAGS = [f"--{name}={value}".lower() for name, (value, _) in QUICK.items()]
os.environ["XLA_FLAGS"] = " ".join([*FLAGS, os.environ.get("XLA_FLAGS", "")]).strip()

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def strict_promotion():
  with jax.numpy_dtype_promotion("strict"):
    yield


@pytest.fixture
def standard_promotion():
  """For code outside the library: Optax's Adam and schedules, and user code."""
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.fixture
def x64():
  with contextlib.ExitStack() as stack:
    stack.callback(jax.config.update, "jax_enable_x64", False)
    jax.config.update("jax_enable_x64", True)
    yield


@pytest.fixture
def compiled_as_users_do(monkeypatch):
  """Programs that the test compiles itself, to inspect them, are optimized."""
  compile = jax.stages.Lowered.compile
  options = {name: usual for name, (_, usual) in QUICK.items()}
  monkeypatch.setattr(
    jax.stages.Lowered, "compile", lambda self: compile(self, compiler_options=options)
  )


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
  """Test modules share no programs, and cached ones fill the memory."""
  yield
  jax.clear_caches()
  gc.collect()


# The same examples each time, so that a test fails only if the program changed. For new
# examples: HYPOTHESIS_PROFILE=explore python -m pytest
settings.register_profile(
  "fixed", deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate]
)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
