"""Images: from a zip or a folder, to bytes, to uint8 [S, S, 3] as CLIP crops or LLaVA pads them."""

import hashlib
import io
import lzma
import os
import pathlib
import threading
import zipfile
import zlib

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps, features

from nanovision_jax.data.conversation import BadExample
from nanovision_jax.errors import UserError

FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF', *(('AVIF',) if features.check('avif') else ()))
# What else may be called an image, by its first bytes.
_OTHERS = {
    b'8BPS': 'PSD',
    b'\0\0\1\0': 'ICO',
    b'\0\0\0\x0cjP  ': 'JPEG 2000',
    b'\xff\x4f\xff\x51': 'JPEG 2000',
    b'\0\0\0\x0cJXL ': 'JPEG XL',
    b'\xff\x0a': 'JPEG XL',
    b'%PDF': 'PDF',
    b'%!PS': 'PostScript',
    b'v/1\1': 'OpenEXR',
    **dict.fromkeys((b'P1\n', b'P2\n', b'P3\n', b'P4\n', b'P5\n', b'P6\n', b'P7\n'), 'PPM'),
}
_PNG = b'\x89PNG\r\n\x1a\n'
_TURNS = {  # EXIF's orientation: what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Refused from the header: a small file can unpack to gigabytes, and a long one grow to them when its short side is
# resized or its long side is padded to a square.
MAX_PIXELS, MAX_SIDE, MAX_ASPECT = 50_000_000, 16_000, 100
MAX_BYTES = 4 * MAX_PIXELS  # no file is read beyond that
# RuntimeError: encrypted, or packed in a way that Python does not know.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError, RuntimeError)


class ImageStore:
    """Reads images by name from a zip file, without unpacking it, or from a folder."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        if not self.path.exists():
            raise UserError(f'no pictures at {self.path}: data.images is a zip file or a folder.')
        if self.path.is_file() and not zipfile.is_zipfile(self.path):
            raise UserError(f'{self.path} is neither a zip file nor a folder of pictures.')
        self._zip, self._lock = None, threading.Lock()

    def __reduce__(self):
        return ImageStore, (self.path,)

    def _opened(self):
        # One handle for all threads: the directory of half a million images takes seconds to read and much memory.
        if self._zip is None:
            try:
                self._zip = zipfile.ZipFile(self.path)
            except FileNotFoundError as error:
                raise UserError(f'{self.path} is gone: the pictures were there when the data were opened.') from error
            except _ZIP_ERRORS as error:
                raise UserError(f'{self.path} is a damaged zip file: {error}.') from error
        return self._zip

    def check(self):
        """Raises UserError where the zip file's directory is damaged, as every other method does."""
        if not self.path.is_dir():
            with self._lock:
                self._opened()

    def names(self) -> list[str]:
        """The names of all members of the zip file, folders left out."""
        with self._lock:
            return [info.filename for info in self._opened().infolist() if not info.is_dir()]

    def stamp(self, names) -> str:
        """What the images of these names depend on, as text, wherever they lie.

        Of a zip file its directory, whatever the names; of a folder the files' sizes and times, in the names' order.
        """
        if self.path.is_dir():
            seen = map(self._stamp, names)
        else:
            with self._lock:
                seen = [(info.filename, info.file_size, info.CRC) for info in self._opened().infolist()]
        digest = hashlib.sha256()
        for file in seen:
            digest.update(repr(file).encode())
        return digest.hexdigest()

    def _stamp(self, name):
        try:
            stat = (self.path / name).stat()
            return name, stat.st_size, stat.st_mtime_ns
        except (OSError, ValueError):
            return name, None, None  # missing: another stamp once it is there

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        if not self.path.is_dir():
            with self._lock:
                return name in self._opened().NameToInfo and not name.endswith('/')
        try:
            return not self.leaves(name) and (self.path / name).is_file()  # a pipe would be waited for
        except (OSError, ValueError):
            return False

    def leaves(self, name: str) -> bool:
        """Whether a name, or a link of that name, leads out of the folder."""
        try:
            return not (self.path / name).resolve().is_relative_to(self.path.resolve())
        except (OSError, ValueError, RuntimeError):  # RuntimeError: links in a circle
            return False

    def read(self, name: str) -> bytes:
        """The bytes of one image. Raises BadExample if there is none of that name, or one beyond MAX_BYTES."""
        if self.path.is_dir():
            return self._read_file(name)
        try:
            with self._lock:  # opening and closing a member is not safe in threads; reading it is
                _check_size(name, self._opened().getinfo(name).file_size)  # reading ends there, too
                member = self._opened().open(name)
            try:
                return member.read()
            finally:
                with self._lock:
                    member.close()
        except KeyError as error:
            raise BadExample(f'missing image {name!r}') from error
        except _ZIP_ERRORS as error:
            raise BadExample(f'image {name!r} cannot be read from the zip file') from error

    def _read_file(self, name):
        try:
            if self.leaves(name):
                raise BadExample(f'image name {name!r} leaves the folder')
            if not self.has(name):
                raise BadExample(f'missing image {name!r}')
            with open(self.path / name, 'rb') as opened:
                _check_size(name, os.fstat(opened.fileno()).st_size)
                return opened.read(MAX_BYTES)
        except (OSError, ValueError) as error:
            raise BadExample(f'missing image {name!r}') from error


def _check_size(name, size):
    if size > MAX_BYTES:
        raise BadExample(f'image {name!r} has more than {MAX_BYTES >> 20} MiB')


def decode(data: bytes, vision, draft: bool = False) -> UInt8[np.ndarray, 'S S 3']:
    """Encoded bytes to uint8 [S, S, 3], as prepare() does. Raises BadExample as load() does.

    draft: a large JPEG is decoded at a part of its size, as load() does: faster, and not quite the same pixels.
    """
    return prepare(load(data, vision.image_size if draft else None), vision)


def load(data: bytes, least: int | None = None, most: int | None = None) -> Image.Image:
    """Encoded bytes to an upright RGB image; the first frame of an animation, transparency over white.

    most: pixels, if fewer than MAX_PIXELS; a larger image is refused before it is decoded.

    least: a JPEG is decoded at a half, a quarter or an eighth of its size, as long as its short side keeps as many
    pixels. Damage is found as it is without.

    Raises BadExample, and nothing else, for what is no whole image in FORMATS, whatever the bytes are.
    """
    try:
        try:
            return _load(data, least, most)
        except ValueError:  # too much text beside the pixels, say, which is of no use here
            if not data.startswith(_PNG):
                raise
            return _load(_without_text(data), least, most)
    except (BadExample, MemoryError):
        raise
    except Exception as error:  # Pillow has no one error for hostile files: struct.error, KeyError, TypeError, …
        if name := _other_format(data):
            raise BadExample(f'a picture in {name}, which is not read') from error
        raise BadExample('image does not decode') from error


def _load(data, least, most):
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    short, long = sorted(image.size)
    if short * long > min(most or MAX_PIXELS, MAX_PIXELS) or long > min(MAX_SIDE, short * MAX_ASPECT):
        raise BadExample(f'image of {image.width} × {image.height} pixels')
    if least:
        image.draft(None, (least, least))  # of formats that cannot, nothing is asked
    image.load()
    if image.mode == 'F':
        raise BadExample('image of floating-point pixels')  # whose black and white nothing tells
    return to_rgb(image)


def _without_text(data):
    """A PNG without the chunks that hold text."""
    kept, at = [_PNG], len(_PNG)
    while at < len(data):
        stop = at + 12 + int.from_bytes(data[at : at + 4])
        if data[at + 4 : at + 8] not in (b'tEXt', b'zTXt', b'iTXt'):
            kept.append(data[at:stop])
        at = stop
    return b''.join(kept)


def _other_format(data):
    """The name of a format that is not read, if the first bytes tell one."""
    if data[4:8] == b'ftyp':
        brands = {b'avif': 'AVIF', b'avis': 'AVIF', b'heic': 'HEIC', b'heix': 'HEIC', b'mif1': 'HEIC', b'msf1': 'HEIC'}
        name = brands.get(data[8:12], 'MP4')
        return None if name in FORMATS else name
    if b'<svg' in data[:2048].lower():
        return 'SVG'
    return next((name for start, name in _OTHERS.items() if data.startswith(start)), None)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as upright RGB: EXIF rotation applied, 16 bits scaled to 8, transparency over white."""
    image = _upright(image)
    if image.mode.startswith('I'):  # 16-bit grey: convert('RGB') would clip it to white
        image = Image.fromarray((np.asarray(image, np.float32) / 257).clip(0, 255).astype(np.uint8))
    if image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('RGB')


def _upright(image):
    # Not ImageOps.exif_transpose: it writes all of the EXIF anew, and fails at any entry that is odd.
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except MemoryError:
        raise
    except Exception:  # broken EXIF: the image is shown as it lies, as viewers do
        turn = None
    return image if turn is None else image.transpose(turn)


def prepare(image: Image.Image, vision) -> UInt8[np.ndarray, 'S S 3']:
    """An RGB image to uint8 [S, S, 3], S = vision.image_size. vision: config.Vision.

    vision.fit: crop takes the short side to S, then the middle square, as CLIP does; pad makes a square with the mean
    colour first, as LLaVA 1.5 does; stretch does not keep the proportions, as SigLIP does not.
    """
    size, how = vision.image_size, vision.fit
    if how == 'pad' and image.width != image.height:
        side = max(image.size)
        square = Image.new('RGB', (side, side), tuple(int(255 * x) for x in vision.mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    if image.size != (size, size):
        short = min(image.size)
        width, height = (size, size) if how == 'stretch' else (int(size * side / short) for side in image.size)
        image = image.resize((width, height), Image.Resampling[vision.resample.upper()])
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)


def augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A random crop of at least 60% of an RGB image's area, mirrored half of the time."""
    scale = np.sqrt(rng.uniform(0.6, 1.0))
    width, height = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
    image = image.crop((left, top, left + width, top + height))
    return ImageOps.mirror(image) if rng.random() < 0.5 else image
