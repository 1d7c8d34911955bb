"""report: the numbers it tells, what it says of looking, escaping, and that it needs no network and no jax."""

import json
import re
import shutil
import subprocess
import sys
import zipfile

import micro
import pytest
from conftest import ROOT
from reported import HOSTILE, make_run, make_vqa, png, write_lines

from nanovision_jax import config as configs
from nanovision_jax import report as command
from nanovision_jax import train
from nanovision_jax.data.datasets import tiny_world
from nanovision_jax.errors import UserError
from nanovision_jax.evals import base
from nanovision_jax.reporting import family as report
from nanovision_jax.reporting import pictures, runs, scores, training, tree
from nanovision_jax.runs import config_file as runconfig
from nanovision_jax.training import loop


@pytest.fixture
def family(tmp_path):
    family = tmp_path / 'small <i>'
    pretrain = make_run(family, 'pretrain', source='text', path='corpus')
    (pretrain / 'eval').mkdir()
    (pretrain / 'eval' / 'bpb.json').write_text(
        json.dumps({'task': 'bpb', 'n': 5000, 'bytes': 20000, 'loss': 2.25, 'bits_per_byte': 0.8125})
    )
    with zipfile.ZipFile(tmp_path / 'images.zip', 'w') as file:
        for i in range(10):
            file.writestr(f'{i}.png', png(300 if i == 0 else 16, 20 * i))
    (tmp_path / 'chat.json').write_text('[]')
    make_vqa(make_run(family, 'vision_instruct', source='conversations', path=str(tmp_path / 'chat.json')))
    return family


def pages(family):
    path = report.write(family)
    assert path == family / 'report.html'
    return path.read_text(), (family / 'report.md').read_text()


def test_both_pages_tell_the_same_numbers(family):
    html, markdown = pages(family)
    html = re.sub('</?span>', '', html)  # which keep options of commands together
    for text in (
        '4 May 2026',
        '9.0 minutes of training',  # two stages of 270 s
        '2,345',  # the median, not the mean
        '23.4%',
        '30,000',
        '1.333',  # the last loss
        '1.625',
        '3.00 GiB',
        '1 × H100',
        '75.0% of 40 questions',
        '70.0% to 80.0%',
        '62.5%',
        '87.5%',
        '12.5%',
        '−50.0 points',
        '0.812',
        'abcdef012345',
        'vision: unchanged',
        'full-attention convention, padding not counted',
        '--task=bpb',
        '--config=configs/vision_instruct.py:tiny --config.name=small',
    ):
        assert text in html, text
        assert text in markdown, text
    assert 'small &lt;i&gt;' in html
    assert 'small <i>' not in html


def test_what_an_evaluation_left_out_is_told(family):
    folder = family / 'vision_instruct'
    rows = make_vqa(folder)
    file = folder / 'eval' / 'vqa.json'
    for text in pages(family):  # of older code, which did not count
        assert 'left out' not in text.split('Questions about pictures')[1]
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {'asked': 41, 'left_out': {'missing image': 1}, 'other': {}})
    )
    write_lines(folder / 'eval' / 'vqa.jsonl', [{'id': 'x', 'image': None, 'left_out': 'missing', 'kind': None}, *rows])
    for text in pages(family):
        assert 'Questions asked 41, answered 40, left out 1 (1 × missing image).' in text
        assert '75.0% of all' in text


@pytest.mark.parametrize(
    ('blank', 'shuffled', 'said'),
    [
        (0.25, 0.2, 'looks at its pictures: with blank ones it loses 50.0 points'),
        (0.70, 0.2, 'does not look at its pictures'),  # 5 points are not enough
        (0.25, 0.9, 'does not look at its pictures'),  # any picture will do
        (0.69, 0.2, 'looks at its pictures: with blank ones it loses 6.0 points'),
    ],
)
def test_whether_it_looks(family, blank, shuffled, said):
    make_vqa(family / 'vision_instruct', blank, shuffled)
    for text in pages(family):
        assert f'The model {said}' in text


def test_too_few_questions_to_tell_whether_it_looks():
    result = base.Accuracy('vqa', 9, 0.75, [0.4, 0.9], {}, {'blank': 0.6, 'shuffled': 0.2})
    assert 'too few' in result.verdict()


