"""Names and links that a directory holds, and whether they stay in it.

A link may lead to another file of the directory. One more place counts as inside: the Hub's cache
keeps a model as snapshots/REVISION, whose files are links to ../../blobs/HASH, so from below
snapshots/REVISION links may lead to the files right in that `blobs`, which is no link itself.
"""

from __future__ import annotations

from pathlib import Path


def is_plain(name: object) -> bool:
    """Whether this is the name of a file, and no path to anywhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {*"/\\\0"} & {*name}


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a path in a directory leads outside of it by a link, or to nowhere."""
    home = folder.resolve()
    try:
        leads = path.resolve(strict=True)
    except (OSError, RuntimeError):  # nothing is there, or a loop
        return path.is_symlink()
    return not (leads.is_relative_to(home) or leads.parent == _blobs(home))


def check_inside(path: Path, folder: Path) -> None:
    """Raises ValueError for a path in a directory that `leads_out`."""
    if leads_out(path, folder):
        raise ValueError(
            f"{path} is a link to {path.resolve()}, outside of the checkpoint's directory: put the "
            "file itself there"
        )


def _blobs(home: Path) -> Path | None:
    """Where a snapshot in the Hub's cache, or a directory in it, has its files."""
    snapshots = (parent for parent in home.parents if parent.name == "snapshots")
    nearest = next(snapshots, None)
    return None if nearest is None else nearest.parent / "blobs"
