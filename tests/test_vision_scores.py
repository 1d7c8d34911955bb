"""Scores of image benchmarks: ours are those of published scorers, to 1e-9, on 300 recorded answers to each.

scripts/benchmarks/record_lmms_eval.py wrote tests/golden/lmms_eval/*.json, where the scorers were installed.
"""

import json

import numpy as np
import pytest
from conftest import ROOT

from nanovision_jax.evals import ai2d, captions, coco_caption, evalai, gqa, mme, mmstar, pope, scienceqa, textvqa, vqav2
from nanovision_jax.evals.benchmark import Question


def recorded(name):
    """(the scorer's version, its rows, its aggregates)."""
    told = json.loads((ROOT / f'tests/golden/lmms_eval/{name}.json').read_text(encoding='utf-8'))
    assert len(told['rows']) == 300
    return told['scorer'], told['rows'], told['together']


def of_all(task, questions, answers):
    """{metric: scores of each}, and the metrics, of answers in words."""
    each = [task.ways[0].score(*one) for one in zip(questions, answers, strict=True)]
    scores = {name: np.array([row[name] for row in each]) for name in each[0]}
    return scores, task.metrics(questions, scores) if task.metrics else {}


def same(ours, theirs):
    """Every score is the recorded one; and they are not all alike."""
    theirs = np.array(theirs, float)
    assert not np.flatnonzero(np.abs(ours - theirs) > 1e-9).tolist()
    assert 0.1 < (theirs > 0).mean() < 0.9


def test_pope_s_strict_rule_is_lmms_eval_s():
    scorer, rows, together = recorded('pope')
    assert scorer == 'lmms-eval 0.7.3'
    questions = [Question(str(i), '', wanted, group=group) for i, (group, wanted, _, _) in enumerate(rows)]
    scores, found = of_all(pope.TASK, questions, [row[2] for row in rows])
    same(scores['accuracy (strict)'], [row[3] for row in rows])
    for name, value in together.items():
        assert found[f'{name} (strict)'] == pytest.approx(value, abs=1e-9)


def test_mme_is_lmms_eval_s():
    scorer, rows, together = recorded('mme')
    assert scorer == 'lmms-eval 0.7.3'
    questions = [mme._question(str(i), '', wanted, image, group) for i, (group, image, wanted, _, _) in enumerate(rows)]
    scores, found = of_all(mme.TASK, questions, [row[3] for row in rows])
    same(scores['accuracy'], [row[4] for row in rows])
    assert together.keys() == {'perception', 'cognition'}
    for name, value in together.items():
        assert found[name] == pytest.approx(value, abs=1e-9)
    for row in rows:
        row[4] = 1.0 if row[1] == rows[0][1] else 0.0  # one image alone is right, of eleven of its category
    scores['accuracy'] = np.array([row[4] for row in rows])
    shown = len({row[1] for row in rows if row[0] == rows[0][0]})
    assert mme.metrics(questions, scores)['perception'] == pytest.approx(200 / shown)


def test_the_letters_of_mmstar_are_lmms_eval_s():
    scorer, rows, together = recorded('mmstar')
    assert scorer == 'lmms-eval 0.7.3'
    right = np.array([float(mmstar.said(answer) == wanted) for _, _, wanted, answer, _ in rows])
    same(right, [row[4] for row in rows])
    questions = [Question(str(i), '', 0, given={'kind': row[1]}) for i, row in enumerate(rows)]
    found = mmstar.metrics(questions, {'accuracy (letter)': right})
    assert found[mmstar.KINDS] == pytest.approx(together['average'], abs=1e-9)


@pytest.mark.parametrize('task', [scienceqa, ai2d])
def test_the_letters_of_scienceqa_and_ai2d_are_lmms_eval_s(task):
    scorer, rows, _ = recorded(task.__name__.rsplit('.', 1)[-1])
    assert scorer == 'lmms-eval 0.7.3'
    questions = [Question(str(i), '', wanted, options=('x',) * count) for i, (count, wanted, _, _) in enumerate(rows)]
    scores, _ = of_all(task.TASK, questions, [row[2] for row in rows])
    same(scores['accuracy (letter)'], [row[3] for row in rows])


