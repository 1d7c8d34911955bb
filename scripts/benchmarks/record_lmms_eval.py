"""Records what published scorers say of 300 answers to each benchmark: what tests/test_vision_scores.py compares with.

    python scripts/benchmarks/record_lmms_eval.py --pope=FOLDER --output=tests/golden/lmms_eval [--task=mme,gqa]

Runs where lmms-eval 0.7.3 and pycocoevalcap 1.2 are installed, which may be without what they depend on (pip install
--no-deps), beside numpy, loguru, sacrebleu, pillow, pyyaml and tqdm; coco_caption wants Java. POPE's questions are its
own; the others are made. Answers are right, wrong, empty, garbage, long, and of other alphabets. All of it follows from
a fixed seed. Beside the scores stands how lmms-eval asks a few rows in the layout of the Hub, with its own defaults.
"""

import argparse
import copy
import importlib
import importlib.metadata
import importlib.util
import json
import pathlib
import random
import sys
import types
import unittest.mock

COUNT = 300
GARBAGE = """| |.|...|?!|asdf qwer|###|🙂|🙂 yes|是|はい|Да.|été|½|1,000|3.5|1 2 3|12, 13 and 14|two or three|none|
I cannot tell.|null|The image does not show that.|\tyes\n|\n|<s>|
A man who is holding a red umbrella walks along the street, and there is nothing else to be seen in it."""
YES_NO = """Yes|No|yes|no|Yes.|No.|yes | no|YES|No, there is not.|Yes, there is a dog.|y|N|Y.|yes no|No yes|nope|
Not at all|nothing|Oh yes|It is a no|know|The answer is yes.|n.o|Noé|yes!|"No"|*yes*|(no)|- yes|
"Yes."|*No*|I no"""
WORDS = """red|blue|white|cat|dog|two|2|three|10|ten|left|right|man|woman|pizza|bus|stop-sign|t-shirt|1,000|1/2|$5|50%|
it's|don't|dont|couldnt've|the dog|a cat|an apple|black and white|Dr. Pepper|10:30|p.m.|é|not sure|yes|no|none|zero|one|
N/A|unanswerable|"stop"|stop!|U.S.A.|3.14|1,2|men's|mens'|24/7|x_y|coca-cola"""
BLURRED = """{0}|{0}|{0}|{0}.| {0} |the {0}|{0}!|It is {0}|{0}, {0}|"{0}"|{0}\n|{0} ?|a {0},|{0}s|({0})|{0}-{0}"""
LETTERED = """{0}|{0}|{0}.|({0})|{0}) {2}|{0}. {2}|{0}: {2}|{2} {0}|{2} ({0})|The answer is {0}|
The answer is {0}, not {1}.|Answer: {0}|I choose {1}. No, {0} it is|{0} or {1}|答案是{0}|정답은 {0}|{2}{0}|{0}{2}|A {2}|
{1} is wrong, the correct option is {0}: {2}|{0},|Because of A. the best answer is ({0})|({1}) or ({0})|{0} {2} {1}|
{2}|  {0}.| {0}|maybe ({0}), not {1}. though|it is {0}: not {1}. {2}|see {1}) but {0}: so|see ({0}) and {1} here {2}"""
WHO = 'a man|two women|a dog|the cat|three kids|an old bus|a couple of people|some food|a stop sign'
DOES = 'is riding|are standing next to|sits on|holding|playing with|in front of|is looking at|walks past'
WHAT = 'a wave|a brown horse|the street|a wooden table|skis|a fire hydrant|an umbrella|the beach|a big red kite'
ODD = """a man's t-shirt|black-and-white|it's|isn't|can't|they're|a sign that says "stop"|50's|#1|w/|red/blue|3rd|
10:30 a.m.|(left)|St. Paul's|U.S.|etc.|Mr. Bean|o'clock|2x4|1,000|3.5|$5|50%|café|naïve|“fresh”|it’s|mid-air|--|...|!!|
; and|& co.|
cannot|gonna|dogs' beds|½|7-eleven|AT&T|x-ray|'quoted'|no. 5|vs.|12ft|🙂|[x]|1/2|old-fashioned|jack-o-lantern|…|–|é"""


def drawn(rng, forms, *parts):
    """One of several texts, with | between them."""
    return rng.choice(forms.replace('|\n', '|').split('|')).format(*parts)


