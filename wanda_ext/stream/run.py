"""A streamed prune at work: blocks come from files, go through the engine, and into files."""

from __future__ import annotations

import hashlib
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from wanda_ext.calibration import Batch
from wanda_ext.files import sync_tree
from wanda_ext.interrupt import step
from wanda_ext.methods import Method, Updated
from wanda_ext.models import Copies, ExpertSlice
from wanda_ext.prune import PlannedBlock, prune_block
from wanda_ext.report import REPORT, LinearReport, PruneReport, note_saved, versions
from wanda_ext.runner import TwoStreams, Walk
from wanda_ext.stream.journal import ASKED, Journal
from wanda_ext.stream.on_disk import COMPLETE, REST, OnDisk, bar_over, joined, sums_of
from wanda_ext.stream.preflight import check_alone, needs_of
from wanda_ext.stream.ranks import Ranks
from wanda_ext.stream.skeleton import Skeleton
from wanda_ext.stream.states import FileStates
from wanda_ext.stream.writer import Entry, Output, files_of

Arrivals = dict[str, Callable[[], Tensor]]


class Run:
    """One process of a streamed prune. `begin`, `blocks`, `finish`."""

    def __init__(
        self,
        skeleton: Skeleton,
        plan: list[PlannedBlock],
        method: Method,
        batches: list[Batch] | None,
        at: torch.device | None,
        journal: Journal,
        ranks: Ranks,
        packed: bool,
        in_files: bool,
    ) -> None:
        self._skeleton = skeleton
        self._plan = plan
        self._method = method
        self._batches = batches
        self._at = None if at is None or at.type == "cpu" else at
        self._journal = journal
        self._ranks = ranks
        self._packed = packed
        self._in_files = in_files
        names = [block.name for block in plan]
        self._output = Output(skeleton, names, journal.checkpoint, journal.pieces, packed)
        self._paths = {id(module): name for name, module in skeleton.model.named_modules()}
        self._start = time.perf_counter()
        self._last = max(i for i, block in enumerate(plan) if block.targets)

    def begin(self, arguments: Mapping[str, Any], progress: bool) -> tuple[list[Entry], int]:
        """What is there of finished blocks, and the block from which on all are run.

        Raises ValueError where this cannot go on.
        """
        needs = needs_of(
            self._skeleton, self._plan, self._batches, self._journal.home, self._packed,
            self._in_files, self._ranks.count, self._method.reads == "gram",
            isinstance(self._method, Updated),
        )  # fmt: skip
        if progress:
            print(f"wanda_ext: {needs}", file=sys.stderr)
        needs.check()
        if self._batches is not None and self._journal.find(ASKED) is None:
            check_alone(self._skeleton, self._plan, self._batches[0])
        self._journal.ask({**arguments, **self._asked()})
        on_disk = OnDisk(self._journal, [block.name for block in self._plan])
        done = on_disk.blocks(progress)
        walking = self._batches is not None and len(done) <= self._last
        if not walking:
            return done, len(done)
        if not self._in_files or not done or on_disk.forgot:
            return done, 0
        whole = on_disk.has_states(self._folders(), len(self._batches or ()), len(done), progress)
        return done, len(done) if whole else 0

    def blocks(self, done: list[Entry], first: int, report: PruneReport, progress: bool) -> None:
        """Every block that is not done; those from `first` on are run again for the states."""
        report.linears = [line for entry in done for line in _lines(entry)]
        begun, count = len(done), len(self._plan)
        walking = self._batches is not None and begun <= self._last
        with ThreadPoolExecutor(1, "wanda_ext shards") as disk, self._copies() as copies:
            report.status = "capture"
            walk = self._walk(first, copies) if walking else None
            report.runner = "" if walk is None else walk.runner
            arriving = disk.submit(self._read, first, done, copies) if first < count else None
            for i in tqdm(range(first, count), "pruning", unit="block", disable=not progress):
                report.status = self._plan[i].name
                assert arriving is not None
                tensors = {name: arrive() for name, arrive in arriving.result().items()}
                with self._skeleton.holding(tensors), report.timed("blocks"):
                    written: Future[Entry] | None = None
                    if i >= begun:
                        # A single walk advances below, while the block is written.
                        advance = isinstance(walk, TwoStreams) and i < self._last
                        lines = prune_block(self._plan[i], i, self._method, walk, advance)
                        report.linears += lines
                        if self._ranks.first:
                            written = disk.submit(self._write, i, tensors)
                    following = i + 1 < count
                    arriving = disk.submit(self._read, i + 1, done, copies) if following else None
                    if walk is not None and i < self._last:
                        self._advance(i, walk, copies, again=i < begun)
                    if i >= begun:
                        self._commit(i, lines, written)
                step()

    def finish(self, report: PruneReport, code: bool, progress: bool) -> PruneReport:
        """The complete checkpoint appears."""
        report.status = "writing"
        journal = self._journal
        if journal.find(COMPLETE) is not None:
            where = journal.checkpoint if journal.checkpoint.exists() else journal.final
            report = PruneReport.load(where / REPORT)
        else:
            entries = self._join(progress)
            report.left = self._output.finish(entries, code)
            report.status = "complete"
            report.seconds = time.perf_counter() - self._start
            report.peak_memory = self._peak_memory()
            note_saved(report, journal.checkpoint, journal.final, self._packed)
            sync_tree(journal.checkpoint)
            journal.done(COMPLETE, files=sums_of(journal.checkpoint, files_of(entries)))
        journal.finish()
        return report

    def _join(self, progress: bool) -> list[Entry]:
        """Makes the checkpoint's files of their pieces, which go one file's after the other."""
        journal = self._journal
        shutil.rmtree(journal.states, ignore_errors=True)  # makes room: no block runs any more
        if journal.find(REST) is None:
            journal.done(REST, **self._output.write_rest(REST))
        entries = [entry for entry in journal.finished() if "pieces" in entry]
        left = [file for file in files_of(entries) if journal.find(joined(file)) is None]
        pieces = [path for file in left for path in (journal.pieces / file).iterdir()]
        with bar_over("joining", pieces, progress) as bar:

            def seen(count: int) -> None:
                bar.update(count)
                step()  # what is half written is no step of the journal

            for file in files_of(entries):
                if file in left:
                    digest = self._output.join(file, entries, seen)
                    journal.done(joined(file), files={file: digest})
                shutil.rmtree(journal.pieces / file, ignore_errors=True)
            bar.total = bar.n  # a file's header is shorter than those of its pieces
        return entries

    def _asked(self) -> dict[str, Any]:
        """All that the result depends on, beside the arguments."""
        digest = hashlib.sha256()
        for batch in self._batches or ():
            for key, value in sorted(batch.items()):
                digest.update(f"{key} {list(value.shape)}".encode() + value.numpy().tobytes())
        files = {
            path.name: [path.stat().st_size, path.stat().st_mtime_ns]
            for path in sorted(self._skeleton.folder.iterdir())
            if path.suffix in (".safetensors", ".json") and path.is_file()
        }
        return {
            "calibration": digest.hexdigest(),
            "batches": len(self._batches or ()),
            "asked of": {
                linear.name: str(linear.sparsity or linear.status)
                for block in self._plan
                for linear in block.linears.values()
            },
            "source": files,
            "versions": versions(),
            "threads": torch.get_num_threads(),
        }

    def _copies(self) -> Any:
        return nullcontext() if self._at is None else Copies(self._at)

    def _read(self, index: int, done: list[Entry], copies: Copies | None) -> Arrivals:
        """The tensors of a block as the model has them now, on their way to the device."""
        block = self._plan[index].name
        if index < len(done):
            tensors = self._output.read_block(done[index])
        else:
            tensors = self._skeleton.read(self._skeleton.names(block))
        if copies is None:
            return {name: partial(_same, tensor) for name, tensor in tensors.items()}
        tensors |= self._skeleton.computed(block)
        return {name: copies.bring(tensor) for name, tensor in tensors.items()}

    def _walk(self, first_run: int, copies: Copies | None) -> Walk | TwoStreams:
        """Needs the first block for a few tokens, and what comes before it for all."""
        assert self._batches is not None
        if not isinstance(self._method, Updated):
            return self._stream(first_run, copies, self._journal.states)
        pruned, dense = (self._stream(first_run, copies, folder) for folder in self._folders())
        return TwoStreams(pruned, dense, self._batches)

    def _folders(self) -> list[Path]:
        """Of the hidden states of each stream."""
        states = self._journal.states
        return [states, states / "dense"] if isinstance(self._method, Updated) else [states]

    def _stream(self, first_run: int, copies: Copies | None, folder: Path) -> Walk:
        """folder: of the hidden states, where they lie in files."""
        assert self._batches is not None
        names = [block.name for block in self._plan]
        numbers = self._ranks.own(range(len(self._batches)))
        states = None
        if self._in_files:
            folder.mkdir(exist_ok=True)
            states = FileStates(folder, numbers, first_run)
        first = {name: arrive() for name, arrive in self._read(0, [], None).items()}
        skeleton = self._skeleton
        with skeleton.holding(first), skeleton.read_when_called(names):
            return Walk(
                skeleton.model,
                [(block.name, block.module) for block in self._plan],
                self._ranks.own(self._batches),
                copies,
                states,
                self._ranks.share if self._ranks.count > 1 else None,
            )

    def _advance(
        self, index: int, walk: Walk | TwoStreams, copies: Copies | None, again: bool
    ) -> None:
        """again: an earlier run has pruned the block."""
        if isinstance(walk, Walk):
            walk.advance(index)
        elif again:
            walk.pruned.advance(index)
            dense = {name: arrive() for name, arrive in self._read(index, [], copies).items()}
            with self._skeleton.holding(dense):
                walk.dense.advance(index)
        if copies is not None:
            copies.finish()
        for one in (walk,) if isinstance(walk, Walk) else (walk.pruned, walk.dense):
            if isinstance(one.hidden, FileStates):
                one.hidden.turn()

    def _write(self, index: int, tensors: Mapping[str, Tensor]) -> Entry:
        kept = {name: t for name, t in tensors.items() if name in self._skeleton.stored}
        return self._output.write_block(index, kept, self._changed(index))

    def _changed(self, index: int) -> set[str]:
        """The tensors of a block that are pruned."""
        found = set()
        for linear in self._plan[index].targets.values():
            name = f"{linear.name}.weight"
            if isinstance(linear.module, ExpertSlice):
                name = f"{self._paths[id(linear.module.owner)]}.{linear.module.parameter}"
            found.add(self._skeleton.first(name))
        return found

    def _commit(self, index: int, lines: list[LinearReport], written: Future[Entry] | None) -> None:
        """The block is done, once its file and all ranks' states are on the disk."""
        self._ranks.wait()

        def enter() -> None:
            assert written is not None
            told = [asdict(line) for line in lines]
            self._journal.done(self._plan[index].name, lines=told, **written.result())

        self._ranks.at_first(enter)

    def _peak_memory(self) -> dict[str, int]:
        peak = {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        if self._at is not None and self._at.type == "cuda":
            peak[str(self._at)] = torch.cuda.max_memory_allocated(self._at)
        return peak


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _lines(entry: Entry) -> list[LinearReport]:
    return [LinearReport(**{**line, "shape": tuple(line["shape"])}) for line in entry["lines"]]
