"""Names and links: what stays in a directory and what leads out of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from wanda_ext.files.inside import check_inside, is_plain, leads_out


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/abs", "a/b", "../a", "a/..", "a\\b", "a\0b", None, 3, ["a"]]
)
def test_paths_are_no_names(name: object) -> None:
    assert not is_plain(name)


@pytest.mark.parametrize("name", ["a", "model.safetensors", "..a", ".hidden", "größe"])
def test_names(name: str) -> None:
    assert is_plain(name)


def linked(folder: Path, name: str, to: str) -> Path:
    (folder / name).symlink_to(to)
    return folder / name


def test_links(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "sub").mkdir(parents=True)
    for path in (home / "a", home / "sub" / "b", tmp_path / "secret"):
        path.write_text("x")
    assert not leads_out(home / "a", home)
    assert not leads_out(linked(home, "in", "sub/b"), home)
    assert not leads_out(linked(home / "sub", "up", "../a"), home)
    assert not leads_out(linked(home, "absolute", str(home / "a")), home)
    outside = [
        linked(home, "out", "../secret"),
        linked(home, "out of out", "out"),
        linked(home, "nowhere", "missing"),
        linked(home, "loop", "loop"),
        linked(home, "directory", ".."),
        linked(home, "etc", "/etc/hostname"),
    ]
    for path in outside:
        assert leads_out(path, home), path
    assert leads_out(home / "directory" / "secret", home)
    assert not leads_out(home / "not there", home)
    with pytest.raises(ValueError, match=r"out is a link to .*secret, outside of the checkpoint's"):
        check_inside(home / "out", home)
    by_link = linked(tmp_path, "other name", "home")
    assert not leads_out(by_link / "a", by_link)


def test_the_hubs_cache(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "revision"
    (snapshot / "sub").mkdir(parents=True)
    (repository / "blobs" / "deep").mkdir(parents=True)
    for path in (repository / "blobs" / "hash", repository / "blobs" / "deep" / "x"):
        path.write_text("x")
    (repository / "secret").write_text("x")
    assert not leads_out(linked(snapshot, "a", "../../blobs/hash"), snapshot)
    inner = linked(snapshot / "sub", "a", "../../../blobs/hash")
    assert not leads_out(inner, snapshot) and not leads_out(inner, snapshot / "sub")
    for name, to in (("b", "../../secret"), ("c", "../../blobs/deep/x"), ("d", "../../blobs")):
        assert leads_out(linked(snapshot, name, to), snapshot), name
    linked(repository / "blobs", "trap", str(tmp_path / "models--org--name" / "secret"))
    assert leads_out(linked(snapshot, "e", "../../blobs/trap"), snapshot)


def test_blobs_that_are_a_link_are_no_cache(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("x")
    snapshot = tmp_path / "evil" / "snapshots" / "revision"
    snapshot.mkdir(parents=True)
    linked(tmp_path / "evil", "blobs", "../private")
    assert leads_out(linked(snapshot, "key", "../../blobs/key"), snapshot)
