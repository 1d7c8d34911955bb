"""Questions about images, in LLaVA's format: exact match after normalisation, by kind of question.

Every question is asked alone, with its image. Then all are asked again with the images blanked, and with images
of other questions: a model that answers as well without its image does not look at it.

A description is scored by its parts: the share of things named rightly, of all that are there or were named.

A question that cannot be asked is left out, counted, and listed with its reason; more than 1% of these are an error.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re

import numpy as np
from tqdm import tqdm

from nanovision_jax.data import conversation, images, sources
from nanovision_jax.errors import UserError
from nanovision_jax.evals.base import GREY, Accuracy, interval, others, told_counts
from nanovision_jax.inference.engine import Prompt
from nanovision_jax.stages import stage_of

BATCH = 128
TOO_LONG = 'longer than the context'  # a reason to leave a question out


@dataclasses.dataclass
class Question:
    """A question, its image's name and which row of the source holds it, and the answer wanted.

    system: the system messages of its conversation, which stand before the question.
    """

    id: str
    image: str
    place: int
    text: str
    reference: str
    kind: str
    system: list[dict] = dataclasses.field(default_factory=list)


def normalise(answer):
    """Lower case, without punctuation and articles, single spaces; VQA's usual normalisation."""
    words = re.sub(r'(?!-\d)[^\w\s]', ' ', answer.lower()).split()
    kept = [word for word in words if word not in ('a', 'an', 'the')]
    return ' '.join(kept or words) or answer.strip()  # the answer to a choice may be A, or a sign alone


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


class Questions:
    """A split's questions about one image: `found`, and `lost`, which cannot be asked, as rows of the .jsonl.

    other: {what is no question about one image: how many of these}. source: where the images are. split: which rows of
    a source that mixes splits are taken; None takes all.
    """

    def __init__(self, source: sources.Source, split: str | None):
        self.source, self.split = source, split if source.mixes_splits else None
        self.found, self.lost, self.other = [], [], collections.Counter()

    def reasons(self) -> dict[str, int]:
        """{reason: how many were lost for it}, the commonest first; names of images are left out of the reasons."""
        reasons = (conversation.kind_of(row['left_out']) for row in self.lost)
        return dict(collections.Counter(reasons).most_common())

    def take(self, place: int, vision):
        """Takes the questions of row `place` of the source. vision: the config.Vision that its image must suit."""
        reason = None
        try:
            example = self.source[place]
        except conversation.BadExample as error:  # of conversations alone: other sources were checked as they were made
            example, reason = self.source.without_images(place), str(error)
        if self.split and self.split != (
            self.source.likely_split_of(place) if reason else self.source.split_of(example)
        ):
            return
        if example is None:
            unread = Question(str(self.source.number(place)), None, place, None, None, None)
            self.lost.append(row_of(unread, left_out=reason))
            return
        asked, shown = pairs(example.messages), image_parts(example.messages)
        if shown > len(example.names):
            reason = f'{shown} image places for {len(example.names)} images'
        elif len(example.names) != 1:
            self.other[f'question about {len(example.names) or "no"} pictures'] += len(asked)
            return
        reason = reason or _damage(example.images[0], vision)  # it is read again when it is asked about
        for user, answer in asked:
            question = self._question(example, place, user, answer)
            if reason or not question.reference.strip():
                self.lost.append(row_of(question, left_out=reason or 'empty answer'))
            else:
                self.found.append(question)

    def _question(self, example, place, user, answer):
        content = user['content']
        texts = [content] if isinstance(content, str) else [p['text'] for p in content if p['type'] == 'text']
        text = '\n'.join(texts).strip()
        kind = str(answer.get('kind') or ' '.join(text.lower().split()[:3]))
        name = f'{example.id}-{len(self.found) + len(self.lost)}'
        image = example.names[0] if example.names else None
        system = [message for message in example.messages if message['role'] == 'system']
        return Question(name, image, place, text, conversation.text_of(answer), kind, system)


def _damage(encoded, vision):
    """Why an image cannot be read; None where it can."""
    try:
        images.decode(encoded, vision)
    except conversation.BadExample as error:
        return str(error)
    return None


def load_questions(config, split, data=None, image_store=None, limit=None) -> Questions:
    """The Questions of a split. kind: the data's own, else the question's first three words.

    limit: at most this many are found. Raises UserError where there is no question, readable or not.
    """
    if data:
        source = sources.Conversations(data, image_store or '')
    elif config.data.source == 'tiny_world':
        source = sources.TinyWorldSource(config.data.local_path, split, 'conversation')
    else:
        source = sources.open_source(config, split)
    questions = Questions(source, None if data else split)
    for place in range(len(source)):
        questions.take(place, config.model.vision)
        if limit and len(questions.found) >= limit:
            break
    if not questions.found and not questions.lost:
        held = ''.join(f' It has {told_counts(questions.other)}.' if questions.other else '')
        raise UserError(f'no question about one picture in the {split} split of {data or config.data.path}.{held}')
    questions.found = questions.found[:limit]
    return questions


def image_parts(messages) -> int:
    """How many images a conversation has places for."""
    shown = [message['content'] for message in messages if not isinstance(message['content'], str)]
    return sum(map(conversation.is_image, itertools.chain(*shown)))


def pairs(messages):
    """Each question of a conversation with its answer."""
    turns = [message for message in messages if message['role'] in ('user', 'assistant')]
    return [(a, b) for a, b in itertools.pairwise(turns) if (a['role'], b['role']) == ('user', 'assistant')]


def row_of(question, **found):
    """The row of the .jsonl about a question: what is asked, and what was found."""
    told = {'id': question.id, 'image': question.image, 'question': question.text, 'reference': question.reference}
    return told | found | {'kind': question.kind}


