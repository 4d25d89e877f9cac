"""What the tests of whole runs share: photographs, a small configuration, compiled programs."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import jax
import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

ROOT = Path(__file__).parents[1]

# PSPNet-10 with narrow heads. Whatever is compiled into the training step stays as it is in nearly
# all tests, so that they compile it once: see `programs`.
SMALL_CONFIG = """\
from psp_jax.config import default_config


def get_config(arg=''):
    config = default_config()
    config.batch_size = 2
    config.total_steps = 10
    config.eval_every = 5
    config.checkpoint_every = 5
    config.log_every = 1
    config.data.root = {root!r}
    config.data.train = 'train.txt'
    config.data.val = 'val.txt'
    config.data.classes = '10'
    config.data.crop = 33
    config.model.depth = 10
    config.model.stem = 'deep_small'
    config.model.head_width = 16
    config.model.aux_width = 8
    config.eval.batch_size = 2
    return config
"""


def make_photographs(root: Path, sizes: list[tuple[int, int]], split: str) -> None:
    """Writes pairs 'SPLIT I.jpg' and 'labels/I.png' of (height, width) `sizes`, and SPLIT.txt.

    Labels are palette PNGs of ten classes, with some pixels of 255; some classes may be absent.
    """
    rng = np.random.default_rng(len(split))
    (root / 'labels').mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (height, width) in enumerate(sizes):
        patches = rng.integers(0, 9, (4, 5), np.uint8)
        label = cv2.resize(patches, (width, height), interpolation=cv2.INTER_NEAREST)
        image = np.clip(label[..., None] * 25 + rng.normal(0, 20, (height, width, 3)), 0, 255)
        label[:2, i:] = 255
        picture = Image.fromarray(label)
        picture.putpalette(rng.integers(0, 256, 768, np.uint8).tobytes())
        picture.save(root / 'labels' / f'{split}_{i}.png')
        Image.fromarray(image.astype(np.uint8)).save(root / f'{split} {i}.jpg')
        lines.append(f'{split} {i}.jpg labels/{split}_{i}.png\n')
    (root / f'{split}.txt').write_text(''.join(lines))


@pytest.fixture(scope='session')
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of the tests, the same for all of its workers."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """`path`, which make(path) makes for the first worker that asks; the others wait for it."""
    done = path.parent / f'{path.name} is made'
    with FileLock(f'{path}.lock'):
        if not done.exists():
            make(path)
            done.touch()
    return path


@pytest.fixture(scope='session')
def photographs(shared: Path) -> Path:
    """A folder with train.txt of 5 and val.txt of 3 examples; for reading only."""

    def make(root: Path) -> None:
        make_photographs(root, [(37, 50), (41, 46), (64, 35), (33, 33), (90, 71)], 'train')
        make_photographs(root, [(65, 129), (39, 52), (65, 129)], 'val')  # 65 x 129: as the scenes

    return made_once(shared / 'my photographs', make)


@pytest.fixture(scope='session')
def small_config(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config file of a run that takes seconds: 10 steps on `photographs`."""
    path = tmp_path_factory.mktemp('configs') / 'small.py'
    path.write_text(SMALL_CONFIG.format(root=str(photographs)))
    return path


@pytest.fixture(scope='session')
def programs(shared: Path) -> dict[str, str]:
    """Has JAX keep compiled programs in one folder; subprocesses do so by these variables."""
    folder = os.environ.get('JAX_COMPILATION_CACHE_DIR') or str(shared / 'programs')
    jax.config.update('jax_compilation_cache_dir', folder)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    return {
        'JAX_COMPILATION_CACHE_DIR': folder,
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }


@pytest.fixture(scope='session')
def python(programs: dict[str, str]) -> Callable[..., subprocess.CompletedProcess]:
    """Runs `python WORD...` in the repository, in a process of its own that knows tests/ too."""

    paths = [str(ROOT / 'tests'), *filter(None, [os.environ.get('PYTHONPATH')])]

    def run(*words: object) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            env=os.environ | programs | {'PYTHONPATH': os.pathsep.join(paths)},
            text=True,
            capture_output=True,
        )

    return run


class Run(NamedTuple):
    workdir: Path
    stdout: str
    stderr: str


@pytest.fixture(scope='session')
def trained(
    small_config: Path, python: Callable[..., subprocess.CompletedProcess], shared: Path
) -> Run:
    """The run of `small_config` by the command line, from an empty folder; for reading only."""

    def make(folder: Path) -> None:
        words = ('--config', small_config, '--workdir', folder / 'run 1')
        process = python('-m', 'psp_jax.main', *words)
        assert process.returncode == 0, process.stderr
        (folder / 'stdout').write_text(process.stdout)
        (folder / 'stderr').write_text(process.stderr)

    folder = made_once(shared / 'runs', make)
    return Run(folder / 'run 1', *((folder / name).read_text() for name in ('stdout', 'stderr')))


@pytest.fixture
def measured(
    record_property: Callable[[str, object], None],
) -> Callable[[str, float, float], None]:
    """Asserts that a figure is at most a bar, and lists both at the end of the tests' report."""

    def check(claim: str, value: float, bar: float) -> None:
        record_property('measured', f'{claim}: {value:.2g} (at most {bar:g})')
        assert value <= bar, f'{claim}: {value:.3g} is above {bar:g}'

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [r for kind in ('passed', 'failed') for r in terminalreporter.stats.get(kind, [])]
    lines = [text for r in reports for name, text in r.user_properties if name == 'measured']
    if lines:
        terminalreporter.section('measured')
        for line in lines:
            terminalreporter.write_line(line)