def test_gqa_s_exact_match_is_lmms_eval_s():
    scorer, rows, _ = recorded('gqa')
    assert scorer == 'lmms-eval 0.7.3'
    questions = [Question(str(i), '', wanted) for i, (wanted, _, _) in enumerate(rows)]
    same(of_all(gqa.TASK, questions, [row[1] for row in rows])[0]['accuracy'], [row[2] for row in rows])


@pytest.mark.parametrize(('task', 'plain'), [(textvqa, evalai.textvqa), (vqav2, evalai.vqav2)])
def test_vqa_accuracy_is_lmms_eval_s(task, plain):
    scorer, rows, _ = recorded(task.__name__.rsplit('.', 1)[-1])
    assert scorer == 'lmms-eval 0.7.3'
    questions = [Question(str(i), '', [plain(one) for one in people]) for i, (people, _, _) in enumerate(rows)]
    scores = of_all(task.TASK, questions, [row[1] for row in rows])[0]['accuracy']
    same(scores, [row[2] for row in rows])
    assert {0.3, 0.6, 0.9, 1.0} <= {round(value, 9) for value in scores}


def test_scores_of_captions_are_pycocoevalcap_s():
    scorer, rows, together = recorded('coco_caption')
    assert scorer == 'pycocoevalcap 1.2'
    questions = [coco_caption._question(i, '', row[0], '') for i, row in enumerate(rows)]
    cider = captions.Cider([question.given['references'] for question in questions])
    for question in questions:
        question.given['cider'] = cider
    scores, found = of_all(coco_caption.TASK, questions, [row[1] for row in rows])
    same(scores['CIDEr'], [row[2] for row in rows])
    same(scores['ROUGE-L'], [row[3] for row in rows])
    assert captions.bleu(scores) == pytest.approx(together['BLEU'], abs=1e-9)
    assert found == pytest.approx(
        {name: together[name] for name in ('CIDEr', 'ROUGE-L')} | {'BLEU-4': together['BLEU'][3]}, abs=1e-9
    )


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ("A man's dog can't, they're (very) red.", "a man 's dog ca n't they 're -lrb- very -rrb- red"),
        ('A t-shirt -- "STOP"; 50% of 1,000... no. 5 vs. 3.', 'a t-shirt stop 50 % of 1,000 no. 5 vs. 3'),
        ("It’s 10:30 a.m. on St. Paul's Blvd.!!", "it 's 10:30 a.m. on st. paul 's blvd. !!"),
        ("red/blue w/ o'clock ’80s 2x4", "red/blue w / o'clock '80s 2x4"),
        (' \n', ''),
    ],
)
def test_captions_come_apart_as_core_nlp_has_them(text, expected):
    assert captions.tokens(text) == expected.split()


def test_bleu_and_rouge_by_hand():
    words, reference = list('abcde'), list('abxdef')
    counts = {name: np.array([value]) for name, value in captions.bleu_counts(words, [reference]).items()}
    assert counts == {'runs of 1': 4, 'runs of 2': 2, 'runs of 3': 0, 'runs of 4': 0, 'words': 5, 'words wanted': 6}
    brevity = np.exp(1 - 6 / 5)
    assert captions.bleu(counts)[:2] == pytest.approx([0.8 * brevity, (0.8 * 0.5) ** 0.5 * brevity])
    precision, recall = 4 / 5, 4 / 6
    assert captions.rouge_l(words, [reference]) == pytest.approx(
        2.44 * precision * recall / (recall + 1.44 * precision)
    )
    assert captions.rouge_l([], [reference]) == 0 == captions.Cider([[reference]]).score([], [reference])


@pytest.mark.parametrize(
    ('answer', 'official', 'strict', 'lenient'),
    [
        ('yes', pope.YES, pope.YES, pope.YES),
        ('Yes.', pope.YES, pope.NEITHER, pope.YES),
        (' NO ', pope.YES, pope.NO, pope.NO),  # the official rule knows No and no
        ('No, there is not.', pope.NO, pope.NEITHER, pope.NO),
        ('There is not. Yes', pope.NO, pope.NEITHER, pope.NEITHER),
        ('Surely. No', pope.YES, pope.NEITHER, pope.NEITHER),
        ('', pope.YES, pope.NEITHER, pope.NEITHER),
    ],
)
def test_pope_s_three_rules(answer, official, strict, lenient):
    assert (pope.official(answer), pope.strict(answer), pope.lenient(answer)) == (official, strict, lenient)
