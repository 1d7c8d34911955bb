"""The way back: a folder in a layout of Hugging Face's as a run's config, parameters and tokenizer."""

import dataclasses
import pathlib

from nanovision_jax import config as configs
from nanovision_jax import models
from nanovision_jax.data.tokenizer import Tokenizer, import_tokenizer
from nanovision_jax.errors import UserError
from nanovision_jax.hf import configs as hf_configs
from nanovision_jax.hf import decoders, llava
from nanovision_jax.hf.export import CONFIG, check_digests, copy_tokenizer
from nanovision_jax.hf.weights import open_weights
from nanovision_jax.runs import config_file as runconfig
from nanovision_jax.runs.folder import read_json


def read_folder(folder: pathlib.Path, output: pathlib.Path, template: str = 'auto') -> tuple:
    """(config, step, parameters as numpy arrays in nested dicts, tokenizer) of a folder, for a run in `output`.

    The tokenizer is written to output/tokenizer; template is what import_tokenizer() takes. What we wrote comes back
    bit for bit, and as the stage it was; another LLaVA model counts as vision_instruct, another decoder as sft.
    Raises UserError for what ours cannot represent.
    """
    theirs, weights = read_json(folder / 'config.json'), open_weights(folder)
    vision = theirs.get('model_type') == 'llava'
    fields = llava.model_fields(folder) if vision else hf_configs.decoder_config(theirs, folder)
    if ours := (folder / CONFIG).is_file():
        saved = read_json(folder / CONFIG)
        check_digests(folder, saved.get('sha256', {}))  # older exports have none
        config, step = runconfig.from_dict(saved['config'], folder), saved['step']
        _check_same(config.model, fields, folder)
        if config.data.source == 'tiny_world':  # its place is the family's, wherever that is now
            config.data.path = str(output.parent / 'data')
    else:
        config = configs.Config('vision_instruct' if vision else 'sft', size='hf', steps=1)
        config.model, step = dataclasses.replace(config.model, **fields), 1
        config.data = configs.Data(configs.UNKNOWN, tokenizer=folder.name, length=min(1024, config.model.positions))
    config.run_dir, config.name = str(output), output.resolve().parent.name or config.name
    target = output / 'tokenizer'
    target.mkdir()
    if ours:
        tokenizer = copy_tokenizer(folder, target)
    else:
        import_tokenizer(str(folder), target, template)
        tokenizer = Tokenizer(target)
    shapes = models.abstract(config, tokenizer.size, tokenizer.image)[1]
    if vision:
        params = llava.llava_from_hf(weights, config.model, theirs['text_config']['model_type'], shapes, tokenizer.size)
    else:
        params = decoders.decoder_from_hf(weights, decoders.ARCHITECTURES[theirs['model_type']], shapes, tokenizer.size)
    return config, step, params, tokenizer


def _check_same(model, fields, folder: pathlib.Path):
    """Raises UserError if config.json says something else of a model than our own file does."""
    filled = {'kv_heads': model.kv_heads or model.heads, 'head_dim': model.head_size}
    for name, value in fields.items():
        mine = filled[name] if name in filled and model.flavour == 'llama' else getattr(model, name)
        if mine != value:
            raise UserError(f'{folder}: {name} is {value} in config.json, and {mine} in {CONFIG}.')
