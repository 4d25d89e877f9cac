"""Scores a network on a whole split: every image once, every valid pixel once."""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow as tf
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from psp_jax import losses, metrics
from psp_jax.data.labels import IGNORE, label_space, server_ids
from psp_jax.data.pipeline import holds_classes, read_ahead
from psp_jax.data.sources import Source, check_source, make_source
from psp_jax.errors import UserError
from psp_jax.inference.programs import make_programs, on_local_devices
from psp_jax.inference.protocols import flips
from psp_jax.inference.stream import Job, Pixels, Stream
from psp_jax.mesh import local_mesh
from psp_jax.report import console, html, pictures
from psp_jax.report.pictures import Panel
from psp_jax.runtime import checkpoint, preemption
from psp_jax.state import Setup, setup


@dataclass
class Scored(Job):
    """An image with its prediction and its scores, which are sums over its tiles."""

    label: np.ndarray
    number: int
    confusion: Any = 0  # int [classes, classes]
    loss: float = 0.0  # summed over the valid pixels
    count: int = 0  # of valid pixels

    def __post_init__(self) -> None:
        self.prediction = np.zeros(self.image.shape[:2], np.uint8)

    def add(self, pixels: Pixels, within: Pixels, result: Any) -> None:
        """Adds the results of `score` for a tile."""
        confusion, loss, count, prediction = result
        self.confusion += confusion
        self.loss += float(loss)
        self.count += int(count)
        self.prediction[pixels] = prediction[within]


class Result(NamedTuple):
    """What an evaluation finds."""

    scores: dict[str, Any]  # the content of metrics.json
    confusion: np.ndarray  # int64 [classes, classes] of (label, prediction)
    each: np.ndarray  # float64 [images], the mIoU of each image; NaN if no pixel is labelled
    panels: dict[int, Panel]  # some images by their number; empty except in process 0


def score(probabilities: jax.Array, labels: jax.Array) -> tuple[jax.Array, ...]:
    """Probabilities [h, w, C] against labels uint8 [h, w]: confusion int32 [C, C], summed
    cross-entropy, number of valid pixels, predictions uint8 [h, w].
    """
    predictions = jnp.argmax(probabilities, -1).astype(jnp.uint8)
    confusion = metrics.confusion_matrix(predictions, labels, probabilities.shape[-1])
    tiny = jnp.finfo(probabilities.dtype).tiny
    logits = jnp.log(jnp.maximum(probabilities, tiny))
    return confusion, *losses.cross_entropy(logits, labels), predictions


@dataclass(frozen=True)
class Evaluator:
    """Scores networks on a split, every image once.

    Every process scores every `process_count`-th image on its own devices, at its own pace. The
    sums over processes are taken at the end.
    """

    run: Setup
    source: Source

    @cached_property
    def stream(self) -> Stream:
        config = self.run.config
        mesh = local_mesh(config.mesh.data, config.mesh.space)
        return Stream({config.eval.protocol: make_programs(self.run, mesh)}, score)

    def evaluate(
        self,
        variables: Any,
        step: int,
        write: Callable[[int, np.ndarray], None] | None = None,
    ) -> Result:
        """Scores all images; every process calls it.

        variables: 'params' and 'batch_stats', whole on each device of the run or on one.
        write: gets the number and the prediction uint8 [H, W] of each image of this process.
        """
        start = time.perf_counter()
        config, source = self.run.config, self.source
        names = label_space(config.data.classes).names
        confusion = np.zeros((len(names), len(names)), np.int64)
        each = np.zeros(source.length)
        loss, count = np.float64(0), np.int64(0)
        share = range(jax.process_index(), source.length, jax.process_count())
        hidden = not console.on_terminal()
        bar = {'desc': 'evaluating', 'unit': 'image', 'disable': hidden, 'leave': False}
        for job in tqdm(self._scored(variables, share), total=len(share), **bar):
            preemption.still_alive(config.hang_seconds)
            confusion += job.confusion
            loss, count = loss + job.loss, count + job.count
            labelled = job.confusion.any()
            each[job.number] = metrics.scores(job.confusion, names)['mIoU'] if labelled else np.nan
            if write:
                write(job.number, job.prediction)
        confusion, each, loss, count = sum_over_processes((confusion, each, loss, count))
        scores = {
            'step': step,
            'protocol': config.eval.protocol,
            'scales': list(config.eval.scales),
            'flip': flips(config),
            'base_size': config.eval.base_size,
            'split': config.eval.split,
            'images': source.length,
            **metrics.scores(confusion, names),
            **metrics.extra_scores(confusion, label_space(config.data.classes)),
            'loss': float(loss) / max(int(count), 1),
            'seconds': time.perf_counter() - start,
        }
        kept = min(config.eval.panels, source.length)
        spread = np.linspace(0, source.length - 1, kept).round().astype(int).tolist()
        return Result(scores, confusion, each, self.panels(variables, spread))

    def panels(self, variables: Any, numbers: Iterable[int]) -> dict[int, Panel]:
        """Some images and their predictions, by their number; only process 0 has them."""
        if jax.process_index():
            return {}
        found = self._scored(variables, sorted(set(numbers)))
        panels = {job.number: Panel(job.image, job.label, job.prediction) for job in found}
        return dict(sorted(panels.items()))

    def _scored(self, variables: Any, numbers: Sequence[int]) -> Iterator[Scored]:
        """Each image of `numbers`, in an order that depends on their sizes."""
        config, (programs,) = self.run.config, self.stream.programs.values()
        jobs = read_ahead(self._read, numbers, config.data.threads)
        # An image at all scales takes much more memory than the image: few are read ahead.
        examples = read_ahead(partial(self.stream.blocks, protocol=config.eval.protocol), jobs, 2)
        return self.stream.run(on_local_devices(variables, programs.mesh), examples)

    def _read(self, number: int) -> Scored:
        image, label = self.source.read(number)
        if label is None:  # a test set without labels: only the prediction is used
            label = np.full(image.shape[:2], IGNORE, np.uint8)
        return Scored(image, label, number)


