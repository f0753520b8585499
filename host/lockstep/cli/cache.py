"""``lockstep clean``: the build cache, emptied."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import typer

from .failures import guarded
from .output import JsonOption, emit, results

#: What the cache puts in its folder, finished and unfinished; nothing else is touched. Locks, which are empty files,
#: stay: if one went that a process waits for, the next two would build the same at once.
_BUILD = re.compile(r"[0-9a-f]{32}")
_UNFINISHED = re.compile(r"unfinished-\w+")


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: lockstep clean")(clean)


@guarded
def clean(as_json: JsonOption = False) -> None:
    """Empty the build cache; what is needed again is built again."""
    import filelock
    from lockstep_hls.toolchain import cache_dir

    folder = cache_dir()
    removed, freed, busy = 0, 0, 0
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    locked = [path.stem for path in entries if path.suffix == ".lock"]
    for name in sorted({*locked, *(path.name for path in entries)}):
        if not _BUILD.fullmatch(name):
            continue
        try:
            with filelock.FileLock(folder / f"{name}.lock", timeout=0):
                if (folder / name).is_dir():
                    freed += _size(folder / name)
                    removed += 1
                    shutil.rmtree(folder / name)
        except filelock.Timeout:
            busy += 1
    if not busy:
        for path in entries:
            if _UNFINISHED.fullmatch(path.name):
                freed += _size(path)
                shutil.rmtree(path, ignore_errors=True)
    if as_json:
        emit({"folder": str(folder), "builds_removed": removed, "bytes_freed": freed, "builds_in_progress": busy})
        return
    text = f"{folder}: {removed} builds removed, {freed / 2**20:.0f} MiB freed"
    if busy:
        text += f"; {busy} kept that another process is building"
    results().print(text, markup=False, highlight=False, soft_wrap=True)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
