"""The rules of scoring that tasks share."""

import string

import numpy as np

from nanovision_jax.evals.benchmark import Likelihoods, Question

SHORT = '\nAnswer the question using a single word or phrase.'  # as lmms-eval asks for a short answer
_UNMARKED = str.maketrans('', '', string.punctuation)


def plain(text: str) -> str:
    """In lower case without ASCII's punctuation: what lmms-eval's exact_match compares."""
    return text.lower().translate(_UNMARKED)


def choice(question: Question, likely: Likelihoods) -> dict[str, float]:
    """Whether the likeliest option is the one wanted: by sums, a token, a character, as lm-eval's acc and acc_norm.

    An option without tokens says nothing, and is never the likeliest.
    """
    sums = np.where(likely.tokens == 0, -np.inf, likely.sums)
    with np.errstate(divide='ignore'):
        per_character = sums / likely.characters
    found = {'sum': sums, 'per token': sums / np.maximum(1, likely.tokens), 'per character': per_character}
    if likely.unconditional is not None:
        found['against the option alone'] = sums - likely.unconditional
    return {f'accuracy ({name})': float(np.argmax(values) == question.answer) for name, values in found.items()}


def guessing(questions) -> float:
    """What guessing scores: one of each question's options."""
    return float(np.mean([1 / len(question.options) for question in questions]))


def centred(questions, scores) -> dict[str, float]:
    """The mean of each score, and centred: 0 is guessing, 1 is all."""
    chance = guessing(questions)
    means = {name: float(values.mean()) for name, values in scores.items()}
    return means | {f'centred {name}': (value - chance) / (1 - chance) for name, value in means.items()}
