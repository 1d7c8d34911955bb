"""The page for browsers: talk with a run, compare the stages of a road, and see where a model looks.

Gradio's components on the server's own application, behind the same key, names and limits (guard.py, entrance.py). What
is asked goes through the same scheduler as requests of the API.
"""

import asyncio
import base64
import contextlib
import json
import pathlib

import fastapi
import gradio
import numpy as np
from PIL import Image

from nanovision_jax.inference import looking
from nanovision_jax.serving import protocol
from nanovision_jax.serving.entrance import PAGE
from nanovision_jax.serving.errors import Refusal
from nanovision_jax.serving.guard import Settings
from nanovision_jax.serving.jobs import Job, Served
from nanovision_jax.serving.protocol import Fields, Limits

SIDE = 480  # pixels of a picture with what is looked at
DARK = 0.25  # how bright a picture stays where nothing looks
WAITING = 256  # events of the page that may wait
KEPT = 3600  # seconds that an uploaded picture stays
WORDS = 5  # that are told of a patch
MOST = 64  # tokens of an answer, unless another number is wished for
FONTS = ['system-ui', 'Segoe UI', 'Roboto', 'Liberation Sans', 'sans-serif']  # none that another host sends
CSS = """
.gradio-container { width: 100%; max-width: 62rem !important; margin: 0 auto !important }
.small { font-size: .85rem }
button[aria-label='Share'] { display: none !important } /* it would send to another host */
"""


def mount(app: fastapi.FastAPI, served: list[Served], settings: Settings) -> fastapi.FastAPI:
    """The application, with the page at its root."""
    theme = gradio.themes.Default(primary_hue='orange', font=FONTS, font_mono=['ui-monospace', 'monospace'])
    return gradio.mount_gradio_app(
        app, build(served, settings.limits), PAGE, footer_links=[], run_history=False, show_error=True, ssr_mode=False,
        max_file_size=settings.limits.body, enable_monitoring=False, mcp_server=False, theme=theme, css=CSS,
        app_kwargs={'docs_url': None, 'redoc_url': None, 'openapi_url': None},
    )  # fmt: skip


