"""What the TFDS builders share: archives read in place, labels as class ids, array_record files.

A builder takes images and labels out of the archives that the data set's authors publish, without
unpacking them, and stores the bytes of the image as they are and a PNG of class ids. Pillow writes
that PNG: TFDS would start a TensorFlow session for it, which takes hold of an accelerator.
"""

import contextlib
import errno
import inspect
import io
import os
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from PIL import Image
from tensorflow_datasets.core import file_adapters, writer

from psp_jax.data.decode import decode_label
from psp_jax.data.labels import IGNORE, label_space, label_table
from psp_jax.errors import UserError

ARRAY_RECORD = file_adapters.FileFormat.ARRAY_RECORD

# What damaged bytes of an archive raise.
_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, ValueError)


class Archive(NamedTuple):
    """The files in a zip or tar file.

    path: where it lies, for messages. names: of the files in it. read: name -> the file's bytes;
        raises UserError for a name that is not there, or whose bytes cannot be read.
    """

    path: str
    names: Sequence[str]
    read: Callable[[str], bytes]


class Pair(NamedTuple):
    """The names, in their archives, of an image and of its label."""

    image: str
    label: str


def init(self, *, file_format: str | None = None, **kwargs: Any) -> None:
    """The `__init__` of a builder that writes array_record unless told otherwise.

    Records of array_record can be read in any order, those of TFDS's default, tfrecord, cannot.
    A data set that is there already is read in the format it has.
    """
    tfds.core.GeneratorBasedBuilder.__init__(self, file_format=file_format, **kwargs)
    if file_format is None and not self.info.initialized:
        self.info.set_file_format(ARRAY_RECORD, override=True)


def example_writer(self) -> writer.ExampleWriter:
    """The `_example_writer` of a builder that writes array_record to buckets too."""
    return ExampleWriter(self.info.file_format)


class ExampleWriter(writer.ExampleWriter):
    """TFDS's writer, which can write array_record to an address such as gs:// as well.

    The library of array_record writes local files alone.
    """

    def write(self, path: epath.PathLike, examples: Iterable[Any]) -> Any:
        path = os.fspath(path)
        if '://' not in path or self.file_format != ARRAY_RECORD:
            return super().write(path, examples)
        import tensorflow as tf  # as TFDS does for the other formats: the same credentials

        with tempfile.TemporaryDirectory() as folder:
            local = os.path.join(folder, 'shard')
            positions = super().write(local, examples)
            tf.io.gfile.copy(local, path, overwrite=True)
        return positions


def dataset_info(builder: Any, classes: str, homepage: str, citation: str) -> tfds.core.DatasetInfo:
    """What TFDS wants to know of a builder; its class's docstring is the description.

    classes: the name of a label space, whose class names and colours become metadata.
    """
    space = label_space(classes)
    return tfds.core.DatasetInfo(
        builder=builder,
        description=inspect.getdoc(type(builder)),
        features=tfds.features.FeaturesDict(
            {
                'image': tfds.features.Image(),
                'label': tfds.features.Image(shape=(None, None, 1), encoding_format='png'),
                'file_name': tfds.features.Text(),
            }
        ),
        supervised_keys=('image', 'label'),
        homepage=homepage,
        citation=citation,
        metadata=tfds.core.MetadataDict(
            class_names=list(space.names), colors=space.colors.tolist(), ignore=IGNORE
        ),
    )


def find_archives(
    dl_manager: tfds.download.DownloadManager, addresses: dict[str, str]
) -> dict[str, epath.Path]:
    """Paths of archives: as they lie in manual_dir, the others downloaded.

    addresses: {file name: address}. The result has the same keys.
    """
    try:
        folder = dl_manager.manual_dir
    except AssertionError:  # so TFDS says that the folder is missing or empty
        return dl_manager.download(addresses)
    found = {name: folder / name for name in addresses if (folder / name).exists()}
    missing = {name: address for name, address in addresses.items() if name not in found}
    return found | (dl_manager.download(missing) if missing else {})


