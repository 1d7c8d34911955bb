"""Our models say what transformers said of the same weights, from files: where there is no PyTorch, too."""

import golden
import jax.numpy as jnp
import micro
import numpy as np
import pytest

from nanovision_jax import models


@pytest.mark.parametrize('kind', golden.KINDS)
def test_our_model_says_what_transformers_said(kind):
    cfg, graphdef, params, tensors, _ = golden.model_of(kind)
    with np.load(golden.FOLDER / f'{kind.replace(", ", "-")}.npz') as file:
        wanted = dict(file)
    assert golden.digest(tensors) == str(
        wanted['digest']
    )  # these very tensors, so written, were opened by transformers
    ids, picture = golden.inputs_of(cfg)
    model, size = models.merge(graphdef, params), micro.TOKENIZER.size
    positions = jnp.arange(golden.PROMPT)[None]
    inputs = [jnp.asarray(ids, jnp.int32), positions, jnp.ones_like(positions)]
    if picture is not None:
        inputs.append(jnp.asarray(picture[None, None]))
        features = model.vision.features(model.vision.normalize(inputs[-1][0]))
        np.testing.assert_allclose(features, wanted['features'], atol=1e-4)
    np.testing.assert_allclose(model(*inputs)[..., :size], wanted['logits'], atol=1e-4)
    pictures = None if picture is None else picture[None]
    found = micro.greedy(graphdef, params, ids[0], pictures, golden.NEW, [micro.TOKENIZER.image])
    assert found == wanted['tokens'].tolist() and len(set(found)) > 8
