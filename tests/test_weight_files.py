"""Files of PyTorch: what they hold is read, what they ask to run is not run."""

import os
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest

from psp_jax.errors import UserError


def test_without_pytorch_the_error_says_what_to_install(monkeypatch, tmp_path):
    from psp_jax.weights import files

    monkeypatch.setitem(sys.modules, 'torch', None)
    with pytest.raises(UserError, match='pip install "torch>=2.6"'):
        files.read_torch(str(tmp_path / 'x.pth'))


class Remark:
    """A class that reading a file must not need."""

    def __init__(self, text):
        self.text, self.numbers = text, [1, 2]


class Command:
    """Unpickles by running a command."""

    def __init__(self, function, *words):
        self.call = function, words

    def __reduce__(self):
        return self.call


@pytest.fixture
def torch():
    return pytest.importorskip('torch', reason='PyTorch is not installed')


def state_dict(torch):
    return OrderedDict(
        (
            ('a.weight', torch.arange(6.0).reshape(2, 3)),
            ('a.half', torch.ones(2, dtype=torch.bfloat16)),
            ('a.num_batches_tracked', torch.tensor(3)),
        )
    )


def assert_read(path):
    from psp_jax.weights import files

    found, _ = files.read_torch(str(path))
    assert list(found) == ['a.weight', 'a.half', 'a.num_batches_tracked']
    np.testing.assert_array_equal(found['a.weight'], np.arange(6).reshape(2, 3))
    assert found['a.half'].dtype == np.float32


@pytest.mark.torch
@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'of old'])
@pytest.mark.parametrize('key', ['', 'state_dict', 'model'])
def test_state_dicts_are_found(torch, tmp_path, key, zipped):
    content = {key: state_dict(torch), 'epoch': 7} if key else state_dict(torch)
    torch.save(content, tmp_path / 'x.pth', _use_new_zipfile_serialization=zipped)
    assert_read(tmp_path / 'x.pth')


@pytest.mark.torch
def test_objects_of_unknown_classes_are_inert(torch, tmp_path):
    remark = Remark('not needed')
    history = {'loss': np.float64(0.5), 'curve': np.arange(3), 'remark': remark}
    torch.save({'state_dict': state_dict(torch), 'meta': history}, tmp_path / 'x.pth')
    assert_read(tmp_path / 'x.pth')


@pytest.mark.torch
@pytest.mark.filterwarnings('ignore')
def test_a_checkpoint_of_mmsegmentations_own_training(torch, tmp_path):
    from mmengine.logging import HistoryBuffer

    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    hub = {'log_scalars': {'loss': buffer}, 'runtime_info': {'iter': 7}}
    torch.save({'state_dict': state_dict(torch), 'message_hub': hub}, tmp_path / 'x.pth')
    assert_read(tmp_path / 'x.pth')


@pytest.mark.torch
@pytest.mark.parametrize(
    ('meta', 'stated'),
    [
        ({'config': 'decode_head = dict(\n    align_corners=True,\n    channels=512)'}, True),
        ({'cfg': 'decode_head=dict(align_corners=False), auxiliary_head=...'}, False),
        ({'config': "a=dict(align_corners=True), b={'align_corners': False}"}, None),
        ({'epoch': 3}, None),
    ],
)
def test_mmsegmentations_files_tell_whether_corners_are_aligned(torch, tmp_path, meta, stated):
    from psp_jax.weights import files

    torch.save({'meta': meta, 'state_dict': state_dict(torch)}, tmp_path / 'x.pth')
    _, found = files.read_file(str(tmp_path / 'x.pth'))
    assert found == ({} if stated is None else {'model.align_corners': stated})


@pytest.mark.torch
def test_tensors_that_are_not_plain(torch, tmp_path):
    from psp_jax.weights import files

    torch.save({'a': torch.ones(3).to_sparse()}, tmp_path / 'x.pth')
    with pytest.raises(UserError, match='a is not a plain dense tensor'):
        files.read_torch(str(tmp_path / 'x.pth'))


@pytest.mark.torch
def test_code_in_a_file_never_runs(torch, tmp_path):
    from psp_jax.weights import files

    mark = tmp_path / 'it ran'
    calls = {
        'posix.system': Command(os.system, f'touch "{mark}"'),
        'builtins.eval': Command(eval, f'open({str(mark)!r}, "w")'),
        'subprocess.run': Command(subprocess.run, ['touch', str(mark)]),
    }
    for name, call in calls.items():
        path = tmp_path / 'x.pth'
        torch.save({'state_dict': state_dict(torch), 'extra': call}, path)
        with pytest.raises(UserError) as caught:
            files.read_torch(str(path))
        message = str(caught.value)
        assert str(path) in message and name in message and '\n' not in message
        assert not mark.exists()


@pytest.mark.torch
def test_files_that_are_broken_or_hold_something_else(torch, tmp_path):
    from psp_jax.weights import files

    path = tmp_path / 'x.pth'
    torch.save(state_dict(torch), path)
    whole = path.read_bytes()
    for content in (whole[:-300], whole[: len(whole) // 2], b'', b'no pickle'):
        path.write_bytes(content)
        with pytest.raises(UserError, match='cannot be read as a PyTorch file') as caught:
            files.read_torch(str(path))
        assert '\n' not in str(caught.value)
    for content in (torch.nn.Linear(2, 2), {'epoch': 3}, [1]):
        torch.save(content, path)
        with pytest.raises(UserError, match='not a state dict'):
            files.read_torch(str(path))
