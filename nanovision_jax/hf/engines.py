"""Which engines an export is for, as they or their sources tell; see the README's table. None of them is needed here.

vLLM 0.33 and SGLang 0.5.23 were read, not run; llama.cpp (of llama-cpp-python 0.3.36) runs in tests/test_llama_cpp.py.
"""

from nanovision_jax.hf.configs import architecture_of
from nanovision_jax.stages import stage_of


def told(config, split: str | None) -> list[str]:
    """A line an engine: whether it takes the export of a run, and why not.

    split: how its tokenizer splits text, by llama.cpp's name (llama_cpp.split_name), if there is one.
    """
    sees, llama = stage_of(config).sees, config.model.flavour == 'llama'
    found = ['transformers: opens it, and answers as here']
    if architecture_of(config.model) == 'qwen2' and not sees and split != 'qwen2':
        # Its AutoTokenizer (5.24) takes Qwen2's own class for every qwen2, whatever the folder says.
        found = [
            "transformers: opens it, but AutoTokenizer reads its tokenizer as Qwen2's own, which makes other tokens: "
            'open it by transformers.PreTrainedTokenizerFast'
        ]
    if not llama:
        found.append(f'vLLM: {"no: its LLaVA wants a decoder of Llama, Qwen2 or Qwen3" if sees else "not looked into"}')
        found.append("llama.cpp: NO: it would answer wrongly without an error (GELU for this model's ReLU)")
        return [*found, 'for other engines, train the size l20 (or ltiny) instead of d20 (or tiny)']
    if sees and config.model.projector != 'mlp':
        found.append('vLLM: no: it has no linear projector (model.projector=mlp)')
    else:
        found.append('vLLM: by its source, vllm serve FOLDER')
    if sees:
        found.append('SGLang: no: it refuses how LLaVA takes features here')
    return [*found, f'llama.cpp: {"its text alone, " if sees else ""}by convert --to=gguf']
