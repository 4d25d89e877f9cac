"""Sizes that follow from the network's stride. Sizes are (height, width) in pixels."""

from ml_collections import ConfigDict

STRIDE = 8  # pixels of the image to a cell of the features, in both directions
Size = tuple[int, int]


def crop_size(config: ConfigDict) -> Size:
    """The training crop, which is also the size of evaluation's windows."""
    crop = config.data.crop
    return (crop, crop) if isinstance(crop, int) else tuple(crop)


def cells(pixels: int) -> int:
    """The number of feature cells along an axis of `pixels` pixels."""
    return -(-pixels // STRIDE)
