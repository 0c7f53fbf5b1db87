"""Eight virtual CPU devices for every test, 64-bit mode for those that ask, no plots on a screen."""

import gc
import importlib.metadata
import os
import pathlib

os.environ.setdefault("MPLBACKEND", "Agg")
# Workers and later runs share what they compile.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"))
if importlib.metadata.version("jaxlib").startswith(("0.9.", "0.10.")):
    # XLA's older code generator for CPUs compiles in half the time; later versions do without it, and refuse the flag.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"

import jax
import pytest
from hypothesis import settings

gc.set_threshold(200_000, 50, 100)  # traces are many objects that live long: the default takes a quarter of the time
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # the suite's time is compilation, of tiny programs
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
settings.register_profile("deterministic", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("deterministic")


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps():
    """Drop compiled programs before there are too many: each takes maps, and Linux gives a process 65,530 of them."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 40_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """Run the test in 64-bit mode."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def hard_mode():
    """Refuse implicit dtype and rank promotion: for our own modules, which some optax optimizers do not survive."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
