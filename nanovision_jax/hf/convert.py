"""Conversions of whole runs, from and to what others wrote; see convert.py."""

import contextlib
import functools
import json
import pathlib
import shutil

import huggingface_hub
import jax

from nanovision_jax import config_checks
from nanovision_jax.data.download import tokenizer_folder
from nanovision_jax.data.tokenizer import Tokenizer, import_tokenizer
from nanovision_jax.errors import UserError
from nanovision_jax.hf import engines, llama_cpp, nanogptvision
from nanovision_jax.hf.configs import model_folder
from nanovision_jax.hf.export import export
from nanovision_jax.hf.read import read_folder
from nanovision_jax.parallel import hosts
from nanovision_jax.reporting import family as report
from nanovision_jax.runs import checkpoint, lineage
from nanovision_jax.runs import config_file as runconfig
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.stages import stage_of


def to_folder(run, output, dtype: str = 'float32', push: str | None = None):
    """Writes a run (inference.run.Run) as a folder that transformers opens, and uploads it as `push` (USER/NAME).

    With it goes the report of the run's family, where there is one.
    """
    output = pathlib.Path(output)
    export(run, output, dtype)
    print(f'written: {output}')
    content = runfolder.read_json(run.tokenizer.folder / 'tokenizer.json')
    print('\n'.join(f'  {line}' for line in engines.told(run.config, llama_cpp.split_name(content))))
    if push:
        if page := report.for_others(run.config.run_dir):
            (output / 'report.html').write_text(page)
        print(f'uploaded: {upload(output, push)}')


def to_gguf(run, output, dtype: str = 'float32'):
    """Writes a run (inference.run.Run) as a GGUF file for llama.cpp: of a vision run what reads and writes text."""
    output = pathlib.Path(output)
    llama_cpp.write(run, output, dtype)
    print(f'written: {output}{", its text alone" if stage_of(run.config).sees else ""}')


def upload(folder, name: str, kind: str = 'model', kept: bool = True) -> str:
    """Uploads a folder to the Hugging Face hub as `name`, a model or a space, and returns its address.

    Takes the login that huggingface_hub finds. kept: whether the folder is there afterwards. Raises UserError where
    the hub does not take it.
    """
    try:
        api, made = huggingface_hub.HfApi(), {'space_sdk': 'gradio'} if kind == 'space' else {}
        api.create_repo(name, repo_type=kind, exist_ok=True, **made)
        return str(
            api.upload_folder(repo_id=name, repo_type=kind, folder_path=folder, commit_message='From nanovision_jax')
        )
    except (huggingface_hub.errors.HFValidationError, huggingface_hub.errors.HTTPError, OSError) as error:
        what = f'{folder} was not uploaded' if kept else 'nothing was uploaded'
        then = 'upload it with `hf upload`; the folder is complete' if kept else 'try again'
        raise UserError(
            f'{what} as {name!r} ({type(error).__name__}: {str(error).splitlines()[0]}). '
            f'Log in with `hf auth login` and {then}.'
        ) from error


def from_folder(source, output, template: str = 'auto'):
    """Makes a run folder of a Hugging Face folder or id. template: auto keeps its chat template, own takes ours."""
    folder = model_folder(source)
    with _new(output) as output:
        config, step, params, tokenizer = read_folder(folder, output, template)
        _write(config, step, params, tokenizer, folder)


def from_nanogptvision(source, output, tokenizer: str = 'gpt2'):
    """Makes a pretrain run folder of a nanoGPTVision checkpoint. tokenizer: GPT-2's, as a folder or an id."""
    config, step, weights = nanogptvision.read(pathlib.Path(source))
    with _new(output) as output:
        config.run_dir, config.name = str(output), output.resolve().parent.name
        config.data.tokenizer = pathlib.Path(tokenizer).name
        (output / 'tokenizer').mkdir()
        import_tokenizer(tokenizer_folder(tokenizer), output / 'tokenizer')
        opened = Tokenizer(output / 'tokenizer')
        params = nanogptvision.parameters(config, weights, opened)
        _write(config, step, params, opened, pathlib.Path(source))


@contextlib.contextmanager
def _new(output):
    """A new run folder, which is gone again after an error. Raises UserError if it is there already."""
    output = pathlib.Path(output)
    if output.exists():
        raise UserError(f'{output} exists: name a run folder that does not.')
    output.mkdir(parents=True)
    try:
        yield output
    except BaseException:
        shutil.rmtree(output)
        raise


def _write(config, step, params, tokenizer, source):
    """Writes config, lineage and checkpoint into config.run_dir, where the tokenizer is already."""
    config_checks.check_values(config)
    config_checks.check_model(config)
    folder = pathlib.Path(config.run_dir)
    runconfig.save(config)
    made_from = {'data.tokenizer': config.data.tokenizer}
    runfolder.write_whole(folder / 'tokenizer' / 'source.json', json.dumps(made_from) + '\n')
    lineage.imported(config, tokenizer, source, step)
    params = jax.device_put(params, hosts.first_device())
    with checkpoint.Checkpoints(folder, keep=1) as writer:
        save = functools.partial(writer.save, step, params, None, {'position': 0})
        save()
        writer.until_saved(save)
    print(f'written: {folder}, a {config.stage} run at step {step}')