def test_who_knows_no_more_than_without_a_model_shows_nothing_of_looking():
    controls, nothing = {'blank': 0.0, 'shuffled': 0.0}, [0.0, 0.0]
    kinds = {'a': {'n': 3, 'chance': 0.5}, 'b': {'n': 1, 'chance': 0.1}}
    said = base.Accuracy('vqa', 4, 0.0, nothing, kinds, controls).verdict()
    assert said == 'No better than without a model (40.0%): whether it looks at its pictures does not show.'
    under = {name: {'accuracy': value} for name, value in controls.items()}
    of = [base.Scores('pope', 4, 'accuracy', {'accuracy': 0.0}, nothing, {}, under, {'yes': x}) for x in (0.5, -0.1)]
    assert [x.verdict()[:14] for x in of] == ['No better than', 'The model does']


def test_page_is_whole_and_harmless(family):
    html, markdown = pages(family)
    assert '<script' not in html
    assert '<script' not in markdown
    assert '&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; | &amp; *b*' in html
    assert r'&lt;/script&gt; \| &amp; \*b\*' in markdown
    assert not re.search(r'(src|href)\s*=\s*(?!"data:)|url\(|@import', html)
    assert html.count('<figure>') == html.count('</figure>') == 16  # two curves, two of the speed, and twelve questions


def test_pictures_are_inlined_and_lost_ones_leave_their_caption(family):
    rows = [row for row in make_vqa(family / 'vision_instruct') if row['image'] in ('0.png', '1.png', '19.png')]
    write_lines(family / 'vision_instruct' / 'eval' / 'vqa.jsonl', rows)
    html, _ = pages(family)
    assert html.count('<img') == 4
    assert html.count('<img class="small" src="data:image/png;base64,') == 2
    assert html.count('<img class="large" src="data:image/jpeg;base64,') == 2  # made smaller
    assert html.count('class="kind"') == len(rows) == 6


def test_the_validation_split_leads_however_much_of_it_was_asked(family):
    folder = family / 'vision_instruct' / 'eval'
    for file in (folder / 'vqa.json', folder / 'vqa.jsonl'):
        shutil.copy(file, folder / f'vqa-heldout-limit20{file.suffix}')
        file.rename(folder / f'vqa-limit40{file.suffix}')
    assert [part for part, result in base.read_results(folder.parent) if result.task == 'vqa'] == [
        'limit40',
        'heldout-limit20',
    ]
    assert 'questions about pictures (validation split' in pages(family)[0].split('lead">')[1][:300]


def test_pictures_of_any_split_are_found(tiny_family):
    config = configs.base_config('vision_instruct', 'tiny')
    config.data.path = str(tiny_family / 'data')
    names = {'heldout-00003.png', 'validation-00002.png'}
    for split in ('heldout', 'validation'):
        found = pictures.find_images(config, split, names)
        made = tiny_world.example(split, int(next(iter(found))[-6:-4]))
        assert found == {f'{made["id"]}.png': pictures.data_uri(made['image'])}


def test_a_report_draws_no_pictures_that_are_not_there(tmp_path):
    """Not for a family either whose data are of another version."""
    config = configs.base_config('vision_instruct', 'tiny')
    config.data.path = str(tmp_path)
    (tmp_path / 'tiny_world/scenes/1.0.0').mkdir(parents=True)
    assert pictures.find_images(config, 'validation', {'validation-00002.png'}) == {}
    assert [folder.name for folder in (tmp_path / 'tiny_world/scenes').iterdir()] == ['1.0.0']


def test_chosen_questions_are_spread_and_in_proportion(family):
    rows = make_vqa(family / 'vision_instruct')
    chosen = pictures.choose(rows)
    assert chosen == pictures.choose(rows[::-1])
    assert sum(row['correct'] == 0 for row in chosen) == 3
    assert sorted(row['kind'] for row in chosen) == ['colour'] * 6 + ['shape'] * 6
    assert len({row['image'] for row in chosen}) == 12
    mostly_right = [row | {'correct': float(i > 0)} for i, row in enumerate(rows)]
    assert [row['id'] for row in pictures.choose(mostly_right) if row['correct'] == 0] == ['q0']
    assert pictures.choose(rows[:1]) == rows[:1]


