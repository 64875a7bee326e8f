"""Image files as pixels: which files are images, what their modes mean, which way is up.

Every image of the project is read here, so that calibration, measurement and an application see
the same pixels of the same file.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from ...errors import DataError
from ...typing import Array

__all__ = [
    "BESIDE",
    "FOLDER",
    "TURNS",
    "Picture",
    "Undecodable",
    "checked",
    "cut",
    "decode",
    "folders_by_name",
    "folders_of",
    "images_of",
    "is_hidden",
    "left_out",
    "loaded",
    "opened",
    "orientation",
    "picture_of",
    "upright",
]

T = TypeVar("T")

# Raster formats by the ending of their files, and what Pillow must have been built with.
_FORMATS = {
    "": ".apng .bmp .dib .gif .pbm .pcx .pgm .png .pnm .ppm .qoi .tga .tif .tiff",
    "jpg": ".jfif .jpe .jpeg .jpg .mpo",
    "jpg_2000": ".j2c .j2k .jp2 .jpc .jpf .jpx",
    "webp": ".webp",
    "avif": ".avif .avifs",
}
# Formats that Pillow reads once a plugin has registered them.
_BY_PLUGIN = (".heic", ".heif", ".hif", ".jxl")
# What is counted beside files by their endings, and how several of it are called.
FOLDER, BESIDE = "folder", "image beside the class folders"
_SEVERAL = {FOLDER: "folders", BESIDE: "images beside the class folders"}
# What operating systems and tools leave beside images, under names without a dot in front.
_LITTER = {"__macosx", "__pycache__", "@eadir", "lost+found", "$recycle.bin"}
_LITTER |= {"system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"}

_SIXTEEN = {"I;16", "I;16L", "I;16B", "I;16N"}
_GREY = {"1", "L", "LA", "La"} | _SIXTEEN
_COLOUR = {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"}
# Pillow brings every image of these formats that it reads as 32-bit integers to 0..65535.
_SIXTEEN_AS_I = {"PNG", "PPM"}
_ORIENTATION, _TIFF_BITS, _TIFF_PHOTOMETRIC = 0x0112, 258, 262
_filters = threading.Lock()
_log = logging.getLogger("hdrq_deploy")
# What makes an image upright, by its EXIF orientation (as PIL.ImageOps.exif_transpose).
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Undecodable(DataError):
    """A file that is not the image that its name says, or one too large to be decoded.

    Attributes:
        file: The file.
        reason: What Pillow says of it.
    """

    def __init__(self, file: object, reason: object) -> None:
        self.file, self.reason = file, " ".join(str(reason).split()) or type(reason).__name__
        super().__init__(f"{file}: cannot be decoded ({self.reason}); mend or remove it")


@dataclass(frozen=True)
class Picture:
    """An image of grey or colour whose values go from 0 (black) to 255 (white).

    Attributes:
        image: Mode ``L`` or ``RGB``; mode ``F`` where a grey image has more than 8 bits.
    """

    image: Image.Image

    @property
    def channels(self) -> int:
        """1 or 3."""
        return 3 if self.image.mode == "RGB" else 1

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.image.height, self.image.width

    def resized(self, size: tuple[int, int]) -> Picture:
        """At another (height, width), bilinear."""
        if self.size == size:
            return self
        return Picture(self.image.resize(size[::-1], Image.Resampling.BILINEAR))

    def pixels(self, channels: int) -> Array:
        """(H, W, channels) uint8, or float32 of more than 8 bits; grey is repeated for colour."""
        array = np.asarray(self.image)
        if array.ndim == 2:
            array = array[:, :, None]
        return np.repeat(array, channels, axis=2) if array.shape[2] < channels else array


@functools.cache
def extensions() -> frozenset[str]:
    """Endings (in small letters, with their dots) of the files that are read as images here."""
    known = {**features.modules, **features.codecs}  # of others check() warns
    endings_here = {
        ending
        for feature, endings in _FORMATS.items()
        if not feature or (feature in known and features.check(feature))
        for ending in endings.split()
    }
    return frozenset(endings_here)


def _is_image(name: str) -> bool:
    ending = Path(name).suffix.lower()
    if ending in extensions():
        return True
    return ending in _BY_PLUGIN and ending in Image.registered_extensions()


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's images.

    Its name begins with a dot (``.ipynb_checkpoints``), or it is what an operating system leaves
    (``__MACOSX``, ``Thumbs.db``, ``@eaDir``).
    """
    return name.startswith(".") or name.lower() in _LITTER


