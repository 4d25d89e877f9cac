"""What the TFDS builders share: archives read in place, labels as class ids, array_record files.

A builder takes images and labels out of the archives that the data set's authors publish, without
unpacking them. It stores the bytes of the image as they are, and a PNG of class ids. Pillow writes
that PNG, because TFDS would start a TensorFlow session for it, and this would occupy an
accelerator.
"""

import contextlib
import inspect
import io
import os
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image
from tensorflow_datasets.core import file_adapters, writer

from psp_jax.data.decode import decode_label
from psp_jax.data.labels import IGNORE, label_space, label_table
from psp_jax.errors import UserError

ARRAY_RECORD = file_adapters.FileFormat.ARRAY_RECORD


@dataclass(frozen=True)
class Archive:
    """The files in a zip or tar file. path: where it is. names: of the files in it."""

    path: str
    names: frozenset[str]
    read_file: Callable[[str], bytes]

    def read(self, name: str) -> bytes:
        """Returns a file's bytes; raises UserError if it is not there or damaged."""
        if name not in self.names:
            raise UserError(f'{self.path} holds no {name}')
        with naming_archive(self.path):
            return self.read_file(name)


class Pair(NamedTuple):
    """The names, in their archives, of an image and of its label."""

    image: str
    label: str


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A builder that writes array_record unless told otherwise. Its docstring is the description.

    Records of array_record can be read in any order; those of TFDS's default, tfrecord, cannot. A
    data set that is prepared already is read in the format that it has.
    """

    VERSION = tfds.core.Version('1.0.0')
    RELEASE_NOTES: ClassVar[dict[str, str]] = {'1.0.0': 'First release.'}
    CLASSES: ClassVar[str]  # the label space, whose class names and colours become metadata
    HOMEPAGE: ClassVar[str]
    # Addresses of the archives by their file names; '' = the user has to put it into manual_dir.
    ARCHIVES: ClassVar[dict[str, str]]
    MANUAL_DOWNLOAD_INSTRUCTIONS = 'The archives are downloaded unless they lie in the folder.'

    def __init__(self, *, file_format: str | None = None, **kwargs: Any):
        super().__init__(file_format=file_format, **kwargs)
        self.warnings: list[str] = []  # of preparing it
        if file_format is None and not self.info.initialized:
            self.info.set_file_format(ARRAY_RECORD, override=True)

    def _example_writer(self) -> writer.ExampleWriter:
        return ExampleWriter(self.info.file_format)

    def _info(self) -> tfds.core.DatasetInfo:
        space = label_space(self.CLASSES)
        return tfds.core.DatasetInfo(
            builder=self,
            description=inspect.getdoc(type(self)),
            features=tfds.features.FeaturesDict(
                {
                    'image': tfds.features.Image(),
                    'label': tfds.features.Image(shape=(None, None, 1), encoding_format='png'),
                    'file_name': tfds.features.Text(),
                }
            ),
            supervised_keys=('image', 'label'),
            homepage=self.HOMEPAGE,
            metadata=tfds.core.MetadataDict(
                class_names=list(space.names), colors=space.colors.tolist(), ignore=IGNORE
            ),
        )

    def find_archives(
        self, dl_manager: tfds.download.DownloadManager, names: Iterable[str]
    ) -> dict[str, epath.Path]:
        """Returns the paths of archives by their file names, downloading what manual_dir lacks.

        Raises UserError for archives that cannot be downloaded.
        """
        try:
            folder = dl_manager.manual_dir
            found = {name: folder / name for name in names if (folder / name).exists()}
        except AssertionError:  # how TFDS reports that the folder is missing or empty
            folder, found = '--manual_dir', {}
        missing = {name: self.ARCHIVES[name] for name in names if name not in found}
        manual = [name for name, address in missing.items() if not address]
        if manual:
            raise UserError(f'{folder} lacks {" and ".join(manual)}: download from {self.HOMEPAGE}')
        return found | (dl_manager.download(missing) if missing else {})

    def examples(
        self,
        split: str,
        published: int,
        pairs: Sequence[Pair],
        images: Archive,
        read_label: Callable[[str], np.ndarray],
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields the keys and examples of a split.

        published: the number of images in the published split; another number is a warning.
        read_label: name of a label -> its stored values uint8 [H, W]; the label space's label_map
            turns them into classes.
        Raises UserError, naming the files, if a value is not a class or sizes differ.
        """
        if not pairs:
            raise UserError(f'{split}: the archives have no image of it; {published} are published')
        if len(pairs) != published:
            self.warnings.append(f'{split}: {len(pairs)} images, but {published} are published')
        space = label_space(self.CLASSES)
        count, table = len(space.names), label_table(space.label_map)
        void = []
        for pair in pairs:
            stored = read_label(pair.label)
            label = table[stored]
            wrong = (label >= count) & (label != IGNORE)
            if wrong.any():
                raise UserError(
                    f'{pair.label} holds the value {stored[wrong].max()}: {self.CLASSES} has no '
                    'such class'
                )
            if (label == IGNORE).all():
                void.append(pair.label)
            yield example(pair, images.read(pair.image), label)
        if 0 < len(void) < len(pairs):  # test sets are published without labels
            self.warnings.append(f'{len(void)} labels hold no class: {", ".join(void)}')


