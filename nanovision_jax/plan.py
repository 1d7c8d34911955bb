"""Says what a run will need, before anyone pays: memory, hours, dollars, and what is sent between devices.

    python -m nanovision_jax.plan --config=configs/pretrain.py --hardware=a100-80gx8 [--config.FIELD=VALUE …]
    python -m nanovision_jax.plan --config=configs/pretrain.py --hardware=h100x8 --road

Hardware: a100-80gxN, h100xN, h200xN, rtx4090xN, l4xN, tpu-v5e-N, tpu-v6e-N, cpu (the one at hand); planning/machines.py
has their figures, sources and dates. For TPUs the true step is compiled where libtpu is installed (the extra tpu), and
for the CPU at hand; for GPUs memory is counted, which is an estimate.

  --road          every stage whose config file lies beside this one, each with the given fields, and all together
  --mfu=0.4       the share of the peak that is taken to be reached, with what is sent between devices
  --price=DOLLARS a chip and hour, instead of the table's
  --flops=TFLOP/s --memory=GiB   of hardware of your own, --hardware=ownxN
  --measure       take ten steps of each stage on the devices at hand, instead of assuming
  --json          print objects instead of text
"""

import json
import math
import os
import pathlib

from nanovision_jax import cli
from nanovision_jax.errors import UserError
from nanovision_jax.parallel import huge_pages
from nanovision_jax.planning import machines
from nanovision_jax.stages import STAGES


def main(argv):
    """The command: see the module's docstring."""
    options = dict(hardware='', road=False, mfu='', price='', flops='', memory='', measure=False, json=False)
    config, flags = cli.parse(argv, __doc__, **options)
    mfu, price, flops, memory = (_number(name, flags[name]) for name in ('mfu', 'price', 'flops', 'memory'))
    if not flags['hardware']:
        raise UserError('which hardware? Say --hardware=a100-80gx8, h100x8, tpu-v5e-8, cpu …; see --help.')
    machine = machines.parse(flags['hardware'], price, flops or 0, memory or 0)
    if flags['measure'] and machine.chip:
        raise UserError('--measure takes steps on the devices at hand: say --hardware=cpu.')
    if mfu is not None and mfu > 1:
        raise UserError(f'--mfu is a share of the peak, at most 1, not {mfu:g}.')
    planned = [config]
    if flags['road']:
        given, told = cli.split(argv, [name for name, default in options.items() if not isinstance(default, bool)])
        path, _, size = told['config'].partition(':')
        fields = [field for field in given if field.startswith('--config.')]
        planned = [_stage(pathlib.Path(path).with_name(f'{stage}.py'), size, fields) for stage in STAGES]
    if machine.chip:  # it is not asked for, wherever this runs
        os.environ['JAX_PLATFORMS'] = 'cpu'
    from nanovision_jax.planning import estimate, text  # jax loads once the command line is read

    plans = []
    for one in planned:
        try:
            plans.append(estimate.plan(one, machine, mfu or estimate.MFU, flags['measure']))
        except UserError as error:
            raise UserError(f'{one.stage}: {error}') from error
    if flags['json']:
        print(json.dumps([text.as_json(one) for one in plans]))
    else:
        print('\n'.join(text.lines(plans)))


def _stage(file, size, fields):
    """The config of a stage's file, with the fields that were given."""
    if not file.is_file():
        raise UserError(f'--road plans every stage: there is no {file}.')
    return cli.parse([f'--config={file}{":" * bool(size)}{size}', *fields])[0]


def _number(name, text):
    """The number above 0 that an option is given; None where it is not given."""
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f'--{name} takes a number above 0, not {text!r}.')
    return value


if __name__ == '__main__':
    huge_pages.use()  # as training does, whose steps are measured
    cli.run(main)