def test_chat_is_shown_with_its_pictures(family):
    (family / 'mine.png').write_bytes(png(16, 7))
    turns = [{'image': 'mine.png', 'question': f'Why {i}?', 'answer': 'So.'} for i in range(2)]
    write_lines(
        family / 'chat.jsonl', [*turns, {'image': 'gone.png', 'question': 'Where?', 'answer': HOSTILE}, {'image': 'x'}]
    )
    html, markdown = pages(family)
    shown = html.split('never seen</h2>')[1].split('<h2>')[0]
    assert (shown.count('<figure>'), shown.count('<img')) == (2, 1)
    assert all(text in shown and text in markdown for text in ('Why 0?', 'Why 1?', 'Where?'))


def test_what_is_missing_is_left_out(tmp_path):
    (tmp_path / 'clip').mkdir()
    (tmp_path / 'clip' / 'metrics.jsonl').write_text('{"step": 5, "loss": 2.5}\n{"step": 10, "lo')
    html, markdown = pages(tmp_path)
    assert '2.500' in html
    assert '2.500' in markdown
    assert not any(text in html for text in ('Minutes', 'Where it came from', 'Questions', 'None', '>nan'))
    (tmp_path / 'none').mkdir()
    with pytest.raises(UserError, match='holds no run: give a run folder, or a family, with clip'):
        report.write(tmp_path / 'none')


def test_parameters_come_from_the_checkpoint(family):
    file = family / 'pretrain' / 'checkpoints' / '30' / 'params' / '_METADATA'
    file.parent.mkdir(parents=True)
    leaves = [('decoder', [1000, 7]), ('vision', [12])]
    tree = {
        str(i): {'key_metadata': [{'key': k}], 'value_metadata': {'write_shape': s}} for i, (k, s) in enumerate(leaves)
    }
    file.write_text(json.dumps({'tree_metadata': tree}))
    html, _ = pages(family)
    assert '<td>7,012</td>' in html
    assert '<td>7,000</td>' in html  # vision is frozen


def test_pages_are_made_without_jax(family):
    code = f'from nanovision_jax.reporting import comparison, family; family.write({str(family)!r})'
    code += '; import sys; print("jax" in sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout == 'False\n'


# What a run tells ----------------------------------------------------------------------------------------------------


def test_one_run_has_a_report_of_its_own(family):
    report_file = report.write(family / 'vision_instruct')
    html = report_file.read_text()
    assert report_file == family / 'vision_instruct' / 'report.html'
    assert '<h1>small &lt;i&gt;: vision_instruct</h1>' in html and '1 stage, 4.5 minutes' in html
    assert '75.0% of 40 questions' in html and '<th>pretrain</th>' not in html
    assert not (family / 'report.html').exists()


def test_a_report_that_fails_fails_no_run(family, capsys):
    folder = family / 'pretrain'
    report.write_after(folder)
    assert 'report: ' in capsys.readouterr().out
    before = (folder / 'report.html').stat().st_mtime_ns
    report.write_after(folder)  # it is there, and nothing was trained since
    assert capsys.readouterr() == ('', '') and (folder / 'report.html').stat().st_mtime_ns == before
    (folder / 'report.html').unlink()
    (folder / 'config.json').write_text('{')
    report.write_after(folder)
    assert re.fullmatch('no report was written: .*config.json is damaged.*\n', capsys.readouterr().err)


def test_training_ends_with_a_report(family, monkeypatch, capsys):
    folder = family / 'pretrain'
    monkeypatch.setattr(loop, 'train', lambda config, **_: folder)
    train.main([f'--config={ROOT}/configs/pretrain.py:tiny', f'--config.run_dir={folder}'])
    assert f'report: {folder}/report.html' in capsys.readouterr().out
    assert '<h1>small &lt;i&gt;: pretrain</h1>' in (folder / 'report.html').read_text()


