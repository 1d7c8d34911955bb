"""Pictures: CLIP's crop, LLaVA's square, the odd formats, what is refused, and where pictures are read from."""

import concurrent.futures
import io
import os
import pickle
import struct
import zipfile
import zlib

import numpy as np
import pytest
import transformers
from PIL import Image, ImageFilter, features

from nanovision_jax.config import Vision
from nanovision_jax.data import images
from nanovision_jax.data.conversation import BadExample
from nanovision_jax.errors import UserError


def vision(size, fit='crop', **fields):
    """The tower's wishes: pictures of `size`."""
    return Vision(image_size=size, fit=fit, **fields)


def noise(width, height, seed=0, channels=3):
    """A picture of smooth noise, so that JPEG and resizing keep most of it."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, channels), np.uint8)
    return Image.fromarray(small.squeeze()).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, form='PNG', **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(data):
    image = images.load(data)
    assert image.mode == 'RGB'
    return np.asarray(image)


# Size ----------------------------------------------------------------------------------------------------------------

SIZES = [(224, 224), (640, 480), (333, 500), (101, 997), (1000, 97), (225, 224), (60, 60), (31, 45), (224, 300), (5, 7)]


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('side', [224, 64, 37])
def test_crop_is_what_clip_does(size, side):
    image = noise(*size, seed=size[0])
    processor = transformers.CLIPImageProcessorPil(
        size={'shortest_edge': side}, crop_size={'height': side, 'width': side}, do_normalize=False, do_rescale=False
    )
    theirs = processor(images=image, return_tensors='np')['pixel_values'][0].transpose(1, 2, 0)
    ours = images.prepare(image, vision(side))
    assert ours.shape == (side, side, 3) and ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, theirs)
    assert np.ptp(ours) > 100  # there was something to compare


def test_crop_keeps_the_middle():
    image = Image.new('RGB', (90, 30), 'red')
    image.paste('blue', (30, 0, 60, 30))
    assert (images.prepare(image, vision(30)) == (0, 0, 255)).all()
    assert (images.prepare(image.transpose(Image.Transpose.ROTATE_90), vision(30)) == (0, 0, 255)).all()


def test_pad_keeps_everything_on_the_mean_colour():
    image = noise(40, 20)
    padded = images.prepare(image, vision(40, 'pad'))
    assert (padded[:10] == (122, 116, 104)).all() and (padded[30:] == (122, 116, 104)).all()
    assert (padded[10:30] == np.asarray(image)).all()
    upright = images.prepare(image.transpose(Image.Transpose.ROTATE_90), vision(40, 'pad'))
    assert (upright[:, :10] == (122, 116, 104)).all() and (upright[:, 30:] == (122, 116, 104)).all()


def test_the_mean_colour_is_clips():
    mean = (0.48145466, 0.4578275, 0.40821073)
    assert (images.prepare(Image.new('RGB', (2, 1)), vision(2, 'pad'))[1] == [int(255 * m) for m in mean]).all()


def test_a_picture_of_the_right_size_is_untouched():
    image = noise(64, 64)
    for how in ('crop', 'pad'):
        assert (images.prepare(image, vision(64, how)) == np.asarray(image)).all()


def test_decode_loads_and_prepares():
    image = noise(50, 30)
    assert (images.decode(encoded(image), vision(24, 'pad')) == images.prepare(image, vision(24, 'pad'))).all()


# Kinds of pictures ---------------------------------------------------------------------------------------------------

TURNED = {  # EXIF orientation: what makes the stored pixels upright
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize('orientation', TURNED)
@pytest.mark.parametrize('form', ['PNG', 'WEBP'])
def test_exif_rotation_is_applied(orientation, form):
    image, exif = noise(20, 12), Image.Exif()
    exif[0x0112] = orientation
    options = {'lossless': True} if form == 'WEBP' else {}
    upright = pixels(encoded(image, form, exif=exif, **options))
    assert (upright == TURNED[orientation](np.asarray(image))).all()


def test_a_turned_jpeg_is_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert pixels(encoded(noise(20, 12), 'JPEG', exif=exif)).shape == (20, 12, 3)


@pytest.mark.parametrize('orientation', TURNED)
def test_a_tiff_is_turned_once(orientation):
    image = noise(20, 12)
    upright = pixels(encoded(image, 'TIFF', tiffinfo={274: orientation}))
    assert (upright == TURNED[orientation](np.asarray(image))).all()


def with_entry(tag, kind, count, value):
    """EXIF that says 6 (turn right) and holds one entry more, as bytes."""
    entries = struct.pack('<HHII', 0x0112, 3, 1, 6) + struct.pack('<HHI', tag, kind, count) + value
    return b'Exif\0\0II*\0\x08\0\0\0\x02\0' + entries + bytes(4)


ODD = {
    'a text where a number belongs': with_entry(0x0103, 2, 4, b'abc\0'),
    'bytes where a rational belongs': with_entry(0x011A, 7, 4, b'abcd'),
    'a float where a short belongs': with_entry(0x0101, 11, 1, struct.pack('<f', 1e30)),
    'negative where a long belongs': with_entry(0x0100, 9, 1, struct.pack('<i', -5)),
}


@pytest.mark.filterwarnings('ignore')  # Pillow's, about broken EXIF
@pytest.mark.parametrize('name', ODD)
def test_odd_exif_entries_harm_no_picture(name):
    """Pixels and orientation are there; what else the camera wrote is nobody's business."""
    image = noise(20, 12)
    found = pixels(encoded(image, 'PNG', exif=ODD[name]))
    assert (found == TURNED[6](np.asarray(image))).all()


