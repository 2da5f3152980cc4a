"""Files are written aside and renamed, so that a reader sees the old file or the whole new one."""
from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = [
    'LEFTOVERS', 'output_file', 'replace_file', 'sha256_of', 'write_csv', 'write_json', 'write_synced', 'write_text']

# What a process that is killed while it writes may leave, as a pattern for glob.
LEFTOVERS = '.*.*.tmp.*'


@contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty temporary file beside `path` that replaces it when the block ends well, and else is deleted.

    The temporary name keeps the suffix of `path`, by which libraries choose a file format.

    Where `path` is a link, the file that it leads to is replaced.

    Raises:
        OSError: If the file cannot be made; it names `path`.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f'.{path.stem}.{uuid.uuid4().hex}.tmp{path.suffix}')
    try:
        temporary.touch(exist_ok=False)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as e:
        if e.filename is None or Path(e.filename) != temporary:
            raise
        raise OSError(e.errno, e.strerror, str(path)) from e


def output_file(name: str) -> Path:
    """The path of a file that a command is to write, as an argument's type.

    Raises:
        argparse.ArgumentTypeError: If there is no folder to write it to, that cannot be written to, or something
            else than a file has its name, such as a folder or a device.
    """
    path = Path(name)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f'{name} is a folder: name a file')
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f'{name} is no regular file: name one, or a new one')
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f'{name}: there is no folder {path.parent}')
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f'{name}: the folder {path.parent} cannot be written to')
    return path


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file in UTF-8, in one step; names of files that are not UTF-8 as the bytes that they are."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding='utf-8', errors='surrogateescape')


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a JSON file, in one step."""
    write_text(path, json.dumps(value, indent=2) + '\n')


def write_csv(path: str | os.PathLike[str], header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a CSV file, in one step."""
    with replace_file(path) as temporary, open(temporary, 'w', newline='', encoding='utf-8') as f:
        writer = csv.writer(f, lineterminator='\n')
        writer.writerow(header)
        writer.writerows(rows)


def write_synced(path: str | os.PathLike[str], data: bytes, previous: str | os.PathLike[str] | None = None) -> None:
    """Writes a file down to the disk, in one step.

    Args:
        path: The file.
        data: Its content.
        previous: Name that the file there before is left under, where it is to be left.

    Raises:
        OSError: If the file cannot be written; the ones already there are left as they were.
    """
    path = Path(path)
    with replace_file(path) as temporary:
        with open(temporary, 'wb') as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes renames in a folder last through a power cut, where the system can."""
    if os.name != 'posix':
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        for block in iter(lambda: f.read(1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()
