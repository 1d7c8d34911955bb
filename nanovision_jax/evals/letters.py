"""Questions with options about an image, asked twice: for the letter of an option, and which option is the likeliest.

The letter stands in what the model says, and is found by the rule of a task. The likelihood is that of each option's
own text behind the question alone, so that a model that knows no letters can be told from one that sees nothing.
"""

import string

from nanovision_jax.evals import scoring
from nanovision_jax.evals.benchmark import Question, Request, Way

LETTER = "\nAnswer with the option's letter from the given choices directly."
HEADLINE = 'accuracy (letter)'


def lettered(options) -> str:
    """The options as lines `A. …`."""
    return '\n'.join(f'{letter}. {option}' for letter, option in zip(string.ascii_uppercase, options, strict=False))


def ways(asked, alone, is_right) -> tuple[Way, Way]:
    """The two ways of asking.

    asked: a question → what is said for its letter; alone: → the question without its options; is_right: (answer,
    letter) → whether the answer says this letter.
    """

    def of_letter(question, answer):
        return {HEADLINE: float(is_right(answer, string.ascii_uppercase[question.answer]))}

    return (
        Way('letter', lambda question: Request(asked(question)), of_letter),
        Way('likelihood', lambda question: Request(alone(question) + scoring.SHORT, options_of(question)), _likely),
    )


def options_of(question: Question) -> tuple[str, ...]:
    """What is weighed: the options, or letters where the options could not be told apart."""
    return question.options or tuple(question.given['letters'])


def guessing(questions) -> float:
    """What guessing scores."""
    return sum(1 / len(options_of(question)) for question in questions) / len(questions)


def _likely(question, likely):
    found = scoring.choice(question, likely)
    return {name.replace('(', '(likelihood, '): value for name, value in found.items()}
