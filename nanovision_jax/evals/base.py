"""What evaluations share: their results, intervals and controls. No jax is imported here: reports read results too.

A task is a module of this folder named as the task is. Its run(model_run, split, data, limit, …) returns a Result and a
list of rows, one for each question; RESULTS says of which kind its results are, TASKS in run.py where it is.
"""

import dataclasses
import json
import pathlib
import re

import numpy as np

from nanovision_jax.errors import UserError, check_writable, nearest
from nanovision_jax.runs.folder import Paths, read_json, result_file, write_lines, write_whole

SPLITS = ('train', 'validation', 'heldout')


class Result:
    """What a task measured of a run; a dataclass for each kind of task, whose fields are those of its JSON file.

    n: how many were scored; asked: n and what was left out; left_out: {reason: how many}; other: {what: how many} of
    what is there and is not asked. These three are None in results that are older than they.
    """

    def to_json(self) -> dict:
        """The result as <task>.json holds it."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def coverage(self) -> str:
        """How much of what was asked this result is about, in a sentence; '' where that was not counted."""
        if self.asked is None:
            return ''
        told = f'asked {self.asked:,}, answered {self.n:,}, left out {self.asked - self.n:,}'
        told += f' ({told_counts(self.left_out)})' if self.left_out else ''
        return told + (f'; not counted: {told_counts(self.other)}' if self.other else '')

    def verdict(self) -> str:
        """Whether the model looks at its images, in a sentence; '' where that was not measured."""
        return ''


@dataclasses.dataclass
class Compression(Result):
    """Of text: bytes of it, and the loss in nats a token and in bits a byte."""

    task: str
    n: int
    bytes: int | None = None
    loss: float | None = None
    asked: int | None = None
    left_out: dict | None = None
    other: dict | None = None
    bits_per_byte: float | None = None

    def score(self) -> float:
        """The number that stands for it."""
        return self.bits_per_byte

    def summary(self) -> str:
        """That number as a line of text."""
        return f'{self.task}: {self.bits_per_byte:.4f} bits a byte of {self.n:,} tokens'

    def lines(self) -> list[str]:
        """The result as lines of text."""
        counted = {name: x for name, x in self.to_json().items() if name not in ('asked', 'left_out', 'other')}
        told = [f'{name}: {x:.4f}' if isinstance(x, float) else f'{name}: {x}' for name, x in counted.items()]
        return [*told, *filter(None, [self.coverage()])]

    def markdown(self) -> list[str]:
        """The result as lines of Markdown."""
        return [f'- {name}: {value}' for name, value in self.to_json().items()]


@dataclasses.dataclass
class Accuracy(Result):
    """Of questions: the share that is right, with its 95% interval, by kind of question, and under the controls."""

    task: str
    n: int
    accuracy: float
    interval: list[float]
    by_kind: dict[str, dict]  # {kind: {n, accuracy, chance, and the accuracy under each control}}
    controls: dict[str, float]  # {control: accuracy}: with images blanked, with those of other questions
    asked: int | None = None
    left_out: dict | None = None
    other: dict | None = None
    too_long: int | None = None

    def score(self) -> float:
        """The number that stands for it."""
        return self.accuracy

    def summary(self) -> str:
        """That number as a line of text."""
        return f'{self.task}: {self._headline()}'

    def lines(self) -> list[str]:
        """The result as lines of text."""
        told = [self.summary()]
        for kind, row in self.by_kind.items():
            told.append(
                f'  {kind:24} {row["accuracy"]:6.1%}  chance {row["chance"]:6.1%}  blank {row["blank"]:6.1%}  '
                f'n {row["n"]}'
            )
        for name, value in self.controls.items():
            told.append(f'  {name + " pictures":24} {value:6.1%}  ({100 * (self.accuracy - value):.0f} points below)')
        return [*told, *filter(None, [self.coverage()])]

    def markdown(self) -> list[str]:
        """The result as lines of Markdown."""
        told = [self._headline(), '', '| kind | accuracy | chance | questions |', '|---|---|---|---|']
        for kind, row in self.by_kind.items():
            told.append(f'| {kind} | {row["accuracy"]:.1%} | {row["chance"]:.1%} | {row["n"]} |')
        return told + [f'| all, {name} pictures | {value:.1%} | | |' for name, value in self.controls.items()]

    def _headline(self):
        low, high = self.interval
        return f'{self.accuracy:.1%} of {self.n} questions (95% interval {low:.1%} to {high:.1%})'

    def verdict(self) -> str:
        """Whether the model looks at its images: it must lose 5 points, and surely, when they are blank or others."""
        kinds = self.by_kind.values()
        floor = sum(row['n'] * row['chance'] for row in kinds) / max(1, sum(row['n'] for row in kinds))
        return _verdict(self.accuracy, self.interval, self.controls, floor, self.n)


@dataclasses.dataclass
class Scores(Result):
    """Of a benchmark's questions: its metrics, of which `headline` stands for it, and the same under the controls.

    interval: 95%, of the headline. baselines: the headline without a model. groups: {group: {n, metric: value}}.
    drawn_of: of how many questions those asked were drawn. run: which run answered, from which checkpoint. shots: how
    many examples went before each question.
    """

    task: str
    n: int
    headline: str
    metrics: dict[str, float]
    interval: list[float]
    groups: dict[str, dict]
    controls: dict[str, dict]
    baselines: dict[str, float]
    asked: int | None = None
    left_out: dict | None = None
    other: dict | None = None
    drawn_of: int | None = None
    seconds: float | None = None
    run: dict | None = None
    shots: int | None = None

    def score(self) -> float:
        """The number that stands for it."""
        return self.metrics[self.headline]

    def summary(self) -> str:
        """That number as a line of text."""
        return f'{self.task}: {self._headline()}'

    def lines(self) -> list[str]:
        """The result as lines of text."""
        told = [self.summary()]
        told += [f'  {name:36} {told_score(value, name)}' for name, value in self.metrics.items()]
        for name, row in self.groups.items():
            told.append(f'  {name:36} {self._own(row[self.headline])}  n {row["n"]:,}')
        for name, value in self.baselines.items():
            told.append(f'  {name:36} {self._own(value)}  without a model')
        for name, metrics in self.controls.items():
            change = told_difference(metrics[self.headline] - self.metrics[self.headline], self.headline)
            told.append(f'  {name:36} {self._own(metrics[self.headline])}  ({change})')
        return [*told, *filter(None, [self.coverage()])]

    def markdown(self) -> list[str]:
        """The result as lines of Markdown."""
        columns = [*self.controls]
        told = [self._headline(), '', f'| metric | value |{"".join(f" {name} |" for name in columns)}']
        told.append('|---|---|' + '---|' * len(columns))
        for name, value in self.metrics.items():
            under = ''.join(f' {told_score(self.controls[control][name], name)} |' for control in columns)
            told.append(f'| {name} | {told_score(value, name)} |{under}')
        for name, value in self.baselines.items():
            told.append(f'| {self.headline}, {name} | {self._own(value)} |{" |" * len(columns)}')
        for name, row in self.groups.items():
            told.append(
                f'| {self.headline}, {name} ({row["n"]:,}) | {self._own(row[self.headline])} |{" |" * len(columns)}'
            )
        return told

    def _headline(self):
        low, high = self.interval
        drawn = f', drawn of {self.drawn_of:,}' if self.drawn_of else ''
        return (
            f'{self._own(self.metrics[self.headline])} {self.headline} of {self.n:,} questions{drawn} '
            f'(95% interval {self._own(low)} to {self._own(high)})'
        )

    def _own(self, value):
        return told_score(value, self.headline)

    def verdict(self) -> str:
        """Whether the model looks at its images.

        '' for a task without any, whose controls were not asked, or whose headline is in points of its own.
        """
        if self.headline in OWN_POINTS:
            return ''
        images = {name: self.controls[name][self.headline] for name in ('blank', 'shuffled') if name in self.controls}
        floor, score = max(self.baselines.values(), default=0.0), self.metrics[self.headline]
        return _verdict(score, self.interval, images, floor, self.n, self._own) if images else ''


OWN_POINTS = ('perception', 'cognition')  # metrics in points of their own, which are no hundredths
NO_SHARES = ('CIDEr', *OWN_POINTS)  # metrics that may be above 1


def told_score(value, name=''):
    """A share as per cent; what is no share, as it is. name: of the metric."""
    return f'{value:.1%}' if -1 <= value <= 1 and name not in NO_SHARES else f'{value:.2f}'


def told_difference(value, name=''):
    """A difference with its sign: of shares in points, which are hundredths; of what is no share, as it is."""
    return f'{value:+.2f}' if name in NO_SHARES else f'{100 * value:+.1f} points'


def _verdict(score, interval, controls, floor, n, told=told_score):
    """Whether a model looks at its images: it must lose 5 points, and surely, when they are blank or others.

    floor: what is scored without a model; who scores no more has nothing to lose.
    """
    name, best = max(controls.items(), key=lambda item: item[1])
    lost = round(100 * (score - best), 1)
    if lost <= 5 and score <= floor:
        return f'No better than without a model ({told(floor)}): whether it looks at its pictures does not show.'
    if lost <= 5:
        as_good = f'with {name} ones its answers are about as good ({told(best)})'
        return f'The model does not look at its pictures: {as_good}.'
    if best >= interval[0]:
        return f'{n:,} questions are too few to tell whether the model looks at its pictures.'
    return f'The model looks at its pictures: with {name} ones it loses {lost:.1f} points.'


# Published benchmarks, each a module of this folder.
BENCHMARKS = (
    'pope',
    'arc_easy',
    'arc_challenge',
    'mmlu',
    'hellaswag',
    'piqa',
    'winogrande',
    'core',
    'choices',
    'answers',
    'mme',
    'mmstar',
    'scienceqa',
    'ai2d',
    'textvqa',
    'textvqa_ocr',
    'vqav2',
    'gqa',
    'coco_caption',
)
RESULTS = {'bpb': Compression, 'vqa': Accuracy} | dict.fromkeys(BENCHMARKS, Scores)  # by task
GREY = 128  # of a blank image


def check_options(
    run_dir, task, split='validation', data=None, images=None, output=None, limit=None, allow_missing=False, **options
):
    """Raises UserError for options of an evaluation that make no sense, before any time is spent.

    options: what benchmarks alone take, with None where it was not given.
    """
    if task not in RESULTS:
        raise UserError(f'no task {task!r}.{nearest(task, RESULTS)}')
    if split not in SPLITS:
        raise UserError(f'no split {split!r}.{nearest(split, SPLITS)}')
    if limit is not None and limit < 1:
        raise UserError(f'--limit takes a number above 0, not {limit}.')
    if task in BENCHMARKS:
        if not data:
            raise UserError(f'{task} needs --data: the folder of its published files.')
        if split != 'validation' or images or allow_missing:
            raise UserError(f'--split, --images and --allow-missing are not for {task}: its files say what is asked.')
    elif given := [name for name, value in options.items() if value is not None]:
        raise UserError(f'--{given[0]} is for published benchmarks, not for {task}.')
    if task == 'bpb' and (images or allow_missing):
        raise UserError(f'{"--images" if images else "--allow-missing"} is for vqa: {task} reads text alone.')
    if images and not data:
        raise UserError('--images is where the pictures of --data are: it takes --data too.')
    folder = pathlib.Path(output or Paths(run_dir).results)
    if output or folder.parent.is_dir():  # else there is no run, which is said where it is opened
        check_writable(folder)


# What part_of() makes: of another split or a file, with so many examples before each question, some of it.
_PART = re.compile(r'(?:(train|heldout)|(of)-(.+?))?(?:-?shots(\d+))?(?:-?limit(\d+))?')


def part_of(split: str = 'validation', data=None, limit: int | None = None, shots: int | None = None) -> str:
    """What a result is about, as its file's name says: 'validation', another split, 'of-FILE', 'shots0', 'limit100'."""
    parts = [f'of-{pathlib.Path(data).name.partition(".")[0]}' if data else split]
    parts += [f'shots{shots}'] * (shots is not None) + [f'limit{limit}'] * bool(limit)
    return '-'.join(parts[1:] if parts[0] == 'validation' and parts[1:] else parts)


