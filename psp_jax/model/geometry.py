"""Sizes that follow from the network's stride. Sizes are (height, width) in pixels."""

STRIDE = 8  # pixels of the image to a cell of the features, in both directions
Size = tuple[int, int]


def cells(pixels: int) -> int:
    """The number of feature cells along an axis of `pixels` pixels."""
    return -(-pixels // STRIDE)
