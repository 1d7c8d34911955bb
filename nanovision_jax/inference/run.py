"""A run folder opened for use: nanovision_jax.load(run_dir)."""

import functools
import pathlib

import jax
import numpy as np
from jaxtyping import Float
from PIL import Image

from nanovision_jax import models
from nanovision_jax.config import Mesh
from nanovision_jax.data.tokenizer import Tokenizer
from nanovision_jax.errors import UserError
from nanovision_jax.inference.engine import Engine
from nanovision_jax.inference.prompt import chat_prompt, text_prompt
from nanovision_jax.inference.sampling import Sampling
from nanovision_jax.inference.weights import check_weights, stored
from nanovision_jax.parallel import compile_cache, hosts
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.runs import checkpoint
from nanovision_jax.runs import config_file as runconfig
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.stages import stage_of


@functools.partial(jax.jit, static_argnames='graphdef')
def forward(graphdef, params, inputs):
    """A model's logits of its inputs."""
    return models.merge(graphdef, params)(*inputs)


class Run:
    """A trained model with its tokenizer: `model`, `params`, `tokenizer`, `config`, `step`.

    Options of an answer, everywhere: temperature, top_k, top_p, seed (see sampling.Sampling) and max_new_tokens.
    """

    def __init__(self, config, step, graphdef, params, tokenizer):
        self.config, self.step, self.tokenizer, self.params = config, step, tokenizer, params
        self.graphdef = graphdef

    @functools.cached_property
    def model(self):
        """The live nnx module."""
        return models.merge(self.graphdef, self.params)

    @functools.cached_property
    def engine(self) -> Engine:
        """The engine that decodes with this model."""
        return Engine(self.config, self.graphdef, self.params, self.tokenizer.stops)

    def check_sees(self):
        """Raises UserError for a run that cannot talk about images."""
        if not stage_of(self.config).sees:
            raise UserError(
                f'{self.config.run_dir} is a {self.config.stage} run: '
                'talking about pictures takes a vision_pretrain or vision_instruct run.'
            )

    def logits(self, ids, images=None) -> Float[jax.Array, 'B T V']:
        """Token ids [B, T] (images: uint8 [B, M, height, width, 3]) → float32 logits; one segment a row."""
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
        question's text; the first may have the role 'system'. images: PIL images, or a single one, in the order of the
        image parts; those for which no message has a part go before the first question.
        """
        stage = stage_of(self.config)
        if stage.decodes and not stage.answers:
            raise UserError(f'a {self.config.stage} run has not learned to answer: continue_text() continues text.')
        images = [images] if isinstance(images, Image.Image) else list(images)
        if not all(isinstance(image, Image.Image) for image in images):
            raise UserError('images are PIL images: open a file with PIL.Image.open first.')
        if images:
            self.check_sees()
        if not isinstance(messages, str | list | tuple):
            raise UserError(f'messages are a question or a list of messages, not {messages!r:.60}.')
        if isinstance(messages, str):
            messages = [{'role': 'user', 'content': messages}]
        pieces = self.stream(chat_prompt(self.config, self.tokenizer, messages, images), **options)
        return pieces if stream else ''.join(pieces)

    def continue_text(self, text, **options):
        """An iterator of the pieces of text that continue a document."""
        return self.stream(text_prompt(self.tokenizer, text), **options)

    def answer(self, prompts, **options) -> list[str]:
        """The answers to a batch of Prompts, as text."""
        ids = [[] for _ in prompts]
        for chunk in self._generate(prompts, **options) if prompts else ():
            for row, new in zip(ids, chunk, strict=True):
                row += new
        return [self.tokenizer.decode(row) for row in ids]

    def stream(self, prompt, **options):
        """An iterator of the answer to one Prompt, piece by piece as text, never cut inside a character."""
        ids, said = [], ''
        for chunk in self._generate([prompt], **options):
            ids += chunk[0]
            text = self.tokenizer.decode(ids)
            if not text.endswith('\ufffd') and len(text) > len(said):
                yield text[len(said) :]
                said = text
        if (text := self.tokenizer.decode(ids)) != said:
            yield text[len(said) :]

    def _generate(self, prompts, max_new_tokens=256, **sampling):
        return self.engine.generate(prompts, max_new_tokens, Sampling(**sampling))


def load(run_dir, weights: str = '', devices: int = 1) -> Run:
    """Opens a run folder: the newest intact checkpoint. Raises UserError if there is none.

    weights: how they are kept in memory, as trained or 'bfloat16' or 'int8': see weights.py. devices: over how many of
    this process's devices the model is split, as by the axis `tensor` of a mesh.
    """
    check_weights(weights)
    folder, paths = pathlib.Path(run_dir), runfolder.Paths(run_dir)
    if not paths.config.is_file():
        beside = [p.parent for p in folder.parent.glob('*/config.json')] if folder.parent.is_dir() else []
        hint = f' There are: {", ".join(str(p) for p in beside)}.' if beside else ''
        raise UserError(f'{folder} is no run folder: it has no config.json.{hint}')
    compile_cache.use()
    config = runconfig.read(folder)
    config.model.attention = 'auto'  # what it was trained through need not be here
    step = runfolder.newest(folder, 'params')
    if step is None:
        raise UserError(f'{folder} has no whole checkpoint yet.')
    runfolder.check_beside(folder, step)
    tokenizer = Tokenizer(paths.tokenizer)
    graphdef, shapes = models.abstract(config, tokenizer.size, tokenizer.image)
    target = _placed(shapes, config, tokenizer, devices)
    params = checkpoint.restore(folder, step, 'params', target)
    if not checkpoint.finite(params):
        raise UserError(f'{folder}, step {step} holds parameters that are NaN or infinite: its training had diverged.')
    if weights and stage_of(config).decodes:
        graphdef, params = stored(config, graphdef, params, weights)
    return Run(config, step, graphdef, params, tokenizer)


def _placed(shapes, config, tokenizer, devices):
    """The shapes of parameters with the place of each."""
    if devices == 1:
        device = jax.sharding.SingleDeviceSharding(hosts.first_device())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    here = jax.local_devices()
    if not 1 <= devices <= len(here):
        raise UserError(f'a model is split over 1 to {len(here)} devices here, not {devices}.')
    mesh = parallel.make_mesh(Mesh(1, 1, devices), here[:devices])
    parallel.check_divides(config, mesh, tokenizer.size)
    placed = parallel.shardings(shapes, mesh)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, placed)
