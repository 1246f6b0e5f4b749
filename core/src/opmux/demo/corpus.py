# SPDX-License-Identifier: Apache-2.0
"""The demo's text: the language reference that CPython ships for ``help()``.

``python3.13 corpus.py`` writes data/corpus.txt and data/heldout.txt from the topics of the
interpreter that runs it. Only the standard library is used, so that any CPython can do it.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Mapping
from pathlib import Path

DATA = Path(__file__).parent / "data"
HELDOUT_SHARE = 0.05
HELDOUT_BYTES = 40_000
SHORT = 40  # characters below which a paragraph may repeat: headings, "For example:"
SEPARATOR = "\n\n\n"
ASCII = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "--", "…": "..."})  # noqa: RUF001
TABLE_LINE = re.compile(r"^\s*(\+[-=+]+\+|\|.*\|)\s*$", re.MULTILINE)


def heldout() -> bytes:
    """Text that the shipped weights were not trained on (it chose the best checkpoint)."""
    return (DATA / "heldout.txt").read_bytes()


def paragraphs(topic: str) -> list[str]:
    """Plain ASCII paragraphs: no grid tables, none with a character that ASCII cannot say."""
    text = TABLE_LINE.sub("", topic.translate(ASCII))
    parts = (part.strip("\n") for part in re.split(r"\n\s*\n", text))
    lines = ("\n".join(line.rstrip() for line in part.split("\n")) for part in parts)
    return [part for part in lines if part and part.isascii()]


def unique(topics: Mapping[str, str]) -> dict[str, str]:
    """Topics by name without repetition, as many of them quote each other at length.

    Longest first: a topic that is mostly part of an earlier one goes, and so does every
    paragraph that stood before.
    """
    seen: set[str] = set()
    kept: dict[str, str] = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        parts = paragraphs(topics[name])
        keys = [" ".join(part.split()) for part in parts]
        fresh = [len(key) < SHORT or key not in seen for key in keys]
        new = sum(len(key) for key, is_new in zip(keys, fresh, strict=True) if is_new)
        if new * 2 >= sum(map(len, keys)) > 0:
            parts = [part for part, is_new in zip(parts, fresh, strict=True) if is_new]
            kept[name] = "\n\n".join(parts)
            seen.update(keys)
    return kept


def split(topics: Mapping[str, str]) -> tuple[str, str]:
    """Training and held-out text: whole topics, chosen by the hash of their names."""
    order = sorted(topics, key=lambda name: hashlib.sha256(name.encode()).digest())
    target = min(HELDOUT_BYTES, int(HELDOUT_SHARE * sum(map(len, topics.values()))))
    chosen: list[str] = []
    size = 0
    for name in order:
        # Topics above half the target would make the held-out text a single subject.
        if len(topics[name]) <= target // 2 and size + len(topics[name]) <= target:
            chosen.append(name)
            size += len(topics[name]) + len(SEPARATOR)
    train = [topics[name] for name in sorted(topics) if name not in chosen]
    return SEPARATOR.join(train) + "\n", SEPARATOR.join(topics[n] for n in sorted(chosen)) + "\n"


def main() -> None:
    """Write both files from the running interpreter's topics."""
    from pydoc_data.topics import topics

    train, held = split(unique(topics))
    for name, text in (("corpus.txt", train), ("heldout.txt", held)):
        (DATA / name).write_text(text, encoding="ascii", newline="\n")
        print(f"{name}: {len(text)} bytes from CPython {platform.python_version()}")


if __name__ == "__main__":
    main()
