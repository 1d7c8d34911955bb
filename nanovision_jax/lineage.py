"""lineage.json: where a run came from, so that every number can be traced to its parents, data and versions."""

import datetime
import hashlib
import importlib.metadata
import json
import pathlib
import resource

import jax

from nanovision_jax.checkpoint import file_digest
from nanovision_jax.data.sources import provenance
from nanovision_jax.data.tokenizer import TEMPLATE_DIGEST
from nanovision_jax.errors import UserError

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'tokenizers', 'numpy', 'pillow')


def begin(config, tokenizer, inherited, mesh, frozen, start):
    """Writes lineage.json at the start of a run, or adds a session to it when a run goes on from step `start`.

    Raises UserError if a run that goes on would do so with another tokenizer, template, preprocessing or frozen part.
    """
    file = pathlib.Path(config.run_dir) / 'lineage.json'
    record = _record(config, tokenizer) | {
        'parents': [
            {
                'run': str(parent.run_dir),
                'step': parent.step,
                'part': parent.part or 'all',
                'manifest': _digest(parent),
            }
            for parent in inherited
        ],
        'frozen_before': frozen,
        'sessions': [],
    }
    if start and file.exists():
        now, record = record, json.loads(file.read_text())
        for name in ('tokenizer', 'template', 'preprocessing', 'frozen_before'):
            if now[name] != record[name]:
                raise UserError(
                    f'{config.run_dir} was trained with another {name} than it would go on with (lineage.json): '
                    'say --anew to start again.'
                )
    devices = jax.devices()
    record['sessions'].append(
        {
            'started': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
            'versions': {name: importlib.metadata.version(name) for name in PACKAGES},
            'devices': f'{len(devices)} × {devices[0].device_kind}',
            'mesh': dict(mesh.shape),
        }
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + '\n')


def imported(config, tokenizer, source, step):
    """Writes lineage.json of a run that was converted, at `step`, from `source`: a file or folder of weights."""
    record = _record(config, tokenizer)
    parent = {'run': str(source), 'step': None, 'part': 'all', 'manifest': weights_digest(source)}
    record |= {'parents': [parent], 'frozen_before': {}, 'sessions': [], 'finished': step}
    (pathlib.Path(config.run_dir) / 'lineage.json').write_text(json.dumps(record, indent=1) + '\n')


def _record(config, tokenizer):
    """What a run is made with, whatever it starts from."""
    vision = config.model.vision
    preprocessing = [vision.image_size, vision.fit, vision.resample, vision.mean, vision.std]
    return {
        'stage': config.stage,
        'tokenizer': tokenizer.digest,
        'template': TEMPLATE_DIGEST,
        'preprocessing': hashlib.sha256(json.dumps(preprocessing).encode()).hexdigest(),
        'data': provenance(config.data),
    }


def _digest(parent):
    """The digest of what a parent's parameters were read from."""
    if parent.step is not None:
        return file_digest(parent.run_dir / 'checkpoints' / str(parent.step) / 'manifest.json')
    return weights_digest(parent.run_dir)


def weights_digest(source):
    """The sha256, in hex, of a file of weights, or over those of a folder's safetensors."""
    if source.is_file():
        return file_digest(source)
    return hashlib.sha256(''.join(map(file_digest, sorted(source.glob('*.safetensors')))).encode()).hexdigest()


def end(config, step, frozen, peak_memory):
    """Completes lineage.json when a run is finished."""
    file = pathlib.Path(config.run_dir) / 'lineage.json'
    record = json.loads(file.read_text())
    peak_host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    record |= {'finished': step, 'frozen_after': frozen, 'peak_device_bytes': peak_memory, 'peak_host_bytes': peak_host}
    file.write_text(json.dumps(record, indent=1) + '\n')
