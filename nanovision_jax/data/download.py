"""Published data from the Hugging Face hub: at one commit, resumable, every large file's sha256 checked."""

import fnmatch
import hashlib
import os
import pathlib

import huggingface_hub
from huggingface_hub.errors import HFValidationError, HTTPError  # HTTPError: of the library it speaks HTTP with
from tqdm import tqdm

from nanovision_jax.data.catalog import pinned
from nanovision_jax.errors import UserError
from nanovision_jax.runs.config_file import hub_id


def download(repo, revision, patterns, folder, beside=''):
    """Fetches the files of a data set that match any of `patterns` into `folder`; gives the commit they are of.

    What is there already is not fetched again, and a file that broke off goes on. The commit is `revision`, else the
    one that an earlier call fetched into this folder, else the pinned one, else the newest. Raises UserError: offline
    it names the files to place by hand, and what else (`beside`) is needed.
    """
    folder = pathlib.Path(folder)
    record = folder / 'REVISION'
    if record.exists():
        before, commit = record.read_text().split()
        if before != repo or (revision or commit) != commit:
            raise UserError(f'{folder} holds files of {before} at {commit}: remove it first.')
        revision = commit
    revision = revision or pinned(repo) or None
    try:
        info = huggingface_hub.HfApi().dataset_info(repo, revision=revision, files_metadata=True)
        found = [f for f in info.siblings if any(fnmatch.fnmatch(f.rfilename, pattern) for pattern in patterns)]
        if not found:
            raise UserError(f'{repo} at {info.sha} holds no {" or ".join(patterns)}: say which files with --files.')
        folder.mkdir(parents=True, exist_ok=True)
        record.write_text(f'{repo} {info.sha}\n')
        for file in found:
            path = huggingface_hub.hf_hub_download(
                repo, file.rfilename, repo_type='dataset', revision=info.sha, local_dir=folder
            )
            _check(pathlib.Path(path), file)
    except (HFValidationError, HTTPError, OSError) as error:
        raise UserError(
            f'{repo} cannot be downloaded ({type(error).__name__}): place its {", ".join(patterns)}'
            f'{" and " if beside else ""}{beside} in a folder and say --from=FOLDER.'
        ) from error
    return info.sha


def tokenizer_folder(name):
    """The folder of a tokenizer: `name` itself, or the hub's files of that id (see runconfig.hub_id), downloaded once.

    Raises UserError for what is neither.
    """
    if (identity := hub_id(name)) is None:
        return os.path.expanduser(name)
    try:
        wanted = ['tokenizer*.json', 'special_tokens_map.json', 'config.json', 'vocab.json', 'merges.txt', '*.jinja']
        return huggingface_hub.snapshot_download(identity, allow_patterns=wanted)
    except (huggingface_hub.errors.HFValidationError, huggingface_hub.errors.HTTPError, OSError) as error:
        raise UserError(
            f'data.tokenizer {name!r} is no folder here, and as a hub id it gives no tokenizer '
            f'({type(error).__name__}: not there, or the hub is out of reach): check the name. Offline, name a folder '
            'with tokenizer.json.'
        ) from error


def _check(path, file):
    """Compares a file with the size and, where the hub has it, the sha256 that it should have."""
    wanted = file.lfs.sha256 if file.lfs else None
    if path.stat().st_size != file.size or (wanted and _sha256(path) != wanted):
        path.unlink()
        raise UserError(f'{path} came down damaged and is removed: run the command again.')


def _sha256(path):
    digest = hashlib.sha256()
    with (
        open(path, 'rb') as file,
        tqdm(
            total=path.stat().st_size,
            desc=f'checking {path.name}',
            unit='B',
            unit_scale=True,
            leave=False,
            mininterval=1,
        ) as bar,
    ):
        while block := file.read(1 << 24):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()
