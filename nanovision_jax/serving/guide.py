"""Answers held to a JSON schema or to a list of choices, by llguidance: which tokens may come next."""

import json

import numpy as np

from nanovision_jax.serving.errors import Refusal


def make_guide(tokenizer, wanted: dict, choice: list | None):
    """The Guide of a response_format, or of a list of answers. Raises Refusal for one that cannot be followed."""
    try:
        import llguidance
    except ImportError:
        raise Refusal(400, "response_format and choice take llguidance: pip install 'nanovision_jax[serve]'.") from None
    kind, from_schema = wanted.get('type', 'text'), llguidance.LLMatcher.grammar_from_json_schema
    compact = {'whitespace_flexible': False}  # a model at a loss would fill its answer with spaces
    try:
        if choice is not None:
            if not choice or not all(isinstance(one, str) and one for one in choice):
                raise Refusal(400, 'choice takes a list of texts.', 'choice')
            grammar = llguidance.grammar_from('lark', f'start: {" | ".join(json.dumps(one) for one in choice)}')
        elif kind == 'json_object':
            grammar = from_schema({'type': 'object'}, overrides=compact)
        elif kind == 'json_schema':
            schema = wanted.get('json_schema')
            schema = schema.get('schema') if isinstance(schema, dict) else None
            if not isinstance(schema, dict):
                raise Refusal(400, 'response_format.json_schema.schema takes an object.', 'response_format')
            grammar = from_schema(schema, overrides=compact)
        else:
            known = 'there are text, json_object and json_schema'
            raise Refusal(400, f'response_format {kind!r:.60} is not supported: {known}.', 'response_format')
        error = llguidance.LLMatcher.validate_grammar(grammar, _known(tokenizer))
    except ValueError as raised:
        error = str(raised)
    if error:
        why = error.splitlines()[0][:200]
        raise Refusal(400, f'this response_format cannot be followed: {why}.', 'response_format')
    return Guide(llguidance.LLMatcher(_known(tokenizer), grammar))


_tokenizers = {}


def _known(tokenizer):
    """A tokenizer as llguidance has it, made once."""
    if tokenizer.digest not in _tokenizers:
        import llguidance

        _tokenizers[tokenizer.digest] = llguidance.LLTokenizer(
            (tokenizer.folder / 'tokenizer.json').read_text(), n_vocab=tokenizer.size, eos_token=tokenizer.end
        )
    return _tokenizers[tokenizer.digest]


class Guide:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher):
        self.matcher = matcher

    def allowed(self) -> np.ndarray:
        """A bit for each token that may come next: uint32 words."""
        return np.frombuffer(self.matcher.compute_bitmask(), np.uint32)

    def ended(self, tokens: list[int]) -> bool:
        """Takes the tokens that were said; whether the answer is whole."""
        return not self.matcher.consume_tokens(tokens) or self.matcher.is_stopped()
