# SPDX-License-Identifier: Apache-2.0
"""Load a new or changed plugin in a child process first: what crashes there crashes nobody here.

Once per digest of the plugin's package and per host, the child imports the plugin, loads and
registers its library and asks its probe. It ends by itself and says so, or the plugin is refused
with the signal. Errors that Python can raise are none of its business: they are raised here again.
Verdicts are kept in ``$XDG_CACHE_HOME/opmux/probe``; ``OPMUX_PROBE=0`` turns all of it off.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from opmux import digest
from opmux.kernel import Code, Reason

FORMAT = 1
_START = 300.0  # seconds until the child has imported torch; slow disks, not the plugin's fault
_AT_ONCE = 8  # children; each imports torch
_HANG_IS_KEPT = 3600.0  # seconds: a hang may have been the machine's
# Sent by others: an out-of-memory killer, a scheduler, a user. Refused, but tried again next time.
_FROM_OUTSIDE = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
_MEANING = {
    "SIGILL": "an instruction that this CPU lacks",
    "SIGSEGV": "an access outside of its memory",
    "SIGBUS": "an access outside of its memory",
    "SIGABRT": "it aborted",
    "SIGFPE": "a division by zero",
    "SIGKILL": "killed, perhaps for lack of memory",
}
_REPORT = "install another version of it, or report this to its author"
_CHILD = "from opmux import quarantine; quarantine.child()"


@dataclass(frozen=True)
class Verdict:
    """How a plugin fared in a child: ``ok``, ``signal``, ``exit``, ``hang``, ``state``, ``none``.

    ``what`` is the signal, the exit status or what it changed; ``none`` says why no child ran.
    """

    outcome: str
    what: str = ""
    seconds: float = 0.0
    detail: str = ""
    at: float = 0.0

    def describe(self) -> str:
        """Return what ``opmux doctor`` shows."""
        if self.outcome == "none":
            return f"not tried: {self.what}"
        when = time.strftime("%Y-%m-%d", time.gmtime(self.at))
        return f"tried in a child process on {when}, {self.seconds:.1f} s"

    def reason(self) -> Reason | None:
        """Return why the plugin must not be loaded here, or None."""
        anyway, report = "OPMUX_PROBE=0 loads it all the same", _REPORT
        if self.outcome == "signal":
            meaning = f" ({_MEANING[self.what]})" if self.what in _MEANING else ""
            remedy = report
            if self.what == "SIGILL":
                remedy = "install a build of it for this CPU"
            return Reason(
                Code.CRASHED,
                f"loading it ended a child process with {self.what}{meaning}",
                f"{remedy}; {anyway}",
            )
        if self.outcome == "exit":
            sentence = f"loading it ended a child process with exit status {self.what}"
            return Reason(Code.CRASHED, sentence, f"{report}; {anyway}")
        if self.outcome == "hang":
            return Reason(
                Code.CRASHED,
                f"loading it did not end within {self.what} s in a child process",
                f"{report}; OPMUX_PROBE_TIMEOUT allows more seconds; {anyway}",
            )
        if self.outcome == "state":
            return changes(self.what)
        return None


def changes(what: str) -> Reason:
    """Return why a plugin that changes settings of its process is refused."""
    return Reason(Code.CRASHED, f"loading it changed {what}", _REPORT)


def off() -> bool:
    """Whether no child is to be used."""
    return os.environ.get("OPMUX_PROBE") == "0"


def try_out(entry: importlib.metadata.EntryPoint) -> Verdict:
    """Return how a plugin fared in a child on this host, now or earlier."""
    if off():
        return Verdict("none", "OPMUX_PROBE=0")
    if os.name != "posix" or not sys.executable:
        return Verdict("none", "this process cannot start another Python")
    with _kept(entry) as record:
        if record.verdict is None:
            record.verdict = _run(entry)
        return record.verdict


def try_all(
    entries: Sequence[importlib.metadata.EntryPoint],
) -> dict[tuple[str, str], Verdict]:
    """Return how each of several plugins fared; several children run at a time."""
    if not entries or off():
        return {}
    workers = min(len(entries), os.cpu_count() or 1, _AT_ONCE)
    with ThreadPoolExecutor(workers) as pool:
        verdicts = list(pool.map(_tried, entries))
    return {(e.name, e.value): v for e, v in zip(entries, verdicts, strict=True) if v is not None}


def _tried(entry: importlib.metadata.EntryPoint) -> Verdict | None:
    try:
        return try_out(entry)
    except Exception:  # raised again when this plugin's turn comes
        return None


# ---- verdicts that are kept ----


class _Record:
    """The verdict in the cache, or the one to be kept there."""

    def __init__(self) -> None:
        self.verdict: Verdict | None = None


def folder() -> Path | None:
    """Return where verdicts are kept, or None when this user has no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not Path(base).is_absolute():  # the specification: a relative path is to be ignored
        try:
            base = str(Path.home() / ".cache")
        except RuntimeError:
            return None
    return Path(base) / "opmux" / "probe"