def blurred(rng, text):
    """A text as somebody else would write it."""
    other = [text.upper(), text.capitalize(), text.replace(' ', ''), text.replace(' ', '-'), text.replace("'", '')]
    return rng.choice([rng.choice(other), *(drawn(rng, BLURRED, text) for _ in range(3))])


def yes_no(rng, wanted):
    """An answer where yes or no is wanted."""
    return rng.choice([wanted, wanted.capitalize(), drawn(rng, YES_NO), drawn(rng, YES_NO), drawn(rng, GARBAGE)])


def letter(rng, wanted):
    """An answer where a letter is wanted."""
    one = rng.choice([wanted, wanted, wanted.lower(), rng.choice('ABCDE')])
    form = drawn(rng, LETTERED, one, rng.choice('ABCD'), drawn(rng, WORDS))
    return rng.choice([form] * 8 + [drawn(rng, GARBAGE)])


def answers_of_people(rng):
    """Ten people's answers, and one of a model."""
    said = [drawn(rng, WORDS) for _ in range(rng.randint(1, 4))]
    people = [blurred(rng, rng.choice(said)) for _ in range(10)]
    pool = [rng.choice(people), blurred(rng, rng.choice(people)), blurred(rng, rng.choice(said)), drawn(rng, WORDS)]
    return people, rng.choice([*pool, *pool, drawn(rng, GARBAGE)])


def caption(rng, odd=0.4):
    """A sentence as people write of photographs, now and then with what tokenizers trip over."""
    parts = [drawn(rng, WHO), drawn(rng, DOES), drawn(rng, WHAT)]
    for _ in range(rng.choice([0, 0, 1, 2])):
        parts.insert(rng.randrange(len(parts) + 1), drawn(rng, ODD if rng.random() < odd else DOES).strip())
    text = ' '.join(parts)
    return drawn(rng, '{0}|{1}|{1}.|{0}.|{0} .|{0}, {2}', text, text.capitalize(), drawn(rng, WHAT))


# What each scorer says -----------------------------------------------------------------------------------------------


def light(name):
    """A module of lmms-eval, without what its packages load for its models."""
    if 'lmms_eval' not in sys.modules:
        (folder,) = importlib.util.find_spec('lmms_eval').submodule_search_locations
        for package in ('lmms_eval', 'lmms_eval.tasks', 'lmms_eval.api'):
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(pathlib.Path(folder, *package.split('.')[1:]))]
        for heavy in ('torch', 'accelerate', 'transformers', 'datasets', 'evaluate', 'lmms_eval.api.model'):
            sys.modules[heavy] = unittest.mock.MagicMock(__spec__=None)
    return importlib.import_module(f'lmms_eval.{name}')


