"""TextVQA: questions about text in images, the validation split (arXiv:1904.08920).

Published as TextVQA_0.5.1_val.json with train_images/, and as tables of the Hub. Asked and scored as lmms-eval's
textvqa_val; textvqa_ocr says the words that OCR found too, as lmms-eval does with `ocr: true`: those of
TextVQA_Rosetta_OCR_v0.2_val.json, or of the table. An answer has at most 64 tokens.
"""

import functools

from nanovision_jax.errors import UserError
from nanovision_jax.evals import evalai
from nanovision_jax.evals.benchmark import Benchmark, Question, Request, Way
from nanovision_jax.evals.published import find, image_of, made, read_object, read_rows
from nanovision_jax.evals.scoring import SHORT

TOLD = 'a question of TextVQA has question_id, question, image_id and answers'


def read(ocr, folder, _):
    """The questions of the validation split. ocr: whether with the words that OCR found."""
    found = []
    for file in find(folder, 'TextVQA_0*_val.json', 'validation*.parquet', '*val*.parquet'):
        if file.suffix == '.json':
            words = _rosetta(folder) if ocr else {}
            make = functools.partial(_of_file, words)
            found += made(file, _data(file), make, TOLD)
        else:
            found += made(file, read_rows(file), functools.partial(_of_table, folder, file, {}, ocr), TOLD)
    return found


def _data(file):
    found = read_object(file).get('data')
    if not isinstance(found, list):
        raise UserError(f'{file} has no list `data`.')
    return found


def _rosetta(folder):
    file = find(folder, 'TextVQA_Rosetta_OCR*_val.json')[0]
    told = 'an image of Rosetta has image_id and ocr_tokens'
    return dict(made(file, _data(file), lambda _, row: (row['image_id'], row['ocr_tokens']), told))


def _of_file(words, _, row):
    return _question(row, f'{row["image_id"]}.jpg', words.get(row['image_id'], []))


def _of_table(folder, file, images, ocr, place, row):
    image = images.setdefault(row['image_id'], image_of(file, folder, place))
    return _question(row, image, row['ocr_tokens'] if ocr else [])


def _question(row, image, words):
    wanted = [evalai.textvqa(answer) for answer in row['answers']]
    return Question(str(row['question_id']), row['question'].capitalize(), wanted, image, given={'words': words})


def request(ocr, question):
    """As lmms-eval's textvqa_val asks, with the words of OCR or without."""
    words = f'\nReference OCR token: {", ".join(question.given["words"])}' if ocr else ''
    return Request(question.text + words + SHORT, most=64)


def score(question, answer):
    """VQA accuracy with the whole of EvalAI's normalisation."""
    return {'accuracy': evalai.accuracy(evalai.textvqa(answer), question.answer)}


def task(name, ocr):
    """One of the two."""
    way = Way('generate', functools.partial(request, ocr), score)
    return Benchmark(name, functools.partial(read, ocr), (way,), 'accuracy', chance=lambda questions: 0.0)


TASK, OCR = task('textvqa', False), task('textvqa_ocr', True)