def build(served: list[Served], limits: Limits) -> gradio.Blocks:
    """The page: a tab for each thing that can be done with what is served."""
    seeing = [one for one in served if one.sees]
    with gradio.Blocks(title='nanovision_jax', analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        with gradio.Tab('Talk'):
            _talk(served, limits)
        if len(served) > 1:
            with gradio.Tab('Stages'):
                _compare(served, limits)
        if seeing:
            with gradio.Tab('Attention'):
                _look(seeing, limits)
    page.queue(default_concurrency_limit=None, max_size=WAITING)
    return page


# Asking --------------------------------------------------------------------------------------------------------------


def read(one: Served, messages: list[dict], limits: Limits, **options):
    """(prompt, what is wanted) of messages as the API takes them. Who has not learned to answer continues the question.

    Raises Refusal as the API does. It takes as long as its pictures take to decode.
    """
    if one.answers:
        fields = Fields(json.dumps({'messages': messages} | options).encode())
        return protocol.chat(fields, one, limits), protocol.wanted(fields, limits, one.scheduler.context)
    text = ''.join(part['text'] for part in messages[-1]['content'] if part['type'] == 'text')
    fields = Fields(json.dumps({'prompt': text} | options).encode())
    (prompt,) = protocol.completion_prompts(fields, one, limits)
    return prompt, protocol.wanted(fields, limits, MOST)


async def spoken(job: Job):
    """Yields a job's answer as far as it is there. It is cancelled where nobody listens any more."""
    text = ''
    try:
        with told():
            job.start()
            async for piece, *_ in job.pieces():
                text += piece
                yield text
    finally:
        job.request.cancel()


async def asked(one: Served, messages: list[dict], limits: Limits, **options) -> Job:
    """A question as a job. It is read aside: pictures take long."""
    with told():
        prompt, wanted = await asyncio.to_thread(read, one, messages, limits, **options)
    return Job(one, prompt, wanted, limits)


@contextlib.contextmanager
def told():
    """What is refused within it is told on the page, in the sentence that the API would give."""
    try:
        yield
    except Refusal as refusal:
        raise gradio.Error(refusal.message, print_exception=False) from None


def question(text: str, files: list) -> dict:
    """A user's message with the pictures in files, as the API takes it. Raises Refusal for what was not uploaded."""
    parts = [{'type': 'image_url', 'image_url': {'url': _uri(file)}} for file in files]
    return {'role': 'user', 'content': [*parts, {'type': 'text', 'text': text}]}


def _uri(file):
    file = pathlib.Path(file['path'] if isinstance(file, dict) else file).resolve()  # asked again, it is an object
    if not file.is_relative_to(pathlib.Path(gradio.utils.get_upload_folder()).resolve()):
        raise Refusal(400, 'an image is uploaded: no other file is opened.')
    try:
        return f'data:image/any;base64,{base64.b64encode(file.read_bytes()).decode()}'
    except FileNotFoundError:
        raise Refusal(400, 'a picture of this conversation is not kept any more: show it again.') from None


def conversation(history: list[dict], message: dict, system: str) -> list[dict]:
    """What was said and shown so far, and the question, as the API takes it."""
    messages = [{'role': 'system', 'content': system}] if system.strip() else []
    for turn in history:
        parts = [{'type': 'text', 'text': turn['content']}] if isinstance(turn['content'], str) else turn['content']
        text = ''.join(part['text'] for part in parts if part['type'] == 'text')
        files = [part['file']['path'] for part in parts if part['type'] == 'file']
        messages.append(question(text, files) if turn['role'] == 'user' else {'role': 'assistant', 'content': text})
    return [*messages, question(message.get('text') or '', message.get('files') or [])]


# The tabs ------------------------------------------------------------------------------------------------------------


def _talk(served, limits):
    by_name = {one.name: one for one in served}

    async def answer(message, history, name, system, temperature, top_p, most, seed):
        with told():
            messages = await asyncio.to_thread(conversation, history, message, system)
        options = {'temperature': temperature, 'top_p': top_p, 'max_tokens': int(most), 'seed': int(seed)}
        async for text in spoken(await asked(by_name[name], messages, limits, **options)):
            yield text

    longest = min(limits.tokens, max(one.scheduler.context for one in served))
    settings = [
        gradio.Dropdown(list(by_name), value=served[-1].name, label='Model', visible=len(served) > 1, render=False),
        gradio.Textbox('', label='System prompt', lines=1, render=False),
        gradio.Slider(0, 2, 0, step=0.05, label='Temperature', info='0 always says what is likeliest', render=False),
        gradio.Slider(0.05, 1, 1, step=0.05, label='Top p', render=False),
        gradio.Slider(1, longest, min(longest, MOST), step=1, label='Longest answer, in tokens', render=False),
        gradio.Number(0, label='Seed', precision=0, render=False),
    ]
    sees = any(one.sees for one in served)
    gradio.ChatInterface(
        answer,
        multimodal=True,
        chatbot=gradio.Chatbot(
            height='58vh', show_label=False, buttons=['copy', 'copy_all'], render=False,
            placeholder='Show a picture and ask about it.' * sees,
        ),
        textbox=gradio.MultimodalTextbox(
            file_types=['image'], file_count='multiple', sources=['upload'] if sees else [], show_label=False,
            placeholder='Ask; drop or paste pictures here' if sees else 'Ask', max_plain_text_length=100_000,
            stop_btn=True, render=False,
        ),
        additional_inputs=settings,
        additional_inputs_accordion=gradio.Accordion('Settings', open=False, render=False),
        api_visibility='private',
    )  # fmt: skip


def _compare(served, limits):
    gradio.Markdown('The same question to each; who cannot see gets it without the picture.')
    controls = _asking()
    with gradio.Row():
        answers = [gradio.Textbox(label=_called(one), lines=4, buttons=[], min_width=300) for one in served]

    async def compare(file, asking):
        texts = [''] * len(served)
        news = asyncio.Queue()

        async def follow(place, one):
            try:
                with told():
                    message = question(asking, [file] if file and one.sees else [])
                async for texts[place] in spoken(await asked(one, [message], limits, max_tokens=MOST)):
                    news.put_nowait(True)
            except gradio.Error as error:
                texts[place] = f'({error.message})'
            news.put_nowait(False)

        following = [asyncio.ensure_future(follow(*numbered)) for numbered in enumerate(served)]
        try:
            left = len(served)
            while left:
                left -= not await news.get()
                yield texts
        finally:
            for one in following:
                one.cancel()

    _on_ask(compare, controls, answers)


def _look(served, limits):
    by_name = {one.name: one for one in served}
    name = gradio.Dropdown(list(by_name), value=served[-1].name, label='Model', visible=len(served) > 1)
    controls = _asking()
    found, busy = gradio.State(), asyncio.Semaphore(1)
    answer = gradio.Textbox(label='Answer', buttons=[])
    with gradio.Row():
        with gradio.Column():
            token = gradio.Radio([], label='Token of the answer', info='that the model was about to say')
            layer = gradio.Slider(0, 1, 0, step=1, label='Layer', info='0 is the mean of all')
            share = gradio.Markdown()
        with gradio.Column():
            shown = gradio.Image(label='Where it looked', format='png', interactive=False, buttons=['fullscreen'])
            words = gradio.Markdown('Click on a patch: which words is it like?', elem_classes='small')

    async def look(chosen, file, asking):
        if not file:
            raise gradio.Error('Where does it look? Give a picture first.', print_exception=False)
        one = by_name[chosen]
        with told():
            message = question(asking, [file])
        job = await asked(one, [message], limits, max_tokens=MOST)
        async for said in spoken(job):
            yield said, *[gradio.skip()] * 5
        if not job.tokens:
            raise gradio.Error('The model said nothing.', print_exception=False)
        async with busy:
            seen = await asyncio.to_thread(Seen, one, job)
        tokens = gradio.Radio([(piece, number) for number, piece in enumerate(seen.pieces)], value=0)
        layers = gradio.Slider(maximum=len(seen.shares), value=0)
        yield said, seen, tokens, layers, *seen.shown(0, 0)

    def show(seen, number, which):
        return seen.shown(int(number or 0), int(which)) if seen else (gradio.skip(), gradio.skip())

    def tell(seen, event: gradio.SelectData):
        return seen.told(*event.index) if seen else gradio.skip()

    _on_ask(look, controls, [answer, found, token, layer, shown, share], before=[name])
    for changed in (token, layer):
        changed.input(show, [found, token, layer], [shown, share], api_visibility='private', show_progress='hidden')
    shown.select(tell, found, words, api_visibility='private', show_progress='hidden')


def _asking():
    """What tabs begin with: picture, question, and the buttons that ask and stop."""
    with gradio.Row():
        picture = gradio.Image(type='filepath', sources=['upload', 'clipboard'], label='Picture', height=260)
        with gradio.Column():
            text = gradio.Textbox('What can you see?', label='Question', lines=3)
            with gradio.Row():
                button, stop = gradio.Button('Ask', variant='primary'), gradio.Button('Stop')
    return picture, text, button, stop


def _on_ask(function, controls, outputs, before=()):
    """Asks when the button is pressed, or Enter in the question."""
    picture, text, button, stop = controls
    options = dict(inputs=[*before, picture, text], outputs=outputs, api_visibility='private', show_progress='minimal')
    running = [button.click(function, **options), text.submit(function, **options)]
    stop.click(None, cancels=running, api_visibility='private')


def _called(one):
    if one.answers:
        return one.name if one.sees else f'{one.name}, which cannot see'
    return f'{one.name}, which continues text'


# What was looked at --------------------------------------------------------------------------------------------------


class Seen:
    """Where a model looked as it gave an answer. pieces: the answer's tokens as text; shares: as looking.looks()."""

    def __init__(self, one: Served, job: Job):
        definition, params = one.scheduler.definition, one.scheduler.params
        prompt, vision = job.request.prompt, one.config.model.vision
        self.picture = prompt.images[0]
        self.pieces = [one.token(token) for token in job.tokens]
        self.shares = looking.looks(definition, params, one.tokenizer.image, prompt, job.tokens)
        self.across = vision.image_size // vision.patch_size
        ids, cosines = looking.nearest_words(definition, params, self.picture, one.tokenizer.special, WORDS)
        self.words = [
            [f'“{one.token(token)}” {cosine:.2f}' for token, cosine in zip(*patch, strict=True)]
            for patch in zip(ids, cosines, strict=True)
        ]

    def shown(self, token: int, layer: int) -> tuple[Image.Image, str]:
        """(the picture as the model gets it, brighter where a token looked; a sentence). layer: from 1; 0 is all."""
        share = (self.shares.mean(axis=0) if layer == 0 else self.shares[layer - 1])[token]
        patches = share.reshape(self.across, self.across)
        glow = np.asarray(Image.fromarray(patches / max(patches.max(), 1e-9)).resize((SIDE, SIDE), Image.BILINEAR))
        plain = np.asarray(Image.fromarray(self.picture).resize((SIDE, SIDE), Image.BICUBIC), np.float32)
        lit = Image.fromarray((plain * (DARK + (1 - DARK) * glow[..., None])).round().astype(np.uint8))
        row, column = (int(place) + 1 for place in np.unravel_index(patches.argmax(), patches.shape))
        return lit, (
            f'Before token {token + 1}, “{self.pieces[token]}”, {share.sum():.0%} of the attention was on the picture, '
            f'most of it on the patch in row {row}, column {column} of {self.across}.'
        )

    def told(self, x: int, y: int) -> str:
        """The words that the patch at a place of shown() is like."""
        row, column = (min(int(place) * self.across // SIDE, self.across - 1) for place in (y, x))
        words = ', '.join(self.words[row * self.across + column])
        return f'Row {row + 1}, column {column + 1} is most like: {words} (cosines with the embeddings of words).'
