#!/usr/bin/env python3
"""Builds one wheel and one source archive, and shows that they install and compute right wherever they should.

    tools/package_check.py [--full] [--torch 2.13.0]        make package-check [FULL=1]

Each installation is a new virtual environment and runs `python -m pyperf_dl.check` from outside the source tree. With
--full also the oldest and the newest torch, an isolated build that may pick any torch, and other Pythons for the same
binary; these download several gigabytes each. Exit status 1 on a miss.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

from setup_env import requirements

ROOT = Path(__file__).resolve().parent.parent
OLDEST = "2.10.0"
OTHER_PYTHONS = ("3.10", "3.12", "3.13")
CHECK = ["-m", "pyperf_dl.check", "--quick", "--backend", "native"]


class Row(NamedTuple):
    what: str
    verdict: str
    seconds: float
    detail: str


class CheckError(Exception):
    """A command that did not end well; its last lines say why."""


def run(*command, cwd, **settings):
    """The output of a command, with some environment variables of its own."""
    environment = {**os.environ, "PYTHONPATH": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **settings}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CheckError("\n".join((done.stdout + done.stderr).strip().splitlines()[-12:]))
    return done.stdout


def find_python(version):
    """An interpreter of that version that runs, or None."""
    on_path = shutil.which(f"python{version}")
    installed = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))
    for candidate in [on_path, *installed]:
        if (
            candidate
            and subprocess.run([candidate, "-c", "import venv"], capture_output=True, check=False).returncode == 0
        ):
            return candidate
    return None


class Trial:
    """A temporary folder with a copy of the source, the archives, and one environment at a time."""

    def __init__(self, folder, torch):
        self.folder, self.torch = folder, torch
        self.source, self.dist, self.unpacked = folder / "source", folder / "dist", folder / "unpacked"
        self.rows = []

    def step(self, what, action):
        print(f"==> {what}", flush=True)
        start = time.monotonic()
        try:
            row = Row(what, "ok", 0, action() or "")
        except CheckError as problem:
            print(problem, flush=True)
            row = Row(what, "FAILED", 0, str(problem).splitlines()[-1] if str(problem) else "")
        self.rows.append(row._replace(seconds=time.monotonic() - start))

    def copy_source(self):
        listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
        for name in filter(None, listed):
            if (ROOT / name).is_file():
                target = self.source / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target)

    def build(self):
        run(
            sys.executable,
            "-m",
            "build",
            "--no-isolation",
            "--outdir",
            self.dist,
            "--wheel",
            "--sdist",
            ".",
            cwd=self.source,
        )
        with zipfile.ZipFile(self.wheel()) as archive:
            archive.extractall(self.unpacked)
        return f"{self.wheel().name}, {self.wheel().stat().st_size / 1e6:.1f} MB"

    def wheel(self):
        return next(self.dist.glob("*.whl"))

    def sdist(self):
        return next(self.dist.glob("*.tar.gz"))

    def environment(self, torch, python=sys.executable, build=False):
        """A new virtual environment with a torch, in place of the last one."""
        home = self.folder / "environment"
        shutil.rmtree(home, ignore_errors=True)
        run(python, "-m", "venv", home, cwd=self.folder)
        inside = home / "bin" / "python"
        extra = requirements("package") if build else []
        run(inside, "-m", "pip", "install", "-q", torch, *extra, cwd=self.folder)
        return inside

    def outcome(self, python, **settings):
        """What the operators say in that environment, from outside the source tree."""
        said = run(python, *CHECK, cwd=self.folder, **settings).strip().splitlines()[-1]
        facts = json.loads(run(python, "-m", "pyperf_dl.env", "--json", cwd=self.folder, **settings))
        versions, architectures = facts["versions"], " ".join(facts["binary"]["cuda_architectures"]) or "no CUDA"
        return f"{said}: Python {versions['python']}, torch {versions['torch']}, {architectures}"

    # -- the ways to install --

    def from_wheel(self, torch):
        python = self.environment(torch)
        run(python, "-m", "pip", "install", "-q", "--no-deps", self.wheel(), cwd=self.folder)
        return self.outcome(python)

    def from_sdist(self):
        python = self.environment(f"torch=={self.torch}", build=True)
        command = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", self.sdist()]
        run(python, *command, cwd=self.folder, PYPERF_CUDA="0")
        return self.outcome(python)

    def isolated(self, constrained):
        """pip makes an environment for the build alone, with a torch of its own."""
        python = self.environment(f"torch=={self.torch}")
        pins = self.folder / "constraints.txt"
        pins.write_text(f"torch=={self.torch}\n")
        settings = {"PIP_CONSTRAINT": str(pins), "PIP_BUILD_CONSTRAINT": str(pins)} if constrained else {}
        run(
            python,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            self.sdist(),
            cwd=self.folder,
            PYPERF_CUDA="0",
            **settings,
        )
        return self.outcome(python)

    def editable(self):
        python = self.environment(f"torch=={self.torch}", build=True)
        run(
            python,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-e",
            self.source,
            cwd=self.folder,
        )
        run(python, "-c", "import pyperf_dl._triton", cwd=self.folder)
        return self.outcome(python)

    def without_cuda(self):
        folder = self.folder / "without_cuda"
        command = ["-m", "build", "--no-isolation", "--wheel", "--outdir", folder, "."]
        run(sys.executable, *command, cwd=self.source, PYPERF_CUDA="0")
        python = self.environment(f"torch=={self.torch}")
        run(python, "-m", "pip", "install", "-q", "--no-deps", next(folder.glob("*.whl")), cwd=self.folder)
        return self.outcome(python)

    def prebuilt_in_tree(self):
        """As on a GPU machine: the binary is there, nothing is installed, the tree itself is imported."""
        tree = self.folder / "tree"
        shutil.copytree(self.source, tree, ignore=shutil.ignore_patterns("build", "*.so", "*.egg-info"))
        shutil.copy2(self.unpacked / "pyperf_dl" / "_C.abi3.so", tree / "pyperf_dl")
        run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, PYPERF_PREBUILT="1")
        run(sys.executable, "-c", "import pyperf_dl._triton, pyperf_dl._host", cwd=tree)
        return self.outcome(sys.executable, PYTHONPATH=str(tree))

    def other_python(self, version):
        """_C is one binary for every Python; _host, which the operators do not need, is not there."""
        interpreter = find_python(version)
        if interpreter is None:
            raise CheckError(f"no Python {version} found")
        python = self.environment(f"torch=={self.torch}", interpreter)
        return self.outcome(python, PYTHONPATH=str(self.unpacked))

    # -- what the files hold --

    def contents(self):
        names = {str(path.relative_to(self.unpacked)) for path in self.unpacked.rglob("*") if path.is_file()}
        top = {name.split("/")[0] for name in names}
        strangers = sorted(name for name in top if not name.startswith("pyperf_dl"))
        wanted = {"pyperf_dl/_C.abi3.so", "pyperf_dl/py.typed", "pyperf_dl/_triton/__init__.py"}
        if strangers or wanted - names:
            raise CheckError(f"not wanted at top level: {strangers}; missing: {sorted(wanted - names)}")
        return f"{len(names)} files"

    def no_build_path(self):
        for library in (self.unpacked / "pyperf_dl").glob("*.so"):
            text = library.read_bytes()
            for path in (str(self.folder), str(ROOT), str(Path.home()), sys.prefix):
                if path.encode() in text:
                    raise CheckError(f"{library.name} holds the path {path}")

    def abi3audit(self):
        library = self.unpacked / "pyperf_dl" / "_C.abi3.so"
        tool = Path(sys.executable).with_name("abi3audit")
        said = run(tool, "--strict", "--summary", "--assume-minimum-abi3", "3.10", library, cwd=self.folder)
        return " ".join(said.split())[-90:]

    def torch_abi_audit(self):
        library = self.unpacked / "pyperf_dl" / "_C.abi3.so"
        said = run(Path(sys.executable).with_name("torch-abi-audit"), "--check", "both", library, cwd=self.folder)
        return ", ".join(
            " ".join(line.split()) for line in said.splitlines() if re.match(r"\s+(Torch|Min|CPython)", line)
        )


def checks(trial, full):
    pinned = f"torch=={trial.torch}"
    yield "build wheel and sdist", trial.build
    yield "wheel: contents", trial.contents
    yield "wheel: no build path", trial.no_build_path
    yield "wheel: abi3audit", trial.abi3audit
    yield "wheel: torch-abi-audit", trial.torch_abi_audit
    yield f"wheel, torch {trial.torch}", lambda: trial.from_wheel(pinned)
    yield "sdist, not isolated", trial.from_sdist
    yield "sdist, isolated", lambda: trial.isolated(True)
    yield "editable, not isolated", trial.editable
    yield "wheel, PYPERF_CUDA=0", trial.without_cuda
    yield "in the tree, PYPERF_PREBUILT=1", trial.prebuilt_in_tree
    if not full:
        return
    yield f"wheel, torch {OLDEST}", lambda: trial.from_wheel(f"torch=={OLDEST}")
    yield "wheel, newest torch", lambda: trial.from_wheel("torch")
    yield "sdist, isolated, any torch", lambda: trial.isolated(False)
    for version in OTHER_PYTHONS:
        yield f"same _C, Python {version}", lambda version=version: trial.other_python(version)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="also what needs gigabytes of downloads")
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="only checks in whose name it is found, and the build"
    )
    parser.add_argument("--torch", default="2.13.0")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="package-check-") as folder:
        trial = Trial(Path(folder), options.torch)
        trial.copy_source()
        for n, (what, action) in enumerate(checks(trial, options.full)):
            if n == 0 or re.search(options.only, what):
                trial.step(what, action)
            if n == 0 and trial.rows[0].verdict != "ok":
                break
    print()
    width = max(len(row.what) for row in trial.rows)
    for row in trial.rows:
        print(f"{row.what:<{width}}  {row.verdict:<6}  {row.seconds:5.0f} s  {row.detail}")
    failed = sum(row.verdict != "ok" for row in trial.rows)
    print(f"{len(trial.rows) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
