"""The training loss, computed without ever holding full-resolution logits of a whole batch."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from psp_jax.data.labels import IGNORE
from psp_jax.model.geometry import STRIDE
from psp_jax.model.resample import apply_matrices

ROWS = 32  # of the full resolution, held as float logits at a time


def map_row_blocks(
    fn: Callable[[jax.Array, jax.Array], Any],
    logits_BhwC: jax.Array,
    labels_BHW: jax.Array,
    rows_Hh: np.ndarray | jax.Array,
    columns_Ww: np.ndarray | jax.Array,
) -> Any:
    """Resizes the logits and calls `fn`, `ROWS` rows of the labels' resolution at a time.

    fn(logits [B, ROWS, W, C], labels [B, ROWS, W]) gives any tree of arrays; the trees come back
    stacked on a new first axis. The last block is filled with ignored labels. Logits are of
    float32 or better. The backward pass makes each block again instead of keeping it.
    """
    exact = jnp.promote_types(logits_BhwC.dtype, jnp.float32)
    logits_BhwC = logits_BhwC.astype(exact)
    batch, height, width = labels_BHW.shape
    size = min(ROWS, height)
    filler = -height % size
    labels = jnp.pad(labels_BHW, ((0, 0), (0, filler), (0, 0)), constant_values=IGNORE)
    labels = labels.reshape(batch, -1, size, width).swapaxes(0, 1)
    rows = jnp.pad(jnp.asarray(rows_Hh, exact), ((0, filler), (0, 0)))
    rows = rows.reshape(len(labels), size, -1)

    @jax.checkpoint
    def block(rows, labels):
        return fn(apply_matrices(logits_BhwC, rows, columns_Ww), labels)

    return lax.map(lambda args: block(*args), (rows, labels))


def map_row_phases(
    fn: Callable[[jax.Array, jax.Array], Any],
    logits_BhwC: jax.Array,
    labels_BHW: jax.Array,
    rows_Hh: np.ndarray,
    columns_Ww: np.ndarray,
) -> Any:
    """`map_row_blocks` for images that are split in height over devices.

    Takes every `STRIDE`-th row at a time, not `ROWS` neighbours: so each device has a share of
    every block, and all it needs of the others are the few rows of logits beside its own. Labels
    have whole cells of `STRIDE` rows, as many for each device; those beyond the matrix's are 255.
    """
    exact = jnp.promote_types(logits_BhwC.dtype, jnp.float32)
    batch, height, width = labels_BHW.shape
    cells = height // STRIDE
    labels = jnp.moveaxis(labels_BHW.reshape(batch, cells, STRIDE, width), 2, 0)
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
    """The matrix by its few diagonals: {offset: float64 [STRIDE, cells]}.

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


def pixel_cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum of the softmax cross-entropy over the pixels whose label is not 255, and their number.

    logits [..., C], labels uint8 [...]: a float and an int32 scalar.
    """
    valid = labels != IGNORE
    chosen = labels[..., None] == jnp.arange(logits.shape[-1], dtype=labels.dtype)
    picked = jnp.sum(jnp.where(chosen, logits, 0), axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.sum(jnp.where(valid, losses, 0)), jnp.sum(valid, dtype=jnp.int32)


def segmentation_loss(
    logits_BhwC: jax.Array,
    labels_BHW: jax.Array,
    rows_Hh: np.ndarray,
    columns_Ww: np.ndarray,
    map_rows: Callable[..., Any] = map_row_blocks,
) -> jax.Array:
    """Cross-entropy of the up-sampled logits, mean over the valid pixels of the *global* batch.

    Zero, with zero gradients, where no pixel is valid. `map_rows`: `map_row_phases` for images that
    are split in height over devices.
    """
    sums, counts = map_rows(pixel_cross_entropy, logits_BhwC, labels_BHW, rows_Hh, columns_Ww)
    return jnp.sum(sums) / jnp.maximum(jnp.sum(counts), 1)
