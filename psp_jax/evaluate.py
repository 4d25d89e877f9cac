"""Scoring a network on a whole split: every image once, every valid pixel once."""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
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
from psp_jax.inference import protocols
from psp_jax.inference.programs import TILE, Example, make_batches, make_programs, overlap, tiles
from psp_jax.mesh import local_mesh, put_batch, replicated
from psp_jax.model import pspnet
from psp_jax.model.geometry import Size
from psp_jax.predict import Predictor, labels_png
from psp_jax.report import console, html, pictures
from psp_jax.runtime import checkpoint, cluster, preemption
from psp_jax.state import Setup, setup


class Panel(NamedTuple):
    """One image as a person looks at it: uint8 [H, W, 3], and [H, W] of class ids."""

    image: np.ndarray
    label: np.ndarray
    prediction: np.ndarray


@dataclass
class Scored:
    """An image that is being scored: sums over its blocks and tiles."""

    number: int
    panel: Panel  # its prediction is zeros where none was asked for
    blocks: int  # still to come
    confusion: Any = 0  # int [classes, classes]
    loss: float = 0.0
    count: int = 0


class Result(NamedTuple):
    scores: dict[str, Any]  # the content of metrics.json
    confusion: np.ndarray  # int64 [classes, classes] of (label, prediction)
    each: np.ndarray  # float64 [images], the mIoU of each alone; NaN where no pixel is labelled
    panels: dict[int, Panel]  # some images by their number; of the first process only


class Evaluator:
    """The compiled evaluation of a split; see `make_evaluator`."""

    def __init__(self, run: Setup, source: Source):
        self.evaluate, self.panels = make_evaluator(run.config, run.model, source)


def score(probabilities: jax.Array, labels: jax.Array) -> tuple[jax.Array, ...]:
    """Probabilities [h, w, C] against labels uint8 [h, w]: confusion int32 [C, C], summed
    cross-entropy, number of valid pixels, predictions uint8 [h, w].
    """
    predictions = jnp.argmax(probabilities, -1).astype(jnp.uint8)
    confusion = metrics.confusion_matrix(predictions, labels, probabilities.shape[-1])
    tiny = jnp.finfo(probabilities.dtype).tiny
    logits = jnp.log(jnp.maximum(probabilities, tiny))
    return confusion, *losses.cross_entropy(logits, labels), predictions


