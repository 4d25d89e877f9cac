"""Reading PyTorch's files without running what is in them. Only this file imports torch."""

import pickle
import re
import sys
from _compat_pickle import IMPORT_MAPPING  # Python 2's module names, which protocol 2 writes
from typing import Any

import numpy as np

from psp_jax.errors import UserError

# Modules of the standard library whose objects are plain data. A file that names anything else of
# the standard library calls functions, which no file of weights has a reason to.
_HARMLESS = ('argparse', 'collections', 'copyreg', 'datetime', 'decimal', 'enum', 'pathlib', 'uuid')
_HARMLESS_BUILTINS = ('object', 'set', 'frozenset', 'slice', 'range', 'complex', 'bytearray')


class Inert:
    """Stands for an object of a class that is not needed to read weights. It does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __new__(cls, *args: Any, **kwargs: Any) -> 'Inert':
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def read(path: str) -> dict[str, np.ndarray]:
    """The state dict in a `.pth` or `.pt` file, with plain tensors as they were saved.

    A dict under 'state_dict', 'model' or 'model_state' is taken before the whole. Raises UserError
    without PyTorch and for a file that is broken, holds code or holds no state dict.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            f'{path}: PyTorch files are read with PyTorch, which is not installed: pip install '
            'torch (its CPU build will do), or convert the file to .safetensors'
        ) from None
    content = _load(path, torch)
    for key in ('state_dict', 'model', 'model_state'):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not any(map(torch.is_tensor, content.values())):
        found = f'an object of class {type(content).__name__}' if content else 'nothing'
        raise UserError(
            f'{path}: holds {found}, not a state dict; save model.state_dict() with torch.save'
        )
    return {str(name): _array(value) for name, value in content.items() if torch.is_tensor(value)}


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
        return attribute not in _HARMLESS_BUILTINS
    top = module.partition('.')[0]
    return top in (*sys.stdlib_module_names, 'posix', 'nt') and top not in _HARMLESS


def _broken(path: str, error: Exception) -> UserError:
    # Of an UnpicklingError the reason stands behind a page of advice.
    behind = re.search(r'WeightsUnpickler error:\s*(.+)', str(error))
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
