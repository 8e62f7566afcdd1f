"""Writing all or nothing, and manifests of what was written.

A destination is written under a hidden name beside it, takes its own when it is complete, and is removed when anything
fails. Nothing that exists is overwritten. Its manifest lists SHA-256 digests in the form of `sha256sum`: SHA256SUMS in a
folder, NAME.sha256 beside a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rcm_mcore.interop.files import endings

MANIFEST = "SHA256SUMS"
_SUFFIX = ".sha256"


def check_destination(path: Path, suffixes: tuple[str, ...], *, folder: bool = False) -> None:
    """Checks that path can be written: a new file with one of the suffixes or a new or empty folder.

    folder: whether a name without one of the suffixes means a folder; without suffixes it always does.
    Raises: ValueError saying what stands in the way.
    """
    is_file = path.suffix in suffixes
    if suffixes and not is_file and not folder:
        raise ValueError(f"{path}: the destination is a file, give a name ending in {endings(suffixes)}")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} does not exist")
    empty_folder = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    for taken in (path, _beside(path)) if is_file else (path,):
        if os.path.lexists(taken) and (is_file or not empty_folder):
            raise ValueError(f"{taken}: exists already and is not overwritten; give another destination or remove it")


@contextlib.contextmanager
def atomic_destination(path: Path, suffixes: tuple[str, ...], *, folder: bool = False) -> Iterator[Path]:
    """A path beside `path` to write to, which gets a manifest and is renamed to `path` when the body ends.

    It is removed when the body raises. suffixes, folder: as for `check_destination`.
    Raises: ValueError when the destination cannot be written.
    """
    check_destination(path, suffixes, folder=folder)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        if partial.is_dir():
            files = sorted(file for file in partial.rglob("*") if file.is_file())
            lines = [_line(file, file.relative_to(partial).as_posix()) for file in files]
            (partial / MANIFEST).write_text("".join(lines), encoding="utf-8")
        else:
            _beside(partial).write_text(_line(partial, path.name), encoding="utf-8")
        os.replace(partial, path)  # an empty folder is replaced too
        if path.is_file():
            os.replace(_beside(partial), _beside(path))
    except BaseException:  # an interruption as well must leave nothing
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
            _beside(partial).unlink(missing_ok=True)
        raise


def verify(path: Path) -> None:
    """Checks a file, or the files of a folder, against their manifest, if there is one.

    For a folder this may be that of the folder it is in (`transformer/` of a pipeline), whose other files are not looked at.
    Raises: ValueError naming the file that is missing or not what was written.
    """
    manifest = path / MANIFEST if path.is_dir() else _beside(path)
    if path.name == "transformer" and not manifest.is_file():
        manifest = path.parent / MANIFEST
    if not manifest.is_file():
        return
    for number, line in enumerate(manifest.read_text(encoding="utf-8").splitlines(), start=1):
        digest, _, name = line.partition(" ")
        # A file and what is beside it may have been renamed together.
        file = path if manifest == _beside(path) else manifest.parent / name.lstrip(" *")
        if not name or len(digest) != 64:
            raise ValueError(f"{manifest}: line {number} is not a digest and a name")
        if file != path and path not in file.parents:
            continue
        if not file.is_file():
            raise ValueError(f"{file}: missing, but listed in {manifest}")
        if _digest(file) != digest:
            raise ValueError(f"{file}: damaged: its SHA-256 is not the one in {manifest}")


def _line(file: Path, name: str) -> str:
    return f"{_digest(file)}  {name}\n"


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _beside(path: Path) -> Path:
    return path.with_name(path.name + _SUFFIX)
