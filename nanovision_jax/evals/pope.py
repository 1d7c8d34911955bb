"""POPE: is there a such-and-such in the image? Polling-based object probing (arXiv:2305.10355).

Its published files are coco_pope_{random,popular,adversarial}.json, of 3,000 questions each about 500 images of
val2014; lmms-lab's table of the Hub has the same. Two rules of what counts as yes. The official one: a first sentence
with the word no or not says no, all else says yes, garbage too. The strict one, of lmms-eval: the answer is yes or no,
whatever its case; what is neither is wrong, and is in neither precision nor recall. Asked as lmms-eval asks, but that
an answer ends after 16 tokens, not 128.
"""

import functools
import re

import numpy as np

from nanovision_jax.evals.benchmark import Benchmark, Question, Request, Way
from nanovision_jax.evals.published import find, image_of, made, read_rows
from nanovision_jax.evals.scoring import SHORT

YES, NO, NEITHER = 1, 0, -1


def read(folder, _):
    """The questions of every category that is there."""
    found = []
    for file in find(folder, 'coco_pope_*.json', '*pope*.json*', 'test*.parquet'):
        if file.suffix == '.parquet':
            make, told = functools.partial(_of_table, folder, file, {}), 'question, answer, image_source and category'
        else:
            make, told = functools.partial(_of_file, file.stem.rsplit('_', 1)[-1]), 'image, text and label'
        found += made(file, read_rows(file), make, f'a question of POPE has question_id, {told}')
    return found


def _of_file(category, _, row):
    return _question(row['question_id'], row['text'], row['label'], row['image'], category)


def _of_table(folder, file, images, place, row):
    image = images.setdefault(row['image_source'], image_of(file, folder, place))
    return _question(row['question_id'], row['question'], row['answer'], image, row['category'])


def _question(number, text, answer, image, category):
    if answer not in ('yes', 'no'):
        raise ValueError
    return Question(f'{category}-{number}', text.strip(), answer, image, category)


def official(answer: str) -> int:
    """What an answer says by POPE's own rule: no where its first sentence has no or not, else yes."""
    words = answer.split('.')[0].replace(',', '').split(' ')
    return NO if {'No', 'no', 'not'} & set(words) else YES


def strict(answer: str) -> int:
    """What an answer says by lmms-eval's rule: yes or no where it is that word, in any case, else neither."""
    return {'yes': YES, 'no': NO}.get(answer.lower().strip(), NEITHER)


def lenient(answer: str) -> int:
    """yes or no where the first word is one of these, whatever stands behind it."""
    first = re.match(r'\W*(yes|no)\b', answer.lower())
    return {'yes': YES, 'no': NO}[first[1]] if first else NEITHER


RULES = {'official': official, 'strict': strict}


def score(question, answer):
    """Right or wrong by both rules, and what the answer said."""
    wanted, found = YES if question.answer == 'yes' else NO, {}
    for name, rule in RULES.items():
        said = rule(answer)
        found |= {f'accuracy ({name})': float(said == wanted), f'said ({name})': said}
    return found | {'neither': float(lenient(answer) == NEITHER)}


def metrics(questions, scores):
    """Accuracy, precision, recall and F1 of `yes` by both rules, pooled, and F1's mean over the categories."""
    wanted = np.array([YES if question.answer == 'yes' else NO for question in questions])
    groups, found = np.array([question.group for question in questions]), {}
    for name in RULES:
        said = scores[f'said ({name})']
        found[f'accuracy ({name})'] = float((said == wanted).mean())
        for metric, value in zip(('precision', 'recall', 'F1'), _retrieval(said, wanted), strict=True):
            found[f'{metric} ({name})'] = value
        each = [_retrieval(said[groups == group], wanted[groups == group])[2] for group in np.unique(groups)]
        found[f'F1, mean of categories ({name})'] = float(np.mean(each))
        found[f'yes-ratio of the answers ({name})'] = float((said == YES).mean())
    return found | {'neither yes nor no': float(scores['neither'].mean())}


def _retrieval(said, wanted):
    """(precision, recall, F1); what is neither is in none of them."""
    right = np.sum((said == YES) & (wanted == YES))
    precision = right / max(1, np.sum(said == YES))
    recall = right / max(1, np.sum((wanted == YES) & (said != NEITHER)))
    return float(precision), float(recall), float(2 * precision * recall / max(1e-12, precision + recall))


TASK = Benchmark(
    'pope',
    read,
    (Way('generate', lambda question: Request(question.text + SHORT), score),),
    'accuracy (strict)',
    chance=lambda questions: 0.5,
    metrics=metrics,
    said={'always yes': 'yes'},
)
