"""Scoring a network on a whole split: every image once, every valid pixel once."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import tensorflow as tf
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from psp_jax import checkpoint, losses, metrics, report
from psp_jax.config import apply_overrides, check_config, from_json
from psp_jax.data.labels import IGNORE, label_space
from psp_jax.data.pipeline import eval_examples
from psp_jax.data.sources import Source, check_source, make_source
from psp_jax.errors import UserError
from psp_jax.mesh import local_mesh, on_devices, put_batch, replicated, split_batch
from psp_jax.model import pspnet
from psp_jax.model.resample import resize_matrix
from psp_jax.state import enable_float64, init_variables

CANVAS = 128  # pixels; the shortest side of the canvases that labels lie on


class Panel(NamedTuple):
    """One image as a person looks at it: uint8 [H, W, 3], and [H, W] of class ids."""

    image: np.ndarray
    label: np.ndarray
    prediction: np.ndarray


class Result(NamedTuple):
    scores: dict[str, Any]  # the content of metrics.json
    confusion: np.ndarray  # int64 [classes, classes] of (label, prediction)
    picture: np.ndarray | None  # uint8 [H, W, 3], a few panels as a person sees them


def network_size(
    size: tuple[int, int], base_size: int, multiple: int, align_corners: bool
) -> tuple[int, int]:
    """The (height, width) at which the network sees an image of `size`.

    The long side becomes `base_size` (0 keeps the image's) at the same aspect ratio; then each
    side goes to the nearest positive multiple of `multiple`, plus 1 with `align_corners`. A
    multiple of 8 is what the stride needs to meet both edges. A larger one bends the aspect ratio
    a little and leaves fewer sizes to compile.
    """
    scale = base_size / max(size) if base_size else 1.0
    extra = 1 if align_corners else 0
    height, width = (
        multiple * max(round((side * scale - extra) / multiple), 1) + extra for side in size
    )
    return height, width


def full_matrix(features: int, seen: int, size: int, align_corners: bool) -> np.ndarray:
    """Logits of `features` cells -> the `seen` pixels of the network's input -> `size` pixels of
    the label, one axis of it: float64[size, features]. The reference also resizes in two steps.
    """
    up = resize_matrix(features, seen, align_corners)
    return resize_matrix(seen, size, align_corners) @ up


class Batch(NamedTuple):
    """Images that the network sees at one size, and their labels on canvases of one size.

    A batch that could not be filled has rows of ignored labels at its end.
    """

    indices: list[int]  # of the examples, without the filled-up rows
    originals: list[tuple[np.ndarray, np.ndarray]]  # their images and labels as they were read
    images: np.ndarray  # uint8 [B, h, w, 3], as the network sees them
    labels: np.ndarray  # uint8 [B, H, W], at the top left of a canvas of ignored pixels
    rows: np.ndarray  # float [B, H, ceil(h / 8)]: `full_matrix` of each image's own height
    columns: np.ndarray  # float [B, W, ceil(w / 8)]


def make_batches(
    examples: Iterable[tuple[int, np.ndarray, np.ndarray]],
    size: int,
    config: ConfigDict,
) -> Iterator[Batch]:
    """Groups (index, image, label) by the size that the network sees, `size` at a time."""
    align_corners = config.model.align_corners
    waiting: dict[tuple[int, int], list[tuple[int, np.ndarray, np.ndarray]]] = {}

    def batch(key: tuple[int, int]) -> Batch:
        height, width = key
        group = waiting.pop(key)
        # Few canvases: sides are powers of two, beyond the largest label of the group.
        largest = np.max([label.shape for _, _, label in group], 0)
        canvas = tuple(max(CANVAS, 1 << (int(side) - 1).bit_length()) for side in largest)
        cells = (height + 7) // 8, (width + 7) // 8
        images = np.zeros((size, height, width, 3), np.uint8)
        labels = np.full((size, *canvas), IGNORE, np.uint8)
        rows, columns = (np.zeros((size, c, n)) for c, n in zip(canvas, cells, strict=True))
        for i, (_, image, label) in enumerate(group):
            # Bilinear without antialiasing, as the reference resizes.
            images[i] = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
            own_height, own_width = label.shape
            labels[i, :own_height, :own_width] = label
            rows[i, :own_height] = full_matrix(cells[0], height, own_height, align_corners)
            columns[i, :own_width] = full_matrix(cells[1], width, own_width, align_corners)
        indices, originals = [i for i, _, _ in group], [(x, y) for _, x, y in group]
        return Batch(indices, originals, images, labels, rows, columns)

    for example in examples:
        own = example[2].shape
        seen = network_size(own, config.eval.base_size, config.eval.multiple, align_corners)
        group = waiting.setdefault(seen, [])
        group.append(example)
        if len(group) == size:
            yield batch(seen)
    for key in list(waiting):
        yield batch(key)


def score(
    logits: jax.Array, labels: jax.Array, rows: jax.Array, columns: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Logits [B, h, w, C] against the other arrays of a `Batch`: confusion int32 [C, C], summed
    cross-entropy, number of valid pixels, predictions uint8 [B, H, W].
    """

    def block(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, ...]:
        predictions = jnp.argmax(logits, -1).astype(jnp.uint8)
        confusion = metrics.confusion_matrix(predictions, labels, logits.shape[-1])
        return confusion, *losses.pixel_cross_entropy(logits, labels), predictions[0]

    def one(logits: jax.Array, labels: jax.Array, *matrices: jax.Array) -> tuple[jax.Array, ...]:
        return losses.map_row_blocks(block, logits[None], labels[None], *matrices)

    confusion, loss, count, predictions = jax.vmap(one)(logits, labels, rows, columns)
    predictions = predictions.reshape(len(labels), -1, labels.shape[2])[:, : labels.shape[1]]
    return confusion.sum((0, 1)), loss.sum(), count.sum(), predictions


def make_evaluator(
    config: ConfigDict, model: pspnet.PSPNet, source: Source
) -> Callable[[dict[str, Any], int], Result]:
    """A function (variables, step) -> Result that scores every image of `source` once.

    Every process scores every `process_count`-th image on its own devices, at its own pace; only
    the counts are summed over processes in the end.
    """
    mesh = local_mesh(config.mesh.data)
    space = label_space(config.data.classes)
    names = space.names
    share = range(jax.process_index(), source.length, jax.process_count())
    batch_size = -(-config.eval.batch_size // mesh.size) * mesh.size
    panels_here = min(config.eval.panels, len(share))
    shown = {share[int(i)] for i in np.linspace(0, len(share) - 1, panels_here)}
    split, whole = split_batch(mesh), replicated(mesh)
    # Two programs: the network compiles for each size that it sees, which are few, and the quick
    # scoring for each canvas, with the true sizes as data.
    forward = jax.jit(
        lambda variables, images: model.apply(variables, pspnet.normalise(images, config), False)[
            0
        ],
        in_shardings=(whole, split),
        out_shardings=split,
    )
    score_fn = jax.jit(score, in_shardings=split, out_shardings=(whole, whole, whole, split))

    def evaluate(variables: dict[str, Any], step: int) -> Result:
        start = time.perf_counter()
        local = jax.tree.map(lambda x: x.addressable_data(0), variables)
        variables = jax.device_put(local, whole)
        confusion = np.zeros((len(names), len(names)), np.int64)
        loss, count, panels = 0.0, 0, {}

        def read(batch: Batch, outputs: Any, bar: tqdm) -> None:
            nonlocal confusion, loss, count
            matrix, batch_loss, batch_count = jax.device_get(outputs[:3])
            confusion = confusion + matrix
            loss, count = loss + float(batch_loss), count + int(batch_count)
            for row, index in enumerate(batch.indices):
                if index in shown:
                    image, label = batch.originals[row]
                    prediction = np.asarray(outputs[3][row])[: len(label), : label.shape[1]]
                    panels[index] = Panel(image, label, prediction)
            bar.update(len(batch.indices))

        examples = eval_examples(source, share, config.data.threads)
        unread = None
        hidden = not report.on_terminal()
        with tqdm(
            total=len(share), desc='evaluating', unit='image', disable=hidden, leave=False
        ) as bar:
            for batch in make_batches(examples, batch_size, config):
                images, *others = put_batch(batch[2:], mesh)
                outputs = score_fn(forward(variables, images), *others)
                if unread:
                    read(*unread, bar)  # while the devices work on the next batch
                unread = batch, outputs
            if unread:
                read(*unread, bar)
        confusion, loss, count = sum_over_processes((confusion, np.float64(loss), np.int64(count)))
        scores = {
            'step': step,
            'protocol': config.eval.protocol,
            'split': config.eval.split,
            'images': source.length,
            **metrics.scores(confusion, names),
            'loss': float(loss) / max(int(count), 1),
            'seconds': time.perf_counter() - start,
        }
        chosen = [panels[index] for index in sorted(panels)]
        return Result(scores, confusion, report.draw_panels(chosen, space) if chosen else None)

    return evaluate


def sum_over_processes(tree: Any) -> Any:
    """Adds host values over all processes, in their own precision (64 bits travel as bytes)."""
    if jax.process_count() == 1:
        return tree

    def add(value: Any) -> Any:
        value = np.ascontiguousarray(value)
        gathered = multihost_utils.process_allgather(np.atleast_1d(value).view(np.uint8))
        return gathered.view(value.dtype).reshape(-1, *value.shape).sum(0)

    return jax.tree.map(add, tree)


def write_result(result: Result, workdir: str) -> str:
    """Writes metrics.json, confusion.npy and panels.png; returns the folder they are in."""
    scores = result.scores
    folder = f'{workdir}/eval/{scores["step"]}-{scores["protocol"]}'
    if jax.process_index() == 0:
        tf.io.gfile.makedirs(folder)
        for path in (f'{folder}/metrics.json', f'{workdir}/eval/metrics.json'):
            with tf.io.gfile.GFile(path, 'w') as file:
                file.write(json.dumps(scores, indent=2) + '\n')
        with tf.io.gfile.GFile(f'{folder}/confusion.npy', 'wb') as file:
            np.save(file, result.confusion)
        if result.picture is not None:
            report.write_png(f'{folder}/panels.png', result.picture)
    return folder


def evaluate_checkpoint(
    config: ConfigDict | None, workdir: str, which: str, overrides: list[str]
) -> None:
    """Scores a checkpoint and writes `WORKDIR/eval`; the configuration defaults to its own."""
    path, step = checkpoint.find(workdir, which)
    try:
        tf.io.gfile.makedirs(f'{workdir}/eval')
    except tf.errors.OpError as error:
        raise UserError(
            f'{workdir}/eval: cannot be written ({error.message}); set --workdir'
        ) from error
    if config is None:
        config = from_json(checkpoint.read_meta(path, step)['config'])
        apply_overrides(config, overrides)
        check_config(config)
    enable_float64(config)
    source = make_source(config.data, config.eval.split)
    check_source(source)
    model = pspnet.build(config)
    shapes = jax.eval_shape(lambda: init_variables(model, config.seed))
    mesh = local_mesh(config.mesh.data)
    target = {name: on_devices(shapes[name], mesh) for name in ('params', 'batch_stats')}
    variables = checkpoint.restore(path, step, target)
    report.say(f'evaluating {path / str(step)} on {source.length} images of {config.eval.split!r}')
    result = make_evaluator(config, model, source)(variables, step)
    folder = write_result(result, workdir)
    report.say(report.class_table(result.scores))
    report.say(f'{report.headline(result.scores)}\nwritten to {folder}')
