"""`pytest --device cpu|cuda`, and the `device` fixture: every test that asks for it runs once on each device.

By default those are "cpu" (NumPy) and "strict" (the stand-in for CuPy of `strict_cupy.py`, no GPU needed); with
`--device cuda` it is "cuda" (CuPy itself), with `--device cpu` NumPy alone.

`pytest --fused` puts the engines "numba" and "blocked" in force for all tests; without it, only for those that ask for
`twins`.

Without PyTorch, the tests that compare with it are skipped, and the others run.
"""

import importlib.util
import inspect
import os
import signal
import sys
import types
from pathlib import Path

import hypothesis
import pytest
import strict_cupy

from tinylm import engines, fused, random


class _NoTorch(types.ModuleType):
    """In place of PyTorch: skips the test that uses it, or the file that uses it while it is imported."""

    def __getattr__(self, name):
        if name.startswith("__") and name != "__path__":  # asked of every module, by `inspect` for instance
            raise AttributeError(name)
        files = (Path(frame.filename).name for frame in inspect.stack(context=0))
        file = next((file for file in files if file.startswith("test_")), "tests")
        pytest.skip(f"{file}: PyTorch is not installed", allow_module_level=True)


if importlib.util.find_spec("torch") is None:
    torch = sys.modules["torch"] = _NoTorch("torch")
    sys.modules["torch_gpt"] = types.ModuleType("torch_gpt")
    sys.modules["torch_gpt"].from_tinylm = lambda *_: torch.nn

from helpers import Device  # noqa: E402  (imports PyTorch)

# The same examples in every run, without a time limit, so that failures are reproducible.
hypothesis.settings.register_profile(
    "tinylm",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "10")),
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tinylm")


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda"), help="run the tests of ops and layers on this device alone")
    parser.addoption("--fused", action="store_true", help="run all tests with the fused CPU twins (needs numba)")


def pytest_configure(config):
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background; the tests of Ctrl-C need it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--device") == "cuda":
        try:
            import cupy

            cupy.zeros(1)
        except Exception as error:
            raise pytest.UsageError(f"--device cuda: CuPy does not answer: {error}") from None
    if config.getoption("--fused"):
        try:
            fused.load("numba", "blocked", tell=lambda message: None)
        except ValueError as error:
            raise pytest.UsageError(f"--fused: {error}") from None


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--device")
        metafunc.parametrize("device", [chosen] if chosen else ["cpu", "strict"], indirect=True)


@pytest.fixture
def device(request, monkeypatch):
    """The `Device` of this run of the test."""
    if request.param == "strict":
        monkeypatch.setitem(sys.modules, "cupy", strict_cupy.module)
    return Device("cpu" if request.param == "cpu" else "cuda")


@pytest.fixture(autouse=True)
def _seeded():
    """Seed the random streams, so that no test depends on the tests before it."""
    random.seed(0)


@pytest.fixture
def strict_cupy_module(monkeypatch):
    """The stand-in for CuPy in force, where a test needs both devices at once."""
    monkeypatch.setitem(sys.modules, "cupy", strict_cupy.module)
    return strict_cupy.module


@pytest.fixture
def twins():
    """The engines "numba" and "blocked" in force, for this test alone; without MKL's product."""
    try:
        for name in ("numba", "blocked"):
            fused.register(name)
    except ImportError as error:
        pytest.skip(f'the engine "numba" is not installed, pip install "tinylm[fast]": {error}')
    with engines("numba", "blocked"):
        yield
