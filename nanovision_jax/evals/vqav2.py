"""VQAv2: open questions about photographs, the validation split (arXiv:1612.00837).

Published as v2_OpenEnded_mscoco_val2014_questions.json and v2_mscoco_val2014_annotations.json with val2014/, and as
tables of the Hub. Asked and scored as lmms-eval's vqav2_val, in groups by kind of answer. Versions of the official
script leave answers as they are where all ten people agree; lmms-eval and we normalise every one.
"""

import functools

from nanovision_jax.evals import evalai
from nanovision_jax.evals.benchmark import Benchmark, Question, Request, Way
from nanovision_jax.evals.published import find, image_of, made, read_object, read_rows
from nanovision_jax.evals.scoring import SHORT

QUESTIONS, ANNOTATIONS = 'v2_OpenEnded_mscoco_val2014_questions.json', 'v2_mscoco_val2014_annotations.json'
TOLD = 'a question of VQAv2 has question_id, question and image_id, its annotation answers and answer_type'


def read(folder, _):
    """The questions of the validation split."""
    found = []
    for file in find(folder, QUESTIONS, 'validation*.parquet', '*val*.parquet'):
        if file.suffix == '.json':
            beside = find(folder, ANNOTATIONS)[0]
            known = dict(made(beside, read_object(beside).get('annotations') or [], _named, TOLD))
            rows = read_object(file).get('questions') or []
            found += made(file, rows, functools.partial(_of_file, known), TOLD)
        else:
            found += made(file, read_rows(file), functools.partial(_of_table, folder, file, {}), TOLD)
    return found


def _named(_, row):
    return row['question_id'], row


def _of_file(known, _, row):
    return _question(row | known[row['question_id']], f'COCO_val2014_{row["image_id"]:012}.jpg')


def _of_table(folder, file, images, place, row):
    return _question(row, images.setdefault(row['image_id'], image_of(file, folder, place)))


def _question(row, image):
    wanted = [evalai.vqav2(answer['answer']) for answer in row['answers']]
    return Question(str(row['question_id']), row['question'], wanted, image, row['answer_type'])


def score(question, answer):
    """VQA accuracy."""
    return {'accuracy': evalai.accuracy(evalai.vqav2(answer), question.answer)}


TASK = Benchmark(
    'vqav2',
    read,
    (Way('generate', lambda question: Request(question.text + SHORT), score),),
    'accuracy',
    chance=lambda questions: 0.0,
    said={'always yes': 'yes'},
)
