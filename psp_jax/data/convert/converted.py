"""The folder that a conversion writes to, and its record there of which files are its own.

DIR/converted.txt says of what the conversion is, then in a line `hash<tab>path` what it wrote, with
paths relative to DIR. A line is there before its file, so that a conversion that was cut off knows
its own files, too.
"""

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b

from psp_jax.command_line import whole_file
from psp_jax.data.decode import read_bytes
from psp_jax.errors import UserError

RECORD = 'converted.txt'
Write = Callable[[str, bytes], None]


@contextlib.contextmanager
def claimed(output: str, origin: str, paths: Iterable[str]) -> Iterator[Write]:
    """Makes room for `paths` in the folder, and gives `write(path, content)` for files there.

    Any thread may call `write`, which raises UserError where the file cannot be written. What an
    earlier conversion of `origin` wrote is removed at the start. Raises UserError, with nothing
    removed, where the folder is of another conversion, where one of its files was changed since,
    and where `paths` hold a file that it did not write.
    """
    path_of_record = os.path.join(output, RECORD)
    _make_room(output, origin, paths, _recorded(path_of_record, origin))
    with whole_file(path_of_record) as unfinished:
        _fill(unfinished, _head(origin))
    one_line_at_a_time = threading.Lock()
    record = open(path_of_record, 'ab')

    def write(path: str, content: bytes) -> None:
        line = f'{_hash(content)}\t{os.path.relpath(path, output)}\n'
        with whole_file(path) as unfinished:
            with one_line_at_a_time:
                record.write(line.encode())
                record.flush()  # a file that the record lacks would be taken for the user's
            _fill(unfinished, content)

    try:
        yield write
    finally:
        try:
            record.close()  # on a disk of a network the first to know that the disk is full
        except OSError as error:
            raise UserError(f'{path_of_record} cannot be written ({error.strerror})') from error


def _make_room(output: str, origin: str, paths: Iterable[str], known: dict[str, set[str]]) -> None:
    """Removes the known files, once all of them and of `paths` are found to be as they should."""

    def checked(name: str) -> str:
        """The path of this name where a file is; '' where there is none."""
        path = os.path.join(output, name)
        if name.startswith(os.pardir):  # in a record that was changed by hand
            raise UserError(f'{output}/{RECORD} has {path}, outside of it: name another --output')
        if name == RECORD:
            raise UserError(f'{path} is the record of what is written: rename the list')
        if not os.path.lexists(path):
            return ''
        if name not in known:
            raise UserError(
                f'{path} is there, and not written by {origin}: move it, or name another --output'
            )
        if os.path.islink(path) or _hash(read_bytes(path)) not in known[name]:
            raise UserError(
                f'{path} was changed since {origin} wrote it: move it, or name another --output'
            )
        return path

    def remove(path: str) -> None:
        try:
            os.remove(path)
        except OSError as error:
            raise UserError(f'{path} cannot be removed ({error.strerror})') from error

    names = dict.fromkeys([*(os.path.relpath(path, output) for path in paths), *known])
    # A disk of a network is slow to answer, but answers many at once. The first error ends a map.
    with ThreadPoolExecutor() as pool:
        there = [path for path in pool.map(checked, names) if path]
        # all, so that no list has label maps of other classes should this end early
        for _ in pool.map(remove, there):
            pass


def listed(path: str, root: str) -> str:
    """As a list in the folder `root` has a path: relative if it lies below it, else absolute."""
    inside = os.path.relpath(path, root)
    return os.path.abspath(path) if inside.startswith(os.pardir) else inside


def list_line(*paths: str) -> str:
    """The line of a list with these paths; raises UserError for one that would be read otherwise.

    Tabs and line ends divide a list, blanks around a path are cut off, and its text is UTF-8.
    """
    for path in paths:
        if re.search(r'[\x00-\x1f\ud800-\udfff]|^\s|\s$', path):
            raise UserError(f'{path!r}: rename it, lists of files cannot hold such a name')
    return '\t'.join(paths) + '\n'


def _head(origin: str) -> bytes:
    return os.fsencode(origin) + b'\n'


def _hash(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()


def _recorded(record: str, origin: str) -> dict[str, set[str]]:
    """The hashes of each relative path that a conversion of `origin` wrote; {} without one."""
    if not os.path.lexists(record):
        return {}
    content, head = read_bytes(record), _head(origin)
    if not content.startswith(head):
        raise UserError(f'{record} is there, and not of {origin}: name another --output')
    known: dict[str, set[str]] = {}
    for line in content.removeprefix(head).decode(errors='replace').split('\n'):
        digest, tab, path = line.partition('\t')
        if tab:
            known.setdefault(path, set()).add(digest)
    return known


def _fill(path: str, content: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'wb') as file:
        file.write(content)