def sum_over_processes(tree: Any) -> Any:
    """Adds host values over all processes; sends them as bytes, so that they keep 64 bits."""
    if jax.process_count() == 1:
        return tree

    def add(value: Any) -> Any:
        value = np.asarray(value)
        gathered = multihost_utils.process_allgather(value.reshape(-1).view(np.uint8))
        return gathered.view(value.dtype).reshape(-1, *value.shape).sum(0)

    return jax.tree.map(add, tree)


# ---- What is written


def folder_of(workdir: str, step: int, config: ConfigDict) -> str:
    return f'{workdir}/eval/{step}-{config.eval.protocol}'


def write_result(result: Result, workdir: str, config: ConfigDict) -> np.ndarray | None:
    """Process 0 writes metrics.json, confusion.npy and panels.png.

    Returns the pixels of panels.png, uint8 [H, W, 3]; None without panels and in other processes.
    """
    if jax.process_index():
        return None
    scores = result.scores
    folder = folder_of(workdir, scores['step'], config)
    tf.io.gfile.makedirs(folder)
    for path in (f'{folder}/metrics.json', f'{workdir}/eval/metrics.json'):
        with tf.io.gfile.GFile(path, 'w') as file:
            file.write(json.dumps(scores, indent=2) + '\n')
    with tf.io.gfile.GFile(f'{folder}/confusion.npy', 'wb') as file:
        np.save(file, result.confusion)
    if not result.panels:
        return None
    picture = pictures.draw_panels(list(result.panels.values()), label_space(config.data.classes))
    pictures.write_png(f'{folder}/panels.png', picture)
    return picture


def write_html(
    result: Result,
    panels: dict[str, dict[int, Panel]],
    source: Source,
    checkpoint_path: str,
    folder: str,
    config: ConfigDict,
) -> None:
    """Writes FOLDER/report.html; panels: {'best': {number: image}, ...}."""
    scores, model = result.scores, config.model
    flip = 'with mirror images' if scores['flip'] else 'without mirror images'
    sizes = f'base size {scores["base_size"] or "of each image"}'
    devices = f'{jax.device_count()} {jax.devices()[0].device_kind}'
    scales = ', '.join(f'{scale:g}' for scale in scores['scales'])
    facts = {
        'checkpoint': checkpoint_path,
        'network': f'{model.backbone}-{model.depth} with {model.context}, {config.dtype}',
        'protocol': f'{scores["protocol"]}, scales {scales}, {flip}, {sizes}',
        'data': f'{scores["images"]} images of {scores["split"]!r}, {config.data[scores["split"]]}',
        'time': f'{time.strftime("%Y-%m-%d %H:%M")}, {console.duration(scores["seconds"])}',
        'devices': f'{devices}, {jax.process_count()} process(es)',
        'versions': f'jax {jax.__version__}, numpy {np.__version__}',
    }
    shown = [
        html.Shown(title, source.names(number)[0], result.each[number], panel)
        for title, found in panels.items()
        for number, panel in found.items()
    ]
    text = html.render(scores, result.confusion, shown, label_space(config.data.classes), facts)
    with tf.io.gfile.GFile(f'{folder}/report.html', 'w') as file:
        file.write(text)