@contextlib.contextmanager
def whole(path: epath.PathLike, otherwise: str) -> Iterator[None]:
    """Names the archive where reading it fails: raises UserError, '{path} {otherwise}: ...'."""
    try:
        yield
    except RuntimeError as error:  # zipfile's for encryption and, NotImplementedError, for methods
        raise UserError(
            f'{path} is packed in a way that Python cannot read ({error}): use the archive as its '
            'authors publish it'
        ) from error
    except (*_DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a place before the start
            raise
        raise UserError(f'{path} {otherwise}: delete it and run this again') from error


def open_zip(path: epath.PathLike) -> Archive:
    """Opens a zip file, local or in a bucket. Raises UserError where it is none or is cut off."""
    with whole(path, 'is not a whole zip file'):
        file = zipfile.ZipFile(epath.Path(path).open('rb'))
    names = [name for name in file.namelist() if not name.endswith('/')]

    def read(name: str) -> bytes:
        if name not in file.NameToInfo:
            raise UserError(f'{path} holds no {name}')
        with whole(path, f'is damaged at {name}'):
            return file.read(name)

    return Archive(os.fspath(path), names, read)


def files_in(archive: Archive, folder: str, suffix: str) -> dict[str, str]:
    """The files under a folder that end in `suffix`: {what stands between the two: name}."""
    start, end = len(folder), -len(suffix)
    return {
        name[start:end]: name
        for name in archive.names
        if name.startswith(folder) and name.endswith(suffix)
    }


def pair_up(images: dict[str, str], labels: dict[str, str]) -> list[Pair]:
    """Images and labels of the same key, in the order of the keys.

    Raises UserError, naming the file, where one has no partner.
    """
    for here, there, partner in ((images, labels, 'label'), (labels, images, 'image')):
        alone = sorted(here.keys() - there.keys())
        if alone:
            more = f' (and {len(alone) - 1} more)' if alone[1:] else ''
            raise UserError(f'{here[alone[0]]}{more} has no {partner} in the archives')
    return [Pair(images[key], labels[key]) for key in sorted(images)]


def check_count(split: str, count: int, published: int) -> None:
    """Logs a warning where a split has not as many images as published.

    Raises UserError where it has none: the archive must be another one.
    """
    if not count:
        raise UserError(f'{split}: the archives hold no image of it, {published} were published')
    if count != published:
        logging.warning('%s: %d images, but the published data set has %d', split, count, published)


def read_label(archive: Archive, name: str) -> np.ndarray:
    """The values of a label PNG, of a palette picture its indices: uint8 [H, W].

    Raises UserError, naming the file, where it is no picture of one byte a pixel.
    """
    values = decode_label(archive.read(name), name)
    if values.dtype != np.uint8:
        raise UserError(f'{name} has labels of more than 8 bits')
    return values


def examples(
    pairs: Sequence[Pair],
    images: Archive,
    labels: Callable[[str], np.ndarray],
    classes: str,
    label_map: str = '',
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the keys and examples of a split, and at its end logs labels without any class.

    labels: name of a label -> its stored values uint8 [H, W]; `classes` and `label_map`, as
        data.classes and data.label_map of a configuration, say what they mean.
    Raises UserError, naming the files, where a value is no class or sizes differ.
    """
    count, table = len(label_space(classes).names), label_table(label_map)
    void = []
    for pair in pairs:
        stored = labels(pair.label)
        label = table[stored]
        wrong = (label >= count) & (label != IGNORE)
        if wrong.any():
            raise UserError(
                f'{pair.label} holds the value {stored[wrong].max()}: {classes} has no such class'
            )
        if (label == IGNORE).all():
            void.append(pair.label)
        yield example(pair, images.read(pair.image), label)
    if 0 < len(void) < len(pairs):  # test sets are published without labels
        logging.warning('%d labels hold no class: %s', len(void), ', '.join(void))


def example(pair: Pair, image: bytes, label: np.ndarray) -> tuple[str, dict[str, Any]]:
    """The key and the features of one example.

    image: an encoded picture, which is stored as it is. label: class ids uint8 [H, W].
    Raises UserError, naming the files, where the image is no picture or the sizes differ.
    """
    try:
        with Image.open(io.BytesIO(image)) as picture:
            size = picture.size
    except OSError as error:
        raise UserError(f'{pair.image} cannot be decoded ({error})') from error
    if size != label.shape[::-1]:
        raise UserError(
            f'{pair.image} is {size[0]}x{size[1]} but its label {pair.label} is '
            f'{label.shape[1]}x{label.shape[0]} (width x height)'
        )
    encoded = io.BytesIO()
    Image.fromarray(label).save(encoded, 'png')
    file_name = PurePosixPath(pair.image).stem
    return file_name, {
        'image': io.BytesIO(image),
        'label': io.BytesIO(encoded.getvalue()),
        'file_name': file_name,
    }
