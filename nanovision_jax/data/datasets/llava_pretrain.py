"""LLaVA's captions for stage 3: LLaVA-CC3M-Pretrain-595K (v1) and LLaVA-Pretrain, 558K of LAION, CC and SBU (1.5)."""

from nanovision_jax.data.datasets.conversations_builder import ConversationsBuilder
from nanovision_jax.data.datasets.files import picture_reader
from nanovision_jax.data.sources import messages_of, names_of


class LlavaPretrain(ConversationsBuilder):
    """A caption a picture: chat.json or blip_laion_cc_sbu_558k.json, and images.zip or images/ beside it."""

    PATTERNS = ('chat.json', 'blip_laion_cc_sbu_558k.json')

    def rows(self):
        """Every object of the list."""
        self.picture = picture_reader(self.source)
        return super().rows()

    def example(self, row):
        """The conversation, its <image>s as places, and the pictures that it names."""
        messages = messages_of(row)
        return messages, [self.picture(name) for name in names_of(row)]
