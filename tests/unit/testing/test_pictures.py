"""The engines' pictures: real PNGs with their texts, with Pillow and without."""

from io import BytesIO

import pytest
from PIL import Image

from gpulane.testing import pictures
from gpulane.testing.pictures import png_size, preview_jpeg, read_text_chunks, render_png


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("size", [(64, 64), (513, 77), (1, 1)])
def test_a_real_png_of_that_size(plain: bool, size: tuple[int, int]) -> None:
    png = render_png("a cat", 7, "gpu0", *size, {"parameters": "a cat"}, plain=plain)
    image = Image.open(BytesIO(png))
    image.load()
    assert image.size == size == png_size(png)
    assert image.info["parameters"] == "a cat"


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "HAS_PILLOW", False)
    png = render_png("a cat", 7, "gpu0", 32, 32, {})
    assert len(set(Image.open(BytesIO(png)).convert("RGB").tobytes())) <= 3, "one color"
    preview_jpeg.cache_clear()
    assert preview_jpeg()[1] == "image/png"
    preview_jpeg.cache_clear()


def test_prompt_seed_and_gpu_are_to_be_seen() -> None:
    pixels = {
        Image.open(BytesIO(render_png(prompt, 7, gpu, 128, 128, {}))).convert("RGB").tobytes()
        for prompt, gpu in (("a cat", "gpu0"), ("a dog", "gpu0"), ("a cat", "gpu1"))
    }
    assert len(pixels) == 3


def test_any_text_may_be_embedded_and_read() -> None:
    texts = {"prompt": '{"1":{}}', "workflow": "日本 🐱"}
    assert read_text_chunks(render_png("日本", -1, "gpu0", 16, 16, texts)) == texts


@pytest.mark.parametrize("junk", [b"", b"x", pictures.SIGNATURE, pictures.SIGNATURE + b"\0" * 20])
def test_junk_has_no_text_and_no_size(junk: bytes) -> None:
    assert read_text_chunks(junk) == {}
    assert png_size(junk) == (0, 0)
