"""From the bytes of a picture or a label map to arrays, and the errors of those that are bad."""

import contextlib
import errno
import io
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import cv2
import numpy as np
from PIL import Image, ImageFile, ImageOps

from psp_jax.data.labels import IGNORE
from psp_jax.errors import PASSING_TEXTS, PassingError, UserError

T = TypeVar('T')

# A disk, a network or a machine that fails in passing, unlike a file that is not there or may not
# be read. Some systems lack some of the names.
_NAMES = 'EIO ETIMEDOUT ESTALE ENOTCONN ECONNRESET ECONNABORTED ECONNREFUSED EREMOTEIO EAGAIN EINTR'
_NAMES += ' ENETDOWN ENETUNREACH EHOSTDOWN EHOSTUNREACH ENOLCK EMFILE ENFILE ENOMEM'
_PASSING = {getattr(errno, name) for name in _NAMES.split() if hasattr(errno, name)}
_PASSING_CODES = {4, 8, 10, 14}  # deadline exceeded, exhausted, aborted, unavailable: TensorFlow's
_UNIMPLEMENTED = 12  # TensorFlow's code
_PAUSES = (1, 4)  # seconds before such a file is tried again


def read_image(path: str) -> np.ndarray:
    """Reads and decodes a picture, of a path or an address that TensorFlow knows."""
    return decode_image(read_bytes(path), path)


def decode_image(content: bytes, name: str) -> np.ndarray:
    """Decodes to uint8 [H, W, 3] RGB, turned as its EXIF orientation says.

    Raises UserError, which calls it `name`, where it cannot be decoded.
    """
    try:
        with _opened(content) as image:
            image.load()
            if image.mode == 'F':
                raise ValueError('floating-point grey has no known range')
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith('I'):  # 16-bit grey: Pillow would clip it, not scale it
                grey = np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            # Straight to RGB, Pillow warns where a palette has transparency.
            opaque = image.convert('RGBA') if 'transparency' in image.info else image
            return np.asarray(opaque.convert('RGB'))
    except MemoryError:  # says nothing about the file
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files
        raise _cannot_decode(content, name, error) from error


def read_label(path: str) -> np.ndarray:
    """Reads and decodes a label map, of a path or an address that TensorFlow knows."""
    return decode_label(read_bytes(path), path)


def decode_label(content: bytes, name: str) -> np.ndarray:
    """Decodes to the stored values: integers [H, W], of a palette picture its indices.

    Raises UserError, which calls it `name`, where it cannot be decoded or has no values to trust.
    """
    try:
        with _opened(content) as image:
            packed = str(image.tile[0][3]) if image.tile else ''
            image.load()
            mode, values, lossy = image.mode, np.asarray(image), image.format in ('JPEG', 'MPO')
    except MemoryError:
        raise
    except Exception as error:
        raise _cannot_decode(content, name, error) from error
    if not (mode in ('L', 'P', '1') or mode.startswith('I')):
        raise UserError(
            f'{name} is a label of mode {mode}: labels must be index (grey) or palette PNG, '
            'with one value a pixel'
        )
    if lossy:
        raise UserError(f'{name} is a JPEG, which changes label values: labels must be PNG')
    # Pillow stretches grey of 2 or 4 bits to 0..255; the values are what was stored.
    if mode == 'L' and packed in ('L;2', 'L;4'):
        values = values // (85 if packed == 'L;2' else 17)
    return values.astype(np.uint8) if values.dtype == bool else values


def _opened(content: bytes) -> ImageFile.ImageFile:
    """The picture, not yet decoded; raises where a checksum in a PNG does not fit.

    Pillow's decoder stops at the last pixel and does not look at them.
    """
    if content.startswith(b'\x89PNG'):
        with Image.open(io.BytesIO(content)) as image:
            image.verify()
    return Image.open(io.BytesIO(content))


def _cannot_decode(content: bytes, name: str, error: Exception) -> UserError:
    reason = ' '.join(str(error).split()) or type(error).__name__
    if isinstance(error, Image.UnidentifiedImageError):
        reason = 'not a known picture format' if content else 'the file is empty'
    return UserError(f'{name} cannot be decoded ({reason}): replace it or take it off the list')


