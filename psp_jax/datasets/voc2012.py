"""TFDS builder of PASCAL VOC 2012 with SBD: `python -m psp_jax.datasets voc2012`."""

import io
import os
import posixpath
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.io
import tensorflow_datasets as tfds
from etils import epath

from psp_jax.datasets import common
from psp_jax.errors import UserError

_VOC, _SBD = 'VOCtrainval_11-May-2012.tar', 'benchmark.tgz'
_COUNTS = {'train_aug': 10_582, 'train': 1_464, 'val': 1_449}
_VOC_FOLDER = 'VOCdevkit/VOC2012'
_SBD_FOLDER = 'benchmark_RELEASE/dataset'
_SBD_LISTS = (f'{_SBD_FOLDER}/train.txt', f'{_SBD_FOLDER}/val.txt')


class Voc2012(common.Builder, skip_registration=True):  # type: ignore[call-arg]
    """PASCAL VOC 2012 segmentation with the labels of SBD: background and 20 classes.

    Splits: train (1,464 images) and val (1,449) of VOC; train_aug (10,582), which is VOC's train
    and both splits of the Semantic Boundaries Dataset without VOC's val. Labels are class ids
    0..20; 255 is ignored. If VOC has a label of its own, that one is used, also in train_aug, as in
    mmsegmentation; SBD's labels have no ignored border around objects.

    Terms: the images are from flickr, under its terms of use
    (http://host.robots.ox.ac.uk/pascal/VOC/voc2012/#rights); cite both data sets.
    """

    CLASSES = 'voc2012'
    HOMEPAGE = 'http://host.robots.ox.ac.uk/pascal/VOC/voc2012/'
    # Addresses and checksums (in checksums.tsv) are torchvision's (datasets/voc.py and sbd.py).
    ARCHIVES = {
        _VOC: f'https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/{_VOC}',
        _SBD: 'https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/'
        f'semantic_contours/{_SBD}',
    }

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        paths = self.find_archives(dl_manager, self.ARCHIVES)
        voc, sbd = open_voc(paths[_VOC]), open_sbd(paths[_SBD])
        return {split: self._generate_examples(voc, sbd, split) for split in _COUNTS}

    def _generate_examples(
        self, voc: common.Archive, sbd: common.Archive, split: str
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        pairs = pairs_of(voc, sbd, split)

        def labels(name: str) -> np.ndarray:
            if name.endswith('.mat'):
                return read_mat(sbd, name)
            return common.read_label(voc, name)

        return self.examples(split, _COUNTS[split], pairs, voc, labels)


def open_voc(path: epath.PathLike) -> common.Archive:
    """Opens VOC's tar file, whose files can be read in any order."""
    with common.naming_archive(path):
        tar = tarfile.open(fileobj=epath.Path(path).open('rb'), mode='r:')
        files = {posixpath.normpath(member.name): member for member in tar if member.isfile()}

    def read(name: str) -> bytes:
        file = tar.extractfile(files[name])
        assert file is not None  # `files` holds no folders
        return file.read()

    return common.Archive(os.fspath(path), frozenset(files), read)


def open_sbd(path: epath.PathLike) -> common.Archive:
    """Reads SBD's labels and lists into memory: a compressed tar file is read front to back."""
    files = {}
    with (
        common.naming_archive(path),
        tarfile.open(fileobj=epath.Path(path).open('rb'), mode='r|gz') as tar,
    ):
        for member in tar:
            name = posixpath.normpath(member.name)
            if name.startswith(f'{_SBD_FOLDER}/cls/') or name in _SBD_LISTS:
                file = tar.extractfile(member)
                if file is not None:  # it is no folder
                    files[name] = file.read()
    return common.Archive(os.fspath(path), frozenset(files), files.__getitem__)


def read_mat(sbd: common.Archive, name: str) -> np.ndarray:
    """Returns the class ids uint8 [H, W] in one of SBD's .mat files."""
    try:
        return scipy.io.loadmat(io.BytesIO(sbd.read(name)))['GTcls']['Segmentation'][0, 0]
    except UserError:
        raise
    except Exception as error:  # SciPy raises nearly anything on broken files
        raise UserError(f'{sbd.path}: {name} is damaged: delete it and run this again') from error


def pairs_of(voc: common.Archive, sbd: common.Archive, split: str) -> list[common.Pair]:
    """Returns the pairs of 'train', 'val' or 'train_aug'; SBD's labels are .mat files."""

    def listed(archive: common.Archive, name: str) -> set[str]:
        return set(archive.read(name).decode().split())

    lists = f'{_VOC_FOLDER}/ImageSets/Segmentation'
    train, val = (listed(voc, f'{lists}/{name}.txt') for name in ('train', 'val'))
    own = val if split == 'val' else train
    labels = {stem: f'{_VOC_FOLDER}/SegmentationClass/{stem}.png' for stem in own}
    if split == 'train_aug':
        more = set().union(*(listed(sbd, name) for name in _SBD_LISTS)) - train - val
        labels |= {stem: f'{_SBD_FOLDER}/cls/{stem}.mat' for stem in more}
    return [
        common.Pair(f'{_VOC_FOLDER}/JPEGImages/{stem}.jpg', labels[stem]) for stem in sorted(labels)
    ]