def make_evaluator(config: ConfigDict, model: pspnet.PSPNet, source: Source) -> Any:
    """The scoring of every image of `source` once, and the panels of some.

    `evaluate(variables, step, write=None)` gives the Result; `write(number, prediction)` gets
    every prediction, where it is given. `panels(variables, numbers)` looks at some images again.
    Every process scores every `process_count`-th image on its own devices, at its own pace; only
    the counts are summed over processes in the end.
    """
    mesh = local_mesh(config.mesh.data, config.mesh.space)
    names = label_space(config.data.classes).names
    share = range(jax.process_index(), source.length, jax.process_count())
    programs = make_programs(config, model, mesh)
    score_tile = programs.on_tile(score)

    def read(number: int) -> tuple[int, np.ndarray, np.ndarray]:
        return number, *source.read(number)

    def prepare(decoded: tuple[int, np.ndarray, np.ndarray]) -> list[Example]:
        number, image, label = decoded
        blocks = protocols.blocks(image, config, len(names))
        return [Example(number, image, label, block, len(blocks)) for block in blocks]

    def dispatch(variables: Any, batch: list[Example]) -> list[tuple[Size, Any]]:
        blocks = [example.block for example in batch]
        fields = programs.fields(variables, blocks)
        outputs = []
        for tile in tiles(blocks, programs):
            labels = np.full((programs.batch, *TILE), IGNORE, np.uint8)
            for row, example in enumerate(batch):
                inside, outside = overlap(example.block, tile.place)
                labels[row][inside] = example.label[outside]
            outputs.append((tile.place, score_tile(fields, tile, put_batch(labels, mesh))))
        return outputs

    def scored(variables: Any, numbers: Iterable[int], predict: bool) -> Iterator[Scored]:
        """Each image of `numbers`, in an order that depends on their sizes."""
        unfinished: dict[int, Scored] = {}

        def collect(batch: list[Example], outputs: list[tuple[Size, Any]]) -> Iterator[Scored]:
            host = [(place, jax.device_get(o if predict else o[:3])) for place, o in outputs]
            for row, (number, image, label, block, blocks) in enumerate(batch):
                result = unfinished.setdefault(
                    number, Scored(number, Panel(image, label, np.zeros_like(label)), blocks)
                )
                for place, (confusion, loss, count, *prediction) in host:
                    result.confusion += confusion[row]
                    result.loss += float(loss[row])
                    result.count += int(count[row])
                    if predict:
                        inside, outside = overlap(block, place)
                        result.panel.prediction[outside] = prediction[0][row][inside]
                result.blocks -= 1
                if not result.blocks:
                    yield unfinished.pop(number)

        # Pictures at all scales take much more memory than images: few are ahead.
        examples = read_ahead(prepare, read_ahead(read, numbers, config.data.threads), 2)
        unread = None
        for batch in make_batches(examples, programs.batch):
            outputs = dispatch(variables, batch)
            if unread:
                yield from collect(*unread)  # while the devices work on the next batch
            unread = batch, outputs
        if unread:
            yield from collect(*unread)
        programs.release()

    def local(variables: Any) -> Any:
        def placed(x: jax.Array) -> jax.Array:
            there = {shard.device: shard.data for shard in x.addressable_shards}  # no copy of it
            each = [
                there[device] if device in there else jax.device_put(x.addressable_data(0), device)
                for device in mesh.devices.flat
            ]
            return jax.make_array_from_single_device_arrays(x.shape, replicated(mesh), each)

        return jax.tree.map(placed, variables)

    def panels(variables: Any, numbers: Iterable[int]) -> dict[int, Panel]:
        if jax.process_index() or not numbers:
            return {}
        found = scored(local(variables), sorted(set(numbers)), predict=True)
        return dict(sorted((result.number, result.panel) for result in found))

    def evaluate(
        variables: Any, step: int, write: Callable[[int, np.ndarray], None] | None = None
    ) -> Result:
        start = time.perf_counter()
        confusion = np.zeros((len(names), len(names)), np.int64)
        each = np.zeros(source.length)
        loss, count = np.float64(0), np.int64(0)
        hidden = not console.on_terminal()
        with tqdm(
            total=len(share), desc='evaluating', unit='image', disable=hidden, leave=False
        ) as bar:
            for result in scored(local(variables), share, predict=write is not None):
                preemption.still_alive(config.hang_seconds)
                confusion += result.confusion
                loss, count = loss + result.loss, count + result.count
                labelled = result.confusion.any()
                own = metrics.scores(result.confusion, names)['mIoU'] if labelled else np.nan
                each[result.number] = own
                if write:
                    write(result.number, result.panel.prediction)
                bar.update()
        confusion, each, loss, count = sum_over_processes((confusion, each, loss, count))
        scores = {
            'step': step,
            'protocol': config.eval.protocol,
            'scales': list(config.eval.scales),
            'flip': protocols.flips(config),
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
        return Result(scores, confusion, each, panels(variables, spread))

    return evaluate, panels


def sum_over_processes(tree: Any) -> Any:
    """Adds host values over all processes, in their own precision (64 bits travel as bytes)."""
    if jax.process_count() == 1:
        return tree

    def add(value: Any) -> Any:
        value = np.asarray(value)
        gathered = multihost_utils.process_allgather(value.reshape(-1).view(np.uint8))
        return gathered.view(value.dtype).reshape(-1, *value.shape).sum(0)

    return jax.tree.map(add, tree)


def folder_of(workdir: str, step: int, config: ConfigDict) -> str:
    return f'{workdir}/eval/{step}-{config.eval.protocol}'


def write_result(result: Result, workdir: str, config: ConfigDict) -> np.ndarray | None:
    """Writes metrics.json, confusion.npy and panels.png; returns the latter uint8 [H, W, 3]."""
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
    where: str,
    folder: str,
    config: ConfigDict,
) -> None:
    """Writes report.html; `panels`: {'best': {number: Panel}, ...}; where: the checkpoint."""
    scores = result.scores
    flip = 'with mirror images' if scores['flip'] else 'without mirror images'
    sizes = f'base size {scores["base_size"] or "of each image"}'
    devices = f'{jax.device_count()} {jax.devices()[0].device_kind}, {jax.process_count()} process'
    scales = ', '.join(f'{scale:g}' for scale in scores['scales'])
    facts = {
        'checkpoint': where,
        'network': f'PSPNet-{config.model.depth}, bins {config.model.bins}, {config.dtype}',
        'protocol': f'{scores["protocol"]}, scales {scales}, {flip}, {sizes}',
        'data': f'{scores["images"]} images of {scores["split"]!r}, {config.data[scores["split"]]}',
        'time': f'{time.strftime("%Y-%m-%d %H:%M")}, {console.duration(scores["seconds"])}',
        'devices': devices,
        'versions': f'jax {jax.__version__}, numpy {np.__version__}',
    }

    shown = [
        html.Shown(title, source.names(number)[0], result.each[number], *panel)
        for title, found in panels.items()
        for number, panel in found.items()
    ]
    text = html.render(scores, result.confusion, shown, label_space(config.data.classes), facts)
    with tf.io.gfile.GFile(f'{folder}/report.html', 'w') as file:
        file.write(text)


