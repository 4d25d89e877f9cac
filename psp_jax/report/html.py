"""The report of an evaluation: one HTML file with its images, style and script inside.

The page is the template page.html with page.css and page.js; this module prepares its variables.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from PIL import Image

from psp_jax.data.labels import UNLABELLED, LabelSpace
from psp_jax.report import pictures
from psp_jax.report.pictures import Panel

_SIDE = 640  # pixels; longer sides of the images are reduced to this
_NAMED = 25  # classes; a larger confusion matrix is an image without names
_CONFUSIONS = 10  # number of confusions that are listed

# Key of the scores, heading, format, what it means.
_NUMBERS = (
    ('mIoU', 'mIoU', '.2%', 'mean over the classes that occur'),
    ('mIoU_all', 'mIoU, all classes', '.2%', 'absent classes count as 0'),
    ('mAcc', 'mean accuracy', '.2%', 'mean over the classes that occur'),
    ('allAcc', 'pixel accuracy', '.2%', 'of all labelled pixels'),
    ('challenge_score', 'challenge score', '.2%', 'mean of mIoU and pixel accuracy'),
    ('category_mIoU', 'category mIoU', '.2%', 'mean over groups of classes'),
    ('loss', 'loss', '.4f', 'mean cross-entropy of a pixel'),
)
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)


class Shown(NamedTuple):
    """An image of the report."""

    title: str  # 'best', 'median' or 'worst'
    name: str  # of the example, such as its path
    miou: float  # of this image alone, 0 to 1
    panel: Panel


def render(
    scores: dict[str, Any],
    confusion: np.ndarray,
    shown: Sequence[Shown],
    space: LabelSpace,
    facts: dict[str, str],
) -> str:
    """Returns the text of the HTML page.

    scores: the content of metrics.json; `loss`, `challenge_score` and `category_mIoU` may be
        missing.
    confusion: int [classes, classes] of (label, prediction) counts.
    shown: the images, in the order of the page; may be empty.
    facts: what was evaluated and how, as name -> text.
    """
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    pixels = [c['pixels'] for c in scores['classes']]
    total = max(sum(pixels), 1)
    classes = [
        c | {'color': _css(space.colors[c['id']]), 'pixels': c['pixels'] / total}
        for c in scores['classes']
    ]
    numbers = [
        (heading, format(scores[key], spec), meaning)
        for key, heading, spec, meaning in _NUMBERS
        if key in scores
    ]
    many = len(space.names) > _NAMED
    matrix = pictures.draw_confusion(shares)
    text = _TEMPLATES.get_template('page.html').render(
        scores=scores,
        facts=facts,
        numbers=numbers,
        classes=classes,
        most_pixels=max(pixels) / total or 1,
        many_classes=many,
        names=space.names,
        shares=shares.tolist(),
        confusion_image=_embed(matrix, f'Confusion matrix of {len(space.names)} classes'),
        confusions=_largest_confusions(shares, space.names),
        articles=[_article(s, space) for s in shown],
        colors={'right': pictures.RIGHT, 'wrong': pictures.WRONG, 'ignored': UNLABELLED},
    )
    return text.encode('utf-8', 'replace').decode()  # file names may not be valid Unicode


def _css(color: np.ndarray) -> str:
    return f'#{bytes(color).hex()}'


def _largest_confusions(shares: np.ndarray, names: tuple[str, ...]) -> list[tuple[str, str, float]]:
    """(label, wrong prediction, share of the label's pixels), the largest shares first."""
    wrong = shares * (1 - np.eye(len(shares)))
    largest = np.argsort(-wrong, axis=None, kind='stable')[:_CONFUSIONS]
    pairs = zip(*np.unravel_index(largest, wrong.shape), strict=True)
    return [(names[i], names[j], wrong[i, j]) for i, j in pairs if wrong[i, j] > 0]


def _article(shown: Shown, space: LabelSpace) -> dict[str, Any]:
    """The variables of one image: image, label, prediction, errors and the legend."""
    panel = Panel(*(pictures.shrink(array, _SIDE) for array in shown.panel))
    images = {
        'image': Image.fromarray(panel.image),
        'label': pictures.labels_image(panel.label, space),
        'prediction': pictures.labels_image(panel.prediction, space),
        'errors': Image.fromarray(pictures.draw_errors(panel)),
    }
    ids = pictures.classes_in(shown.panel[1:])
    return {
        'title': shown.title,
        'name': shown.name,
        'miou': shown.miou,
        'aspect': panel.image.shape[1] / panel.image.shape[0],
        'images': {kind: _embed(image, f'{shown.name}, {kind}') for kind, image in images.items()},
        'legend': [(space.names[i], _css(space.colors[i])) for i in ids],
    }


def _embed(image: Image.Image, alt: str) -> dict[str, Any]:
    """The variables of an image in the page. Photographs become JPEGs, unless they are small."""
    enlarged = image.width < _SIDE // 2
    return {
        'src': pictures.data_url(image, lossless=enlarged or image.mode != 'RGB'),
        'width': image.width,
        'height': image.height,
        'alt': alt,
        'enlarged': enlarged,
    }
