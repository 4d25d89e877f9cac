"""TFDS builder of COCO with the classes of VOC: `python -m psp_jax.datasets coco_voc`."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from psp_jax.datasets import common
from psp_jax.errors import UserError

# The addresses are those of the data set's own page and of TFDS's coco; the checksums in
# checksums.tsv are TFDS's.
_HOST = 'http://images.cocodataset.org'
_ANNOTATIONS = 'annotations_trainval2017.zip'
# COCO's categories in the order of VOC's classes 1..20, as in GluonCV and torchvision.
_CATEGORIES = (5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72)
_LEAST_PIXELS = 1_000


class CocoVoc(common.Builder, skip_registration=True):  # type: ignore[call-arg]
    """COCO 2017 with the 21 classes of PASCAL VOC, for pre-training.

    Splits: train and val, with the images that have 1,000 or more pixels of VOC's 20 classes.
    Labels are class ids 0..20, drawn from the instances; all else is background, and nothing is
    ignored. The first of several instances at a pixel counts, and crowds count as instances, as in
    GluonCV (gluoncv/data/mscoco/segmentation.py); torchvision ignores such pixels.

    Terms: the annotations are under CC BY 4.0, the images under flickr's terms of use
    (https://cocodataset.org/#termsofuse).
    """

    CLASSES = 'voc2012'
    HOMEPAGE = 'https://cocodataset.org'
    ARCHIVES = {
        'train2017.zip': f'{_HOST}/zips/train2017.zip',
        'val2017.zip': f'{_HOST}/zips/val2017.zip',
        _ANNOTATIONS: f'{_HOST}/annotations/{_ANNOTATIONS}',
    }

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        try:
            import pycocotools.mask  # noqa: F401
        except ImportError:  # better now than after a download of 20 GB
            raise UserError('coco_voc needs pycocotools: pip install pycocotools') from None
        paths = self.find_archives(dl_manager, self.ARCHIVES)
        annotations = common.open_zip(paths[_ANNOTATIONS])
        return {
            split: self._generate_examples(
                common.open_zip(paths[f'{split}2017.zip']), annotations, split
            )
            for split in ('train', 'val')
        }

    def _generate_examples(
        self, images: common.Archive, annotations: common.Archive, split: str
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        source = f'annotations/instances_{split}2017.json'
        content = json.loads(annotations.read(source))
        instances: dict[int, list[dict[str, Any]]] = {}
        for instance in content['annotations']:
            if instance['category_id'] in _CATEGORIES:
                instances.setdefault(instance['image_id'], []).append(instance)
        for image in content['images']:
            label = draw(instances.get(image['id'], ()), image['height'], image['width'])
            if np.count_nonzero(label) >= _LEAST_PIXELS:
                name = f'{split}2017/{image["file_name"]}'
                yield common.example(common.Pair(name, source), images.read(name), label)


def draw(instances: Sequence[dict[str, Any]], height: int, width: int) -> np.ndarray:
    """Draws COCO's instances in an image as VOC's class ids, uint8 [height, width]."""
    from pycocotools import mask

    label = np.zeros((height, width), np.uint8)
    for instance in instances:
        outline = instance['segmentation']  # polygons, or the run lengths of a crowd
        if outline:
            runs = mask.frPyObjects(outline, height, width)
            inside = mask.decode(mask.merge(runs) if isinstance(runs, list) else runs) > 0
            label[inside & (label == 0)] = _CATEGORIES.index(instance['category_id']) + 1
    return label
