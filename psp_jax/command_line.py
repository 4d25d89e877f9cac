"""What the command lines share. No heavy import."""

import argparse
import contextlib
import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from psp_jax.errors import PassingError, UserError

# Exit codes, by the names of sysexits.h.
PREEMPTED = 75  # after SIGTERM; a temporary failure, to be tried again
NOT_JOINED = 69  # the other processes of the run did not come; unavailable


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are user errors as all others: one line, without the usage.

    No flag may be abbreviated: what is short today might be ambiguous tomorrow.
    """

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f'{message} (see --help)')


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(`--config.key=value` and `--config.key value` words, all other words), order kept."""
    overrides: list[str] = []
    others: list[str] = []
    wants_value = False
    for word in argv:
        is_override = word.startswith('--config.')
        is_value = wants_value and not word.startswith('--')
        (overrides if is_override or is_value else others).append(word)
        wants_value = is_override and '=' not in word
    return overrides, others


def quieten_libraries() -> None:
    """Keeps the chatter of TensorFlow and orbax off the terminal; their errors stay."""
    import logging as python_logging

    # both are read when TensorFlow is imported; oneDNN announces itself whatever the log level is
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
    from absl import logging

    logging.set_verbosity(logging.ERROR)
    # Orbax writes pages about each thread of a save that failed, and raises the error as well.
    python_logging.getLogger('absl').addFilter(lambda record: 'orbax' not in record.pathname)
    # Of the many reads of a damaged checkpoint orbax awaits one; asyncio prints the errors of all.
    python_logging.getLogger('asyncio').setLevel(python_logging.CRITICAL)
    python_logging.getLogger('urllib3').setLevel(python_logging.ERROR)  # each try of a download
    sys.excepthook, sys.unraisablehook = _excepthook, _unraisablehook
    threading.excepthook = _thread_excepthook


def _excepthook(kind: type[BaseException], error: BaseException, where: Any) -> None:
    """Python's own, but for those reads that end when nobody's event loop is there any more."""
    if not _is_late(error):
        sys.__excepthook__(kind, error, where)


def _unraisablehook(unraisable: Any) -> None:
    if not _is_late(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def _thread_excepthook(args: Any) -> None:
    """Python's own, but for saves to a full disk: the main thread raises those errors too."""
    if not (args.exc_value and disk_is_full(args.exc_value)):
        threading.__excepthook__(args)


def _is_late(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and str(error) == 'Event loop is closed'


@contextlib.contextmanager
def whole_file(output: str) -> Iterator[str]:
    """Gives a path to write to; what is there becomes `output` at the end of the block.

    If the block fails nothing is left. Raises UserError for a path that cannot be written.
    """
    unfinished = f'{output}.unfinished'
    try:
        yield unfinished
        os.replace(unfinished, output)
    except BaseException as error:
        if os.path.isfile(unfinished):
            os.remove(unfinished)
        # safetensors has an exception of its own, with the system's error in its text
        if isinstance(error, OSError) or 'I/O' in str(error) or 'os error' in str(error):
            raise UserError(f'--output={output}: cannot be written ({error})') from error
        raise


def disk_is_full(error: BaseException) -> bool:
    """Whether the error, of Python or of a library's C++, says that a disk or a quota is full."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, 'errno', None) in full or any(os.strerror(n) in str(error) for n in full)


def exit_code(run: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit code, with the user's errors as a line on stderr."""
    try:
        run(sys.argv[1:] if argv is None else argv)
    except (UserError, PassingError) as error:
        print(f'psp_jax: error: {error}', file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print('psp_jax: interrupted', file=sys.stderr)
        return 130
    except Exception as error:
        if not disk_is_full(error):
            raise
        where = getattr(error, 'filename', None) or 'the working directory'
        print(
            f'psp_jax: error: no space left on the disk of {where}; free some and run the same '
            'command again',
            file=sys.stderr,
        )
        return 2
    return 0
