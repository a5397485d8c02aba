"""gpu_check: the logic of a run, on a device that is not there; what it refuses, what it says.

The device and the programs are made up: no machine here has a GPU.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from fake_device import FakeDevice, cell, program, run_steps, step

import gpu_check
import gpu_device
import gpu_prepare
import gpu_tests
from gpu_run import Tool, result_of

HANG = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(99)"
CRASH = f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})"


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def statuses(run) -> dict[str, str]:
    return {name: ended.status for name, ended in run.ended.items()}


# --- The steps ------------------------------------------------------------------------------------


def test_the_limits_fit_a_run():
    steps = gpu_check.steps(Path("prepared"), Path("out"))
    names = ["info", "check", "tests", "pruning", "decode", "prefill", "ncu", "sanitizers"]
    assert [s.name for s in steps] == names
    assert sum(s.limit for s in steps) <= gpu_check.SECONDS == 560
    for s in steps:
        assert 0 < s.estimate <= s.limit, s.name
    assert sum(s.estimate for s in steps) == 540


def test_every_command_names_a_file_that_is_prepared():
    for s in gpu_check.steps(gpu_prepare.ROOT, Path("out")):
        for command in s.commands:
            names = [part for part in command.argv if part.startswith(str(gpu_prepare.ROOT))]
            own = Path(names[0])
            if own.parent.name == "programs":
                assert own.name in gpu_prepare.PROGRAMS
                assert (gpu_prepare.ROOT / f"benchmarks/cpp/{own.name}.cu").exists()
            else:
                assert own.exists()


def test_the_gpu_tests_are_found_by_name():
    names = {Path(name).name for name in gpu_tests.files()}
    assert names == {"test_gpu.py", "test_gpu_bitmap.py", "test_gpu_linear_24.py"}


# --- What may go wrong ----------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_ends_the_run(tmp_path):
    start = time.monotonic()
    run = run_steps(
        tmp_path,
        step("crashes", program(cell("before") + CRASH), program(cell("after"))),
        step("hangs", program(cell("early") + HANG, limit=2), program(cell("late"))),
        step("is wrong", program(cell("x", wrong={"k/1": "off"}) + "raise SystemExit(1)")),
        step("cannot start", program("import no_such_module")),
        step("is fine", program("print('{not a result'); print('text');" + cell("y", value=2))),
        device=FakeDevice(),
    )
    assert time.monotonic() - start < 30
    assert statuses(run) == {
        "crashes": "crashed",
        "hangs": "out of time",
        "is wrong": "wrong",
        "cannot start": "wrong",
        "is fine": "ok",
    }
    assert run.ended["crashes"].detail.endswith("died of SIGSEGV")
    assert run.ended["is wrong"].detail.endswith("ended with status 1")
    found = [line["cell"] for line in lines(tmp_path) if "cell" in line]
    assert found == ["before", "after", "early", "late", "x", "y"]
    ended = {line["ended"]: line["status"] for line in lines(tmp_path) if "ended" in line}
    assert ended == statuses(run)
    log = (tmp_path / "log").read_text()
    assert "No module named 'no_such_module'" in log and "{not a result\ntext\n" in log
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "log"}


def test_every_line_says_where_it_comes_from(tmp_path):
    device = FakeDevice()
    run_steps(
        tmp_path, step("one", program("import time; time.sleep(0.3);" + cell("x"))), device=device
    )
    for line in lines(tmp_path):
        assert line["step"] == "one" and line["at"] >= 0
        assert line["device"] == {"name": "Test GPU", "driver": "999.9"}
        assert line["versions"] == {"python": "3"} and line["commit"] == "abc"
    clocks = lines(tmp_path)[0]["clocks"]
    low, middle, high = clocks["sm_mhz"]
    assert clocks["readings"] > 2 and low < middle < high and clocks["watts"] == [500, 500, 500]
    assert clocks["slowed"] == "0x4"
    assert lines(tmp_path)[1]["clocks"]["sm_mhz"][0] > high  # those since the line before


@pytest.mark.slow
def test_a_program_may_end_itself_at_its_limit(tmp_path):
    code = "import time\ntry: time.sleep(99)\nexcept KeyboardInterrupt: " + cell("partial") + "\n"
    run = run_steps(tmp_path, step("long", program(code, limit=4)), device=FakeDevice())
    assert statuses(run) == {"long": "out of time"}
    assert lines(tmp_path)[0]["cell"] == "partial"
    assert run.ended["long"].seconds < 4


@pytest.mark.slow
def test_what_a_program_leaves_running_is_ended(tmp_path):
    child = "import time; time.sleep(1.5); open('late', 'w')"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    run_steps(
        tmp_path,
        step("leaves", program(code)),
        step("waits", program("import time; time.sleep(2)")),
    )
    assert not list(tmp_path.rglob("late"))


def test_a_whole_run_ends_in_time(tmp_path):
    steps = [step(f"step {i}", program("import time; time.sleep(9)", limit=9)) for i in range(9)]
    start = time.monotonic()
    run = run_steps(tmp_path, *steps, seconds=2.5, device=FakeDevice())
    assert time.monotonic() - start < 4
    assert statuses(run)["step 0"] == "out of time"
    assert set(list(statuses(run).values())[1:]) == {"no time"}


def test_what_takes_the_device_away_is_left_out(tmp_path):
    code = (
        "import sys, json\n"
        "left_out = sys.argv[2].split(',') if len(sys.argv) > 2 else []\n"
        "for kernel in ('a', 'b', 'c'):\n"
        "    if kernel in left_out: continue\n"
        "    lost = {'lost': kernel} if kernel != 'b' else {}\n"
        "    print(json.dumps({'cell': kernel, **lost}), flush=True)\n"
        "    if lost: sys.exit(4)\n"
    )
    run = run_steps(tmp_path, step("check", program(code)), device=FakeDevice())
    assert [line["cell"] for line in lines(tmp_path)[:-1]] == ["a", "b", "c", "b"]
    assert statuses(run) == {"check": "wrong"}
    assert run.ended["check"].detail == "a, c took the device away"


# --- Tools ----------------------------------------------------------------------------------------


def tool(folder: Path, text: str, *options: str, does: str = "") -> Tool:
    path = folder / "some_tool"
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return Tool("some_tool", options, "install it", does)


def test_a_tool_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    nowhere = Tool("no_such_tool", (), "install the toolkit")
    run = run_steps(tmp_path, step("ncu", program("1", tool=nowhere)), device=FakeDevice())
    assert statuses(run) == {"ncu": "missing"}
    assert run.ended["ncu"].detail == "no_such_tool is not found: install the toolkit"


def test_what_a_tool_writes_is_gathered(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    text = "import sys; open(sys.argv[1], 'w').write('row\\n')"
    ncu = tool(tmp_path, text, "{made}")
    out = tmp_path / "out"
    one = program("1", tool=ncu, writes="ncu.csv")
    run_steps(out, step("ncu", one, one), device=FakeDevice())
    assert (out / "ncu.csv").read_text() == "row\nrow\n"
    assert {path.name for path in out.iterdir()} == {"results.jsonl", "log", "ncu.csv"}


def test_a_sanitizers_summary_is_a_result(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    checked = tmp_path / "linear_24"
    checked.touch()
    text = "print('========= RACECHECK SUMMARY: 2 hazards displayed'); raise SystemExit(9)"
    sanitizer = tool(tmp_path, text, "--tool", "racecheck", does="racecheck")
    command = gpu_check.Command(60, (str(checked), "--check"), sanitizer)
    run = run_steps(tmp_path / "out", step("sanitizers", command), device=FakeDevice())
    assert statuses(run) == {"sanitizers": "wrong"}
    found = lines(tmp_path / "out")[0]
    assert found["cell"] == "racecheck of linear_24"
    assert found["summary"] == "2 hazards displayed"


# --- Without a device -----------------------------------------------------------------------------


def test_no_device(tmp_path):
    ncu = Tool("no_such_tool", (), "")
    none = "raise SystemExit(3)"
    run = run_steps(tmp_path, step("a", program(none)), step("b", program(none, tool=ncu)))
    assert statuses(run) == {"a": "no device", "b": "no device"}
    assert all(line["device"] is None and line["clocks"] == {} for line in lines(tmp_path))


@pytest.mark.parametrize(
    ("codes", "status"),
    [((3, 3), 3), ((0, 0), 0), ((0, 1), 1), ((3, 1), 1), ((3, 0), 1)],
)
def test_exit_status(codes, status, tmp_path, monkeypatch, capsys):
    made = [step(f"step {i}", program(f"raise SystemExit({c})")) for i, c in enumerate(codes)]
    monkeypatch.setattr(gpu_check, "steps", lambda prepared, out: tuple(made))
    monkeypatch.setattr(gpu_device, "find", lambda: None)
    prepared(tmp_path)
    assert gpu_check.run(tmp_path, tmp_path / "out", 60, []) == status
    printed = capsys.readouterr().out
    assert "claim " in printed and printed == printed.replace("holds\n", "")
    assert (tmp_path / "out/table.txt").read_text() in printed


def test_an_interrupted_run_ends_its_programs_and_tells_what_it_has(tmp_path, monkeypatch, capsys):
    late = tmp_path / "late"
    hang = cell("early") + f"import time; time.sleep(3); open({str(late)!r}, 'w')"
    made = (step("one", program(hang)), step("two", program(cell("never"))))
    monkeypatch.setattr(gpu_check, "steps", lambda prepared, out: made)
    prepared(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    timer = threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        assert gpu_check.run(tmp_path, tmp_path / "out", 60, []) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [line["cell"] for line in lines(tmp_path / "out")] == ["early"]
    told = capsys.readouterr().out
    assert "interrupted: the steps that follow were not run" in told and "claim " in told
    time.sleep(2)
    assert not late.exists() and not (tmp_path / "out/scratch").exists()


def test_only_some_steps_and_again_into_the_same_folder(tmp_path, monkeypatch):
    made = tuple(step(name, program(cell(name))) for name in ("one", "two"))
    monkeypatch.setattr(gpu_check, "steps", lambda prepared, out: made)
    prepared(tmp_path)
    for _ in range(2):
        assert gpu_check.run(tmp_path, tmp_path / "out", 60, ["two"]) == 0
    assert [line["cell"] for line in lines(tmp_path / "out") if "cell" in line] == ["two", "two"]


# --- What is refused ------------------------------------------------------------------------------


def prepared(folder: Path, **changes: str) -> None:
    here = {"python": f"{sys.version_info[0]}.{sys.version_info[1]}", "commit": "abc", "wheel": "w"}
    about = {**here, "machine": gpu_check.platform.machine(), **changes}
    (folder / "prepared.json").write_text(json.dumps(about))


def test_a_folder_for_another_python_is_refused(tmp_path, monkeypatch, capsys):
    prepared(tmp_path, python="3.99")
    arguments = ["gpu_check", "run", "--prepared", str(tmp_path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", arguments)
    assert gpu_check.main() == 2
    assert "is for CPython 3.99 on" in capsys.readouterr().err
    (tmp_path / "prepared.json").unlink()
    assert gpu_check.main() == 2
    assert "has no prepared.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_prepare_refuses_before_it_builds(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_prepare, "build_wheel", lambda *_: pytest.fail("built first"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    refused = pytest.raises(gpu_prepare.PrepareError, match="is not empty")
    with refused:
        gpu_prepare.prepare("3.11", "90", tmp_path / "full")
    for python, why in (
        ("3.99", "CPython 3.99 is not found"),
        ("newest", "expected such as 3.12"),
        (str(tmp_path / "full/file"), "is not an interpreter"),
    ):
        with pytest.raises(gpu_prepare.PrepareError, match=why):
            gpu_prepare.prepare(python, "90", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def build(interpreter, out, scratch, environ):
        (out / "half.whl").touch()
        code = "print('x.cu: error: no'); print('and\\n' * 40); raise SystemExit(7)"
        gpu_prepare.run(sys.executable, "-c", code)

    monkeypatch.setattr(gpu_prepare, "toolchain", lambda archs: {})
    monkeypatch.setattr(gpu_prepare.shutil, "which", lambda name: name)
    monkeypatch.setattr(gpu_prepare, "build_wheel", build)
    with pytest.raises(gpu_prepare.PrepareError, match=r"ended with status 7:\nx.cu: error: no\n"):
        gpu_prepare.prepare(sys.executable, "90", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_carried(tmp_path, monkeypatch):
    wheel = tmp_path / "wanda_ext-0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("wanda_ext/__init__.py", "")
    out = tmp_path / "out"
    out.mkdir()
    told = gpu_prepare.fill(out, wheel, sys.executable, "90", "abc")
    about = gpu_check.read_prepared(out)
    assert about == {key: value for key, value in told.items() if key != "bytes"}
    assert about["archs"] == "90" and about["commit"] == "abc"
    for name in (
        "benchmarks/gpu_check.py",
        "python_tests/test_gpu.py",
        "site/wanda_ext/__init__.py",
    ):
        assert (out / name).exists()
    monkeypatch.setattr(gpu_prepare, "MOST_BYTES", 1 << 10)
    with pytest.raises(gpu_prepare.PrepareError, match=r"holds \d+ MiB, over 0; ask for fewer"):
        gpu_prepare.fill(tmp_path / "again", wheel, sys.executable, "90", "abc")


def test_a_python_by_its_version(tmp_path, monkeypatch):
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert (
        gpu_prepare.find_python(here) == gpu_prepare.find_python(sys.executable) == sys.executable
    )
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    for version in ("3.77.2", "3.77.10", "3.7.1"):
        (tmp_path / "versions" / version / "bin").mkdir(parents=True)
        (tmp_path / "versions" / version / "bin/python").touch()
    assert gpu_prepare.find_python("3.77") == str(tmp_path / "versions/3.77.10/bin/python")


@pytest.mark.parametrize(
    "line", ['{"cell": "x"', "text", '{"other": 1}', ' {"cell": "x"}', ""], ids=repr
)
def test_what_is_no_result(line):
    assert result_of(line) is None
    assert result_of('{"cell": "x", "m": 1}\n') == {"cell": "x", "m": 1}


# --- The device -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "which"),
    [(None, "0"), ("2,3", "2"), ("GPU-ab, 1", "GPU-ab"), ("", None), ("-1", None)],
)
def test_the_one_device_that_is_visible(given, which):
    assert gpu_device.visible({} if given is None else {"CUDA_VISIBLE_DEVICES": given}) == which


class FakeNvml:
    """The management library; a clock that is not supported, as some devices have it."""

    def __getattr__(self, name):
        return lambda *arguments: self.call(name, *arguments)

    def call(self, name, *arguments):
        if name in ("nvmlSystemGetDriverVersion", "nvmlDeviceGetName"):
            arguments[-2].value = f"{name[-4:]}".encode()
        elif name == "nvmlDeviceGetPowerUsage":
            arguments[-1]._obj.value = 650_000
        elif name == "nvmlDeviceGetClockInfo":
            if arguments[1] == gpu_device.MEMORY:
                return 3  # NVML_ERROR_NOT_SUPPORTED
            arguments[-1]._obj.value = 1980
        return 0


def test_what_the_management_library_tells():
    device = gpu_device.NvmlDevice(FakeNvml(), "0")
    assert device.about()["name"] == "Name" and device.about()["driver"] == "sion"
    reading = device.reading()
    assert (reading["sm_mhz"], reading["memory_mhz"], reading["watts"]) == (1980, 0, 650)


def test_no_management_library(monkeypatch):
    monkeypatch.setattr(gpu_device, "LIBRARIES", ("libno-such-library.so.1",))
    assert gpu_device.find({}) is None
