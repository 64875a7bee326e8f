"""Pictures of domains at the top of a report."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hdrq_deploy.errors import DataError
from hdrq_deploy.reports.domain_pictures import domain_pictures


def test_the_first_image_of_every_class_is_shown(tmp_path: Path) -> None:
    for domain, shade in (("day", 200), ("a & b", 40)):
        for n in range(3):
            (tmp_path / domain / str(n)).mkdir(parents=True)
            for i in range(2):
                pixels = np.full((8, 8, 3), shade + n + 100 * i * (domain == "a & b"), np.uint8)
                Image.fromarray(pixels).save(tmp_path / domain / str(n) / f"{i}.png")
    text = domain_pictures({name: tmp_path / name for name in ("day", "a & b")})
    assert re.findall("<figcaption>(.*?)</figcaption>", text) == ["day", "a &amp; b"]
    for code, shade in zip(re.findall('base64,(.*?)"', text), (200, 40), strict=True):
        strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(code))))
        assert strip.shape == (8, 26, 3)
        for n in range(3):
            assert (strip[:, 9 * n : 9 * n + 8] == shade + n).all()


def test_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no images; needed a folder of them for every class"):
        domain_pictures({"day": tmp_path})
