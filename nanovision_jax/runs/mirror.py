"""A copy of a family's runs in an object store, for machines that come and go: checkpoint.mirror=gs://… or s3://….

    <mirror>/<name>/<stage>/    what the run folder holds, the manifest of a checkpoint last of all

A run is written locally; whole checkpoints and the small files beside them are copied in the background. Who starts
elsewhere gets what is missing there. Any store that fsspec knows will do. No jax is imported here.
"""

import json
import pathlib
import sys
import threading

from nanovision_jax.errors import UserError
from nanovision_jax.runs import lock
from nanovision_jax.runs.folder import MANIFEST, Paths, whole, whole_steps

PAUSE, LONGEST = 1.0, 300.0  # seconds to the next try, twice as many each time, and at most so many
LAST = 5  # tries once the run is over


def _opened(config):
    """(file system, the family's place in it)."""
    import fsspec  # which every command would load

    try:
        files, root = fsspec.core.url_to_fs(config.checkpoint.mirror)
    except (ImportError, ValueError) as error:
        raise UserError(
            f'checkpoint.mirror {config.checkpoint.mirror!r} cannot be opened ({error}): install the extra [cloud] for '
            'gs:// and s3://.'
        ) from error
    return files, f'{root.rstrip("/")}/{config.name}'


def _small(run):
    """The files of a run beside its checkpoints that another machine needs."""
    paths = Paths(run)
    files = [paths.config, paths.lineage, paths.metrics, paths.bad_rows, paths.bad_steps, paths.skipped]
    return [file for file in [*files, *sorted(paths.tokenizer.glob('*'))] if file.is_file()]


class Mirror:
    """A context that copies a run to its place while it lasts: push() says that there is something new."""

    def __init__(self, config):
        self.run, self.place = pathlib.Path(config.run_dir), f'{config.checkpoint.mirror}/{config.name}/{config.stage}'
        self.files, family = _opened(config)
        self.root = f'{family}/{config.stage}'
        self._new, self._over, self._failed = threading.Event(), threading.Event(), None
        self._thread = threading.Thread(target=self._work, daemon=True, name='mirror')

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        """Copies what is new; what cannot be copied now is said, and is no failure of the run."""
        self._over.set()
        self.push()
        self._thread.join()
        if self._failed:
            print(f'warning: {self.place} is behind {self.run}: {self._failed}', file=sys.stderr)

    def push(self):
        """Says that there is a new checkpoint, or another small file. It waits for nothing."""
        self._new.set()

    def _work(self):
        pause, tries = PAUSE, 0
        while True:
            self._new.wait()
            self._new.clear()
            over = self._over.is_set()
            try:
                self._copy()
                self._failed, pause = None, PAUSE
                if over:
                    return
            except Exception as error:  # whatever a store's library raises
                if self._failed is None:
                    print(f'warning: not copied to {self.place} ({error}); it is tried again', file=sys.stderr)
                self._failed, tries = error, tries + over
                if tries == LAST:
                    return
                self._over.wait(pause) if not over else threading.Event().wait(min(pause, 5))
                pause = min(2 * pause, LONGEST)
                self._new.set()

    def _copy(self):
        """Copies the small files and the newest checkpoint, and then removes checkpoints that are gone here.

        In this order: a checkpoint counts by its manifest, and without config.json and lineage.json it is of no use.
        """
        here = whole_steps(self.run)
        for file in _small(self.run):
            self._put(file, str(file.relative_to(self.run)))
        try:
            for step in here[:1]:
                self._copy_checkpoint(step)
        except FileNotFoundError:
            if whole_steps(self.run)[:1] == here[:1]:
                raise  # of the store's, which has no such bucket
            self._new.set()  # it was removed while it was copied: there is a newer one
            return
        if here:
            self._remove_all_but(here)

    def _copy_checkpoint(self, step):
        folder = Paths(self.run).checkpoint(step)
        if step not in _steps(self.files, self.root):
            names = [str(file.relative_to(folder)) for file in sorted(folder.rglob('*')) if file.is_file()]
            for name in [*(name for name in names if name != MANIFEST), MANIFEST]:
                self._put(folder / name, f'checkpoints/{step}/{name}')

    def _remove_all_but(self, steps):
        """Removes checkpoints of other steps, those too whose copying was cut off."""
        for place in self.files.ls(f'{self.root}/checkpoints', detail=False):
            name = place.rstrip('/').rpartition('/')[2]
            if name.isdigit() and int(name) not in steps:
                if self.files.exists(f'{place}/{MANIFEST}'):
                    self.files.rm(f'{place}/{MANIFEST}')  # from here on it does not count
                if self.files.exists(place):  # in some stores a folder is gone with its last file
                    self.files.rm(place, recursive=True)

    def _put(self, file, name):
        place = f'{self.root}/{name}'
        self.files.makedirs(place.rpartition('/')[0], exist_ok=True)
        self.files.put_file(str(file), place)


