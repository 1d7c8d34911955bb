"""Anybody's conversations: JSON, JSON lines or parquet, in any of the forms that formats.py knows."""

from nanovision_jax.data.datasets.llava_pretrain import LlavaPretrain


class Chat(LlavaPretrain):
    """`messages` of strings or parts, as chat APIs have them, or `conversations`, as ShareGPT and LLaVA have them.

    A picture is a data: URI, the name of a file beside the rows, or bytes. Addresses on the web are not fetched. All
    JSON, JSON lines and parquet files of the folder are read, unless --files says which.
    """

    PATTERNS = ('*.jsonl', '*.parquet', '*.json')
    TOGETHER = True
