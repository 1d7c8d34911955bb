"""Magpie: questions and answers that a chat model wrote by itself (arXiv:2406.08464), text only."""

from nanovision_jax.data.conversation import BadExample, from_llava
from nanovision_jax.data.datasets.conversations_builder import ConversationsBuilder


class Magpie(ConversationsBuilder):
    """Parquet with `conversations` or `instruction` and `response`; JSON lines with `prompt` and `response`."""

    PATTERNS = ('*.parquet', '*.jsonl')
    COLUMNS = ('uuid', 'id', 'conversations', 'instruction', 'prompt', 'response')

    def example(self, row):
        """The conversation; no pictures: an <image> in a question is about HTML."""
        if not isinstance(row, dict):
            raise BadExample('a row that is no JSON object')
        if row.get('conversations'):
            return from_llava(row['conversations'], images=False), []
        question = row.get('instruction') or row.get('prompt')
        return [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': row.get('response')}], []
