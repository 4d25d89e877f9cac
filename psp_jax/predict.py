"""Label maps of pictures: `--mode predict`, and the same for programs.

from psp_jax.predict import load
network = load('runs/camvid')
labels = network(image)  # uint8 [H, W, 3] of any size -> uint8 [H, W]
"""

import glob
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import cv2
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from psp_jax.command_line import whole_file
from psp_jax.config import flatten
from psp_jax.config_check import resolve
from psp_jax.data.decode import read_image
from psp_jax.data.labels import LabelSpace, label_space, palette
from psp_jax.data.pipeline import read_ahead
from psp_jax.data.sources import PICTURES
from psp_jax.errors import UserError
from psp_jax.inference import protocols
from psp_jax.inference.programs import (
    Example,
    Programs,
    make_batches,
    make_programs,
    overlap,
    tiles,
)
from psp_jax.inference.protocols import Block
from psp_jax.mesh import local_mesh
from psp_jax.model import pspnet
from psp_jax.model.geometry import Size
from psp_jax.report import console, pictures
from psp_jax.runtime import checkpoint
from psp_jax.state import setup

K = TypeVar('K')

PIECE = 2**22  # pixels; larger images are not shown in one piece
ENDINGS = ('.png', '_overlay.jpg', '.npy')
IN_WINDOWS = {'whole': 'semseg', 'mmseg': 'mmseg_slide'}  # by the same side of the image
OVERLAY = 8192  # pixels; overlays of larger pictures are reduced to this side


class Predictor:
    """A trained network with its configuration; `load` makes one.

    Calling it with an image, uint8 [H, W, 3] RGB or [H, W] grey of any size, gives class ids
    uint8 [H, W] by the protocol of `config.eval`; images that a protocol would show in one piece of
    more than `piece` pixels go by windows. For one thread at a time.
    """

    def __init__(self, config: ConfigDict, variables: Any, piece: float = PIECE):
        # Results do not depend on the canvases; few of them serve pictures of many sizes.
        multiple = max(config.eval.multiple, 64)
        config = resolve(flatten(config) | {'eval.multiple': multiple})
        self.config = config
        self.space: LabelSpace = label_space(config.data.classes)
        self._variables = variables
        self._piece = piece  # pixels that the network is shown at once
        self._configs = {config.eval.protocol: config}
        if config.eval.protocol in IN_WINDOWS:
            large = in_windows(config)
            self._configs[large.eval.protocol] = large
        self._made: dict[str, tuple[Programs, Callable[..., Any], Callable[..., Any]]] = {}

    def __call__(self, image: np.ndarray) -> np.ndarray:
        return next(self.stream([(None, image)]))[2]

    def probabilities(self, image: np.ndarray) -> np.ndarray:
        """float32 [H, W, classes], which sum to 1 over the classes."""
        made: list[np.ndarray] = []

        def scores(_: None, shape: tuple[int, int, int]) -> np.ndarray:
            made.append(np.zeros(shape, np.float32))
            return made[0]

        next(self.stream([(None, image)], scores))
        return made[0]

    def stream(
        self,
        images: Iterable[tuple[K, np.ndarray]],
        scores: Callable[[K, tuple[int, int, int]], np.ndarray] | None = None,
    ) -> Iterator[tuple[K, np.ndarray, np.ndarray]]:
        """(key, image, class ids) of many images (key, image), each when it is done.

        `scores(key, [H, W, classes])` gives the array that an image's probabilities go into.
        """
        waiting: dict[int, tuple[K, np.ndarray, np.ndarray, np.ndarray | None]] = {}
        left: dict[int, int] = {}  # blocks of an image

        def blocks() -> Iterator[list[Example]]:
            for number, (key, image) in enumerate(images):
                image = as_rgb(image)
                found = self._blocks(image)
                shape = image.shape[0], image.shape[1], len(self.space.names)
                array = scores(key, shape) if scores else None
                waiting[number] = key, image, np.zeros(shape[:2], np.uint8), array
                left[number] = len(found)
                yield [Example(number, image, None, block, len(found)) for block in found]

        size = local_mesh(self.config.mesh.data, self.config.mesh.space).size
        for batch in make_batches(blocks(), size):
            for example, place, tile in self._tiles(batch, scores is not None):
                _, _, ids, array = waiting[example.number]
                inside, outside = overlap(example.block, place)
                if array is not None:
                    array[outside] = tile[inside]
                    tile = tile.argmax(-1)
                ids[outside] = tile[inside]
            for example in batch:
                left[example.number] -= 1
                if not left[example.number]:
                    yield waiting.pop(example.number)[:3]
        for programs, _, _ in self._made.values():
            programs.release()

    def _blocks(self, image: np.ndarray) -> list[Block]:
        config = self.config
        if config.eval.protocol in IN_WINDOWS:
            size = image.shape[0], image.shape[1]
            seen = protocols.seen_size(size, max(config.eval.scales), config)
            if seen[0] * seen[1] > self._piece:
                config = self._configs[IN_WINDOWS[config.eval.protocol]]
        return protocols.blocks(image, config, len(self.space.names))

    def _programs(self, protocol: str) -> tuple[Programs, Callable[..., Any], Callable[..., Any]]:
        """Those for blocks of a protocol, and for class ids and probabilities of a tile."""
        if protocol not in self._made:
            config = self._configs[protocol]
            mesh = local_mesh(config.mesh.data, config.mesh.space)
            if protocol not in protocols.SLIDING:  # one image a device: more may not come
                config = resolve(flatten(config) | {'eval.batch_size': mesh.size})
            made = make_programs(config, pspnet.build(config), mesh)
            ids = made.on_tile(lambda p: jnp.argmax(p, -1).astype(jnp.uint8))
            self._made[protocol] = made, ids, made.on_tile(lambda p: p)
        return self._made[protocol]

    def _tiles(
        self, batch: list[Example], probabilities: bool
    ) -> Iterator[tuple[Example, Size, np.ndarray]]:
        """(block, place in it, class ids or probabilities of the tile there), tile by tile."""
        programs, ids, chances = self._programs(batch[0].block.protocol)
        fn = chances if probabilities else ids
        blocks = [example.block for example in batch]
        fields = programs.fields(self._variables, blocks)
        unread = None
        for tile in [*tiles(blocks, programs), None]:
            running = (tile.place, fn(fields, tile)) if tile else None
            if unread:
                values = np.asarray(unread[1])
                yield from ((e, unread[0], values[row]) for row, e in enumerate(batch))
            unread = running