@pytest.mark.filterwarnings('ignore')
def test_exif_that_cannot_be_read_leaves_the_picture_as_it_lies():
    image = noise(20, 12)
    for exif in (b'Exif\0\0II*\0\xff\xff\xff\xff', b'Exif\0\0nothing', b'Exif\0\0II*\0\x08\0\0\0\xff\xff'):
        assert (pixels(encoded(image, 'PNG', exif=exif)) == np.asarray(image)).all()


@pytest.mark.parametrize('place', ['before', 'behind'])
@pytest.mark.parametrize('kind', ['zTXt', 'iTXt', 'tEXt'])
def test_a_png_with_much_text_is_whole(kind, place):
    """2 MB of text beside the pixels, as drawing programs write their history."""
    data = encoded(noise(20, 12))
    text = b'a' * (2 << 20)
    body = {
        'zTXt': b'history\0\0' + zlib.compress(text),
        'iTXt': b'history\0\1\0\0\0' + zlib.compress(text),
        'tEXt': b'history\0' + text,
    }[kind]
    chunk = kind.encode() + body
    chunk = struct.pack('>I', len(body)) + chunk + struct.pack('>I', zlib.crc32(chunk))
    at = 33 if place == 'before' else len(data) - 12
    assert (pixels(data[:at] + chunk + data[at:]) == np.asarray(noise(20, 12))).all()


@pytest.mark.parametrize('form', ['GIF', 'BMP', 'TIFF', 'AVIF'])
def test_more_formats_are_read(form):
    if form not in images.FORMATS:
        pytest.skip('this Pillow cannot')
    image = noise(200, 120)
    difference = np.abs(pixels(encoded(image, form)).astype(int) - np.asarray(image))
    assert difference.mean() < {'GIF': 12, 'AVIF': 12}.get(form, 0.001)


def test_floating_point_pixels_are_refused():
    with pytest.raises(BadExample, match='floating-point'):
        images.load(encoded(Image.fromarray(np.ones((5, 5), np.float32)), 'TIFF'))


def test_palette_grey_and_black_and_white():
    image = noise(20, 12)
    palette = image.convert('P', palette=Image.Palette.ADAPTIVE, colors=16)
    assert (pixels(encoded(palette)) == np.asarray(palette.convert('RGB'))).all()
    grey = image.convert('L')
    assert (pixels(encoded(grey)) == np.asarray(grey)[..., None]).all()
    black = image.convert('1')
    assert (pixels(encoded(black)) == 255 * np.asarray(black)[..., None]).all()


def test_cmyk():
    found = pixels(encoded(Image.new('CMYK', (16, 16), (0, 255, 255, 0)), 'JPEG', quality=95))
    assert np.abs(found.astype(int) - (255, 0, 0)).max() < 12


