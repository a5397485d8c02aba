"""Dispatch tables: buckets, files that are read strictly and written whole, and what wins."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from fake_gpu import GPU, WIDE, row

from wanda_ext.packed import dispatch_table
from wanda_ext.packed.dispatch_table import (
    BUCKETS,
    COMMITTED,
    Gpu,
    Table,
    bucket_of,
    cache_path,
    load_table,
    read_rows,
    store,
    write_rows,
)


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the user's own, and a committed table that tests may write."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(dispatch_table, "COMMITTED", tmp_path / "committed.json")
    return tmp_path


def load(gpu: Gpu = GPU, refused: str = "") -> list:
    return list(load_table(gpu, lambda r: f"no kernel {r.kernel}" if r.kernel == refused else ""))


# --- Buckets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "bucket"), [(1, 1), (2, 2), (3, 4), (8, 8), (9, 16), (2049, 4096), (10**6, 16384)]
)
def test_a_bucket_holds_all_m_above_the_one_before(m, bucket):
    assert bucket_of(m) == bucket


def test_times_are_summed_over_the_buckets_of_the_tokens():
    rows = [row(1), row(16, packed_us=20.0, dense_us=50.0), row(16384, packed_us=1.0, dense_us=2.0)]
    table = Table(rows)
    assert table.row("bfloat16", 4096, 4096, 9) == rows[1]
    assert table.times("bfloat16", 4096, 4096, (1, 9, 16)) == (50.0, 115.0)
    assert table.times("bfloat16", 4096, 4096, (99999,)) == (1.0, 2.0)
    assert table.times("bfloat16", 4096, 4096, (1, 2)) is None
    assert table.times("float16", 4096, 4096, (1,)) is None
    assert table.times("bfloat16", 4096, 4112, (1,)) is None


# --- Files ----------------------------------------------------------------------------------------


def test_the_committed_table_is_there_and_whole():
    assert COMMITTED.name == "dispatch.json" and COMMITTED.is_file()
    assert read_rows(COMMITTED) == []  # nothing is measured yet


def test_round_trip_one_line_a_row(user):
    rows = [row(m, packed_us=m / 3) for m in BUCKETS]
    write_rows(user / "deep" / "table.json", rows)
    assert read_rows(user / "deep" / "table.json") == rows
    assert (user / "deep" / "table.json").read_text().count("\n") == len(rows) + 5
    assert [path.name for path in (user / "deep").iterdir()] == ["table.json"]


def test_no_file_is_no_rows(user):
    assert read_rows(user / "none.json") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a dispatch table"),
        ("\0", "is not a dispatch table"),
        ("[]", "not a dispatch table of format_version 1, but of None"),
        ('{"format_version": 2, "rows": []}', "of format_version 1, but of 2"),
        ('{"format_version": 1, "rows": 3}', "not a dispatch table"),
        ('{"format_version": 1, "rows": [3]}', "row 0: expected device, arch, .* got 3"),
    ],
)
def test_foreign_files(text, message, user):
    (user / "table.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rows(user / "table.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("m", 3),
        ("m", True),
        ("n", 0),
        ("k", 24),
        ("k", "4096"),
        ("dtype", "float32"),
        ("kernel", None),
        ("splits", 1.5),
        ("packed_us", float("nan")),
        ("packed_us", 0),
        ("dense_us", float("inf")),
        ("dense_us", "3"),
    ],
)
def test_bad_fields_are_named(field, value, user):
    write_rows(user / "table.json", [row(), row(2)])
    content = json.loads((user / "table.json").read_text())
    content["rows"][1][field] = value
    (user / "table.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"table\.json, row 1: .*{field}"):
        read_rows(user / "table.json")


@pytest.mark.parametrize("change", [{"more": 1}, {"sms": None}])
def test_rows_have_exactly_their_fields(change, user):
    stored = {key: value for key, value in (asdict(row()) | change).items() if value is not None}
    (user / "table.json").write_text(json.dumps({"format_version": 1, "rows": [stored]}))
    with pytest.raises(ValueError, match="row 0: expected device, arch, sms"):
        read_rows(user / "table.json")


def test_a_failed_write_leaves_the_old_file(user, monkeypatch):
    path = user / "table.json"
    write_rows(path, [row()])

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_rows(path, [row(2)])
    assert read_rows(path) == [row()] and [p.name for p in user.iterdir()] == ["table.json"]


def test_where_the_cache_is(user, monkeypatch):
    assert cache_path() == user / "cache" / "wanda_ext" / "dispatch.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/somewhere")
    assert cache_path() == Path("/somewhere/.cache/wanda_ext/dispatch.json")


# --- Loading --------------------------------------------------------------------------------------


def test_the_users_rows_win_over_the_committed_ones():
    write_rows(dispatch_table.COMMITTED, [row(1), row(2)])
    store([row(2, WIDE), row(4)])
    assert load() == [row(1), row(2, WIDE), row(4)]


def test_only_rows_of_this_gpu_count():
    write_rows(dispatch_table.COMMITTED, [row(), row(2, device="Other GPU"), row(4, sms=114)])
    assert load() == [row()]
    assert load(replace(GPU, name="Other GPU")) == [row(2, device="Other GPU")]


def test_store_replaces_rows_for_the_same_and_keeps_the_others():
    store([row(1), row(2)])
    store([row(2, WIDE), row(1, dtype="float16")])
    assert read_rows(cache_path()) == [row(1), row(2, WIDE), row(1, dtype="float16")]


def test_rows_that_do_not_fit_the_build_are_left_out_with_one_warning():
    write_rows(dispatch_table.COMMITTED, [row(1), row(2, "gone"), row(4, "gone")])
    with pytest.warns(RuntimeWarning) as caught:
        assert load(refused="gone") == [row(1)]
    (warning,) = caught
    assert "2 rows of" in str(warning.message) and "(no kernel gone)" in str(warning.message)
    assert "run wanda_ext.bench.tune again" in str(warning.message)


def test_rows_of_other_gpus_warn_of_nothing():
    write_rows(dispatch_table.COMMITTED, [row(1, "gone", device="Other GPU")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(refused="gone") == []


@pytest.mark.parametrize("text", ["{", '{"format_version": 9, "rows": []}'])
def test_a_broken_cache_is_ignored_with_one_warning_and_replaced(text):
    write_rows(dispatch_table.COMMITTED, [row(1)])
    cache_path().parent.mkdir(parents=True)
    cache_path().write_text(text)
    with pytest.warns(RuntimeWarning, match=r"delete it, or run wanda_ext\.bench\.tune") as caught:
        assert load() == [row(1)]
    assert len(caught) == 1
    store([row(2)])
    assert load() == [row(1), row(2)]


def test_a_user_without_a_home_is_warned(monkeypatch):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", fail)
    with pytest.warns(RuntimeWarning, match="home directory"):
        assert load() == []


def test_a_cache_that_is_a_directory_is_warned_of():
    cache_path().mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="is not a dispatch table"):
        assert load() == []
