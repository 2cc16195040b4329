"""Pictures, read by a library that checks every checksum."""

import base64
import io

import pytest
from PIL import Image

from loadtest.pictures import Picture


@pytest.mark.parametrize(("width", "height"), [(1, 1), (2, 1), (64, 48), (301, 200)])
def test_a_picture_has_its_size_and_pixels_of_its_own(width: int, height: int) -> None:
    seen = set()
    for number in (0, 1, 200):
        file = base64.b64decode(Picture(width, height).base64(number), validate=True)
        picture = Image.open(io.BytesIO(file))
        assert picture.size == (width, height)
        seen.add(picture.convert("RGB").tobytes())
    assert len(seen) == 3


@pytest.mark.parametrize("text", ["", "64", "0x5", "-1x5", "axb", "100000x100000"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="WIDTHxHEIGHT"):
        Picture.of(text)
