"""The training loss, computed without full-resolution logits of a whole batch in memory."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from ml_collections import ConfigDict

from psp_jax.data.labels import IGNORE
from psp_jax.model.geometry import STRIDE, Size
from psp_jax.model.resample import resize_matrix


def cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum of the softmax cross-entropy over the pixels whose label is not 255, and their number.

    logits [..., C], labels uint8 [...]: a float and an int32 scalar.
    """
    valid = labels != IGNORE
    chosen = labels[..., None] == jnp.arange(logits.shape[-1], dtype=labels.dtype)
    picked = jnp.sum(jnp.where(chosen, logits, 0), axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.sum(jnp.where(valid, losses, 0)), jnp.sum(valid, dtype=jnp.int32)


# The values of `loss.name`: (logits [..., C], labels uint8 [...]) of a block of pixels -> the sum
# of its loss and the weight to divide by. Both are summed over all blocks of the global batch.
Loss = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
LOSSES: dict[str, Loss] = {'cross_entropy': cross_entropy}


def training_losses(
    outputs: tuple[jax.Array, jax.Array | None],
    labels_BHW: jax.Array,
    size: Size,
    config: ConfigDict,
) -> dict[str, jax.Array]:
    """Scalars `loss_main`, `loss_aux` (with an auxiliary head) and their weighted sum `loss`.

    outputs: the network's (logits, aux_logits); size: of the images. Labels may have more rows,
    which must be 255.
    """
    logits, aux_logits = outputs
    loss = LOSSES[config.loss.name]
    corners = config.model.align_corners
    losses = {'loss_main': segmentation_loss(logits, labels_BHW, size, corners, loss)}
    total = losses['loss_main']
    if aux_logits is not None:
        losses['loss_aux'] = segmentation_loss(aux_logits, labels_BHW, size, corners, loss)
        total += config.loss.aux_weight * losses['loss_aux']
    return {'loss': total, **losses}


def segmentation_loss(
    logits_BhwC: jax.Array,
    labels_BHW: jax.Array,
    size: Size,
    align_corners: bool,
    loss: Loss = cross_entropy,
) -> jax.Array:
    """`loss` of the logits up-sampled to `size`, its sum over its weight in the *global* batch.

    Zero, with zero gradients, if the weight is zero because no pixel is valid.
    """
    rows, columns = (
        resize_matrix(logits_BhwC.shape[axis + 1], size[axis], align_corners) for axis in (0, 1)
    )
    sums, weights = map_row_phases(loss, logits_BhwC, labels_BHW, rows, columns)
    weight = jnp.sum(weights)
    return jnp.sum(sums) / jnp.where(weight > 0, weight, 1)


def map_row_phases(
    fn: Callable[[jax.Array, jax.Array], Any],
    logits_BhwC: jax.Array,
    labels_BHW: jax.Array,
    rows_Hh: np.ndarray,
    columns_Ww: np.ndarray,
) -> Any:
    """Resizes the logits by the matrices and calls `fn` on every `STRIDE`-th row at a time.

    fn(logits [B, n, W, C], labels [B, n, W]) gives any tree of arrays; the trees come back stacked
    on a new first axis of `STRIDE`. Rows of labels beyond the matrix must be 255. Logits are of
    float32 or better. The backward pass computes each block again instead of keeping it.

    The same code serves images that are split in height over devices: every device has a share of
    every block, and needs only a few rows of logits from its neighbours.
    """
    exact = jnp.promote_types(logits_BhwC.dtype, jnp.float32)
    filler = -labels_BHW.shape[1] % STRIDE
    labels = jnp.pad(labels_BHW, ((0, 0), (0, filler), (0, 0)), constant_values=IGNORE)
    batch, height, width = labels.shape
    cells = height // STRIDE
    labels = jnp.moveaxis(labels.reshape(batch, cells, STRIDE, width), 2, 0)
    bands = row_bands(rows_Hh, cells)
    logits = logits_BhwC.astype(exact)
    below = cells - logits.shape[1]
    beside = [  # row a holds row a + offset
        lax.pad(logits, jnp.zeros((), exact), ((0, 0, 0), (-o, below + o, 0), (0, 0, 0), (0, 0, 0)))
        for o in bands
    ]
    weights = jnp.asarray(np.stack(list(bands.values()), 1), exact)  # [STRIDE, offsets, cells]

    @jax.checkpoint
    def block(weights, labels):
        scaled = (w[:, None, None] * x for w, x in zip(weights, beside, strict=True))
        rows = functools.reduce(jnp.add, scaled)
        highest = lax.Precision.HIGHEST
        full = jnp.einsum('Ww,bhwc->bhWc', jnp.asarray(columns_Ww, exact), rows, precision=highest)
        return fn(full, labels)

    return lax.map(lambda args: block(*args), (weights, labels))


def row_bands(rows_Hh: np.ndarray, cells: int) -> dict[int, np.ndarray]:
    """The few diagonals of the matrix that are not zero: {offset: float64 [STRIDE, cells]}.

    Row STRIDE * a + r of the matrix has at column a + offset the value [r, a]; zeros elsewhere.
    """
    row, column = np.nonzero(rows_Hh)
    offsets = column - row // STRIDE
    bands = {}
    for offset in range(offsets.min(), offsets.max() + 1):
        band = np.zeros((STRIDE, cells))
        on = offsets == offset
        band[row[on] % STRIDE, row[on] // STRIDE] = rows_Hh[row[on], column[on]]
        bands[offset] = band
    return bands
