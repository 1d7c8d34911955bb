from PIL import Image


def doc_to_visual(doc):
    return [Image.open(doc['image']).convert('RGB')]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc['question']