def in_windows(config: ConfigDict) -> ConfigDict:
    """The same sizes and scales by sliding windows, whose memory does not grow with the image."""
    flip = str(protocols.flips(config)).lower()
    protocol = IN_WINDOWS[config.eval.protocol]
    return resolve(flatten(config) | {'eval.protocol': protocol, 'eval.flip': flip})


def load(
    source: str, which: str = 'latest', overrides: Mapping[str, Any] | None = None
) -> Predictor:
    """The network in a working directory, or at a checkpoint's own path.

    which: 'latest', 'best' or a step. overrides: keys of its configuration, as in
    {'eval.protocol': 'semseg', 'eval.base_size': 512}. Raises UserError for a missing or broken
    checkpoint and unknown or illegal keys.
    """
    if not checkpoint.directory(source).exists():
        source, which = '', source
    path, step = checkpoint.find(source, which)
    config = resolve(flatten(checkpoint.config_of(path, step)) | dict(overrides or {}))
    return Predictor(config, checkpoint.restore_variables(setup(config), path, step))


def as_rgb(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of a grey or RGB array; raises UserError for anything else."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or 0 in image.shape:
        raise UserError(
            f'an image must be uint8 [H, W, 3] RGB or [H, W] grey, not {image.dtype}'
            f'{list(image.shape)}'
        )
    if image.ndim == 2:
        image = image[..., None]
    if image.shape[2] not in (1, 3):
        raise UserError(f'an image must have 3 channels or one, not {image.shape[2]}')
    return np.broadcast_to(image, (*image.shape[:2], 3))


# ---- The command line


def find_images(images: str, output: str = '') -> dict[str, str]:
    """{path: name without suffix, relative to the folder} of a picture, a folder or a glob.

    What lies in the folder `output` is not among those of a folder. Raises UserError where there
    is none, or two would share a name.
    """
    if os.path.isdir(images):
        found = []
        for at, folders, names in os.walk(images):
            folders[:] = [f for f in folders if not _same(os.path.join(at, f), output)]
            found += [os.path.join(at, n) for n in names if n.lower().endswith(PICTURES)]
    elif os.path.isfile(images):
        found = [images]
    else:
        found = [path for path in glob.glob(images, recursive=True) if os.path.isfile(path)]
    if not found:
        raise UserError(f'--images={images}: no picture, folder of pictures, or glob of some')
    folder = images if os.path.isdir(images) else os.path.commonpath(map(os.path.dirname, found))
    by_name: dict[str, str] = {}
    for path in sorted(found):
        name = os.path.splitext(os.path.relpath(path, folder or '.'))[0]
        if name in by_name:
            raise UserError(f'{by_name[name]} and {path} have the same name: predict them apart')
        by_name[name] = path
    return {path: name for name, path in by_name.items()}


def _same(path: str, other: str) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)


