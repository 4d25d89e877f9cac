"""Prepares a data set for data.source=tfds:NAME: `python -m psp_jax.datasets NAME`.

It does what `tfds build` does, which cannot start without apache-beam and mlcroissant, and writes
array_record, which alone can be read by index.
"""

import argparse
import contextlib
import importlib
import inspect
import io
import logging as python_logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from psp_jax.command_line import Parser, disk_is_full, exit_code, quieten_libraries
from psp_jax.data.decode import exists, is_passing
from psp_jax.datasets import BUILDERS
from psp_jax.errors import PassingError, UserError


def make_builder(name: str, data_dir: str | None) -> Any:
    """Our builder of that name, or else TFDS's; raises UserError where neither has one."""
    import tensorflow_datasets as tfds

    name = name.partition(':')[0]
    if name in BUILDERS:
        module = importlib.import_module(f'psp_jax.datasets.{name}')
        return getattr(module, BUILDERS[name])(data_dir=data_dir)
    try:
        return tfds.builder(name, data_dir=data_dir, try_gcs=False, file_format='array_record')
    except (tfds.core.DatasetNotFoundError, ValueError):
        raise UserError(
            f'{name!r} is no data set of ours ({", ".join(BUILDERS)}) nor of TFDS'
        ) from None


def run(argv: Sequence[str]) -> None:
    """Does what the flags say; raises UserError for what is the user's to mend."""
    parser = Parser(
        prog='python -m psp_jax.datasets',
        description='Prepares a data set, downloading what it can: for data.source=tfds:NAME.',
        epilog='python -m psp_jax.datasets NAME --describe tells what a data set needs and holds.\n'
        '\n'
        'exit codes: 0 done, 1 a disk or a network did not answer, 2 an error of yours (one line\n'
        '  on stderr says which), 130 interrupted',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'name', help=f'{", ".join(BUILDERS)}, or a data set of TFDS such as oxford_iiit_pet'
    )
    for flag, meaning in {
        '--data_dir': 'where the data set goes, gs:// too (default: ~/tensorflow_datasets)',
        '--manual_dir': 'where archives lie already (default: DOWNLOAD_DIR/manual)',
        '--download_dir': 'where other archives go (default: DATA_DIR/downloads)',
    }.items():
        parser.add_argument(flag, metavar='DIR', help=meaning)
    parser.add_argument('--describe', action='store_true', help='prepare nothing')
    flags = parser.parse_args(argv)
    quieten_libraries()
    import tensorflow_datasets as tfds
    from absl import logging
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

    folders = {
        flag: os.path.expanduser(folder)
        for flag in ('data_dir', 'manual_dir', 'download_dir')
        if (folder := getattr(flags, flag))
    }
    for flag, folder in folders.items():
        there = exists(folder)  # raises where no such address can be read
        if '://' not in folder and (there or flag == 'manual_dir') and not os.path.isdir(folder):
            raise UserError(f'--{flag}={folder}: is no folder')
    builder = make_builder(flags.name, folders.get('data_dir'))
    if flags.describe:
        print(inspect.getdoc(type(builder)))
        print(f'\n--manual_dir: {builder.MANUAL_DOWNLOAD_INSTRUCTIONS or "not needed"}')
        return
    if builder.is_prepared():
        print(f'{builder.data_path} is there already; delete it to prepare it again')
    else:
        print(f'preparing {flags.name} in {builder.data_path}', flush=True)
    warnings: list[str] = []

    def kept(record: python_logging.LogRecord) -> bool:
        warnings.append(record.getMessage())
        return True

    logging.set_verbosity(logging.WARNING)  # counts that differ, labels without a class
    python_logging.getLogger('absl').addFilter(kept)
    config = tfds.download.DownloadConfig(manual_dir=folders.get('manual_dir'))
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces data of an unknown size
            builder.download_and_prepare(
                download_dir=folders.get('download_dir'), download_config=config
            )
    except AssertionError as error:  # so TFDS says that manual_dir lacks something
        if 'anual' not in str(error):
            raise
        raise UserError(f'{flags.name}: {" ".join(str(error).split())}') from error
    except (
        OSError,  # those of the network are of this kind
        tfds.core.download.DownloadError,
        NonMatchingChecksumError,
    ) as error:
        if disk_is_full(error):
            raise
        advice = '; an archive that cannot be downloaded here may be put into --manual_dir'
        if getattr(error, 'filename', None):  # it is not the network
            advice = ''
        kind = PassingError if is_passing(error) else UserError
        raise kind(f'{flags.name}: {" ".join(str(error).split())}{advice}') from error
    finally:
        python_logging.getLogger('absl').removeFilter(kept)
    for text in warnings:  # they were told amid progress bars
        print(f'warning: {text}', file=sys.stderr)
    for name, split in builder.info.splits.items():
        print(f'{name}: {split.num_examples} images')
    print(builder.data_path)


if __name__ == '__main__':
    sys.exit(exit_code(run))
