"""Exports a checkpoint for other programs: its weights, or the network as a program."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from ml_collections import ConfigDict

from psp_jax.command_line import whole_file
from psp_jax.config import crop_size
from psp_jax.errors import UserError
from psp_jax.model import pspnet
from psp_jax.model.resample import resize
from psp_jax.report import console
from psp_jax.runtime import checkpoint
from psp_jax.state import setup
from psp_jax.weights.names import as_options, modules, semseg_name, to_torch

PLATFORMS = ('cpu', 'cuda', 'tpu')  # one program runs on all of these


def export_checkpoint(
    config: ConfigDict | None, workdir: str, which: str, overrides: list[str], output: str
) -> None:
    """Writes a checkpoint as the suffix of `output` says: .safetensors or .jaxexport.

    See `export_weights` and `export_program`. Only the program uses `config` and `overrides`.
    Raises UserError for any other suffix.
    """
    suffix = os.path.splitext(output)[1]
    if suffix == '.safetensors':
        export_weights(workdir, which, output)
    elif suffix == '.jaxexport':
        export_program(config, workdir, which, overrides, output)
    else:
        raise UserError(
            f'--output={output}: must end in .safetensors, for the weights, or in .jaxexport, for '
            'the network as a program'
        )


def export_weights(workdir: str, which: str, output: str) -> None:
    """Writes `params` and `batch_stats` to a `.safetensors` file under semseg's names.

    Values keep every bit. The file's metadata has the network's options that names and shapes do
    not show. The file appears when it is complete. Raises UserError if the network has a module
    without a name in semseg's format, there is no such checkpoint, or the path cannot be written.
    """
    import safetensors.numpy

    path, step = checkpoint.find(workdir, which)
    shapes = checkpoint.shapes(path, step, ('params', 'batch_stats'))
    nameless = modules([name for name in shapes if semseg_name(name) is None], shapes)
    if nameless:
        raise UserError(
            f"--output={output}: semseg's format has no name for {', '.join(nameless)}; export the "
            'network as a program, to a file that ends in .jaxexport'
        )
    arrays = checkpoint.read_arrays(path, step, shapes)
    tensors = {str(semseg_name(name)): to_torch(array) for name, array in arrays.items()}
    options = as_options(json.loads(checkpoint.read_meta(path, step)['config']))
    metadata = {'format': 'pt', 'psp_jax': json.dumps(options)}
    with whole_file(output) as unfinished:
        safetensors.numpy.save_file(tensors, unfinished, metadata=metadata)
    console.say(f'{len(tensors)} arrays of {path / str(step)} written to {output}')


def export_program(
    config: ConfigDict | None, workdir: str, which: str, overrides: Iterable[str], output: str
) -> None:
    """Writes the network of a checkpoint, with its weights, as one program of JAX.

    `config` defaults to the checkpoint's own with `overrides` ('--config.KEY=VALUE') on it:
    `data.crop` is the size of the images, and `dtype` may be bfloat16 after training in float32.
    JAX alone reads the file: `call = jax.export.deserialize(open(output, 'rb').read()).call`. The
    file appears when it is complete. Raises UserError if an override is not legal or changes the
    network, there is no such checkpoint, or the path cannot be written.
    """
    path, step, config = checkpoint.find_with_config(config, workdir, which, overrides)
    run = setup(config)
    variables = checkpoint.restore_variables(run, path, step)
    exported = program(run.model, config, jax.device_get(variables))
    with whole_file(output) as unfinished, open(unfinished, 'wb') as file:
        file.write(exported.serialize())
    (images,), (logits,) = exported.in_avals, exported.out_avals
    console.say(
        f'{path / str(step)} written to {output}: {images.str_short()} -> {logits.str_short()} '
        f'on {", ".join(exported.platforms)}'
    )


def program(
    model: pspnet.PSPNet, config: ConfigDict, variables: dict[str, Any]
) -> jax.export.Exported:
    """The network in test mode as a function of the images alone, for all `PLATFORMS`.

    It takes RGB images uint8 [batch, H, W, 3], for any batch and the H x W of `data.crop`. It
    returns logits float32 [batch, H, W, classes], resized from 1/8 of that as in evaluation. It
    contains the normalisation and the weights. `variables` are trees of *NumPy* arrays: these are
    cast to `config.dtype` here, while JAX's would be cast at each call and take twice the space in
    bfloat16.
    """
    height, width = crop_size(config.data)

    def logits(images: jax.Array) -> jax.Array:
        features, _ = model.apply(variables, pspnet.normalise(images, config), False)
        x = resize(features, (height, width), config.model.align_corners)
        return x.astype(jnp.float32)  # also of float64, which few callers enable

    shape = jax.export.symbolic_shape(f'batch, {height}, {width}, 3')
    with _file_names_only():
        export = jax.export.export(jax.jit(logits), platforms=PLATFORMS)
        return export(jax.ShapeDtypeStruct(shape, jnp.uint8))


@contextmanager
def _file_names_only() -> Iterator[None]:
    """Removes this computer's folders from the source positions that the program contains."""
    key = 'jax_hlo_source_file_canonicalization_regex'
    before = getattr(jax.config, key)
    jax.config.update(key, '.*/')
    try:
        yield
    finally:
        jax.config.update(key, before)