class Part(NamedTuple):
    """A split as it is published: images and labels of the same path between folder and suffix.

    images, labels: the archive, the folder in it, and the suffix.
    """

    published: int
    images: tuple[str, str, str]
    labels: tuple[str, str, str]


class FoldersBuilder(Builder, skip_registration=True):  # type: ignore[call-arg]
    """A builder of a data set that is published as zip files of folders of images and labels."""

    SPLITS: ClassVar[dict[str, Part]]

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        parts = self.SPLITS.values()
        names = {archive for part in parts for archive, _, _ in (part.images, part.labels)}
        paths = self.find_archives(dl_manager, sorted(names))
        archives = {name: open_zip(path) for name, path in paths.items()}
        return {split: self._generate_examples(archives, split) for split in self.SPLITS}

    def _generate_examples(
        self, archives: dict[str, Archive], split: str
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        part = self.SPLITS[split]
        images, labels = archives[part.images[0]], archives[part.labels[0]]
        pairs = pair_up(files_in(images, *part.images[1:]), files_in(labels, *part.labels[1:]))
        return self.examples(split, part.published, pairs, images, partial(read_label, labels))


class ExampleWriter(writer.ExampleWriter):
    """TFDS's writer, which also writes array_record to an address such as gs://.

    The library of array_record writes only local files.
    """

    def write(self, path: epath.PathLike, examples: Iterable[Any]) -> Any:
        """Writes a file of examples: locally first, then copied if `path` is an address."""
        path = os.fspath(path)
        if '://' not in path or self.file_format != ARRAY_RECORD:
            return super().write(path, examples)
        import tensorflow as tf  # here, since it takes seconds and only addresses need it

        with tempfile.TemporaryDirectory() as folder:
            local = os.path.join(folder, 'shard')
            positions = super().write(local, examples)
            tf.io.gfile.copy(local, path, overwrite=True)
        return positions


@contextlib.contextmanager
def naming_archive(path: epath.PathLike) -> Iterator[None]:
    """Turns errors about damaged bytes in the block into a UserError that names the archive."""
    try:
        yield
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        EOFError,
        ValueError,
        RuntimeError,  # zipfile: encrypted, or packed by a method that Python does not know
    ) as error:
        raise UserError(f'{path} cannot be read ({error}): delete it and run this again') from error


def open_zip(path: epath.PathLike) -> Archive:
    """Opens a zip file, local or in a bucket. Raises UserError if it is damaged or cut off."""
    with naming_archive(path):
        file = zipfile.ZipFile(epath.Path(path).open('rb'))
    names = frozenset(name for name in file.namelist() if not name.endswith('/'))
    return Archive(os.fspath(path), names, file.read)


def files_in(archive: Archive, folder: str, suffix: str) -> dict[str, str]:
    """Returns the files under a folder that end in `suffix`: {the part between the two: name}."""
    start, end = len(folder), -len(suffix)
    return {
        name[start:end]: name
        for name in archive.names
        if name.startswith(folder) and name.endswith(suffix)
    }


def pair_up(images: dict[str, str], labels: dict[str, str]) -> list[Pair]:
    """Pairs images and labels of the same key, in the order of the keys.

    Raises UserError, naming the file, if one has no partner.
    """
    for here, there, partner in ((images, labels, 'label'), (labels, images, 'image')):
        alone = sorted(here.keys() - there.keys())
        if alone:
            more = f' (and {len(alone) - 1} more)' if alone[1:] else ''
            raise UserError(f'{here[alone[0]]}{more} has no {partner} in the archives')
    return [Pair(images[key], labels[key]) for key in sorted(images)]


def read_label(archive: Archive, name: str) -> np.ndarray:
    """Returns the values of a label PNG, or the indices if it has a palette: uint8 [H, W]."""
    return decode_label(archive.read(name), name)


def example(pair: Pair, image: bytes, label: np.ndarray) -> tuple[str, dict[str, Any]]:
    """Returns the key and the features of one example.

    image: an encoded image, which is stored as it is. label: class ids uint8 [H, W].
    Raises UserError, naming the files, if the image cannot be opened or the sizes differ.
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
