"""lineage.json: where a run came from, so that every number can be traced to its parents, data and versions."""

import datetime
import hashlib
import importlib.metadata
import json
import resource
import sys

import jax

from nanovision_jax.data.sources import provenance
from nanovision_jax.errors import UserError
from nanovision_jax.parallel import hosts
from nanovision_jax.runs.checkpoint import former_tree_digest, tree_digest
from nanovision_jax.runs.config_file import to_json
from nanovision_jax.runs.folder import Paths, locate, portable, read_json, weights_digest, write_whole

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'tokenizers', 'numpy', 'pillow')


def begin(config, tokenizer, sources, mesh, dtype, frozen, rows, start):
    """Writes lineage.json at the start of a run, or adds a session to it when a run goes on from step `start`.

    sources: what the run starts from (start.find), proven. frozen: {part: parameters} of what does not learn. rows:
    what the rows' identity() says. Returns the digests of the frozen parts. Raises UserError if a run that goes on
    would do so with another tokenizer, template, preprocessing or frozen part, or other data, order or packing of rows.
    """
    file = Paths(config.run_dir).lineage
    record = _record(config, tokenizer) | {
        'parents': [_parent(config, source) for source in sources],
        'frozen_before': digests(frozen),
        'rows': rows,
        'sessions': [],
    }
    if start and file.exists():
        former = {'template': tokenizer.template.former}
        record = _going_on(config, read_json(file), record, frozen, former)
    devices = jax.devices()
    if record['sessions'] and (before := record['sessions'][-1].get('dtype', dtype)) != dtype:
        print(f'compute was in {before} in the last session, and is in {dtype} now (dtype={config.dtype})')
    record['sessions'].append(
        {
            'started': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
            'versions': {name: importlib.metadata.version(name) for name in PACKAGES},
            'devices': f'{len(devices)} × {devices[0].device_kind}',
            'mesh': dict(mesh.shape),
            'dtype': dtype,
            'config': hashlib.sha256(to_json(config).encode()).hexdigest(),  # of config.json as this session writes it
        }
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    _write(file, record)
    return record['frozen_before']


def digests(frozen):
    """{part: digest} of the parts of a tree of parameters."""
    return {name: tree_digest(part) for name, part in frozen.items()}


def _going_on(config, before, now, frozen, former):
    """lineage.json of a run that goes on, after what must not have changed was compared.

    former: {name: other digests that mean the same}.
    """
    same = now['frozen_before']
    if not all(digest.startswith('2:') for digest in before['frozen_before'].values()):  # of an older run
        same = {name: former_tree_digest(part) for name, part in frozen.items()}
    for name in ('tokenizer', 'template', 'preprocessing', 'frozen_before'):
        if before[name] not in (same if name == 'frozen_before' else now[name], *former.get(name, ())):
            raise UserError(
                f'{config.run_dir} was trained with another {name} than it would go on with (lineage.json): '
                'say --anew to start again.'
            )
    changed = [name for name, told in before.get('rows', {}).items() if now['rows'].get(name) != told]
    if changed:
        raise UserError(
            f'{config.run_dir} would go on with other rows than it began with ({" and ".join(changed)} changed): give '
            f'it what it had, or start a new run with --config.init_from={config.run_dir} and another --config.name.'
        )
    for parent in before['parents']:
        parent['run'] = portable(locate(config.run_dir, parent['run']), config.run_dir)
    return before | {name: now[name] for name in ('template', 'frozen_before', 'rows', 'data')}


def _parent(config, source):
    place, part = source.place(config.run_dir), source.part or 'all'
    return {'run': place, 'step': source.step, 'part': part, 'manifest': source.digest()}


def imported(config, tokenizer, source, step):
    """Writes lineage.json of a run that was converted, at `step`, from `source`: a file or folder of weights."""
    record = _record(config, tokenizer)
    parent = {'run': portable(source, config.run_dir), 'step': None, 'part': 'all'}
    parent |= {'manifest': weights_digest(source)}
    record |= {'parents': [parent], 'frozen_before': {}, 'sessions': [], 'finished': step}
    _write(Paths(config.run_dir).lineage, record)


def _record(config, tokenizer):
    """What a run is made with, whatever it starts from."""
    vision = config.model.vision
    places = {name: portable(getattr(config.data, name), config.run_dir) for name in ('path', 'images')}
    places = {name: place if getattr(config.data, name) else '' for name, place in places.items()}
    preprocessing = [vision.image_size, vision.fit, vision.resample, vision.mean, vision.std]
    return {
        'stage': config.stage,
        'tokenizer': tokenizer.digest,
        'template': tokenizer.template.digest,
        'preprocessing': hashlib.sha256(json.dumps(preprocessing).encode()).hexdigest(),
        'data': provenance(config.data) | places,
    }


def end(config, step, frozen, peak_memory):
    """Completes lineage.json when a run is finished."""
    file = Paths(config.run_dir).lineage
    record = read_json(file)
    unit = 1 if sys.platform == 'darwin' else 1024  # Linux counts in KiB
    peak_host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    record |= {'finished': step, 'frozen_after': frozen, 'peak_device_bytes': peak_memory, 'peak_host_bytes': peak_host}
    _write(file, record)


def _write(file, record):
    if hosts.is_first():
        write_whole(file, json.dumps(record, indent=1) + '\n')