def test_16_bits_are_scaled_and_not_clipped():
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    found = pixels(encoded(Image.fromarray(every)))
    np.testing.assert_array_equal(found, np.repeat((every // 257)[..., None], 3, axis=-1))


def test_transparency_is_over_white():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 0], rgba[0, :, 3], rgba[1, :, 3] = 200, 255, 51  # a fifth
    found = pixels(encoded(Image.fromarray(rgba)))
    assert (found[0] == (200, 0, 0)).all()
    assert (found[1] == (244, 204, 204)).all()
    assert (found[2:] == 255).all()
    grey = np.zeros((2, 2, 2), np.uint8)
    assert (pixels(encoded(Image.fromarray(grey, 'LA'))) == 255).all()
    palette = Image.new('P', (2, 1))
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    assert pixels(encoded(palette, transparency=0)).tolist() == [[[255, 255, 255], [10, 20, 30]]]


@pytest.mark.parametrize('form', ['PNG', 'WEBP', 'GIF', 'TIFF'])
def test_the_first_frame_of_an_animation(form):
    frames = [Image.new('RGB', (16, 16), colour) for colour in ('red', 'lime', 'blue')]
    options = {'lossless': True} if form == 'WEBP' else {}
    options |= {} if form == 'TIFF' else {'duration': 100}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (pixels(data) == (255, 0, 0)).all()


# What is refused -----------------------------------------------------------------------------------------------------


SVG = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>'
OTHERS = {
    'PPM': encoded(noise(32, 32), 'PPM'),
    'ICO': encoded(noise(32, 32), 'ICO'),
    'JPEG 2000': encoded(noise(32, 32), 'JPEG2000') if features.check('jpg_2000') else b'\xff\x4f\xff\x51',
    'PDF': encoded(noise(32, 32), 'PDF'),
    'SVG': SVG,
    'HEIC': b'\0\0\0\x18ftypheic\0\0\0\0',
    'MP4': b'\0\0\0\x18ftypisom\0\0\0\0',
    'PSD': b'8BPS\0\1',
}


@pytest.mark.parametrize('name', OTHERS)
def test_other_formats_are_named(name):
    with pytest.raises(BadExample, match=f'^a picture in {name}, which is not read$'):
        images.load(OTHERS[name])


@pytest.mark.parametrize('data', [b'', b'\xff\xd8\xff', b'<html></html>', b'\x89PNG\r\n\x1a\n', bytes(1000)])
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(BadExample, match='does not decode'):
        images.load(data)


@pytest.mark.parametrize('form', [form for form in images.FORMATS if form != 'GIF'])
def test_a_truncated_picture_is_refused(form):
    data = encoded(noise(64, 48), form)
    for kept in (0.3, 0.5, 0.9):
        with pytest.raises(BadExample, match='does not decode'):
            images.load(data[: int(kept * len(data))])


def odd_exif():
    """EXIF with entries whose values are of no type that they may have; upright when turned by 6."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes() + b'\xff' * 40


@pytest.mark.filterwarnings('ignore')  # Pillow's, about broken EXIF and TIFF tags
@pytest.mark.parametrize('form', images.FORMATS)
def test_broken_bytes_are_a_bad_example_and_not_a_crash(form):
    """Bits flipped in the head, where the structure is, and anywhere; pieces cut out, doubled and cut off."""
    rng, refused = np.random.default_rng(0), 0
    options = {} if form in ('GIF', 'BMP') else {'exif': odd_exif()}
    if form == 'TIFF':
        options = {'compression': 'tiff_lzw', 'tiffinfo': {270: 'x' * 50, 274: 6}}
    data = encoded(noise(20, 12), form, **options)
    for n in range(400):
        broken = bytearray(data)
        for place in rng.integers(0, min(len(data), 200) if n % 2 else len(data), 3):
            broken[place] = rng.integers(256)
        start, stop = sorted(rng.integers(0, len(data), 2))
        broken = {0: broken[:start] + broken[stop:], 1: broken[:stop] + broken[start:]}.get(n % 8, broken)
        try:
            assert images.load(bytes(broken)).mode == 'RGB'
        except BadExample:
            refused += 1
    assert refused > 30


def test_only_what_a_file_leads_to_is_a_bad_example(monkeypatch):
    data = encoded(noise(20, 12))
    for error in (MemoryError, KeyboardInterrupt):
        with monkeypatch.context() as patch:
            patch.setattr(images, '_load', lambda *_, error=error: (_ for _ in ()).throw(error))
            with pytest.raises(error):
                images.load(data)
    for error in (struct.error, KeyError, ZeroDivisionError, RecursionError, OverflowError):
        with monkeypatch.context() as patch:
            patch.setattr(images, '_load', lambda *_, error=error: (_ for _ in ()).throw(error))
            with pytest.raises(BadExample, match='image does not decode'):
                images.load(data)


def png_header(width, height):
    """A PNG of which there is little but the header: whoever reads its pixels finds none."""
    data = b'\x89PNG\r\n\x1a\n'
    for chunk in (b'IHDR' + struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0), b'IDAT'):
        data += struct.pack('>I', len(chunk) - 4) + chunk + struct.pack('>I', zlib.crc32(chunk))
    return data


@pytest.mark.parametrize('size', [(9000, 9000), (7100, 7100), (200, 16_001), (1, 101), (9000, 80)], ids=str)
def test_a_bomb_is_refused_from_its_header(size):
    with pytest.raises(BadExample) as caught:
        images.load(png_header(*size))
    assert str(caught.value) == f'image of {size[0]} × {size[1]} pixels'


@pytest.mark.parametrize('size', [(7000, 7000), (160, 16_000), (1, 100)], ids=str)
def test_a_large_picture_is_not_taken_for_a_bomb(size):
    with pytest.raises(BadExample, match='does not decode'):  # it went on to the pixels, which are not there
        images.load(png_header(*size))


def test_an_enormous_picture_is_refused():
    with pytest.raises(BadExample):
        images.load(png_header(20_000, 20_000))


# Reduced JPEGs -------------------------------------------------------------------------------------------------------


def quarters(width, height, exif=None):
    """A JPEG with a red, a green, a blue and a white quarter, parted at a third of its width and of its height."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 3, : width // 3, 0] = image[: height // 3, width // 3 :, 1] = 255
    image[height // 3 :, : width // 3, 2] = image[height // 3 :, width // 3 :] = 255
    return encoded(Image.fromarray(image), 'JPEG', quality=95, **({'exif': exif} if exif else {}))


@pytest.mark.parametrize('fit', ['crop', 'pad', 'stretch'])
@pytest.mark.parametrize('size', [(640, 480), (480, 640), (641, 483), (1000, 460), (448, 448), (1800, 1799)], ids=str)
def test_a_reduced_jpeg_shows_the_same_in_the_same_place(size, fit):
    """Smooth pictures differ by a level or two; edges lie in the same place, or a pixel apart where sizes are odd."""
    smooth, wanted = encoded(noise(*size), 'JPEG', quality=90), vision(224, fit)
    exact, draft = (images.decode(smooth, wanted, draft).astype(int) for draft in (False, True))
    assert draft.shape == (224, 224, 3) and 0 < np.abs(exact - draft).mean() < 2
    exact, draft = (images.decode(quarters(*size), wanted, draft).astype(int) for draft in (False, True))
    around = Image.fromarray(exact.astype(np.uint8))  # what lies at most a pixel away
    low, high = (
        np.asarray(around.filter(kind(3))).astype(int) for kind in (ImageFilter.MinFilter, ImageFilter.MaxFilter)
    )
    assert (draft >= low - 25).all() and (draft <= high + 25).all()


@pytest.mark.parametrize('side, size, reduced', [
    (224, (640, 480), (320, 240)), (224, (480, 640), (240, 320)), (336, (640, 480), (640, 480)),
    (224, (448, 447), (448, 447)), (224, (641, 449), (321, 225)), (56, (640, 480), (80, 60)),
    (30, (640, 480), (80, 60)),
])  # fmt: skip
def test_a_jpeg_is_reduced_as_far_as_it_is_not_enlarged_again(side, size, reduced):
    data = encoded(noise(*size), 'JPEG')
    assert images.load(data, side).size == reduced and images.load(data).size == size
    if size == reduced:
        assert (np.asarray(images.load(data, side)) == pixels(data)).all()


@pytest.mark.parametrize('form', [form for form in images.FORMATS if form != 'JPEG'])
def test_other_formats_are_never_reduced(form):
    data = encoded(noise(96, 64), form)
    assert (np.asarray(images.load(data, 8)) == pixels(data)).all()


@pytest.mark.parametrize('mode', ['L', 'CMYK', 'RGB'])
def test_a_reduced_jpeg_keeps_its_colours(mode):
    data = encoded(noise(640, 480).convert(mode), 'JPEG', quality=95)
    exact, draft = (images.decode(data, vision(64), draft).astype(int) for draft in (False, True))
    assert np.abs(exact - draft).mean() < 1.2


@pytest.mark.parametrize('orientation', TURNED)
def test_a_reduced_jpeg_is_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = quarters(640, 480, exif)
    exact, draft = (images.decode(data, vision(128), draft).astype(int) for draft in (False, True))
    assert (np.abs(exact - draft).max(-1) > 60).mean() < 0.02
    assert images.load(data, 128).size == ((320, 240) if orientation < 5 else (240, 320))


@pytest.mark.parametrize('options', [{}, {'progressive': True}, {'restart_marker_blocks': 2}], ids=str)
def test_damage_is_found_in_a_reduced_jpeg_too(options):
    """Cut off anywhere, and with bytes of the head and of the rest changed: refused where the whole one is."""

    def refused(data, least=None):
        try:
            return images.load(data, least) is None
        except BadExample:
            return True

    data, rng = encoded(noise(333, 250), 'JPEG', **options), np.random.default_rng(0)
    broken = [data[:kept] for kept in (*range(0, len(data), 97), *range(len(data) - 30, len(data)))]
    for n in range(150):
        changed = bytearray(data)
        for place in rng.integers(0, min(len(data), 200) if n % 2 else len(data), 3):
            changed[place] = rng.integers(256)
        broken.append(bytes(changed))
    found = [refused(data) for data in broken]
    assert found == [refused(data, 1) for data in broken] == [refused(data, 100) for data in broken]
    assert sum(found) > 60 and not all(found) and refused(data[: len(data) // 2], 1)


def test_a_reduced_jpeg_is_refused_by_its_whole_size(monkeypatch):
    data = encoded(noise(640, 480), 'JPEG')
    monkeypatch.setattr(images, 'MAX_PIXELS', 640 * 480 - 1)
    with pytest.raises(BadExample, match='640 × 480 pixels'):
        images.load(data, 1)


# Where they are ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def stores(tmp_path_factory):
    """The same pictures in a zip and in a folder, each with something above it."""
    folder = tmp_path_factory.mktemp('store')
    (folder / 'secret.png').write_bytes(encoded(noise(4, 4)))
    (folder / 'pictures' / 'deep').mkdir(parents=True)
    with zipfile.ZipFile(folder / 'pictures.zip', 'w') as file:
        for i in range(20):
            data = encoded(noise(9, 7, seed=i))
            (folder / 'pictures' / 'deep' / f'{i}.png').write_bytes(data)
            file.writestr(f'deep/{i}.png', data)
    return images.ImageStore(folder / 'pictures'), images.ImageStore(folder / 'pictures.zip')


def test_a_zip_and_a_folder_give_the_same_bytes(stores):
    folder, zipped = stores
    for i in range(20):
        data = folder.read(f'deep/{i}.png')
        assert data == zipped.read(f'deep/{i}.png') == encoded(noise(9, 7, seed=i))


def test_a_store_is_read_by_threads_and_other_processes(stores):
    names = [f'deep/{i % 20}.png' for i in range(200)]
    for store in stores:
        expected = [store.read(name) for name in names]
        again = pickle.loads(pickle.dumps(store))
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert list(pool.map(again.read, names)) == expected


@pytest.mark.parametrize('name', ['none.png', 'deep', '', 'deep/', 'a\0b', 'x' * 5000, '/'])
def test_a_missing_picture_is_a_bad_example(stores, name):
    for store in stores:
        with pytest.raises(BadExample):
            store.read(name)


@pytest.mark.parametrize('name', ['../secret.png', 'deep/../../secret.png', '{parent}/secret.png'])
def test_no_name_leaves_the_folder(stores, name):
    folder, zipped = stores
    name = name.format(parent=folder.path.parent)
    assert (folder.path / name).is_file()
    with pytest.raises(BadExample, match='leaves the folder'):
        folder.read(name)
    with pytest.raises(BadExample, match='missing image'):
        zipped.read(name)


def test_no_link_leaves_the_folder(stores, tmp_path):
    (tmp_path / 'pictures').mkdir()
    (tmp_path / 'pictures' / 'link.png').symlink_to(stores[0].path.parent / 'secret.png')
    with pytest.raises(BadExample, match='leaves the folder'):
        images.ImageStore(tmp_path / 'pictures').read('link.png')


def test_a_broken_zip_entry_is_a_bad_example(tmp_path):
    file = tmp_path / 'pictures.zip'
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as made:
        made.writestr('a.png', b'some text that is packed ' * 50)
    whole, reasons = file.read_bytes(), set()
    start = whole.index(b'a.png') + len('a.png')
    for place in range(start, start + 30):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with pytest.raises(BadExample) as caught:
            images.ImageStore(file).read('a.png')
        reasons.add(str(caught.value))
    assert reasons == {"image 'a.png' cannot be read from the zip file"}


def test_no_file_is_read_beyond_its_bound(tmp_path, monkeypatch):
    """2 GiB of zeros are 2 MB in a zip file: the directory tells, so they are never unpacked."""
    monkeypatch.setattr(images, 'MAX_BYTES', 1 << 20)
    data = encoded(noise(9, 7))
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w', zipfile.ZIP_DEFLATED) as file:
        file.writestr('zeros.png', bytes((1 << 20) + 1))
        file.writestr('a.png', data)
    (tmp_path / 'a').mkdir()
    with open(tmp_path / 'a/zeros.png', 'wb') as file:
        file.truncate(2 << 30)
    (tmp_path / 'a/a.png').write_bytes(data)
    os.mkfifo(tmp_path / 'a/pipe.png')
    (tmp_path / 'a/circle.png').symlink_to('circle.png')
    for store in (images.ImageStore(tmp_path / 'a.zip'), images.ImageStore(tmp_path / 'a')):
        assert store.read('a.png') == data
        with monkeypatch.context() as patch:
            patch.setattr(zipfile.ZipExtFile, 'read', None)
            with pytest.raises(BadExample, match=r"image 'zeros\.png' has more than 1 MiB"):
                store.read('zeros.png')
        for name in ('pipe.png', 'circle.png'):
            with pytest.raises(BadExample, match='missing image'):
                store.read(name)


def test_a_directory_that_lies_about_a_size_is_a_bad_example(tmp_path):
    """A member whose directory says 10 bytes and which unpacks to a megabyte."""
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w', zipfile.ZIP_DEFLATED) as file:
        file.writestr('a.png', bytes(1 << 20))
    whole = (tmp_path / 'a.zip').read_bytes()
    (tmp_path / 'a.zip').write_bytes(whole.replace(struct.pack('<I', 1 << 20), struct.pack('<I', 10)))
    with pytest.raises(BadExample, match='cannot be read from the zip file'):
        images.ImageStore(tmp_path / 'a.zip').read('a.png')


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(UserError, match='no pictures at'):
        images.ImageStore(tmp_path / 'none')
    (tmp_path / 'a.tar').write_bytes(bytes(1000))
    with pytest.raises(UserError, match='neither a zip file nor a folder'):
        images.ImageStore(tmp_path / 'a.tar')


# Augmentation --------------------------------------------------------------------------------------------------------


def test_augment_crops_a_little_and_mirrors_half():
    across = np.tile(np.arange(100, dtype=np.uint8), (80, 1))
    image = Image.fromarray(np.stack([across, across, across], -1))
    mirrored, shares = 0, []
    for seed in range(300):
        found = np.asarray(images.augment(image, np.random.default_rng(seed)))[..., 0].astype(int)
        steps = np.unique(np.diff(found))
        assert steps.tolist() in ([1], [-1])  # neighbours stay neighbours
        mirrored += steps[0] == -1
        shares.append(found.size / across.size)
    assert 100 < mirrored < 200
    assert 0.58 < min(shares) < 0.65 and 0.95 < max(shares) <= 1


def test_augment_is_a_function_of_its_generator():
    image = noise(50, 40)
    one, two, three = (np.asarray(images.augment(image, np.random.default_rng(seed))) for seed in (1, 1, 2))
    assert one.shape == two.shape and (one == two).all()
    assert one.shape != three.shape or (one != three).any()
