"""Reading of pictures: upright, in the mode asked for, and what is said of those that cannot be read."""
import io

import pytest
from PIL import Image

from timm_dense2net.pictures import read_picture


def test_picture_is_turned_upright_and_converted(tmp_path):
    image = Image.new('RGB', (8, 4), 'red')
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    image.save(tmp_path / 'turned.jpg', exif=exif)
    picture = read_picture(tmp_path / 'turned.jpg')
    assert picture.size == (4, 8) and picture.mode == 'RGB'
    with open(tmp_path / 'turned.jpg', 'rb') as file:
        grey = read_picture(io.BytesIO(file.read()), 'L')
    assert grey.size == (4, 8) and grey.mode == 'L'


def test_pictures_that_cannot_be_read(tmp_path):
    (tmp_path / 'text.png').write_text('no picture')
    with pytest.raises(ValueError, match='^not a picture$'):
        read_picture(tmp_path / 'text.png')
    Image.effect_noise((64, 64), 50).save(tmp_path / 'whole.png')
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'whole.png').read_bytes()[:900])
    with pytest.raises(ValueError, match='^cannot be read: '):
        read_picture(tmp_path / 'cut.png')
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.
    odd = exif.tobytes().replace(b'\x01\x1a\x00\x05', b'\x01\x0d\x00\x05')  # a document's name that is a fraction
    Image.new('RGB', (4, 4)).save(tmp_path / 'tag.jpg', exif=odd)
    with pytest.raises(ValueError, match='^cannot be read: '):
        read_picture(tmp_path / 'tag.jpg')
    Image.new('1', (20000, 10000)).save(tmp_path / 'huge.png')
    with pytest.raises(ValueError, match='^more than 178,956,970 pixels$'):
        read_picture(tmp_path / 'huge.png')
    with pytest.raises(ValueError, match='^No such file or directory$'):
        read_picture(tmp_path / 'none.png')


@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_large_jpeg_is_decoded_small(tmp_path, mode):
    Image.new('RGB', (9000, 6000), 'red').save(tmp_path / 'large.jpg')
    small = read_picture(tmp_path / 'large.jpg', mode, size=1024)
    assert max(small.size) < 2300 and small.mode == mode
    assert read_picture(tmp_path / 'large.jpg', mode).size == (9000, 6000)
