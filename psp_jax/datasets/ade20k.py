"""TFDS builder of ADE20K: `python -m psp_jax.datasets ade20k`."""

from psp_jax.datasets import common

_ZIP, _TOP = 'ADEChallengeData2016.zip', 'ADEChallengeData2016'


class Ade20k(common.FoldersBuilder, skip_registration=True):  # type: ignore[call-arg]
    """ADE20K in the form of the MIT scene parsing benchmark: 150 classes.

    Splits: train (20,210 images) and val (2,000). Labels are class ids 0..149; 255 is ignored and
    stands for "other" in the archive. A few labels of the training split hold no class at all.

    Terms: the labels are under the BSD 3-clause licence, the images for non-commercial research
    and education only (https://groups.csail.mit.edu/vision/datasets/ADE20K/terms/).
    """

    CLASSES = 'ade20k'
    HOMEPAGE = 'http://sceneparsing.csail.mit.edu'
    # The address is that of the benchmark's own page and of GluonCV's scripts/datasets/ade20k.py.
    # checksums.tsv has no line for the archive: TFDS compares SHA-256, which is not published. To
    # check by hand: SHA-1 219e1696abb36c8ba3a3afe7fb2f4b4606a897c7 (GluonCV), MD5
    # 7328b3957e407ddae1d3cbf487f149ef.
    ARCHIVES = {_ZIP: f'http://data.csail.mit.edu/places/ADEchallenge/{_ZIP}'}
    SPLITS = {
        split: common.Part(
            published,
            images=(_ZIP, f'{_TOP}/images/{folder}/', '.jpg'),
            labels=(_ZIP, f'{_TOP}/annotations/{folder}/', '.png'),
        )
        for split, folder, published in (
            ('train', 'training', 20_210),
            ('val', 'validation', 2_000),
        )
    }
