"""Times reading from each source, and whole training batches, against decoding alone.

    python -m benchmarks.input_pipeline [--root data/camvid --list train.txt] [--repeats 5]

The same pictures lie in a list, in folders and in a TFDS data set, on this machine's disk (and in
its memory, after the first turn). Without --root they are made up: JPEGs of 480 x 360 with label
maps. The built-in scenes, of 65 x 129, are drawn instead of decoded. All take turns, with as many
threads. Prints JSON: the median examples a second of decoding bytes that are in memory, of each
source, and of training batches (read, augmented, stacked) of each; and what these are relative to
decoding.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from psp_jax.command_line import quieten_libraries
from psp_jax.config_check import load_config
from psp_jax.data.decode import decode_image, decode_label
from psp_jax.data.pipeline import read_ahead, train_batches
from psp_jax.data.sources import Source, files_source, make_source
from psp_jax.datasets import common

CONFIG = Path(__file__).parents[1] / 'configs' / 'camvid.py'


class Photographs(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """The pictures of a list as a TFDS data set; `source` is set before it is built."""

    VERSION = tfds.core.Version('1.0.0')
    source: Source

    __init__ = common.init

    def _info(self) -> tfds.core.DatasetInfo:
        return common.dataset_info(self, 'camvid', '', '')

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {'train': self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for i in range(self.source.length):
            stored = self.source.encoded(i)
            pair = common.Pair(f'{i}.jpg', stored.label_name)
            yield common.example(pair, stored.image, self.source.read(i)[1])


def make_pictures(root: Path, count: int) -> None:
    """JPEGs with the detail of a photograph, roughly, and label maps of eleven classes."""
    rng = np.random.default_rng(0)
    (root / 'made').mkdir()
    for i in range(count):
        image = np.zeros((360, 480, 3))
        for cell in (90, 30, 6, 1):
            coarse = rng.normal(0, 20 + cell / 2, (360 // cell, 480 // cell, 3))
            image += cv2.resize(coarse, (480, 360), interpolation=cv2.INTER_LINEAR)
        cv2.imwrite(f'{root}/made/{i}.jpg', np.clip(image + 128, 0, 255), [1, 92])
        label = rng.integers(0, 12, (12, 16), np.uint8)
        label = cv2.resize(label, (480, 360), interpolation=cv2.INTER_NEAREST)
        cv2.imwrite(f'{root}/made/{i}.png', label)
    lines = [f'made/{i}.jpg made/{i}.png\n' for i in range(count)]
    (root / 'train.txt').write_text(''.join(lines))


def make_sources(config: ConfigDict, folder: Path, count: int) -> dict[str, Source]:
    """The first `count` examples of a list, and the same ones as folders and as a TFDS data set.

    And as many scenes.
    """
    listed = make_source(config.data, 'train')
    listed = files_source(listed.files[:count], config.data)
    for kind in ('images', 'labels'):
        (folder / kind).mkdir()
    for i, pair in enumerate(listed.files):
        for kind, path in zip(('images', 'labels'), pair, strict=True):
            suffix = os.path.splitext(path)[1]
            (folder / kind / f'{i:05}{suffix}').symlink_to(os.path.abspath(path))
    Photographs.source = listed
    Photographs(data_dir=folder).download_and_prepare()
    changed = config.data.copy_and_resolve_references()
    changed.update(source='dirs', root=str(folder), train='images,labels')
    sources = {'list': listed, 'dirs': make_source(changed, 'train')}
    changed.update(source='tfds:photographs', train='train', label_map='')
    sources['tfds'] = make_source(changed, 'train')
    changed.update(source='scenes', train=f'0:{listed.length}', classes='scenes')
    return sources | {'scenes': make_source(changed, 'train')}


def measure(config: ConfigDict, sources: dict[str, Source], repeats: int) -> dict[str, Any]:
    """Median examples a second of all ways, which take turns, and their ratios to decoding."""
    threads = config.data.threads or os.cpu_count() or 1
    listed = sources['list']
    memory = [listed.encoded(i) for i in range(listed.length)] if listed.encoded else []

    def decode(i: int) -> None:
        decode_image(memory[i].image, '')
        decode_label(memory[i].label, '')

    def reading(read: Callable[[int], Any]) -> Callable[[], int]:
        def run() -> int:
            return sum(1 for _ in read_ahead(read, range(listed.length), threads))

        return run

    def training(source: Source) -> Callable[[], int]:
        steps = max(1, listed.length // config.batch_size)

        def run() -> int:  # a new stream, which has nothing ready
            stream = train_batches(source, config, start_step=0, process_index=0, process_count=1)
            with contextlib.closing(stream):
                return sum(len(next(stream)['image']) for _ in range(steps))

        return run

    ways = {'decode': reading(decode)}
    ways |= {f'read {name}': reading(source.read) for name, source in sources.items()}
    ways |= {f'batches from {name}': training(source) for name, source in sources.items()}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            count = run()
            if turn:  # the first one warms files and threads up
                rates[name].append(count / (time.perf_counter() - start))
    medians = {name: round(statistics.median(found), 1) for name, found in rates.items()}
    ratios = {name: round(rate / medians['decode'], 3) for name, rate in medians.items()}
    return {'examples_per_second': medians, 'relative_to_decode': ratios, 'threads': threads}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks.input_pipeline',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--root', default='', help="CamVid's folder; made-up pictures without it")
    parser.add_argument('--list', default='train.txt', help='of lines `image label`')
    parser.add_argument('--examples', type=int, default=128)
    parser.add_argument('--crop', type=int, default=473, help='pixels, 8n + 1')
    parser.add_argument('--repeats', type=int, default=5)
    flags = parser.parse_args()
    quieten_libraries()
    tfds.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not flags.root:
            make_pictures(folder, flags.examples)
        values = {'root': flags.root or name, 'train': flags.list, 'crop': flags.crop}
        words = [f'--config.data.{key}={value}' for key, value in values.items()]
        config = load_config(str(CONFIG), words)
        found = measure(config, make_sources(config, folder, flags.examples), flags.repeats)
    note = 'scenes are drawn, in 65 x 129 pixels; nothing of them is decoded'
    print(
        json.dumps({'benchmark': 'input_pipeline', **vars(flags), 'note': note} | found, indent=2)
    )


if __name__ == '__main__':
    main()
