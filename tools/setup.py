# SPDX-License-Identifier: Apache-2.0
"""Set up a virtual environment: torch, core, and every backend that this machine can build.

Needs only Python >= 3.10 and a C++ compiler. Steps whose inputs have not changed are skipped.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
LOG = ROOT / "build" / "setup.log"
TORCH = "2.13.0"
# compiler and device query of each GPU backend: one is needed to build it, both to run it here
GPU_TOOLS = {"cuda": ("nvcc", "nvidia-smi"), "rocm": ("hipcc", "rocminfo"),
             "musa": ("mcc", "mthreads-gmi")}  # fmt: skip
# the dependency groups that bring a compiler
COMPILERS = {"cuda": "nvcc"}
# what changes a build beside the sources
SETTINGS = ("CMAKE_ARGS", "OPMUX_CUDA_ARCHS")


class StepError(Exception):
    """A step that failed, with what the user should read."""


def enter(folder: Path) -> None:
    """Create the virtual environment and continue inside it."""
    python = folder / "bin" / "python"
    if Path(sys.prefix).resolve() == folder.resolve():
        return
    if sys.version_info < (3, 10):  # noqa: UP036 - this script may meet an older Python
        sys.exit(f"opmux needs Python >= 3.10, this is {sys.version.split()[0]}")
    if not python.exists():
        print(f"creating the virtual environment {folder.name}", flush=True)
        venv.create(folder, with_pip=True)
    has_rich = subprocess.run([python, "-c", "import rich"], capture_output=True, check=False)
    if has_rich.returncode:
        print("installing pip and rich", flush=True)
        install = ["-m", "pip", "install", "--quiet", "--upgrade", "pip>=25.1", "rich>=13"]
        subprocess.run([python, *install], check=True)
    os.execv(python, [str(python), *sys.argv])


def run(command: list[str | Path], line: Callable[[str], None] = lambda _: None) -> None:
    """Run a command, keep its output in the log, and show its end when it fails."""
    LOG.parent.mkdir(exist_ok=True)
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "NINJA_STATUS": "[%f/%t] "}
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    env["CMAKE_BUILD_PARALLEL_LEVEL"] = jobs
    for name in SETTINGS:
        if not env.get(name):
            env.pop(name, None)
    tail: list[str] = []
    with LOG.open("a") as log, subprocess.Popen(
        [str(c) for c in command], cwd=ROOT, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        for text in process.stdout or ():
            log.write(text)
            tail = [*tail[-29:], text]
            line(text)
    if process.returncode:
        raise StepError(
            f"{' '.join(str(c) for c in command)} failed:\n{''.join(tail)}\nThe whole log: {LOG}"
        )


def pip(*args: str | Path, line: Callable[[str], None] = lambda _: None) -> None:
    """Run pip of this environment."""
    run([sys.executable, "-m", "pip", *args], line)


def digest(*folders: Path) -> str:
    """Return a digest of the sources that a step depends on."""
    found = hashlib.sha256(str([os.environ.get(name, "") for name in SETTINGS]).encode())
    for folder in folders:
        for path in sorted(folder.rglob("*") if folder.is_dir() else [folder]):
            inside = path.relative_to(ROOT).parts
            if path.is_file() and not {"build", "__pycache__", "dist"} & set(inside):
                found.update(str(path.relative_to(ROOT)).encode())
                found.update(path.read_bytes())
    return found.hexdigest()


def backends(asked: frozenset[str], wheels_only: bool) -> Iterator[tuple[str, str]]:
    """Yield (backend, why it is not built or "").

    A GPU backend is built where it can run, for wheels where it can be compiled, and when asked
    for by name.
    """
    projects = [p.parent.name for p in sorted((ROOT / "backends").glob("*/pyproject.toml"))]
    unknown = asked - set(projects)
    if unknown:
        raise StepError(f"no backend is called {', '.join(sorted(unknown))}: {', '.join(projects)}")
    for name in projects:
        tools = GPU_TOOLS.get(name, ())
        needed = tools[:1] if wheels_only or name in asked else tools
        missing = [tool for tool in needed if not shutil.which(tool)]
        if name == "cpu_amx" and os.uname().machine not in ("x86_64", "AMD64"):
            yield name, f"this CPU is {os.uname().machine}, the kernels are for x86-64"
        elif not missing or (name in asked and name in COMPILERS):
            yield name, ""
        elif name in asked:
            raise StepError(f"{name} cannot be built: {missing[0]} not found")
        else:
            hint = f" (BACKENDS={name} builds it all the same)" if name in COMPILERS else ""
            yield name, f"{' and '.join(missing)} not found{hint}"


def build_wheel(folder: Path, line: Callable[[str], None]) -> None:
    """Build one distribution into dist/."""
    for old in wheels(folder):
        old.unlink()
    flags = ["--no-build-isolation", "--no-deps", "--wheel-dir", str(DIST)]
    pip("wheel", "-v", str(folder), *flags, line=line)


def wheels(folder: Path) -> list[Path]:
    """Return the wheels of a distribution in dist/."""
    return list(DIST.glob(f"{re.sub(r'[-.]+', '_', project_name(folder))}-[0-9]*.whl"))


def project_name(folder: Path) -> str:
    """Return the distribution's name."""
    text = (folder / "pyproject.toml").read_text()
    match = re.search(r'^name = "(.+)"', text, re.MULTILINE)
    if match is None:
        raise StepError(f"{folder}/pyproject.toml names no project")
    return match.group(1)


