"""Reads data sets that TensorFlow Datasets has prepared, by index, as the bytes it stored."""

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow_datasets as tfds

from psp_jax.data.decode import exists, is_passing, try_again
from psp_jax.data.sources import Encoded
from psp_jax.datasets import BUILDERS
from psp_jax.errors import PassingError, UserError

_LABELS = ('label', 'segmentation_mask', 'segmentation_label')  # of pictures of one channel
_IMAGES = ('image', 'image_left')
_NAMES = ('file_name', 'filename', 'image_id')


def open_split(
    name: str, root: str, split: str
) -> tuple[int, Callable[[int], str], Callable[[int], Encoded]]:
    """Length, names and encoded examples of a split of a prepared data set.

    name: as TFDS has it ('oxford_iiit_pet', 'cityscapes/coarse:1.0.0'); root: TFDS's `data_dir`,
        '' = its default; split: in TFDS's syntax ('train', 'train[:90%]').
    Raises UserError where it is not prepared or not as array_record, the only format that is read
    by index; where it has no such split; where it is not clear what image and label are. It and
    the functions that it returns raise PassingError where a disk or a bucket does not answer.
    """
    builder = _builder(name, root)
    images, labels = _picture_keys(builder.info.features, name)
    text = next((key for key in _NAMES if key in builder.info.features), None)
    decoders = {key: tfds.decode.SkipDecoding() for key in (images, labels)}
    try:
        records = builder.as_data_source(split, decoders=decoders)
        length = len(records)  # raises ValueError for 'train[3:1]'
    except (NotImplementedError, ImportError) as error:
        found = builder.info.file_format.value if builder.info.file_format else 'no known format'
        raise UserError(
            f'data.source = tfds:{name}: {builder.data_dir} is stored as {found}, which cannot be '
            f'read by index; delete it and run `{_command(name, root)}`'
        ) from error
    except (ValueError, KeyError) as error:
        splits = ', '.join(builder.info.splits)
        missing = (
            '; prepare it again with the archives of the coarse labels in --manual_dir, after '
            f'deleting {builder.data_dir}'
            if split.startswith('train_extra')
            else ''
        )
        raise UserError(
            f'data.source = tfds:{name}: there is no split {split!r}, or nothing in it, only '
            f"{splits} and parts of these, such as 'train[:90%]'{missing}"
        ) from error

    def record(index: int) -> Mapping[str, Any]:
        return try_again(lambda: read(index))

    def read(index: int) -> Mapping[str, Any]:
        try:
            return records[index]
        except MemoryError:
            raise
        except Exception as error:  # array_record raises what its C++ finds
            where = f'example {index} of {name}/{split} in {builder.data_dir} cannot be read'
            reason = ' '.join(str(error).split())
            if is_passing(error):
                raise PassingError(f'{where}: {reason}') from error
            raise UserError(
                f'{where} ({reason}): if the files are damaged, delete that folder and run '
                f'`{_command(name, root)}`'
            ) from error

    def named(index: int, found: Mapping[str, Any]) -> str:
        own = found[text].decode() if text else f'example {index}'
        return f'{name}/{split}/{own}'

    def encoded(index: int) -> Encoded:
        found = record(index)
        called = named(index, found)
        return Encoded(found[images], found[labels], called, called)

    return length, lambda index: named(index, record(index)), encoded


def _builder(name: str, root: str) -> Any:
    base, _, version = name.partition(':')
    folder = f'{root or tfds.core.constants.DATA_DIR}/{base}'
    where = f'data.source = tfds:{name}'
    there = exists(folder)  # says, too, if the address is none
    try:
        if base in BUILDERS:  # by its folder: TFDS's own of the same name must not come in
            folder = _version_folder(folder, version, where) if there else ''
            builder = tfds.builder_from_directory(folder) if folder else None
        else:
            builder = tfds.builder(name, data_dir=root or None, try_gcs=False)
    except (UserError, MemoryError):
        raise
    except tfds.core.DatasetNotFoundError:
        builder = None
    except Exception as error:  # a name that is none, a folder that is damaged or not ours to read
        reason = ' '.join(str(error).split())
        kind = PassingError if is_passing(error) else UserError
        raise kind(f'{where}: {folder} cannot be opened ({reason})') from error
    if builder is None or not builder.info.splits:
        root = root or tfds.core.constants.DATA_DIR
        raise UserError(f'{where}: is not prepared in {root}; run `{_command(name, root)}` first')
    return builder


def _version_folder(folder: str, version: str, where: str) -> str:
    """The folder of a version of a data set, '' = of its newest; '' if it has none at all."""
    versions = [str(found) for found in tfds.core.utils.version.list_all_versions(folder)]
    if versions and version and version not in versions:
        raise UserError(f'{where}: {folder} has only the version(s) {", ".join(versions)}')
    return f'{folder}/{version or versions[-1]}' if versions else ''


def _command(name: str, root: str) -> str:
    where = f' --data_dir {root}' if root else ''
    return f'python -m psp_jax.datasets {name.partition(":")[0]}{where}'


def _picture_keys(features: Any, name: str) -> tuple[str, str]:
    """The features that hold the image and its label map: pictures of three channels and of one."""
    pictures = {
        key: feature.shape[-1]
        for key, feature in features.items()
        if isinstance(feature, tfds.features.Image)
    }
    found = []
    for channels, usual in ((3, _IMAGES), (1, _LABELS)):
        keys = [key for key, count in pictures.items() if count == channels]
        keys = [key for key in usual if key in keys] or keys
        if len(keys) != 1:
            raise UserError(
                f'data.source = tfds:{name}: needs one picture of {channels} channel(s); the data '
                f'set has {", ".join(features)}'
            )
        found += keys
    return found[0], found[1]
