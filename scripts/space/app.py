"""A Space that talks about pictures with the run beside this file, as scripts/space/share.py puts it here."""

import os
import pathlib
import sys

from nanovision_jax import cli, serve

run = next(pathlib.Path(__file__).parent.glob('runs/*/*/config.json')).parent
port = os.environ.get('GRADIO_SERVER_PORT', '7860')
sys.argv[1:] = [f'--run={run}', '--page', '--public', '--host=0.0.0.0', f'--port={port}', '--slots=4']
cli.run(serve.main)
