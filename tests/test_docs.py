# SPDX-License-Identifier: Apache-2.0
"""The documentation holds: every command in it is run, in order, as it stands.

A comment before a block says what it is: ``<!-- run -->``, ``<!-- file: PATH -->`` for one that the
reader saves, or ``<!-- not run: REASON -->``. Blocks of a page run in one shell, in a new folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from environments import ROOT, Environment, job, links, run
from opmux.kernel import Code

DOCS = ROOT / "docs"
GUIDE = "backends/first.md"
COMMANDS = ("sh", "bash", "console", "python")
# written by tools/generate.py
GENERATED = ("abi-matrix.md", "check-abi.md", "errors.md", "hosts.md", "ops.md")
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[^>]+?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    mark: str

    @property
    def is_command(self) -> bool:
        return self.language in COMMANDS and not self.mark.startswith("file: ")


def blocks(page: Path) -> list[Block]:
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(b["language"], b["text"], b["mark"] or "") for b in found]


def pages() -> list[str]:
    names = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    return [n for n in names if not n.startswith("adr/") and n not in GENERATED]


def script(page: str) -> str:
    """Return the page's blocks as a shell script that stops at the first error."""
    parts = ["set -euo pipefail"]
    for number, block in enumerate(blocks(DOCS / page)):
        end = f"END_OF_BLOCK_{number}"
        if block.mark.startswith("file: "):
            parts.append(f"cat > {block.mark.removeprefix('file: ')} <<'{end}'\n{block.text}{end}")
        elif block.mark == "run" and block.language == "python":
            parts.append(f"python - <<'{end}'\n{block.text}{end}")
        elif block.mark == "run":
            parts.append(block.text)
    return "\n".join(parts) + "\necho the last command was run\n"


RUNNABLE = [p for p in pages() if any(b.mark == "run" for b in blocks(DOCS / p))]


@pytest.mark.parametrize("page", pages())
def test_every_command_is_run_or_says_why_not(page: str) -> None:
    for block in blocks(DOCS / page):
        assert block.language, f"{page}: a block without a language:\n{block.text}"
        if block.is_command:
            reason = block.mark.removeprefix("not run: ")
            good = block.mark == "run" or (block.mark != reason and len(reason.split()) > 3)
            assert good, f"{page}: mark this block:\n{block.text}"


def run_page(author: Environment, folder: Path, page: str) -> str:
    return author.run("bash", "-c", script(page), cwd=folder).stdout


@job(run_page)
@pytest.mark.parametrize("page", [p for p in RUNNABLE if p != GUIDE])
def test_the_commands_of_a_page(outcome: str, page: str) -> None:
    # the pages for users name the CPU backend; without it, its name is still known
    assert outcome.endswith("the last command was run\n")


def follow_the_guide(author: Environment, folder: Path) -> tuple[Path, str]:
    """In a fresh environment: a Python, with torch and tools for pip to find."""
    home = folder / "home"
    home.mkdir()
    env = author.env | {
        "PATH": os.pathsep.join([str(author.folder / "tools"), "/usr/local/bin:/usr/bin:/bin"]),
        "PYTHONPATH": str(links(folder / "links")),
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
    }
    return home, run(["bash", "-c", script(GUIDE)], home, env).stdout


@job(follow_the_guide)
def test_the_guide_followed_literally_ends_with_a_passing_report(
    outcome: tuple[Path, str],
) -> None:
    home, text = outcome
    assert text.endswith("the last command was run\n")
    report = json.loads((home / "opmux-acme/conformance.json").read_text())
    assert report["passed"] and report["level"] == 7
    assert set(report["ops"]) == {"rmsnorm", "silu_and_mul"}
    assert list(home.glob("opmux-acme/dist/opmux_acme-0.1.0-py3-none-*.whl"))


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    for name in [*pages(), "errors.md", "ops.md"]:
        page = DOCS / name
        for target in re.findall(r"\]\(([^)#\s]+\.md)(?:#[\w-]+)?\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{name}: {target}")
    assert not broken, broken


def test_the_error_catalogue_has_every_code() -> None:
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    for code in Code:
        assert f"\n## {code.value}\n\n`Code.{code.name}`: {code.meaning}\n" in text


def test_the_site_builds_without_network(author: Environment, tmp_path: Path) -> None:
    if importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed: make docs")
    author.run(author.python, "-m", "mkdocs", "build", "--quiet", "--site-dir", tmp_path / "site",
               cwd=ROOT, NO_MKDOCS_2_WARNING="1", https_proxy="http://127.0.0.1:9")  # fmt: skip
    html = (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert "The best kernel" in html or "best kernel" in html
    outside = [
        url for url in re.findall(r'(?:src|href)="(https?://[^"]+)"', html)
        if "squidfunk" not in url  # the theme's own line at the foot of a page, a link
    ]  # fmt: skip
    assert not outside, "the site must load nothing from elsewhere"
    shutil.rmtree(tmp_path / "site")
