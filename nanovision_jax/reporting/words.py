"""Of a report, the words that the patches of a picture are like. It opens the model, and so loads jax."""

import io
import pathlib

import numpy as np
from PIL import Image

from nanovision_jax.data import images
from nanovision_jax.data.conversation import BadExample
from nanovision_jax.errors import UserError
from nanovision_jax.inference.looking import nearest_words
from nanovision_jax.inference.run import load
from nanovision_jax.reporting.pictures import data_uri
from nanovision_jax.reporting.runs import open_runs
from nanovision_jax.stages import stage_of

NEAREST = 3  # words that are told of a patch


def chapter(folder, picture: str):
    """Blocks: a picture, and the words whose embeddings are most like what the projector makes of each of its patches.

    folder: of a family, whose last run that sees is opened, or of a run. Raises UserError where none does, and for what
    is no picture.
    """
    seeing = [run_ for run_ in open_runs(pathlib.Path(folder)) if run_.config and stage_of(run_.config).sees]
    if not seeing:
        raise UserError('--words takes a run that sees: vision_pretrain or vision_instruct.')
    if not pathlib.Path(picture).is_file():
        raise UserError(f'--words={picture}: there is no such picture.')
    try:
        image = images.load(pathlib.Path(picture).read_bytes())
    except BadExample as error:
        raise UserError(f'--words={picture} is no picture: {error}.') from error
    opened, vision = load(seeing[-1].folder), seeing[-1].config.model.vision
    seen, engine = images.prepare(image, vision), opened.engine
    found = nearest_words(engine.definition, engine.params, seen, opened.tokenizer.special, NEAREST)
    words = [
        [(_shown(opened.tokenizer.decode([int(token)])), cosine) for token, cosine in patch]
        for patch in np.stack(found, -1).tolist()
    ]
    buffer = io.BytesIO()
    Image.fromarray(seen).save(buffer, 'png')
    yield 'heading', f'Words that patches are like: {seeing[-1].name}'
    yield 'text', (
        f'The {NEAREST} words whose embeddings are nearest to what the projector makes of each patch of '
        f'{pathlib.Path(picture).name}, with their cosines. It need not speak in words: the decoder reads directions.'
    ), ''  # fmt: skip
    yield 'patches', data_uri(buffer.getvalue()), vision.image_size // vision.patch_size, words


def _shown(text):
    """A token as text; a part of a character, and what has no shape, as a box."""
    return ''.join(sign if sign.isprintable() and sign != '\ufffd' else '▯' for sign in text.strip()) or '▯'
