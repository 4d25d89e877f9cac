"""Reads data sets that TensorFlow Datasets has prepared, by index, as the bytes it stored."""

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow_datasets as tfds

from psp_jax.data.decode import exists
from psp_jax.data.sources import Encoded
from psp_jax.datasets import BUILDERS
from psp_jax.errors import UserError

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
    by index; where it has no such split; where it is not clear what image and label are.
    """
    builder = _builder(name, root)
    images, labels = _picture_keys(builder.info.features, name)
    text = next((key for key in _NAMES if key in builder.info.features), None)
    decoders = {key: tfds.decode.SkipDecoding() for key in (images, labels)}
    try:
        records = builder.as_data_source(split, decoders=decoders)
    except (NotImplementedError, ImportError) as error:
        found = builder.info.file_format.value if builder.info.file_format else 'no known format'
        raise UserError(
            f'data.source = tfds:{name}: {builder.data_dir} is stored as {found}, which cannot be '
            f'read by index; delete it and run `{_command(name, root)}`'
        ) from error
    except (ValueError, KeyError) as error:
        splits = ', '.join(builder.info.splits)
        raise UserError(
            f'data.source = tfds:{name}: there is no split {split!r}, only {splits} and parts of '
            "these, such as 'train[:90%]'"
        ) from error

    def record(index: int) -> Mapping[str, Any]:
        try:
            return records[index]
        except Exception as error:  # array_record raises what its C++ finds
            raise UserError(
                f'example {index} of {name}/{split} in {builder.data_dir} cannot be read '
                f'({" ".join(str(error).split())}): delete that folder and run '
                f'`{_command(name, root)}`'
            ) from error

    def named(index: int, found: Mapping[str, Any]) -> str:
        own = found[text].decode() if text else f'example {index}'
        return f'{name}/{split}/{own}'

    def encoded(index: int) -> Encoded:
        found = record(index)
        called = named(index, found)
        return Encoded(found[images], found[labels], called, called)

    return len(records), lambda index: named(index, record(index)), encoded


def _builder(name: str, root: str) -> Any:
    base, _, version = name.partition(':')
    folder = f'{root or tfds.core.constants.DATA_DIR}/{base}'
    try:
        if base in BUILDERS and exists(folder):  # TFDS's own of the same name must not come in
            versions = [version] if version else tfds.core.utils.version.list_all_versions(folder)
            builder = tfds.builder_from_directory(f'{folder}/{versions[-1]}')
        else:
            builder = tfds.builder(name, data_dir=root or None, try_gcs=False)
        prepared = base not in BUILDERS or exists(folder)
    except tfds.core.DatasetNotFoundError:
        prepared = False
    except Exception as error:  # a name that is none, a folder that is damaged
        raise UserError(
            f'data.source = tfds:{name}: {folder} cannot be opened '
            f'({" ".join(str(error).split())}); delete it and run `{_command(name, root)}`'
        ) from error
    if not prepared or not builder.info.splits:
        raise UserError(
            f'data.source = tfds:{name}: is not prepared in {folder}; run '
            f'`{_command(name, root)}` first'
        )
    return builder


def _command(name: str, root: str) -> str:
    return f'python -m psp_jax.datasets {name}' + (f' --data_dir {root}' if root else '')


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