def write_result(result: Result, rows: list[dict], folder: pathlib.Path, part: str):
    """Writes a result and, where there are any, its rows into a folder. part: as part_of() has it."""
    file = result_file(folder, result.task, part)
    folder.mkdir(parents=True, exist_ok=True)
    if rows:
        write_lines(file.with_suffix('.jsonl'), rows)
    write_whole(file, json.dumps(result.to_json(), indent=1) + '\n')


def read_results(run_dir: pathlib.Path) -> list[tuple[str, Result]]:
    """(part, Result) of every evaluation of a run, by task; of each the validation split's first.

    Files that part_of() did not name are somebody's own. Raises UserError for a damaged file.
    """
    found = []
    for file in Paths(run_dir).results.glob('*.json'):
        task, _, part = file.stem.partition('-')
        if task in RESULTS and _PART.fullmatch(part):
            found.append((part or 'validation', _parse(RESULTS[task], read_json(file), file)))
    order = list(RESULTS)
    return sorted(found, key=lambda one: (order.index(one[1].task), split_of(one[0]) != 'validation', one[0]))


def _pieces(part):
    return _PART.fullmatch('' if part == 'validation' else part).groups()


def split_of(part: str) -> str | None:
    """The split of the run's data that a part is of, whole or not; None where it is of a file."""
    split, _, data, *_ = _pieces(part)
    return None if data else split or 'validation'


