"""Writing files so that a good file is never replaced by half of a new one."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from collab.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path` to write a file to, and move it into place when the block ends well.

    If the block fails, `path` stays as it was and the temporary file is gone. A full disk or a missing permission
    becomes a UserError that names the place.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        raise UserError(cannot_write(path, error)) from error
    finally:
        with suppress(OSError):  # the reason why nothing could be written is also one why nothing can be removed
            scratch.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path, keep_existing: bool = False) -> Iterator[Path]:
    """The same for a whole folder: fill the folder that this gives; it stands in the place of `path` when all is done.

    A folder that stood at `path` is moved aside first and removed last, so that one of the two is always whole.

    :param keep_existing: a folder that somebody else has put there meanwhile is as good, and stays.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise UserError(cannot_write(path, error)) from error
    try:
        yield scratch
        for file in scratch.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        scratch.chmod(0o755)
        if path.exists() and keep_existing:
            return
        if path.exists():
            old = scratch.with_suffix(".old")
            path.rename(old)
            try:
                scratch.rename(path)
            except OSError:
                old.rename(path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            scratch.rename(path)
    except OSError as error:
        raise UserError(cannot_write(path, error)) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove_partial_files(folder: Path) -> None:
    """Remove what a process that was killed while it wrote has left in a folder that only one writes to.

    Call it before anything is written.
    """
    for leftover in folder.glob(".*.partial"):
        if leftover.is_file():
            with suppress(OSError):
                leftover.unlink()


def make_folder(path: Path) -> None:
    """Make a folder, and find out whether it can be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(cannot_write(path, error)) from error


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with replacing(path) as scratch:
        scratch.write_bytes(data)


def cannot_write(path: Path, error: OSError) -> str:
    """The sentence for a person whose disk is full or whose folder is read-only."""
    return (
        f"Cannot write {path}: {error.strerror or error}. What stood there before is untouched. "
        f"Free some space or give another folder, then start again."
    )
