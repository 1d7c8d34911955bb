"""Shows the first batch of a stage as the model gets it.

    python -m nanovision_jax.show --config=configs/sft.py:tiny [--rows=2]

Learned tokens are green, masked ones grey, pictures boxes; examples packed into a row are told apart by a bar.
"""

import itertools
import sys

from nanovision_jax import cli
from nanovision_jax.runs import lock
from nanovision_jax.stages import stage_of
from nanovision_jax.training import start

GREEN, GREY, BLUE, RESET = '\033[32m', '\033[90m', '\033[44;97m', '\033[0m'


def render(row, tokenizer, colour=True):
    """One row of a text or vision batch as text. Without colour, learned tokens stand in «…»."""
    green, grey, blue, reset = (GREEN, GREY, BLUE, RESET) if colour else ('«', '', '', '')
    end = reset if colour else '»'
    ids, weights, segments = row['targets'], row['weights'], row['segments']
    used = int((segments > 0).sum())
    pieces = []
    # A token is learned as a target, so the row is told as its targets, with each example's first token before them.
    for segment, places in itertools.groupby(range(used), key=lambda t: segments[t]):
        places = list(places)
        tokens = [(int(row['tokens'][places[0]]), False)] + [(int(ids[t]), bool(weights[t])) for t in places]
        for (image, learned), run_of in itertools.groupby(tokens, key=lambda t: (t[0] == tokenizer.image, t[1])):
            run_of = [token for token, _ in run_of]
            if image:
                pieces.append(f'{blue}[picture: {len(run_of)} tokens]{reset}')
            elif learned:
                pieces.append(f'{green}{tokenizer.decode(run_of, special=True)}{end}')
            else:
                pieces.append(f'{grey}{tokenizer.decode(run_of, special=True)}{reset}')
        pieces.append(f'  ▏{segment}\n')
    return ''.join(pieces)


def main(argv):
    """The command: see the module's docstring."""
    config, options = cli.parse(argv, __doc__, rows=2)

    from nanovision_jax.data import (
        pipeline,  # opens data sets
        stores,
    )
    from nanovision_jax.data.batch import skipped

    sources = start.available(config)
    stores.fetch(config)
    with lock.held(config.family / '.lock', f'what the runs of {config.family} share', wait=True):  # as training does
        tokenizer = pipeline.family_tokenizer(config, next((s.tokenizer for s in sources if s.tokenizer), None))
        rows, bad = pipeline.open_rows(config, tokenizer)
    batch = next(pipeline.batches(rows, config.data.batch_size, timeout=config.data.timeout))
    for row, example, reason in skipped(batch):
        print(f'row {row} goes without example {example}: {reason}')
    for name, value in batch.items():
        print(f'{name:10} {value.dtype!s:8} {list(value.shape)}')
    if bad:
        print(f'{len(bad)} bad examples left out, the first: {bad[0]}')
    for i in range(min(options['rows'], config.data.batch_size)):
        if stage_of(config).data == 'pairs':
            row, end = divmod(int(batch['ends'][i]), config.data.length)
            caption = batch['tokens'][row, end - batch['positions'][row, end] : end + 1]
            print(f'\npair {i}, whose caption is in row {row}\n[picture] {tokenizer.decode(caption, special=True)}')
            continue
        row = {name: value[i] for name, value in batch.items()}
        print(f'\nrow {i}')
        print(render(row, tokenizer, colour=sys.stdout.isatty()), end='')
        print(f'learned: {row["weights"].mean():.1%} of the row; padding: {(row["segments"] == 0).mean():.1%}')


if __name__ == '__main__':
    cli.run(main)
