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
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
LOG = ROOT / "build" / "setup.log"
TORCH = "2.13.0"
# compiler and device query of each GPU backend: both are needed to build and to run it here
GPU_TOOLS = {"cuda": ("nvcc", "nvidia-smi"), "rocm": ("hipcc", "rocminfo"),
             "musa": ("mcc", "mthreads-gmi")}  # fmt: skip


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
    if not env.get("CMAKE_ARGS"):
        env.pop("CMAKE_ARGS", None)
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
    found = hashlib.sha256(os.environ.get("CMAKE_ARGS", "").encode())
    for folder in folders:
        for path in sorted(folder.rglob("*") if folder.is_dir() else [folder]):
            inside = path.relative_to(ROOT).parts
            if path.is_file() and not {"build", "__pycache__", "dist"} & set(inside):
                found.update(str(path.relative_to(ROOT)).encode())
                found.update(path.read_bytes())
    return found.hexdigest()


def backends() -> Iterator[tuple[str, str]]:
    """Yield (backend, why it cannot be built and run here or "")."""
    for project in sorted((ROOT / "backends").glob("*/pyproject.toml")):
        name = project.parent.name
        missing = [tool for tool in GPU_TOOLS.get(name, ()) if not shutil.which(tool)]
        if name == "cpu_amx" and os.uname().machine not in ("x86_64", "AMD64"):
            yield name, f"this CPU is {os.uname().machine}, the kernels are for x86-64"
        else:
            yield name, f"{' and '.join(missing)} not found" if missing else ""


def build_wheel(folder: Path, line: Callable[[str], None]) -> Path:
    """Build one distribution into dist/ and return its wheel."""
    stem = re.sub(r"[-.]+", "_", project_name(folder))
    for old in DIST.glob(f"{stem}-[0-9]*.whl"):
        old.unlink()
    flags = ["--no-build-isolation", "--no-deps", "--wheel-dir", str(DIST)]
    pip("wheel", "-v", str(folder), *flags, line=line)
    return next(DIST.glob(f"{stem}-[0-9]*.whl"))


def project_name(folder: Path) -> str:
    """Return the distribution's name."""
    text = (folder / "pyproject.toml").read_text()
    match = re.search(r'^name = "(.+)"', text, re.MULTILINE)
    if match is None:
        raise StepError(f"{folder}/pyproject.toml names no project")
    return match.group(1)


class Setup:
    """The steps, each with a stamp of its inputs."""

    def __init__(self, wheels_only: bool, progress: Any) -> None:
        """Plan the steps."""
        self.progress = progress
        self.install = not wheels_only
        self.stamps = Path(sys.prefix) / "opmux-setup"
        self.stamps.mkdir(exist_ok=True)

    def step(self, name: str, inputs: str, action: Callable[[Callable[[str], None]], None]) -> None:
        """Run an action unless its stamp says that its inputs are unchanged."""
        stamp = self.stamps / re.sub(r"\W+", "-", name)
        task = self.progress.add_task(name, total=None)
        if not stamp.exists() or stamp.read_text() != inputs:
            action(self.follow(task))
            stamp.write_text(inputs)
        self.progress.update(task, total=1, completed=1)

    def follow(self, task: Any) -> Callable[[str], None]:
        """Return a function that turns ninja's [3/17] into progress."""

        def line(text: str) -> None:
            found = re.search(r"\[(\d+)/(\d+)\]", text)
            if found:
                done, total = map(int, found.groups())
                self.progress.update(task, completed=done, total=total)

        return line

    def all(self) -> None:
        """Run every step."""
        groups = ["build"] + (["cli", "test"] if self.install else [])
        names = [a for g in groups for a in ("--group", str(ROOT / "pyproject.toml") + ":" + g)]
        self.step(f"torch {TORCH}", TORCH, lambda _: _torch())
        tools = f"{digest(ROOT / 'pyproject.toml')} {groups}"
        self.step("build and test tools", tools, lambda _: pip("install", "--quiet", *names))
        core = digest(ROOT / "core")
        self.step("opmux", core, partial(self.deliver, ROOT / "core"))
        for name, reason in backends():
            if reason:
                self.progress.console.print(f"not built: {name}: {reason}")
                continue
            folder = ROOT / "backends" / name
            inputs = f"{digest(folder, ROOT / 'backends' / 'common')} {interfaces()}"
            try:
                self.step(project_name(folder), inputs, partial(self.deliver, folder))
            except StepError as error:
                if name not in GPU_TOOLS:  # the others need no special hardware
                    raise
                self.progress.console.print(f"not built: {name}: {error}")

    def deliver(self, folder: Path, line: Callable[[str], None]) -> None:
        """Build a wheel and install it; core is needed to build the others."""
        wheel = build_wheel(folder, line)
        pip("install", "--quiet", "--no-deps", "--force-reinstall", wheel)
        pip("install", "--quiet", wheel)  # what it needs, torch as it stands


def _torch() -> None:
    try:
        if importlib.metadata.version("torch").split("+")[0] == TORCH:
            return
    except importlib.metadata.PackageNotFoundError:
        pass
    pip("install", "--quiet", f"torch=={TORCH}")


def interfaces() -> str:
    """Return a digest of what a backend's manifest takes from core."""
    return digest(ROOT / "core" / "src" / "opmux" / "ops", ROOT / "core/src/opmux/manifest.py")


def main() -> None:
    """Set up and say what to do next."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--wheels-only", action="store_true", help="no command line, no test tools")
    args = parser.parse_args()
    enter(args.venv.absolute())
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if not shutil.which(os.environ.get("CXX", "c++")) and not shutil.which("g++"):
        sys.exit("opmux: no C++ compiler found (tried c++, g++ and $CXX); install one, e.g. g++")
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn())  # fmt: skip
    try:
        with Progress(*columns) as progress:
            Setup(args.wheels_only, progress).all()
    except StepError as error:
        sys.exit(f"opmux: {error}")


if __name__ == "__main__":
    main()
