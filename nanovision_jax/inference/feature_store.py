"""The features of images on the device, by what the images are: an image that many ask about is seen once."""

import collections
import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from nanovision_jax.inference import slots as on_device


def digest(image: np.ndarray) -> bytes:
    """Tells the pixels of an image from those of any other."""
    return hashlib.sha256(np.ascontiguousarray(image)).digest()


class FeatureStore:
    """Room for the features of `count` images of `patches` tokens each. What nobody needs is replaced, oldest first.

    rows: [count · patches, D]; one row of zeros where no image is kept.
    """

    def __init__(self, count: int, patches: int, width: int, dtype, device):
        self.count, self.patches = count, patches
        self._needed = collections.Counter()  # by how many requests
        self._places = collections.OrderedDict()  # of each digest, the longest unused first
        self._free = list(range(count))
        self.rows = jax.device_put(jnp.zeros((count * patches or 1, width), dtype), device)

    def __len__(self):
        return len(self._places)

    def has_room(self, digests: Sequence[bytes]) -> bool:
        """Whether these images find room beside those that are needed."""
        return len(self._needed.keys() | set(digests)) <= self.count

    def need(self, digests: Sequence[bytes]):
        """Keeps these images until release()."""
        self._needed.update(digests)

    def release(self, digests: Sequence[bytes]):
        """These images are needed once less."""
        self._needed -= collections.Counter(digests)  # which keeps none that is needed no more

    def see_one(self, definition, params, digests: Sequence[bytes], images: Sequence[np.ndarray]) -> bool:
        """Runs the first of some needed images that is not kept through the tower; False if all are."""
        for known, image in zip(digests, images, strict=True):
            if known in self._places:
                self._places.move_to_end(known)
                continue
            if not self._free:
                unused = next(other for other in self._places if not self._needed[other])
                self._free.append(self._places.pop(unused))
            place = self._free.pop()
            at = np.array([place * self.patches], np.int32)
            try:
                self.rows = on_device.see(definition, params, self.rows, np.asarray(image)[None], at)
            except Exception:
                self._free.append(place)
                raise
            self._places[known] = place
            return True
        return False

    def tokens(self, digests: Sequence[bytes]) -> Int[np.ndarray, ' tokens']:
        """Which row stands for each token of these images, all of which are kept."""
        starts = np.array([self._places[known] for known in digests], np.int32) * self.patches
        return (starts[:, None] + np.arange(self.patches, dtype=np.int32)).ravel()