def ranked(each: np.ndarray, most: int = 3) -> dict[str, list[int]]:
    """The best, median and worst images by their own mIoU, each number once."""
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


def prediction_writer(
    source: Source, folder: str, config: ConfigDict
) -> Callable[[int, np.ndarray], None]:
    """Writes FOLDER/predictions/SPLIT/NAME.png of an image as the data set's server takes it.

    ADE20K: 1..150; Cityscapes: label ids; others: class ids with a palette, as PASCAL VOC's. NAME
    is the image's, below the folder that all have in common. Raises UserError for two of a name.
    """
    images = [source.names(number)[0] for number in range(source.length)]
    paths = [os.path.abspath(image.partition('://')[2] or image) for image in images]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    names = [os.path.splitext(os.path.relpath(path, common))[0] for path in paths]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f'two images are called {twice}: their predictions would have one name')
    space = label_space(config.data.classes)

    def write(number: int, prediction: np.ndarray) -> None:
        path = f'{folder}/predictions/{config.eval.split}/{names[number]}.png'
        tf.io.gfile.makedirs(os.path.dirname(path))
        stored = server_ids(prediction, space)
        with tf.io.gfile.GFile(path, 'wb') as file:
            file.write(labels_png(stored, None if space.server_ids else space))

    return write


def can_be_scored(source: Source, threads: int) -> bool:
    """Whether `source` holds classes, which the first process finds out for all."""
    found = jax.process_index() == 0 and holds_classes(source, threads)
    return bool(cluster.exchange('classes' if found else '')[0])


def evaluate_checkpoint(
    config: ConfigDict | None, workdir: str, which: str, overrides: list[str]
) -> None:
    """Scores a checkpoint and writes `WORKDIR/eval`; the configuration defaults to its own.

    Of a split without labels, or whose labels hold no class, it writes the predictions alone.
    """
    path, step = checkpoint.find(workdir, which)
    # While the run goes on, another process may have found another one.
    step = int(multihost_utils.broadcast_one_to_all(np.asarray(step)))
    config = config or checkpoint.config_of(path, step, overrides)
    preemption.still_alive(config.hang_seconds)
    console.say('\n'.join(preemption.table()))
    folder, where = folder_of(workdir, step, config), path / str(step)
    try:
        tf.io.gfile.makedirs(folder)
        probe = f'{folder}/.probe{jax.process_index()}'  # processes may be here at the same time
        with tf.io.gfile.GFile(probe, 'w') as file:
            file.write('')
        tf.io.gfile.remove(probe)
    except tf.errors.OpError as error:
        raise UserError(f'{folder}: cannot be written ({error.message}); set --workdir') from error
    source = make_source(config.data, config.eval.split)
    check_source(source)
    run = setup(config)
    variables = checkpoint.restore_variables(run, path, step)
    labelled = can_be_scored(source, config.data.threads)
    saves = config.eval.save_predictions or not labelled
    write = prediction_writer(source, folder, config) if saves else None
    if write and not labelled:
        predict_split(config, variables, source, write)
        console.say(f'{source.length} predictions written to {folder}/predictions')
        return
    console.say(
        f'evaluating {where} on {source.length} images of {config.eval.split!r} by protocol '
        f'{config.eval.protocol}'
    )
    evaluator = Evaluator(run, source)
    result = evaluator.evaluate(variables, step, write)
    write_result(result, workdir, config)
    chosen = ranked(result.each)
    found = evaluator.panels(variables, [n for numbers in chosen.values() for n in numbers])
    if jax.process_index() == 0:
        panels = {title: {n: found[n] for n in numbers} for title, numbers in chosen.items()}
        write_html(result, panels, source, str(where), folder, config)
    console.say(console.class_table(result.scores))
    console.say(f'{console.headline(result.scores)}\nwritten to {folder}')


def predict_split(
    config: ConfigDict, variables: Any, source: Source, write: Callable[[int, np.ndarray], None]
) -> None:
    """Writes the predictions of every image, this process its share of them."""
    share = range(jax.process_index(), source.length, jax.process_count())

    def read(number: int) -> tuple[int, np.ndarray]:
        return number, source.read(number)[0]

    images = read_ahead(read, share, config.data.threads)
    # As a split with labels is scored, whatever the size of its images.
    found = Predictor(config, variables, piece=float('inf')).stream(images)
    for number, _, prediction in tqdm(
        found, total=len(share), desc='predicting', unit='image', disable=not console.on_terminal()
    ):
        preemption.still_alive(config.hang_seconds)
        write(number, prediction)
