"""The training loss, computed without ever holding full-resolution logits of a whole batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from psp_jax.data.labels import IGNORE
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
    logits_BhwC: jax.Array, labels_BHW: jax.Array, rows_Hh: np.ndarray, columns_Ww: np.ndarray
) -> jax.Array:
    """Cross-entropy of the up-sampled logits, mean over the valid pixels of the *global* batch.

    Zero, with zero gradients, where no pixel is valid.
    """
    sums, counts = map_row_blocks(pixel_cross_entropy, logits_BhwC, labels_BHW, rows_Hh, columns_Ww)
    return jnp.sum(sums) / jnp.maximum(jnp.sum(counts), 1)
