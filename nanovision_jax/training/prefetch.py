"""Batches for the step: each host reads its rows, all count together, and the next ones wait on the devices."""

import collections
from collections.abc import Iterator

from nanovision_jax.data import pipeline
from nanovision_jax.data.batch import skipped
from nanovision_jax.errors import MISTAKE, UserError
from nanovision_jax.parallel import hosts
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.runs.skips import Skips


def stream(config, rows, mesh, start: int) -> tuple[Iterator, int]:
    """(device batches of packed rows from step `start` on, as prefetch() yields them, the row they begin with)."""
    # The position in the data is counted in rows: with another batch size it goes on at the same row.
    first_row = runfolder.manifest(config.run_dir, start)['position'] if start else 0
    skips = Skips(config.run_dir, rows.shuffled.n, anew=not start)
    rows.skips = skips.known
    how = config.data.batch_size, first_row, config.data.workers, config.data.timeout
    how = *how, parallel.own_rows(mesh, config.data.batch_size)
    return prefetch(pipeline.batches(rows, *how), mesh, skips), first_row


def read_together(batches):
    """Yields (batch, its work, what rows left out): work and what was left out are of all hosts' parts of the batch.

    work: {tokens, learned, images}, padding aside; images: those that go through a tower. Where one host cannot read
    on, none does.
    """
    while True:
        try:
            batch, error = next(batches), None
            told = [None, skipped(batch), work_of(batch)]
        except UserError as raised:
            error, told = raised, [[str(raised), raised.code], [], {}]
        every = hosts.gather(told)
        if error and not hosts.several():
            raise error
        for host, (failed, *_) in enumerate(every):
            if failed:
                why, code = failed
                raise hosts.AllFailed(f'host {host} cannot read on: {why}', code) from error
        work = sum((collections.Counter(work) for _, _, work in every), collections.Counter())
        if hosts.several() and not work['learned']:  # of one host's part alone the stream cannot say it
            raise hosts.AllFailed('nothing is learned in a whole batch: no answer is in any of its rows.', MISTAKE)
        yield batch, work, [entry for _, left_out, _ in every for entry in left_out]


def work_of(batch) -> dict[str, int]:
    """{tokens, learned, images} of a batch, see read_together()."""
    tokens = int((batch['segments'] > 0).sum())
    learned = int((batch['weights'] > 0).sum()) if 'weights' in batch else tokens
    images = int(batch['images'].any(axis=(-3, -2, -1)).sum()) if 'images' in batch else 0
    return {'tokens': tokens, 'learned': learned, 'images': images}


def prefetch(batches, mesh, skips: Skips | None = None, ahead: int = 2):
    """Yields (device batch, its work), `ahead` of them on their way. skips: takes down what rows left out."""

    def put():
        for batch, work, left_out in read_together(batches):
            if skips:
                skips.add(left_out)
            yield parallel.put_batch(batch, mesh), work

    queue, source = collections.deque(), put()
    try:
        while True:
            while len(queue) <= ahead:
                queue.append(next(source))
            yield queue.popleft()
    finally:
        source.close()
        batches.close()
