"""Reading files of weights, wherever they are; nothing that is in them is run.

Only this file imports torch.
"""

import json
import os
import pickle
import re
from _compat_pickle import IMPORT_MAPPING  # Python 2's module names, which protocol 2 writes
from typing import Any

import numpy as np

from psp_jax.errors import UserError

Arrays = dict[str, np.ndarray]

# What files name to have commands run. Nothing of a file is ever run, also when it is not named
# here; a file that asks for one of these is not one to take weights from.
_CODE_MODULES = (
    *('os', 'posix', 'nt', 'sys', 'subprocess', 'importlib', 'runpy', 'shutil', 'socket', 'pty'),
    *('ctypes', 'pickle', 'code', 'marshal', 'multiprocessing', 'webbrowser', 'pip'),
)
_CODE_BUILTINS = (
    'eval',
    'exec',
    'execfile',
    'compile',
    'open',
    'input',
    'breakpoint',
    '__import__',
)


def is_checkpoint(source: str) -> bool:
    """Whether it is a folder: ours to read, with orbax."""
    if source.startswith('hf://'):
        return False
    if '://' in source:
        return not source.endswith(('.pth', '.pt', '.safetensors'))
    return os.path.isdir(source)


def read_file(source: str) -> tuple[Arrays, dict[str, Any]]:
    """All arrays of a file by their names there, and what it says besides about its network.

    The latter are keys of the configuration, as JSON has them. Raises UserError.
    """
    path = _download(source) if source.startswith('hf://') else source
    if '://' in path:
        raise UserError(f'{path}: weights in buckets are not read; copy the file here first')
    if not os.path.exists(path):
        raise UserError(f'{path}: there is no such file of weights, or folder of a checkpoint')
    if path.endswith('.safetensors'):
        import safetensors.numpy

        try:
            with safetensors.safe_open(path, 'numpy') as file:
                stated = json.loads((file.metadata() or {}).get('psp_jax', '{}'))
            return safetensors.numpy.load_file(path), stated
        except Exception as error:  # of Rust, without a base class of its own
            raise UserError(
                f'{path}: cannot be read as safetensors ({error}); it may be cut off: get it again'
            ) from error
    if path.endswith(('.pth', '.pt', '.bin')):
        return read_torch(path)
    raise UserError(f'{path}: weights are read from .pth, .pt, .bin and .safetensors files')


def _download(source: str) -> str:
    """hf://OWNER/NAME[/FILE] -> the local copy, which is fetched once."""
    owner, name, file = (source.removeprefix('hf://').split('/', 2) + ['', ''])[:3]
    if not (owner and name):
        raise UserError(f'{source}: expected hf://OWNER/NAME or hf://OWNER/NAME/FILE')
    import huggingface_hub
    from huggingface_hub.utils import logging

    # It retries for half a minute offline and logs each try; the error below says it once.
    logging.set_verbosity_error()
    file = file or 'model.safetensors'
    try:
        return huggingface_hub.hf_hub_download(f'{owner}/{name}', file)
    except Exception as error:  # of the hub, of HTTP, of the network, of the disk
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f'{source}: {file} cannot be downloaded ({type(error).__name__}: {reason[0]}). Fetch '
            'it where there is a network and give its path (--config.init_from=FILE), or start '
            "from random weights (--config.init_from='')"
        ) from error


class Inert:
    """Stands for an object of a class that is not needed to read weights. It does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __new__(cls, *args: Any, **kwargs: Any) -> 'Inert':
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def read_torch(path: str) -> tuple[Arrays, dict[str, Any]]:
    """The state dict in a `.pth` or `.pt` file, with plain tensors as they were saved.

    A dict under 'state_dict', 'model' or 'model_state' is taken before the whole. Beside it comes
    whether corners are aligned, which mmsegmentation's files tell in the text of their
    configuration. Raises UserError without PyTorch and for a file that is broken, holds code or
    holds no state dict.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            f'{path}: PyTorch files are read with PyTorch, which is not installed: pip install '
            '"torch>=2.6" (its CPU build will do), or convert the file to .safetensors'
        ) from None
    if not hasattr(torch.serialization, 'safe_globals'):
        raise UserError(f'{path}: PyTorch {torch.__version__} is too old: pip install "torch>=2.6"')
    content = _load(path, torch)
    stated = _stated(content)
    for key in ('state_dict', 'model', 'model_state'):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not any(map(torch.is_tensor, content.values())):
        found = f'an object of class {type(content).__name__}' if content else 'nothing'
        raise UserError(
            f'{path}: holds {found}, not a state dict; save model.state_dict() with torch.save'
        )
    arrays = {}
    for name, value in content.items():
        if torch.is_tensor(value):
            try:
                arrays[str(name)] = _array(value)
            except (RuntimeError, TypeError, NotImplementedError) as error:
                raise UserError(f'{path}: {name} is not a plain dense tensor') from error
    return arrays, stated


def _stated(content: Any) -> dict[str, Any]:
    meta = content.get('meta') if isinstance(content, dict) else None
    if not isinstance(meta, dict):
        return {}
    text = str(meta.get('config') or meta.get('cfg'))  # of versions 0.x, 1.x
    found = set(re.findall(r'\balign_corners\W{1,3}(True|False)\b', text))
    return {'model.align_corners': found == {'True'}} if len(found) == 1 else {}


def _load(path: str, torch: Any) -> Any:
    """`torch.load` with `weights_only`, again and again until every unknown class is inert."""
    inert: list[tuple[type, str]] = []
    while True:
        try:
            with torch.serialization.safe_globals(inert):
                return torch.load(path, map_location='cpu', weights_only=True)
        except pickle.UnpicklingError as error:
            name = _refused(error)
            if name is None or name in (known for _, known in inert):
                raise _broken(path, error) from error
            module, _, attribute = name.rpartition('.')
            module = IMPORT_MAPPING.get(module, module)
            if _is_code(module, attribute):
                raise UserError(
                    f'{path}: not a file of weights alone: it asks to run {module}.{attribute}, '
                    'which was not done. Take the weights from a source that you trust'
                ) from error
            inert.append((type(attribute, (Inert,), {}), name))
        except Exception as error:  # torch raises nearly anything on broken files
            raise _broken(path, error) from error


def _refused(error: Exception) -> str | None:
    """The full name of the global that torch did not want to load."""
    match = re.search(r'(?:Unsupported|unsupported) (?:global: )?GLOBAL (\S+)', str(error))
    return match and (match[1] if '.' in match[1] else f'builtins.{match[1]}')


def _is_code(module: str, attribute: str) -> bool:
    if module == 'builtins':
        return attribute in _CODE_BUILTINS
    return module.partition('.')[0] in _CODE_MODULES


def _broken(path: str, error: Exception) -> UserError:
    # Of an UnpicklingError the reason stands behind a page of advice.
    behind = re.search(r'WeightsUnpickler error:\s*(.+)', str(error))
    if behind and 'Can only' in behind[1]:
        return UserError(
            f'{path}: holds an object that only the program that wrote it can read; there, save '
            'model.state_dict() alone with torch.save'
        )
    lines = [behind[1]] if behind else str(error).splitlines() or [type(error).__name__]
    return UserError(
        f'{path}: cannot be read as a PyTorch file ({lines[0][:120]}); it may be cut off: get it '
        'again'
    )


def _array(tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.is_floating_point() and tensor.element_size() < 4:  # numpy knows no bfloat16
        tensor = tensor.float()
    return tensor.contiguous().numpy()
