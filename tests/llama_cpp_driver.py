"""Asks llama.cpp, by a Python that has llama-cpp-python: JSON in, JSON out; see test_llama_cpp.py.

In: the file `model`; `texts`; messages `chat`, or null; token ids `prompt`, `n` and `never`, or null.
Out: the ids of each of `texts` and of `chat`, and the n likeliest `tokens` after the prompt, but for `never`.
"""

import json
import sys

import numpy as np
from llama_cpp import Llama, llama_get_logits_ith
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

F32 = 0  # GGML's name of a number in the cache


def likeliest(llm, prompt, n, never):
    found, ids = [], prompt
    for _ in range(n):
        llm.eval(ids)
        scores = np.ctypeslib.as_array(llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),)).copy()
        scores[never] = -np.inf
        found.append(int(scores.argmax()))
        ids = found[-1:]
    return found


def main():
    asked = json.load(sys.stdin)
    llm = Llama(asked['model'], n_ctx=0, n_threads=1, type_k=F32, type_v=F32, flash_attn=False, verbose=False)
    said = {'texts': [llm.tokenize(text.encode(), special=False) for text in asked['texts']]}
    if asked['chat']:
        template = Jinja2ChatFormatter(llm.metadata['tokenizer.chat_template'], eos_token='', bos_token='')
        said['chat'] = llm.tokenize(template(messages=asked['chat']).prompt.encode(), special=True)
    if asked['prompt']:
        said['tokens'] = likeliest(llm, *(asked[name] for name in ('prompt', 'n', 'never')))
    print(json.dumps(said))


if __name__ == '__main__':
    main()
