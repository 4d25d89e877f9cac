"""Scoring a network on a whole split: every image once, every valid pixel once."""

import json
import time
from collections.abc import Callable, Iterator
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
from psp_jax.mesh import local_mesh, on_devices, put_batch, replicated, split_batch
from psp_jax.model import pspnet
from psp_jax.model.resample import resize_matrix
from psp_jax.state import enable_float64, init_variables


class Panel(NamedTuple):
    """One image as a person looks at it: uint8 [H, W, 3], and [H, W] of class ids."""

    image: np.ndarray
    label: np.ndarray
    prediction: np.ndarray


class Result(NamedTuple):
    scores: dict[str, Any]  # the content of metrics.json
    confusion: np.ndarray  # int64 [classes, classes] of (label, prediction)
    panels: list[Panel]


def network_size(size: tuple[int, int], base_size: int, align_corners: bool) -> tuple[int, int]:
    """The (height, width) at which the network sees an image of `size`.

    The long side becomes `base_size` (0 keeps the image's), the aspect ratio stays, then each side
    goes to the nearest 8n + 1 with `align_corners` or multiple of 8 without, which the stride of 8
    needs to meet both edges.
    """
    scale = base_size / max(size) if base_size else 1.0
    extra = 1 if align_corners else 0
    height, width = (8 * max(round((side * scale - extra) / 8), 1) + extra for side in size)
    return height, width


def full_matrix(features: int, seen: int, size: int, align_corners: bool) -> np.ndarray:
    """Logits of `features` cells -> the `seen` pixels of the network's input -> `size` pixels of
    the label, one axis of it: float64[size, features]. The reference also resizes in two steps.
    """
    up = resize_matrix(features, seen, align_corners)
    return resize_matrix(seen, size, align_corners) @ up


