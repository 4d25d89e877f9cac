"""Scripts and manifests that start a run on many machines.

There is no cluster here. Programs that replace python, gcloud, srun and scontrol record how they
are called and do what a test tells them.
"""

import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from psp_jax.command_line import NOT_JOINED, PREEMPTED
from psp_jax.config_check import load_config
from psp_jax.main import parse_flags

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / 'launch'
SCRIPTS = ('local.sh', 'tpu_pod.sh', 'slurm.sbatch')
MANIFESTS = ('gke_jobset.yaml', 'gke_jobset_gpu.yaml')
FLAGS = ['--config', 'configs/scenes.py', '--config.data.crop=(65, 129)', '--workdir', 'gs://b/r']
linux = pytest.mark.skipif(sys.platform != 'linux', reason='TPU hosts run Linux')


@pytest.fixture(autouse=True, scope='module')
def _signals_as_at_a_terminal() -> Iterator[None]:
    """Tests may run where SIGINT is ignored, as in the background; children would inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def call(script: str, *words: object, **variables: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        ['bash', LAUNCH / script, *map(str, words)],
        env=clean() | {name: str(value) for name, value in variables.items()},
        capture_output=True,
        text=True,
        timeout=60,
    )


def clean() -> dict[str, str]:
    """The environment without the variables that scripts read."""
    ours = ('SLURM_', 'JAX_', 'ZONE', 'PYTHON', 'DEVICES', 'PORT', 'POLL', 'RETRY_AFTER')
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def printed(result: subprocess.CompletedProcess) -> list[list[str]]:
    """The commands that a script printed, each as a list of words."""
    lines = [line for line in result.stderr.splitlines() if not re.match(r'[\w.]+: ', line)]
    words = shlex.split('\n'.join(lines))
    return [list(group) for is_mark, group in itertools.groupby(words, '+'.__eq__) if not is_mark]


def option(words: list[str], name: str) -> str:
    """The value of the only `name VALUE` or `name=VALUE`."""
    values = [b for a, b in itertools.pairwise(words) if a == name]
    values += [word.removeprefix(f'{name}=') for word in words if word.startswith(f'{name}=')]
    (value,) = values
    return value


def fake(folder: Path, name: str, code: str) -> Path:
    """A program of that name. It is Python without packages, which starts at once."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f'#!{sys.executable} -IS\nimport json, os, signal, sys, time\n{code}')
    path.chmod(0o755)
    return path


def no_such_commands(tmp_path: Path) -> str:
    """A PATH whose gcloud, srun and others write a file: a dry run must not call them."""
    for name in ('gcloud', 'srun', 'scontrol', 'kubectl'):
        fake(tmp_path / 'bin', name, f'open({str(tmp_path / "was called")!r}, "w")')
    return f'{tmp_path / "bin"}:{os.environ["PATH"]}'


# ---- All scripts


