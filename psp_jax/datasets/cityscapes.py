"""TFDS builder of Cityscapes: `python -m psp_jax.datasets cityscapes --manual_dir FOLDER`.

FOLDER holds the archives. Or `tfds build psp_jax/datasets/cityscapes.py --manual_dir FOLDER`.
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

sys.path.append(str(Path(__file__).parents[2]))  # `tfds build FILE` does not know psp_jax
from psp_jax.datasets import common
from psp_jax.errors import UserError

_FINE = ('leftImg8bit_trainvaltest.zip', 'gtFine_trainvaltest.zip')
_COARSE = ('leftImg8bit_trainextra.zip', 'gtCoarse.zip')
_COUNTS = {'train': 2_975, 'val': 500, 'test': 1_525, 'train_extra': 19_998}
_WHERE = 'https://www.cityscapes-dataset.com/downloads/ (after a login)'
_CITATION = """\
@inproceedings{cordts2016cityscapes,
  title={The {Cityscapes} Dataset for Semantic Urban Scene Understanding},
  author={Cordts, Marius and Omran, Mohamed and Ramos, Sebastian and Rehfeld, Timo and
          Enzweiler, Markus and Benenson, Rodrigo and Franke, Uwe and Roth, Stefan and
          Schiele, Bernt},
  booktitle={IEEE Conference on Computer Vision and Pattern Recognition (CVPR)},
  year={2016}
}"""


class Cityscapes(
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg]  # TFDS has a cityscapes of its own
):
    """Cityscapes, street scenes of 2048 x 1024 pixels: 19 classes.

    Splits: train (2,975 images), val (500) and test (1,525) with fine labels; and, where its two
    archives are there, train_extra (19,998) with coarse ones. Labels are train ids 0..18; 255 is
    ignored. Those of the test split are not published: they are 255 throughout. In train_extra,
    troisdorf_000000_000073 is black and its label holds no class.

    Terms: for non-commercial research and teaching, after registration; no redistribution
    (https://www.cityscapes-dataset.com/license/).
    """

    VERSION = tfds.core.Version('1.0.0')
    RELEASE_NOTES = {'1.0.0': 'First release.'}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f'From {_WHERE} put {" and ".join(_FINE)} into the folder; '
        f'for the split train_extra {" and ".join(_COARSE)} besides.'
    )

    __init__ = common.init
    _example_writer = common.example_writer

    def _info(self) -> tfds.core.DatasetInfo:
        homepage = 'https://www.cityscapes-dataset.com'
        return common.dataset_info(self, 'cityscapes', homepage, _CITATION)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        try:
            folder = dl_manager.manual_dir
        except AssertionError as error:  # TFDS's word for a folder that is missing or empty
            raise UserError(' '.join(str(error).split())) from None
        there = [name for name in _FINE + _COARSE if (folder / name).exists()]
        # Not a BuilderConfig: `tfds build` builds all of them, and few have the coarse archives.
        wanted = _FINE + (_COARSE if any(name in there for name in _COARSE) else ())
        missing = [name for name in wanted if name not in there]
        if missing:
            raise UserError(f'{folder} lacks {" and ".join(missing)}: download from {_WHERE}')
        archives = {name: common.open_zip(folder / name) for name in wanted}
        images, labels = (archives[name] for name in _FINE)
        splits = {
            split: self._generate_examples(images, labels, split, 'gtFine')
            for split in ('train', 'val', 'test')
        }
        if wanted != _FINE:
            images, labels = (archives[name] for name in _COARSE)
            splits['train_extra'] = self._generate_examples(
                images, labels, 'train_extra', 'gtCoarse'
            )
        return splits

    def _generate_examples(
        self, images: common.Archive, labels: common.Archive, split: str, kind: str
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        pairs = common.pair_up(
            common.files_in(images, f'leftImg8bit/{split}/', '_leftImg8bit.png'),
            common.files_in(labels, f'{kind}/{split}/', f'_{kind}_labelIds.png'),
        )
        common.check_count(split, len(pairs), _COUNTS[split])
        return common.examples(
            pairs,
            images,
            partial(common.read_label, labels),
            'cityscapes',
            'cityscapes_ids',
        )
