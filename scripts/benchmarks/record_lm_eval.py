"""Records what lm-eval makes of 300 made questions a task: what it asks, and how it scores given likelihoods.

    python -m venv lmeval && lmeval/bin/pip install lm-eval==0.4.13
    lmeval/bin/python scripts/benchmarks/record_lm_eval.py tests/golden/lm_eval

Nothing is downloaded: the tasks' own YAML and code get the made questions in place of the Hub's tables. Of each task a
file is written, with lm-eval's version, the questions as the Hub has them, the first three requests, a digest of each
(context, continuation), and the metrics of each question. tests/test_text_tasks.py reads the same questions in the
published layouts and compares. Likelihoods are drawn: see likelihoods().
"""

import hashlib
import importlib.metadata
import json
import pathlib
import random
import sys

COUNT = 300
WORDS = """the a cat dog river machine [title] [step] quickly "slowly" naïve 你好 3.5 %, water. boils (at) 100° it's
cold; hot — why? because they went _home_ "again" Über café and or not"""


def likelihoods(task: str, number: int, count: int) -> list[float]:
    """Of the options of a question, some of them equal; the second half are those without a context."""
    rng = random.Random(f'{task}-{number}')
    return [-rng.randrange(1, 40) / 4 for _ in range(count)]


def text(rng, low, high, words=WORDS):
    return ('  ' if rng.random() < 0.1 else ' ').join(rng.choices(words.split(), k=rng.randint(low, high)))


def made(task: str, seed: str = '') -> list[dict]:
    """Questions as the Hub has them."""
    rng, rows = random.Random(task + seed), []
    for number in range(COUNT):
        if task == 'mmlu':
            question = text(rng, 3, 12) + rng.choice(['', ' ', '\n'])
            rows.append({'question': question, 'choices': [text(rng, 1, 4) for _ in range(4)]})
            rows[-1] |= {'subject': ('abstract_algebra', 'us_foreign_policy')[number % 2], 'answer': rng.randrange(4)}
        elif task == 'hellaswag':
            rows.append({'ind': number, 'activity_label': text(rng, 1, 2), 'ctx_a': text(rng, 2, 8)})
            rows[-1] |= {'ctx_b': text(rng, 0, 2), 'endings': [text(rng, 1, 6) for _ in range(4)]}
            rows[-1] |= {'label': str(rng.randrange(4))}
        elif task == 'piqa':
            rows.append({'goal': text(rng, 2, 8), 'sol1': text(rng, 1, 8), 'sol2': text(rng, 1, 8)})
            rows[-1] |= {'label': rng.randrange(2)}
        elif task == 'winogrande':
            words = WORDS.replace('_', '')
            sentence = f'{text(rng, 1, 6, words)} _ {text(rng, 1, 6, words)}'
            rows.append({'sentence': sentence, 'option1': text(rng, 1, 1, words), 'option2': text(rng, 1, 2, words)})
            rows[-1] |= {'answer': rng.choice('12')}
        elif task in ('arc_easy', 'arc_challenge'):
            count = rng.choice((3, 4, 4, 5))
            labels = list(rng.choice(('ABCDE', '12345'))[:count])
            rows.append({'id': f'Q{number}', 'question': text(rng, 3, 12)})
            rows[-1] |= {'choices': {'text': [text(rng, 1, 4) for _ in labels], 'label': labels}}
            rows[-1] |= {'answerKey': rng.choice(labels)}
        else:
            options = [text(rng, 1, 4) for _ in range(rng.randint(2, 5))]
            rows.append({'id': f'q{number}', 'context': text(rng, 2, 8), 'options': options})
            rows[-1] |= {'answer': rng.randrange(len(options))}
    return rows


CHOICES = {
    'task': 'choices',
    'dataset_path': 'json',
    'test_split': 'test',
    'output_type': 'multiple_choice',
    'doc_to_text': '{{context}}',
    'doc_to_choice': 'options',
    'doc_to_target': 'answer',
    'metric_list': [{'metric': name} for name in ('acc', 'acc_norm', 'acc_mutual_info')],
}
TASKS = {  # name: the names of lm-eval's tasks, the part that is asked
    'mmlu': (('mmlu_abstract_algebra', 'mmlu_us_foreign_policy'), 'test'),
    'hellaswag': (('hellaswag',), 'validation'),
    'piqa': (('piqa',), 'validation'),
    'winogrande': (('winogrande',), 'validation'),
    'arc_easy': (('arc_easy',), 'test'),
    'arc_challenge': (('arc_challenge',), 'test'),
    'choices': ((CHOICES,), 'test'),
}


def record(name: str) -> dict:
    """What lm-eval makes of a task's questions."""
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager, get_task_dict

    tasks, part = TASKS[name]
    rows, found = made(name), {}
    dev = made(name, 'dev')[:12] if name == 'mmlu' else []
    places = {json.dumps(row, sort_keys=True): number for number, row in enumerate(rows)}

    def load_dataset(path, name=None, **_):
        some = [row for row in rows if row.get('subject', name) == name] if dev else rows
        few = [row for row in dev if row['subject'] == name]
        parts = {part: some, 'train': some, 'validation': some, 'test': some} | ({'dev': few} if few else {})
        return datasets.DatasetDict({key: datasets.Dataset.from_list(value) for key, value in parts.items()})

    datasets.load_dataset = load_dataset
    for one in tasks:
        if isinstance(one, dict):
            task = ConfigurableTask(config=dict(one))
        else:
            (task,) = get_task_dict([one], TaskManager()).values()
        task.config.num_fewshot = task.config.num_fewshot or (5 if dev else 0)
        task.build_all_requests(limit=None, rank=0, world_size=1)
        of_doc = {}
        for instance in task.instances:
            of_doc.setdefault(instance.doc_id, []).append(instance)
        for asked in of_doc.values():
            doc = asked[0].doc
            own = {key: doc[key] for key in rows[0]}
            number = places[json.dumps(own, sort_keys=True)]
            pairs = [[instance.args[0], instance.args[1]] for instance in asked]
            given = [(value, False) for value in likelihoods(name, number, len(pairs))]
            found[number] = {'pairs': pairs, 'metrics': task.process_results(doc, given)}
    assert len(found) == COUNT
    told = {'version': importlib.metadata.version('lm_eval'), 'rows': rows} | ({'dev': dev} if dev else {})
    told['first'] = [found[number]['pairs'] for number in range(3)]
    told['digests'] = [digest(found[number]['pairs']) for number in range(COUNT)]
    names = found[0]['metrics']
    told['metrics'] = {key: ''.join(str(int(found[n]['metrics'][key])) for n in range(COUNT)) for key in names}
    return told


def digest(pairs) -> str:
    """Of a question's (context, continuation) pairs."""
    return hashlib.sha256(json.dumps([list(pair) for pair in pairs]).encode()).hexdigest()[:12]


if __name__ == '__main__':
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in TASKS:
        told = record(name)
        (folder / f'{name}.json').write_text(json.dumps(told, ensure_ascii=False, separators=(',', ':')) + '\n')
        print(name, {key: value.count('1') for key, value in told['metrics'].items()})
