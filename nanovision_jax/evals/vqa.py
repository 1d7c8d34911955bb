"""Questions about pictures, in LLaVA's format: exact match after normalisation, by kind of question.

Every question is asked alone, with its picture. Then all are asked again with the pictures blanked, and with pictures
of other questions: a model that answers as well without its picture does not look at it.

A description is scored by its parts: the share of things named rightly, of all that are there or were named.
"""

import collections
import dataclasses
import re

import numpy as np
from tqdm import tqdm

from nanovision_jax import engine
from nanovision_jax.data import conversation, images, sources
from nanovision_jax.errors import UserError

BATCH = 128
GREY = 128


@dataclasses.dataclass
class Question:
    """A question, its picture as uint8 [size, size, 3], and the answer wanted."""

    id: str
    image: str
    picture: np.ndarray
    text: str
    reference: str
    kind: str


def normalise(answer):
    """Lower case, without punctuation and articles, single spaces; VQA's usual normalisation."""
    words = re.sub(r'[^\w\s]', ' ', answer.lower()).split()
    kept = [word for word in words if word not in ('a', 'an', 'the')]
    return ' '.join(kept or words)  # the answer to a choice may be A


def score(kind, answer, reference):
    """1 where the answer is the reference, else 0; for a description, the share of its parts (in any order)."""
    if kind != 'description':
        return float(normalise(answer) == normalise(reference))
    parts = [
        collections.Counter(normalise(part) for part in re.split(r',\s+(?:and\s+)?|\s+and\s+', text) if part.strip())
        for text in (answer, reference)
    ]
    return (parts[0] & parts[1]).total() / (parts[0] | parts[1]).total()


def chance(questions):
    """The score of always giving the kind's commonest answer."""
    commonest = collections.Counter(q.reference for q in questions).most_common(1)[0][0]
    return float(np.mean([score(q.kind, commonest, q.reference) for q in questions]))


def interval(scores, groups, seed=0, resamples=1000):
    """The 95% bootstrap interval of the mean score, resampling pictures: questions on one picture go together."""
    _, group = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(group, scores), np.bincount(group)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    return [float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))]


def load_questions(config, split, data=None, image_store=None, limit=None):
    """Every question of a split that has one picture. kind: the data's own, else the question's first three words."""
    if data:
        source = sources.Conversations(data, image_store or '')
    elif config.data.source == 'tiny_world':
        source = sources.TinyWorld(config.data.path, split, 'conversation')
    else:
        source = sources.open_source(config, split)
    found, vision = [], config.model.vision
    for i in range(len(source)):
        try:
            example = source[i]
            if len(example.images) != 1 or (hasattr(source, 'side') and not data and source.side(example) != split):
                continue
            picture = images.decode(example.images[0], vision)
        except conversation.BadExample:
            continue
        for user, answer in zip(example.messages[::2], example.messages[1::2], strict=False):
            text = conversation.text_of(user)
            kind = answer.get('kind') or ' '.join(text.lower().split()[:3])
            name = f'{example.id}-{len(found)}'
            found.append(Question(name, example.names[0], picture, text, conversation.text_of(answer), kind))
        if limit and len(found) >= limit:
            break
    if not found:
        raise UserError(f'no question about a picture in the {split} split of {data or config.data.path}.')
    return found[:limit]


def prompt_ids(question, config, tokenizer):
    """A question asked alone, behind its picture, as token ids."""
    content = [{'type': 'image'}, {'type': 'text', 'text': question.text}]
    messages = [{'role': 'user', 'content': content}]
    return conversation.encode(messages, tokenizer, config.model.vision.patches, 1, question=True).ids


def ask(runner, questions, ids, pictures, title):
    """The answers to questions, each with the ids and the picture of the same index."""
    order = sorted(range(len(questions)), key=lambda i: (questions[i].kind, i))  # kinds have answers of like length
    answers = [''] * len(questions)
    for start in tqdm(range(0, len(order), BATCH), title, unit='batch'):
        chosen = order[start : start + BATCH]
        prompts = [engine.Prompt(ids[i], [pictures[i]]) for i in chosen]
        filled = prompts + prompts[-1:] * (BATCH - len(prompts))  # one shape, one compilation
        for i, answer in zip(chosen, runner.answer(filled, max_new_tokens=64), strict=False):
            answers[i] = answer
    return answers


def run(model_run, split='validation', data=None, images=None, limit=None):
    """(result, rows): the scores with their controls, and one object a question. Needs a vision run.

    A question longer than the context is not asked; `too_long` counts these.
    """
    config, tokenizer = model_run.config, model_run.tokenizer
    if not config.stage.startswith('vision'):
        raise UserError(f'vqa takes a vision_pretrain or vision_instruct run: a {config.stage} run cannot answer it.')
    questions = load_questions(config, split, data, images, limit)
    if len({q.image for q in questions}) == 1:
        raise UserError('all questions are about one picture: the control that swaps pictures needs another.')
    whole = [(q, prompt_ids(q, config, tokenizer)) for q in questions]
    kept = [(q, ids) for q, ids in whole if len(ids) < config.model.positions]
    if not kept:
        raise UserError(f'every question is longer than the context of {config.model.positions} tokens.')
    questions, ids = zip(*kept, strict=True)
    runner = model_run.engine

    def asked(pictures, title):
        answers = ask(runner, questions, ids, pictures, title)
        return answers, np.array([score(q.kind, a, q.reference) for q, a in zip(questions, answers, strict=True)])

    pictures = [q.picture for q in questions]
    answers, scores = asked(pictures, 'vqa')
    controls = {
        'blank': asked([np.full_like(p, GREY) for p in pictures], 'vqa, blank pictures')[1],
        'shuffled': asked(other_pictures(questions), 'vqa, shuffled pictures')[1],
    }
    by_kind = {}
    for kind in sorted({q.kind for q in questions}):
        members = [i for i, q in enumerate(questions) if q.kind == kind]
        row = {'n': len(members), 'accuracy': scores[members].mean(), 'chance': chance([questions[i] for i in members])}
        row |= {name: values[members].mean() for name, values in controls.items()}
        by_kind[kind] = {name: value if name == 'n' else float(value) for name, value in row.items()}
    result = {
        'task': 'vqa',
        'n': len(questions),
        'accuracy': float(scores.mean()),
        'interval': interval(scores, [q.image for q in questions]),
        'by_kind': by_kind,
        'controls': {name: float(values.mean()) for name, values in controls.items()},
        'too_long': len(whole) - len(kept),
    }
    rows = [
        {
            'id': q.id,
            'image': q.image,
            'question': q.text,
            'reference': q.reference,
            'answer': a,
            'correct': s,
            'kind': q.kind,
        }
        for q, a, s in zip(questions, answers, scores.tolist(), strict=True)
    ]
    return result, rows


def other_pictures(questions, seed=0):
    """For each question a picture that belongs to another one: the pictures in a random circle, one step on."""
    by_name = {q.image: q.picture for q in questions}
    names = sorted(by_name)
    order = np.random.default_rng(seed).permutation(len(names))
    after = {names[a]: names[b] for a, b in zip(order, np.roll(order, 1), strict=True)}
    return [by_name[after[q.image]] for q in questions]
