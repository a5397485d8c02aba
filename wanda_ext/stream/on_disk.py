"""What a run that was stopped finds on the disk: whether it is what the journal tells of.

Every file of a finished step is read once, and its sha256 compared with that which was taken when
it was written. Journals of earlier versions hold none: sizes are compared then, and that is told.
A step whose file is missing or damaged is done again, and all that came after it.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from wanda_ext.files import is_plain, read_headers, sha256_of, stored_tensors
from wanda_ext.stream.journal import Journal
from wanda_ext.stream.states import state_file, sum_of
from wanda_ext.stream.writer import Entry

COMPLETE = "complete"  # the last step of the journal, after the blocks


class OnDisk:
    """The finished steps of a journal and their files; `forgot`: some have to be done again."""

    def __init__(self, journal: Journal, names: list[str]) -> None:
        """names: of the blocks."""
        self._journal = journal
        self._names = names
        self.forgot = False

    def blocks(self, progress: bool) -> list[Entry]:
        """The blocks that are finished, whole, and follow each other from the first one on.

        The journal forgets all others, and that it was complete, where not everything is there.
        """
        journal = self._journal
        complete = journal.find(COMPLETE)
        found = [journal.find(name) for name in self._names]
        done = [entry for entry in found if entry is not None]
        published = complete is not None and not journal.checkpoint.exists()
        folder = journal.final if published else journal.checkpoint
        if not published:
            folder.mkdir(exist_ok=True)
        if done and not all("sha256" in entry for entry in done):
            _say("the journal is of an earlier version, without checksums: sizes were compared")
        sums: Mapping[str, str] = (complete or {}).get("sums", {})
        files = [folder / str(entry["file"]) for entry in done] + [folder / name for name in sums]
        with _bar(files, progress) as bar:
            for index, entry in enumerate(done):
                problem = _damage_of_block(folder, entry, bar)
                if problem:
                    index = 0 if published else index
                    self._forget(self._names[index], f"{problem}: {self._names[index]} and what")
                    return done[:index]
            for name, expected in sums.items():
                problem = _damage(folder, name, expected, bar)
                if problem:
                    step = self._names[0] if published else COMPLETE
                    self._forget(step, f"{problem}: what")
                    return [] if published else done
        return done

    def has_states(self, folders: Iterable[Path], batches: int, block: int, progress: bool) -> bool:
        """Whether the hidden states that enter a block are there and whole, of all batches."""
        files = [state_file(one, number, block) for one in folders for number in range(batches)]
        with _bar(files, progress) as bar:
            for file in files:
                at = sum_of(file)
                expected = at.read_text() if at.exists() else None
                problem = _damage(file.parent, file.name, expected, bar)
                if problem:
                    _say(f"{problem}: the blocks that are done are run again for their states")
                    return False
        return True

    def _forget(self, step: str, told: str) -> None:
        self._journal.forget(step)
        self._journal.checkpoint.mkdir(exist_ok=True)
        self.forgot = True
        _say(f"{told} follows is done again")


def sums_of(folder: Path, known: Mapping[str, str], others: Container[str]) -> dict[str, str]:
    """Name -> sha256 of the files in a directory, but for `others`."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    return {
        name: known.get(name) or sha256_of(path)
        for name, path in files.items()
        if path.is_file() and name not in others
    }


def _damage_of_block(folder: Path, entry: Entry, bar: Any) -> str:
    """Why a block's file is not what was written, in a clause; "" where it is."""
    name = entry["file"]
    if not is_plain(name):
        return f"the journal names {name!r}, which is no file of a checkpoint"
    problem = _damage(folder, name, entry.get("sha256"), bar)
    if problem or "sha256" in entry:
        return problem
    stored = stored_tensors([folder / name])
    size = sum(one.nbytes for one in stored.values())
    alike = size == entry["bytes"] and stored.keys() == set(entry["names"])
    return "" if alike else f"{folder / name} holds other tensors than were written"


def _damage(folder: Path, name: str, expected: str | None, bar: Any) -> str:
    """expected: the sha256; None: a whole safetensors file will do."""
    path = folder / name
    if path.is_symlink() or not path.is_file():
        return f"{path} is missing"
    if expected is not None:
        return "" if sha256_of(path, bar.update) == expected else f"{path} is damaged"
    try:
        read_headers([path])
    except ValueError as error:
        return str(error)
    return ""


def _bar(files: list[Path], progress: bool) -> Any:
    total = sum(path.stat().st_size for path in files if path.is_file())
    disable = not (progress and total)
    return tqdm(total=total, desc="checking", unit="B", unit_scale=True, disable=disable)


def _say(told: str) -> None:
    print(f"wanda_ext: {told}", file=sys.stderr)
