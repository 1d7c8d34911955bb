"""The training step of a text stage as PyTorch users write it: what train.py --peer=torch is compared with.

    python scripts/benchmarks/torch_step.py --config=configs/pretrain.py:d4 --mode=eager [--steps=20]

The decoder of flavour gpt, its parameters, batch, dtype of compute, AdamW (fused) and clipping; attention is
`scaled_dot_product_attention`, the loss `cross_entropy` of whole logits. Attention is causal alone: what keeps the
documents of a row apart would cost the fast kernels. --mode=compile puts the model and its loss through torch.compile.
Prints one JSON object. On a GPU a step's batch goes through in as few parts as fit.
"""

import json
import os
import statistics
import time

os.environ['JAX_PLATFORMS'] = 'cpu'  # the config and the batch are numpy's; the GPU is PyTorch's

import torch
import train
from torch import nn
from torch.nn import functional

from nanovision_jax.data.batch import fake_batch
from nanovision_jax.errors import UserError
from nanovision_jax.models.layers import padded

WARM = 3  # steps before time counts


def rotate(x, cos, sin):
    """Rotary positions of [B, N, T, H], over pairs (i, i + H/2), in float32."""
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1).to(x.dtype)


class Block(nn.Module):
    """Pre-norm attention and a ReLU feed-forward layer. `cfg` is a config.Model."""

    def __init__(self, cfg):
        super().__init__()
        self.heads, d = cfg.heads, cfg.width
        self.attention_norm, self.ffn_norm = nn.LayerNorm(d, cfg.epsilon), nn.LayerNorm(d, cfg.epsilon)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d)
        self.ffn_in, self.ffn_out = nn.Linear(d, cfg.ffn, bias=False), nn.Linear(cfg.ffn, d, bias=False)

    def forward(self, x, cos, sin):
        """[B, T, D] to the same."""
        b, t, d = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, d))
        return x + self.ffn_out(functional.relu(self.ffn_in(self.ffn_norm(x))))


class Decoder(nn.Module):
    """The decoder of flavour gpt, and its loss. `cfg` is a config.Model."""

    def __init__(self, cfg, vocab_size):
        super().__init__()
        self.cfg, self.vocab_size, rows = cfg, vocab_size, padded(vocab_size)
        self.embedding = nn.Embedding(rows, cfg.width)
        self.blocks = nn.ModuleList([Block(cfg) for _ in range(cfg.layers)])
        self.norm = nn.LayerNorm(cfg.width, cfg.epsilon)
        self.head = nn.Linear(cfg.width, rows, bias=False)

    def forward(self, tokens, targets, positions):
        """The mean loss of the targets that are not -100."""
        half = self.cfg.head_size // 2
        frequency = self.cfg.rope_theta ** (-torch.arange(half, device=tokens.device) / half)
        angle = positions[:, None, :, None] * frequency
        cos, sin = angle.cos(), angle.sin()
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.head(self.norm(x)).float()[..., : self.vocab_size]
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def inputs(config, vocab_size, device):
    """(tokens, targets, positions) of the batch that train.py takes; what is not learned has the target -100."""
    host = fake_batch(config, vocab_size)
    host['targets'][host['weights'] == 0] = -100
    return [torch.from_numpy(host[name]).to(device, torch.int64) for name in ('tokens', 'targets', 'positions')]


def make_step(config, model, mode):
    """A function (batch, parts) → loss, which takes a step."""
    optim, matrices = config.optim, [p for p in model.parameters() if p.ndim > 1]
    decayed = [p for p in matrices if p is not model.embedding.weight]
    kept = [p for p in model.parameters() if all(p is not d for d in decayed)]
    groups = [{'params': decayed, 'weight_decay': optim.weight_decay}, {'params': kept, 'weight_decay': 0.0}]
    adamw = torch.optim.AdamW(groups, optim.learning_rate, (optim.b1, optim.b2), fused=True)
    forward = torch.compile(model) if mode == 'compile' else model
    device = next(model.parameters()).device.type
    half = config.dtype == 'bfloat16' or (config.dtype == 'auto' and device == 'cuda')

    def step(batch, parts):
        total = 0.0
        for part in zip(*(x.chunk(parts) for x in batch), strict=True):
            with torch.autocast(device, torch.bfloat16, enabled=half):
                loss = forward(*part) / parts
            loss.backward()
            total = total + loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return total

    return step


def measure(config, steps, mode):
    """What main() prints."""
    if config.stage not in ('pretrain', 'sft') or config.model.flavour != 'gpt' or config.optim.name != 'adamw':
        raise UserError('PyTorch has pretrain and sft, model.flavour=gpt and optim.name=adamw to compare with.')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.set_float32_matmul_precision('high' if device == 'cuda' else 'highest')
    size = train.vocab_size(config)
    model = Decoder(config.model, size).to(device)
    batch, step, parts = inputs(config, size, device), make_step(config, model, mode), config.optim.parts

    def timed(parts):
        began = time.perf_counter()
        loss = float(step(batch, parts))  # waits
        return loss, time.perf_counter() - began

    began = time.perf_counter()
    while True:
        try:
            for _ in range(WARM):
                timed(parts)
            break
        except torch.cuda.OutOfMemoryError:
            if parts >= config.data.batch_size:
                raise
            parts *= 2
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
    warm = time.perf_counter() - began
    loss, seconds = zip(*(timed(parts) for _ in range(steps)), strict=True)
    tokens = config.data.batch_size * config.data.length
    return {
        'parameters': sum(p.numel() for p in model.parameters()),
        'step_seconds': round(statistics.median(seconds), 4),
        'tokens_per_second': round(tokens / statistics.median(seconds)),
        'accumulate': parts,
        'warm_up_seconds': round(warm, 1),
        'peak_device_bytes': torch.cuda.max_memory_allocated() if device == 'cuda' else 0,
        'loss': loss[-1],
        'devices': torch.cuda.get_device_name() if device == 'cuda' else 'cpu',
        'versions': {'torch': torch.__version__},
    }


def main(argv):
    """The command: see the module's docstring."""
    mode = [arg.removeprefix('--mode=') for arg in argv if arg.startswith('--mode=')]
    if mode[-1:] not in (['eager'], ['compile']):
        raise UserError('--mode is eager or compile.')
    print(json.dumps(measure(*train.read([arg for arg in argv if not arg.startswith('--mode=')]), mode[-1])))


if __name__ == '__main__':
    train.command(main)
