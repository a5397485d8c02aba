"""What a long run has finished, kept so that the same command goes on after any stop.

Beside DST lies the directory .DST.unfinished: `journal.jsonl`, one line per finished step, synced
to the disk before the next begins and locked while a run lives; `checkpoint`, which becomes DST;
`pieces` of its files, until they are joined; `states`, hidden ones.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wanda_ext.files import check_replaceable, publish, sync_path

ASKED = "asked"  # the first line: what the run was asked to do
VERSION = 2  # of what the lines hold
MAX_TOLD = 3


class Journal:
    """The steps that are done. Only who holds it in `opened` may write."""

    def __init__(self, final: Path) -> None:
        self.final = final
        self.home = final.with_name(f".{final.name}.unfinished")
        self.checkpoint = self.home / "checkpoint"
        self.pieces = self.home / "pieces"
        self.states = self.home / "states"
        self._path = self.home / "journal.jsonl"
        self._steps: list[dict[str, Any]] = []

    @contextmanager
    def opened(self, resume: bool) -> Iterator[Journal]:
        """Locked inside. What was begun is kept after a failure if any step of it is done.

        Raises ValueError where another run writes to the same place.
        """
        check_replaceable(self.final)
        descriptor = self._locked()
        try:
            if not resume:
                self._begin_anew()
            self._steps = self._read()
            yield self
        finally:
            if len(self._steps) < 2:  # nothing but what was asked
                shutil.rmtree(self.home, ignore_errors=True)
            os.close(descriptor)

    def ask(self, asked: Mapping[str, Any]) -> None:
        """Begins, or checks that what was begun was asked the same; ValueError names what was not.

        Of nested mappings the entries are compared.
        """
        asked = json.loads(json.dumps({"journal": VERSION, **asked}))
        if len(self._steps) < 2:
            self._begin_anew()
            for folder in (self.checkpoint, self.pieces, self.states):
                folder.mkdir()
            self._append({"step": ASKED, **asked})
            return
        before = {key: value for key, value in self._steps[0].items() if key != "step"}
        told = _differences(before, asked)
        if told:
            more = f"; {len(told) - MAX_TOLD} more" if len(told) > MAX_TOLD else ""
            raise ValueError(
                f"{self.home} holds an unfinished run that differs in {'; '.join(told[:MAX_TOLD])}"
                f"{more}: ask the same again to finish it, or pass resume=False to start anew"
            )

    def find(self, step: str) -> dict[str, Any] | None:
        """What a finished step left, or None."""
        return next((entry for entry in self._steps if entry["step"] == step), None)

    def finished(self) -> list[dict[str, Any]]:
        """What all finished steps left, in their order."""
        return [entry for entry in self._steps if entry["step"] != ASKED]

    def done(self, step: str, **left: Any) -> None:
        """A step is finished: all it wrote must be on the disk already."""
        self._append({"step": step, **left})

    def forget(self, step: str) -> None:
        """A finished step, and all that came after it, are to be done again."""
        kept = next(i for i, entry in enumerate(self._steps) if entry["step"] == step)
        lines = self._path.read_bytes().splitlines(keepends=True)[:kept]
        descriptor = os.open(self._path, os.O_RDWR)
        try:
            os.truncate(descriptor, sum(map(len, lines)))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        del self._steps[kept:]

    def finish(self) -> None:
        """The checkpoint gets its final name; nothing else stays."""
        if self.checkpoint.exists():  # or a run was killed when it had the name already
            publish(self.checkpoint, self.final)
        self._steps = []

    def told(self) -> str:
        """What becomes of a run that stops now."""
        if len(self._steps) < 2:
            return "nothing was written"
        return (
            f"{self.final} is untouched; what is finished lies in {self.home}, and the same call "
            "goes on from there"
        )

    def _append(self, entry: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        sync_path(self.home)
        self._steps.append(entry)

    def _read(self) -> list[dict[str, Any]]:
        """The whole lines; one that a crash cut off is cut away."""
        text = self._path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            os.truncate(self._path, len(whole))
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise ValueError(
                f"{self._path} is damaged ({error}): pass resume=False to start anew"
            ) from error

    def _locked(self) -> int:
        """The descriptor of the locked journal: its end, however it comes, unlocks."""
        while True:
            self.home.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # another run has just finished
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise ValueError(
                    f"another run is writing {self.final}: wait for it, or name another directory"
                ) from None
            if self._path.exists() and self._path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
            os.close(descriptor)  # of a run that has just finished

    def _begin_anew(self) -> None:
        os.truncate(self._path, 0)
        self._steps = []
        for folder in (self.checkpoint, self.pieces, self.states):
            shutil.rmtree(folder, ignore_errors=True)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> list[str]:
    told = []
    for key in [*before, *(key for key in now if key not in before)]:
        one, other = before.get(key), now.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            told += _differences(one, other, f"{at}{key} ")
        elif one != other:
            told.append(f"{at}{key} ({one!r} then, {other!r} now)")
    return told
