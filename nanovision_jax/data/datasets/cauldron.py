"""The Cauldron (arXiv:2405.02246) and FineVision: many sets of questions about pictures in one parquet schema."""

from nanovision_jax.data.conversation import BadExample, from_llava
from nanovision_jax.data.datasets.conversations_builder import ConversationsBuilder

RATINGS = ('relevance', 'image_correspondence', 'visual_dependency', 'formatting')  # FineVision's, 1 to 5 a turn


class Cauldron(ConversationsBuilder):
    """Parquet with `images` (a list) and `texts` (turns of user, assistant and, in The Cauldron, source).

    `minimum` {rating: least value} keeps the turns that FineVision rates at least so; a row without any is left out.
    """

    PATTERNS = ('*.parquet',)
    COLUMNS = ('images', 'texts', *(f'{name}_ratings' for name in RATINGS))

    def rows(self):
        """Every row with the turns that its ratings leave."""
        for key, row in super().rows():
            if row is None:
                yield key, row
                continue
            turns = row.get('texts') or []
            row['texts'] = [
                turn for i, turn in enumerate(turns) if all(self._passes(row, name, i) for name in self.minimum)
            ]
            if turns and not row['texts']:
                self.left_out += 1
            else:
                yield key, row

    def _passes(self, row, name, turn):
        ratings = row.get(f'{name}_ratings') or []
        return turn >= len(ratings) or ratings[turn] is None or ratings[turn] >= self.minimum[name]

    def example(self, row):
        """The turns; all pictures come before the first question, unless the questions say <image> themselves."""
        if row is None:
            raise BadExample('a row that is not UTF-8')
        turns = []
        for turn in row['texts']:
            turns += [{'from': 'human', 'value': turn['user']}, {'from': 'gpt', 'value': turn['assistant']}]
        if not turns:
            raise BadExample('no answer')
        images = [(image or {}).get('bytes') for image in row.get('images') or []]
        if not all(images):
            raise BadExample('missing image')
        messages = from_llava(turns)
        if images and not any('<image>' in turn['value'] for turn in turns[::2]):
            text = {'type': 'text', 'text': messages[0]['content']}
            messages[0]['content'] = [{'type': 'image'}] * len(images) + [text]
        return messages, images
