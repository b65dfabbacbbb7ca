"""Drivers of kernels/ that need neither torch nor a GPU, under AddressSanitizer and UndefinedBehaviorSanitizer."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "tests" / "native"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
OPTIMISED = ["-O1", "-ffp-contract=off", "-Wno-psabi"]
SANITIZED = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

pytestmark = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux", reason="needs a C++ compiler with sanitizers"
)


def built(driver, *flags):
    """The program, compiled anew only if a source or a flag changed: its name holds a digest of them."""
    sources = sorted(p for d in (ROOT / "kernels", NATIVE) for p in d.rglob("*") if p.suffix in (".h", ".cuh", ".cpp"))
    state = hashlib.sha256(repr((COMPILER, OPTIMISED, flags)).encode())
    for path in sources:
        state.update(path.read_bytes())
    program = ROOT / "build" / "native" / f"{driver.stem}-{state.hexdigest()[:16]}"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        command = [COMPILER, *OPTIMISED, *flags, str(driver), "-o", f"{program}.new", "-lpthread"]
        subprocess.run(command, check=True, timeout=1800)  # sanitizers take ten minutes over coupling_cuda
        os.replace(f"{program}.new", program)
    return program


def run(program, rounds):
    done = subprocess.run([program, str(rounds)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    passed, failed = map(int, re.search(r"(\d+) passed, (\d+) failed", done.stdout).groups())
    assert passed > 0
    assert failed == 0


def pytest_generate_tests(metafunc):
    """One key width in `make test`, every one in `make test-full`."""
    if "key_bytes" in metafunc.fixturenames:
        metafunc.parametrize("key_bytes", [1, 2, 4, 8] if metafunc.config.getoption("--full") else [4])


@pytest.mark.parametrize("driver", sorted(NATIVE.glob("*_cpu.cpp")), ids=lambda path: path.stem)
def test_cpu_kernels(driver, key_bytes, request):
    program = built(driver, *SANITIZED, "-std=c++17", f"-DPYPERF_TEST_KEY_BYTES={key_bytes}")
    run(program, 1000 if request.config.getoption("--full") else 200)


@pytest.mark.parametrize("driver", sorted(NATIVE.glob("*_cuda.cpp")), ids=lambda path: path.stem)
def test_cuda_kernels_emulated(driver, request):
    """What a GPU would run, one thread after the other on a CPU."""
    full = request.config.getoption("--full")
    run(built(driver, *(SANITIZED if full else []), "-std=c++20"), 120 if full else 40)
