"""Asks a run what benchmarks ask: in batches, in words or by likelihood, and never the same twice.

What was answered is kept beside the results until the task is done, so that an evaluation which was cut off goes on
where it was. A line is known by all that its answer follows from: the prompt's ids, the image, the checkpoint.
"""

import collections
import contextlib
import functools
import hashlib
import json
import pathlib

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


class Asker:
    """Asks a run (inference.run.Run).

    pictures: published.Pictures of the task's folder. kept: the file in which answers are kept.
    """

    def __init__(self, run, pictures, kept: pathlib.Path):
        self.run, self.pictures, self.kept = run, pictures, kept
        self.config, self.vision = run.config, run.config.model.vision
        self.notes = collections.Counter()
        self.checkpoint = [runfolder.beside(run.config.run_dir), run.step]
        self.image = functools.lru_cache(2 * BATCH['words'])(self._image)

    def askable(self, task, questions) -> tuple[list, dict[str, int]]:
        """(the questions that can be asked, {reason: how many cannot}).

        Raises UserError for a run that cannot be asked such a thing.
        """
        stage = stage_of(self.config)
        if not stage.decodes or (task.sees and not stage.sees):
            raise UserError(f'{task.name} takes a run that {"sees" if task.sees else "decodes"}: not {stage.name}.')
        self.notes.clear()
        found, left_out = [], collections.Counter()
        for question in tqdm(questions, f'{task.name}, reading', unit='question', leave=False):
            try:
                if task.sees:
                    self.image(question.image)
                for way in task.ways:
                    self._prompt(way.request(question), task.sees)
                found.append(question)
            except BadExample:
                left_out[UNREADABLE] += 1
            except OverflowError:
                left_out[TOO_LONG] += 1
        return found, dict(left_out)

    def noted(self) -> dict[str, int]:
        """{what is worth knowing of the questions asked: how many}."""
        return dict(self.notes)

    def lineage(self) -> dict:
        """Which run answered."""
        return {'run': self.config.run_dir, 'stage': self.config.stage, 'step': self.run.step} | {
            'checkpoint': self.checkpoint
        }

    def ask(self, requests, shown: list[str] | None, title: str) -> list[tuple]:
        """[(the prompt as text, the answer)] of each Request: text, or Likelihoods where it has options.

        shown: the name of each request's image, '' for a grey one; None: no images at all.
        """
        prompts = [self._prompt(request, shown is not None) for request in requests]
        names = shown or [None] * len(requests)
        keys = [self._key(*one) for one in zip(requests, prompts, names, strict=True)]
        known = _read_kept(self.kept)
        left = [place for place, key in enumerate(keys) if key not in known]
        left.sort(key=lambda place: len(prompts[place]))  # rows of a batch are padded to the longest
        size = BATCH['options' if requests[0].options else 'words']
        with open(self.kept, 'a') as kept, tqdm(total=len(requests), desc=title, unit='question') as bar:
            bar.update(len(requests) - len(left))
            for start in range(0, len(left), size):
                places = left[start : start + size]
                rows = places + places[-1:] * (size - len(places))  # one shape, one compilation
                shows = [[] if names[p] is None else [self.image(names[p])] for p in rows]
                asked = [Prompt(prompts[p], shown) for p, shown in zip(rows, shows, strict=True)]
                answers = self._answer([requests[p] for p in rows], asked)
                for place, answer in zip(places, answers, strict=False):
                    known[keys[place]] = answer
                    kept.write(json.dumps([keys[place], answer]) + '\n')
                kept.flush()
                bar.update(len(places))
        told = [self.run.tokenizer.decode(prompt, special=True) for prompt in prompts]
        return [(text, _answer(known[key])) for text, key in zip(told, keys, strict=True)]

    def _answer(self, requests, prompts):
        """What JSON holds of the answers to a batch."""
        if not requests[0].options:
            return self.run.answer(prompts, max_new_tokens=max(request.most for request in requests))
        options = [self._options(request) for request in requests]
        told = [
            [[float(likely.sum()), len(likely), bool(first.all())] for likely, first in row]
            for row in self.run.engine.judge(prompts, options)
        ]
        if requests[0].unconditional is not None:
            alone = [Prompt(self._text(r.unconditional, 1, r.document), []) for r in requests]
            without = self.run.engine.judge(alone, options)
            told = [
                [[*one, float(likely.sum())] for one, (likely, _) in zip(row, other, strict=True)]
                for row, other in zip(told, without, strict=True)
            ]
        return [
            [[*one, len(option)] for one, option in zip(row, request.options, strict=True)]
            for row, request in zip(told, requests, strict=True)
        ]

    def _prompt(self, request, sees) -> np.ndarray:
        """The ids of a request. Raises OverflowError where the context does not hold it."""
        if request.chat:
            ids = chat_ids(self.config, self.run.tokenizer, [{'role': 'user', 'content': request.text}], int(sees))
            if len(ids) + self._longest(request) > self.config.model.positions:
                raise OverflowError
            return ids
        return self._text(_halves(request)[0], self._longest(request), request.document)

    def _text(self, text, longest, document):
        tokenizer = self.run.tokenizer
        ids = [tokenizer.end_of_text] * document + list(tokenizer.encode(text)) or [tokenizer.end_of_text]
        room = self.config.model.positions - longest
        if len(ids) > room:
            self.notes[CUT] += 1
        return np.array(ids[-room:], np.int32)

    def _longest(self, request):
        return max(map(len, self._options(request))) if request.options else 1

    def _options(self, request) -> list[np.ndarray]:
        """The ids of a request's options, as the text goes on with them."""
        tokenizer = self.run.tokenizer
        if request.chat:
            return [np.array(tokenizer.encode(option), np.int32) for option in request.options]
        text, options = _halves(request)
        begun = len(tokenizer.encode(text))
        return [np.array(tokenizer.encode(text + option)[begun:], np.int32) for option in options]

    def _image(self, name):
        size = self.vision.image_size
        if not name:
            return np.full((size, size, 3), GREY, np.uint8)
        return images.decode(self.pictures.read(name), self.vision)

    def _key(self, request, prompt, name):
        content = prompt.tobytes(), name, request.options, request.most, request.unconditional, self.checkpoint
        return hashlib.sha256(repr((content, str(self.pictures.path))).encode()).hexdigest()[:32]


def _halves(request) -> tuple[str, list[str]]:
    """(a text, how it goes on): white space at the end of a text belongs to what follows, as tokenizers have it."""
    text = request.text.rstrip()
    between = request.text[len(text) :] + request.delimiter
    return text, [between + option for option in request.options]


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
    sums, tokens, greedy, *alone, characters = (np.array(column) for column in zip(*told, strict=True))
    return Likelihoods(sums, tokens, characters, greedy, *alone)
