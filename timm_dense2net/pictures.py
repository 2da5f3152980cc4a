"""Reading of pictures that anyone may have made."""
from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ['read_picture']


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
            return ImageOps.exif_transpose(image).convert(mode)
    except UnidentifiedImageError:
        raise ValueError('not a picture') from None
    except Image.DecompressionBombError:
        raise ValueError(f'more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels') from None
    except OSError as e:
        raise ValueError(e.strerror or f'cannot be read: {e}') from e
    except Exception as e:  # of all kinds where a header is damaged: SyntaxError, struct.error, AttributeError, ...
        raise ValueError(f'cannot be read: {e}') from e
