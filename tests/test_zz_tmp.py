import sys, time, os
sys.path.insert(0,'/work/main/tests')
import jax, micro
import pytest
from nanovision_jax import train, config as configs

if os.environ.get('DMO'): jax.config.update('jax_disable_most_optimizations', True)
def test_chain(tiny_family, tmp_path):
    for stage in micro.STAGES:
        c = micro.config(stage, tiny_family/stage)
        c.name='tiny'
        c.data.path=str(tiny_family/'data'); c.data.vocab_size=384
        c.data.length=128 if stage!='clip' else 40
        c.steps=4; c.checkpoint.every=2; c.log.every=1; c.eval.every=2; c.eval.batches=1
        t=time.time()
        train.train(c)
        print(stage, time.time()-t, file=sys.stderr)
