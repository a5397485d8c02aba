"""What a run that was stopped finds on the disk: whether it is what the journal tells of.

Every file of a finished step is read once, and its sha256 compared with that which was taken when
it was written. A step whose file is missing or damaged is done again, and all that came after it.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from wanda_ext.files import sha256_of
from wanda_ext.stream.journal import Journal
from wanda_ext.stream.states import state_file, sum_of
from wanda_ext.stream.writer import Entry, piece_file

# Steps of the journal: the blocks, by the names of their modules; all else that is stored; the
# joining of each file; the end. The first two leave `pieces`, file of the checkpoint -> sha256 of
# the piece for it; the others `files`, name -> sha256.
REST = "rest"
COMPLETE = "complete"


def joined(file: str) -> str:
    """The step that makes a file of the checkpoint of its pieces, which go then."""
    return f"joined {file}"


class OnDisk:
    """The finished steps of a journal and their files; `forgot`: some have to be done again."""

    def __init__(self, journal: Journal, names: list[str]) -> None:
        """names: of the blocks."""
        self._journal = journal
        self._names = names
        self.forgot = False

    def blocks(self, progress: bool) -> list[Entry]:
        """The blocks that are finished, whole, and follow each other from the first one on.

        Where a file is missing or damaged, the journal forgets its step and all that followed; or
        all steps, once pieces that would be needed again are gone.
        """
        journal = self._journal
        published = journal.find(COMPLETE) is not None and not journal.checkpoint.exists()
        folder = journal.final if published else journal.checkpoint
        if not published:
            folder.mkdir(exist_ok=True)
        entries = journal.finished()
        whole = {file for entry in entries for file in entry.get("files", ())}
        expected = [
            (entry["step"], path, digest)
            for entry in entries
            for path, digest in self._files(entry, folder, whole)
        ]
        with bar_over("checking", [path for _, path, _ in expected], progress) as bar:
            for step, path, digest in expected:
                problem = _damage(path, digest, bar)
                if problem:
                    anew = published or (whole and step != COMPLETE)
                    self._forget(self._names[0] if anew else step, problem)
                    break
        found = [journal.find(name) for name in self._names]
        return [entry for entry in found if entry is not None]

    def has_states(self, folders: Iterable[Path], batches: int, block: int, progress: bool) -> bool:
        """Whether the hidden states that enter a block are there and whole, of all batches."""
        files = [state_file(one, number, block) for one in folders for number in range(batches)]
        with bar_over("checking", files, progress) as bar:
            for file in files:
                at = sum_of(file)
                problem = _damage(file, at.read_text() if at.exists() else "", bar)
                if problem:
                    _say(f"{problem}: the blocks that are done are run again for their states")
                    return False
        return True

    def _files(
        self, entry: Entry, folder: Path, whole: Container[str]
    ) -> Iterator[tuple[Path, str]]:
        """What a step left that is to be there still, with its sha256."""
        for file, digest in entry.get("pieces", {}).items():
            if file not in whole:
                yield piece_file(self._journal.pieces, file, entry["step"]), digest
        for name, digest in entry.get("files", {}).items():
            yield folder / name, digest

    def _forget(self, step: str, problem: str) -> None:
        self._journal.forget(step)
        self._journal.checkpoint.mkdir(exist_ok=True)
        self.forgot = True
        what = "the last step" if step == COMPLETE else f"{step} and what follows"
        _say(f"{problem}: {what} is done again")


def sums_of(folder: Path, others: Container[str]) -> dict[str, str]:
    """Name -> sha256 of the files in a directory, but for `others`."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    return {
        name: sha256_of(path)
        for name, path in files.items()
        if path.is_file() and name not in others
    }


def bar_over(what: str, files: Iterable[Path], progress: bool) -> Any:
    """Of the bytes in some files."""
    total = sum(path.stat().st_size for path in files if path.is_file())
    disable = not (progress and total)
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=disable)


def _damage(path: Path, expected: str, bar: Any) -> str:
    """Why a file is not the one of that sha256, in a clause; "" where it is."""
    if path.is_symlink() or not path.is_file():
        return f"{path} is missing"
    return "" if sha256_of(path, bar.update) == expected else f"{path} is damaged"


def _say(told: str) -> None:
    print(f"wanda_ext: {told}", file=sys.stderr)
