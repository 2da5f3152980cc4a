"""Reading of pictures that anyone may have made."""
from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import get_img_extensions

__all__ = ['EXTENSIONS', 'convert_mode', 'read_picture']

# Looked for in folders: timm's, and those of what else Pillow reads and cameras or browsers write.
EXTENSIONS = (*get_img_extensions(), '.bmp', '.gif', '.ppm', '.tif', '.tiff', '.webp')


def convert_mode(image: Image.Image, mode: str) -> Image.Image:
    """Pillow's `convert`, but of 16-bit grey levels the upper byte, where `convert` makes white of all above 255.

    Raises:
        ValueError: If levels are of 32 bits or floating point, of which nobody knows what white is.
    """
    if image.mode in ('I', 'F'):
        raise ValueError(f'levels of 32 bits (mode {image.mode}) have no known white: save it with 8 or 16')
    if image.mode.startswith('I;16'):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert(mode)


def read_picture(file: str | Path | BinaryIO, mode: str = 'RGB', size: int | None = None) -> Image.Image:
    """Reads a picture, upright.

    Args:
        file: Its path, or its bytes as a file.
        mode: Pillow's, ``'RGB'`` or ``'L'``.
        size: In pixels; a JPEG that is much larger is decoded at a fraction of its size. None for full size.

    Raises:
        ValueError: If there is none, or it is no picture, is damaged or has more pixels than Pillow lets through.
    """
    try:
        with Image.open(file) as image:
            if size is not None:
                image.draft(mode, (size, size))
            return convert_mode(ImageOps.exif_transpose(image), mode)
    except UnidentifiedImageError:
        raise ValueError('not a picture') from None
    except Image.DecompressionBombError:
        raise ValueError(f'more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels') from None
    except OSError as e:
        raise ValueError(e.strerror or f'cannot be read: {e}') from e
    except Exception as e:  # of all kinds where a header is damaged: SyntaxError, struct.error, AttributeError, ...
        raise ValueError(f'cannot be read: {e}') from e