def test_cost_is_hours_times_devices_times_price(family):
    lines = runs.open_run(family / 'pretrain')
    assert training.dollars(lines, 4) == pytest.approx(270 / 3600 * 4)
    lines.lineage['sessions'][0]['devices'] = '8 × H100'
    assert training.dollars(lines, 4) == pytest.approx(8 * 270 / 3600 * 4)
    lines.lineage['sessions'].append({'devices': '4 × H100'})  # how many seconds each had is not known
    assert training.dollars(lines, 4) is None
    assert '$0.60 at 4 dollars a device and hour' in report.write(family, 4).read_text()  # two stages of 0.075 hours
    assert 'Cost' not in report.write(family).read_text()


def test_energy_is_of_all_devices_where_it_was_logged(family):
    assert 'Energy' not in report.write(family).read_text()
    file = family / 'pretrain' / 'metrics.jsonl'
    write_lines(file, [{'step': i, 'loss': 1.0, 'energy': 1.8e6 * i} for i in (1, 2)])
    lines = runs.open_run(family / 'pretrain')
    assert training.kilowatt_hours(lines) == pytest.approx(1)
    lines.lineage['sessions'][0]['devices'] = '8 × H100'
    assert training.kilowatt_hours(lines) == pytest.approx(8)
    page = report.write(family).read_text()
    assert '1 kWh' in page and 'RAPL' in page


def test_norms_of_parts_and_memory_have_curves_where_they_are_logged(family):
    file = family / 'pretrain' / 'metrics.jsonl'
    told = {'grad_norm': 2.5, 'grad_norm/decoder': 2.0, 'grad_norm/projector': 1.5, 'update_norm/decoder': 0.25}
    write_lines(file, [{'step': i, 'loss': 1.0, 'memory': 3 * 2**30} | told for i in (1, 2)])
    charts_ = {chart.title: chart for chart in training.small(runs.open_run(family / 'pretrain'))}
    assert [line.name for line in charts_['norm of gradients'].lines] == ['all', 'decoder', 'projector']
    assert charts_['norm of updates'].lines[0].points == [(1, 0.25), (2, 0.25)]
    assert charts_['peak device memory, GiB'].lines[0].points == [(1, 3.0), (2, 3.0)]


def test_what_evaluations_tell_of_looking_has_curves(family):
    assert 'What else was logged: vision_instruct' in pages(family)[0]
    file = family / 'vision_instruct' / 'metrics.jsonl'
    told = {'image_attention': 0.25, 'image_entropy': 0.75, 'image_norm': 180.0, 'word_norm': 1.5, 'eval/pope': 0.5}
    write_lines(file, [{'step': i, 'loss': 1.0} | (told if i == 2 else {}) for i in (1, 2)])
    charts_ = {chart.title: chart for chart in training.small(runs.open_run(family / 'vision_instruct'))}
    assert [line.points for line in charts_['norms of a patch and a word'].lines] == [[(2, 180.0)], [(2, 1.5)]]
    assert charts_['attention on the picture, share'].lines[0].points == [(2, 0.25)]
    assert [line.name for line in charts_['scores of some questions'].lines] == ['pope']
    for page in pages(family):
        assert '120 times' in page and 'norms of a patch and a word' in page


def test_places_of_evaluations_between_log_lines_follow_from_these(family):
    lines = [{'step': 10, 'loss': 2.0, 'tokens': 100}, {'step': 15, 'eval_loss': 1.5}]
    write_lines(family / 'pretrain' / 'metrics.jsonl', [*lines, {'step': 20, 'loss': float('nan'), 'tokens': 300}])
    run = runs.open_run(family / 'pretrain')
    assert run.series('eval_loss', 'tokens') == [(200, 1.5)] and run.series('loss') == [(10, 2.0)]


# Scores --------------------------------------------------------------------------------------------------------------


def make_scores(folder, task='pope', headline='accuracy', scale=1.0, **fields):
    def of(value):
        return {headline: scale * value, 'other': 0.5}

    groups = {'easy': {'n': 10} | of(0.9), 'hard': {'n': 30} | of(0.7)}
    controls = {'blank': of(0.5), 'shuffled': of(0.525)}
    interval = [scale * 0.7, scale * 0.8]
    result = base.Scores(task, 40, headline, of(0.75), interval, groups, controls, {'chance': scale * 0.45}, **fields)
    rows = []
    for i in range(40):
        wanted, right = ('yes', 'no')[i % 2], i % 4 != 0
        said = {
            'prompt': f'Is there a {HOSTILE if i % 8 else "cat"}?',
            'answer': wanted.title() + '.' if right else 'No',
        }
        rows.append({'id': str(i), 'image': f'{i}.png', 'group': 'hard', 'wanted': [wanted], 'words': said})
        rows[-1] |= {'question': said['prompt']} if i % 8 else {}  # which results had not from the beginning
        said['prompt'] = f'<|user|>{said["prompt"]}' if i % 8 else said['prompt']
        rows[-1]['scores'] = {headline: float(right)}
    base.write_result(result, rows, folder / 'eval', 'validation')