class Setup:
    """The steps, each with a stamp of its inputs."""

    def __init__(self, wheels_only: bool, asked: frozenset[str], progress: Any) -> None:
        """Plan the steps."""
        self.progress = progress
        self.install = not wheels_only
        self.asked = asked
        self.stamps = Path(sys.prefix) / "opmux-setup"
        self.stamps.mkdir(exist_ok=True)

    def step(
        self,
        name: str,
        inputs: str,
        action: Callable[[Callable[[str], None]], None],
        made: bool = True,
    ) -> None:
        """Run an action unless its stamp says that its inputs are unchanged, and all is made."""
        stamp = self.stamps / re.sub(r"\W+", "-", name)
        task = self.progress.add_task(name, total=None)
        if not made or not stamp.exists() or stamp.read_text() != inputs:
            action(self.follow(task))
            stamp.write_text(inputs)
        self.progress.update(task, total=1, completed=1)

    def follow(self, task: Any) -> Callable[[str], None]:
        """Return a function that turns ninja's [3/17] into progress, in a log into a few lines."""
        console, name, shown = self.progress.console, self.progress.tasks[task].description, 0
        if not console.is_terminal:
            console.print(f"{name} ...")

        def line(text: str) -> None:
            nonlocal shown
            found = re.search(r"\[(\d+)/(\d+)\]", text)
            if found:
                done, total = map(int, found.groups())
                self.progress.update(task, completed=done, total=total)
                if not console.is_terminal and 4 * done // total > shown:
                    shown = 4 * done // total
                    console.print(f"{name} {done}/{total}")

        return line

    def all(self) -> None:
        """Run every step."""
        groups = ["build"] + (["cli", "test"] if self.install else [])
        self.step(f"torch {TORCH}", TORCH, lambda _: _torch())
        self.tools("build and test tools", *groups)
        shipped = [ROOT / "backends/common" / part for part in ("cmake", "include")]
        # builds the others' manifest
        self.deliver(ROOT / "core", digest(ROOT / "core", *shipped), install=True)
        for name, reason in backends(self.asked, not self.install):
            folder = ROOT / "backends" / name
            if reason:
                self.progress.console.print(f"not built: {name}: {reason}")
                if self.install and installed(folder):  # of older sources
                    pip("uninstall", "--quiet", "--yes", project_name(folder))
                continue
            inputs = f"{digest(folder, ROOT / 'backends' / 'common')} {interfaces()}"
            try:
                if name in COMPILERS and not shutil.which(GPU_TOOLS[name][0]):
                    self.tools(f"compiler of {name}", COMPILERS[name])
                self.deliver(folder, inputs, self.install)
            except StepError as error:
                if name not in GPU_TOOLS or name in self.asked or not self.install:
                    raise
                self.progress.console.print(f"not built: {name}: {error}")

    def tools(self, title: str, *groups: str) -> None:
        """Install dependency groups of the workspace."""
        names = [a for g in groups for a in ("--group", f"{ROOT / 'pyproject.toml'}:{g}")]
        inputs = f"{digest(ROOT / 'pyproject.toml')} {groups}"
        self.step(title, inputs, lambda _: pip("install", "--quiet", *names))

    def deliver(self, folder: Path, inputs: str, install: bool) -> None:
        """Build a wheel into dist/ and install it."""
        name = project_name(folder)
        made = bool(wheels(folder))
        self.step(name, inputs, lambda line: build_wheel(folder, line), made)
        if not install:
            return

        def into_venv(_: Callable[[str], None]) -> None:
            wheel = wheels(folder)[0]
            pip("install", "--quiet", "--no-deps", "--force-reinstall", wheel)
            pip("install", "--quiet", wheel)  # what it needs, torch as it stands

        self.step(f"{name} installed", inputs, into_venv, made and installed(folder))


def installed(folder: Path) -> bool:
    """Whether a distribution is in this environment."""
    try:
        return bool(importlib.metadata.version(project_name(folder)))
    except importlib.metadata.PackageNotFoundError:
        return False


def _torch() -> None:
    try:
        if importlib.metadata.version("torch").split("+")[0] == TORCH:
            return
    except importlib.metadata.PackageNotFoundError:
        pass
    pip("install", "--quiet", f"torch=={TORCH}")


def interfaces() -> str:
    """Return a digest of what a backend's manifest takes from core."""
    return digest(ROOT / "core" / "src" / "opmux" / "ops", ROOT / "core/src/opmux/manifest")


def main() -> None:
    """Set up and say what to do next."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--wheels-only", action="store_true", help="no command line, no test tools")
    parser.add_argument("--backends", default="", help="build these too: names, by commas")
    args = parser.parse_args()
    enter(args.venv.absolute())
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if not shutil.which(os.environ.get("CXX", "c++")) and not shutil.which("g++"):
        sys.exit("opmux: no C++ compiler found (tried c++, g++ and $CXX); install one, e.g. g++")
    asked = frozenset(filter(None, re.split(r"[\s,]+", args.backends)))
    if args.wheels_only and os.environ.get("OPMUX_CUDA_ARCHS"):  # who names GPUs wants that wheel
        asked |= {"cuda"}
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn())  # fmt: skip
    try:
        with Progress(*columns) as progress:
            Setup(args.wheels_only, asked, progress).all()
    except StepError as error:
        sys.exit(f"opmux: {error}")


if __name__ == "__main__":
    main()