@pytest.mark.parametrize('script', SCRIPTS)
def test_shellcheck_has_nothing_to_say(script):
    program = shutil.which('shellcheck', path=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    assert program, 'pip install -r requirements-test.txt'
    result = subprocess.run([program, LAUNCH / script], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, '')


@pytest.mark.parametrize('script', SCRIPTS)
def test_scripts_can_be_run_and_explain_themselves(script):
    assert script == 'slurm.sbatch' or os.access(LAUNCH / script, os.X_OK)
    result = call(script, '--help')
    assert result.returncode == 0 and result.stderr == ''
    assert result.stdout.startswith('usage: ') and '--dry-run' in result.stdout


@pytest.mark.parametrize(
    'script, words, error',
    [
        ('local.sh', ['--config', 'c'], 'N=--config: the number of processes comes before all'),
        ('tpu_pod.sh', ['start', 'r50'], 'COMMAND=start: must be create, run,'),
        ('tpu_pod.sh', ['create', 'r50'], '--zone is missing'),
        ('tpu_pod.sh', ['run', 'r50', '--config', 'c'], 'flag --config is unknown; flags of psp'),
        ('tpu_pod.sh', ['run', 'r50', '--zone', 'z'], 'run needs the flags of psp_jax.main after'),
        ('tpu_pod.sh', ['create', 'r50', '--type=v9-8', '--zone=z'], '--type=v9-8: give the --run'),
        ('slurm.sbatch', FLAGS, 'this is not a Slurm job; use sbatch'),
    ],
)
def test_wrong_use_is_one_line_that_says_what_to_do(tmp_path, script, words, error):
    result = call(script, *words, PATH=no_such_commands(tmp_path))
    assert result.returncode == 2
    assert result.stderr.startswith(f'{script}: error: ') and error in result.stderr
    assert result.stderr.count('\n') == 1 and '(see --help)' in result.stderr


# ---- launch/local.sh

# Process I does what word I of --plan says: exit CODE, or wait for a signal.
PYTHON = """
if sys.argv[1] == '-c':
    print(4242)
    sys.exit()
words = sys.argv[sys.argv.index('--process_id') + 1:]
plan = words[2].split(',')[int(words[0])]
def handle(number, frame):
    print('got', signal.Signals(number).name, flush=True)
    sys.exit({signal.SIGTERM: 75, signal.SIGINT: 130}[number])
signal.signal(signal.SIGTERM, handle)
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
signal.signal(signal.SIGINT, handle)
print('devices', os.environ['JAX_NUM_CPU_DEVICES'], os.environ['JAX_PLATFORMS'], flush=True)
if plan != 'wait':
    sys.exit(int(plan))
while True:
    time.sleep(1)
"""


def test_local_dry_run_prints_a_command_for_each_process(tmp_path):
    result = call(
        'local.sh', '--dry-run', 2, *FLAGS, PYTHON='python3', PORT=1234, DEVICES=4,
        PATH=no_such_commands(tmp_path),
    )  # fmt: skip
    place = ['--coordinator_address', 'localhost:1234', '--num_processes', '2', '--process_id']
    main = ['python3', '-m', 'psp_jax.main']
    assert printed(result) == [main + place + [i] + FLAGS for i in '01']
    assert result.returncode == 0 and result.stdout == ''
    assert '2 processes with 4 device(s) each, JAX_PLATFORMS=cpu' in result.stderr


@pytest.mark.parametrize(
    'plan, code',
    [
        ('0,0', 0),
        ('0,1', 1),
        ('1,2', 2),  # the user must correct something
        ('1,75', 75),  # a preemption, which the other process notices as a lost peer
        ('75,2', 2),
        ('3,4', 3),
    ],
)
def test_local_exit_code_says_what_to_do_next(tmp_path, plan, code):
    python = fake(tmp_path, 'python', PYTHON)
    result = call('local.sh', 2, '--plan', plan, PYTHON=python, DEVICES=4)
    assert result.returncode == code, result.stderr
    assert sorted(result.stdout.splitlines()) == ['1| devices 4 cpu', 'devices 4 cpu']


@pytest.mark.parametrize('sent, code', [('SIGTERM', PREEMPTED), ('SIGINT', 130)])
def test_local_passes_signals_on_to_all_processes_and_waits(tmp_path, sent, code):
    python = fake(tmp_path, 'python', PYTHON)
    with subprocess.Popen(
        ['bash', LAUNCH / 'local.sh', '2', '--plan', 'wait,wait'],
        env=clean() | {'PYTHON': str(python)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as script:
        lines = {script.stdout.readline() for _ in range(2)}
        assert lines == {'devices 1 cpu\n', '1| devices 1 cpu\n'}
        script.send_signal(signal.Signals[sent])
        assert set(script.stdout.read().splitlines()) == {f'got {sent}', f'1| got {sent}'}
    assert script.returncode == code


# ---- launch/tpu_pod.sh

# Knows one slice. PLAN has the state of its request and node, and what happens in each training.
GCLOUD = """
path = os.environ['PLAN']
plan = json.load(open(path))
words = sys.argv[1:]
kind, verb = words[2:4]
code, text = 0, ''
if verb == 'describe':
    text = plan['request'] if kind == 'queued-resources' else plan['node']
    if not text:
        print('ERROR: NOT_FOUND: Resource was not found', file=sys.stderr)
        code = 1
elif verb == 'create':
    plan['request'], plan['node'] = plan['becomes']
elif verb == 'delete':
    plan['request'] = plan['node'] = ''
elif verb == 'ssh' and 'psp_jax.main --config' in words[-1]:
    code, plan['request'], plan['node'] = plan['trainings'].pop(0)
elif verb == 'ssh' and 'kill -TERM' in words[-1]:
    code = plan['stop']
plan['calls'].append([kind, verb])
json.dump(plan, open(path, 'w'))
print('WARNING: there is a newer gcloud', file=sys.stderr)
print(text)
sys.exit(code)
"""
THERE = ('ACTIVE', 'READY')
GONE = ('SUSPENDED', '')
CREATE, DELETE = ['queued-resources', 'create'], ['queued-resources', 'delete']
COPY, ON_HOSTS = ['tpu-vm', 'scp'], ['tpu-vm', 'ssh']
TRAIN, START = [ON_HOSTS], [COPY, ON_HOSTS, ON_HOSTS]  # START: copy, install, train


def tpu_pod(
    tmp_path: Path, command: str, *options: str, now: tuple = ('', ''), **plan: Any
) -> tuple[subprocess.CompletedProcess, list]:
    """Calls tpu_pod.sh with the fake gcloud; returns the result and all calls but `describe`."""
    fake(tmp_path / 'bin', 'gcloud', GCLOUD)
    plan = {
        'request': now[0],
        'node': now[1],
        'becomes': THERE,
        'trainings': [],
        'calls': [],
    } | plan
    (tmp_path / 'plan').write_text(json.dumps(plan))
    result = call(
        'tpu_pod.sh', command, 'r50', '--zone=z', *options, '--', *FLAGS,
        PATH=f'{tmp_path / "bin"}:{os.environ["PATH"]}', PLAN=tmp_path / 'plan', POLL=0,
        RETRY_AFTER=plan.get('retry_after', 600), MAX_CRASHES=2,
    )  # fmt: skip
    after = json.loads((tmp_path / 'plan').read_text())
    assert after['trainings'] == []
    return result, [call for call in after['calls'] if call[1] != 'describe']


def test_tpu_pod_dry_run_prints_what_run_would_do(tmp_path):
    result = call(
        'tpu_pod.sh', 'run', 'r50', '--zone', 'us-west4-a', '--type', 'v5litepod-16', '--dry-run',
        '--', *FLAGS, PATH=no_such_commands(tmp_path),
    )  # fmt: skip
    assert result.returncode == 0 and not (tmp_path / 'was called').exists()
    create, pack, copy, install, train = printed(result)
    for command in (create, copy, install, train):
        assert command[:3] == ['gcloud', 'compute', 'tpus']
        assert option(command, '--zone') == 'us-west4-a'
    assert create[3:6] == ['queued-resources', 'create', 'r50'] and '--spot' in create
    assert option(create, '--node-id') == 'r50'
    assert option(create, '--accelerator-type') == 'v5litepod-16'
    assert option(create, '--runtime-version') == 'v2-alpha-tpuv5-lite'
    assert pack[0] == 'tar' and {'psp_jax', 'configs', 'requirements.txt'} <= set(pack)
    assert copy[3:5] == ['tpu-vm', 'scp'] and copy[6] == 'r50:psp_jax.tgz'
    for command in (install, train):
        assert command[3:6] == ['tpu-vm', 'ssh', 'r50'] and option(command, '--worker') == 'all'
    assert '-r requirements.txt "jax[tpu]"' in option(install, '--command')
    first = option(train, '--command').splitlines()[0]
    assert shlex.split(first)[2:] == ['.venv/bin/python', '-m', 'psp_jax.main', *FLAGS]


def test_tpu_pod_dry_run_of_the_other_commands(tmp_path):
    def commands(*words: str) -> list[list[str]]:
        result = call('tpu_pod.sh', *words, '--dry-run', ZONE='z', PATH=no_such_commands(tmp_path))
        assert result.returncode == 0 and not (tmp_path / 'was called').exists()
        return printed(result)

    (create,) = commands('create', 'r50', '--on-demand', '--type', 'v6e-8')
    assert '--spot' not in create and option(create, '--runtime-version') == 'v2-alpha-tpuv6e'
    (logs,) = commands('logs', 'r50', '--worker', '3')
    assert option(logs, '--worker') == '3'
    assert [words[4] for words in commands('status', 'r50')] == ['describe', 'describe', 'ssh']
    assert [words[4] for words in commands('delete', 'r50')] == ['ssh', 'delete']


def test_tpu_pod_starts_again_after_each_preemption(tmp_path):
    """A preemption shows as 75, as a lost connection, or as a crash of the hosts that are left."""
    ends = [(PREEMPTED, *GONE), (255, *GONE), (1, 'ACTIVE', 'PREEMPTED'), (0, *THERE)]
    result, calls = tpu_pod(tmp_path, 'run', trainings=ends)
    assert result.returncode == 0, result.stderr
    assert calls == [CREATE, *START] + [DELETE, CREATE, *START] * 3
    assert 'the run is finished' in result.stderr and 'costs money' in result.stderr


def test_tpu_pod_installs_once_if_the_slice_stays(tmp_path):
    ends = [(255, *THERE), (PREEMPTED, *THERE), (0, *THERE)]
    result, calls = tpu_pod(tmp_path, 'run', now=THERE, trainings=ends)
    assert result.returncode == 0 and calls == [*START, *TRAIN, *TRAIN]


@pytest.mark.parametrize('code', [0, 2, 1, 134])
def test_tpu_pod_stops_if_trying_again_would_not_help(tmp_path, code):
    result, calls = tpu_pod(tmp_path, 'run', '--delete-at-end', trainings=[(code, *THERE)])
    assert result.returncode == code and calls == [CREATE, *START, DELETE]


def test_tpu_pod_does_not_repeat_a_request_that_failed(tmp_path):
    result, calls = tpu_pod(tmp_path, 'run', becomes=('FAILED', ''))
    assert result.returncode == 1 and calls == [CREATE]
    assert 'the request failed' in result.stderr


@pytest.mark.parametrize('code, retry_after', [(134, 0), (NOT_JOINED, 600)])
def test_tpu_pod_gives_up_after_many_crashes(tmp_path, code, retry_after):
    ends = [(code, *THERE)] * 3
    result, calls = tpu_pod(tmp_path, 'run', now=THERE, trainings=ends, retry_after=retry_after)
    assert result.returncode == code and calls == [*START, *TRAIN, *TRAIN]
    assert f'ended with {code} after' in result.stderr and 'crash number 3' in result.stderr


@pytest.mark.parametrize('stop', [0, 255])
def test_tpu_pod_stops_the_run_before_it_deletes_the_slice(tmp_path, stop):
    result, calls = tpu_pod(tmp_path, 'delete', now=THERE, stop=stop)
    assert result.returncode == 0 and calls == [ON_HOSTS, DELETE]
    assert ('could not be stopped' in result.stderr) == (stop != 0)


def on_host(command: str, home: Path) -> subprocess.Popen:
    return subprocess.Popen(
        ['bash', '-c', command],
        cwd=home,
        env=clean(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@linux
def test_tpu_pod_run_survives_a_lost_connection(tmp_path):
    """Runs the commands for the hosts in the shell that they are written for."""
    dry_run = printed(call('tpu_pod.sh', 'run', 'n', '--zone', 'z', '--dry-run', '--', 'one word'))
    train = option(dry_run[-1], '--command')
    dry_run = printed(call('tpu_pod.sh', 'delete', 'n', '--zone', 'z', '--dry-run'))
    stop = option(dry_run[0], '--command')
    code = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print('hello', sys.argv[3:], flush=True)
for i in range(400):
    time.sleep(0.05)
"""
    (tmp_path / 'psp_jax' / '.venv').mkdir(parents=True)
    fake(tmp_path / 'psp_jax' / '.venv' / 'bin', 'python', code)
    first = on_host(train, tmp_path)
    assert first.stdout.readline() == "hello ['one word']\n"
    process = int((tmp_path / 'psp_jax' / 'run.process').read_text())
    first.kill()  # the connection is lost
    first.wait()
    second = on_host(train, tmp_path)
    assert second.stdout.readline().startswith(f'following process {process} on ')
    assert on_host(stop, tmp_path).wait(30) == 0
    assert second.wait(30) == PREEMPTED
    assert (tmp_path / 'psp_jax' / 'run.log').read_text() == "hello ['one word']\n"
    assert on_host(stop, tmp_path).wait(30) == 0  # nothing is running


# ---- launch/slurm.sbatch


def test_slurm_requests_a_process_for_each_gpu_and_a_warning_before_the_end():
    lines = re.findall(r'^#SBATCH --([\w-]+)=?(.*)$', (LAUNCH / 'slurm.sbatch').read_text(), re.M)
    asked = dict(lines)
    assert asked['ntasks-per-node'] == asked['gpus-per-node']
    assert 'exclusive' in asked and not {'gpus-per-task', 'gpu-bind', 'gpus'} & set(asked)
    sent = re.fullmatch(r'TERM@(\d+)', asked['signal'])  # B: would be for the batch shell alone
    assert sent and 60 <= int(sent[1]) <= 65535
    assert 'requeue' in asked and asked['open-mode'] == 'append'


def test_slurm_dry_run_prints_the_command(tmp_path):
    result = call(
        'slurm.sbatch', '--dry-run', *FLAGS, PYTHON='python3', SLURM_CPUS_PER_TASK=7,
        PATH=no_such_commands(tmp_path),
    )  # fmt: skip
    (words,) = printed(result)
    assert words[0] == 'srun' and option(words, '--cpus-per-task') == '7'
    assert option(words, '--kill-on-bad-exit') == '0' and option(words, '--gpu-bind') == 'none'
    main = words[words.index('python3') :]
    assert main == ['python3', '-m', 'psp_jax.main', '--config.data.threads=7', *FLAGS]
    assert result.returncode == 0 and not (tmp_path / 'was called').exists()


@pytest.mark.parametrize(
    'code, variables, requeued',
    [
        (0, {'RETRY_AFTER': '0'}, False),
        (2, {'RETRY_AFTER': '0'}, False),
        (134, {}, False),
        (134, {'RETRY_AFTER': '0'}, True),
        (NOT_JOINED, {}, True),
        (NOT_JOINED, {'SLURM_RESTART_COUNT': '50'}, False),
        (PREEMPTED, {}, True),
        (PREEMPTED, {'CANCEL': '1'}, False),  # scancel sends SIGTERM to the batch script too
    ],
)
def test_slurm_requeues_preempted_jobs_and_late_crashes(tmp_path, code, variables, requeued):
    asked = tmp_path / 'requeued'
    cancel = "if 'CANCEL' in os.environ: os.kill(os.getppid(), signal.SIGTERM)"
    fake(tmp_path / 'bin', 'srun', f'{cancel}\nsys.exit({code})')
    fake(tmp_path / 'bin', 'scontrol', f'open({str(asked)!r}, "w").write(str(sys.argv[1:]))')
    path = f'{tmp_path / "bin"}:{os.environ["PATH"]}'
    result = call('slurm.sbatch', *FLAGS, SLURM_JOB_ID=17, PATH=path, **variables)
    assert result.returncode == code and asked.exists() == requeued
    assert not requeued or asked.read_text() == "['requeue', '17']"


# ---- launch/*.yaml


def manifest(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(the JobSet, its only kind of job, the container of its pods)"""
    jobset = yaml.safe_load((LAUNCH / name).read_text())
    (jobs,) = jobset['spec']['replicatedJobs']
    (container,) = jobs['template']['spec']['template']['spec']['containers']
    return jobset, jobs, container


@pytest.mark.parametrize(
    'name, resource', list(zip(MANIFESTS, ('google.com/tpu', 'nvidia.com/gpu'), strict=True))
)
def test_gke_flags_are_legal_and_the_batch_divides_by_all_devices(name, resource, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, jobs, container = manifest(name)
    flags, overrides = parse_flags(container['args'])
    config = load_config(flags.config, overrides)
    assert flags.workdir.startswith('gs://BUCKET/') and config.data.root == 'gs://BUCKET/tfds'
    job = jobs['template']['spec']
    devices = job['parallelism'] * container['resources']['limits'][resource]
    assert config.batch_size % (devices * jobs['replicas']) == 0
    if resource == 'google.com/tpu':  # chips times hosts is the topology
        selector = job['template']['spec']['nodeSelector']
        sides = selector['cloud.google.com/gke-tpu-topology'].split('x')
        assert devices == math.prod(map(int, sides))
        assert job['parallelism'] > 1  # GKE joins only slices of several hosts


def test_gke_gpu_processes_know_how_many_they_are_and_where_process_0_is():
    jobset, jobs, container = manifest('gke_jobset_gpu.yaml')
    variables = {entry['name']: entry for entry in container['env']}
    assert jobs['replicas'] == 1
    assert variables['JAX_NUM_PROCESSES']['value'] == str(jobs['template']['spec']['parallelism'])

    def annotation(name: str) -> str:
        field = variables[name]['valueFrom']['fieldRef']['fieldPath']
        return re.fullmatch(r"metadata\.annotations\['(.+)'\]", field)[1]

    assert annotation('JAX_PROCESS_ID') == 'batch.kubernetes.io/job-completion-index'
    assert annotation('COORDINATOR') == 'jobset.sigs.k8s.io/coordinator'
    port = container['ports'][0]['containerPort']
    assert variables['JAX_COORDINATOR_ADDRESS']['value'] == f'$(COORDINATOR):{port}'
    order = list(variables)  # a variable may use only those before it
    assert order.index('COORDINATOR') < order.index('JAX_COORDINATOR_ADDRESS')
    place = {'replicatedJob': jobs['name'], 'jobIndex': 0, 'podIndex': 0}
    assert jobset['spec']['coordinator'] == place


@pytest.mark.parametrize('name', MANIFESTS)
def test_gke_exit_codes_decide_what_happens_next(name):
    jobset, jobs, container = manifest(name)
    job = jobs['template']['spec']
    pod = job['template']['spec']
    assert job['completions'] == job['parallelism'] and job['completionMode'] == 'Indexed'
    assert pod['restartPolicy'] == 'Never'  # podFailurePolicy needs it
    assert job['backoffLimit'] == 0 and jobset['spec']['failurePolicy']['maxRestarts'] > 0
    by_code = {}
    for rule in job['podFailurePolicy']['rules']:
        if 'onExitCodes' in rule:
            assert rule['onExitCodes']['containerName'] == container['name']
            by_code |= dict.fromkeys(rule['onExitCodes']['values'], rule['action'])
        else:
            assert rule['onPodConditions'] == [{'type': 'DisruptionTarget', 'status': 'True'}]
            assert rule['action'] == 'Ignore'
    assert by_code == {2: 'FailJob', NOT_JOINED: 'Ignore', PREEMPTED: 'Ignore'}
    (rule,) = jobset['spec']['failurePolicy']['rules']
    assert (rule['action'], rule['onJobFailureReasons']) == ('FailJobSet', ['PodFailurePolicy'])
    assert pod['terminationGracePeriodSeconds'] >= 60


# ---- launch/Dockerfile


@pytest.mark.parametrize(
    'accelerator, installed',
    [('cpu', ''), ('tpu', ' jax[tpu]'), ('cuda13', ' jax[cuda13]'), ('gpu', None)],
)
def test_docker_image_is_for_one_accelerator(tmp_path, accelerator, installed):
    """Runs the lines that install, with another program in place of pip."""
    text = (LAUNCH / 'Dockerfile').read_text()
    lines = re.search(r'RUN (case .*?[^\\])\n', text, re.S)[1].replace('\\\n', ' ')
    fake(tmp_path, 'pip', 'print(*sys.argv[1:])')
    path = f'{tmp_path}:{os.environ["PATH"]}'
    result = subprocess.run(
        ['sh', '-c', lines],
        env={'PATH': path, 'ACCELERATOR': accelerator},
        capture_output=True,
        text=True,
    )
    if installed is None:
        assert result.returncode == 2 and 'must be cpu, tpu or cuda13' in result.stderr
    else:
        assert result.stdout.endswith(f'-r requirements.txt{installed}\n')


# ---- Two real processes


@pytest.mark.slow
def test_two_processes_train_stop_at_sigterm_and_go_on(tmp_path: Path, programs: dict[str, str]):
    flags = {
        'batch_size': 2, 'total_steps': 9999, 'log_every': 1, 'checkpoint_every': 9999,
        'eval_every': 9999, 'data.train': '0:64', 'data.val': '1000000:1000002', 'data.crop': 33,
        'model.head_width': 16, 'model.aux_width': 8, 'model.stem': 'deep_small',
    }  # fmt: skip
    words = ['--config', 'configs/scenes.py', '--workdir', str(tmp_path / 'run')]
    words += [f'--config.{name}={value}' for name, value in flags.items()]

    def train(stop_at: str) -> tuple[int, str]:
        """Exit code and output of a run that gets SIGTERM when it prints `stop_at`."""
        text = ''
        with subprocess.Popen(
            ['bash', LAUNCH / 'local.sh', '2', *words],
            cwd=ROOT,
            env=clean() | programs | {'PYTHON': sys.executable},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as script:
            late = threading.Timer(400, script.terminate)
            late.start()
            for line in script.stdout:
                text += line
                if line.startswith(stop_at):
                    script.terminate()
            late.cancel()
        return script.returncode, text

    code, text = train('step    2/9999 ')
    assert code == PREEMPTED, text
    assert '2 cpu device(s), 2 process(es)' in text
    (saved,) = [int(path.name) for path in (tmp_path / 'run' / 'checkpoints').glob('[0-9]*')]
    assert 2 <= saved < 9999
    code, text = train(f'step {saved + 1:>4}/9999 ')
    assert code == PREEMPTED and f'continuing from step {saved} ' in text, text
    assert 'step    1/9999 ' not in text
