"""Where examples come from: a list file, a pair of folders, or the built-in scenes.

A source answers `read(i)` with one decoded example; it holds no state beyond the list of names,
so any number of threads may read from it.
"""

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import cv2
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from psp_jax.data.labels import IGNORE, label_space, label_table
from psp_jax.errors import UserError

PICTURES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm', '.pgm', '.gif')


class Source(NamedTuple):
    """Examples 0..length-1.

    name: index -> what to call the example in messages (its paths, or 'scene 17').
    read: index -> (image uint8 [H, W, 3] RGB, label uint8 [H, W] classes, 255 = ignore); raises
        UserError, naming the file, where the example is missing or bad.
    files: the (image, label) path pairs; empty where nothing is stored.
    labelled: False where the split has no labels; those of `read` are None then.
    """

    length: int
    name: Callable[[int], str]
    read: Callable[[int], tuple[np.ndarray, Any]]
    files: Sequence[tuple[str, str]] = ()
    labelled: bool = True


def make_source(data: ConfigDict, split: str) -> Source:
    """Returns the source of one split ('train', 'val' or 'test') as `data` (config.data) says.

    data.source 'list':   data[split] is a file of lines `image label`
                'dirs':   data[split] is 'IMAGES_DIR,LABELS_DIR'
                'scenes': data[split] is 'FIRST:LAST', scenes FIRST to LAST - 1
    The split 'test' may have images alone: lines `image`, or 'IMAGES_DIR'.
    Paths are relative to data.root, absolute, or of the form scheme://...
    Raises UserError where the description is wrong or the set is empty.
    """
    where = f'data.{split}'
    if not data[split]:
        raise UserError(f'{where} is empty: set it (data.source is {data.source!r})')
    if data.source == 'scenes':
        return _scenes_source(data, split)
    if data.source == 'list':
        files = _read_list(_join(data.root, data[split]), data.root, split == 'test')
    elif data.source == 'dirs':
        files = _pair_dirs(data, where)
    else:
        raise UserError(f"data.source = {data.source!r}: use 'list', 'dirs' or 'scenes'")
    classes = len(label_space(data.classes).names)
    table = label_table(data.label_map)

    def read(index: int) -> tuple[np.ndarray, Any]:
        image_path, label_path = files[index]
        image = read_image(image_path)
        if not label_path:
            return image, None
        stored = _read_label(label_path)
        if image.shape[:2] != stored.shape:
            sizes = [f'{a.shape[1]}x{a.shape[0]}' for a in (image, stored)]
            raise UserError(
                f'{image_path} is {sizes[0]} but its label {label_path} is {sizes[1]} '
                '(width x height, EXIF orientation applied): they must be of the same size'
            )
        return image, _to_classes(stored, table, classes, data.label_map, label_path)

    labelled = bool(files[0][1])
    return Source(len(files), lambda i: ' '.join(files[i]).strip(), read, files, labelled)


def check_source(source: Source, examples: int = 64) -> None:
    """Checks that every file exists and reads `examples` examples spread evenly over the set.

    Raises the UserError of the first problem, in the order of the set.
    """
    with ThreadPoolExecutor(32) as pool:
        paths = [path for pair in source.files for path in pair if path]
        missing = [p for p, there in zip(paths, pool.map(_exists, paths), strict=True) if not there]
        if missing:
            more = f' (and {len(missing) - 1} more of {len(paths)} files)' if missing[1:] else ''
            raise UserError(f'{missing[0]} does not exist{more}: check the list and data.root')
    picks = np.unique(np.linspace(0, source.length - 1, examples).round().astype(int)).tolist()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda i: source.read(i) and None, picks):
            pass


def _scenes_source(data: ConfigDict, split: str) -> Source:
    from psp_jax.data import scenes

    first, colon, last = data[split].partition(':')
    if not (colon and first.strip().isdigit() and last.strip().isdigit()):
        raise UserError(f"data.{split} = {data[split]!r}: use 'FIRST:LAST', such as '0:1000'")
    indices = range(int(first), int(last))
    if not indices:
        raise UserError(f'data.{split} = {data[split]!r} holds no scene: LAST must exceed FIRST')
    classes = len(label_space(data.classes).names)
    table = label_table(data.label_map)

    def read(index: int) -> tuple[np.ndarray, np.ndarray]:
        image, stored = scenes.draw(indices[index])
        return image, _to_classes(stored, table, classes, data.label_map, name(index))

    def name(index: int) -> str:
        return f'scene {indices[index]}'

    return Source(len(indices), name, read)


def _read_list(path: str, root: str, may_lack_labels: bool) -> list[tuple[str, str]]:
    try:
        text = _read_bytes(path).decode('utf-8-sig')
    except UnicodeDecodeError:
        raise UserError(f'{path} is not a text file in UTF-8') from None
    pairs, unlabelled = [], 0
    for number, line in enumerate(text.split('\n'), 1):
        if not line.strip():
            continue
        fields = line.split('\t') if '\t' in line else line.strip().rsplit(' ', 1)
        fields = [field.strip() for field in fields]
        pictures = [field.lower().endswith(PICTURES) for field in fields]
        if may_lack_labels and pictures != [True, True]:  # a path with spaces, or one alone
            fields = [line.strip(), '']
            unlabelled += 1
        elif len(fields) != 2 or not all(fields):
            raise UserError(
                f'{path}:{number}: {line.strip()!r} is not `image label` '
                '(two paths, separated by a tab or by the last space)'
            )
        pairs.append(fields)
    if not pairs:
        raise UserError(f'{path} lists no example')
    if 0 < unlabelled < len(pairs):
        raise UserError(f'{path}: {unlabelled} of {len(pairs)} lines have no label; all or none')
    # Lists of PASCAL VOC begin paths with a slash and mean the data set's folder by it. One path
    # decides for the whole list, which may be long and on a slow file system.
    slashed = next((field for pair in pairs for field in pair if field.startswith('/')), '')
    if slashed and root:
        below_root = _exists(root.rstrip('/') + slashed)
        if below_root or not _exists(os.path.dirname(slashed)):
            pairs = [[field.lstrip('/') for field in pair] for pair in pairs]
    return [(_join(root, image), label and _join(root, label)) for image, label in pairs]


