# SPDX-License-Identifier: Apache-2.0
"""``opmux conform``: run the conformance kit on a backend and keep its report."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from opmux import record

_POLICY = ("OPMUX_CONFIG", "OPMUX_BACKENDS", "OPMUX_ON_UNSUPPORTED", "OPMUX_REQUIRE_CONFORMANCE")


@click.command()
@click.argument("backend")
@click.option(
    "--level", default=record.LAST, show_default=True, type=click.IntRange(0, record.LAST),
    help="Run levels 0 to this one.",
)  # fmt: skip
@click.option("--op", "ops", multiple=True, help="Test this op only; may be repeated.")
@click.option(
    "--report", type=click.Path(dir_okay=False, path_type=Path), help="Write the report here, too."
)
def conform(backend: str, level: int, ops: tuple[str, ...], report: Path | None) -> None:
    """Test BACKEND against what its kernels claim, and keep the report for the policy.

    A whole run is what require_conformance in opmux.toml asks for.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "conformance.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                   "-c", str(Path(scratch) / "pytest.ini"), "--pyargs", "opmux.conformance",
                   "--opmux-backend", backend, "--opmux-level", str(level),
                   "--opmux-report", str(path)]  # fmt: skip
        (Path(scratch) / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
        # The policy of this folder may refuse the very backend that is to be tested.
        (Path(scratch) / "opmux.toml").touch()
        env = {k: v for k, v in os.environ.items() if not k.startswith(_POLICY)}
        env["OPMUX_CONFIG"] = str(Path(scratch) / "opmux.toml")
        for op in ops:
            command += ["--opmux-op", op]
        done = subprocess.run(command, env=env, check=False)
        if path.exists():
            if report is not None:
                shutil.copyfile(path, report)
            kept = None if ops else record.keep(path)
            click.echo(f"report kept in {kept}" if kept else "the report was not kept")
    sys.exit(done.returncode)
