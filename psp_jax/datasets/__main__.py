"""Prepares a data set for data.source=tfds:NAME: `python -m psp_jax.datasets NAME`.

It does what `tfds build` does, which cannot start without apache-beam and mlcroissant, and writes
array_record, which alone can be read by index.
"""

import argparse
import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from typing import Any

from psp_jax.command_line import Parser, disk_is_full, exit_code, quieten_libraries
from psp_jax.datasets import BUILDERS
from psp_jax.errors import UserError


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
        epilog='python -m psp_jax.datasets NAME --describe tells what a data set needs and holds.',
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

    logging.set_verbosity(logging.WARNING)  # counts that differ, labels without a class
    folders = (flags.data_dir, flags.manual_dir, flags.download_dir)
    data_dir, manual_dir, download_dir = (x and os.path.expanduser(x) for x in folders)
    if manual_dir and '://' not in manual_dir and not os.path.isdir(manual_dir):
        raise UserError(f'--manual_dir={manual_dir}: is no folder')
    builder = make_builder(flags.name, data_dir)
    if flags.describe:
        print(inspect.getdoc(type(builder)))
        print(f'\n--manual_dir: {builder.MANUAL_DOWNLOAD_INSTRUCTIONS or "not needed"}')
        return
    if builder.is_prepared():
        print(f'{builder.data_path} is there already; delete it to prepare it again')
    config = tfds.download.DownloadConfig(manual_dir=manual_dir)
    try:
        builder.download_and_prepare(download_dir=download_dir, download_config=config)
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
        raise UserError(
            f'{flags.name}: {" ".join(str(error).split())}; an archive that cannot be downloaded '
            'here may be put into --manual_dir'
        ) from error
    for name, split in builder.info.splits.items():
        print(f'{name}: {split.num_examples} images')
    print(builder.data_path)


if __name__ == '__main__':
    sys.exit(exit_code(run))
