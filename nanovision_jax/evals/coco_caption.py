"""COCO captions: one sentence about a photograph, against those of five people (arXiv:1504.00325).

Published as captions_val2017.json, as Karpathy's dataset_coco.json, of which the test split is taken, and as tables of
the Hub (lmms-lab's COCO-Caption2017). Asked as lmms-eval asks: Karpathy's split with other words. captions.py has
the scores. How rare words are, for CIDEr, is told by the references of all images of the file, so that it is the same
with --limit. CIDEr is not multiplied by 100.
"""

import collections
import functools

import numpy as np

from nanovision_jax.evals import captions
from nanovision_jax.evals.benchmark import Benchmark, Question, Request, Way
from nanovision_jax.evals.published import find, image_of, made, read_object, read_rows

CAPTION, BRIEFLY = 'Provide a one-sentence caption for the provided image.', 'Describe the image briefly.'
FILES = 'dataset_coco.json', 'captions_val2017.json', 'captions_val2014.json', 'val*.parquet', '*val*.parquet'


def read(folder, _):
    """A question for each image."""
    found = []
    for file in find(folder, *FILES):
        if file.suffix == '.parquet':
            told = 'an image of COCO has question_id and answer, its captions'
            found += made(file, read_rows(file), functools.partial(_of_table, folder, file), told)
        elif file.name == 'dataset_coco.json':
            told = 'an image of Karpathy has filename, split and sentences'
            found += made(file, read_object(file).get('images') or [], _of_karpathy, told)
        else:
            found += _of_coco(file)
    if found:
        cider = captions.Cider([question.given['references'] for question in found])
        for question in found:
            question.given['cider'] = cider
    return found


def _of_table(folder, file, place, row):
    return _question(row['question_id'], CAPTION, row['answer'], image_of(file, folder, place))


def _of_karpathy(_, row):
    if row['split'] == 'test':
        said = [sentence['raw'] for sentence in row['sentences']]
        return _question(row['filename'], BRIEFLY, said, row['filename'])


def _of_coco(file):
    held, said = read_object(file), collections.defaultdict(list)
    told = 'captions of COCO have image_id and caption, images id and file_name'
    for image, caption in made(
        file, held.get('annotations') or [], lambda _, row: (row['image_id'], row['caption']), told
    ):
        said[image].append(caption)
    return made(
        file,
        held.get('images') or [],
        lambda _, row: _question(row['id'], CAPTION, said[row['id']], row['file_name']) if said[row['id']] else None,
        told,
    )


def _question(name, asked, said, image):
    references = [captions.tokens(caption) for caption in said]
    if not references:
        raise ValueError
    return Question(str(name), asked, list(said), image, given={'references': references})


def score(question, answer):
    """CIDEr-D and ROUGE-L of a caption, and what BLEU counts of it."""
    words, references = captions.tokens(answer), question.given['references']
    found = {'CIDEr': question.given['cider'].score(words, references), 'ROUGE-L': captions.rouge_l(words, references)}
    return found | captions.bleu_counts(words, references)


def metrics(_, scores):
    """The means of CIDEr-D and ROUGE-L, and BLEU-4 of all captions together."""
    found = {name: float(np.mean(scores[name])) for name in ('CIDEr', 'ROUGE-L')}
    return found | {'BLEU-4': captions.bleu(scores)[3]}


TASK = Benchmark(
    'coco_caption',
    read,
    (Way('generate', lambda question: Request(question.text, most=64), score),),
    'CIDEr',
    chance=lambda questions: 0.0,
    metrics=metrics,
)
