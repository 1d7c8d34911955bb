"""Of a report, how training went: a table of facts, what it cost, and curves."""

import statistics

from nanovision_jax.reporting.charts import Chart, Line
from nanovision_jax.reporting.runs import Run, devices, parameters

SMALL = (  # (what a line of the log calls it, its title, scale, whether its axis begins at 0)
    ('tokens_per_second', 'tokens a second', 1, True),
    ('learning_rate', 'learning rate', 1, True),
    ('memory', 'peak device memory, GiB', 2**-30, True),
    ('image_attention', 'attention on the picture, share', 1, True),
    ('image_entropy', 'its evenness over patches, 0 to 1', 1, True),
)
NORMS = (('grad_norm', 'norm of gradients'), ('update_norm', 'norm of updates'))


def chapter(runs: list[Run], price: float | None):
    """Blocks: the facts, loss curves, and curves of all else that was logged."""
    yield 'heading', 'Training'
    yield from facts(runs, price)
    if found := [chart for run_ in runs if (chart := loss(run_))]:
        yield (
            'text',
            'Losses over the steps: training as a line, held-out data as dots. Point at a curve to read it.',
            '',
        )
        yield 'charts', found
    for run_ in runs:
        if found := list(small(run_)):
            yield 'subheading', f'What else was logged: {run_.name}'
            yield 'charts', found


def facts(runs: list[Run], price: float | None = None):
    """Blocks: a table with a column a run, and how its numbers are meant."""
    columns = [_column(run_, price) for run_ in runs]
    rows = [(fact, *(c[fact] or '–' for c in columns)) for fact in columns[0] if any(c[fact] for c in columns)]
    yield 'table', ('', *(run_.name for run_ in runs)), rows
    note = (
        '¹ Training alone, without compiling, evaluating and saving. ² Of text (captions in clip), without padding; '
        'the speed is the median of the logged steps, as is MFU. ³ The share of the peak FLOP/s that the model’s '
        'arithmetic takes: full-attention convention, padding not counted. The peak is the data sheet’s for bf16 or, '
        'on CPU, that of a matrix product measured as the run began.'
    )
    if price is not None:
        note += f' ⁴ The minutes of training times the devices, at {price:g} dollars a device and hour.'
    if any(column['Energy⁵'] for column in columns):
        note += (
            ' ⁵ Of the devices, from the first step on, with evaluations and saving: GPUs by NVML, a CPU’s packages by '
            'RAPL, with whatever else ran on them. The machine around them is not counted.'
        )
    yield 'text', note, 'note'


def dollars(run_: Run, price: float) -> float | None:
    """What the training of a run cost; None where its time, or on how many devices it was, is not known."""
    seconds, count = run_.all('seconds'), devices(run_)
    return seconds[-1] / 3600 * count * price if seconds and count else None


def kilowatt_hours(run_: Run) -> float | None:
    """What the devices of a run took; None where nothing told it, or on how many devices it was is not known."""
    joules, count = run_.all('energy'), devices(run_)
    return joules[-1] * count / 3.6e6 if joules and count else None


def _column(run_, price):
    done, planned = max(run_.all('step'), default=0), run_.config.steps if run_.config else 0
    sessions, sizes = run_.lineage.get('sessions'), parameters(run_)
    louder = [patch / word for patch, word in zip(run_.all('image_norm'), run_.all('word_norm'), strict=True)]
    cost, energy = dollars(run_, price) if price is not None else None, kilowatt_hours(run_)

    def memory(name):
        return f'{run_.lineage[name] / 2**30:.2f} GiB' if run_.lineage.get(name) else None

    def logged(name, form, of=lambda values: values[-1]):
        return form.format(of(run_.all(name))) if run_.all(name) else None

    return {
        'Steps': f'{done:,} of {planned:,}' if planned > done else f'{done:,}',
        'Parameters': f'{sizes[0]:,}' if sizes else None,
        'Parameters that learn': f'{sizes[1]:,}' if sizes else None,
        'Last training loss': logged('loss', '{:.3f}'),
        'Last held-out loss': logged('eval_loss', '{:.3f}'),
        'Minutes¹': logged('seconds', '{:.1f}', lambda seconds: seconds[-1] / 60),
        'Cost⁴': None if cost is None else f'${cost:,.2f}',
        'Energy⁵': None if energy is None else f'{energy:,.3g} kWh',
        'Tokens²': logged('tokens', '{:,}'),
        'Tokens/s²': logged('tokens_per_second', '{:,.0f}', statistics.median),
        'MFU³': logged('mfu', '{:.1%}', statistics.median),
        'Time waiting for data': logged('waited', '{:.0%}', statistics.mean),
        'Norm of a patch beside a word’s': louder and f'{louder[-1]:,.3g} times',
        'Peak device memory': memory('peak_device_bytes'),
        'Peak memory of the process': memory('peak_host_bytes'),
        'Devices': sessions[-1]['devices'] if sessions else None,
    }


def loss(run_: Run) -> Chart | None:
    """The losses of a run; None where none was logged."""
    train, validation = run_.series('loss'), run_.series('eval_loss')
    lines = [Line('training', train)] * bool(train) + [Line('held-out', validation, 1, dots=True)] * bool(validation)
    return Chart(run_.name, 'loss', lines) if train else None


def small(run_: Run):
    """The small charts of a run: of what was logged beside its losses."""
    for name, title, scale, from_zero in SMALL:
        if points := run_.series(name, scale=scale):
            yield Chart(title, '', [Line('', points)], small=True, from_zero=from_zero)
    for name, title in NORMS:
        whole = [Line('all', run_.series(name), 5)] * (len(_parts(run_, name)) != 1)
        yield from _small(title, [*whole, *_lines(run_, _parts(run_, name))])
    norms = [('patch', 'image_norm'), ('word', 'word_norm')]
    yield from _small('norms of a patch and a word', [Line(of, run_.series(x), i) for i, (of, x) in enumerate(norms)])
    yield from _small('scores of some questions', _lines(run_, _parts(run_, 'eval')), from_zero=True)


def _parts(run_, name):
    return sorted({key for line in run_.metrics for key in line if key.startswith(f'{name}/')})


def _lines(run_, names):
    return [Line(name.partition('/')[2], run_.series(name), i) for i, name in enumerate(names)]


def _small(title, lines, from_zero=False):
    if lines := [line for line in lines if line.points]:
        yield Chart(title, '', lines, small=True, from_zero=from_zero)
