"""nanoGPTVision's checkpoints: the same logits as its own decoder, a run that sft accepts, and nothing executed."""

import sys

import micro
import numpy as np
import pytest

import nanovision_jax
from nanovision_jax import convert
from nanovision_jax.data import pipeline
from nanovision_jax.data.tokenizer import Tokenizer
from nanovision_jax.errors import UserError
from nanovision_jax.hf import nanogptvision
from nanovision_jax.training import start


def reference_model(torch, vocab=50, width=24, heads=2, ffn=40, layers=2):
    """nanoGPTVision's decoder as its parts are named, written for this test: logits of token ids [B, T]."""
    nn = torch.nn

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ('query_fc', 'key_fc', 'value_fc'):
                setattr(self, name, nn.Linear(width, width, bias=False))
            self.output_projection = nn.Linear(width, width)

        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = (f(x).view(b, t, heads, -1).transpose(1, 2) for f in (self.query_fc, self.key_fc, self.value_fc))
            size = q.shape[-1]
            angle = torch.arange(t)[:, None] * 1e6 ** (-torch.arange(0, size, 2) / size)
            turn = torch.polar(torch.ones_like(angle), angle)

            def rotate(x):  # interleaved pairs as complex numbers
                pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
                return torch.view_as_real(pairs * turn).flatten(-2)

            out = nn.functional.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            return self.output_projection(out.transpose(1, 2).reshape(b, t, width))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.multihead_attention, self.feed_forward = Attention(), nn.Module()
            self.feed_forward.net = nn.Sequential(
                nn.Linear(width, ffn, bias=False), nn.ReLU(), nn.Linear(ffn, width, bias=False)
            )

        def forward(self, x):
            x = x + self.multihead_attention(self.layer_norm1(x))
            return x + self.feed_forward.net(self.layer_norm2(x))

    class Reference(nn.Module):
        def __init__(self):
            super().__init__()
            self.token_embedding_layer, self.vocab_projection = nn.Module(), nn.Module()
            self.token_embedding_layer.token_embedding_table = nn.Embedding(vocab, width)
            self.blocks = nn.ModuleList(Block() for _ in range(layers))
            self.vocab_projection.output_norm = nn.LayerNorm(width)
            self.vocab_projection.vocab_projection = nn.Linear(width, vocab, bias=False)

        def forward(self, ids):
            x = self.token_embedding_layer.token_embedding_table(ids)
            for block in self.blocks:
                x = block(x)
            return self.vocab_projection.vocab_projection(self.vocab_projection.output_norm(x))

    torch.manual_seed(0)
    model = Reference()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    config = dict(
        embedding_dim=width, hidden_dim=ffn, num_attention_heads=heads, layer_count=layers, vocab_size=vocab,
        rope_theta=1e6, max_sequence_length=64, input_sequence_length=32, autocast_dtype=torch.bfloat16,
    )  # fmt: skip
    return model, config


def test_nanogptvision_comes_in_with_the_same_logits(tokenizer, tmp_path, capsys):
    torch = pytest.importorskip('torch')
    model, config = reference_model(torch, vocab=tokenizer.size - 4)  # as GPT-2's, without our special tokens
    file, out = tmp_path / 'checkpoint_000007.pt', tmp_path / 'runs' / 'pretrain'
    state = {f'_orig_mod.module.{name}': value for name, value in model.state_dict().items()}
    torch.save({'model_state_dict': state, 'optimizer_state_dict': {}, 'config': config, 'current_step': 7}, file)
    argv = ['--from=nanogptvision', f'--input={file}', f'--output={out}', f'--tokenizer={tokenizer.folder}']
    convert.main(argv)
    assert 'a pretrain run at step 7' in capsys.readouterr().out
    run = nanovision_jax.load(out)
    ids = np.random.default_rng(0).integers(0, tokenizer.size - 4, (2, 30))
    with torch.no_grad():
        wanted = model(torch.tensor(ids)).numpy()
    np.testing.assert_allclose(run.logits(ids)[..., : tokenizer.size - 4], wanted, atol=1e-4)
    table, rows = run.params['embedding']['embedding'], tokenizer.size - 4
    np.testing.assert_array_equal(table[:rows], model.token_embedding_layer.token_embedding_table.weight.detach())
    assert np.ptp(table[rows : tokenizer.size], axis=1).min() > 0 and not table[tokenizer.size :].any()
    # and sft takes it
    cfg = micro.run_config('sft', tmp_path / 'runs', data__length=64)
    assert cfg.model.layers == run.config.model.layers
    (parent,) = start.find(cfg)
    parent.prove()
    assert (parent.step, parent.folder) == (7, out)
    assert pipeline.family_tokenizer(cfg, parent.tokenizer).digest == Tokenizer(out / 'tokenizer').digest


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    torch = pytest.importorskip('torch')

    class Evil:
        def __reduce__(self):
            return (tmp_path / 'ran').touch, ()

    file = tmp_path / 'checkpoint_000001.pt'
    torch.save({'model_state_dict': {}, 'config': Evil(), 'current_step': 1}, file)
    with pytest.raises(UserError, match='cannot be read as plain tensors'):
        nanogptvision.read(file)
    assert not (tmp_path / 'ran').exists()
    torch.save({'model_state_dict': {}}, file)
    with pytest.raises(UserError, match='no nanoGPTVision checkpoint'):
        nanogptvision.read(file)
    monkeypatch.setitem(sys.modules, 'torch', None)
    with pytest.raises(UserError, match='takes PyTorch'):
        nanogptvision.read(file)