def to_classes(
    stored: np.ndarray, table: np.ndarray, classes: int, label_map: str, name: str
) -> np.ndarray:
    """Stored values [H, W] through `label_table`'s table to classes, uint8.

    Raises UserError, which calls the label `name` and guesses the cause, for values beyond them.
    """
    if stored.dtype != np.uint8:
        if stored.min() < 0 or stored.max() > 255:
            value = stored[(stored < 0) | (stored > 255)][0]
            raise UserError(f'{name}: label value {value} is outside 0..255')
        stored = stored.astype(np.uint8)
    label = cv2.LUT(stored, table)
    wrong = (label >= classes) & (label != IGNORE)
    if not wrong.any():
        return label
    value = int(stored[wrong].max())
    mapped = '' if value == table[value] else f' (class {table[value]} by data.label_map)'
    hint = 'check data.classes and data.label_map'
    if value == classes and not label_map:
        hint = (
            'is 0 "other"? set data.label_map=minus_one; '
            f"is {value} void? set data.label_map='{{{value}: 255}}'"
        )
    elif classes == 19 and value <= 33 and not label_map:
        hint = 'label ids of Cityscapes? set data.label_map=cityscapes_ids'
    raise UserError(
        f'{name}: label value {value}{mapped} is outside the {classes} classes '
        f'0..{classes - 1} and is not {IGNORE} (ignore): {hint}'
    )


def read_bytes(path: str) -> bytes:
    """The content of a file.

    Raises UserError where there is none or it cannot be read, and PassingError where a disk or a
    bucket does not answer, after some tries.
    """

    def read() -> bytes:
        with told(path), gfile().GFile(path, 'rb') if '://' in path else open(path, 'rb') as file:
            return file.read()

    return read() if '://' in path else try_again(read)  # TensorFlow tries again by itself


def exists(path: str) -> bool:
    """Whether a path or an address that TensorFlow knows leads to something.

    Raises UserError for an address that it does not know or may not see, and PassingError where a
    disk or a bucket does not answer.
    """
    with told(path):
        try:
            return bool(gfile().exists(path) if '://' in path else os.stat(path))
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            if is_passing(error):
                raise
            return False


def try_again(read: Callable[[], T]) -> T:
    """The result of `read`, which is called again after pauses where it raises PassingError."""
    for pause in _PAUSES:
        with contextlib.suppress(PassingError):
            return read()
        time.sleep(pause)
    return read()


def is_passing(error: Exception) -> bool:
    """Whether an error of Python, TensorFlow or array_record says that a disk did not answer.

    Or a network, or that the machine was short of something. array_record's errors are text alone.
    """
    number = getattr(error, 'errno', None)
    if number is not None:  # the text has the path, too
        return number in _PASSING
    if getattr(error, 'error_code', None) in _PASSING_CODES:
        return True
    return any(text in str(error) for text in (*PASSING_TEXTS, *map(os.strerror, _PASSING)))


@contextlib.contextmanager
def told(path: str) -> Iterator[None]:
    """What reading `path` raises, as UserError or PassingError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f'{path} does not exist') from None
    except OSError as error:
        kind = PassingError if is_passing(error) else UserError
        raise kind(f'{path} cannot be read: {error.strerror or error}') from None
    except Exception as error:
        if '://' not in path or isinstance(error, MemoryError):
            raise
        if getattr(error, 'error_code', None) == _UNIMPLEMENTED:
            raise UserError(
                f'{path}: TensorFlow knows no {path.partition("://")[0]}://; mount the bucket '
                '(mountpoint-s3, gcsfuse) and give its local path, as data.root or --data_dir'
            ) from None
        kind = PassingError if is_passing(error) else UserError
        raise kind(f'{path} cannot be read: {" ".join(str(error).split())}') from error


def gfile() -> Any:
    """TensorFlow's file system, which knows buckets."""
    import tensorflow as tf  # slow to import, and needed for remote paths alone

    return tf.io.gfile
