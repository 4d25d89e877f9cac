"""A checkpoint in a form that other programs read."""

import json
import os

from psp_jax import checkpoint, report
from psp_jax.errors import UserError
from psp_jax.import_weights import as_options, semseg_name, to_torch


def export_weights(workdir: str, which: str, output: str) -> None:
    """Writes `params` and `batch_stats` to a `.safetensors` file under semseg's names.

    Values keep every bit. The network's options go into the file's metadata, since names and shapes
    do not tell them all. The file appears once it is whole. Raises UserError for another suffix,
    a missing checkpoint and a path that cannot be written.
    """
    import safetensors.numpy

    if not output.endswith('.safetensors'):
        raise UserError(f'--output={output}: must end in .safetensors')
    path, step = checkpoint.find(workdir, which)
    found = checkpoint.shapes(path, step, ('params', 'batch_stats'))
    arrays = checkpoint.read_arrays(path, step, found)
    tensors = {semseg_name(name): to_torch(array) for name, array in arrays.items()}
    options = as_options(json.loads(checkpoint.read_meta(path, step)['config']))
    metadata = {'format': 'pt', 'psp_jax': json.dumps(options)}
    unfinished = f'{output}.unfinished'
    try:
        safetensors.numpy.save_file(tensors, unfinished, metadata=metadata)
        os.replace(unfinished, output)
    except Exception as error:
        if os.path.exists(unfinished):
            os.remove(unfinished)
        if isinstance(error, OSError) or 'I/O' in str(error) or 'os error' in str(error):
            raise UserError(f'--output={output}: cannot be written ({error})') from error
        raise
    report.say(f'{len(tensors)} arrays of {path / str(step)} written to {output}')
