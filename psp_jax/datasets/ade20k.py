"""TFDS builder of ADE20K: `python -m psp_jax.datasets ade20k`."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import tensorflow_datasets as tfds

from psp_jax.datasets import common

# The address is that of the benchmark's own page and of GluonCV's scripts/datasets/ade20k.py.
# checksums.tsv has no line for the archive: TFDS compares SHA-256, which is not published. To check
# by hand: SHA-1 219e1696abb36c8ba3a3afe7fb2f4b4606a897c7 (GluonCV), MD5
# 7328b3957e407ddae1d3cbf487f149ef.
_ARCHIVE = 'ADEChallengeData2016.zip'
_ADDRESSES = {_ARCHIVE: f'http://data.csail.mit.edu/places/ADEchallenge/{_ARCHIVE}'}
_CITATION = """\
@inproceedings{zhou2017scene,
  title={Scene Parsing through {ADE20K} Dataset},
  author={Zhou, Bolei and Zhao, Hang and Puig, Xavier and Fidler, Sanja and Barriuso, Adela and
          Torralba, Antonio},
  booktitle={IEEE Conference on Computer Vision and Pattern Recognition (CVPR)},
  year={2017}
}"""


class Ade20k(common.Builder, skip_registration=True):  # type: ignore[call-arg]
    """ADE20K in the form of the MIT scene parsing benchmark: 150 classes.

    Splits: train (20,210 images) and val (2,000). Labels are class ids 0..149; 255 is ignored and
    stands for "other" in the archive. A few labels of the training split hold no class at all.

    Terms: the labels are under the BSD 3-clause licence, the images for non-commercial research
    and education alone (https://groups.csail.mit.edu/vision/datasets/ADE20K/terms/).
    """

    CLASSES = 'ade20k'
    HOMEPAGE = 'http://sceneparsing.csail.mit.edu'
    CITATION = _CITATION
    MANUAL_DOWNLOAD_INSTRUCTIONS = f'{_ARCHIVE} is downloaded unless it lies in the folder.'

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        archive = common.open_zip(common.find_archives(dl_manager, _ADDRESSES)[_ARCHIVE])
        return {
            'train': self._generate_examples(archive, 'train', 'training', 20_210),
            'val': self._generate_examples(archive, 'val', 'validation', 2_000),
        }

    def _generate_examples(
        self, archive: common.Archive, split: str, folder: str, published: int
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        pairs = common.pair_up(
            common.files_in(archive, f'ADEChallengeData2016/images/{folder}/', '.jpg'),
            common.files_in(archive, f'ADEChallengeData2016/annotations/{folder}/', '.png'),
        )
        return self.examples(split, published, pairs, archive, partial(common.read_label, archive))
