"""Times sliding, multi-scale evaluation with mirror images against the plain loop over windows.

    python -m benchmarks.evaluate [--images 4] [--classes 150] [--depth 50] [--crop 473]

Both run the same network on the same images in one process and take turns, image by image. The
plain loop is the authors' test written with the same compiled network: a window and its mirror
image at a time. It adds probabilities in float64 on the host and resizes them by OpenCV.

Prints JSON: images a second of each, their ratio, the share of pixels with another class, and the
share of our time that the network alone takes, which bounds the ratio. `--memory` instead prints
the peak memory of predicting images of several sizes, each in a process of its own.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from psp_jax.config_check import resolve
from psp_jax.inference.views import views
from psp_jax.model.resample import resize
from psp_jax.predict import Predictor
from psp_jax.state import jit_for_one_call, new_state, setup

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
SIZES = ((512, 683), (683, 512), (480, 640), (600, 600), (768, 1024))  # ADE20K's are alike
MEMORY_SIZES = ((256, 256), (1000, 1500), (2000, 3000), (4000, 6000))


def config_of(flags: argparse.Namespace) -> ConfigDict:
    small = flags.depth < 50
    return resolve(
        {
            'data.classes': str(flags.classes),
            'data.crop': flags.crop,
            'model.depth': flags.depth,
            'model.stem': 'deep_small' if small else 'deep',
            'model.head_width': 128 if small else 512,
            'eval.protocol': 'semseg',
            'eval.base_size': flags.base_size,
            'eval.scales': SCALES,
            'eval.batch_size': 4,
        }
    )


def picture(size: tuple[int, int], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return cv2.resize(rng.integers(0, 256, (9, 9, 3)).astype(np.uint8), size[::-1])


def plain_loop(image: np.ndarray, forward: Any, config: ConfigDict) -> np.ndarray:
    """Class ids by the authors' procedure; forward: [2, crop, crop, 3] -> logits of that size."""
    mean, std = np.array(config.data.mean), np.array(config.data.std)
    crop, stride = config.data.crop, math.ceil(config.data.crop * 2 / 3)
    h, w = image.shape[:2]
    classes = int(config.data.classes)
    total = np.zeros((h, w, classes))
    for scale in SCALES:
        long = round(scale * config.eval.base_size)
        nh, nw = (long, round(long / h * w)) if h > w else (round(long / w * h), long)
        seen = cv2.resize(image.astype(np.float32), (nw, nh), interpolation=cv2.INTER_LINEAR)
        top, left = max(crop - nh, 0) // 2, max(crop - nw, 0) // 2
        bottom, right = max(crop - nh, 0) - top, max(crop - nw, 0) - left
        border = (seen, top, bottom, left, right, cv2.BORDER_CONSTANT)
        seen = cv2.copyMakeBorder(*border, value=mean.tolist())
        ph, pw = seen.shape[:2]
        scores, count = np.zeros((ph, pw, classes)), np.zeros((ph, pw, 1))
        for i in range(math.ceil((ph - crop) / stride) + 1):
            for j in range(math.ceil((pw - crop) / stride) + 1):
                y, x = min(i * stride, ph - crop), min(j * stride, pw - crop)
                window = ((seen[y : y + crop, x : x + crop] - mean) / std).astype(np.float32)
                both = np.asarray(forward(np.stack([window, window[:, ::-1]])))
                both = np.exp(both - both.max(-1, keepdims=True))
                both /= both.sum(-1, keepdims=True)
                scores[y : y + crop, x : x + crop] += (both[0] + both[1, :, ::-1]) / 2
                count[y : y + crop, x : x + crop] += 1
        scores = (scores / count)[top : top + nh, left : left + nw]
        for c in range(0, classes, 4):  # OpenCV resizes 4 channels fast, and no more than 128
            part = np.ascontiguousarray(scores[..., c : c + 4])
            part = cv2.resize(part, (w, h), interpolation=cv2.INTER_LINEAR)
            total[..., c : c + 4] += part.reshape(h, w, -1)
    return total.argmax(-1)


def compare(flags: argparse.Namespace) -> dict[str, Any]:
    run = setup(config_of(flags))
    config, model = run.config, run.model
    variables = jit_for_one_call(lambda: new_state(run))().variables
    predictor = Predictor(run, variables)

    @jax.jit
    def forward(x: jax.Array) -> jax.Array:
        logits = model.apply(variables, x, False)[0]
        return resize(logits, x.shape[1:3], config.model.align_corners)

    @jax.jit
    def network(x: jax.Array) -> jax.Array:
        return jnp.sum(model.apply(variables, x, False)[0])

    batch = 2 * config.eval.batch_size
    x = np.zeros((batch, flags.crop, flags.crop, 3), np.float32)
    plain_loop(picture(SIZES[0], 0), forward, config)  # compiles
    predictor(picture(SIZES[0], 0))
    network(x).block_until_ready()
    seconds = {'ours': 0.0, 'plain': 0.0, 'network': 0.0}
    differing = pixels = 0
    for i in range(flags.images):
        image = picture(SIZES[i % len(SIZES)], i)
        start = time.perf_counter()
        ours = predictor(image)
        seconds['ours'] += time.perf_counter() - start
        start = time.perf_counter()
        plain = plain_loop(image, forward, config)
        seconds['plain'] += time.perf_counter() - start
        windows = sum(len(view.sources) for view in views(image.shape[:2], config))
        start = time.perf_counter()
        network(x).block_until_ready()
        seconds['network'] += (time.perf_counter() - start) * 2 * windows / batch
        differing, pixels = differing + int((ours != plain).sum()), pixels + ours.size
    return {
        'images_per_second': {k: flags.images / seconds[k] for k in ('ours', 'plain')},
        'ratio': seconds['plain'] / seconds['ours'],
        'network_share_of_ours': seconds['network'] / seconds['ours'],
        'pixels_with_another_class': differing / pixels,
        'settings': vars(flags),
        'device': jax.devices()[0].device_kind,
    }


def peak_memory(flags: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for size in MEMORY_SIZES:
        words = [f'--{k.replace("_", "-")}={v}' for k, v in vars(flags).items() if k != 'memory']
        words += [f'--memory={size[0]}x{size[1]}']
        command = [sys.executable, '-m', 'benchmarks.evaluate', *words]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(run.stdout))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--images', type=int, default=4)
    parser.add_argument('--classes', type=int, default=150)
    parser.add_argument('--depth', type=int, default=50)
    parser.add_argument('--crop', type=int, default=473)
    parser.add_argument('--base-size', type=int, default=512)
    parser.add_argument('--memory', nargs='?', const='all', default='', metavar='HxW')
    flags = parser.parse_args()
    if flags.memory == 'all':
        report: Any = peak_memory(flags)
    elif flags.memory:
        height, width = map(int, flags.memory.split('x'))
        run = setup(config_of(flags))
        variables = jit_for_one_call(lambda: new_state(run))().variables
        Predictor(run, variables)(picture((height, width), 0))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        report = {'height': height, 'width': width, 'peak_GiB': round(peak, 2)}
    else:
        report = compare(flags)
    print(json.dumps(report, indent=2))


if __name__ == '__main__':
    main()