def ranked(each: np.ndarray, most: int = 3) -> dict[str, list[int]]:
    """The numbers of the best, median and worst images by their own mIoU; no number twice."""
    order = [int(i) for i in np.argsort(-each, kind='stable') if not np.isnan(each[i])]
    most = min(most, len(order) // 3)
    if not most:
        return {'each': order}
    middle = (len(order) - most) // 2
    return {
        'best': order[:most],
        'median': order[middle : middle + most],
        'worst': order[::-1][:most],
    }


def prediction_names(source: Source) -> list[str]:
    """The images' paths without suffix, relative to the folder that contains all of them.

    Raises UserError if two are equal.
    """
    images = [source.names(number)[0] for number in range(source.length)]
    paths = [os.path.abspath(image.partition('://')[2] or image) for image in images]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    names = [os.path.splitext(os.path.relpath(path, common))[0] for path in paths]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f'two images are called {twice}: rename one, for their predictions')
    return names


def write_prediction(
    number: int, prediction: np.ndarray, *, names: Sequence[str], folder: str, config: ConfigDict
) -> None:
    """Writes FOLDER/predictions/SPLIT/NAME.png of an image as the data set's server takes it.

    prediction: class ids uint8 [H, W]. They are stored as the label space's server ids, or with
    a palette if it has none.
    """
    space = label_space(config.data.classes)
    path = f'{folder}/predictions/{config.eval.split}/{names[number]}.png'
    tf.io.gfile.makedirs(os.path.dirname(path))
    encoded = pictures.labels_png(
        server_ids(prediction, space), None if space.server_ids else space
    )
    with tf.io.gfile.GFile(path, 'wb') as file:
        file.write(encoded)


# ---- The mode of the command line


def can_be_scored(source: Source, threads: int) -> bool:
    """Whether labels of `source` hold a class. Process 0 looks and tells the others."""
    found = int(jax.process_index() == 0 and holds_classes(source, threads))
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(found)))


def evaluate_checkpoint(
    config: ConfigDict | None, workdir: str, which: str, overrides: list[str]
) -> None:
    """Scores a checkpoint and writes WORKDIR/eval; the configuration defaults to its own.

    If no label of the split holds a class, it writes the predictions alone.
    """
    path, step, config = checkpoint.find_with_config(config, workdir, which, overrides)
    preemption.still_alive(config.hang_seconds)
    console.say('\n'.join(preemption.process_lines()))
    folder, where = folder_of(workdir, step, config), path / str(step)
    check_folder(folder)
    source = make_source(config.data, config.eval.split)
    check_source(source)
    run = setup(config)
    variables = checkpoint.restore_variables(run, path, step)
    labelled = can_be_scored(source, config.data.threads)
    write = None
    if config.eval.save_predictions or not labelled:
        names = prediction_names(source)
        write = partial(write_prediction, names=names, folder=folder, config=config)
    console.say(
        f'evaluating {where} on {source.length} images of {config.eval.split!r} by protocol '
        f'{config.eval.protocol}'
    )
    evaluator = Evaluator(run, source)
    result = evaluator.evaluate(variables, step, write)
    if not labelled:
        console.say(f'{source.length} predictions written to {folder}/predictions')
        return
    write_result(result, workdir, config)
    chosen = ranked(result.each)
    found = evaluator.panels(variables, [n for numbers in chosen.values() for n in numbers])
    if jax.process_index() == 0:
        panels = {title: {n: found[n] for n in numbers} for title, numbers in chosen.items()}
        write_html(result, panels, source, str(where), folder, config)
    console.say(console.class_table(result.scores))
    console.say(f'{console.headline(result.scores)}\nwritten to {folder}')


def check_folder(folder: str) -> None:
    """Makes the folder of results; raises UserError if nothing can be written there."""
    try:
        tf.io.gfile.makedirs(folder)
        probe = f'{folder}/.probe{jax.process_index()}'  # other processes try at the same time
        with tf.io.gfile.GFile(probe, 'w') as file:
            file.write('')
        tf.io.gfile.remove(probe)
    except tf.errors.OpError as error:
        raise UserError(f'{folder}: cannot be written ({error.message}); set --workdir') from error
