"""Scores of captions without Java: CIDEr-D, BLEU-4 and ROUGE-L as pycocoevalcap 1.2 counts them, and its tokens.

tokens() goes by the rules of CoreNLP's PTBTokenizer that captions meet: words with what hyphens and slashes join, don't
as `do n't`, numbers, abbreviations, brackets as -lrb-; marks of punctuation are dropped. Telephone numbers, faces
and tags with quotes in them are the known rest in which the two may differ.
"""

import collections
import math
import re

import numpy as np

# Tokens -------------------------------------------------------------------------------------------------------------

_WRITTEN = str.maketrans(
    {
        **dict.fromkeys('’‘‛', "'"),
        **dict.fromkeys('“”«»‹›', '"'),
        **{'½': ' 1/2 ', '¼': ' 1/4 ', '¾': ' 3/4 ', '⅓': ' 1/3 ', '⅔': ' 2/3 ', '\u00ad': None, '\u200b': ' '},
    }
)
_ENTITIES = {'&amp;': '&', '&lt;': '<', '&gt;': '>', '&quot;': '"', '&nbsp;': ' '}
# Their full stop belongs to them: anywhere, where they are written with a capital, and in front of a number.
_ALWAYS = (
    r'ph\.d|ed\.d|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mon|tue|tues|wed|thu|thurs|fri|calif|conn|'
    r'fla|ga|ala|ariz|colo|ind|kan|ky|md|mich|minn|mo|mont|neb|nev|okla|penn|tenn|va|vt|wis|wyo|inc|co|cos|'
    r'corp|ltd|plc|bancorp|dept|bhd|assn|univ|intl|sys|pty|pte|mr|mrs|ms|dr|drs|prof|profs|sen|sens|rep|reps|'
    r'atty|attys|lt|col|gen|messrs|gov|govs|adm|rev|maj|sgt|cpl|pvt|mt|capt|ste|st|ave|pres|lieut|hon|brig|'
    r'cmdr|comdr|pfc|spc|supt|supts|det|jr|sr|bros|blvd|rd|esq|sq|bldg|ft|tel|est|ext|etc|al|seq|vs|cf|alex|wm|'
    r'jos|cie|treas|elec|mfg|natl|ph|mtg'
)
_CAPITAL, _NUMBERED = 'Mass|Ill|Ark|Del|La|Miss|Ore|Pa|Tex|Wash', 'ca|figs?|prop|nos?|art|pp|op'

_LETTER = r'[^\W\d_¹²³⁰-₉]'  # of any script
_PART = rf'(?:{_LETTER}|[0-9\u0300-\u036f])'
_WORD = rf'{_LETTER}{_PART}*(?:[.!?]{_LETTER}{_PART}*)*'
_SIDE = r'[a-zA-Z0-9]+(?:-[a-zA-Z]+){0,2}'
_URL_END = r'[^\s"<>|()]*[^\s"<>|().!?,:;]'
# The longest match counts, and is a token, or its group is one and the rest comes next.
_RULES = [
    re.compile(rule, re.IGNORECASE)
    for rule in (
        rf"({_LETTER}{_PART}*?)n't|(can)not(?!{_PART})|(gon|wan)na(?!{_PART})|(got)ta(?!{_PART})",
        rf"(lem|gim)me(?!{_PART})|([yj]')(?={_LETTER})|('t)(?:is|was)(?!{_PART})",
        _WORD,
        rf'(?:{_WORD}|[0-9]+{_PART}*)(?:[-_]{_PART}+)+',
        rf'{_LETTER}{_PART}*(?:-{_PART}+)*\.(?=[,;:])',
        r'[a-z0-9][a-z0-9.,]*(?:-(?:(?:[a-z]\.){2,}|[a-z0-9]+))+',
        rf'[0-9]+{_LETTER}{_PART}*',
        rf'{_SIDE}(?:/{_SIDE}){{1,2}}|[0-9]+-[0-9]+/[0-9]+',
        r'[+-]?(?:[0-9]*(?:[.,:][0-9]+)+|[0-9]+)',
        r'(?:[a-z]\.)+',
        rf'(?:{_ALWAYS}|(?-i:{_CAPITAL})|(?:{_NUMBERED})(?=\.\s*[0-9]))\.',
        rf"n't|'(?:s|m|d|ll|re|ve)(?!{_LETTER})|(?:[cdlno]|qu)'{_PART}+|'n'|'(?:em|til|cause|n)(?!{_PART})",
        r"'[1-9]0s?(?=\s|$)(?!\s's)",
        rf'https?://{_URL_END}|(?:{_LETTER}{_PART}*\.)+(?:com|net|org|edu)/{_URL_END}',
        r'[\w.]+@\w+(?:\.\w+)+|</?[a-z][^<>]*>|[@#][a-z_]\w+|(?-i:[A-Z]+&[A-Z]+)|c\+\+|[cf]#',
        r"[!?]{2,}|-{2,}|\.{3,}|\*{2,}|#{2,}|@{2,}|_{2,}|[<>]?[:;=][-o*']?[()dp](?!\w)",
    )
]
_SIGNS = {'(': '-lrb-', ')': '-rrb-', '[': '-lsb-', ']': '-rsb-', '{': '-lcb-', '}': '-rcb-'}
_SIGNS |= {'€': '$', '£': '#', '¢': 'cents'} | dict.fromkeys('.?!,:;-\'"`–—…‚', '')  # dropped