def host() -> dict[str, str]:
    """Return what, beside the plugin, decides whether it can be loaded."""
    facts = {
        "machine": platform.machine(),
        "cpu": _cpu(),
        "libc": " ".join(platform.libc_ver()),
        "driver": _read(Path("/proc/driver/nvidia/version"))
        + _read(Path("/sys/module/amdgpu/version")),
        "python": f"{sys.implementation.cache_tag} {platform.python_version()} {sys.executable}",
        "torch": f"{torch.__version__} {torch.version.cuda} {torch.version.hip}",
    }
    quiet = ("OPMUX_PROBE", "OPMUX_BACKENDS", "OPMUX_ON_UNSUPPORTED", "OPMUX_CONFIG")
    for name, value in os.environ.items():
        ours = name.startswith("OPMUX_") and not name.startswith(quiet)
        if ours or name in ("LD_LIBRARY_PATH", "LD_PRELOAD", "CUDA_VISIBLE_DEVICES"):
            facts[name] = value
    return facts


def _cpu() -> str:
    """Return model and features of the first CPU; the rest of /proc/cpuinfo repeats them."""
    lines = _read(Path("/proc/cpuinfo"), 8192).partition("\n\n")[0].splitlines()
    kept = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(line for line in lines if line.startswith(kept))


def _read(path: Path, count: int = 4096) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(count)
    except OSError:
        return ""


def _key(entry: importlib.metadata.EntryPoint) -> str:
    from opmux import __version__

    what = {
        "format": FORMAT, "opmux": __version__, "host": host(),
        "entry": f"{entry.name} = {entry.value}", "package": digest.package(entry.module),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _kept(entry: importlib.metadata.EntryPoint) -> Iterator[_Record]:
    """Yield the record of a plugin; a verdict that is put into it is kept.

    Of several processes that come at once, one runs the child and the others wait for its verdict.
    Where nothing can be written, each runs its own.
    """
    record = _Record()
    try:
        place = folder()
        path = place / f"{_key(entry)[:40]}.json" if place is not None else None
    except (OSError, ImportError, ValueError):  # it cannot be read: loading it will say why
        path = None
    if path is None:
        yield record
        return
    record.verdict = _parse(_read(path, 1 << 16))
    if record.verdict is not None:
        yield record
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = path.open("a+", encoding="utf-8")
    except OSError:  # a home that is read-only, or none
        yield record
        return
    with file:
        _lock(file)
        file.seek(0)
        record.verdict = _parse(file.read())  # another process may have been first
        if record.verdict is not None:
            yield record
            return
        yield record
        _keep(record, file)


def _keep(record: _Record, file: IO[str]) -> None:
    verdict = record.verdict
    if verdict is None or verdict.outcome == "none" or verdict.what in _FROM_OUTSIDE:
        return
    with contextlib.suppress(OSError):
        file.seek(0)
        file.truncate()
        json.dump({"format": FORMAT, **asdict(verdict)}, file)
        file.flush()


def _parse(text: str) -> Verdict | None:
    """Return a kept verdict, or None for one that is torn, foreign or out of date."""
    try:
        data: Any = json.loads(text)
        if data.pop("format") != FORMAT:
            return None
        found = Verdict(**data)
        if found.outcome == "hang" and time.time() - found.at > _HANG_IS_KEPT:
            return None
        return found if isinstance(found.seconds, float) else None
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _lock(file: IO[str]) -> None:
    """Wait for the process that is trying the plugin, if there is one; never for ever."""
    import fcntl

    give_up = time.monotonic() + _timeout() + 30
    while time.monotonic() < give_up:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:  # a file system without locks
            return


def _timeout() -> float:
    text = os.environ.get("OPMUX_PROBE_TIMEOUT", "60")
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"OPMUX_PROBE_TIMEOUT must be seconds, got {text!r}") from None


