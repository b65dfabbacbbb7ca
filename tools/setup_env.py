#!/usr/bin/env python3
"""Makes the virtual environment for one task: torch, what pyproject.toml asks for, and pyperf_dl itself, editable.

    tools/setup_env.py [--venv .venv] [--torch 2.13.0] package|test|bench|lint

Each step is done again only when what it was made from changed. Standard library only.
"""

import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_TORCH = ("lint",)
WITHOUT_PACKAGE = ("lint", "package")


def say(text):
    print(f"==> {text}", flush=True)


def load_project():
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements(task):
    """What the task needs beside torch, which is pinned."""
    project = load_project()
    wanted = list(project["project"]["optional-dependencies"].get(task, []))
    if task not in WITHOUT_TORCH:
        wanted += project["build-system"]["requires"]
    if task not in WITHOUT_PACKAGE:
        wanted += project["project"]["dependencies"]
    return sorted({line for line in wanted if not line.startswith("torch>")})


def alone(task):
    """What is installed without its own requirements."""
    return load_project()["tool"]["pyperf_dl"]["alone"].get(task, [])


def digest(*parts):
    text = hashlib.sha256()
    for part in parts:
        text.update(part if isinstance(part, bytes) else str(part).encode())
        text.update(b"\0")
    return text.hexdigest()


class Environment:
    def __init__(self, folder, torch):
        self.folder, self.torch = folder, torch
        self.python = folder / "bin" / "python"

    def run(self, *command):
        environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
        subprocess.run([str(self.python), *command], cwd=ROOT, check=True, env=environment, stdin=subprocess.DEVNULL)

    def once(self, step, state, label, action):
        """Runs an action unless it ended well for the same state before."""
        stamp = self.folder / f"pyperf-{step}.stamp"
        if stamp.exists() and stamp.read_text() == state:
            return
        say(label)
        action()
        stamp.write_text(state)

    def create(self):
        if self.python.exists() and subprocess.run([self.python, "-c", ""], check=False).returncode == 0:
            return
        say(f"virtual environment {self.folder} with Python {sys.version.split()[0]}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", self.folder], check=True)

    def install_torch(self):
        command = ("-m", "pip", "install", f"torch=={self.torch}")
        self.once("torch", self.torch, f"torch {self.torch}", lambda: self.run(*command))

    def install_requirements(self, task):
        wanted = requirements(task)
        command = ["-m", "pip", "install", *wanted]
        if task not in WITHOUT_TORCH:
            command.append(f"torch=={self.torch}")  # whatever they ask for, no other torch comes in
        label = f"packages for {task}: {', '.join(wanted)}"
        self.once(task, digest(self.torch, *wanted), label, lambda: self.run(*command))
        if found := alone(task):
            command_alone = ("-m", "pip", "install", "--no-deps", *found)
            self.once(f"{task}-alone", digest(*found), f"alone: {', '.join(found)}", lambda: self.run(*command_alone))

    def install_package(self):
        if not all(any(ROOT.glob(f"pyperf_dl/{name}.*.so")) for name in ("_C", "_host")):
            (self.folder / "pyperf-package.stamp").unlink(missing_ok=True)
        sources = [ROOT / "setup.py", ROOT / "pyproject.toml"]
        sources += sorted(p for d in ("csrc", "kernels") for p in (ROOT / d).rglob("*") if p.suffix in SOURCE_SUFFIXES)
        settings = [os.environ.get(name, "") for name in ("PYPERF_CUDA", "PYPERF_CUDA_ARCHS", "CXX", "CUDA_HOME")]
        state = digest(self.torch, *settings, *(p.read_bytes() for p in sources))
        self.once("package", state, "building pyperf_dl", self.build_package)

    def build_package(self):
        """pip's own lines hide the compiler's; keep them all in a file and show ours."""
        log = self.folder / "pyperf-build.log"
        command = [self.python, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", "-e", "."]
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        with log.open("w") as file:
            for line in process.stdout:
                file.write(line)
                if line.lstrip().startswith("[pyperf_dl]"):
                    print(f"    {line.strip().removeprefix('[pyperf_dl] ')}", flush=True)
        if process.wait():
            print(log.read_text()[-8000:])
            sys.exit(f"building pyperf_dl failed; all of the log is in {log}")


SOURCE_SUFFIXES = (".h", ".hpp", ".cuh", ".cpp", ".cu")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["package", "test", "bench", "lint"])
    parser.add_argument("--venv", type=Path, default=Path(".venv"))
    parser.add_argument("--torch", default="2.13.0")
    options = parser.parse_args()
    if sys.version_info < (3, 10):  # noqa: UP036 - whoever runs make may have any python3
        sys.exit(f"pyperf_dl needs Python 3.10 or newer, this is {sys.version.split()[0]}: try make PYTHON=python3.11")
    environment = Environment(ROOT / options.venv, options.torch)
    try:
        environment.create()
        if options.task not in WITHOUT_TORCH:
            environment.install_torch()
        environment.install_requirements(options.task)
        if options.task not in WITHOUT_PACKAGE:
            environment.install_package()
    except subprocess.CalledProcessError as error:
        sys.exit(f"set-up failed: {' '.join(map(str, error.cmd))}")


if __name__ == "__main__":
    main()
