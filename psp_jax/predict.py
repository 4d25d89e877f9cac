"""Label maps of images: `--mode predict`, and the same for programs.

from psp_jax.predict import load
network = load('runs/camvid')
labels = network(image)  # uint8 [H, W, 3] of any size -> uint8 [H, W]
"""

import glob
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from psp_jax.command_line import whole_file
from psp_jax.config import flatten
from psp_jax.config_check import resolve
from psp_jax.data.decode import read_image
from psp_jax.data.labels import LabelSpace, label_space
from psp_jax.data.pipeline import read_ahead
from psp_jax.data.sources import PICTURES
from psp_jax.errors import UserError
from psp_jax.inference.programs import make_programs, on_local_devices
from psp_jax.inference.protocols import flips, protocol_of
from psp_jax.inference.stream import Job, Pixels, Stream
from psp_jax.mesh import local_mesh
from psp_jax.report import console, pictures
from psp_jax.runtime import checkpoint
from psp_jax.state import Setup, setup

K = TypeVar('K')

PIECE = 2**22  # pixels; larger images are not shown to the network in one piece
ENDINGS = ('.png', '_overlay.jpg', '.npy')


@dataclass
class Predicted(Job):
    """An image that is being predicted."""

    key: Any  # what the caller calls it
    probabilities: np.ndarray | None  # float [H, W, classes] to fill, if they are asked for

    def __post_init__(self) -> None:
        self.ids = np.zeros(self.image.shape[:2], np.uint8)

    def add(self, pixels: Pixels, within: Pixels, result: Any) -> None:
        """Takes the class ids or the probabilities of a tile."""
        tile = result[within]
        if self.probabilities is not None:
            self.probabilities[pixels] = tile
            tile = tile.argmax(-1)
        self.ids[pixels] = tile


def class_ids(probabilities: jax.Array) -> jax.Array:
    """[h, w, classes] -> the likeliest class uint8 [h, w]."""
    return jnp.argmax(probabilities, -1).astype(jnp.uint8)


def unchanged(probabilities: jax.Array) -> jax.Array:
    return probabilities


class Predictor:
    """A trained network with its configuration; `load` makes one.

    Calling it with an image, uint8 [H, W, 3] RGB or [H, W] grey of any size, gives class ids
    uint8 [H, W] by the protocol of `config.eval`. An image that the protocol shows in one piece is
    predicted in windows if it then has more than `piece` pixels. Use it from one thread at a time.
    """

    def __init__(self, run: Setup, variables: Any, piece: float = PIECE):
        mesh = local_mesh(run.config.mesh.data, run.config.mesh.space)
        # A multiple of 64 makes few programs for images of many sizes. Each device gets one image
        # at a time, because there may be no second one. The results do not depend on either.
        multiple = max(run.config.eval.multiple, 64)
        changes: dict[str, Any] = {'eval.multiple': multiple}
        if not protocol_of(run.config).slides:
            changes['eval.batch_size'] = mesh.size
        self.config = resolve(flatten(run.config) | changes)
        self.space: LabelSpace = label_space(run.config.data.classes)
        self.piece = piece
        configs = [self.config]
        if protocol_of(self.config).for_large_images:
            configs.append(in_windows(self.config, run.config.eval.batch_size))
        programs = {
            config.eval.protocol: make_programs(replace(run, config=config), mesh)
            for config in configs
        }
        self._variables = on_local_devices(variables, mesh)
        self._ids = Stream(programs, class_ids)
        self._probabilities = Stream(programs, unchanged, unread=1)  # they are large

    def __call__(self, image: np.ndarray) -> np.ndarray:
        return next(self.stream([(None, image)]))[2]

    def probabilities(self, image: np.ndarray) -> np.ndarray:
        """float32 [H, W, classes], which sum to 1 over the classes."""
        image = as_rgb(image)
        found = np.zeros((*image.shape[:2], len(self.space.names)), np.float32)
        next(self.stream([(None, image)], lambda key, shape: found))
        return found

    def stream(
        self,
        images: Iterable[tuple[K, np.ndarray]],
        new_array: Callable[[K, tuple[int, int, int]], np.ndarray] | None = None,
    ) -> Iterator[tuple[K, np.ndarray, np.ndarray]]:
        """(key, image, class ids) of many images (key, image), each when it is done.

        new_array(key, (H, W, classes)), if given, makes the array for an image's probabilities.
        """
        stream = self._probabilities if new_array else self._ids
        jobs = (self._job(key, as_rgb(image), new_array) for key, image in images)
        examples = (stream.blocks(job, self._protocol(job.image)) for job in jobs)
        for job in stream.run(self._variables, examples):
            yield job.key, job.image, job.ids

    def _job(self, key: Any, image: np.ndarray, new_array: Callable[..., Any] | None) -> Predicted:
        shape = *image.shape[:2], len(self.space.names)
        return Predicted(image, None, key, new_array(key, shape) if new_array else None)

    def _protocol(self, image: np.ndarray) -> str:
        """The name of the protocol for an image of this size."""
        protocol = protocol_of(self.config)
        size = image.shape[0], image.shape[1]
        height, width = protocol.seen_size(size, max(self.config.eval.scales), self.config)
        large = not protocol.slides and height * width > self.piece
        return large and protocol.for_large_images or self.config.eval.protocol


