"""Benchmarks of text: asked and scored as lm-eval does, CORE by hand, and a real engine's likelihoods."""

import csv
import json
import random
import runpy
import types

import jax
import micro
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT

import nanovision_jax
from nanovision_jax.errors import UserError
from nanovision_jax.evals import asking, benchmark, core, scoring
from nanovision_jax.evals import run as evaluating
from nanovision_jax.evals.benchmark import Likelihoods, Question, Request
from nanovision_jax.evals.published import Pictures

RECORDER = runpy.run_path(str(ROOT / 'scripts/benchmarks/record_lm_eval.py'))
GOLDEN = {name: json.loads((ROOT / f'tests/golden/lm_eval/{name}.json').read_text()) for name in RECORDER['TASKS']}
METRICS = {'acc': 'sum', 'acc_norm': 'per character', 'acc_mutual_info': 'against the option alone'}


def lines(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def table(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def by_authors(folder, task, rows, dev=()):
    """A task's questions in the files of its authors."""
    if task == 'mmlu':
        for part, some in (('test', rows), ('dev', dev)):
            (folder / 'data' / part).mkdir(parents=True)
            for subject in {row['subject'] for row in some}:
                with open(folder / f'data/{part}/{subject}_{part}.csv', 'w', newline='') as file:
                    csv.writer(file).writerows(
                        [row['question'], *row['choices'], 'ABCD'[row['answer']]]
                        for row in some
                        if row['subject'] == subject
                    )
    elif task == 'hellaswag':
        lines(folder / 'hellaswag_val.jsonl', [row | {'label': int(row['label'])} for row in rows])
    elif task == 'piqa':
        lines(folder / 'valid.jsonl', [{key: row[key] for key in ('goal', 'sol1', 'sol2')} for row in rows])
        (folder / 'valid-labels.lst').write_text(''.join(f'{row["label"]}\n' for row in rows))
    elif task == 'winogrande':
        lines(folder / 'dev.jsonl', [row | {'qID': f'q{number}'} for number, row in enumerate(rows)])
    elif task.startswith('arc'):
        asked = []
        for row in rows:
            choices = [dict(zip(row['choices'], pair, strict=True)) for pair in zip(*row['choices'].values())]  # noqa: B905
            asked.append(row | {'question': {'stem': row['question'], 'choices': choices}})
        name = f'ARC-{task[4:].title()}'
        lines(folder / f'ARC-V1-Feb2018-2/{name}/{name}-Test.jsonl', asked)
    else:
        lines(folder / 'mine.jsonl', rows)


def of_the_hub(folder, task, rows, dev=()):
    """The same in the Hub's tables."""
    name = {
        'mmlu': 'all/test',
        'hellaswag': 'data/validation',
        'piqa': 'plain_text/validation',
        'winogrande': 'winogrande_xl/validation',
        'arc_easy': 'ARC-Easy/test',
        'arc_challenge': 'ARC-Challenge/test',
    }.get(task)
    if not name:
        pytest.skip('not a task of the Hub')
    table(folder / f'{name}-00000-of-00001.parquet', rows)
    if dev:
        table(folder / 'all/dev-00000-of-00001.parquet', dev)


def pairs(request):
    """What lm-eval would be asked: (context, continuation) of each option, then of each out of context."""
    if request.after is not None:
        return [(request.text + option, request.delimiter + request.after) for option in request.options]
    asked = [(request.text, request.delimiter + option) for option in request.options]
    alone = request.unconditional
    return asked + [(alone, request.delimiter + option) for option in request.options if alone is not None]


@pytest.mark.parametrize('layout', [by_authors, of_the_hub])
@pytest.mark.parametrize('task', GOLDEN)
def test_questions_are_asked_and_scored_as_lm_eval_does(task, layout, tmp_path):
    golden, bench = GOLDEN[task], evaluating.benchmark_of(task)
    rows, count = golden['rows'], len(golden['rows'])
    layout(tmp_path, task, rows, golden.get('dev', ()))
    questions = bench.read(tmp_path, {})
    if task == 'mmlu':  # its files are one a subject
        places = {subject: [n for n, r in enumerate(rows) if r['subject'] == subject] for subject in bench_groups(rows)}
        order = [places[question.group].pop(0) for question in questions]
    else:
        order = list(range(count))
    assert golden['version'] == '0.4.13' and count == len(questions) == len({q.id for q in questions}) == 300
    (way,), found = bench.ways, {}
    for number, question in zip(order, questions, strict=True):
        request = way.request(question)
        asked = pairs(request)
        if number < 3:
            assert [list(pair) for pair in asked] == golden['first'][number]
        assert RECORDER['digest'](asked) == golden['digests'][number]
        drawn = np.array(RECORDER['likelihoods'](task, number, len(asked)))
        parts = np.split(drawn, len(asked) // len(request.options))
        characters = np.array([len(option) for option in request.options])
        likely = Likelihoods(parts[0], np.ones(len(characters)), characters, parts[0] > 0, *parts[1:])
        found[number] = way.score(question, likely)
    for name, digits in golden['metrics'].items():
        ours = [found[number][f'accuracy ({METRICS[name]})'] for number in range(count)]
        assert ''.join(str(int(score)) for score in ours) == digits and len(set(digits)) == 2
    chance = bench.chance(questions)
    scores = {name: np.array([found[number][name] for number in order]) for name in found[0]}
    told = benchmark.measured(bench, questions, scores)
    for name in found[0]:
        assert told[f'centred {name}'] == pytest.approx((told[name] - chance) / (1 - chance))


def bench_groups(rows):
    return {row['subject'] for row in rows}


def test_mmlu_takes_another_number_of_examples(tmp_path):
    golden, task = GOLDEN['mmlu'], evaluating.benchmark_of('mmlu')
    by_authors(tmp_path, 'mmlu', golden['rows'], golden['dev'])
    texts = {n: task.ways[0].request(task.read(tmp_path, {'shots': n})[0]).text for n in (0, 2, 5)}
    assert [texts[n].count('\nAnswer:') for n in texts] == [1, 3, 6]
    assert texts[5].startswith(texts[2].rpartition('\n\n')[0])
    for shots, message in ((6, 'takes 0 to 5 for mmlu'), (-1, 'takes 0 to 5')):
        with pytest.raises(UserError, match=message):
            task.read(tmp_path, {'shots': shots})
    file = next((tmp_path / 'data/dev').glob('*.csv'))
    file.write_text('')
    with pytest.raises(UserError, match='takes the dev part, or --shots=0'):
        task.read(tmp_path, {})


@pytest.mark.parametrize(
    ('task', 'file', 'content', 'message'),
    [
        ('mmlu', 'data/test/law_test.csv', 'why?,a,b,c,d,E\n', 'a question of MMLU has four choices'),
        ('hellaswag', 'hellaswag_val.jsonl', '{"ctx": "a"}', 'a question of HellaSwag has'),
        ('piqa', 'valid.jsonl', '{"goal": "a", "sol1": "b", "sol2": "c"}', 'and a label, in valid-labels.lst'),
        ('winogrande', 'dev.jsonl', '{"sentence": "a", "option1": "b", "option2": "c", "answer": "1"}', 'with _'),
        ('arc_easy', 'ARC-Easy-Test.jsonl', '{"id": "1", "question": "a"}', 'a question of ARC has'),
        ('choices', 'a.jsonl', '{"question": "a", "options": ["b"], "answer": 1}', 'a.jsonl, question 1: it lacks'),
        ('choices', 'a.jsonl', '{"context": "a", "options": ["b"], "answer": 0, "image": "a.png"}', 'it lacks'),
        ('answers', 'a.jsonl', '{"question": "a", "answer": []}', 'a.jsonl, question 1: it lacks'),
        ('core', 'core.yaml', 'icl_tasks: [{label: a}]', 'a task that is none of CORE'),
        ('core', 'core.yaml', '- a: [', 'do not say what CORE is made of'),
        ('hellaswag', 'hellaswag_val.jsonl', '{"ctx_a": "a", "ctx_b": null, "activity_label": "a"}', 'HellaSwag has'),
    ],
)
def test_questions_that_are_none_are_named(task, file, content, message, tmp_path):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(content)
    (tmp_path / 'eval_meta_data.csv').write_text('Eval Task,Random baseline\n')
    with pytest.raises(UserError, match=message):
        evaluating.benchmark_of(task).read(tmp_path, {'shots': 0})
    with pytest.raises(UserError, match=r'has no .*: --data is the folder of the published files'):
        evaluating.benchmark_of(task).read(tmp_path / 'none', {'shots': 0})


# CORE ----------------------------------------------------------------------------------------------------------------

BUNDLE = """icl_tasks:
- label: pick
  dataset_uri: some/pick.jsonl
  num_fewshot: [2]
  icl_task_type: multiple_choice
  continuation_delimiter: "\\nAnswer: "
- {label: who, dataset_uri: who.jsonl, num_fewshot: [0], icl_task_type: schema}
- {label: words, dataset_uri: on.jsonl, num_fewshot: [1], icl_task_type: language_modeling}
"""


@pytest.fixture
def bundle(tmp_path):
    """An eval_bundle of three tasks: 8, 4 and 4 questions."""
    folder = tmp_path / 'eval_bundle'
    pick = [{'query': f'the cat {n}?', 'choices': ['the dog', 'the bird runs'], 'gold': n % 2} for n in range(8)]
    who = [{'context_options': [f'the cat {n} sees', 'a dog'], 'continuation': 'a house', 'gold': 1} for n in range(4)]
    on = [{'context': f' the tree {n}: ', 'continuation': 'the red house'} for n in range(4)]
    for name, rows in (('some/pick', pick), ('who', who), ('on', on)):
        lines(folder / f'eval_data/{name}.jsonl', rows)
    (folder / 'core.yaml').write_text(BUNDLE)
    (folder / 'eval_meta_data.csv').write_text(
        'Eval Task,Task Category,Random baseline\npick,x,50\nwho,x,50\nwords,x,0\n'
    )
    return folder


def test_core_asks_as_nanochat_does(bundle):
    questions = {question.id: question for question in core.read(bundle.parent, {})}
    assert [question.group for question in questions.values()] == ['pick'] * 8 + ['who'] * 4 + ['words'] * 4
    rows = [json.loads(line) for line in (bundle / 'eval_data/some/pick.jsonl').read_text().splitlines()]
    random.Random(1337).shuffle(rows)
    drawn = random.Random(1234 + 3).sample([0, 1, 2, 4, 5, 6, 7], 2)
    shots = [f'{rows[n]["query"]}\nAnswer: {rows[n]["choices"][rows[n]["gold"]]}\n\n' for n in drawn]
    common = {'chat': False, 'document': True}
    assert core.request(questions['pick-3']) == Request(
        ''.join(shots) + rows[3]['query'],
        ('the dog', 'the bird runs'),
        delimiter='\nAnswer: ',
        scored='differ',
        **common,
    )
    asked = core.request(questions['who-0'])
    assert asked == Request('', asked.options, delimiter=' ', after='a house', scored='share', **common)
    asked = core.request(questions['words-0'])
    assert asked.options == ('the red house',) and asked.delimiter == ' '
    before, behind = asked.text.split('\n\n')
    assert before.endswith(': the red house') and behind.endswith(':') and before.startswith('the tree')


def test_core_is_the_mean_of_centred_accuracies(bundle):
    questions = core.read(bundle, {})
    right = {'pick': [1, 1, 1, 0, 1, 1, 1, 0], 'who': [0, 1, 0, 0], 'words': [1, 0, 0, 0]}
    scores = {'accuracy': np.array([*right['pick'], *right['who'], *right['words']], float)}
    told = benchmark.measured(core.TASK, questions, scores)
    wanted = ((0.75 - 0.5) / 0.5 + (0.25 - 0.5) / 0.5 + 0.25) / 3
    assert told == {'CORE': pytest.approx(wanted), 'accuracy, mean of tasks': pytest.approx(1.25 / 3)}
    groups = benchmark.groups(core.TASK, questions, scores)
    assert groups['who'] == {'n': 4, 'CORE': -0.5, 'accuracy': 0.25}
    assert core.centred(questions, scores).mean() == pytest.approx(wanted)
    fewer = questions[4:]  # as --limit leaves some
    told = benchmark.measured(core.TASK, fewer, {'accuracy': scores['accuracy'][4:]})
    assert told['CORE'] == pytest.approx(((0.75 - 0.5) / 0.5 - 0.5 + 0.25) / 3)


def test_the_rows_of_core_hold_what_its_headline_is_the_mean_of(bundle):
    """So that runs can be compared by it."""

    def ask(requests, shown, title):
        ones = np.arange(8.0)
        return [('', Likelihoods(*([ones[: len(request.options)]] * 4))) for request in requests]

    asker = types.SimpleNamespace(askable=lambda task, asked: (asked, {}), ask=ask, noted=dict, lineage=dict)
    found, rows = benchmark.run(core.TASK, asker, bundle, controls='none')
    assert np.mean([row['scores']['CORE'] for row in rows]) == pytest.approx(found.metrics['CORE'])
    assert len({row['scores']['CORE'] for row in rows}) > 2


# A real engine -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def opened(tokenizer, tmp_path_factory):
    """A pretrain run of 61 positions that never learned."""
    cfg = micro.odd_config('pretrain', tmp_path_factory.mktemp('runs') / 'pretrain')
    return nanovision_jax.load(micro.run_folder(cfg, tokenizer))


@pytest.fixture
def asker(opened, tmp_path):
    return asking.Asker(opened, Pictures(tmp_path), tmp_path / 'kept')


def logs(run, ids):
    """The log-probability of each token but the first, by one forward pass, and whether it is the likeliest."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(ids)] = ids
    scores = np.asarray(jax.nn.log_softmax(run.logits(padded)[0], axis=1))[: len(ids) - 1]
    return scores[np.arange(len(ids) - 1), ids[1:]], scores.argmax(axis=1) == ids[1:]


def likely(run, context, going_on, document=False):
    """(sum, tokens) of a text behind another, by hand."""
    leading = [run.tokenizer.end_of_text] if document or not context else []
    before = [*leading, *run.tokenizer.encode(context)]
    whole = [*leading, *run.tokenizer.encode(context + going_on, trim=False)]
    found, _ = logs(run, whole)
    return found[len(before) - 1 :].sum(), len(whole) - len(before)


def test_likelihoods_are_those_by_hand(opened, asker):
    options = ('the house', 'a', 'under the red tree')
    requests = [
        Request('the cat sees', options, chat=False, delimiter=' ', unconditional=''),
        Request('a dog eats ', options[:2], chat=False, unconditional=''),  # the blank belongs to the option
        Request('the bird', options, chat=False, delimiter=' ', document=True, unconditional=''),
    ]
    for request, (prompt, found) in zip(requests, asker.ask(requests, [None] * 3, 'test'), strict=True):
        assert prompt.removeprefix('<|endoftext|>') == request.text.strip()
        wanted = [likely(opened, request.text.strip(), f' {one}', request.document) for one in request.options]
        np.testing.assert_allclose(found.sums, [one[0] for one in wanted], atol=1e-4)
        assert found.tokens.tolist() == [one[1] for one in wanted]
        assert found.characters.tolist() == [len(one) for one in request.options]
        alone = [likely(opened, '', request.delimiter + one, request.document)[0] for one in request.options]
        np.testing.assert_allclose(found.unconditional, alone, atol=1e-4)


def test_options_may_be_contexts(opened, asker):
    request = Request('', ('the cat', 'a big dog'), chat=False, delimiter=' ', after='runs under the tree')
    ((_, found),) = asker.ask([request], [None], 'test')
    wanted = [likely(opened, option, ' runs under the tree') for option in request.options]
    np.testing.assert_allclose(found.sums, [one[0] for one in wanted], atol=1e-4)
    assert found.tokens.tolist() == [one[1] for one in wanted]


def test_core_scores_what_differs_or_what_is_shared(opened, asker):
    encode, end = opened.tokenizer.encode, opened.tokenizer.end_of_text
    common = {'chat': False, 'document': True, 'delimiter': ' '}
    pick = Request('the cat sees', ('the red house', 'the red tree on'), scored='differ', **common)
    share = Request('', ('the cat runs', 'a dog'), after='under the tree', scored='share', **common)
    (_, differs), (_, shares) = asker.ask([pick, share], [None] * 2, 'test')
    for place, option in enumerate(pick.options):
        whole = [end, *encode(f'the cat sees {option}')]
        begin = len([end, *encode('the cat sees the red')])
        assert differs.tokens[place] == len(whole) - begin > 0
        np.testing.assert_allclose(differs.sums[place], logs(opened, whole)[0][begin - 1 :].sum(), atol=1e-4)
    for place, option in enumerate(share.options):
        whole, count = [end, *encode(f'{option} under the tree')], shares.tokens[0]
        assert len(encode(' under the tree', trim=False)) == count == shares.tokens[1]
        np.testing.assert_allclose(shares.sums[place], logs(opened, whole)[0][-count:].sum(), atol=1e-4)


def test_a_continuation_is_right_where_every_token_is_the_likeliest(opened, asker):
    said = ''.join(opened.continue_text('the cat', max_new_tokens=4))
    whole = [opened.tokenizer.end_of_text, *opened.tokenizer.encode('the cat')]
    requests = [Request('the cat', (option,), chat=False, document=True) for option in (said, said[:-1] + '!')]
    (_, right), (_, wrong) = asker.ask(requests, [None] * 2, 'test')
    ids = [*whole[:1], *opened.tokenizer.encode('the cat' + said, trim=False)]
    assert right.greedy[0] == logs(opened, ids)[1][len(whole) - 1 :].all() and not wrong.greedy[0]


def test_a_text_beyond_the_context_loses_its_beginning_and_is_counted(opened, tmp_path):
    rows = [
        {'context': ('the cat ' * 60).strip(), 'options': ['runs', 'eats a red house'], 'answer': 0},
        {'context': 'the cat', 'options': ['runs', 'eats ' * 70], 'answer': 0},
        {'context': 'the cat', 'options': ['runs', 'eats'], 'answer': 1},
    ]
    lines(tmp_path / 'mine/mine.jsonl', rows)
    found = evaluating.evaluate(opened.config.run_dir, 'choices', data=tmp_path / 'mine', output=tmp_path / 'out')
    assert (found.asked, found.n, found.left_out) == (3, 2, {asking.TOO_LONG: 1}) and found.other == {asking.CUT: 1}
    assert 'the cat' in (tmp_path / 'out/choices-of-mine.jsonl').read_text()
    assert not list(tmp_path.glob('out/*.answers'))
    ids = opened.tokenizer.encode('the cat ' * 60 + 'eats a red house')[-61:]
    option = len(opened.tokenizer.encode(' eats a red house', trim=False))
    row = json.loads((tmp_path / 'out/choices-of-mine.jsonl').read_text().splitlines()[0])
    assert row['likelihood']['answer']['sums'][1] == pytest.approx(logs(opened, ids)[0][-option:].sum(), abs=1e-4)


def test_a_run_is_evaluated_on_core(opened, bundle, tmp_path, capsys):
    found = evaluating.evaluate(opened.config.run_dir, 'core', data=bundle, output=tmp_path / 'out')
    assert found.n == 16 and found.baselines == {'chance': 0.0} and found.controls == {}
    rows = [json.loads(line) for line in (tmp_path / 'out/core.jsonl').read_text().splitlines()]
    right = {name: np.mean([r['scores']['accuracy'] for r in rows if r['group'] == name]) for name in found.groups}
    wanted = ((right['pick'] - 0.5) / 0.5 + (right['who'] - 0.5) / 0.5 + right['words']) / 3
    assert found.metrics['CORE'] == pytest.approx(wanted) and found.interval[0] <= wanted <= found.interval[1]
    assert rows[0]['likelihood']['prompt'].startswith('<|endoftext|>')
    assert '\n'.join(found.lines()).count('pick')


def test_examples_are_for_tasks_that_take_some(opened, tmp_path):
    lines(tmp_path / 'mine.jsonl', [{'context': 'a', 'options': ['b', 'c'], 'answer': 0}])
    with pytest.raises(UserError, match='choices takes no --shots'):
        evaluating.evaluate(opened.config.run_dir, 'choices', data=tmp_path, output=tmp_path / 'out', shots=3)
    golden = GOLDEN['mmlu']
    by_authors(tmp_path / 'mmlu', 'mmlu', golden['rows'][:20], golden['dev'])
    options = {'data': tmp_path / 'mmlu', 'output': tmp_path / 'out'}
    found = evaluating.evaluate(opened.config.run_dir, 'mmlu', shots=0, **options)
    assert found.shots == 0 and (tmp_path / 'out/mmlu-shots0.json').is_file() and set(found.controls) == {'reordered'}
    assert set(found.groups) == {'abstract_algebra', 'us_foreign_policy'}


def test_a_chat_is_not_asked_of_a_run_that_has_not_learned_to_answer(opened, tmp_path):
    lines(tmp_path / 'mine.jsonl', [{'question': 'a', 'options': ['b', 'c'], 'answer': 0}])
    with pytest.raises(UserError, match='choices takes a run that answers: not pretrain'):
        evaluating.evaluate(opened.config.run_dir, 'choices', data=tmp_path, output=tmp_path / 'out')


def test_an_option_without_tokens_is_never_the_likeliest():
    found = scoring.choice(
        Question('1', 'a', 1, options=('', 'b')),
        Likelihoods(np.array([0.0, -2.0]), np.array([0, 1]), np.array([0, 1]), np.array([True, False])),
    )
    assert found.keys() == {f'accuracy ({name})' for name in ('sum', 'per token', 'per character')}
    assert set(found.values()) == {1.0}
