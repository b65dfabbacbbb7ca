"""Options and markers of the test suite, and one line in the end that says what a missing GPU left untested."""

import pytest
import torch
from hypothesis import HealthCheck, settings

_unhurried = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("quick", derandomize=True, max_examples=200, **_unhurried)
settings.register_profile("long", max_examples=3000, print_blob=True, **_unhurried)
settings.load_profile("quick")  # another one: --hypothesis-profile=long


OPTIONS = {
    "--deterministic": "run under torch.use_deterministic_algorithms, which fills new memory with NaN",
    "--full": "every variant of the sanitizer drivers (make test-full)",
    "--require-gpu": "fail the GPU tests, not skip them, where there is no GPU",
}


def pytest_addoption(parser):
    group = parser.getgroup("pyperf_dl")
    for name, text in OPTIONS.items():
        group.addoption(name, action="store_true", help=text)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out of the quick check of a GPU machine")
    if config.getoption("--deterministic"):
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True


def missing_gpu():
    """Why GPU tests cannot run here; empty where they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return ""


def pytest_collection_modifyitems(config, items):
    reason = missing_gpu()
    if not reason or config.getoption("--require-gpu"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"GPU: {reason}"))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    if reason := missing_gpu():
        skipped = sum("gpu" in getattr(report, "keywords", ()) for report in terminalreporter.stats.get("skipped", []))
        terminalreporter.write_line(f"GPU tests: {skipped} skipped ({reason}); `make gpu-check` runs them")


@pytest.fixture(autouse=True)
def _same_state_after():
    """A test that leaves a global setting behind would change what the next one means."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