def eval_step(
    variables: dict[str, Any],
    images: jax.Array,
    labels: jax.Array,
    model: pspnet.PSPNet,
    config: ConfigDict,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """uint8 images [B, h, w, 3] as the network sees them and labels uint8 [B, H, W] at their own
    size -> confusion int32 [C, C], summed cross-entropy, valid pixels, predictions uint8 [B, H, W].
    """
    logits, _ = model.apply(variables, pspnet.normalise(images, config), False)
    rows, columns = (
        full_matrix(logits.shape[axis], images.shape[axis], labels.shape[axis], model.align_corners)
        for axis in (1, 2)
    )

    def block(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, ...]:
        predictions = jnp.argmax(logits, -1).astype(jnp.uint8)
        loss, count = losses.pixel_cross_entropy(logits, labels)
        return (
            metrics.confusion_matrix(predictions, labels, model.classes),
            loss,
            count,
            predictions,
        )

    confusion, loss, count, predictions = losses.map_row_blocks(
        block, logits, labels, rows, columns
    )
    predictions = predictions.swapaxes(0, 1).reshape(len(labels), -1, labels.shape[2])
    return confusion.sum(0), loss.sum(), count.sum(), predictions[:, : labels.shape[1]]


def batches_of_one_shape(
    examples: Iterator[tuple[int, np.ndarray, np.ndarray]],
    size: int,
    base_size: int,
    align_corners: bool,
) -> Iterator[tuple[list[int], list[np.ndarray], np.ndarray, np.ndarray]]:
    """Groups examples of equal size, `size` at a time: (indices, original images, images as the
    network sees them, labels). A group that does not fill is completed with ignored labels, so
    that each image size compiles one program.
    """
    waiting: dict[tuple[int, ...], list[tuple[int, np.ndarray, np.ndarray]]] = {}

    def batch(group: list) -> tuple:
        height, width = network_size(group[0][1].shape[:2], base_size, align_corners)
        images = np.zeros((size, height, width, 3), np.uint8)
        labels = np.full((size, *group[0][2].shape), IGNORE, np.uint8)
        for row, (_, image, label) in enumerate(group):
            # Bilinear without antialiasing, as the reference resizes.
            images[row] = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
            labels[row] = label
        return [i for i, _, _ in group], [image for _, image, _ in group], images, labels

    for example in examples:
        group = waiting.setdefault(example[1].shape, [])
        group.append(example)
        if len(group) == size:
            yield batch(waiting.pop(example[1].shape))
    for group in waiting.values():
        yield batch(group)


def make_evaluator(
    config: ConfigDict, model: pspnet.PSPNet, source: Source
) -> Callable[[dict[str, Any], int], Result]:
    """A function (variables, step) -> Result that scores every image of `source` once.

    Every process scores every `process_count`-th image on its own devices, at its own pace; only
    the counts are summed over processes in the end.
    """
    mesh = local_mesh()
    names = label_space(config.data.classes).names
    share = range(jax.process_index(), source.length, jax.process_count())
    batch_size = -(-config.eval.batch_size // mesh.size) * mesh.size
    shown = set(
        np.linspace(0, source.length - 1, min(config.eval.panels, source.length)).astype(int)
    )
    step_fn = jax.jit(
        lambda variables, images, labels: eval_step(variables, images, labels, model, config),
        in_shardings=(replicated(mesh), split_batch(mesh), split_batch(mesh)),
        out_shardings=(replicated(mesh),) * 3 + (split_batch(mesh),),
    )

    def evaluate(variables: dict[str, Any], step: int) -> Result:
        start = time.perf_counter()
        local = jax.tree.map(lambda x: x.addressable_data(0), variables)
        variables = jax.device_put(local, replicated(mesh))
        confusion = np.zeros((len(names), len(names)), np.int64)
        loss, count, panels = 0.0, 0, {}
        batches = batches_of_one_shape(
            eval_examples(source, share, config.data.threads),
            batch_size,
            config.eval.base_size,
            model.align_corners,
        )
        with tqdm(
            total=len(share),
            desc='evaluating',
            unit='image',
            disable=not report.on_terminal(),
            leave=False,
        ) as bar:
            for indices, originals, images, labels in batches:
                outputs = step_fn(variables, *put_batch((images, labels), mesh))
                matrix, batch_loss, batch_count = jax.device_get(outputs[:3])
                confusion += matrix
                loss, count = loss + float(batch_loss), count + int(batch_count)
                for row in (row for row, index in enumerate(indices) if index in shown):
                    panels[indices[row]] = Panel(
                        originals[row], labels[row], np.asarray(outputs[3][row])
                    )
                bar.update(len(indices))
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
        return Result(scores, confusion, [panels[index] for index in sorted(panels)])

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


def write_result(result: Result, config: ConfigDict, workdir: str) -> str:
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
        if result.panels:
            picture = report.draw_panels(result.panels, label_space(config.data.classes))
            report.write_png(f'{folder}/panels.png', picture)
    return folder


def evaluate_checkpoint(
    config: ConfigDict | None, workdir: str, which: str, overrides: list[str]
) -> None:
    """Scores a checkpoint and writes `WORKDIR/eval`; the configuration defaults to its own."""
    path, step = checkpoint.find(workdir, which)
    if config is None:
        config = from_json(checkpoint.read_meta(path, step)['config'])
        apply_overrides(config, overrides)
        check_config(config)
    enable_float64(config)
    source = make_source(config.data, config.eval.split)
    check_source(source)
    model = pspnet.build(config)
    shapes = jax.eval_shape(lambda: init_variables(model, config.seed))
    target = {name: on_devices(shapes[name], local_mesh()) for name in ('params', 'batch_stats')}
    variables = checkpoint.restore(path, step, target)
    report.say(f'evaluating {path / str(step)} on {source.length} images of {config.eval.split!r}')
    result = make_evaluator(config, model, source)(variables, step)
    folder = write_result(result, config, workdir)
    report.say(report.class_table(result.scores))
    report.say(f'{report.headline(result.scores)}\nwritten to {folder}')