def _pair_dirs(data: ConfigDict, where: str) -> list[tuple[str, str]]:
    spec = data[where.removeprefix('data.')]
    folders = [_join(data.root, part.strip()) for part in spec.split(',')]
    if len(folders) == 1 and where == 'data.test':
        found = _list_dir(folders[0])
        if not found:
            raise UserError(f'{where}: {folders[0]} holds no image')
        return [(found[stem], '') for stem in sorted(found)]
    if len(folders) != 2:
        raise UserError(f"{where} = {spec!r}: use 'IMAGES_DIR,LABELS_DIR'")
    images, labels = (_list_dir(folder) for folder in folders)
    for here, there, folder in ((images, labels, folders[1]), (labels, images, folders[0])):
        alone = sorted(here.keys() - there.keys())
        if alone:
            more = f' (and {len(alone) - 1} more)' if alone[1:] else ''
            raise UserError(f'{here[alone[0]]}{more} has no partner of the same name in {folder}')
    if not images:
        raise UserError(f'{where}: {folders[0]} holds no image')
    return [(images[stem], labels[stem]) for stem in sorted(images)]


def _list_dir(folder: str) -> dict[str, str]:
    """Pictures under a folder, by their path relative to it without the suffix."""
    if '://' in folder:
        walk = _gfile().walk(folder) if _gfile().isdir(folder) else None
    else:
        walk = os.walk(folder, followlinks=True) if os.path.isdir(folder) else None
    if walk is None:
        raise UserError(f'{folder} is not a folder')
    found: dict[str, str] = {}
    for parent, _, names in walk:
        for name in sorted(names):
            if name.startswith('.') or not name.lower().endswith(PICTURES):
                continue
            path = os.path.join(parent, name)
            stem = os.path.splitext(path)[0][len(folder) :].lstrip('/')
            if stem in found:
                raise UserError(f'{found[stem]} and {path} have the same name: remove one')
            found[stem] = path
    return found


def read_image(path: str) -> np.ndarray:
    """Decodes to uint8 [H, W, 3] RGB, turned as its EXIF orientation says."""
    content = _read_bytes(path)
    try:
        with Image.open(io.BytesIO(content)) as image:
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
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files
        raise _cannot_decode(path, error) from error


def _read_label(path: str) -> np.ndarray:
    """Decodes to the stored values: integers [H, W], of a palette picture its indices."""
    content = _read_bytes(path)
    try:
        with Image.open(io.BytesIO(content)) as image:
            packed = str(image.tile[0][3]) if image.tile else ''
            image.load()
            mode, values, lossy = image.mode, np.asarray(image), image.format in ('JPEG', 'MPO')
    except Exception as error:
        raise _cannot_decode(path, error) from error
    if not (mode in ('L', 'P', '1') or mode.startswith('I')):
        raise UserError(
            f'{path} is a label of mode {mode}: labels must be index (grey) or palette PNG, '
            'with one value a pixel'
        )
    if lossy:
        raise UserError(f'{path} is a JPEG, which changes label values: labels must be PNG')
    # Pillow stretches grey of 2 or 4 bits to 0..255; the values are what was stored.
    if mode == 'L' and packed in ('L;2', 'L;4'):
        values = values // (85 if packed == 'L;2' else 17)
    return values.astype(np.uint8) if values.dtype == bool else values


def _cannot_decode(path: str, error: Exception) -> UserError:
    reason = ' '.join(str(error).split()) or type(error).__name__
    if isinstance(error, Image.UnidentifiedImageError):
        reason = 'not a known picture format'
    return UserError(f'{path} cannot be decoded ({reason}): replace it or take it off the list')


def _to_classes(
    stored: np.ndarray, table: np.ndarray, classes: int, label_map: str, path: str
) -> np.ndarray:
    if stored.dtype != np.uint8:
        if stored.min() < 0 or stored.max() > 255:
            value = stored[(stored < 0) | (stored > 255)][0]
            raise UserError(f'{path}: label value {value} is outside 0..255')
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
        f'{path}: label value {value}{mapped} is outside the {classes} classes '
        f'0..{classes - 1} and is not {IGNORE} (ignore): {hint}'
    )


def _join(root: str, path: str) -> str:
    return path if '://' in path else os.path.join(root, path)


def _read_bytes(path: str) -> bytes:
    try:
        if '://' in path:
            with _gfile().GFile(path, 'rb') as file:
                return file.read()
        with open(path, 'rb') as file:
            return file.read()
    except FileNotFoundError:
        raise UserError(f'{path} does not exist') from None
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror or error}') from None
    except Exception as error:
        if '://' not in path:
            raise
        raise UserError(f'{path} cannot be read: {" ".join(str(error).split())}') from error


def _exists(path: str) -> bool:
    return bool(_gfile().exists(path)) if '://' in path else os.path.exists(path)


def _gfile():
    import tensorflow as tf  # slow to import, and needed for remote paths alone

    return tf.io.gfile