def predict_images(
    predictor: Predictor, names: Mapping[str, str], output: str, probabilities: bool
) -> list[str]:
    """Writes the label map and an overlay of each picture; returns what could not be read.

    names: as `find_images` gives them. For `a/b.jpg` there are OUTPUT/b.png (class ids with the
    palette), OUTPUT/b_overlay.jpg and, with `probabilities`, OUTPUT/b.npy (float16 [H, W,
    classes]). Each appears once it is whole. Raises UserError where OUTPUT cannot be written or
    the label maps would replace the pictures.
    """
    for path, name in names.items():
        for ending in ENDINGS:
            if _same(path, os.path.join(output, name + ending)):
                raise UserError(f'--output={output}: would replace {path}; name another folder')
    bad: list[str] = []

    def read(path: str) -> np.ndarray | UserError:
        try:
            return read_image(path)
        except UserError as error:
            return error

    def place(path: str, ending: str) -> str:
        target = os.path.join(output, names[path] + ending)
        try:
            os.makedirs(os.path.dirname(target), exist_ok=True)
        except OSError as error:
            raise UserError(f'--output={output}: cannot be written ({error.strerror})') from error
        return target

    def scores(path: str, shape: tuple[int, int, int]) -> np.ndarray:
        unfinished = place(path, '.npy') + '.unfinished'
        return np.lib.format.open_memmap(unfinished, 'w+', np.float16, shape)

    with whole_file(place(next(iter(names)), '.probe')) as probe:  # before compiling
        open(probe, 'w').close()
    os.remove(place(next(iter(names)), '.probe'))
    with tqdm(total=len(names), desc='predicting', unit='image', disable=None) as bar:

        def readable() -> Iterator[tuple[str, np.ndarray]]:
            found = read_ahead(read, names, predictor.config.data.threads)
            for path, image in zip(names, found, strict=True):
                if isinstance(image, UserError):
                    bad.append(str(image))
                    bar.update()
                else:
                    yield path, image

        done = predictor.stream(readable(), scores if probabilities else None)
        for path, image, ids in done:
            if probabilities:
                os.replace(place(path, '.npy') + '.unfinished', place(path, '.npy'))
            with whole_file(place(path, '.png')) as part, open(part, 'wb') as file:
                file.write(labels_png(ids, predictor.space))
            overlay = Image.fromarray(draw_overlay(image, ids, predictor.space))
            with whole_file(place(path, '_overlay.jpg')) as part:
                overlay.save(part, 'JPEG', quality=92)
            bar.update()
    return bad


def labels_png(ids: np.ndarray, space: LabelSpace | None) -> bytes:
    """Ids uint8 [H, W] as a PNG of indices, with the classes' colours as palette, or grey."""
    picture = Image.fromarray(ids)
    if space:
        picture.putpalette(palette(space).tobytes())
    encoded = io.BytesIO()
    picture.save(encoded, 'PNG')
    return encoded.getvalue()


def draw_overlay(image: np.ndarray, ids: np.ndarray, space: LabelSpace) -> np.ndarray:
    """The picture under half-transparent class colours, with a legend of its classes below.

    At most OVERLAY pixels a side: JPEG ends at 65,500.
    """
    scale = min(1, OVERLAY / max(ids.shape))
    if scale < 1:
        size = max(round(ids.shape[1] * scale), 1), max(round(ids.shape[0] * scale), 1)
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        ids = cv2.resize(ids, size, interpolation=cv2.INTER_NEAREST)
    blended = cv2.addWeighted(image, 0.5, space.colors[ids], 0.5, 0)
    present = np.unique(ids).tolist()
    width = max(blended.shape[1], 160)
    blended = np.pad(blended, ((0, 0), (0, width - blended.shape[1]), (0, 0)), constant_values=255)
    return np.concatenate([blended, pictures.legend(present, space, width)])


def predict_checkpoint(
    config: ConfigDict | None,
    workdir: str,
    which: str,
    overrides: list[str],
    images: str,
    output: str,
    probabilities: bool,
) -> None:
    """`predict_images` with a checkpoint; the configuration defaults to its own.

    Raises UserError that names the pictures that could not be read, once the others are done.
    """
    path, step = checkpoint.find(workdir, which)
    config = config or checkpoint.config_of(path, step, overrides)
    names = find_images(images, output)
    console.say(f'{path / str(step)} on {len(names)} pictures by protocol {config.eval.protocol}')
    predictor = Predictor(config, checkpoint.restore_variables(setup(config), path, step))
    bad = predict_images(predictor, names, output, probabilities)
    console.say(f'{len(names) - len(bad)} label maps and overlays written to {output}')
    if bad:
        raise UserError(f'{len(bad)} of {len(names)} pictures could not be read: {"; ".join(bad)}')
