"""Vision stages as LLaVA models: tower, projector and decoder in one file, and how its images are prepared."""

import pathlib

import numpy as np

from nanovision_jax.config import Model, Vision
from nanovision_jax.errors import UserError
from nanovision_jax.hf import configs, decoders, towers
from nanovision_jax.hf.weights import LINEAR, SAME, Weights, from_hf, to_hf
from nanovision_jax.runs.folder import read_json

PROJECTOR = {
    'first/kernel': ('linear_1.weight', LINEAR),
    'first/bias': ('linear_1.bias', SAME),
    'second/kernel': ('linear_2.weight', LINEAR),
    'second/bias': ('linear_2.bias', SAME),
}
_TOWER, _PROJECTOR = 'vision_tower.', 'multi_modal_projector.'
_FITS = {'crop': 'CLIPImageProcessor', 'pad': 'LlavaImageProcessor', 'stretch': 'SiglipImageProcessor'}


def _architecture(name):
    """A decoder's architecture as a LLaVA file names its tensors."""
    return decoders.ARCHITECTURES[name]._replace(base='language_model.model.', head='language_model.lm_head.weight')


# Out -----------------------------------------------------------------------------------------------------------------


def llava_json(model: Model, vocab_size: int, image_token: int) -> dict:
    """A LLaVA model's config.json of a config.Model; other tokens and dtype are for the caller to add."""
    text = configs.decoder_json(model, vocab_size)
    del text['architectures']
    return dict(
        architectures=['LlavaForConditionalGeneration'], model_type='llava', text_config=text,
        vision_config=configs.tower_json(model.vision), image_token_index=image_token,
        image_seq_length=model.vision.patches, vision_feature_layer=-2, multimodal_projector_bias=True,
        vision_feature_select_strategy=_strategy(model.vision), tie_word_embeddings=model.tied,
        projector_hidden_act='gelu' if model.projector == 'mlp' else 'linear',
    )  # fmt: skip


def _strategy(vision):
    """LLaVA's word for which tokens of the tower are taken: all but the class token, or all."""
    return 'default' if vision.class_tokens else 'full'


def processor_json(vision: Vision, image_token: str) -> tuple[dict, dict]:
    """(processor_config.json, preprocessor_config.json): how text and images become a model's inputs."""
    size = vision.image_size
    square = {'height': size, 'width': size}
    image = dict(
        image_processor_type=_FITS[vision.fit], do_resize=True, do_rescale=True, do_normalize=True,
        rescale_factor=1 / 255, image_mean=list(vision.mean), image_std=list(vision.std), do_convert_rgb=True,
        resample={'bilinear': 2, 'bicubic': 3}[vision.resample],
    )  # fmt: skip
    if vision.fit == 'stretch':
        image |= {'size': square, 'do_center_crop': False}
    else:
        image |= {'size': {'shortest_edge': size}, 'do_center_crop': True, 'crop_size': square}
    if vision.fit == 'pad':
        image |= {'do_pad': True}
    processor = dict(
        processor_class='LlavaProcessor', patch_size=vision.patch_size, image_token=image_token,
        vision_feature_select_strategy=_strategy(vision), num_additional_image_tokens=vision.class_tokens,
    )  # fmt: skip
    return processor, image | {'processor_class': 'LlavaProcessor'}


def llava_to_hf(params: dict, model: Model, vocab_size: int) -> dict[str, np.ndarray]:
    """{their name: array} of a vision-language model's parameters (nested dicts)."""
    projector = params['projector']
    if model.projector == 'linear':  # they always have two layers: the second one does nothing
        eye = {'kernel': np.eye(model.width, dtype=np.float32), 'bias': np.zeros(model.width, np.float32)}
        projector = {**projector, 'second': eye}
    tensors = to_hf(params['vision'], towers.TOWERS[model.vision.kind], f'{_TOWER}vision_model.')
    tensors |= to_hf(projector, PROJECTOR, _PROJECTOR)
    return tensors | decoders.decoder_to_hf(
        params['decoder'], _architecture(configs.architecture_of(model)), vocab_size
    )


# In ------------------------------------------------------------------------------------------------------------------


def model_fields(folder: pathlib.Path) -> dict:
    """The fields of config.Model that a folder with a LLaVA model sets, tower and projector included.

    Raises UserError for what our model cannot represent.
    """
    theirs = read_json(folder / 'config.json')
    vision = configs.vision_config(folder)
    act, layer = theirs.get('projector_hidden_act', 'gelu'), theirs.get('vision_feature_layer', -2)
    strategy = theirs.get('vision_feature_select_strategy', 'default')
    refused = {
        f'projector_hidden_act {act!r}': act not in ('gelu', 'linear'),
        f'vision_feature_layer {layer}': layer != -2,
        f'vision_feature_select_strategy {strategy!r}': strategy != _strategy(vision),
        'a projector without biases': not theirs.get('multimodal_projector_bias', True),
    }
    if any(refused.values()):
        raise UserError(f'{folder} has {next(n for n, bad in refused.items() if bad)}, which our model lacks.')
    text = configs.decoder_config(theirs.get('text_config') or {}, folder)
    return text | {'projector': 'mlp' if act == 'gelu' else 'linear', 'vision': vision}


def llava_from_hf(weights: Weights, model: Model, architecture: str, shapes: dict, vocab_size: int) -> dict:
    """A vision-language model's parameters (nested dicts like `shapes`) out of its weights.

    architecture: the decoder's model_type. Raises UserError where they do not fit.
    """
    known = [name for name in weights.tensors if name.startswith((_TOWER, _PROJECTOR, 'language_model.'))]
    weights.refuse(weights.unknown(known))
    text = weights.part('language_model.')
    named = decoders.ARCHITECTURES[architecture]._replace(base='model.', head='lm_head.weight')
    projector, ignored = weights.part(_PROJECTOR), ()
    if model.projector == 'linear':
        ignored = ('linear_2.*',)
        second = {name: t.read() for name, t in projector.tensors.items() if name.startswith('linear_2.')}
        eye = np.eye(model.width, dtype=np.float32)
        if not np.array_equal(second.get('linear_2.weight'), eye) or np.any(second.get('linear_2.bias', 0)):
            projector.refuse([f'{_PROJECTOR}linear_2 is not the identity, so the projector is not one linear layer'])
    return {
        'vision': towers.tower_from_hf(weights.part(_TOWER), model.vision.kind, shapes['vision']),
        'projector': from_hf(projector, PROJECTOR, shapes['projector'], ignored),
        'decoder': decoders.decoder_from_hf(text, named, shapes['decoder'], vocab_size),
    }
