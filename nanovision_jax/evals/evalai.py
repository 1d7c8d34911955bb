"""How VQA compares short answers, as EvalAI's servers do: without articles, punctuation, number words.

Two steps of it, and a third that TextVQA takes before; lmms-eval 0.7.3 has the same. Its odd corners are kept, since a
number that is to be compared has them too: at most 32 full stops go, and `none` is 0.
"""

import re

import numpy as np

_DIGITS = 'zero one two three four five six seven eight nine ten'
_NUMBERS = {word: str(n) for n, word in enumerate(_DIGITS.split())}
_NUMBERS['none'] = '0'
_ARTICLES = {'a', 'an', 'the'}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
# What is taken for one of these is the word with one of its apostrophes left out.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_WHOLE = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, sign in enumerate(word)
    if sign == "'"
} | {"somebody'd": 'somebodyd'}


def punctuation(text: str) -> str:
    """Without punctuation: a mark goes where white space is beside it, or a comma in a number; else it is a space."""
    comma, found = re.search(r'\d,+\d', text), text
    for mark in _MARKS:
        goes = comma or f'{mark} ' in text or f' {mark}' in text
        found = found.replace(mark, '' if goes else ' ')
    return re.sub(r'\.(?!\d)', '', found, count=32)


def words(text: str) -> str:
    """In lower case, with digits for number words, without articles, and with apostrophes in contractions."""
    found = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return ' '.join(_WHOLE.get(word, word) for word in found if word not in _ARTICLES)


def vqav2(text: str) -> str:
    """An answer as VQAv2 compares it."""
    return words(punctuation(_one_line(text)))


def textvqa(text: str) -> str:
    """An answer as TextVQA compares it: commas and question marks go first, and 's becomes a word."""
    return vqav2(text.lower().replace(',', '').replace('?', '').replace("'s", " 's"))


def _one_line(text):
    return text.replace('\n', ' ').replace('\t', ' ').strip()


def accuracy(answer: str, wanted: list[str]) -> float:
    """VQA accuracy: a third for each of the others who said it, at most 1; the mean over leaving each person out."""
    same = [one == answer for one in wanted]
    return float(np.mean([min(1.0, (sum(same) - one) / 3) for one in same]))
