"""Asks a run what benchmarks ask: in batches, in words or by likelihood, and never the same twice.

What was answered is kept beside the results until the task is done, so that an evaluation which was cut off goes on
where it was. A line is known by all that its answer follows from: the prompt's ids, the image, the checkpoint.
"""

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import pathlib
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from nanovision_jax.data import images
from nanovision_jax.data.conversation import BadExample
from nanovision_jax.errors import UserError
from nanovision_jax.evals.base import GREY
from nanovision_jax.evals.benchmark import Likelihoods
from nanovision_jax.inference.engine import Prompt
from nanovision_jax.inference.prompt import chat_ids
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.stages import stage_of

BATCH = {'words': 128, 'options': 16}  # requests that are answered at once
CUT = 'text cut at its beginning, as it is longer than the context'
TOO_LONG, UNREADABLE = 'longer than the context', 'an image that cannot be read'


class Asked(NamedTuple):
    """A request as the engine takes it: contexts, each with the ids of its options; `alone`: the same out of context.

    name: of its image, as ask() takes it. most: tokens of an answer in words. cut: whether a context lost its start.
    """

    rows: list
    alone: list
    name: str | None
    most: int
    cut: bool


class Asker:
    """Asks a run (inference.run.Run).

    pictures: published.Pictures of the task's folder. kept: the file in which answers are kept.
    """

    def __init__(self, run, pictures, kept: pathlib.Path):
        self.run, self.pictures, self.kept = run, pictures, kept
        self.config, self.vision = run.config, run.config.model.vision
        self.notes = collections.Counter()
        manifest = runfolder.Paths(run.config.run_dir).manifest(run.step)  # which a run in training need not have
        weights = runfolder.file_digest(manifest) if manifest.is_file() else ''
        self.checkpoint = [runfolder.beside(run.config.run_dir), run.step, weights]
        self.image = functools.lru_cache(2 * BATCH['words'])(self._image)

    def askable(self, task, questions) -> tuple[list, dict[str, int]]:
        """(the questions that can be asked, {reason: how many cannot}).

        Raises UserError for a run that cannot be asked such a thing.
        """
        stage, sees = stage_of(self.config), any(question.image for question in questions)
        chats = any(way.request(question).chat for way in task.ways for question in questions[:1])
        if not stage.decodes or (sees and not stage.sees) or (chats and not stage.answers):
            wanted = 'sees' if sees else 'answers' if chats else 'decodes'
            raise UserError(f'{task.name} takes a run that {wanted}: not {stage.name}.')
        self.notes.clear()
        found, left_out = [], collections.Counter()
        for question in tqdm(questions, f'{task.name}, reading', unit='question', leave=False):
            try:
                if question.image:
                    self.image(question.image)
                asked = [self._asked(way.request(question), question.image or None) for way in task.ways]
            except BadExample:
                left_out[UNREADABLE] += 1
            except OverflowError:
                left_out[TOO_LONG] += 1
            else:
                found.append(question)
                self.notes[CUT] += any(one.cut for one in asked)
        return found, dict(left_out)

    def noted(self) -> dict[str, int]:
        """{what is worth knowing of the questions asked: how many}."""
        return {what: count for what, count in self.notes.items() if count}

    def lineage(self) -> dict:
        """Which run answered."""
        return {'run': self.config.run_dir, 'stage': self.config.stage, 'step': self.run.step} | {
            'checkpoint': self.checkpoint
        }

    def ask(self, requests, shown: list[str | None], title: str) -> list[tuple]:
        """[(the prompt as text, the answer)] of each Request: text, or Likelihoods where it has options.

        shown: the name of each request's image, '' for a grey one; None: no image.
        """
        asked = [self._asked(*one) for one in zip(requests, shown, strict=True)]
        keys, known = [self._key(one) for one in asked], _read_kept(self.kept)
        left = [place for place, key in enumerate(keys) if key not in known]
        left.sort(key=lambda place: len(asked[place].rows[0][0]))  # rows of a batch are padded to the longest
        size = BATCH['options' if requests[0].options else 'words']
        with open(self.kept, 'a') as kept, tqdm(total=len(requests), desc=title, unit='question') as bar:
            bar.update(len(requests) - len(left))
            for start in range(0, len(left), size):
                places = left[start : start + size]
                answers = self._answer([requests[p] for p in places], [asked[p] for p in places])
                for place, answer in zip(places, answers, strict=True):
                    known[keys[place]] = answer
                    kept.write(json.dumps([keys[place], answer]) + '\n')
                kept.flush()
                bar.update(len(places))
        told = [self.run.tokenizer.decode(one.rows[0][0], special=True) for one in asked]
        return [(text, _answer(known[key])) for text, key in zip(told, keys, strict=True)]

    def _answer(self, requests, asked):
        """What JSON holds of the answers to a batch."""
        if not requests[0].options:
            prompts = _filled([Prompt(one.rows[0][0], self._shown(one)) for one in asked], BATCH['words'])
            most = max(request.most for request in requests)
            return self.run.answer(prompts, max_new_tokens=most)[: len(requests)]
        told = self._judged([(row, self._shown(one)) for one in asked for row in one.rows])
        alone = self._judged([(row, []) for one in asked for row in one.alone])
        answers = []
        for request, one in zip(requests, asked, strict=True):
            sums, tokens, greedy = zip(*(next(told) for _ in request.options), strict=True)
            without = [next(alone)[0] for _ in request.options] if one.alone else [None] * len(sums)
            answers.append([*zip(sums, tokens, greedy, map(len, request.options), without, strict=True)])
        return answers

    def _judged(self, rows):
        """Yields (log-probability, tokens, whether it would be said) of each option of rows, with their images."""
        size = BATCH['options']
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            batch = _filled(some, size)
            prompts = [Prompt(context, shown) for (context, _), shown in batch]
            found = self.run.engine.judge(prompts, [options for (_, options), _ in batch])
            for likely, first in itertools.chain(*found[: len(some)]):
                yield float(likely.sum(dtype=np.float64)), len(likely), bool(first.all())

    def _asked(self, request, name) -> Asked:
        """What the engine is asked of a request. Raises OverflowError where the context does not hold it."""
        most = self.config.model.positions
        if request.chat:
            words = [{'role': 'user', 'content': request.text}]
            prompt = chat_ids(self.config, self.run.tokenizer, words, int(name is not None))
            pairs = [(prompt, _ids(self.run.tokenizer.encode(option))) for option in request.options or ['']]
            if max(len(prompt) + max(1, len(option)) for _, option in pairs) > most:
                raise OverflowError
            cut = False
        else:
            pairs = self._pairs(request)
            if max(len(option) for _, option in pairs) >= most:
                raise OverflowError
            rooms = [most - max(1, len(option)) for _, option in pairs]
            cut = any(len(context) > room for (context, _), room in zip(pairs, rooms, strict=True))
            pairs = [(context[-room:], option) for (context, option), room in zip(pairs, rooms, strict=True)]
        if not request.options:
            return Asked([(pairs[0][0], [])], [], name, request.most, cut)
        alone = []
        if request.unconditional is not None:
            without = request._replace(text=request.unconditional, unconditional=None)
            if request.chat:  # its options, behind nothing of a conversation
                without = without._replace(chat=False, delimiter='')
            alone = self._asked(without, None).rows
        return Asked(_shared(pairs), alone, name, 0, cut)

    def _pairs(self, request) -> list[tuple]:
        """(the ids before what is scored, its ids) of each option, or of the text alone."""
        encode = functools.partial(self.run.tokenizer.encode, trim=False)
        leading = (self.run.tokenizer.end_of_text,)
        contexts, wholes = [], []
        for text, going_on in _halves(request):
            start = leading if request.document or not text else ()
            contexts.append(start + encode(text))
            wholes.append(start + encode(text + going_on))
        if request.scored == 'differ':
            begins = [_alike(wholes)] * len(wholes)
        elif request.scored == 'share':
            shared = _alike([whole[::-1] for whole in wholes])
            begins = [len(whole) - shared for whole in wholes]
        else:
            return [(_ids(c), _ids(w[len(c) :])) for c, w in zip(contexts, wholes, strict=True)]
        return [(_ids(whole[:at]), _ids(whole[at:])) for whole, at in zip(wholes, begins, strict=True)]

    def _shown(self, asked):
        return [] if asked.name is None else [self.image(asked.name)]

    def _image(self, name):
        size = self.vision.image_size
        if not name:
            return np.full((size, size, 3), GREY, np.uint8)
        return images.decode(self.pictures.read(name), self.vision)

    def _key(self, asked):
        rows = [(context.tobytes(), [o.tobytes() for o in options]) for context, options in asked.rows + asked.alone]
        content = rows, asked.name, asked.most, self.checkpoint, str(self.pictures.path)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:32]