def test_benchmarks_have_intervals_controls_baselines_and_groups(family):
    make_scores(family / 'vision_instruct', asked=41, left_out={'unreadable': 1}, drawn_of=9000)
    for text in pages(family):
        told = text.split('Benchmarks')[1]
        assert 'Is there a cat?' in told and '<|user|>' not in told.replace('&lt;', '<').replace('&gt;', '>')
        for number in ('75.0%', '70.0 to 80.0', '40 of 9,000', '45.0% (chance)', '50.0%', '52.5%', '90.0%'):
            assert number in told, number
        assert 'asked 41, answered 40, left out 1 (1 × unreadable)' in told
        assert 'looks at its pictures: with shuffled ones it loses 22.5 points' in told
        assert told.index('hard') < told.index('easy')  # the worst first
        assert '<script' not in told and '--task=pope --data=FOLDER' in re.sub('</?span>', '', told)


def test_what_is_no_share_is_told_as_it_is(family):
    make_scores(family / 'vision_instruct', 'mme', 'perception', scale=2000)
    for text in pages(family):
        told = text.split('Benchmarks')[1].split('Held-out text')[0]
        assert '1500.00' in told and '1400.00 to 1600.00' in told and '900.00 (chance)' in told
        assert 'its pictures' not in told  # five points of what?


def test_confusions_count_answers_by_what_was_wanted():
    def row(wanted, given):
        return scores.Answered('count', 'a', 'How many?', wanted, given, float(wanted == given))

    rows = [row('One.', 'one')] * 3 + [row('One.', 'Two.')] * 2 + [row('Two.', 'a lot')] + [row('Two.', 'Two.')]
    kind, given, lines = scores.confusion('count', rows)
    assert (kind, given) == ('count', ['one', 'two', 'else'])
    assert lines == [('one', [3, 2, 0]), ('two', [0, 1, 1])]
    assert scores.confusion('count', rows[:3]) is None  # one answer alone is wanted
    many = [row(f'{i}', '0') for i in range(scores.FEW + 1)]
    assert scores.confusion('count', many) is None and scores.confusion('count', many[1:]) is not None
    assert scores.confusion('count', [row('1', '1'), row('2', '2')]) is None  # nothing is confused


def test_the_worst_questions_are_those_that_lost_most():
    def rows(question, right, wrong):
        made = [scores.Answered('k', 'a', question, 'Yes.', 'Yes.', 1.0)] * right
        return made + [scores.Answered('k', 'a', question, 'Yes.', 'No.', 0.0)] * wrong

    found = scores.worst(rows('often?', 90, 10) + rows('always?', 0, 4) + rows('never?', 5, 0))
    assert found == [
        ('often?', 'No. (10 times)', 'Yes.', '100', '90%'),
        ('always?', 'No. (4 times)', 'Yes.', '4', '0%'),
    ]


# Where runs came from ------------------------------------------------------------------------------------------------


