"""LLaVA's conversations for stage 4: llava_instruct_150k.json (v1), llava_v1_5_mix665k.json (1.5)."""

from nanovision_jax.data.datasets.llava_pretrain import LlavaPretrain


class LlavaInstruct(LlavaPretrain):
    """Conversations about COCO's pictures, or the mix of 1.5: coco/, gqa/, ocr_vqa/, textvqa/, vg/, and text.

    The pictures are as their publishers have them: folders (coco/train2017, gqa/images, ocr_vqa/images,
    textvqa/train_images, vg/VG_100K, vg/VG_100K_2), or the zip files in coco/, gqa/, textvqa/ and vg/, not unpacked.
    For the 150K, COCO's train2017.zip or train2017/ lies beside the JSON.
    """

    PATTERNS = ('llava_v1_5_mix665k.json', 'llava_instruct_150k.json')
