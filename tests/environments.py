# SPDX-License-Identifier: Apache-2.0
"""Python environments as an author of a backend has them: core from this checkout, nothing else.

torch and the tools come from the environment of the tests, so that one is made in seconds and
without network; the distributions of this project do not, but for the CPU backend.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("opmux", "_opmux", "__editable__")


def links(folder: Path, keep: str = "") -> Path:
    """Fill a folder with links to all that is installed but ours; ``keep`` names what stays."""
    folder.mkdir()
    for place in sys.path:
        if Path(place).name not in ("site-packages", "dist-packages"):
            continue
        for item in sorted(Path(place).iterdir()):
            ours = item.name.startswith(OURS) and not (keep and item.name.startswith(keep))
            link = folder / item.name
            if not ours and item.suffix != ".pth" and not link.exists():
                link.symlink_to(item)
    return folder


def tools(folder: Path) -> Path:
    """Return a folder for PATH: this Python, and pytest."""
    folder.mkdir()
    python = f'#!/bin/sh\nexec "{sys._base_executable}" "$@"\n'
    # a package that is linked looks installed, so pip writes no script for it
    pytest = "#!/usr/bin/env python3\nimport pytest\nraise SystemExit(pytest.console_main())\n"
    texts = {"python": python, "python3": python, "pytest": pytest}
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def run(
    command: list[str | Path], folder: Path, env: dict[str, str], check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a command; raise AssertionError with its output when it fails."""
    done = subprocess.run(
        [str(c) for c in command], cwd=folder, env=env, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    shown = " ".join(str(c) for c in command)
    assert not check or done.returncode == 0, f"{shown}\n{done.stdout[-6000:]}"
    return done


class Environment:
    """A virtual environment with opmux, the tools of authors, and the CPU backend if it is here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wheels = folder / "wheels"
        self.python = folder / "env" / "bin" / "python"
        self.env = {
            **os.environ,
            "PATH": os.pathsep.join(
                [str(self.python.parent), str(tools(folder / "tools")), os.environ["PATH"]]
            ),
            "OMP_NUM_THREADS": "1",  # small tensors: a second thread only waits
            "OPMUX_CUDA_ARCHS": "90a",  # one, for the time that it takes
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }
        for name in ("PYTHONPATH", "VIRTUAL_ENV", "OPMUX_BACKENDS"):
            self.env.pop(name, None)
        venv.create(folder / "env", symlinks=True)
        site = next((folder / "env" / "lib").glob("python*/site-packages"))
        kept = links(folder / "links", keep="opmux_cpu_amx")
        (site / "links.pth").write_text(f"{kept}\n")
        self.install(self.build(ROOT / "core"))

    def run(
        self, *command: str | Path, cwd: Path | None = None, check: bool = True, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the environment."""
        return run(list(command), cwd or self.folder, {**self.env, **env}, check)

    def build(self, project: Path) -> Path:
        """Build a wheel without network and return it."""
        flags = ["--no-build-isolation", "--no-deps", "--wheel-dir", self.wheels]
        name = re.search(r'^name = "(.+)"', (project / "pyproject.toml").read_text(), re.MULTILINE)
        assert name is not None, project
        self.run(self.python, "-m", "pip", "wheel", *flags, project)
        made = list(self.wheels.glob(f"{name[1].replace('-', '_')}-[0-9]*.whl"))
        assert len(made) == 1, made
        return made[0]

    def install(self, wheel: Path, *args: str | Path) -> None:
        """Install a wheel; what it needs is here."""
        self.run(self.python, "-m", "pip", "install", "--quiet", "--no-deps", *args, wheel)

    def pytest(self, *args: str | Path, cwd: Path | None = None, **env: str) -> str:
        """Run pytest and return its last lines."""
        quiet = ("-q", "-rs", "-p", "no:cacheprovider")
        return self.run(self.python, "-m", "pytest", *quiet, *args, cwd=cwd, **env).stdout[-3000:]

    def conform(self, backend: str, *args: str | Path, cwd: Path | None = None, **env: str) -> str:
        """Run the conformance kit and return its last lines."""
        kit = ("--pyargs", "opmux.conformance", "--opmux-backend", backend)
        return self.pytest(*kit, *args, cwd=cwd, **env)


Job = Callable[..., Any]


def job(work: Job) -> Callable[[Job], Job]:
    """Run ``work(author, folder, *parameters)`` beside other jobs; the test gets ``outcome``."""

    def mark(test: Job) -> Job:
        test.job = work  # type: ignore[attr-defined]
        return test

    return mark


@pytest.fixture(scope="session")
def author(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Return an environment that all tests share."""
    return Environment(tmp_path_factory.mktemp("author"))


@pytest.fixture(scope="module")
def jobs(
    author: Environment, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Any]]]:
    """Start the jobs of a file's tests, two at a time: each waits for processes."""
    items = [i for i in request.session.items if getattr(i, "module", None) is request.module]
    with ThreadPoolExecutor(2) as pool:
        yield {
            item.nodeid: pool.submit(
                item.function.job, author, tmp_path_factory.mktemp("job"),  # type: ignore[attr-defined]
                *(item.callspec.params.values() if hasattr(item, "callspec") else ()),
            )
            for item in items
            if hasattr(getattr(item, "function", None), "job")
        }  # fmt: skip


@pytest.fixture
def outcome(jobs: dict[str, Future[Any]], request: pytest.FixtureRequest) -> Any:
    """Return what the test's job returned, or raise what it raised."""
    return jobs[request.node.nodeid].result()
