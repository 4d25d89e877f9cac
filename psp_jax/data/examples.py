"""What an example is, and what a source of examples is; the sources themselves are elsewhere."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from psp_jax.data.decode import decode_image, decode_label, to_classes
from psp_jax.data.labels import LabelSpace, label_space, label_table
from psp_jax.errors import UserError


class Encoded(NamedTuple):
    """An example as it is stored: the bytes of image and label map, and what messages call them.

    `label` is b'' in a split without labels.
    """

    image: bytes
    label: bytes
    image_name: str
    label_name: str


class Source(NamedTuple):
    """Examples 0..length-1. It holds no open files, so any number of threads may read from it.

    name: index -> what messages call the example (its paths, or 'scene 17').
    read: index -> (image uint8 [H, W, 3] RGB, label uint8 [H, W] classes, 255 = ignore); raises
        UserError, naming the file, if the example is missing or bad.
    files: the (image, label) paths; empty if examples are not single files.
    labelled: False if the split has no labels; `read` returns None as label then.
    encoded: index -> the stored bytes; None if nothing is stored.
    """

    length: int
    name: Callable[[int], str]
    read: Callable[[int], tuple[np.ndarray, Any]]
    files: Sequence[tuple[str, str]] = ()
    labelled: bool = True
    encoded: Callable[[int], Encoded] | None = None

    def names(self, index: int) -> tuple[str, str]:
        """Returns what messages call image and label of an example: their paths, if any."""
        return self.files[index] if self.files else (self.name(index),) * 2


@dataclass(frozen=True)
class Decoder:
    """Decodes examples, with labels as classes of `space`. table: `label_table` of `label_map`."""

    space: LabelSpace
    label_map: str
    table: np.ndarray

    def decode(self, example: Encoded) -> tuple[np.ndarray, np.ndarray]:
        """Returns image uint8 [H, W, 3] RGB and label uint8 [H, W] of one example.

        Raises UserError, naming the file, if one is bad or their sizes differ.
        """
        image = decode_image(example.image, example.image_name)
        stored = decode_label(example.label, example.label_name)
        if image.shape[:2] != stored.shape:
            sizes = [f'{a.shape[1]}x{a.shape[0]}' for a in (image, stored)]
            raise UserError(
                f'{example.image_name} is {sizes[0]} but its label {example.label_name} is '
                f'{sizes[1]} (width x height, EXIF orientation applied): they must be of the same '
                'size'
            )
        return image, self.classes_of(stored, example.label_name)

    def classes_of(self, stored: np.ndarray, name: str) -> np.ndarray:
        """Translates stored label values; see `to_classes`."""
        return to_classes(stored, self.table, self.space, self.label_map, name)


def decoder_of(data: ConfigDict) -> Decoder:
    """Returns the decoder for data.classes and data.label_map."""
    return Decoder(label_space(data.classes), data.label_map, label_table(data.label_map))
