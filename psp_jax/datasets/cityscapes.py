"""TFDS builder of Cityscapes: `python -m psp_jax.datasets cityscapes --manual_dir FOLDER`.

FOLDER has the archives, which can be downloaded from the data set's site after a login.
"""

import contextlib
from typing import Any

import tensorflow_datasets as tfds

from psp_jax.datasets import common

_FINE = ('leftImg8bit_trainvaltest.zip', 'gtFine_trainvaltest.zip')
_COARSE = ('leftImg8bit_trainextra.zip', 'gtCoarse.zip')


def _part(published: int, split: str, archives: tuple[str, str], kind: str) -> common.Part:
    return common.Part(
        published,
        images=(archives[0], f'leftImg8bit/{split}/', '_leftImg8bit.png'),
        labels=(archives[1], f'{kind}/{split}/', f'_{kind}_labelIds.png'),
    )


class Cityscapes(common.FoldersBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Cityscapes, street scenes of 2048 x 1024 pixels: 19 classes.

    Splits: train (2,975 images), val (500) and test (1,525) with fine labels. If its two archives
    are there, also train_extra (19,998) with coarse labels. Labels are train ids 0..18; 255 is
    ignored. The labels of test are not published: here they are all 255. In train_extra the image
    troisdorf_000000_000073 is black and its label holds no class.

    Terms: for non-commercial research and teaching, after registration; no redistribution
    (https://www.cityscapes-dataset.com/license/).
    """

    CLASSES = 'cityscapes'
    HOMEPAGE = 'https://www.cityscapes-dataset.com/downloads/'
    ARCHIVES = dict.fromkeys(_FINE + _COARSE, '')
    SPLITS = {
        split: _part(published, split, _FINE, 'gtFine')
        for split, published in (('train', 2_975), ('val', 500), ('test', 1_525))
    }
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f'From {HOMEPAGE} (after a login) put {" and ".join(_FINE)} into the folder; '
        f'for the split train_extra also {" and ".join(_COARSE)}.'
    )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        with contextlib.suppress(AssertionError):  # TFDS's error if there is no such folder
            if any((dl_manager.manual_dir / name).exists() for name in _COARSE):
                extra = {'train_extra': _part(19_998, 'train_extra', _COARSE, 'gtCoarse')}
                self.SPLITS = self.SPLITS | extra  # type: ignore[misc]  # of this object alone
        return super()._split_generators(dl_manager)
