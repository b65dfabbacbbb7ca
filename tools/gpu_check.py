#!/usr/bin/env python3
"""What a GPU machine can tell: build, checks, GPU tests, sanitizers, benchmarks. Installs nothing and needs no network.

    tools/gpu_check.py [--quick] [--out-dir bench/out]        make gpu-check [QUICK=1] [OUT_DIR=...]

The Python that runs it holds torch with CUDA, triton, pytest, hypothesis, ninja and pybind11; nvcc is on the PATH, in
CUDA_HOME or in /usr/local/cuda. With PYPERF_PREBUILT=1 the pyperf_dl/_C.abi3.so in the tree is used and not built.
Every stage has a verdict and a time limit of its own, and the next one runs whatever it was. Exit status: 0 all well,
1 a stage failed, 2 no GPU.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = {
    "memcheck": ["--leak-check=full"],
    "racecheck": ["--racecheck-report=all"],
    "initcheck": [],
    "synccheck": [],
}


class Stage(NamedTuple):
    name: str
    seconds: int  # limit
    commands: list


class Outcome(NamedTuple):
    name: str
    verdict: str
    seconds: float
    detail: str


def device():
    """(name, capability such as 90) of the GPU, or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), f"{major}{minor}"


def tool(name):
    """A program of the CUDA toolkit; its bare name where it is nowhere, so that the stage says what is missing."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = shutil.which(name) or next((p for f in folders if f and (p := shutil.which(f"{f}/bin/{name}"))), None)
    return found or name


def stages(options, capability):
    python = sys.executable
    quick = options.quick
    sizes = ["--quick"] if quick else []
    drivers = sorted((ROOT / "tests" / "native").glob("*_cuda.cu"))
    programs = [ROOT / "build" / "native" / driver.stem for driver in drivers]
    nvcc = [
        tool("nvcc"),
        "-std=c++17",
        "-O1",
        "--fmad=false",
        "-Xcompiler=-ffp-contract=off",
        "-lineinfo",
        f"-arch=sm_{capability}",
    ]
    compiled = [[*nvcc, driver, "-o", program] for driver, program in zip(drivers, programs, strict=True)]
    yield Stage("build", 120 if quick else 240, [[python, "setup.py", "build_ext", "--inplace"]])
    check = [python, "-m", "pyperf_dl.check", "--device", "cuda", *sizes]
    yield Stage("check", 40 if quick else 90, [[python, "-m", "pyperf_dl.env"], check])
    marked = "gpu and not slow" if quick else "gpu"
    pytest = [python, "-m", "pytest", "tests", "-q", "-m", marked, "--require-gpu", "-p", "no:cacheprovider"]
    yield Stage("tests", 60 if quick else 180, [pytest])
    triton = [python, "-m", "pytest", *sorted((ROOT / "tests").glob("test_triton*.py")), "-q", "-p", "no:cacheprovider"]
    if not quick:  # the check above runs Triton too
        yield Stage("triton", 90, [triton])
    yield Stage("driver", 60 if quick else 120, [*compiled, *([program] for program in programs)])
    for name in ["memcheck"] if quick else SANITIZERS:
        check = [tool("compute-sanitizer"), "--tool", name, *SANITIZERS[name], "--error-exitcode=9"]
        rounds = "4" if quick else "12"
        yield Stage(f"sanitizer {name}", 30 if quick else 60, [[*check, program, rounds] for program in programs])
    out = options.out_dir / "gpu.json"
    bench = [python, "bench/run.py", "--device", "cuda", "--quick", "--out", out]
    plot = [python, "bench/report.py", out, "--plot", options.out_dir / "gpu.svg"]
    yield Stage("benchmarks", 60 if quick else 150, [bench, plot])


def run(command, seconds, environment):
    """(exit status, last line of the output, which passes through); killed with all its children at the limit."""
    words = [str(word) for word in command]
    print(f"$ {' '.join(words)}", flush=True)
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    try:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    except OSError as error:
        return 127, f"{words[0]}: {error.strerror}"
    timer = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    process.wait()
    timer.cancel()
    return process.returncode, last


def finish(stage, deadline, environment):
    start = time.monotonic()
    limit = min(stage.seconds, deadline - start)
    if limit < 5:
        return Outcome(stage.name, "NOT RUN", 0, "the time of the whole check was used up")
    last = ""
    for command in stage.commands:
        status, last = run(command, max(1, limit - (time.monotonic() - start)), environment)
        seconds = time.monotonic() - start
        if status:
            late = seconds >= limit - 0.5 and status < 0
            return Outcome(
                stage.name, "TIME OUT" if late else "FAILED", seconds, last if not late else f"{limit:.0f} s"
            )
    return Outcome(stage.name, "ok", time.monotonic() - start, last)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="at most 3 minutes, not 8")
    parser.add_argument("--out-dir", type=Path, default=Path("bench/out"), help="where the benchmark's files go")
    options = parser.parse_args()
    found = device()
    if found is None:
        print("gpu-check: torch sees no CUDA device here, nothing was checked")
        return 2
    name, capability = found
    options.out_dir.mkdir(parents=True, exist_ok=True)
    (ROOT / "build" / "native").mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    deadline = time.monotonic() + (170 if options.quick else 470)
    outcomes = []
    for stage in stages(options, capability):
        print(f"\n=== {stage.name}", flush=True)
        outcomes.append(finish(stage, deadline, environment))
    print(f"\ngpu-check on {name} (sm_{capability})")
    for outcome in outcomes:
        print(f"  {outcome.name:<20} {outcome.verdict:<9} {outcome.seconds:6.1f} s  {outcome.detail[:90]}")
    failed = [outcome for outcome in outcomes if outcome.verdict != "ok"]
    print(f"{len(outcomes) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
