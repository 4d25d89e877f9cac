"""README, docs/ and the help of the launch scripts: their links, commands, keys and code map."""

import re
import shlex
import textwrap
from pathlib import Path

import numpy as np
import pytest

from psp_jax.command_line import PREEMPTED
from psp_jax.config import default_config, flatten
from psp_jax.config_check import load_config, resolve
from psp_jax.data.labels import LABEL_SPACES
from psp_jax.inference.protocols import PROTOCOLS
from psp_jax.losses import LOSSES
from psp_jax.main import parse_flags
from psp_jax.model.backbones import BACKBONES
from psp_jax.model.contexts import CONTEXTS
from psp_jax.optimizer import OPTIMIZERS
from psp_jax.state import setup

ROOT = Path(__file__).parents[1]
PAGES = {page.name: page.read_text() for page in sorted((ROOT / 'docs').glob('*.md'))}
TEXTS = PAGES | {'docs/README.md': PAGES.pop('README.md')} | {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / 'README.md', *sorted((ROOT / 'launch').iterdir()))
}  # fmt: skip


def commands_in(text: str) -> list[list[str]]:
    """The flags of every psp_jax.main in a text, behind the module or a launch script."""
    text = re.sub(r'\s*\\\n\s*', ' ', text)
    starts = (
        r'python -m psp_jax\.main',
        r'launch/local\.sh \d+',
        r'launch/slurm\.sbatch(?! --dry)',
        r'launch/tpu_pod\.sh run [^`\n]*? --',
        r'psp_jax:(?:cpu|tpu|cuda13)(?= --config)',
    )
    found = re.findall(rf'(?:{"|".join(starts)}) +(--[^`#\n]*)', text)
    return [shlex.split(flags) for flags in found]


EXAMPLES = [
    pytest.param(words, id=f'{name} {i}')
    for name, text in TEXTS.items()
    for i, words in enumerate(commands_in(text))
    if not {'...', '[flags'} & set(words) and 'ARGUMENTS' not in ' '.join(words)
]


@pytest.mark.parametrize('words', EXAMPLES)
def test_every_command_has_legal_flags_and_values(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags, overrides = parse_flags(words)
    if flags.config and not any('custom_imports' in word for word in overrides):
        load_config(flags.config, overrides)


def anchors(text: str) -> set[str]:
    """GitHub's anchors of a page's headings."""
    titles = re.findall(r'^#+ (.*)$', text, re.M)
    return {re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-') for title in titles}


@pytest.mark.parametrize('name', [name for name in TEXTS if name.endswith('.md')])
def test_every_link_leads_somewhere(name):
    page = ROOT / name if '/' in name or name == 'README.md' else ROOT / 'docs' / name
    for target, anchor in re.findall(r'\]\(([^)#]*)#?([^)]*)\)', page.read_text()):
        if '://' not in target:
            linked = (page.parent / target) if target else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked.read_text()), f'{target}#{anchor}'
    for path in re.findall(r'`((?:launch|configs|notebooks)/[\w.]+\.\w+)', page.read_text()):
        assert path == 'configs/NAME.py' or (ROOT / path).exists(), path


def test_every_page_is_in_the_index():
    linked = set(re.findall(r'\]\((\w+\.md)\)', TEXTS['docs/README.md']))
    assert linked == set(PAGES)


def test_the_readme_fits_on_a_few_screens():
    assert TEXTS['README.md'].count('\n') <= 180


def test_the_code_map_names_every_file():
    tree = TEXTS['README.md'].split('## The code')[1]
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'psp_jax').rglob('*.py')}
    folders = ('psp_jax/datasets', 'psp_jax/data/check', 'psp_jax/data/convert')
    names = {Path(f).name for f in files if '__' not in f and not f.startswith(folders)}
    named = set(re.findall(r'\b(\w+\.py)\b', tree)) - {'X.py', 'test_X.py'}
    assert names <= named <= {Path(f).name for f in files}


def test_configuration_page_names_the_groups_that_exist():
    groups = {key.partition('.')[0] for key in flatten(default_config()) if '.' in key}
    section = PAGES['configuration.md'].split('## The groups of keys')[1].split('\n## ')[0]
    assert set(re.findall(r'^\| `(\w+)` \|', section, re.M)) == groups


def test_scripts_and_the_page_on_exit_codes_name_the_code_of_a_preemption():
    for name in ('exit_codes.md', 'launch/local.sh', 'launch/tpu_pod.sh', 'launch/slurm.sbatch'):
        assert re.search(rf'\b{PREEMPTED}\b', TEXTS[name]), name


TABLES = (BACKBONES, CONTEXTS, LOSSES, OPTIMIZERS, LABEL_SPACES, PROTOCOLS)


def test_the_examples_of_extending_add_one_entry_to_each_table():
    before = [dict(table) for table in TABLES]
    for block in re.findall(r'(?:^(?:    .*)?\n)+', PAGES['extending.md'], re.M):
        if re.search(r'^    (import|from) ', block, re.M):
            exec(textwrap.dedent(block), {})
    try:
        assert [len(table) - len(old) for table, old in zip(TABLES, before, strict=True)] == [1] * 6
        config = resolve({'data.classes': 'roads', 'model.context': 'aspp', 'data.crop': 33})
        shapes = setup(config).variables['params']['aspp']
        assert shapes['branch1_conv']['kernel'].shape == (3, 3, 2048, 256)
        loss, weight = LOSSES['focal'](np.zeros((2, 3)), np.array([1, 255], np.uint8))
        assert loss == pytest.approx((2 / 3) ** 2 * np.log(3)) and weight == 1
    finally:
        for table, old in zip(TABLES, before, strict=True):
            table.clear()
            table.update(old)