def folders_of(folder: Path) -> list[Path]:
    """Folders inside, sorted by name, without hidden ones.

    Raises:
        DataError: The folder cannot be listed.
    """
    return sorted(folder / entry.name for entry in _entries(folder) if entry.is_dir())


def images_of(folder: Path, others: Counter[str], deep: bool = False) -> list[Path]:
    """Image files inside, sorted.

    Args:
        folder: Where.
        others: Counts by their kinds what is left out: files of other formats by their endings
            and, unless ``deep``, folders.
        deep: Look into folders too, but not into hidden or linked ones.

    Raises:
        DataError: A folder cannot be listed.
    """
    files = []
    for entry in _entries(folder):
        if entry.is_dir():
            if deep and not entry.is_symlink():
                files += images_of(folder / entry.name, others, deep)
            else:
                others[FOLDER] += 1
        elif _is_image(entry.name):
            files.append(folder / entry.name)
        else:
            others[Path(entry.name).suffix.lower() or "without ending"] += 1
    return sorted(files)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not is_hidden(entry.name)]
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror})") from error


def folders_by_name(folder: Path) -> dict[str, Path]:
    """Folders inside by their names in small letters.

    Raises:
        DataError: Two names differ in capitals alone, or ``folder`` cannot be listed.
    """
    found: dict[str, Path] = {}
    for inside in folders_of(folder):
        if (before := found.setdefault(inside.name.lower(), inside)) != inside:
            raise DataError(f"{inside}: found {before.name} beside it; join the two folders")
    return found


def checked(files: Sequence[T], others: Counter[str], folder: Path) -> Sequence[T]:
    """The image files of a folder; the logger ``hdrq_deploy`` says what was left out.

    Raises:
        DataError: There are none.
    """
    omitted, formats = left_out(others), ", ".join(sorted(extensions()))
    if not files:
        raise DataError(
            f"{folder}: found no images ({omitted or 'the folder is empty'}); needed one folder of "
            f"images per class, or images: {formats}"
        )
    if omitted:
        _log.warning("%s: left out %s; images are %s", folder, omitted, formats)
    return files