def _ids(ids):
    return np.array(ids, np.int32)


def _filled(batch, size):
    """A batch of one size, whose last row is repeated: one shape, one compilation."""
    return batch + batch[-1:] * (size - len(batch))


def _shared(pairs):
    """Pairs as rows of the engine: one where all have one context, else one each."""
    if all(np.array_equal(context, pairs[0][0]) for context, _ in pairs):
        return [(pairs[0][0], [option for _, option in pairs])]
    return [(context, [option]) for context, option in pairs]


def _alike(rows) -> int:
    """How many tokens all rows begin with."""
    return next((at for at, tokens in enumerate(zip(*rows, strict=False)) if len(set(tokens)) > 1), min(map(len, rows)))


def _halves(request) -> list[tuple[str, str]]:
    """(a context, how it goes on) of each option; the context alone where there are none.

    White space at the end of a context belongs to what follows, as tokenizers have it.
    """
    if request.after is not None:
        pairs = [(request.text + option, request.delimiter + request.after) for option in request.options]
    else:
        pairs = [(request.text, request.delimiter + option) for option in request.options] or [(request.text, '')]
    found = []
    for context, going_on in pairs:
        text = context.rstrip()
        found.append((text, context[len(text) :] + going_on))
    return found


def _read_kept(file) -> dict:
    """{key: answer} of what was answered before; a line that was cut off is asked again."""
    known = {}
    with contextlib.suppress(FileNotFoundError), open(file) as lines:
        for line in lines:
            with contextlib.suppress(ValueError):
                key, answer = json.loads(line)
                known[key] = answer
    return known


def _answer(told):
    """What JSON holds of an answer, as scores take it."""
    if isinstance(told, str):
        return told
    sums, tokens, greedy, characters, without = zip(*told, strict=True)
    alone = None if None in without else np.array(without)
    return Likelihoods(np.array(sums), np.array(tokens), np.array(characters), np.array(greedy), alone)
