"""Confusion matrices, and the scores computed from them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psp_jax.data.labels import LabelSpace


def confusion_matrix(predictions: jax.Array, labels: jax.Array, classes: int) -> jax.Array:
    """Counts pixels by (label, prediction), ignoring label 255: int32[classes, classes].

    A product of one-hot float32 matrices: exact below 2**24 pixels a call.
    """
    rows = jax.nn.one_hot(labels.reshape(-1), classes, dtype=jnp.float32)  # 255 gives a zero row
    columns = jax.nn.one_hot(predictions.reshape(-1), classes, dtype=jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum('pi,pj->ij', rows, columns, precision=highest).astype(jnp.int32)


def scores(confusion: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    """The scores in `metrics.json`, from int64[classes, classes] of (label, prediction) counts.

    `mIoU` is the mean over the classes whose union is not empty, as in mmsegmentation and
    cityscapesscripts. `mIoU_all` counts the other classes as 0, as semseg does. `mAcc` and
    `mAcc_all` are the same means of the share of a class's pixels that are predicted right.
    `allAcc` is that share of all valid pixels. `pixels` counts a class's labelled pixels. A class
    with an empty union has an `iou` of None; one without labelled pixels has an `acc` of None.
    """
    right = np.diag(confusion).astype(float)
    labelled, predicted = confusion.sum(1), confusion.sum(0)
    union = labelled + predicted - right

    def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)

    def mean(values: np.ndarray) -> float:
        present = values[~np.isnan(values)]
        return float(present.mean()) if present.size else 0.0

    iou, acc = ratio(right, union), ratio(right, labelled)
    return {
        'mIoU': mean(iou),
        'mIoU_all': float(np.nan_to_num(iou).mean()),
        'mAcc': mean(acc),
        'mAcc_all': float(np.nan_to_num(acc).mean()),
        'allAcc': float(right.sum() / max(labelled.sum(), 1)),
        'classes': [
            {
                'id': i,
                'name': name,
                'iou': None if np.isnan(iou[i]) else float(iou[i]),
                'acc': None if np.isnan(acc[i]) else float(acc[i]),
                'pixels': int(labelled[i]),
            }
            for i, name in enumerate(names)
        ],
    }


def extra_scores(confusion: np.ndarray, space: LabelSpace) -> dict[str, Any]:
    """The scores that the data set's own benchmark adds; {} if it adds none.

    `challenge_score` is the mean of `mIoU_all` and `allAcc`: the ADE20K scene parsing challenge
    ranks by it. `categories` has the IoU of each category of classes, and `category_mIoU` their
    mean, as in cityscapesScripts.
    """
    extra: dict[str, Any] = {}
    if space.challenge_score:
        found = scores(confusion, space.names)
        extra['challenge_score'] = (found['mIoU_all'] + found['allAcc']) / 2
    if space.categories:
        names = tuple(dict.fromkeys(space.categories))
        member = np.array([[c == name for c in space.categories] for name in names], np.int64)
        found = scores(member @ confusion @ member.T, names)
        extra['category_mIoU'] = found['mIoU']
        extra['categories'] = {c['name']: c['iou'] for c in found['classes']}
    return extra
