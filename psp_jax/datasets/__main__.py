"""Prepares a data set for data.source=tfds:NAME: `python -m psp_jax.datasets NAME`.

It replaces `tfds build`, which needs apache-beam and mlcroissant to start, and writes array_record,
the only format that can be read by index.
"""

import argparse
import contextlib
import importlib
import inspect
import io
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from psp_jax.command_line import Parser, disk_is_full, exit_code, quieten_libraries
from psp_jax.data.decode import exists, is_passing
from psp_jax.datasets import BUILDERS
from psp_jax.errors import PassingError, UserError

_FOLDERS = {
    'data_dir': 'where the data set goes, gs:// too (default: ~/tensorflow_datasets)',
    'manual_dir': 'the folder of archives that you have (default: DOWNLOAD_DIR/manual)',
    'download_dir': 'where downloaded archives go (default: DATA_DIR/downloads)',
}


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the flags; raises UserError for an unknown flag or a path that is not a folder."""
    parser = Parser(
        prog='python -m psp_jax.datasets',
        description='Prepares a data set, downloading what it can: for data.source=tfds:NAME.',
        epilog='python -m psp_jax.datasets NAME --describe says what a data set needs and holds.\n'
        '\n'
        'exit codes: 0 done, 1 a disk or a network did not answer, 2 an error of yours (one line\n'
        '  on stderr says which), 130 interrupted',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'name', help=f'{", ".join(BUILDERS)}, or a data set of TFDS such as oxford_iiit_pet'
    )
    for flag, meaning in _FOLDERS.items():
        add, path = parser.add_argument, os.path.expanduser
        add(f'--{flag}', type=path, default=None, metavar='DIR', help=meaning)
    parser.add_argument('--describe', action='store_true', help='prepare nothing')
    flags = parser.parse_args(argv)
    for flag in _FOLDERS:
        folder = getattr(flags, flag)
        if folder is None:
            continue
        there = exists(folder)  # raises UserError for an address that cannot be read
        if '://' not in folder and (there or flag == 'manual_dir') and not os.path.isdir(folder):
            raise UserError(f'--{flag}={folder}: is not a folder')
    return flags


def make_builder(name: str, data_dir: str | None) -> Any:
    """Returns our builder of that name, or else TFDS's; raises UserError if there is none."""
    import tensorflow_datasets as tfds  # here, since it takes seconds, also before --help

    name = name.partition(':')[0]
    if name in BUILDERS:
        module = importlib.import_module(f'psp_jax.datasets.{name}')
        return getattr(module, BUILDERS[name])(data_dir=data_dir)
    try:
        return tfds.builder(name, data_dir=data_dir, try_gcs=False, file_format='array_record')
    except (tfds.core.DatasetNotFoundError, ValueError):
        raise UserError(
            f'{name!r} is neither a data set of ours ({", ".join(BUILDERS)}) nor of TFDS'
        ) from None


def run(argv: Sequence[str]) -> None:
    """Does what the flags say; raises UserError for what the user has to correct."""
    flags = parse_flags(argv)
    quieten_libraries()
    builder = make_builder(flags.name, flags.data_dir)
    if flags.describe:
        print(inspect.getdoc(type(builder)))
        print(f'\narchives: {", ".join(getattr(builder, "ARCHIVES", ["see TFDS"]))}')
        print(f'--manual_dir: {builder.MANUAL_DOWNLOAD_INSTRUCTIONS or "not needed"}')
        return
    if builder.is_prepared():
        print(f'{builder.data_path} is there already; delete it to prepare it again')
    else:
        print(f'preparing {flags.name} in {builder.data_path}', flush=True)
    prepare(builder, vars(flags))
    for text in getattr(builder, 'warnings', ()):
        print(f'warning: {text}', file=sys.stderr)
    for name, split in builder.info.splits.items():
        print(f'{name}: {split.num_examples} images')
    print(builder.data_path)


def prepare(builder: Any, folders: Mapping[str, str | None]) -> None:
    """Downloads and prepares a data set.

    folders: those of the flags. Raises UserError if archives are missing or bad, and PassingError
    if a disk or a network does not answer.
    """
    import tensorflow_datasets as tfds  # here, since it takes seconds
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

    config = tfds.download.DownloadConfig(manual_dir=folders['manual_dir'])
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # hides TFDS's line about an unknown size
            builder.download_and_prepare(
                download_dir=folders['download_dir'], download_config=config
            )
    except AssertionError as error:  # how TFDS reports that manual_dir lacks something
        if 'anual' not in str(error):
            raise
        raise UserError(f'{builder.name}: {" ".join(str(error).split())}') from error
    except (
        OSError,  # errors of the network are of this kind
        tfds.core.download.DownloadError,
        NonMatchingChecksumError,
    ) as error:
        if disk_is_full(error):
            raise
        advice = '; an archive that cannot be downloaded here may be put into --manual_dir'
        if getattr(error, 'filename', None):  # an error of a file, not of the network
            advice = ''
        kind = PassingError if is_passing(error) else UserError
        raise kind(f'{builder.name}: {" ".join(str(error).split())}{advice}') from error


if __name__ == '__main__':
    sys.exit(exit_code(run))