def tokens(text: str) -> list[str]:
    """The tokens of a caption, in lower case."""
    for name, sign in _ENTITIES.items():
        text = text.replace(name, sign)
    text, found, place = text.translate(_WRITTEN), [], 0
    while place < len(text):
        if text[place].isspace():
            place += 1
            continue
        longest = max((match for rule in _RULES if (match := rule.match(text, place))), key=_length, default=None)
        token = longest[longest.lastindex or 0] if longest else text[place]
        place += len(token)
        token = '' if set(token) <= {'-', '.'} else _SIGNS.get(token, token)
        if len(token) < 5:  # a face has brackets too
            token = token.replace('(', '-lrb-').replace(')', '-rrb-')
        if token and ord(token[0]) < 0x10000:  # what is beyond is deleted: most of the faces
            found.append(token.lower())
    return found


def _length(match):
    return match.end() - match.start()


# Scores -------------------------------------------------------------------------------------------------------------


def _grams(words):
    """How often each run of one to four words occurs."""
    return collections.Counter(
        tuple(words[start : start + n]) for n in range(1, 5) for start in range(len(words) - n + 1)
    )


class Cider:
    """CIDEr-D (arXiv:1411.5726). images: of each image the tokens of its references, which say what words are rare."""

    def __init__(self, images: list[list[list[str]]]):
        self.held = collections.Counter()  # how many images have a run of words in a reference
        for references in images:
            self.held.update({gram for words in references for gram in _grams(words)})
        self.rarest = math.log(max(1, len(images)))

    def score(self, words: list[str], references: list[list[str]]) -> float:
        """Of one caption: 10 times its cosine with the references, of runs of one to four words."""
        (own, lengths), total = self._weights(words), 0.0
        for reference in references:
            (other, others), near = self._weights(reference), 0.0
            for n in range(4):
                product = sum(
                    min(weight, other[n].get(gram, 0)) * other[n].get(gram, 0) for gram, weight in own[n].items()
                )
                near += product / (lengths[n] * others[n] or 1)
            apart = max(0, len(words) - 1) - max(0, len(reference) - 1)  # it counts pairs of words
            total += near / 4 * math.exp(-(apart**2) / (2 * 6.0**2))
        return 10 * total / len(references)

    def _weights(self, words):
        """(of runs of n words {run: weight}, the length of these as a vector), for n from 1 to 4."""
        weights = [{} for _ in range(4)]
        for gram, count in _grams(words).items():
            weights[len(gram) - 1][gram] = count * (self.rarest - math.log(max(1, self.held[gram])))
        return weights, [math.sqrt(sum(weight**2 for weight in row.values())) for row in weights]


def bleu_counts(words: list[str], references: list[list[str]]) -> dict[str, float]:
    """What bleu() takes of one caption: runs that a reference has too, its length, and the nearest reference's."""
    most = collections.Counter()
    for reference in references:
        most |= _grams(reference)
    both = _grams(words) & most
    found = {f'runs of {n}': float(sum(count for gram, count in both.items() if len(gram) == n)) for n in range(1, 5)}
    nearest = min((abs(len(reference) - len(words)), len(reference)) for reference in references)[1]
    return found | {'words': float(len(words)), 'words wanted': float(nearest)}


def bleu(counts: dict[str, np.ndarray]) -> list[float]:
    """BLEU-1 to BLEU-4 of captions together. counts: bleu_counts() of each."""
    words, wanted = counts['words'], counts['words wanted'].sum()
    found, product = [], 1.0
    for n in range(1, 5):
        product *= (counts[f'runs of {n}'].sum() + 1e-15) / (np.maximum(0, words - n + 1).sum() + 1e-9)
        found.append(product ** (1 / n))
    ratio = (words.sum() + 1e-15) / (wanted + 1e-9)
    return [float(value * min(1.0, np.exp(1 - 1 / ratio))) for value in found]


def rouge_l(words: list[str], references: list[list[str]]) -> float:
    """ROUGE-L of one caption: recall counts 1.2 times as much as precision, each of its best reference."""
    words, references = words or [''], [reference or [''] for reference in references]
    common = [_common(words, reference) for reference in references]
    precision = max(common) / len(words)
    recall = max(count / len(reference) for count, reference in zip(common, references, strict=True))
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision) if max(common) else 0.0


def _common(one, other):
    """How many words the longest has that both have in this order."""
    row = [0] * (len(other) + 1)
    for word in one:
        left = row
        row = [0]
        for place, second in enumerate(other):
            row.append(left[place] + 1 if word == second else max(left[place + 1], row[place]))
    return row[-1]
