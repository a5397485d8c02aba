"""What goes along when a checkpoint is written again: every file that is no weights of it.

Left, and named, are weights in another form (they would still be the old ones), code unless it is
trusted, links that lead out of the directory, and what a download or a version control keeps.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Container, Mapping
from pathlib import Path

from wanda_ext.files import MARKER, check_inside, leads_out

CONFIG = "config.json"
# Of other frameworks, engines and trainers; .safetensors where they are of the whole model.
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".ot", ".onnx")
WHOLE_MODEL = ("model", "consolidated", "pytorch_model")
PLACES_OF_WHOLE_MODELS = ("", "original")
HIDDEN = (".git", ".cache")
# What transformers reads of a directory by its name.
READ = (
    *(".json", ".jinja", ".model", ".tiktoken", ".py", "vocab.txt", "merges.txt", "bpe.codes"),
    *(".safetensors", ".bin", "additional_chat_templates"),
)


def copy_other_files(
    source: Path, folder: Path, code: bool = False, done: Container[str] = ()
) -> dict[str, str]:
    """Copies all other files of a checkpoint; name -> why, of what is left.

    `done`: files in `source` whose content is written otherwise. Nothing that lies in `folder`
    already is written over. code: whether .py files may go along.
    """
    left: dict[str, str] = {}
    _copy(source, source, folder, code, done, left, ())
    return left


def check_links(folder: Path) -> None:
    """Raises ValueError for a file that transformers may read where it is a link that leads out."""
    for path in folder.iterdir():
        if path.name.endswith(READ):
            check_inside(path, folder)


def told_left(left: Mapping[str, str]) -> str:
    """A line for a person; "" where nothing is left."""
    told = "; ".join(f"{name} ({why})" for name, why in left.items())
    return told and f"not taken along: {told}"


def _copy(
    here: Path,
    source: Path,
    folder: Path,
    code: bool,
    done: Container[str],
    left: dict[str, str],
    above: tuple[Path, ...],
) -> None:
    above = (*above, here.resolve())
    for path in sorted(here.iterdir()):
        inner = path.relative_to(source)
        name, target = inner.as_posix(), folder / inner
        if name in (CONFIG, MARKER) or name in done:
            continue
        why = _why_left(path, source, inner, code)
        if not why and path.is_dir() and path.resolve() in above:
            why = "a link to a directory that it lies in"
        if why:
            left[name] = why
        elif path.is_dir():
            target.mkdir(exist_ok=True)
            _copy(path, source, folder, code, done, left, above)
        elif not os.path.lexists(target):
            shutil.copy(path, target)


def _why_left(path: Path, source: Path, inner: Path, code: bool) -> str:
    if leads_out(path, source):
        return f"a link to {path.readlink()}, which leads out of the directory"
    if path.is_dir():
        return "of a download or a version control" if path.name in HIDDEN else ""
    if not path.is_file():
        return "no regular file"
    if path.suffix == ".py" and not code:
        return "code, which goes along only where trust_remote_code says so"
    return "weights in another form" if _is_weights(path.name, inner.parent.as_posix()) else ""


def _is_weights(name: str, place: str) -> bool:
    name = name.removesuffix(".index.json")
    if name.endswith(".safetensors"):
        of_all = name.startswith(WHOLE_MODEL)
        return of_all and place.removesuffix(".") in PLACES_OF_WHOLE_MODELS
    return name.endswith(OTHER_WEIGHTS)
