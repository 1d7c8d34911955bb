"""Prepares a published data set for training: every row checked, every picture decoded once, records written.

    python -m nanovision_jax.prepare llava_pretrain --from=FOLDER    files that are already there
    python -m nanovision_jax.prepare llava_pretrain                  downloads them first
    python -m nanovision_jax.train --config=configs/vision_pretrain.py --config.data.source=llava_pretrain

  fineweb_edu      FineWeb-Edu as .npy or .bin token shards (used where they lie), or as parquet (tokenized)
  magpie           Magpie-Phi3-Pro: questions and answers
  llava_pretrain   LLaVA-CC3M-Pretrain-595K or, with --repo, LLaVA-Pretrain 558K: captions
  llava_instruct   LLaVA-Instruct-150K or the 665K mix of LLaVA 1.5: conversations about pictures
  cauldron         The Cauldron or, with --repo=HuggingFaceM4/FineVision, FineVision; say which with --files='ai2d/*'
  chat             conversations in any form that data.source=conversations takes

A set lies in OUTPUT/NAME, with bad_rows.jsonl (what was left out, and why) and source.json (what it is made from).
Downloads are kept in OUTPUT/downloads/NAME; they are of one commit (pinned, or the newest at the first download),
continue where they broke off, and are checked by their sha256. While it is written a set takes twice its room. More
than 1% of bad rows is an error.

--from=FOLDER takes files that are there already:
  fineweb_edu      edufineweb_*.npy, .bin shards of nanoGPT or llm.c, or parquet with `text`
  magpie           parquet, or JSON lines with prompt and response
  llava_pretrain   chat.json or blip_laion_cc_sbu_558k.json, with images.zip or images/
  llava_instruct   llava_instruct_150k.json with COCO's train2017.zip or train2017/, or llava_v1_5_mix665k.json with
                   coco/ gqa/ ocr_vqa/ textvqa/ vg/
  cauldron         parquet with `images` and `texts`
  chat             JSON, JSON lines and parquet, pictures beside them or in the rows
Pictures are read out of zip files and decoded once: JPEG, PNG, WEBP, GIF, BMP, TIFF (first frame) and, where Pillow
can, AVIF.

Licences: FineWeb-Edu is under ODC-By 1.0 and Common Crawl's terms (the token files' page says MIT); Magpie's page
states none; LLaVA's captions are under CC-3M's terms, for reproducing LLaVA only, and BLIP's; LLaVA-Instruct is CC BY
4.0 under OpenAI's terms of use, and its pictures are Flickr's; of The Cauldron and FineVision each part has its own.
"""

from nanovision_jax.cli import Parser, run
from nanovision_jax.data.catalog import SETS
from nanovision_jax.errors import UserError


def main(argv):
    """The command: see the module's docstring."""
    parser = Parser(prog='python -m nanovision_jax.prepare', description=__doc__)
    parser.add_argument('name', help=', '.join(SETS))
    parser.add_argument('--from', dest='source', default='', help='the folder of the published files')
    parser.add_argument('--output', default='data', help='where prepared sets lie (default: data)')
    parser.add_argument('--files', help='which files of the folder or the hub hold the rows, as in "ai2d/*"')
    parser.add_argument('--repo', help='another data set of the hub in the same form')
    parser.add_argument('--revision', help='its commit (default: a pinned one, or the newest, which source.json keeps)')
    parser.add_argument('--minimum', help="FineVision's ratings a turn must have, as in relevance:4,formatting:3")
    parser.add_argument('--tokenizer', help='of text for fineweb_edu: a folder or an id (default: gpt2)')
    parser.add_argument('--workers', type=int, help='threads or processes (default: as many as there are cores)')
    parser.add_argument('--beam', help='options of the Apache Beam pipeline that tokenizes')
    args = vars(parser.parse(argv))
    name, output = args.pop('name'), args['output']
    if args['workers'] is not None and args['workers'] < 1:
        raise UserError(f'--workers takes a number above 0, not {args["workers"]}.')
    from nanovision_jax.data import preparation  # loads what reads and writes data sets

    print('\n'.join(preparation.lines(preparation.prepare(name, **args))))
    print(f'train on it: --config.data.source={name} --config.data.path={output}')


if __name__ == '__main__':
    run(main)
