"""Data in an object store, fetched once: data.path=s3://… or gs://…, and data.images.

    ~/.cache/nanovision_jax/data/<store>/<path>    as it lies there; XDG_CACHE_HOME names another folder than ~/.cache

Any store that fsspec knows will do. What is here whole is read without asking the store again; deleted, it is fetched
anew. A file of conversations whose pictures are looked up beside it comes with its folder. No jax is imported here.
"""

import concurrent.futures
import datetime
import os
import pathlib
import shutil
import time

from tqdm import tqdm

from nanovision_jax.caches import is_url, local
from nanovision_jax.errors import UserError
from nanovision_jax.runs import lock
from nanovision_jax.runs.folder import remove_partial, whole, write_whole
from nanovision_jax.stages import stage_of

AT_ONCE = 16  # files
PAUSES = (1, 2, 4, 8)  # seconds before a file that failed is asked for again


def fetch(config):
    """Brings what a config's data.path and data.images name in stores to this machine. Raises UserError."""
    data = config.data
    if data.prepared:
        places = [f'{data.path.rstrip("/")}/{part.name}' for part in data.prepared]
    elif data.source == 'conversations':
        places = conversations(data.path, data.images, stage_of(config).data != 'chat')
    else:
        places = [data.path]
    for place in places:
        fetched(place)


def conversations(path: str, images: str, shown: bool = True) -> list[str]:
    """What is to be fetched for a file of conversations: its folder where its pictures are looked up there."""
    if images or not shown:
        return [place for place in (path, images) if place]
    return [path.rstrip('/').rpartition('/')[0] if is_url(path) else path]


def fetched(place: str) -> str:
    """local(), fetched where it is not there whole. Raises UserError for what is not in the store or cannot be read."""
    target = pathlib.Path(local(place))
    if is_url(place) and not _is_whole(target):
        with lock.held(target.with_name(f'.{target.name}.lock'), f'the data of {place}', wait=True):
            if not _is_whole(target):  # another process may have fetched it while this one waited
                _fetch(place, target)
                write_whole(_record(target), f'{place}\n')
    return str(target)


def _is_whole(target):
    return target.exists() and any(_record(place).exists() for place in (target, *target.parents))


def _record(target):
    """The file that says that something was fetched whole."""
    return target.parent / f'.{target.name}.fetched'


def _fetch(place, target):
    files, found = _listed(place, target)
    for folder, *_ in os.walk(target):
        remove_partial(folder, untouched=60)  # of processes that were killed
    missing = {file: info for file, info in found.items() if not _is_here(file, info)}
    size = sum(info['size'] for info in missing.values())
    target.parent.mkdir(parents=True, exist_ok=True)
    if size > (free := shutil.disk_usage(target.parent).free):
        raise UserError(
            f'{place} is {size / 1e9:.1f} GB, and {target.parent} has {free / 1e9:.1f} GB free: make room, or set '
            'XDG_CACHE_HOME to a larger disk.'
        )
    print(f'fetching {place} into {target}: {len(missing):,} files, {size / 1e6:,.1f} MB')
    bar = tqdm(total=size, desc='fetching', unit='B', unit_scale=True, mininterval=1)
    with bar, concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        coming = [pool.submit(_get, files, file, info) for file, info in missing.items()]
        try:
            for one in concurrent.futures.as_completed(coming):
                bar.update(one.result())
        except Exception as error:  # whatever a store's library raises
            raise UserError(
                f'{place} cannot be fetched ({error}): the same command goes on where it stopped.'
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _listed(place, target):
    """(file system, {file here: what the store says of it})."""
    import fsspec  # which every command would load

    try:
        files, root = fsspec.core.url_to_fs(place)
        listed = {root: files.info(root)} if files.isfile(root) else files.find(root, detail=True)
    except (ImportError, ValueError) as error:
        raise UserError(
            f'{place} cannot be opened ({error}): install the extra [cloud] for gs:// and s3://.'
        ) from error
    except Exception as error:
        raise UserError(f'{place} cannot be read: {error}') from error
    found = {}
    for name, info in listed.items():
        inside = name[len(root) :].strip('/')
        if not name.startswith(root) or '..' in inside.split('/'):
            raise UserError(f'{place} holds {name!r}, which is no name of a file here.')
        if not name.endswith('/') and not any(part.startswith('.') for part in inside.split('/') if inside):
            found[target / inside if inside else target] = info  # a store keeps names that end with / for folders
    if not found:
        raise UserError(f'there is nothing at {place}.')
    return files, found


def _get(files, file, info) -> int:
    """Fetches one file, with the store's time; gives its size."""
    file.parent.mkdir(parents=True, exist_ok=True)
    for pause in (*PAUSES, None):
        try:
            with whole(file) as partial:
                files.get_file(info['name'], str(partial))
                if partial.stat().st_size != info['size']:
                    raise OSError(f'{info["name"]} came with {partial.stat().st_size} of {info["size"]} bytes')
                os.utime(partial, ns=(_changed(info),) * 2)  # by it an index knows its data, on every machine
            return info['size']
        except Exception as error:
            if pause is None or isinstance(error, FileNotFoundError):
                raise
            time.sleep(pause)


def _is_here(file, info):
    if not file.is_file():
        return False
    stat = file.stat()
    return (stat.st_size, stat.st_mtime_ns) == (info['size'], _changed(info))


def _changed(info) -> int:
    """When a file was changed as the store says, in nanoseconds; 0 where it does not."""
    names = ('LastModified', 'last_modified', 'mtime', 'updated', 'created')
    said = next((info[name] for name in names if info.get(name)), 0)
    if isinstance(said, str):
        try:
            said = datetime.datetime.fromisoformat(said)
        except ValueError:
            return 0
    seconds = said.timestamp() if isinstance(said, datetime.datetime) else said
    return int(seconds * 1000) * 1_000_000
