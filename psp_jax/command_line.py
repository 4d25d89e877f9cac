"""What the command lines share. Imports nothing that takes long."""

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from psp_jax.errors import PassingError, Stopped, UserError

# Exit codes, by the names of sysexits.h.
PREEMPTED = 75  # SIGTERM stopped the run; start the same command again
NOT_JOINED = 69  # the other processes of the run did not start
INTERRUPTED = 130  # Ctrl-C


class Parser(argparse.ArgumentParser):
    """argparse that reports a wrong flag as a UserError: one line, without the usage.

    Flags cannot be abbreviated, because an abbreviation may become ambiguous with a new flag.
    """

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f'{message} (see --help)')


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divides words into those of `--config.key=value` or `--config.key value`, and all others.

    Both lists keep their order.
    """
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
    """Hides the log messages of TensorFlow, absl and asyncio; errors stay visible.

    Call it before TensorFlow is imported, which reads the two environment variables.
    """
    import logging as python_logging

    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')  # oneDNN announces itself at any log level
    from absl import logging

    logging.set_verbosity(logging.ERROR)
    # Each of these repeats an error that the main thread raises too: orbax writes a page about each
    # thread of a failed save, asyncio about each read of a damaged checkpoint, urllib3 about each
    # attempt of a download.
    python_logging.getLogger('absl').addFilter(lambda record: 'orbax' not in record.pathname)
    python_logging.getLogger('asyncio').setLevel(python_logging.CRITICAL)
    python_logging.getLogger('urllib3').setLevel(python_logging.ERROR)


def print_error(message: object) -> None:
    """Prints a line about an error on stderr."""
    print(f'psp_jax: error: {message}', file=sys.stderr, flush=True)


@contextlib.contextmanager
def whole_file(output: str) -> Iterator[str]:
    """Gives a path to write to, and renames the file to `output` at the end of the block.

    Removes the file if the block fails. Raises UserError if the path cannot be written.
    """
    unfinished = f'{output}.unfinished'
    try:
        yield unfinished
        os.replace(unfinished, output)
    except BaseException as error:
        if os.path.isfile(unfinished):
            os.remove(unfinished)
        # The exception of safetensors has the system's error in its text.
        if isinstance(error, OSError) or 'I/O' in str(error) or 'os error' in str(error):
            raise UserError(f'--output={output}: cannot be written ({error})') from error
        raise


def disk_is_full(error: BaseException) -> bool:
    """Whether an error says that a disk or a quota is full; it may come from a library's C++."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, 'errno', None) in full or any(os.strerror(n) in str(error) for n in full)


def exit_code(run: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code; prints the user's errors as one line."""
    try:
        run(sys.argv[1:] if argv is None else argv)
    except (UserError, PassingError) as error:
        print_error(error)
        return 2 if isinstance(error, UserError) else 1
    except Stopped as stopped:
        if str(stopped):
            print(f'psp_jax: {stopped}', file=sys.stderr, flush=True)
        return stopped.code
    except KeyboardInterrupt:
        print('psp_jax: interrupted', file=sys.stderr, flush=True)
        return INTERRUPTED
    except Exception as error:
        if not disk_is_full(error):
            raise
        where = getattr(error, 'filename', None) or 'the working directory'
        print_error(
            f'no space left on the disk of {where}; free some and run the same command again'
        )
        return 2
    return 0
