"""The quickstart's stages as they stand, on machines with one to eight devices."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from nanovision_jax.runs import folder as runfolder


@pytest.mark.slow
@pytest.mark.parametrize('devices', [1, 2, 4, 8])
def test_the_quickstart_s_stages_run_on_so_many_devices(devices, tmp_path):
    flags = f'--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0'
    environment = os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, str(ROOT / 'tests' / 'devices_driver.py'), str(tmp_path / 'tiny')]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for stage in ('clip', 'pretrain', 'sft', 'vision_pretrain', 'vision_instruct'):
        assert runfolder.newest(tmp_path / 'tiny' / stage) == 2
    used = runfolder.read_lineage(tmp_path / 'tiny' / 'vision_instruct')['sessions'][0]['mesh']['data']
    assert used == min(devices, 4)  # 36 rows do not divide by 8
    assert ('using 4 of 8 devices: 36 rows do not divide by 8' in done.stdout) == (devices == 8)