# ---- the child, seen from here ----


def _run(entry: importlib.metadata.EntryPoint) -> Verdict:
    """Run a child and return how it fared."""
    started = time.time()
    read, write = os.pipe()
    try:
        with tempfile.TemporaryFile() as output:
            wanted = {"name": entry.name, "value": entry.value, "path": sys.path, "pipe": write}
            try:
                # A session of its own: what it starts can be ended with it.
                process = subprocess.Popen(
                    [sys.executable, "-X", "faulthandler", "-c", _CHILD, json.dumps(wanted)],
                    stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=(write,),
                    start_new_session=True, env=_environment(),
                )  # fmt: skip
            finally:
                os.close(write)
            outcome, what = _wait(process, read)
            output.seek(0, os.SEEK_END)
            output.seek(max(output.tell() - 4000, 0))
            detail = output.read().decode(errors="replace")
    except OSError as error:  # no more processes, no temporary folder
        return Verdict("none", f"no child process could be started: {error}")
    finally:
        os.close(read)
    seconds = round(time.time() - started, 3)
    return Verdict(outcome, what, seconds, "" if outcome == "ok" else detail, started)


def _environment() -> Mapping[str, str]:
    """The child's environment: it finds this very opmux, and tries nothing out itself."""
    path = os.pathsep.join(p for p in sys.path if p)
    return {**os.environ, "OPMUX_PROBE": "0", "PYTHONPATH": path}


def _wait(process: subprocess.Popen[bytes], read: int) -> tuple[str, str]:
    """Follow a child's reports until it ends or its time is over; leave nothing of it running."""
    said, limit = b"", time.monotonic() + _START
    allowed = 0.0
    try:
        while True:
            running = process.poll() is None
            # A grandchild may hold the pipe open: only what is there is read.
            while select.select([read], [], [], 0.02 if running else 0)[0]:
                block = os.read(read, 4096)
                said += block
                if not block:
                    break
            if b"start\n" in said and not allowed:
                allowed = _timeout()
                limit = time.monotonic() + allowed
            if not running or b"done\n" in said:
                break
            if time.monotonic() > limit:
                return ("hang", f"{allowed:g}") if allowed else ("none", "the child did not start")
            if not select.select([read], [], [], 0)[0]:
                time.sleep(0.005)
    finally:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    lines = said.decode(errors="replace").splitlines()
    if "done" in lines:
        changed = "; ".join(line.removeprefix("changed ") for line in lines if "changed " in line)
        return ("state", changed) if changed else ("ok", "")
    if "start" not in lines:  # torch or opmux itself failed: the plugin was not tried
        return "none", f"the child ended with {status} before it tried the plugin"
    if status < 0:
        with contextlib.suppress(ValueError):
            return "signal", signal.Signals(-status).name
        return "signal", f"signal {-status}"
    return "exit", str(status)


# ---- the child itself ----


def child() -> None:
    """Load one plugin as this process would load it, and ask its probe; runs in the child."""
    from opmux import loader, manifest, process_state
    from opmux.op import all_ops

    wanted = json.loads(sys.argv[1])
    sys.path[:] = wanted["path"]
    all_ops()  # what is core's is not in the plugin's time
    before = process_state.snapshot()

    def say(text: str) -> None:
        os.write(wanted["pipe"], f"{text}\n".encode())

    say("start")
    entry = importlib.metadata.EntryPoint(wanted["name"], wanted["value"], loader.GROUP)
    # What Python can catch is for the process that wants the plugin.
    with contextlib.suppress(Exception, SystemExit):
        loaded = loader.take(entry, manifest.find(entry.module), [])
        device = loaded.backend.device
        if device == "cpu" or _usable(device):
            loaded.capability(torch.device(device))
    for change in process_state.restore(before):
        say(f"changed {change}")
    say("done")
    os._exit(0)  # how it ends is its author's and torch's


def _usable(device: str) -> bool:
    module = getattr(torch, device, None)
    return bool(module is not None and hasattr(module, "is_available") and module.is_available())