def told_part(part: str) -> str:
    """A part as text: 'validation split', 'heldout split, at most 100 of it', 'FILE'."""
    _, _, data, shots, limit = _pieces(part)
    told = data or f'{split_of(part)} split'
    return told + (f', {shots} examples before each' if shots else '') + (f', at most {limit} of it' if limit else '')


def part_options(part: str) -> list[str]:
    """The options of the command line that evaluate a part; of a file's name the command has the rest."""
    split, _, data, shots, limit = _pieces(part)
    given = {'split': split, 'data': data, 'shots': shots, 'limit': limit}
    return [f'--{name}={value}' for name, value in given.items() if value]


def _parse(kind, values, file):
    known = {field.name for field in dataclasses.fields(kind)}
    try:
        return kind(**{name: value for name, value in values.items() if name in known})
    except TypeError as error:
        raise UserError(f'{file} is damaged: it is no result of {kind.__name__.lower()}.') from error


def told_counts(counts: dict) -> str:
    """{what: how many} as '3 × this, 1 × that'."""
    return ', '.join(f'{count:,} × {what}' for what, count in counts.items())


# Statistics -----------------------------------------------------------------------------------------------------------


def interval(scores, groups, seed: int = 0, resamples: int = 1000) -> list[float]:
    """The 95% bootstrap interval of the mean of `scores`, resampling groups: questions on one image go together."""
    _, group = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(group, scores), np.bincount(group)
    rng, means = np.random.default_rng(seed), np.empty(resamples)
    for i in range(resamples):  # one at a time: all at once would take 8 kB an image
        drawn = rng.integers(len(sums), size=len(sums))
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    return [float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))]


def others(names: list[str], seed: int = 0) -> dict[str, str]:
    """{name: another name} for the control that swaps images: all names in a random circle, one step on."""
    ordered = sorted(set(names))
    order = np.random.default_rng(seed).permutation(len(ordered))
    return {ordered[a]: ordered[b] for a, b in zip(order, np.roll(order, 1), strict=True)}
