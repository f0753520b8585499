"""Finding the C++ compiler, and building things once: a cache keyed by content, safe for processes that race."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import filelock
import platformdirs

Progress = Callable[[str], None] | None

#: Where the C++ headers are.
INCLUDE = Path(__file__).parent / "include"
#: Separate roundings, no traps, wrapping integers; never -ffast-math, which would change results.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-mprefer-vector-width=512"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fwrapv", "-pthread"),
)
LAST_LINES = 20


class ToolchainError(RuntimeError):
    """Something that a build needs is missing or failed; the message says what, and the command that mends it."""


def find_compiler() -> list[str]:
    """The command of the C++ compiler: ``$CXX``, or else g++, or else clang++."""
    if chosen := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(chosen[0]) is None:
            raise ToolchainError(f"CXX names '{chosen[0]}', which is not on PATH; unset CXX or install that compiler")
        return chosen
    for name in ("g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise ToolchainError("no C++ compiler: neither g++ nor clang++ is on PATH; install one with 'apt-get install g++'")


def cache_dir() -> Path:
    """The folder of finished builds: ``$LOCKSTEP_CACHE``, or else the user's cache folder."""
    return Path(os.environ.get("LOCKSTEP_CACHE") or platformdirs.user_cache_dir("lockstep"))


def run_command(command: Sequence[str | Path], cwd: Path | None = None) -> str:
    """The standard output of a build step; raises :class:`ToolchainError` with its last lines where it fails."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    except OSError as error:
        raise ToolchainError(f"cannot run '{words[0]}': {error.strerror}") from error
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-LAST_LINES:])
        raise ToolchainError(f"'{shlex.join(words)}' failed with status {done.returncode}; its last lines:\n{tail}")
    return done.stdout


def build_cached(key_parts: Iterable[str | bytes], builder: Callable[[Path], None], progress: Progress = None) -> Path:
    """The folder that ``builder`` fills, built once for these key parts.

    Parameters
    ----------
    key_parts : everything that the result depends on: sources, flags, versions. They are hashed.
    builder : fills an empty folder; that it raises leaves nothing in the cache.
    progress : is told in one line what takes the time.

    Two processes that want the same build at once do it once: the second waits for the first.
    """
    digest = hashlib.sha256()
    for part in key_parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    root = cache_dir()
    final = root / digest.hexdigest()[:32]
    if final.is_dir():
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{final.name}.lock", progress):
            if not final.is_dir():
                unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=root))
                try:
                    builder(unfinished)
                    unfinished.rename(final)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise ToolchainError(
            f"cannot use the build cache {root}: {error.strerror or error}; set LOCKSTEP_CACHE to a folder of yours"
        ) from error
    return final


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock of one build."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if progress is not None:
            progress("waiting for another process that builds the same")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def cpu_identity() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("vendor_id", "model name", "flags"))}))


def compile_shared(
    sources: Sequence[Path],
    include_dirs: Sequence[Path] = (INCLUDE,),
    flags: Sequence[str] = FLAGS,
    progress: Progress = None,
) -> Path:
    """The cached shared library of these C++ sources, built where it is not there yet."""
    compiler = find_compiler()
    headers = sorted(path for folder in include_dirs for path in folder.rglob("*") if path.suffix in (".h", ".hpp"))
    texts = [path.read_bytes() for path in (*sources, *headers)]
    version = run_command([*compiler, "--version"])

    def build(folder: Path) -> None:
        if progress is not None:
            progress(f"compiling {', '.join(path.name for path in sources)} (once)")
        includes = [f"-I{path}" for path in include_dirs]
        run_command([*compiler, *flags, "-shared", "-fPIC", *includes, *sources, "-o", folder / "library.so"])

    return build_cached([*compiler, *flags, version, cpu_identity(), *texts], build, progress) / "library.so"