def _steps(files, root):
    """The steps whose checkpoint a store holds whole, newest first."""
    files.invalidate_cache()  # stores' libraries remember listings
    found = files.glob(f'{root}/checkpoints/*/{MANIFEST}')
    return sorted((int(name.split('/')[-2]) for name in found if name.split('/')[-2].isdigit()), reverse=True)


# Back ----------------------------------------------------------------------------------------------------------------


def fetch(config, anew: bool = False):
    """Brings what the mirror has of a family of runs, and this machine has not, into its run folders.

    Of the run itself that is all of its newest checkpoint, of those that it may start from their parameters. Raises
    UserError where the mirror holds another run than the folder, and where it holds one that is to begin anew.
    """
    files, root = _opened(config)
    try:
        if not files.exists(root):
            return
        with lock.held(config.family / '.mirror', f'what is fetched into {config.family}', wait=True):
            for name in sorted(place.rstrip('/').rpartition('/')[2] for place in files.ls(root, detail=False)):
                _fetch(files, f'{root}/{name}', config.family / name, own=name == config.stage, anew=anew)
    except UserError:
        raise
    except Exception as error:  # whatever a store's library raises
        raise UserError(f'checkpoint.mirror {config.checkpoint.mirror} cannot be read: {error}') from error


def _fetch(files, place, run, own, anew):
    steps = _steps(files, place)
    if not steps:
        return
    if own and anew:
        raise UserError(
            f'{place} in checkpoint.mirror holds this run: remove it there, or choose another --config.name.'
        )
    here = whole_steps(run)
    if here and _began(files.cat_file(f'{place}/lineage.json')) != _began(Paths(run).lineage.read_bytes()):
        if not own:
            return  # what lies here is what is started from
        raise UserError(
            f'{place} in checkpoint.mirror holds another run than {run}: choose another --config.name or mirror.'
        )
    if here and here[0] > steps[0]:
        return  # the mirror is behind
    wanted = files.find(f'{place}/checkpoints/{steps[0]}')
    wanted = sorted((name for name in wanted if own or '/optimizer/' not in name), key=_is_manifest)
    small = [name for name in files.find(place) if '/checkpoints/' not in name] if here[:1] != steps[:1] else []
    told = False
    for name in [*small, *wanted]:  # the manifest last, as it was copied
        target = run / name[name.index(place) + len(place) :].lstrip('/')
        there = '/checkpoints/' in name and target.is_file()
        if there and (steps[0] in here or target.stat().st_size == files.size(name)):  # what is whole stays as it is
            continue
        if not told:
            print(f'fetching {run}, step {steps[0]}, from checkpoint.mirror')
            told = True
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole(target) as partial:
            files.get_file(name, str(partial))


def _is_manifest(name):
    return name.endswith(f'/{MANIFEST}')


def _began(lineage):
    """When the run began that a lineage.json is of: by this a run is known."""
    try:
        return json.loads(lineage)['sessions'][0]['started']
    except (ValueError, LookupError, TypeError):
        return None
