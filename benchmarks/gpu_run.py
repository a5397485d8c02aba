"""Runs the steps of gpu_check.py: each command in a process group of its own, within its limit.

A command prints its results as lines of JSON that begin with {"cell"; each goes into results.jsonl
as it comes, with the step, the device and its clocks meanwhile, versions and the commit. Everything
goes into the log. Nothing that a command does ends the run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from gpu_device import Clocks, Device

OK, NO_DEVICE, LOST = 0, 3, 4  # exit statuses of commands; LOST: a kernel took the device away
RESTARTS = 3  # of a command whose kernels take the device away
GRACE = 5.0  # seconds from asking a command to end to ending it
LEAST = 1.0  # seconds that are worth starting a command
SUMMARY = re.compile(r"^=+ (?:\w+ )?SUMMARY: (.*)")  # a sanitizer's last word


@dataclass(frozen=True)
class Tool:
    """A program that runs others; `get` says where it comes from, `does` what it does."""

    name: str
    options: tuple[str, ...]
    get: str
    does: str = ""

    def found(self, environ: Mapping[str, str] = os.environ) -> str | None:
        homes = [environ.get("CUDA_HOME", ""), environ.get("CUDA_PATH", ""), "/usr/local/cuda"]
        places = [environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
        return shutil.which(self.name, path=os.pathsep.join(places))


@dataclass(frozen=True)
class Command:
    """A program and how many seconds it may take; what the commands before it left counts too."""

    limit: float
    argv: tuple[str, ...]
    tool: Tool | None = None
    writes: str = ""  # a file that `tool` makes, which is added to the one of this name in OUT


@dataclass(frozen=True)
class Step:
    """Commands that belong together. estimate: the seconds that they should take."""

    name: str
    what: str
    estimate: int
    commands: tuple[Command, ...]

    @property
    def limit(self) -> float:
        return sum(command.limit for command in self.commands)


@dataclass
class Ended:
    """How a step, or a command, ended. The worst of its commands is how a step ended."""

    status: str  # one of STATUSES
    detail: str = ""
    seconds: float = 0.0


# The worst last. "wrong": it says itself that something is; "missing": a tool.
STATUSES = ("ok", "no device", "missing", "no time", "out of time", "wrong", "crashed")


@dataclass
class Run:
    """One call of `gpu_check.py run`: where it writes, on which device, with what in every line."""

    out: Path
    device: Device | None
    seconds: float
    about: dict[str, Any] = field(default_factory=dict)  # versions, commit
    environ: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    say: Callable[[str], None] = lambda text: print(text, flush=True)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.start = time.monotonic()
        self.ended: dict[str, Ended] = {}
        self.has_device = self.device is not None
        self._about = {"device": self.device.about() if self.device else None, **self.about}

    def steps(self, steps: Sequence[Step]) -> None:
        """Runs them in this order."""
        scratch = self.out / "scratch"
        scratch.mkdir(exist_ok=True)
        self.environ |= own_places(scratch)
        results = (self.out / "results.jsonl").open("a", encoding="utf-8")
        log = (self.out / "log").open("a", encoding="utf-8")
        try:
            with results, log, Clocks(self.device) as clocks:
                for step in steps:
                    self._step(_Running(self, step, results, log, clocks))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def line(self, step: str, result: dict[str, Any], clocks: Clocks) -> str:
        at = round(time.monotonic() - self.start, 2)
        return json.dumps(
            {**result, "step": step, "at": at, **self._about, "clocks": clocks.taken()}
        )

    def _step(self, running: _Running) -> None:
        name, start = running.step.name, time.monotonic()
        self.say(f"{name}: {running.step.what} (at most {running.step.limit:.0f} s)")
        ends = []
        budget = 0.0
        for command in running.step.commands:
            budget += command.limit
            ends.append(running.command(command, start + budget))
        worst = max(ends, key=lambda end: STATUSES.index(end.status))
        details = [end.detail for end in ends if end.detail]
        ended = Ended(worst.status, "; ".join(details), round(time.monotonic() - start, 1))
        self.ended[name] = ended
        running.record({"ended": name, "status": ended.status, "detail": ended.detail})
        told = f": {ended.detail}" if ended.detail else ""
        self.say(f"  {ended.status} after {ended.seconds} s{told}")


@dataclass
class _Running:
    """A step that runs."""

    run: Run
    step: Step
    results: IO[str]
    log: IO[str]
    clocks: Clocks
    lost: str = ""  # what took the device away from the command that runs

    def record(self, result: dict[str, Any]) -> None:
        self.results.write(self.run.line(self.step.name, result, self.clocks) + "\n")
        self.results.flush()

    def command(self, command: Command, deadline: float) -> Ended:
        """Runs it, again without the kernels that took the device away, until the deadline."""
        if command.tool is not None and self.run.has_device and not command.tool.found():
            return Ended("missing", f"{command.tool.name} is not found: {command.tool.get}")
        without: list[str] = []
        while True:
            again = ("--without", ",".join(without)) if without else ()
            ended = self._once(replace(command, argv=(*command.argv, *again)), deadline)
            if ended.status != "crashed" or not self.lost or len(without) == RESTARTS:
                break
            without.append(self.lost)
        if not without:
            return ended
        told = f"{', '.join(without)} took the device away"
        return Ended("wrong", f"{told}; {ended.detail}" if ended.detail else told)

    def _once(self, command: Command, deadline: float) -> Ended:
        left = min(deadline - time.monotonic(), self.run.left())
        name = " ".join(Path(part).name for part in command.argv[:2])
        if left < LEAST:
            return Ended("no time", f"{name} was not started")
        argv = list(command.argv)
        made = self.run.out / "scratch" / "made"
        if (
            command.tool is not None and self.run.has_device
        ):  # without one the program alone says so
            found = str(command.tool.found())
            argv = [found, *(option.format(made=made) for option in command.tool.options), *argv]
        self.log.write(f"\n=== {self.step.name}: {' '.join(argv)}\n")
        self.log.flush()
        self.lost = ""
        process = subprocess.Popen(
            argv,
            cwd=self.run.out / "scratch",
            env=self.run.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_hear_interrupts,
        )
        reader = threading.Thread(target=self._read, args=(process, command), daemon=True)
        reader.start()
        try:
            in_time = self._wait(process, left)
        except BaseException:  # Ctrl-C does not reach a group of its own
            _signal(process, signal.SIGKILL)
            raise
        reader.join(timeout=GRACE)
        if command.writes and made.exists():
            with (self.run.out / command.writes).open("a", encoding="utf-8") as file:
                file.write(made.read_text(encoding="utf-8", errors="replace"))
            made.unlink()
        return self._end(name, process.returncode, in_time, left)

    def _read(self, process: subprocess.Popen[str], command: Command) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.log.write(line)
            self.log.flush()
            result = result_of(line)
            summary = SUMMARY.match(line)
            if result is not None:
                self.lost = result.get("lost", "")
                self.record(result)
            elif summary and command.tool is not None:
                name = f"{command.tool.does} of {Path(command.argv[0]).name}"
                self.record({"cell": name, "summary": summary[1]})

    @staticmethod
    def _wait(process: subprocess.Popen[str], seconds: float) -> bool:
        """Whether it ended in time. It is asked to end before it is ended."""
        grace = min(GRACE, seconds / 4)
        for signal_, wait in ((signal.SIGINT, seconds - grace), (signal.SIGKILL, grace)):
            try:
                process.wait(timeout=wait)
                in_time = signal_ == signal.SIGINT
                _signal(process, signal.SIGKILL)  # what it left running
                return in_time
            except subprocess.TimeoutExpired:
                _signal(process, signal_)
        process.wait()
        return False

    def _end(self, name: str, status: int, in_time: bool, left: float) -> Ended:
        if not in_time:
            return Ended("out of time", f"{name} was ended after {left:.0f} s")
        if status == OK:
            self.run.has_device = True
            return Ended("ok")
        if status == NO_DEVICE:
            return Ended("no device")
        if status == LOST:
            return Ended("crashed", f"{name} lost the device")
        if status < 0:
            return Ended("crashed", f"{name} died of {signal.Signals(-status).name}")
        return Ended("wrong", f"{name} ended with status {status}")


def result_of(line: str) -> dict[str, Any] | None:
    """The result that a line of output holds."""
    if not line.startswith('{"cell"'):
        return None
    try:
        result: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return result


def own_places(scratch: Path) -> dict[str, str]:
    """So that no command writes anywhere but to its output and to a folder that is removed."""
    names = ("TMPDIR", "XDG_CACHE_HOME", "CUDA_CACHE_PATH", "TRITON_CACHE_DIR")
    names += ("TORCHINDUCTOR_CACHE_DIR", "HF_HOME")
    python = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
    return {**dict.fromkeys(names, str(scratch)), **python}


def _hear_interrupts() -> None:
    """A run that was started in the background ignores SIGINT, and so would what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return


if __name__ == "__main__":
    sys.exit("gpu_check.py is the program")