def pope(rng, folder):
    """[category, wanted, answer, score] and the aggregates."""
    scorer, rows, results = light('tasks.pope.utils'), [], []
    for category in ('random', 'popular', 'adversarial'):
        lines = (folder / f'coco_pope_{category}.json').read_text().splitlines()
        for line in rng.sample(lines, COUNT // 3):
            question = json.loads(line)
            answer = yes_no(rng, question['label'])
            doc = {'question_id': question['question_id'], 'answer': question['label']}
            results.append(scorer.pope_process_results(doc, [answer])['pope_accuracy'])
            rows.append([category, question['label'], answer, results[-1]['score']])
    names = {'accuracy': 'accuracy', 'precision': 'precision', 'recall': 'recall', 'F1': 'f1_score'}
    return rows, {name: getattr(scorer, f'pope_aggregate_{theirs}')(results) for name, theirs in names.items()}


def mme(rng, _):
    """[category, image, wanted, answer, score] and the two sums."""
    scorer, rows, results = light('tasks.mme.utils'), [], {'mme_perception_score': [], 'mme_cognition_score': []}
    kinds = [kind for kinds in scorer.eval_type_dict.values() for kind in kinds]
    for number in range(COUNT // 2):
        for wanted in ('Yes', 'No'):
            doc = {'question_id': f'{number:04}.jpg', 'category': kinds[number % len(kinds)], 'answer': wanted}
            answer = yes_no(rng, wanted.lower())
            ((name, found),) = scorer.mme_process_results(doc, [answer]).items()
            results[name].append(found)
            rows.append([doc['category'], doc['question_id'], wanted, answer, found['score']])
    return rows, {name.split('_')[1]: scorer.mme_aggregate_results(found) for name, found in results.items()}


def mmstar(rng, _):
    """[category, kind, wanted, answer, score] and the average."""
    scorer, rows, results = light('tasks.mmstar.utils'), [], []
    kinds = [(category, kind) for category, kinds in scorer.eval_type_dict.items() for kind in kinds]
    for number in range(COUNT):
        category, kind = rng.choice(kinds)
        wanted = rng.choice('ABCD')
        answer = letter(rng, wanted)
        doc = {'index': number, 'answer': wanted, 'category': category, 'l2_category': kind}
        results.append(scorer.mmstar_process_results(doc, [answer])['average'])
        rows.append([category, kind, wanted, answer, results[-1]['score']])
    return rows, {'average': scorer.mmstar_aggregate_results(results)}


def scienceqa(rng, _):
    """[number of options, wanted, answer, score]."""
    scorer, rows = light('tasks.scienceqa.utils'), []
    for _ in range(COUNT):
        count = rng.randint(2, 5)
        doc = {'choices': ['x'] * count, 'answer': rng.randrange(count)}
        answer = letter(rng, scorer.sqa_doc_to_target(doc))
        rows.append([count, doc['answer'], answer, scorer.sqa_process_results(doc, [answer])['exact_match']])
    return rows, {}


def matched(prediction, wanted):
    """What lmms-eval's exact_match says, of an answer as its tasks strip it."""
    metric = light('api.metrics').exact_match_hf_evaluate
    found = metric([prediction.strip()], [wanted], ignore_case=True, ignore_punctuation=True)
    return float(found['exact_match'])


def ai2d(rng, _):
    """[number of options, wanted, answer, score]."""
    scorer, rows = light('tasks.ai2d.utils'), []
    for _ in range(COUNT):
        doc = {'options': ['x'] * 4, 'answer': str(rng.randrange(4))}
        wanted = scorer.ai2d_doc_to_target(doc, 'mcq')
        answer = letter(rng, wanted)
        (kept,) = scorer.MultiChoiceRegexFilter().apply([[answer]], [doc])
        rows.append([4, int(doc['answer']), answer, matched(kept, wanted)])
    return rows, {}


def gqa(rng, _):
    """[wanted, answer, score]."""
    rows = []
    for _ in range(COUNT):
        wanted = drawn(rng, WORDS)
        answer = rng.choice([blurred(rng, wanted), blurred(rng, wanted), drawn(rng, WORDS), drawn(rng, GARBAGE)])
        rows.append([wanted, answer, matched(answer, wanted)])
    return rows, {}


def textvqa(rng, _):
    """[ten people's answers, answer, score]."""
    scorer, rows = light('tasks.textvqa.utils'), []
    for number in range(COUNT):
        people, answer = answers_of_people(rng)
        doc = {'question_id': number, 'answers': list(people)}
        rows.append([people, answer, scorer.textvqa_process_results(doc, [answer])['exact_match']])
    return rows, {}


def vqav2(rng, _):
    """[ten people's answers, answer, score]."""
    scorer, rows = light('tasks.vqav2.utils'), []
    for number in range(COUNT):
        people, answer = answers_of_people(rng)
        said = [{'answer': one, 'answer_confidence': 'yes', 'answer_id': i + 1} for i, one in enumerate(people)]
        doc = {'question_id': number, 'answers': copy.deepcopy(said)}
        rows.append([people, answer, scorer.vqav2_process_results_val(doc, [answer])['exact_match']])
    return rows, {}


def coco_caption(rng, _):
    """[references, answer, CIDEr, ROUGE-L] and the aggregates."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    references = [[caption(rng) for _ in range(rng.randint(2, 4))] for _ in range(COUNT)]
    pools = [
        [rng.choice(said), caption(rng), caption(rng, 1.0), rng.choice(said) + ' ' + caption(rng)]
        for said in references
    ]
    answers = [rng.choice([*pool, *pool, drawn(rng, GARBAGE)]) for pool in pools]
    tokenize = PTBTokenizer().tokenize
    wanted = tokenize({i: [{'caption': one} for one in said] for i, said in enumerate(references)})
    given = tokenize({i: [{'caption': answer}] for i, answer in enumerate(answers)})
    cider, ciders = Cider().compute_score(wanted, given)
    rouge, rouges = Rouge().compute_score(wanted, given)
    bleus, _ = Bleu(4).compute_score(wanted, given, verbose=0)
    rows = [list(row) for row in zip(references, answers, map(float, ciders), map(float, rouges), strict=True)]
    return rows, {'CIDEr': float(cider), 'ROUGE-L': float(rouge), 'BLEU': bleus}


# How it asks ---------------------------------------------------------------------------------------------------------

ROW = {'question_id': '7', 'question': 'What IS the colour of the dog?', 'image_id': 7, 'id': '7', 'imageId': '7'}
YES = ROW | {'question': ' Is there a dog in the image? Please answer yes or no.', 'answer': 'Yes', 'category': 'count'}
CHOICE = ROW | {'options': ['red', 'It is blue.'], 'choices': ['red', 'It is blue.', 'a b'], 'answer': 1, 'index': 7}
STAR = 'Which is it?\nOptions: A: The red., B: A cat, a dog., C: 3, D: 4'
# task: (its folder and file, the function, rows, what is changed in its defaults)
ASKED = {
    'pope': ('pope/pope', 'pope_doc_to_text', [YES | {'image_source': 'x', 'category': 'random', 'answer': 'yes'}], {}),
    'mme': ('mme/mme', 'mme_doc_to_text', [YES, YES | {'question_id': '8', 'question': 'Is it 3? '}], {}),
    'mmstar': (
        'mmstar/_default_template_yaml',
        'mmstar_doc_to_text',
        [
            CHOICE | {'index': i, 'question': text, 'answer': 'B', 'category': 'math', 'l2_category': 'geometry'}
            for i, text in enumerate(
                [STAR, 'Hint: A or B.\nQuestion: Is it?\nChoices:\n(A) no\n(B) yes\n', 'No options.']
            )
        ],
        {},
    ),
    'scienceqa': (
        'scienceqa/scienceqa_img',
        'sqa_doc_to_text',
        [CHOICE | {'hint': hint, 'subject': 'x'} for hint in ('', 'Look at it.')],
        {},
    ),
    'ai2d': ('ai2d/ai2d', 'ai2d_doc_to_text', [CHOICE | {'answer': '1'}], {}),
    'textvqa': ('textvqa/_default_template_textvqa_yaml', 'textvqa_doc_to_text', [ROW | {'ocr_tokens': ['STOP']}], {}),
    'textvqa_ocr': (
        'textvqa/_default_template_textvqa_yaml',
        'textvqa_doc_to_text',
        [ROW | {'question_id': str(i), 'ocr_tokens': words} for i, words in enumerate([['STOP', 'a, b'], []])],
        {'ocr': True},
    ),
    'vqav2': ('vqav2/vqav2_val', 'vqav2_doc_to_text', [ROW | {'answer_type': 'other'}], {}),
    'gqa': ('gqa/gqa', 'gqa_doc_to_text', [ROW | {'answer': 'red'}], {}),
}


def asked(name):
    """[[a row, what lmms-eval asks]] of a task."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads past !function."""

    Loader.add_multi_constructor('!', lambda *_: None)
    place, function, rows, changed = ASKED[name]
    folder, file = place.split('/')
    module = light(f'tasks.{folder}.utils')
    file = file if file.endswith('_yaml') else f'{file}.yaml'
    told = yaml.load((pathlib.Path(module.__file__).parent / file).read_text(), Loader)
    defaults = told['lmms_eval_specific_kwargs']['default'] | changed
    return [[row, getattr(module, function)(row, defaults)] for row in rows]


TASKS = (pope, mme, mmstar, scienceqa, ai2d, gqa, textvqa, vqav2, coco_caption)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pope', type=pathlib.Path, help="the folder of POPE's published questions")
    parser.add_argument('--output', type=pathlib.Path, required=True)
    parser.add_argument('--task', default=','.join(task.__name__ for task in TASKS))
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    told = {
        'scorer': f'lmms-eval {importlib.metadata.version("lmms-eval")}',
        'asked': {name: asked(name) for name in ASKED},
    }
    (args.output / 'asked.json').write_text(json.dumps(told, ensure_ascii=False, indent=1) + '\n', encoding='utf-8')
    for task in TASKS:
        if (name := task.__name__) in args.task.split(','):
            rows, together = task(random.Random(f'{name} 0'), args.pope)
            scorer = 'pycocoevalcap' if name == 'coco_caption' else 'lmms-eval'
            told = {
                'scorer': f'{scorer} {importlib.metadata.version(scorer)}',
                'columns': task.__doc__,
                'together': together,
            }
            lines = ',\n'.join(json.dumps(row, ensure_ascii=False) for row in rows)
            head = json.dumps(told, ensure_ascii=False)[:-1]
            (args.output / f'{name}.json').write_text(f'{head}, "rows": [\n{lines}\n]}}\n', encoding='utf-8')


if __name__ == '__main__':
    main()
