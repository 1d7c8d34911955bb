"""Finding the image that a row means: bytes, a data: URI, or a name in the folders and zip files around the rows."""

import base64
import binascii
import collections
import pathlib
import threading
import unicodedata
import urllib.parse

from nanovision_jax.data.conversation import BadExample
from nanovision_jax.data.images import MAX_BYTES, ImageStore
from nanovision_jax.errors import UserError

ENDINGS = ('.jpg', '.jpeg', '.png', '.webp', '.gif', '.bmp', '.tif', '.tiff', '.avif')  # whatever the row calls it


class NamedImages:
    """The images in a zip file, or in a folder as it was downloaded, by the names that rows have for them.

    In a folder they lie under their names, below images/ or COCO's folder too, or in zip files in it or one folder
    down, which are not unpacked. A name may have images/ before it, backslashes, or letters in another Unicode form.
    One that ends in .jpg finds the same image as .gif or .png, and the other way round: the format is in the bytes,
    the ending only in the name (OCR-VQA). Safe in threads; files are opened when an image is first asked for.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self._lock, self._members, self._opened, self._damaged = threading.Lock(), None, None, []
        if not self.path.is_dir():
            self._opened, self._loose = [((), ImageStore(self.path))], []
            return
        folders = [self.path / name for name in ('', 'images', 'train2017', 'coco/train2017')]
        self._loose = [ImageStore(folder) for folder in folders if folder.is_dir()]

    def read(self, name):
        """The bytes of an image by its name. Raises BadExample for none."""
        store, name = self._find(name)
        return store.read(name)

    def stamp(self) -> bytes:
        """What the images in zip files depend on: they are not read."""
        return repr([(inside, store.stamp(())) for inside, store in self._zips()]).encode()

    def stamp_of(self, names) -> bytes:
        """What the images of these names depend on, wherever they lie, but for what is in zip files: see stamp()."""
        return b''.join(map(self._stamp_of, names)) if self._loose else b''

    def _stamp_of(self, name):
        try:
            store, inner = self._find(name)
        except BadExample:  # another stamp once it is there
            store = None
        if store not in self._loose:
            return repr((name, store is None)).encode()
        return repr((name, store.path.relative_to(self.path).as_posix(), store.stamp([inner]))).encode()

    def _zips(self):
        """[(parts of its path, zip)] of a folder, images.zip first, without the damaged ones: they may be anything."""
        with self._lock:
            if self._opened is None:
                files = sorted([*self.path.glob('*.zip'), *self.path.glob('*/*.zip')])
                files.sort(key=lambda file: file.name != 'images.zip')
                opened = []
                for file in files:
                    if file.name.startswith('.') or not file.is_file():
                        continue
                    place = file.relative_to(self.path)
                    try:
                        store = ImageStore(file)
                        store.check()
                        opened.append((place.with_suffix('').parts, store))
                    except UserError:
                        self._damaged.append(place.as_posix())
                self._opened = opened
        return self._opened

    def _find(self, name):
        """(the store, the image's name in it)."""
        if found := self._first(_spellings(name), [store for _, store in self._zips()] + self._loose):
            return found
        # GQA and Visual Genome have images of the same name: every folder that the row names must be on the way.
        path = pathlib.PurePosixPath(_composed(name.replace('\\', '/')))
        fitting = [found for found in self._by_stem().get(path.stem, ()) if _within(path.parts[:-1], found[0])]
        if fitting:
            return min(fitting, key=lambda found: (not found[2].endswith(name), len(found[0]), found[2]))[1:]
        spelled = [path for path in map(pathlib.PurePosixPath, _spellings(name)) if path.name not in ('', '..')]
        others = [str(path.with_suffix(ending)) for ending in ENDINGS for path in spelled]
        if found := self._first(others, self._loose):
            return found
        if any(store.leaves(name) for store in self._loose):
            raise BadExample(f'image name {name!r} leaves the folder')
        damaged = f', and {self._damaged[0]} is a damaged zip file' if self._damaged else ''
        raise BadExample(f'missing image {name!r}{damaged}')

    @staticmethod
    def _first(names, stores):
        return next(((store, name) for store in stores for name in names if store.has(name)), None)

    def _by_stem(self):
        """{stem: [(parts of its path, zip, member)]} of the images in zip files, made when it is first needed."""
        zips = self._zips()
        with self._lock:
            if self._members is None:
                members = collections.defaultdict(list)
                for inside, store in zips:
                    for member in store.names():
                        path = pathlib.PurePosixPath(_composed(member.replace('\\', '/')))
                        if path.suffix.lower() in ENDINGS:
                            members[path.stem].append(((*inside, *path.parts[:-1]), store, member))
                self._members = dict(members)
        return self._members


def fetch(reference, named):
    """The encoded image that a row's reference means; `named`: where names are looked up. Raises BadExample.

    A reference is bytes, {bytes, path} as parquet holds images, a data: URI, a file: URI or a name. The web is never
    asked.
    """
    if isinstance(reference, dict):
        reference = reference.get('bytes') or reference.get('path')
    if isinstance(reference, bytes):
        return reference
    if not isinstance(reference, str | int):
        raise BadExample('missing image')
    reference = str(reference)
    if _is_data(reference):
        if len(reference) > 4 * MAX_BYTES // 3 + 100:
            raise BadExample(f'a picture of more than {MAX_BYTES >> 20} MiB')
        try:
            # MIME breaks base64 into lines.
            return base64.b64decode(''.join(reference.partition(',')[2].split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadExample('a picture that is no base64') from error
    is_file = reference[:7].lower() == 'file://'
    reference = reference[7:] if is_file else reference
    if '://' in reference:
        raise BadExample(f'a picture on the web {reference!r}')
    try:
        return named.read(reference)
    except BadExample:  # many write a file: URI without escaping it
        if not is_file or (unescaped := urllib.parse.unquote(reference)) == reference:
            raise
    return named.read(unescaped)


def name_of(reference, otherwise):
    """What an image is called: its reference where that is a name, else `otherwise`."""
    named = isinstance(reference, str | int) and not _is_data(str(reference))
    return str(reference) if named else otherwise


def _is_data(reference):
    return reference[:5].lower() == 'data:'


def _composed(name):
    return unicodedata.normalize('NFC', name)


def _spellings(name):
    """The names under which an image may lie, the row's own first."""
    slashed = name.replace('\\', '/').removeprefix('./')
    names = (name, slashed, slashed.removeprefix('images/'))
    return list(
        dict.fromkeys(unicodedata.normalize(form, n) if form else n for form in ('', 'NFC', 'NFD') for n in names)
    )


def _within(wanted, parts):
    """Whether `wanted` is in `parts`, in order, with others between."""
    parts = iter(parts)
    return all(part in parts for part in wanted)
