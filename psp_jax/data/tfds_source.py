"""Reads data sets that TensorFlow Datasets has prepared, by index, as the bytes that it stored."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from psp_jax.data.decode import exists, is_passing, try_again
from psp_jax.data.examples import Encoded
from psp_jax.errors import PassingError, UserError

_IMAGES = ('image', 'image_left')
_LABELS = ('label', 'segmentation_mask', 'segmentation_label')
_NAMES = ('file_name', 'filename', 'image_id')


@dataclass(frozen=True)
class Records:
    """The examples of a split. image, label, text: the features that hold them ('' = no name)."""

    records: Sequence[Mapping[str, Any]]
    title: str  # 'NAME/SPLIT', for messages
    remedy: str  # what to do if a record cannot be read
    image: str
    label: str
    text: str

    @property
    def length(self) -> int:
        return len(self.records)

    def name(self, index: int) -> str:
        """Returns the name of an example in messages: 'NAME/SPLIT/FILE', or its number."""
        return self._name(index, self._read(index))

    def encoded(self, index: int) -> Encoded:
        """Reads an example.

        Raises UserError if the record is damaged, and PassingError if a disk or a bucket does not
        answer after three tries.
        """
        record = self._read(index)
        name = self._name(index, record)
        return Encoded(record[self.image], record[self.label], name, name)

    def _name(self, index: int, record: Mapping[str, Any]) -> str:
        own = record[self.text].decode() if self.text else f'example {index}'
        return f'{self.title}/{own}'

    def _read(self, index: int) -> Mapping[str, Any]:
        return try_again(lambda: self._read_once(index))

    def _read_once(self, index: int) -> Mapping[str, Any]:
        try:
            return self.records[index]
        except Exception as error:  # array_record raises whatever its C++ code raises
            message = f'example {index} of {self.title} cannot be read'
            reason = ' '.join(str(error).split())
            if is_passing(error):
                raise PassingError(f'{message}: {reason}') from error
            raise UserError(f'{message} ({reason}): {self.remedy}') from error


def open_split(data: ConfigDict, split: str) -> Records:
    """Opens a split of a prepared data set.

    data.source: 'tfds:NAME' ('tfds:oxford_iiit_pet', 'tfds:cityscapes/coarse:1.0.0'); data.root:
        TFDS's `data_dir`, '' = its default; data[split]: in TFDS's syntax ('train', 'train[:90%]').
    Raises UserError if it is not prepared, or in another format than array_record, the only one
    that is read by index; if there is no such split; or if it is not clear what image and label
    are. Raises PassingError if a disk or a bucket does not answer.
    """
    name = data.source.partition(':')[2]
    prefix = f'data.source = {data.source}'
    root = os.path.expanduser(data.root)
    folder = _version_folder(name, root)
    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # a folder that is damaged or may not be read
        kind = PassingError if is_passing(error) else UserError
        reason = ' '.join(str(error).split())
        raise kind(f'{prefix}: {folder} cannot be opened ({reason})') from error
    remedy = f'delete {folder} and run `{_command(name, root)}`'
    features = builder.info.features
    image, label = _feature(features, 3, _IMAGES, prefix), _feature(features, 1, _LABELS, prefix)
    decoders = {key: tfds.decode.SkipDecoding() for key in (image, label)}
    try:
        records = builder.as_data_source(data[split], decoders=decoders)
        len(records)  # raises ValueError for 'train[3:1]'
    except (NotImplementedError, ImportError) as error:
        found = builder.info.file_format.value if builder.info.file_format else 'no known format'
        raise UserError(
            f'{prefix}: it is stored as {found}, which cannot be read by index; {remedy}'
        ) from error
    except (ValueError, KeyError) as error:
        raise UserError(
            f'{prefix}: there is no split {data[split]!r}, or it is empty; there are '
            f"{', '.join(builder.info.splits)} and parts of these, such as 'train[:90%]'; for a "
            f'split that needs more archives {remedy} with them'
        ) from error
    text = next((key for key in _NAMES if key in features), '')
    title = f'{name.partition(":")[0]}/{data[split]}'
    return Records(records, title, f'if the files are damaged, {remedy}', image, label, text)


def _version_folder(name: str, root: str) -> str:
    """Returns the folder of a data set 'NAME[:VERSION]', without a version that of the newest.

    Looks at folders only, so that it never returns TFDS's own builder of the same name.
    """
    base, _, version = name.partition(':')
    folder = f'{root or tfds.core.constants.DATA_DIR}/{base}'
    there = exists(folder)  # also checks that TensorFlow can read the address
    versions = tfds.core.utils.version.list_all_versions(folder) if there else []
    known = [str(found) for found in versions]
    if not known:
        raise UserError(
            f'data.source = tfds:{name}: is not prepared in {folder}; '
            f'run `{_command(name, root)}` first'
        )
    return f'{folder}/{version or known[-1]}'


def _command(name: str, root: str) -> str:
    flag = f' --data_dir {root}' if root else ''
    return f'python -m psp_jax.datasets {name.partition(":")[0]}{flag}'


def _feature(features: Any, channels: int, usual: Sequence[str], prefix: str) -> str:
    """Returns the feature with this number of channels; of several the one with a usual name."""
    keys = [
        key
        for key, feature in features.items()
        if isinstance(feature, tfds.features.Image) and feature.shape[-1] == channels
    ]
    keys = [key for key in usual if key in keys] or keys
    if len(keys) != 1:
        raise UserError(
            f'{prefix}: needs one image of {channels} channel(s); the data set has '
            f'{", ".join(features)}'
        )
    return keys[0]