def test_the_tree_grows_from_the_blank_page(tmp_path):
    for stage in ('clip', 'pretrain', 'sft', 'vision_pretrain'):
        folder = make_run(tmp_path / 'a', stage)
        record = json.loads((folder / 'lineage.json').read_text())
        of = {'sft': ['pretrain'], 'vision_pretrain': ['sft', 'clip']}.get(stage, [])
        record['parents'] = [
            {'run': f'../{name}', 'step': 30, 'part': 'vision' if name == 'clip' else 'all', 'manifest': 'f00'}
            for name in of
        ]
        (folder / 'lineage.json').write_text(json.dumps(record))
    nodes = tree.ancestry(runs.open_runs(tmp_path / 'a'))
    assert [(node.name, node.parents, node.lane) for node in nodes] == [
        ('blank page', (), 0),
        ('pretrain', (0,), 0),
        ('sft', (1,), 0),
        ('clip', (0,), 1),
        ('vision_pretrain', (2, 3), 0),
    ]
    assert nodes[-1].told == '30 steps, everything from sft, vision from clip'
    assert [node.name for node in tree.ancestry(runs.open_runs(tmp_path / 'a' / 'sft'))] == [
        'blank page', 'pretrain', 'sft',
    ]  # fmt: skip
    svg = tree.draw(nodes)
    assert svg.count('<circle') == 5 and svg.count('<path') == 5
    (tmp_path / 'a' / 'sft' / 'lineage.json').unlink()
    told = {node.name: node.told for node in tree.ancestry(runs.open_runs(tmp_path / 'a'))}
    assert told['sft'] == 'a run that is not here any more'


def test_others_weights_are_a_root_of_their_own(tmp_path):
    folder = make_run(tmp_path, 'pretrain')
    record = json.loads((folder / 'lineage.json').read_text())
    record |= {'parents': [{'run': '/m/<gpt>', 'step': None, 'part': 'all', 'manifest': 'f00'}], 'sessions': []}
    (folder / 'lineage.json').write_text(json.dumps(record))
    nodes = tree.ancestry([runs.open_run(folder)])
    assert [(n.name, n.told, n.parents) for n in nodes] == [
        ('<gpt>', 'weights from elsewhere', ()),
        ('pretrain', 'converted, everything from <gpt>', (0,)),
    ]
    assert '<gpt>' not in tree.draw(nodes)


def test_what_goes_out_names_no_place_of_this_machine(family, tmp_path):
    assert report.for_others(family / 'pretrain') is None
    config = runconfig.read(family / 'pretrain')
    config.data.path, config.eval.data = f"{tmp_path}/John Smith's/words.txt", '/Users/John Smith/sets'
    config.checkpoint.mirror = 's3://BUCKET/runs'
    runconfig.save(config)
    html = report.write(family).read_text()
    assert str(tmp_path) in html and 'words.txt' in html and 'BUCKET' in html
    shared = report.for_others(family / 'pretrain')
    assert 'John' not in shared and 'BUCKET' not in shared and 'words.txt' in shared
    assert str(tmp_path) not in shared and 'chat.json' in shared and len(shared) > 0.9 * len(html)
    (family / 'report.html').write_text('a page of somebody’s own')
    assert report.for_others(family / 'pretrain') is None
    report.write(family / 'pretrain')
    assert '<h1>small &lt;i&gt;: pretrain</h1>' in report.for_others(family / 'pretrain')


# The command ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('given', 'said'),
    [
        (['--price=-1'], '--price takes dollars an hour and device, not -1.0'),
        (['--output=x'], '--output is for comparisons'),
        (['again', '--words=x.png'], '--words is for the report of one run or family'),
        (['--words=none.png'], r'--words=none.png: there is no such picture'),
        (['again'], 'again is no run'),
    ],
)
def test_mistakes_are_one_sentence(family, given, said):
    with pytest.raises(UserError, match=said):
        command.main([str(family / 'vision_instruct'), *given])


def test_words_of_patches(tmp_path, tokenizer, capsys):
    folder = micro.run_folder(micro.config('vision_instruct', tmp_path / 'a' / 'vision_instruct'), tokenizer)
    (tmp_path / 'some.png').write_bytes(png(40, 7))
    command.main([str(folder.parent), f'--words={tmp_path / "some.png"}'])
    html = (tmp_path / 'a' / 'report.html').read_text()
    vision = runs.open_run(folder).config.model.vision
    table = html.split('class="patches"')[1].split('</table>')[0]
    across = vision.image_size // vision.patch_size
    assert (table.count('<tr>'), table.count('<td>'), table.count('<small>')) == (across, across**2, 3 * across**2)
    assert '| column 1 |' in (tmp_path / 'a' / 'report.md').read_text()
    (tmp_path / 'none.png').write_text('no picture')
    with pytest.raises(UserError, match=r'none.png is no picture: '):
        command.main([str(folder), f'--words={tmp_path / "none.png"}'])