def in_windows(config: ConfigDict, batch_size: int) -> ConfigDict:
    """The same sizes and scales by sliding windows, whose memory does not grow with the image."""
    changes = {
        'eval.protocol': protocol_of(config).for_large_images,
        'eval.flip': str(flips(config)).lower(),
        'eval.batch_size': batch_size,
    }
    return resolve(flatten(config) | changes)


def load(
    source: str, which: str = 'latest', overrides: Mapping[str, Any] | None = None
) -> Predictor:
    """The network of a working directory, or of a checkpoint's own path.

    which: 'latest', 'best' or a step. overrides: keys of its configuration, as in
    {'eval.protocol': 'semseg', 'eval.base_size': 512}. Raises UserError if the checkpoint is
    missing or broken, and for unknown or illegal keys.
    """
    if not checkpoint.directory(source).exists():
        source, which = '', source
    path, step = checkpoint.find(source, which)
    run = setup(resolve(flatten(checkpoint.config_of(path, step)) | dict(overrides or {})))
    return Predictor(run, checkpoint.restore_variables(run, path, step))


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
    """{path: name without suffix, relative to the folder} of an image, a folder or a glob.

    Leaves out what lies in the folder `output`. Raises UserError if there is no image, or if two
    would share a name.
    """
    if os.path.isdir(images):
        found = []
        for parent, folders, names in os.walk(images):
            folders[:] = [f for f in folders if not _same(os.path.join(parent, f), output)]
            found += [os.path.join(parent, n) for n in names if n.lower().endswith(PICTURES)]
    elif os.path.isfile(images):
        found = [images]
    else:
        found = [path for path in glob.glob(images, recursive=True) if os.path.isfile(path)]
    if not found:
        raise UserError(f'--images={images}: no image, folder of images, or glob of some')
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
    """Writes the label map and an overlay of each image; returns what could not be read.

    names: as `find_images` returns them. For `a/b.jpg` there are OUTPUT/b.png (class ids with the
    palette), OUTPUT/b_overlay.jpg and, with `probabilities`, OUTPUT/b.npy (float16 [H, W,
    classes]). Each file appears when it is complete. Raises UserError if OUTPUT cannot be written
    or the label maps would replace the images.
    """
    targets = {path: os.path.join(output, name) for path, name in names.items()}
    check_targets(targets, output)
    bad: list[str] = []
    images = readable(targets, predictor.config.data.threads, bad)
    found = predictor.stream(images, unfinished_array if probabilities else None)
    for target, image, ids in tqdm(
        found, total=len(names), desc='predicting', unit='image', disable=None
    ):
        if probabilities:
            os.replace(f'{target}.npy.unfinished', f'{target}.npy')
        with whole_file(f'{target}.png') as part, open(part, 'wb') as file:
            file.write(pictures.labels_png(ids, predictor.space))
        overlay = Image.fromarray(pictures.draw_overlay(image, ids, predictor.space))
        with whole_file(f'{target}_overlay.jpg') as part:
            overlay.save(part, 'JPEG', quality=92)
    return bad


def check_targets(targets: Mapping[str, str], output: str) -> None:
    """Makes the folders of {image: path of its results without suffix}, before any compilation.

    Raises UserError if they cannot be written, or if a result would replace an image.
    """
    for path, target in targets.items():
        if any(_same(path, target + ending) for ending in ENDINGS):
            raise UserError(f'--output={output}: would replace {path}; name another folder')
    try:
        for target in targets.values():
            os.makedirs(os.path.dirname(target), exist_ok=True)
        with tempfile.TemporaryFile(dir=os.path.dirname(target)):
            pass
    except OSError as error:
        raise UserError(f'--output={output}: cannot be written ({error.strerror})') from error


def readable(
    targets: Mapping[str, str], threads: int, bad: list[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """(target, image) of {path: target}; the errors of unreadable images go into `bad`."""
    found = read_ahead(image_or_error, targets, threads)
    for target, image in zip(targets.values(), found, strict=True):
        if isinstance(image, UserError):
            bad.append(str(image))
        else:
            yield target, image


def image_or_error(path: str) -> np.ndarray | UserError:
    """The image uint8 [H, W, 3] of a file, or what is wrong with it."""
    try:
        return read_image(path)
    except UserError as error:
        return error


def unfinished_array(target: str, shape: tuple[int, int, int]) -> np.ndarray:
    """float16 [H, W, classes], mapped to a file, so that it may be larger than memory."""
    return np.lib.format.open_memmap(f'{target}.npy.unfinished', 'w+', np.float16, shape)


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

    Once all others are done, raises UserError that names the images that could not be read.
    """
    path, step, config = checkpoint.find_with_config(config, workdir, which, overrides)
    names = find_images(images, output)
    console.say(f'{path / str(step)} on {len(names)} images by protocol {config.eval.protocol}')
    run = setup(config)
    predictor = Predictor(run, checkpoint.restore_variables(run, path, step))
    bad = predict_images(predictor, names, output, probabilities)
    console.say(f'{len(names) - len(bad)} label maps and overlays written to {output}')
    if bad:
        raise UserError(f'{len(bad)} of {len(names)} images could not be read: {"; ".join(bad)}')
