"""LLaVA's captions for stage 3: LLaVA-CC3M-Pretrain-595K (v1) and LLaVA-Pretrain, 558K of LAION, CC and SBU (1.5)."""

import pathlib

from nanovision_jax.data.datasets.conversations_builder import ConversationsBuilder
from nanovision_jax.data.formats import check_form, read_row
from nanovision_jax.data.image_names import NamedImages, fetch


class LlavaPretrain(ConversationsBuilder):
    """A caption a picture: chat.json or blip_laion_cc_sbu_558k.json, and images.zip or images/ beside it."""

    PATTERNS = ('chat.json', 'blip_laion_cc_sbu_558k.json')

    def rows(self):
        """Every row of the files, whose first ones tell whether their form is taken."""
        source, seen = pathlib.Path(self.source), None
        self.named_images = NamedImages(source if source.is_dir() else source.parent)
        for key, row in super().rows():
            if (file := key.rpartition(':')[0]) != seen:
                seen = file
                check_form(row, f'{self.source}, {file},')
            yield key, row

    def example(self, row):
        """The conversation, and the pictures in the order of their places."""
        messages, references = read_row(row)
        return messages, [fetch(reference, self.named_images) for reference in references]
