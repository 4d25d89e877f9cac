"""The folder that a conversion writes to, and its record there of which files are its own.

DIR/converted.txt says of what the conversion is, then in a line `hash<tab>path` what it wrote, with
paths relative to DIR. A line is there before its file, so that a conversion that was cut off knows
its own files, too.
"""

import os
import re
import threading
from collections.abc import Iterable
from hashlib import blake2b

from psp_jax.command_line import whole_file
from psp_jax.data.decode import read_bytes
from psp_jax.errors import UserError

RECORD = 'converted.txt'
_one_line_at_a_time = threading.Lock()


def claim(output: str, origin: str, paths: Iterable[str]) -> None:
    """Makes room for `paths`: removes what an earlier conversion of `origin` wrote to the folder.

    Raises UserError, with nothing removed, where the folder is of another conversion, where one of
    its files was changed since, and where `paths` hold a file that it did not write.
    """
    record = os.path.join(output, RECORD)
    known = _recorded(record, origin)
    there = []
    for name in dict.fromkeys([*(os.path.relpath(path, output) for path in paths), *known]):
        path = os.path.join(output, name)
        if name.startswith(os.pardir):
            raise UserError(f'{path} would be written outside of --output={output}')
        if name == RECORD:
            raise UserError(f'{path} is the record of what is written: rename the list')
        if not os.path.lexists(path):
            continue
        if name not in known:
            raise UserError(
                f'{path} is there, and not written by {origin}: move it, or name another --output'
            )
        if os.path.islink(path) or _hash(read_bytes(path)) not in known[name]:
            raise UserError(
                f'{path} was changed since {origin} wrote it: move it, or name another --output'
            )
        there.append(path)
    for path in there:  # all, so that no list has label maps of other classes should this end early
        try:
            os.remove(path)
        except OSError as error:
            raise UserError(f'{path} cannot be removed ({error.strerror})') from error
    with whole_file(record) as unfinished:
        _fill(unfinished, _head(origin))


def write(output: str, path: str, content: bytes) -> None:
    """Writes a file of a claimed folder; raises UserError where it cannot be written."""
    line = f'{_hash(content)}\t{os.path.relpath(path, output)}\n'
    with whole_file(path) as unfinished:
        # a file system of a network may lose a line of two that are written at once
        with _one_line_at_a_time, open(os.path.join(output, RECORD), 'ab') as record:
            record.write(line.encode())
        _fill(unfinished, content)


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
