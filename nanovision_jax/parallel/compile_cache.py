"""Compiled programs are kept from run to run, in a folder of the user's own.

NANOVISION_CACHE=0 turns this off; JAX_COMPILATION_CACHE_DIR, jax's own variable, names another folder.

Several devices that are CPUs, of one process or more, keep none: of a program that it reads back jaxlib 0.10 starts all
collectives at once, as their order is lost. Within a process they then wait for each other, until it aborts after a
minute; between hosts Gloo takes one for another ("Received data size doesn't match expected size").
"""

import hashlib
import importlib.metadata
import os
import pathlib
import platform

import jax
from jax.experimental.compilation_cache import compilation_cache

from nanovision_jax import caches

SIZE = 4 << 30  # bytes; what was used longest ago goes first
SECONDS = 0.3  # what compiles faster is not worth its file


def use() -> pathlib.Path | None:
    """Turns the cache on for this process, before its first compilation; gives its folder, None where it is off.

    The folder can be read by its user alone: what lies in it is run. A folder that cannot be made turns the cache off.
    """
    if jax.default_backend() == 'cpu' and jax.device_count() > 1:
        jax.config.update('jax_enable_compilation_cache', False)
        compilation_cache.reset_cache()  # it may have been looked at
        return None
    if os.environ.get('NANOVISION_CACHE') == '0' or jax.config.jax_compilation_cache_dir:
        return None
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError:
        return None
    jax.config.update('jax_compilation_cache_dir', str(folder))
    jax.config.update('jax_compilation_cache_max_size', SIZE)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', SECONDS)
    return folder


def _folder() -> pathlib.Path:
    """…/nanovision_jax/compiled-<jax's versions>-<processor>: a program for one processor may not run on another."""
    versions = '-'.join(importlib.metadata.version(name) for name in ('jax', 'jaxlib'))
    return caches.home() / f'compiled-{versions}-{_processor()}'


def _processor() -> str:
    """A digest of the processor's kind and features."""
    told = platform.machine() + platform.processor()
    try:
        lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
        told += next((line for line in lines if line.startswith(('flags', 'Features'))), '')
    except OSError:  # not Linux
        pass
    return hashlib.sha256(told.encode()).hexdigest()[:12]