def left_out(others: Counter[str]) -> str:
    """What was counted, most frequent first: ``12 .heic, 3 .svg``; at most six kinds."""
    kinds = sorted((+others).items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{n} {kind if n == 1 else _SEVERAL.get(kind, kind)}" for kind, n in kinds[:6]]
    rest = sum(count for _, count in kinds[6:])
    return ", ".join([*shown, *([f"{rest} of other kinds"] if rest else [])])


@contextmanager
def opened(file: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """An image file whose header was read, its pixels not yet.

    Raises:
        Undecodable: No image, or one of more pixels than Pillow takes for sane
            (``PIL.Image.MAX_IMAGE_PIXELS``, 89 million).
    """
    with ExitStack() as stack:
        try:
            place = Path(file)
            if place.is_fifo():  # it would wait for a writer
                raise ValueError("it is a named pipe")
            stream = stack.enter_context(place.open("rb"))
            stream.peek(1)  # waits for the disk here, where threads do not wait for each other
        except (OSError, ValueError) as error:
            raise Undecodable(file, getattr(error, "strerror", None) or error) from error
        try:
            # Pillow only warns of the first half of the sizes that it calls a bomb. Filters of
            # warnings are the whole process', so that one thread at a time sets them.
            with _filters, warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = stack.enter_context(Image.open(stream))
        except Exception as error:  # as in loaded()
            raise Undecodable(file, _plain(error)) from error
        yield image


def decode(file: str | os.PathLike[str], channels: int | None = None) -> Picture:
    """Read an image file; see :func:`picture_of` for what its mode becomes.

    Raises:
        Undecodable: Missing, truncated, corrupt, or of too many pixels.
        DataError: A mode whose values have no range.
    """
    with opened(file) as image:
        return picture_of(image, file, channels)


def picture_of(image: Image.Image, name: object, channels: int | None = None) -> Picture:
    """Grey or colour of an image of any mode, upright.

    * The orientation in EXIF is applied. Of an animation or a stack the first image is taken.
    * Palettes become the colours that they name. Alpha is dropped and not composited, as
      torchvision's ``ImageFolder``, timm and OpenCV do, so that a transparent pixel has the
      colour that is stored beneath. CMYK, YCbCr and HSV become RGB as Pillow converts them.
    * 16-bit grey keeps its precision: its values are divided by 257, so that 65535 is white
      (12-bit TIFF: by 4095/255). Of 16-bit colour Pillow reads the upper 8 bits.
    * 32-bit integers and floats have no value that is white, and are refused, as are LAB and
      TIFFs of 16 bits in which 0 is white.

    Args:
        image: The image as Pillow opened it.
        name: Names it in errors.
        channels: 3 makes colour of grey (at :meth:`Picture.pixels`), 1 makes grey of colour
            (ITU-R 601 luma, as Pillow's mode ``L``); None keeps what it is.

    Raises:
        Undecodable: Its pixels cannot be decoded.
        DataError: A mode that is refused, or channels other than 1 and 3.
    """
    if channels not in {None, 1, 3}:
        raise DataError(
            f"{name}: found an image for a model that reads {channels} channels; images have 1 "
            "or 3: pass an .npz with x of that many"
        )
    white = _white(image, name)
    image = upright(image, name)
    if white is not None:
        values = np.asarray(image).astype(np.float32)
        return Picture(Image.fromarray(values * np.float32(255 / white)))
    if image.mode in {"P", "PA", "RGBa"}:
        image = image.convert("RGBA")
    elif image.mode == "La":
        image = image.convert("LA")
    image = image.convert("L" if image.mode in _GREY else "RGB")
    return Picture(image.convert("L") if channels == 1 else image)


def loaded(image: Image.Image, name: object) -> Image.Image:
    """The image, its pixels decoded.

    Raises:
        Undecodable: They cannot be.
    """
    try:
        image.load()
    except Exception as error:  # Pillow's plugins raise whatever their parsing meets
        raise Undecodable(name, _plain(error)) from error
    return image


def upright(image: Image.Image, name: object) -> Image.Image:
    """The pixels of an image, turned as its EXIF orientation says; a palette keeps its indices.

    Raises:
        Undecodable: The pixels cannot be decoded.
    """
    method = TURNS.get(orientation(loaded(image, name)))
    return image if method is None else image.transpose(method)


def orientation(image: Image.Image) -> int:
    """1 (as it lies) to 8; 1 where EXIF says nothing readable.

    Pillow turns a TIFF itself when it is loaded, and says 1 from then on.
    """
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block raises anything, and no viewer turns such an image
        return 1
    return value if value in range(1, 9) else 1


def _white(image: Image.Image, name: object) -> int | None:
    """The largest value of 16-bit grey; None for the modes of 8 bits.

    Raises:
        DataError: A mode whose values have no range.
    """
    mode, tags = image.mode, getattr(image, "tag_v2", {})
    if mode in _SIXTEEN:
        if tags.get(_TIFF_PHOTOMETRIC) == 0:
            raise DataError(
                f"{name}: found a 16-bit TIFF in which 0 is white; needed one in which 0 is "
                "black: convert the image"
            )
        bits = tags.get(_TIFF_BITS, (16,))
        return 4095 if tuple(np.ravel(bits)) == (12,) else 65535
    if mode == "I" and image.format in _SIXTEEN_AS_I:
        return 65535
    if mode in _GREY or mode in _COLOUR:
        return None
    kinds = {"I": "32-bit integers", "F": "floats"}
    what = f"{kinds[mode]}, which no value makes white" if mode in kinds else "other bands"
    raise DataError(
        f"{name}: found an image of {what} (Pillow's mode {mode}); needed grey of 8 or 16 bits, "
        "or RGB: convert the image, or pass an .npz"
    )


def _plain(error: Exception) -> str:
    """What Pillow says, without the address of the stream that it read."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no image of a format that Pillow knows"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"{str(error).split(', could be')[0]}: make it smaller"
    return str(error) or type(error).__name__


def cut(
    image: Image.Image, resize: tuple[int, int], size: tuple[int, int], where: object
) -> Image.Image:
    """``image`` brought to ``resize``, and ``size`` (height, width) cut out of its middle.

    Raises:
        DataError: ``size`` is larger than ``resize``.
    """
    top, left = (resize[0] - size[0]) // 2, (resize[1] - size[1]) // 2
    if top < 0 or left < 0:
        raise DataError(
            f"{where}: found a crop of {size[0]}x{size[1]} from images of {resize[0]}x{resize[1]}; "
            "needed a crop no larger than the image"
        )
    if image.size != resize[::-1]:
        image = image.resize(resize[::-1], Image.Resampling.BILINEAR)
    return image.crop((left, top, left + size[1], top + size[0]))
