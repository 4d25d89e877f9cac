"""TFDS builder of Cityscapes: `python -m psp_jax.datasets cityscapes --manual_dir FOLDER`.

FOLDER holds the archives.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import tensorflow_datasets as tfds

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


class Cityscapes(common.Builder, skip_registration=True):  # type: ignore[call-arg]
    """Cityscapes, street scenes of 2048 x 1024 pixels: 19 classes.

    Splits: train (2,975 images), val (500) and test (1,525) with fine labels; and, if its two
    archives are there, train_extra (19,998) with coarse labels. Labels are train ids 0..18; 255 is
    ignored. The labels of test are not published: here they are all 255. In train_extra the image
    troisdorf_000000_000073 is black and its label holds no class.

    Terms: for non-commercial research and teaching, after registration; no redistribution
    (https://www.cityscapes-dataset.com/license/).
    """

    CLASSES = 'cityscapes'
    HOMEPAGE = 'https://www.cityscapes-dataset.com'
    CITATION = _CITATION
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f'From {_WHERE} put {" and ".join(_FINE)} into the folder; '
        f'for the split train_extra also {" and ".join(_COARSE)}.'
    )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        try:
            folder = dl_manager.manual_dir
        except AssertionError as error:  # TFDS says so that the folder is missing or empty
            raise UserError(' '.join(str(error).split())) from None
        there = [name for name in _FINE + _COARSE if (folder / name).exists()]
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
        read_label = partial(common.read_label, labels)
        return self.examples(split, _COUNTS[split], pairs, images, read_label)
