"""Converts weights: a run to a Hugging Face folder and back or to a GGUF file, nanoGPTVision's checkpoints to a run.

    python -m nanovision_jax.convert --to=hf --run=runs/tiny/vision_instruct --output=FOLDER [--dtype=bfloat16]
                                     [--push=USER/NAME]
    python -m nanovision_jax.convert --to=gguf --run=runs/ltiny/sft --output=FILE.gguf [--dtype=float16]
    python -m nanovision_jax.convert --from=hf --input=FOLDER --output=RUN_DIR [--template=own]
    python -m nanovision_jax.convert --from=nanogptvision --input=checkpoint_035000.pt --output=RUN_DIR
                                     [--tokenizer=gpt2]

What is written opens with plain transformers: GPTNeoX, Qwen2, Qwen3 or LlamaForCausalLM, or for vision runs
LlavaForConditionalGeneration. A GGUF file is for llama.cpp: of decoders of Llama's kind, of vision runs the text alone.
What is read back is a run that chat, evaluate and the next stage accept. Nothing that is there is overwritten.
"""

import pathlib

from nanovision_jax.cli import Parser, run
from nanovision_jax.errors import UserError, check_writable

FORMATS = ('hf', 'nanogptvision')


def main(argv):
    """The command: see the module's docstring."""
    parser = Parser(prog='python -m nanovision_jax.convert', description=__doc__)
    parser.add_argument('--to', choices=('hf', 'gguf'), help='write a run in this format')
    parser.add_argument('--from', dest='source', choices=FORMATS, help='make a run of something in this format')
    parser.add_argument('--run', help='with --to: a run folder')
    parser.add_argument('--input', help='with --from: the folder, id or file')
    parser.add_argument('--output', required=True, help='what is made; must not exist yet')
    parser.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'), help='with --to: of the weights')
    parser.add_argument('--push', metavar='USER/NAME', help='with --to=hf: upload it to the Hugging Face hub too')
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
    useless += ('push',) * (args.to == 'gguf')
    if given := [name for name in useless if getattr(args, name)]:
        raise UserError(f'--{given[0]} does not go with --{"to" if args.to else "from"}={args.to or args.source}.')
    check_writable(args.output if args.to != 'gguf' else pathlib.Path(args.output).parent)
    from nanovision_jax.hf import convert  # jax loads once the command line is read
    from nanovision_jax.inference.run import load

    if args.to == 'gguf':
        convert.to_gguf(load(args.run), args.output, args.dtype or 'float32')
    elif args.to:
        convert.to_folder(load(args.run), args.output, args.dtype or 'float32', args.push)
    elif args.source == 'hf':
        convert.from_folder(args.input, args.output, args.template or 'auto')
    else:
        convert.from_nanogptvision(args.input, args.output, args.tokenizer or 'gpt2')


if __name__ == '__main__':
    run(main)
