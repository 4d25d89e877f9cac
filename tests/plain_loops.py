"""Evaluation one image and one window at a time, in numpy and OpenCV: the judge of ours."""

import functools
import math

import cv2
import jax
import numpy as np

from psp_jax.config_check import resolve
from psp_jax.model.pspnet import normalise
from psp_jax.state import jit_for_one_call, new_state, setup

CLASSES = 5
SMALL = {
    'data.classes': str(CLASSES),
    'data.crop': 33,
    'data.threads': 2,
    'model.depth': 10,
    'model.stem': 'deep_small',
    'model.head_width': 16,
    'model.aux_width': 8,
    'eval.base_size': 60,
    'eval.batch_size': 3,
}


def config_of(protocol, **keys):
    return resolve(SMALL | {'eval.protocol': protocol} | keys)


def picture(size, seed=0):
    rng = np.random.default_rng([*size, seed])
    coarse = rng.integers(0, 256, (size[0] // 6 + 2, size[1] // 6 + 2, 3)).astype(np.uint8)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)


@functools.cache
def variables_of(dtype):
    """Made-up weights of the small network by which several classes are predicted."""
    run = setup(config_of('whole', dtype=dtype))
    state = jit_for_one_call(lambda: new_state(run))()
    images = np.stack([picture((33, 33), seed) for seed in range(8)])

    @jit_for_one_call
    def batch_stats(variables, images):
        key = {'dropout': jax.random.key(0)}
        x = normalise(images, run.config)
        return run.model.apply(variables, x, True, mutable=['batch_stats'], rngs=key)[1]

    updated = batch_stats(state.variables, images)['batch_stats']
    # One update goes a tenth of the way to the images' own statistics.
    stats = jax.tree.map(lambda new, old: old + 10 * (new - old), updated, state.batch_stats)
    head = state.params['head']
    classifier = jax.tree.map(lambda x: 8 * x, head['classifier'])
    params = state.params | {'head': head | {'classifier': classifier}}
    return {'params': params, 'batch_stats': stats}


def setup_and_variables(protocol, **keys):
    run = setup(config_of(protocol, **keys))
    return run, variables_of(run.config.dtype)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def aligned(x, size):
    """Bilinear with aligned corners, float64."""
    for axis in (0, 1):
        old = x.shape[axis]
        at = np.linspace(0, old - 1, size[axis]) if size[axis] > 1 else np.zeros(1)
        x = np.apply_along_axis(lambda line, a=at, n=old: np.interp(a, np.arange(n), line), axis, x)
    return x


def by_opencv(x, size):
    channels = [
        cv2.resize(np.ascontiguousarray(x[..., c]), size[::-1], interpolation=cv2.INTER_LINEAR)
        for c in range(x.shape[-1])
    ]
    return np.stack(channels, -1)


def imresize(x, size):
    """MATLAB's, bilinear, from its documentation: pixel by pixel of an axis."""
    for axis in (0, 1):
        old, new = x.shape[axis], size[axis]
        scale = new / old
        stretch = min(scale, 1)
        width = 2 / stretch
        lines = np.moveaxis(x, axis, 0)
        out = []
        for i in range(1, new + 1):
            u = i / scale + 0.5 * (1 - 1 / scale)
            left = math.floor(u - width / 2)
            total, weight = 0, 0
            for j in range(left, left + math.ceil(width) + 2):
                w = stretch * max(0, 1 - abs(stretch * (u - j)))
                mirrored = [*range(old), *range(old - 1, -1, -1)][(j - 1) % (2 * old)]
                total, weight = total + w * lines[mirrored], weight + w
            out.append(total / weight)
        x = np.moveaxis(np.stack(out), 0, axis)
    return x


def half_up(x):
    return math.floor(x + 0.5)


class Loop:
    """Probabilities by the protocol of the configuration; `logits` runs the network on a window."""

    def __init__(self, run, variables):
        self.config = run.config
        self.mean, self.std = np.array(run.config.data.mean), np.array(run.config.data.std)
        self.crop = run.config.data.crop
        self.resize = aligned if run.config.model.align_corners else by_opencv
        self.forward = jit_for_one_call(lambda x: run.model.apply(variables, x, False)[0])

    def probabilities(self, image):
        """uint8 [H, W, 3] -> float64 [H, W, classes], the mean over scales."""
        view = getattr(self, self.config.eval.protocol)
        return np.mean([view(image, scale) for scale in self.config.eval.scales], 0)

    def logits(self, window):
        """Float RGB [h, w, 3] -> [h, w, classes]."""
        x = ((window - self.mean) / self.std)[None].astype(self.config.dtype)
        return self.resize(np.asarray(self.forward(x)[0], np.float64), window.shape[:2])

    def grid(self, padded, score):
        """The mean of the windows' scores."""
        h, w = padded.shape[:2]
        stride = math.ceil(self.crop * 2 / 3)
        total, count = np.zeros((h, w, CLASSES)), np.zeros((h, w, 1))
        for i in range(math.ceil(max(h - self.crop, 0) / stride) + 1):
            for j in range(math.ceil(max(w - self.crop, 0) / stride) + 1):
                y2, x2 = min(i * stride + self.crop, h), min(j * stride + self.crop, w)
                y, x = max(y2 - self.crop, 0), max(x2 - self.crop, 0)
                total[y:y2, x:x2] += score(padded[y:y2, x:x2])
                count[y:y2, x:x2] += 1
        return total / count

    def semseg(self, image, scale):
        h, w = image.shape[:2]
        long = max(round(scale * (self.config.eval.base_size or max(h, w))), 1)
        nh, nw = (long, round(long / h * w)) if h > w else (round(long / w * h), long)
        nh, nw = max(nh, 1), max(nw, 1)  # the reference fails on such images
        seen = cv2.resize(image.astype(np.float32), (nw, nh), interpolation=cv2.INTER_LINEAR)
        top, left = max(self.crop - nh, 0) // 2, max(self.crop - nw, 0) // 2
        bottom, right = max(self.crop - nh, 0) - top, max(self.crop - nw, 0) - left
        border = (seen, top, bottom, left, right, cv2.BORDER_CONSTANT)
        padded = cv2.copyMakeBorder(*border, value=self.mean.tolist())

        def score(window):
            mirrored = self.logits(window[:, ::-1])[:, ::-1]
            return (softmax(self.logits(window)) + softmax(mirrored)) / 2

        return by_opencv(self.grid(padded, score)[top : top + nh, left : left + nw], (h, w))

    def caffe(self, image, scale):
        h, w = image.shape[:2]
        long = round(self.config.eval.base_size * scale) + 1
        nh, nw = (long, half_up(long / h * w)) if h > w else (half_up(long / w * h), long)
        seen = np.floor(imresize(image.astype(float), (nh, nw)) + 0.5 + 1e-9)
        padded = np.tile(self.mean, (max(nh, self.crop), max(nw, self.crop), 1))
        padded[:nh, :nw] = seen

        def score(window):
            return softmax(self.logits(window) + self.logits(window[:, ::-1])[:, ::-1])

        found = imresize(self.grid(padded, score)[:nh, :nw], (h, w))
        return found / found.sum(-1, keepdims=True)

    def resized(self, image, size, score):
        """Of logits at the image's own pixels, with the mirror image's if eval.flip=true."""
        seen = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
        found = [
            softmax(self.resize(score(seen[:, ::step].astype(float)), image.shape[:2])[:, ::step])
            for step in ((1, -1) if self.config.eval.flip == 'true' else (1,))
        ]
        return np.mean(found, 0)

    def mmseg(self, image, scale):
        return self.resized(image, self.short_side(image, scale), self.logits)

    def mmseg_slide(self, image, scale):
        size = self.short_side(image, scale)
        return self.resized(image, size, lambda seen: self.grid(seen, self.logits))

    def short_side(self, image, scale):
        base, sides = self.config.eval.base_size, image.shape[:2]
        factor = min(2048 * scale / max(sides), base * scale / min(sides))
        return tuple(int(side * factor + 0.5) for side in sides)

    def whole(self, image, scale):
        factor = scale * self.config.eval.base_size / max(image.shape)
        size = tuple(8 * round((side * factor - 1) / 8) + 1 for side in image.shape[:2])
        return self.resized(image, size, self.logits)
