"""Every test sees 8 CPU devices and JAX's strict settings, and compiles quickly."""

import contextlib
import gc
import os

import jax
import pytest
from hypothesis import Phase, settings

# Scripts that test_typing.py has checked, one of them full of mistakes.
collect_ignore = ["typing"]

# Most of a test's time goes into compiling, and programs this small gain nothing from
# being optimized. Options of XLA that save time, with the values that they have
# where nobody sets them. GAF_TESTS_COMPILE=full leaves them so, as users compile.
QUICK = {
  "xla_backend_optimization_level": (0, 3),
  "xla_cpu_parallel_codegen_split_count": (1, 32),
}
if jax.__version_info__ < (0, 11):  # Newer ones end the process over it.
  QUICK["xla_cpu_use_fusion_emitters"] = (False, True)
if os.environ.get("GAF_TESTS_COMPILE", "quick") == "full":
  QUICK = {}
# Read when the first program is compiled, by the processes that tests start, too.
FLAGS = [f"--{name}={value}".lower() for name, (value, _) in QUICK.items()]
os.environ["XLA_FLAGS"] = " ".join([*FLAGS, os.environ.get("XLA_FLAGS", "")]).strip()

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def strict_promotion():
  """The library mixes no dtypes by accident."""
  with jax.numpy_dtype_promotion("strict"):
    yield


@pytest.fixture
def standard_promotion():
  """For what is not ours: Adam and schedules of Optax, and what users write."""
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.fixture
def x64():
  """64-bit types are enabled during the test."""
  with contextlib.ExitStack() as stack:
    stack.callback(jax.config.update, "jax_enable_x64", False)
    jax.config.update("jax_enable_x64", True)
    yield


@pytest.fixture
def compiled_as_users_do(monkeypatch):
  """What is lowered and compiled by hand, to look at the program, is optimized."""
  compile = jax.stages.Lowered.compile
  options = {name: usual for name, (_, usual) in QUICK.items()}
  monkeypatch.setattr(
    jax.stages.Lowered, "compile", lambda self: compile(self, compiler_options=options)
  )


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
  """Programs of a module of tests are no use to the next, and fill the memory."""
  yield
  jax.clear_caches()
  gc.collect()


# The same examples each time, so that a red test is a changed program. To look for
# new ones: HYPOTHESIS_PROFILE=explore python -m pytest
settings.register_profile(
  "fixed", deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate]
)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
