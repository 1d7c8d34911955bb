"""A run folder opened for use: nanovision_jax.load(run_dir)."""

import functools
import pathlib

import jax
import numpy as np

from nanovision_jax import models
from nanovision_jax.data.tokenizer import Tokenizer
from nanovision_jax.errors import UserError
from nanovision_jax.inference import engine
from nanovision_jax.runs import checkpoint
from nanovision_jax.runs import config_file as runconfig
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.stages import stage_of


@functools.partial(jax.jit, static_argnames='graphdef')
def forward(graphdef, params, inputs):
    """A model's logits of its inputs."""
    return models.merge(graphdef, params)(*inputs)


class Run:
    """A trained model with its tokenizer: `model` (the live nnx module), `tokenizer`, `config`, `step`."""

    def __init__(self, config, step, graphdef, params, tokenizer):
        self.config, self.step, self.tokenizer, self.params = config, step, tokenizer, params
        self.graphdef = graphdef
        self.model = models.merge(graphdef, params)

    @property
    def engine(self):
        """The engine that decodes with this model."""
        return engine.Engine(self.config, self.graphdef, self.params, self.tokenizer)

    def check_sees(self):
        """Raises UserError for a run that cannot talk about pictures."""
        if not stage_of(self.config).sees:
            raise UserError(
                f'{self.config.run_dir} is a {self.config.stage} run: '
                'talking about pictures takes a vision_pretrain or vision_instruct run.'
            )

    def logits(self, ids, images=None):
        """Token ids [B, T] (images: uint8 [B, M, height, width, 3]) → float32 logits [B, T, V]; one segment a row."""
        if images is not None:
            self.check_sees()
        ids = np.asarray(ids, np.int32)
        inputs = [ids, np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape), np.ones_like(ids)]
        if stage_of(self.config).sees:
            size = self.config.model.vision.image_size
            inputs.append(np.zeros((len(ids), 1, size, size, 3), np.uint8) if images is None else np.asarray(images))
        return forward(self.graphdef, self.params, inputs)

    def chat(self, messages, images=(), stream=False, **options):
        """The answer to a conversation, or with stream=True an iterator of its pieces.

        messages: [{'role': 'user' | 'assistant', 'content': text or parts}], ending with a question, or just that
        question's text; the first may have the role 'system'. images: PIL pictures, in the order of the image parts;
        pictures for which no message has a part go before the first question.
        Options: temperature, top_k, top_p, max_new_tokens, seed (see Engine.pieces).
        """
        if not stage_of(self.config).answers:
            raise UserError(f'a {self.config.stage} run has not learned to answer: continue_text() continues text.')
        if images:
            self.check_sees()
        if isinstance(messages, str):
            messages = [{'role': 'user', 'content': messages}]
        prompt = engine.chat_prompt(self.config, self.tokenizer, messages, images)
        pieces = self.engine.stream(prompt, **options)
        return pieces if stream else ''.join(pieces)

    def continue_text(self, text, **options):
        """An iterator of the pieces of text that continue a document. Options as in chat()."""
        return self.engine.stream(engine.text_prompt(self.tokenizer, text), **options)


def load(run_dir):
    """Opens a run folder: the newest whole checkpoint, on one device. Raises UserError if there is none."""
    folder = pathlib.Path(run_dir)
    if not (folder / 'config.json').is_file():
        beside = [p.parent for p in folder.parent.glob('*/config.json')] if folder.parent.is_dir() else []
        hint = f' There are: {", ".join(str(p) for p in beside)}.' if beside else ''
        raise UserError(f'{folder} is no run folder: it has no config.json.{hint}')
    config = runconfig.read(folder)
    step = runfolder.newest(folder, 'params')
    if step is None:
        raise UserError(f'{folder} has no whole checkpoint yet.')
    tokenizer = Tokenizer(folder / 'tokenizer')
    graphdef, shapes = models.abstract(config, tokenizer.size, tokenizer.image)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    return Run(config, step, graphdef, checkpoint.restore(folder, step, 'params', target), tokenizer)
