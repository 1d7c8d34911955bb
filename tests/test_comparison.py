"""report RUN RUN: what differs, curves over tokens and hours, paired scores, and what is not overwritten."""

import json
import re

import pytest
from reported import make_run, make_vqa, write_lines

from nanovision_jax import report as command
from nanovision_jax.errors import UserError
from nanovision_jax.reporting import comparison
from nanovision_jax.reporting.runs import open_run
from nanovision_jax.runs import config_file as runconfig


@pytest.fixture
def two(tmp_path):
    """Two runs of a stage in two families: the second learned faster, is twice as slow, and answers 8 more of 40."""
    for name, rate, speed in (('a', 1e-3, 1), ('b', 2e-3, 2)):
        folder = make_run(tmp_path / name, 'vision_instruct')
        config = runconfig.read(folder)
        config.optim.learning_rate = rate
        config.log.every = 7 * speed  # changes no result
        runconfig.save(config)
        lines = [
            {'step': i, 'loss': 4 / i / speed, 'tokens': 100 * i, 'seconds': 360.0 * i * speed} for i in (10, 20, 30)
        ]
        write_lines(folder / 'metrics.jsonl', [*lines, {'step': 30, 'eval_loss': 1.625 / speed}])
        rows = make_vqa(folder)
        if name == 'b':
            for row in [row for row in rows if not row['correct']][:8]:
                row['correct'] = 1.0
            write_lines(folder / 'eval' / 'vqa.jsonl', rows)
    return [tmp_path / name / 'vision_instruct' for name in 'ab']


def test_pages_tell_what_differs_and_by_how_much(two, tmp_path, capsys):
    command.main([*map(str, two), '--price=2'])
    assert capsys.readouterr().out == f'written: {tmp_path}/report.html\n'
    for file in ('report.html', 'report.md'):
        text = (tmp_path / file).read_text()
        for told in (
            'a/vision_instruct',
            'b/vision_instruct',
            'optim.learning_rate',
            '0.001',
            '0.002',
            '1.625',
            '0.812',
        ):
            assert told in text, told
        assert 'log.every' not in text and '$6.00' in text and '$12.00' in text
        assert 'vqa, validation split: accuracy on 40 questions' in text
        assert '75.0%' in text and '95.0%' in text and '+20.0 points (95%: +' in text and 'may be chance' not in text
    assert '<script' not in (tmp_path / 'report.html').read_text()


def test_curves_are_over_tokens_and_over_hours(two):
    runs = [open_run(folder, name) for folder, name in zip(two, 'ab', strict=True)]
    tokens, hours = comparison.curves(runs)
    points = {line.name: line.points for line in hours.lines}
    assert points['a'] == [(pytest.approx(x), y) for x, y in ((1, 0.4), (2, 0.2), (3, 4 / 30))]
    assert points['b'][-1] == (pytest.approx(6), pytest.approx(2 / 30))
    assert points['b held-out'] == [(pytest.approx(6), 0.8125)]
    assert [line.points[-1][0] for line in tokens.lines] == [3000] * 4
    assert [line.colour for line in tokens.lines] == [0, 0, 1, 1]


def test_the_same_scores_may_be_chance(two, tmp_path):
    make_vqa(two[1])
    text = comparison.write(two).with_suffix('.md').read_text()
    assert '+0.0 points (95%: +0.0 to +0.0)' in text and 'may be chance' in text


def test_runs_without_a_common_evaluation_or_config_are_compared_still(two, tmp_path):
    (two[0] / 'eval' / 'vqa.json').unlink()
    (two[1] / 'config.json').unlink()
    text = comparison.write(two).with_suffix('.md').read_text()
    assert 'No evaluation, question by question, is in all of these runs.' in text
    assert 'Not all of these runs have a config.json.' in text


def test_what_is_no_comparison_is_left_alone(two, tmp_path):
    comparison.write(two)
    comparison.write(two[::-1])  # a comparison makes way for another
    for file in ('report.html', 'report.md'):
        before = (tmp_path / file).read_text()
        (tmp_path / file).write_text('mine')
        with pytest.raises(UserError, match=rf'{file} is there and is no comparison: say --output=FOLDER'):
            comparison.write(two)
        assert (tmp_path / file).read_text() == 'mine'
        (tmp_path / file).write_text(before)
    assert comparison.write(two, tmp_path / 'new' / 'place') == tmp_path / 'new' / 'place' / 'report.html'


def test_mistakes_are_one_sentence(two, tmp_path):
    with pytest.raises(UserError, match='is given twice: a comparison takes different runs'):
        comparison.write([two[0], two[0]])
    with pytest.raises(UserError, match=r'b is no run: give a run folder, such as'):
        comparison.write([two[0], tmp_path / 'b'])
    assert not (tmp_path / 'report.html').exists()


def test_three_runs_have_three_colours(two, tmp_path):
    third = make_run(tmp_path / 'c', 'vision_instruct')
    html = comparison.write([*two, third]).read_text()
    assert re.findall(r'<span class="key k(\d)">(\w)/', html) == [('0', 'a'), ('1', 'b'), ('2', 'c')]
    assert json.loads((third / 'lineage.json').read_text())['finished'] == 30
