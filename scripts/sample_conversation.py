"""Shows a finished family three images it has never seen, asks about them, and keeps the conversations for the report.

    python scripts/sample_conversation.py runs/tiny

Writes runs/tiny/pictures/{1,2,3}.png and runs/tiny/chat.jsonl.
"""

import json
import pathlib

import nanovision_jax as nv
from nanovision_jax.chat import question, say
from nanovision_jax.cli import Parser, run
from nanovision_jax.data import conversation, images, pipeline


def main(argv):
    parser = Parser(prog='python scripts/sample_conversation.py', description=__doc__)
    parser.add_argument('family', type=pathlib.Path, help='a folder with a finished run vision_instruct')
    family = parser.parse(argv).family
    model = nv.load(family / 'vision_instruct')
    rows, _ = pipeline.open_rows(model.config, model.tokenizer, 'validation')
    folder = family / 'pictures'
    folder.mkdir(exist_ok=True)
    seen = []
    chosen = [example for example in (rows.source[i] for i in rows.index.rows[:50]) if len(example.images) == 1][:3]
    for number, example in enumerate(chosen, 1):
        picture, file = images.load(example.images[0]), folder / f'{number}.png'
        picture.save(file)
        print(f'\n{file}')
        messages = []
        asked = [message for message in example.messages if message['role'] == 'user']
        for user in asked[:3]:  # in one conversation
            text = conversation.text_of(user)
            messages.append(question(text, images=not messages))
            print(f'you: {text}')
            answer = say(model.chat(messages, images=[picture], stream=True, max_new_tokens=64))
            messages.append({'role': 'assistant', 'content': answer})
            seen.append({'image': str(file.relative_to(family)), 'question': text, 'answer': answer})
    (family / 'chat.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in seen))


if __name__ == '__main__':
    run(main)
