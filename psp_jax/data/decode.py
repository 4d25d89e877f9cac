"""Reads images and label maps and decodes them to arrays; errors name the file.

A path may be an address that TensorFlow's file system can read, such as gs://bucket/image.jpg.
"""

import contextlib
import io
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import cv2
import numpy as np
from PIL import Image, ImageFile, ImageOps

from psp_jax.data.labels import IGNORE, LabelSpace, published_map
from psp_jax.errors import PASSING_TEXTS, PassingError, UserError

T = TypeVar('T')

# These are errors of the file; any other OSError means that a disk or a network failed.
_ABOUT_THE_FILE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_PASSING_CODES = {4, 8, 10, 14}  # TensorFlow: deadline exceeded, exhausted, aborted, unavailable
_UNIMPLEMENTED = 12  # TensorFlow: a scheme that it cannot read
_PAUSES = (1, 4)  # seconds before the second and the third try


def read_image(path: str) -> np.ndarray:
    """Reads and decodes an image; see `decode_image`."""
    return decode_image(read_bytes(path), path)


def decode_image(content: bytes, name: str) -> np.ndarray:
    """Decodes an image to uint8 [H, W, 3] RGB, with its EXIF orientation applied.

    Raises UserError, with `name` in its message, if the image cannot be decoded.
    """
    with _decoding(content, name) as image:
        image.load()
        if image.mode == 'F':
            raise ValueError('floating-point grey has no known range')
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith('I'):  # 16-bit grey: Pillow would clip it instead of scaling it
            grey = np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        # Through RGBA, because Pillow warns if a palette with transparency becomes RGB directly.
        opaque = image.convert('RGBA') if 'transparency' in image.info else image
        return np.asarray(opaque.convert('RGB'))


def decode_label(content: bytes, name: str) -> np.ndarray:
    """Decodes a label map to the stored values: integers [H, W], the indices if it has a palette.

    Raises UserError, with `name` in its message, if the label cannot be decoded, has several values
    a pixel or is a JPEG.
    """
    with _decoding(content, name) as image:
        packed = str(image.tile[0][3]) if image.tile else ''
        image.load()
        mode, values, lossy = image.mode, np.asarray(image), image.format in ('JPEG', 'MPO')
    if not (mode in ('L', 'P', '1') or mode.startswith('I')):
        raise UserError(
            f'{name} is a label of mode {mode}: labels must be index (grey) or palette PNG, '
            'with one value a pixel'
        )
    if lossy:
        raise UserError(f'{name} is a JPEG, which changes label values: labels must be PNG')
    # Pillow stretches grey of 2 or 4 bits to 0..255; divide to get the stored values.
    if mode == 'L' and packed in ('L;2', 'L;4'):
        values = values // (85 if packed == 'L;2' else 17)
    return values.astype(np.uint8) if values.dtype == bool else values


@contextlib.contextmanager
def _decoding(content: bytes, name: str) -> Iterator[ImageFile.ImageFile]:
    """Opens an image; any error of Pillow in the block becomes a UserError with `name` in it.

    Checks the checksums of a PNG, because Pillow's decoder stops at the last pixel and does not.
    """
    try:
        if content.startswith(b'\x89PNG'):
            with Image.open(io.BytesIO(content)) as image:
                image.verify()
        with Image.open(io.BytesIO(content)) as image:
            yield image
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files
        reason = ' '.join(str(error).split()) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = 'not a known image format' if content else 'the file is empty'
        raise UserError(
            f'{name} cannot be decoded ({reason}): replace it or take it off the list'
        ) from error


def to_classes(stored: np.ndarray, table: np.ndarray, space: LabelSpace, name: str) -> np.ndarray:
    """Translates stored values [H, W] to classes, uint8 [H, W].

    table: from stored values to classes, uint8 [256].
    Raises UserError, with `name` and the likely cause, if a value is not a class.
    """
    if stored.dtype != np.uint8:
        if stored.min() < 0 or stored.max() > 255:
            value = stored[(stored < 0) | (stored > 255)][0]
            raise UserError(f'{name}: label value {value} is outside 0..255')
        stored = stored.astype(np.uint8)
    classes = len(space.names)
    label = cv2.LUT(stored, table)
    wrong = (label >= classes) & (label != IGNORE)
    if not wrong.any():
        return label
    value = int(stored[wrong].max())
    mapped, hint = '', 'check data.classes and data.label_map'
    if value != table[value]:
        mapped = f' (class {table[value]} by data.label_map)'
    elif published := published_map(space, [value]):
        hint = f'are the labels stored as published? set data.label_map={published!r}'
    elif value == classes:
        hint = (
            'is 0 "other"? set data.label_map=minus_one; '
            f"is {value} void? set data.label_map='{{{value}: 255}}'"
        )
    raise UserError(
        f'{name}: label value {value}{mapped} is outside the {classes} classes '
        f'0..{classes - 1} and is not {IGNORE} (ignore): {hint}'
    )


def read_bytes(path: str) -> bytes:
    """Reads a file.

    Raises UserError if it does not exist or cannot be read, and PassingError if a disk or a bucket
    does not answer after three tries.
    """

    def read() -> bytes:
        with naming(path), gfile().GFile(path, 'rb') if '://' in path else open(path, 'rb') as file:
            return file.read()

    return read() if '://' in path else try_again(read)  # TensorFlow tries again by itself


def exists(path: str) -> bool:
    """Returns whether there is something at a path.

    Raises UserError for an address that TensorFlow cannot or may not read, and PassingError if a
    disk or a bucket does not answer.
    """
    with naming(path):
        try:
            return bool(gfile().exists(path) if '://' in path else os.stat(path))
        except _ABOUT_THE_FILE:
            return False


def try_again(read: Callable[[], T]) -> T:
    """Returns the result of `read`, which is called up to three times if it raises PassingError."""
    for pause in _PAUSES:
        with contextlib.suppress(PassingError):
            return read()
        time.sleep(pause)
    return read()


def is_passing(error: Exception) -> bool:
    """Returns whether an error says that a disk or a network failed, and not that a file is bad."""
    if isinstance(error, OSError):
        return not isinstance(error, _ABOUT_THE_FILE)
    if getattr(error, 'error_code', None) in _PASSING_CODES:
        return True
    # array_record's errors are text alone
    return any(text in str(error) for text in (*PASSING_TEXTS, 'Input/output error'))


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Turns the errors of reading `path` in the block into UserError or PassingError naming it."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f'{path} does not exist') from None
    except OSError as error:
        kind = PassingError if is_passing(error) else UserError
        raise kind(f'{path} cannot be read: {error.strerror or error}') from None
    except Exception as error:
        if '://' not in path:
            raise
        if getattr(error, 'error_code', None) == _UNIMPLEMENTED:
            raise UserError(
                f'{path}: TensorFlow cannot read {path.partition("://")[0]}://; mount the bucket '
                '(mountpoint-s3, gcsfuse) and give its local path, as data.root or --data_dir'
            ) from None
        kind = PassingError if is_passing(error) else UserError
        raise kind(f'{path} cannot be read: {" ".join(str(error).split())}') from error


def gfile() -> Any:
    """Returns TensorFlow's file system, which can read buckets."""
    import tensorflow as tf  # here, since it takes seconds and only addresses need it

    return tf.io.gfile
