"""Converts weights: a run to a Hugging Face folder and back, and nanoGPTVision's checkpoints to a run.

    python -m nanovision_jax.convert --to=hf --run=runs/tiny/vision_instruct --output=FOLDER [--dtype=bfloat16]
                                     [--push=USER/NAME]
    python -m nanovision_jax.convert --from=hf --input=FOLDER --output=RUN_DIR [--template=own]
    python -m nanovision_jax.convert --from=nanogptvision --input=checkpoint_035000.pt --output=RUN_DIR
                                     [--tokenizer=gpt2]

What is written opens with plain transformers: GPTNeoX, Qwen2, Qwen3 or LlamaForCausalLM, or for vision runs
LlavaForConditionalGeneration. What is read back is a run that chat, evaluate and the next stage accept. Nothing that is
there is overwritten.
"""

import contextlib
import json
import pathlib
import shutil

from nanovision_jax.errors import Parser, UserError, check_writable, run

FORMATS = ('hf', 'nanogptvision')


def to_hf(run_dir, output, dtype='float32', push=None):
    """Writes a run as a folder that transformers opens, and uploads it as `push` (USER/NAME) if that is given."""
    from nanovision_jax.hf.export import export
    from nanovision_jax.inference.run import load

    output = pathlib.Path(output)
    export(load(run_dir), output, dtype)
    print(f'written: {output}')
    if push:
        print(f'uploaded: {upload(output, push)}')


def upload(folder, name):
    """Uploads a folder to the Hugging Face hub as the model `name`, and returns its address.

    Takes the login that huggingface_hub finds. Raises UserError where the hub does not take it.
    """
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        api.create_repo(name, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message='From nanovision_jax'))
    except (huggingface_hub.errors.HFValidationError, huggingface_hub.errors.HfHubHTTPError, OSError) as error:
        raise UserError(
            f'{folder} was not uploaded as {name!r} ({type(error).__name__}: {str(error).splitlines()[0]}). '
            'Log in with `hf auth login` and upload it with `hf upload`; the folder is complete.'
        ) from error


def from_hf(source, output, template='auto'):
    """Makes a run folder of a Hugging Face folder or id. template: auto keeps its chat template, own takes ours."""
    from nanovision_jax.hf.restore import restore
    from nanovision_jax.hf.weights import find

    folder = find(source)
    with _new(output) as output:
        config, step, params, tokenizer = restore(folder, output, template)
        _write(config, step, params, tokenizer, folder)


def from_nanogptvision(source, output, tokenizer='gpt2'):
    """Makes a pretrain run folder of a nanoGPTVision checkpoint. tokenizer: GPT-2's, as a folder or an id."""
    from nanovision_jax.data.download import tokenizer_folder
    from nanovision_jax.data.tokenizer import Tokenizer, import_tokenizer
    from nanovision_jax.hf import nanogptvision

    config, step, weights = nanogptvision.read(pathlib.Path(source))
    with _new(output) as output:
        config.run_dir, config.name = str(output), output.parent.name
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
    import jax

    from nanovision_jax import config as configs
    from nanovision_jax.runs import checkpoint, lineage
    from nanovision_jax.runs import config_file as runconfig
    from nanovision_jax.runs import folder as runfolder

    configs.check_values(config)
    configs.check_model(config)
    folder = pathlib.Path(config.run_dir)
    runconfig.save(config)
    made_from = {'data.tokenizer': config.data.tokenizer}
    runfolder.write_whole(folder / 'tokenizer' / 'source.json', json.dumps(made_from) + '\n')
    lineage.imported(config, tokenizer, source, step)
    writer = checkpoint.Checkpoints(folder, keep=1)
    writer.save(step, jax.device_put(params, jax.local_devices()[0]), None, {'position': 0})
    writer.wait()
    print(f'written: {folder}, a {config.stage} run at step {step}')


def main(argv):
    """The command: see the module's docstring."""
    parser = Parser(prog='python -m nanovision_jax.convert', description=__doc__)
    parser.add_argument('--to', choices=('hf',), help='write a run in this format')
    parser.add_argument('--from', dest='source', choices=FORMATS, help='make a run of something in this format')
    parser.add_argument('--run', help='with --to: a run folder')
    parser.add_argument('--input', help='with --from: the folder, id or file')
    parser.add_argument('--output', required=True, help='what is made; must not exist yet')
    parser.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'), help='with --to: of the weights')
    parser.add_argument('--push', metavar='USER/NAME', help='with --to: upload it to the Hugging Face hub too')
    parser.add_argument('--tokenizer', help='with --from=nanogptvision: a folder or id (default: gpt2)')
    parser.add_argument(
        '--template', choices=('auto', 'own'), help='with --from=hf: keep its chat template, or take ours'
    )
    args = parser.parse(argv)
    if bool(args.to) == bool(args.source):
        raise UserError('say either --to=hf, or --from=hf or --from=nanogptvision.')
    needed, useless = ('run', ('input', 'tokenizer', 'template')) if args.to else ('input', ('run', 'dtype', 'push'))
    if not getattr(args, needed):
        raise UserError(f'--{"to" if args.to else "from"} needs --{needed}.')
    useless += {'hf': ('tokenizer',), 'nanogptvision': ('template',)}.get(args.source, ())
    if given := [name for name in useless if getattr(args, name)]:
        raise UserError(f'--{given[0]} does not go with --{"to" if args.to else "from"}={args.to or args.source}.')
    check_writable(args.output)
    if args.to:
        to_hf(args.run, args.output, args.dtype or 'float32', args.push)
    elif args.source == 'hf':
        from_hf(args.input, args.output, args.template or 'auto')
    else:
        from_nanogptvision(args.input, args.output, args.tokenizer or 'gpt2')


if __name__ == '__main__':
    run(main)
