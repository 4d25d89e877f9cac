"""Reads files of weights. Code in a file is never run.

Only this file imports torch.
"""

import json
import os
import re
import zipfile
from typing import Any

import numpy as np

from psp_jax.errors import UserError

Arrays = dict[str, np.ndarray]


def is_checkpoint(source: str) -> bool:
    """Whether a source is a folder, which contains our own checkpoints, and not a file."""
    if source.startswith('hf://'):
        return False
    if '://' in source:
        return not source.endswith(('.pth', '.pt', '.safetensors'))
    return os.path.isdir(source)


def read_file(source: str) -> tuple[Arrays, dict[str, Any]]:
    """All arrays of a file by their names there, and the options of the network that it states.

    Options are keys of the configuration with values as in JSON. Raises UserError if the file is
    missing, broken or of an unknown kind.
    """
    path = _download(source) if source.startswith('hf://') else source
    if '://' in path:
        raise UserError(f'{path}: weights in buckets are not read; copy the file here first')
    if not os.path.exists(path):
        raise UserError(f'{path}: there is no such file of weights, or folder of a checkpoint')
    if path.endswith('.safetensors'):
        return _read_safetensors(path)
    if path.endswith(('.pth', '.pt', '.bin')):
        return _read_torch(path)
    raise UserError(f'{path}: weights are read from .pth, .pt, .bin and .safetensors files')


def _download(source: str) -> str:
    """hf://OWNER/NAME[/FILE] -> the path of the local copy, which is downloaded once."""
    owner, name, file = (source.removeprefix('hf://').split('/', 2) + ['', ''])[:3]
    if not (owner and name):
        raise UserError(f'{source}: expected hf://OWNER/NAME or hf://OWNER/NAME/FILE')
    import huggingface_hub
    from huggingface_hub.utils import logging

    # Without a network the hub retries for half a minute and logs each try; one error is enough.
    logging.set_verbosity_error()
    file = file or 'model.safetensors'
    try:
        return huggingface_hub.hf_hub_download(f'{owner}/{name}', file)
    except Exception as error:  # errors of the hub, HTTP, the network and the disk
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f'{source}: {file} cannot be downloaded ({type(error).__name__}: {reason[0]}). '
            'Download it elsewhere and give its path (--config.init_from=FILE), or start from '
            "random weights (--config.init_from='')"
        ) from error


def _read_safetensors(path: str) -> tuple[Arrays, dict[str, Any]]:
    import safetensors.numpy

    try:
        with safetensors.safe_open(path, 'numpy') as file:
            stated = json.loads((file.metadata() or {}).get('psp_jax', '{}'))
        return safetensors.numpy.load_file(path), stated
    except Exception as error:  # the library's errors share no class
        raise UserError(
            f'{path}: cannot be read as safetensors ({error}); it may be cut off: get it again'
        ) from error


def _read_torch(path: str) -> tuple[Arrays, dict[str, Any]]:
    """The state dict of a PyTorch file; it may lie under 'state_dict', 'model' or 'model_state'.

    For mmsegmentation's files it also returns whether corners are aligned. Raises UserError if
    PyTorch is missing, or if the file is broken, contains code or contains no state dict.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            f'{path}: PyTorch files are read with PyTorch, which is not installed: pip install '
            '"torch>=2.6" (its CPU build is enough), or convert the file to .safetensors'
        ) from None
    content = _load(path, torch)
    stated = _stated(content)
    for key in ('state_dict', 'model', 'model_state'):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not any(map(torch.is_tensor, content.values())):
        raise UserError(
            f'{path}: holds an object of class {type(content).__name__} and no state dict; save '
            'model.state_dict() with torch.save'
        )
    tensors = {str(name): value for name, value in content.items() if torch.is_tensor(value)}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise UserError(f'{path}: {name} is not a plain dense tensor')
    return {name: _to_numpy(tensor) for name, tensor in tensors.items()}, stated


class Inert:
    """Replaces an object of a class that PyTorch does not load, such as a training log."""

    called_as = ''  # the name in the file

    def __init__(self, *args: Any):
        # Unpickling an object calls only __new__. A call of __init__ means that the file asks to
        # run code; only NumPy's arrays and numbers, and the methods in mmengine's logs, are made by
        # such calls too.
        if not self.called_as.startswith(('numpy.', '_codecs.', 'builtins.getattr')):
            raise UserError(
                f'it asks to call {self.called_as}, and no code in a file is run. Take a file from '
                'a source that you trust, with model.state_dict() alone'
            )

    def __new__(cls, *args: Any) -> 'Inert':
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def _load(path: str, torch: Any) -> Any:
    """torch.load without running code; objects of unknown classes become `Inert`."""
    try:
        unknown = []
        if zipfile.is_zipfile(path):  # older files (PyTorch before 1.6) hold tensors alone
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        inert = [(type(name, (Inert,), {'called_as': name}), name) for name in unknown]
        with torch.serialization.safe_globals(inert):
            return torch.load(path, map_location='cpu', weights_only=True)
    except UserError as error:
        raise UserError(f'{path}: {error}') from error
    except Exception as error:  # torch raises many classes on broken files
        # The reason follows a page of advice.
        reason = str(error).rpartition('WeightsUnpickler error:')[2].strip().split('\n')[0]
        raise UserError(
            f'{path}: cannot be read as a PyTorch file of weights ({reason[:120]}). If it is cut '
            'off, get it again; if it holds other objects, save model.state_dict() alone'
        ) from error


def _stated(content: Any) -> dict[str, Any]:
    """Whether corners are aligned, from the configuration's text in mmsegmentation's files."""
    meta = content.get('meta') if isinstance(content, dict) else None
    if not isinstance(meta, dict):
        return {}
    text = str(meta.get('config') or meta.get('cfg'))  # versions 0.x, 1.x
    found = set(re.findall(r'\balign_corners\W{1,3}(True|False)\b', text))
    return {'model.align_corners': found == {'True'}} if len(found) == 1 else {}


def _to_numpy(tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.is_floating_point() and tensor.element_size() < 4:  # NumPy has no bfloat16
        tensor = tensor.float()
    return tensor.contiguous().numpy()
