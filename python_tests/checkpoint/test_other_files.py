"""What goes along with a checkpoint, and what is left and named: files, code, links."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wanda_ext.checkpoint.other_files import check_links, copy_other_files, told_left

KEPT = (
    *("README.md", "tokenizer.json", "preprocessor_config.json", "deep/er/notes.txt"),
    *("chat_template.jinja", "mtp.safetensors", "vision-lora/adapter_model.safetensors"),
    *("1_Dense/model.safetensors", ".gitattributes", "sub/config.json", "sub/wanda_ext.json"),
)
LEFT = {
    "pytorch_model.bin": "weights in another form",
    "pytorch_model.bin.index.json": "weights in another form",
    "consolidated.safetensors": "weights in another form",
    "original/consolidated.00.pth": "weights in another form",
    "original/model.safetensors": "weights in another form",
    "model.fp16.safetensors": "weights in another form",
    "onnx/model.onnx": "weights in another form",
    "modeling_odd.py": "code",
    "deep/tool.py": "code",
    ".git": "version control",
    "notes.txt": "leads out of the directory",
    "deep/link": "leads out of the directory",
    "outside": "leads out of the directory",
    "loop": "a link to a directory that it lies in",
    "pipe": "no regular file",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    files = [name for name, why in LEFT.items() if why.startswith(("weights", "code"))]
    for name in (*KEPT, *files, "config.json", "model.safetensors", "wanda_ext.json", ".git/HEAD"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(name)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "key").write_text("secret")
    (home / "notes.txt").symlink_to("../secret")
    (home / "deep" / "link").symlink_to(tmp_path / "secret")
    (home / "outside").symlink_to("../directory")
    (home / "loop").symlink_to(".")
    (home / "inside").symlink_to("deep")
    (home / "again.md").symlink_to("README.md")
    os.mkfifo(home / "pipe")
    return home


def files_of(folder: Path) -> dict[str, str]:
    assert not [path for path in folder.rglob("*") if path.is_symlink()]
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


@pytest.mark.parametrize("code", [False, True])
def test_what_goes_along(source: Path, tmp_path: Path, code: bool) -> None:
    (tmp_path / "dst").mkdir()
    left = copy_other_files(source, tmp_path / "dst", code, {"model.safetensors"})
    expected = {name: name for name in KEPT} | {"again.md": "README.md"}
    expected["inside/er/notes.txt"] = "deep/er/notes.txt"
    why = {name: told for name, told in LEFT.items() if not (code and told == "code")}
    if code:
        expected |= {n: n for n, told in LEFT.items() if told == "code"}
        expected["inside/tool.py"] = "deep/tool.py"
    else:
        why["inside/tool.py"] = "code"
    why["inside/link"] = "leads out"
    assert files_of(tmp_path / "dst") == expected
    assert left.keys() == why.keys()
    assert [name for name in why if why[name] not in left[name]] == []
    assert "secret" not in files_of(tmp_path / "dst").values()
    assert told_left(left).startswith("not taken along: ") and told_left({}) == ""


def test_nothing_is_written_over(source: Path, tmp_path: Path) -> None:
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "README.md").write_text("mine")
    copy_other_files(source, tmp_path / "dst")
    assert (tmp_path / "dst" / "README.md").read_text() == "mine"


def test_links_that_would_be_read_are_refused(source: Path) -> None:
    check_links(source)  # notes.txt is left
    (source / "vocab.txt").symlink_to("../secret")
    with pytest.raises(ValueError, match=r"vocab.txt is a link to .*secret, outside"):
        check_links(source)
