"""A checkpoint in a form that other programs read: its weights, or the network as a program."""

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
from psp_jax.errors import UserError
from psp_jax.import_weights import as_options, semseg_name, to_torch
from psp_jax.model import pspnet
from psp_jax.model.geometry import crop_size
from psp_jax.model.resample import resize
from psp_jax.report import console
from psp_jax.runtime import checkpoint
from psp_jax.state import setup

PLATFORMS = ('cpu', 'cuda', 'tpu')  # that one program is for


def export_checkpoint(
    config: ConfigDict | None, workdir: str, which: str, overrides: list[str], output: str
) -> None:
    """Writes a checkpoint as the suffix of `output` says: .safetensors or .jaxexport.

    `export_weights` and `export_program` tell what is in it and what they raise. The configuration
    defaults to the checkpoint's own, with `overrides`; the weights know no other. Raises UserError
    for any other suffix.
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

    Values keep every bit. The network's options go into the file's metadata, since names and shapes
    do not tell them all. The file appears once it is whole. Raises UserError for
    a missing checkpoint and a path that cannot be written.
    """
    import safetensors.numpy

    path, step = checkpoint.find(workdir, which)
    found = checkpoint.shapes(path, step, ('params', 'batch_stats'))
    arrays = checkpoint.read_arrays(path, step, found)
    tensors = {semseg_name(name): to_torch(array) for name, array in arrays.items()}
    options = as_options(json.loads(checkpoint.read_meta(path, step)['config']))
    metadata = {'format': 'pt', 'psp_jax': json.dumps(options)}
    with whole_file(output) as unfinished:
        safetensors.numpy.save_file(tensors, unfinished, metadata=metadata)
    console.say(f'{len(tensors)} arrays of {path / str(step)} written to {output}')


def export_program(
    config: ConfigDict | None, workdir: str, which: str, overrides: Iterable[str], output: str
) -> None:
    """Writes what `program` makes of a checkpoint and a configuration, which may be its own.

    `overrides` ('--config.KEY=VALUE') change the latter: `data.crop` is the size of the
    images, and `dtype` may be bfloat16 where training had float32. jax alone reads the file:
    `call = jax.export.deserialize(open(output, 'rb').read()).call`. It appears once it is whole.
    Raises UserError for an override that is not legal or asks for another network, a missing
    checkpoint and a path that cannot be written.
    """
    path, step = checkpoint.find(workdir, which)
    config = config or checkpoint.config_of(path, step, overrides)
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

    It takes uint8 [batch, H, W, 3], RGB, for any batch and the H x W that `data.crop` names, and
    gives float32 [batch, H, W, classes]: logits, resized from 1/8 of that as in evaluation.
    Normalisation and the weights are within. `variables`: trees of *numpy* arrays, which are cast
    to `config.dtype` here; those of JAX would be when it runs, and take twice the room in bfloat16.
    """
    height, width = crop_size(config)

    def logits(images: jax.Array) -> jax.Array:
        features, _ = model.apply(variables, pspnet.normalise(images, config), False)
        x = resize(features, (height, width), config.model.align_corners)
        return x.astype(jnp.float32)  # float64 has served its purpose, and few callers enable it

    shape = jax.export.symbolic_shape(f'batch, {height}, {width}, 3')
    with _file_names_only():
        export = jax.export.export(jax.jit(logits), platforms=PLATFORMS)
        return export(jax.ShapeDtypeStruct(shape, jnp.uint8))


@contextmanager
def _file_names_only() -> Iterator[None]:
    """Keeps this computer's folders out of what is lowered, whose operations name their source."""
    key = 'jax_hlo_source_file_canonicalization_regex'
    before = getattr(jax.config, key)
    jax.config.update(key, '.*/')
    try:
        yield
    finally:
        jax.config.update(key, before)
