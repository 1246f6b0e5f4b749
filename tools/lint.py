# SPDX-License-Identifier: Apache-2.0
"""Run every checker over the files that git knows; stop at nothing, fail if any fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def tracked(*patterns: str) -> list[str]:
    """Return tracked files and new ones that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [name for name in listed.stdout.split() if (ROOT / name).is_file()]


def main() -> None:
    """Install the linters when they are missing, then run them."""
    if not (BIN / "typos").exists():
        group = f"{ROOT / 'pyproject.toml'}:lint"
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--group", group]
        subprocess.run(install, check=True)
    native = tracked("*.cpp", "*.h", "*.cu", "*.cuh")
    shell = [*tracked("*.sh"), *tracked(".ci/run")]
    checks: list[list[str]] = [
        ["ruff", "format", "--check", "."],
        ["ruff", "check", "."],
        ["mypy"],
        ["clang-format", "--dry-run", "--Werror", *native],
        ["typos"],
        ["python", "tools/generate.py", "--check"],
        ["shellcheck", *shell],
    ]
    failed = []
    for command in checks:
        print("+", *command[:3], "..." if len(command) > 3 else "", flush=True)
        if subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT, check=False).returncode:
            failed.append(command[0])
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    print(f"{len(checks)} passed, 0 failed")


if __name__ == "__main__":
    main()