def prompt_ids(question, config, tokenizer):
    """A question asked alone, behind its image and what the system says, as token ids."""
    content = [{'type': 'image'}, {'type': 'text', 'text': question.text}]
    messages = [*question.system, {'role': 'user', 'content': content}]
    return conversation.encode(messages, tokenizer, [config.model.vision.patches], question=True).ids


def ask(run, questions, prompt, title):
    """The answers to questions. prompt(i) is the engine's prompt of question i, made when its batch is asked."""
    order = sorted(range(len(questions)), key=lambda i: (questions[i].kind, i))  # kinds have answers of like length
    answers = [''] * len(questions)
    for start in tqdm(range(0, len(order), BATCH), title, unit='batch'):
        chosen = order[start : start + BATCH]
        prompts = [prompt(i) for i in chosen]
        filled = prompts + prompts[-1:] * (BATCH - len(prompts))  # one shape, one compilation
        for i, answer in zip(chosen, run.answer(filled, max_new_tokens=64), strict=False):
            answers[i] = answer
    return answers


def reader(source, vision):
    """A function place → the image of that row, uint8 [size, size, 3]; it keeps the last BATCH images."""

    @functools.lru_cache(BATCH)
    def image(place):
        try:
            return images.decode(source[place].images[0], vision)
        except conversation.BadExample as error:
            raise UserError(f'a picture that was read before cannot be read again: {error}.') from error

    return image


def run(model_run, split='validation', data=None, images=None, limit=None, allow_missing=False, controls=True):
    """(result, rows): the scores with their controls, and one object a question. Needs a vision run.

    Images are read as they are asked about: at most 2 × BATCH are in memory, and of all questions only their text.

    result: asked = n + the sum of left_out, {reason: count}. A question is left out if its image cannot be read, or
    if it is longer than the context. `other` counts what is no question about one image, and so is not asked.
    controls: whether all are asked again with blank and with other images. Raises UserError, before the model is
    asked, if over 1% are left out without allow_missing.
    """
    config, tokenizer, vision = model_run.config, model_run.tokenizer, model_run.config.model.vision
    if not stage_of(config).sees:
        raise UserError(f'vqa takes a vision_pretrain or vision_instruct run: a {config.stage} run cannot answer it.')
    loaded = load_questions(config, split, data, images, limit)
    questions = askable(loaded, config, tokenizer)
    check_left_out(loaded, len(questions), allow_missing)
    if len({q.image for q in questions}) == 1:
        raise UserError('all questions are about one picture: the control that swaps pictures needs another.')
    image = reader(loaded.source, vision)
    place, other = {q.image: q.place for q in questions}, others([q.image for q in questions])
    grey = np.full((vision.image_size, vision.image_size, 3), GREY, np.uint8)

    def asked(image_of, title):
        def prompt(i):
            return Prompt(prompt_ids(questions[i], config, tokenizer), [image_of(i)])

        answers = ask(model_run, questions, prompt, title)
        return answers, np.array([score(q.kind, a, q.reference) for q, a in zip(questions, answers, strict=True)])

    answers, scores = asked(lambda i: image(questions[i].place), 'vqa')
    shown = {'blank': lambda _: grey, 'shuffled': lambda i: image(place[other[questions[i].image]])}
    controls = {name: asked(of, f'vqa, {name} pictures')[1] for name, of in shown.items() if controls}
    result = Accuracy(
        'vqa',
        len(questions),
        float(scores.mean()),
        interval(scores, [q.image for q in questions]),
        by_kind(questions, scores, controls),
        {name: float(values.mean()) for name, values in controls.items()},
        asked=len(questions) + len(loaded.lost),
        left_out=loaded.reasons(),
        other=dict(loaded.other),
        too_long=loaded.reasons().get(TOO_LONG, 0),
    )
    rows = [
        row_of(q, answer=answer, correct=correct)
        for q, answer, correct in zip(questions, answers, scores.tolist(), strict=True)
    ]
    return result, rows + loaded.lost


def by_kind(questions, scores, controls) -> dict[str, dict]:
    """{kind: {n, accuracy, chance, and the accuracy under each control}}. controls: {control: scores}."""
    found = {}
    for kind in sorted({q.kind for q in questions}):
        members = [i for i, q in enumerate(questions) if q.kind == kind]
        row = {'accuracy': scores[members].mean(), 'chance': chance([questions[i] for i in members])}
        row |= {name: values[members].mean() for name, values in controls.items()}
        found[kind] = {'n': len(members)} | {name: float(value) for name, value in row.items()}
    return found


def askable(loaded, config, tokenizer):
    """The found Questions that can be asked; those that are no conversation or too long become lost."""
    questions = []
    for question in loaded.found:
        try:
            reason = TOO_LONG if len(prompt_ids(question, config, tokenizer)) >= config.model.positions else None
        except conversation.BadExample as error:
            reason = str(error)
        if reason:
            loaded.lost.append(row_of(question, left_out=reason))
        else:
            questions.append(question)
    return questions


def check_left_out(loaded, answered, allow_missing):
    """Raises UserError if more than 1% of the questions are lost (unless allow_missing), or all are."""
    if (n := len(loaded.lost)) > (0 if not answered else math.inf if allow_missing else 0.01 * (n + answered)):
        hint = 'mend the data, or say --allow-missing to score the others' if answered else 'there is none to score'
        raise UserError(
            f'{n} of {n + answered} questions cannot be asked, and at most 1% may be left out: '
            f'{told_counts(loaded.reasons())}; {hint}.'
        )
