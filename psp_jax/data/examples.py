"""What an example is, and what a source of examples is; sources.py has the sources."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from psp_jax.data.decode import decode_image, decode_label, to_classes
from psp_jax.data.labels import LabelSpace, label_space, label_table
from psp_jax.errors import UserError


class Encoded(NamedTuple):
    """An example as it is stored: the bytes of image and label map, and their names in messages.

    In a split without labels `label` is b'' and `label_name` is ''.
    """

    image: bytes
    label: bytes
    image_name: str
    label_name: str


class Source(NamedTuple):
    """Examples 0..length-1. It holds no open files, so any number of threads may read from it.

    name: index -> the name of the example in messages (its paths, or 'scene 17').
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
        """Returns the names of image and label of an example in messages: their paths, if any."""
        return self.files[index] if self.files else (self.name(index),) * 2


def stored_source(
    length: int,
    name: Callable[[int], str],
    encoded: Callable[[int], Encoded],
    data: ConfigDict,
    files: Sequence[tuple[str, str]] = (),
) -> Source:
    """Returns the source of stored examples, with labels as classes of `data` (config.data)."""
    space, table = label_space(data.classes), label_table(data.label_map)
    labelled = not files or bool(files[0][1])
    return Source(
        length, name, lambda i: decode(encoded(i), space, table), files, labelled, encoded
    )


def decode(example: Encoded, space: LabelSpace, table: np.ndarray) -> tuple[np.ndarray, Any]:
    """Decodes one example; see `Source.read`. table: from stored label values to classes.

    Raises UserError, naming the file, if one is bad or their sizes differ.
    """
    image = decode_image(example.image, example.image_name)
    if not example.label_name:
        return image, None
    stored = decode_label(example.label, example.label_name)
    if image.shape[:2] != stored.shape:
        sizes = [f'{a.shape[1]}x{a.shape[0]}' for a in (image, stored)]
        raise UserError(
            f'{example.image_name} is {sizes[0]} but its label {example.label_name} is '
            f'{sizes[1]} (width x height, EXIF orientation applied): they must be of the same size'
        )
    return image, to_classes(stored, table, space, example.label_name)
