"""Masks of edits over HTTP: transparent or white parts, the image's own, and models that take none."""

from __future__ import annotations

import base64

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from app.api.masks import closed
from app.engine.families import FLUX2_KLEIN, FLUX_KONTEXT, FLUX_SCHNELL, Family
from app.errors import BusyError
from tests.api.edit_forms import RED, URL, encoded, plain
from tests.api.fake_backend import FakeBackend

HOLE = (16, 8, 48, 40)
INSIDE = np.zeros((64, 96), dtype=bool)
INSIDE[8:40, 16:48] = True


def drawn(mode: str = "L", size: tuple[int, int] = (96, 64)) -> Image.Image:
    """White in the hole, black around it, opaque."""
    mask = Image.new("L", size, 0)
    mask.paste(255, HOLE)
    return mask.convert(mode)


def holed(opacity: int = 0, colour: tuple[int, int, int] = (0, 0, 0)) -> Image.Image:
    """Red, with a hole of another colour and opacity."""
    image = plain(mode="RGBA")
    image.paste((*colour, opacity), HOLE)
    return image


def palette() -> Image.Image:
    """The hole in a file of two colours, one of them transparent."""
    mask = drawn().point(lambda value: value // 255).convert("L")
    made = Image.fromarray(np.asarray(mask), "P")
    made.putpalette([0, 0, 0, 255, 255, 255])
    made.info["transparency"] = 1
    return made


async def ask(client: httpx.AsyncClient, mask: Image.Image | None, image: bytes = RED, **fields: str) -> httpx.Response:
    files = {"image": image} | ({} if mask is None else {"mask": encoded(mask)})
    return await client.post(URL, data={"prompt": "a cat", "size": "96x64", **fields}, files=files)


@pytest.mark.parametrize(
    "mask",
    [holed(), holed(100), palette(), *(drawn(mode) for mode in ("L", "1", "RGB", "RGBA", "LA", "I;16", "P"))],
    ids=lambda mask: mask.mode,
)
async def test_what_is_transparent_or_else_white_is_painted(
    client: httpx.AsyncClient, backend: FakeBackend, mask: Image.Image
) -> None:
    if mask.mode == "I;16":
        mask = Image.fromarray(np.asarray(drawn()).astype(np.uint16) * 257)
    reply = await ask(client, mask)
    assert reply.status_code == 200, reply.text
    assert reply.json()["warnings"] == []
    (source,) = backend.jobs[0].sources
    assert source.mask is not None
    assert source.mask.dtype == np.uint8
    assert np.array_equal(source.mask >= 128, INSIDE)
    assert (source.pixels == (255, 0, 0)).all()


async def test_the_strength_is_whole_unless_said(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    await ask(client, drawn())
    await ask(client, None, encoded(holed()))
    await ask(client, drawn(), strength="0.5")
    await ask(client, None)
    assert [job.strength for job in backend.jobs] == [1.0, 1.0, 0.5, 0.6]


async def test_what_its_strength_allows_is_allowed(client: httpx.AsyncClient) -> None:
    """More computed steps than an edit without a mask runs by default."""
    fields = {"num_inference_steps": "20", "magcache[computed_steps]": "15"}
    assert (await ask(client, None, encoded(holed()), **fields)).status_code == 200
    assert (await ask(client, drawn(), **fields)).status_code == 200
    error = (await ask(client, None, **fields)).json()["error"]
    assert error["param"] == "magcache.computed_steps"


async def test_what_is_refused_for_want_of_room_is_refused_before_it_is_decoded(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    """Asked with the strength that will be; only whether an image is its own mask has to be seen first."""
    await ask(client, drawn())
    await ask(client, drawn(), encoded(holed()))
    await ask(client, None, encoded(holed()), strength="0.5")
    await ask(client, None)
    await ask(client, None, encoded(holed()))
    assert [job.strength for job in backend.checked] == [1.0, 1.0, 0.5, 0.6]
    backend.refusal = BusyError(1.0)
    assert (await ask(client, drawn("P"), encoded(plain())[:-20])).status_code == 429, "and not 400"


async def test_a_mask_of_another_size_is_refused_with_both(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    reply = await ask(client, drawn(size=(64, 96)))
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["param"], error["code"]) == ("mask", "invalid_value")
    assert error["message"] == "mask is 64x96 and image is 96x64; both need the same size"
    assert not backend.jobs


@pytest.mark.parametrize("orientation", [3, 6, 7])
async def test_sizes_are_those_of_upright_images(
    client: httpx.AsyncClient, backend: FakeBackend, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = encoded(plain(96, 64), "JPEG", exif=exif)
    upright = (96, 64) if orientation == 3 else (64, 96)
    size = f"{upright[0]}x{upright[1]}"
    assert (await ask(client, drawn(size=upright), photo, size=size)).status_code == 200
    source = backend.jobs[0].sources[0]
    assert source.mask is not None
    assert source.mask.shape == source.pixels.shape[:2] == upright[::-1]
    assert (await ask(client, drawn(size=upright[::-1]), photo)).status_code == 400


@pytest.mark.parametrize("mask", [Image.new("L", (96, 64), 127), Image.new("RGBA", (96, 64), (0, 0, 0, 255))])
async def test_a_mask_that_marks_nothing_is_refused(
    client: httpx.AsyncClient, backend: FakeBackend, mask: Image.Image
) -> None:
    error = (await ask(client, mask)).json()["error"]
    assert error["param"] == "mask"
    assert error["message"].startswith("mask marks nothing to paint: make the parts to change transparent, or white")
    assert not backend.jobs


async def test_a_mask_that_cannot_be_read_is_named(client: httpx.AsyncClient) -> None:
    for mask in (b"no image", encoded(drawn())[:60]):
        reply = await client.post(URL, data={"prompt": "a"}, files={"image": RED, "mask": mask})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "mask")


async def test_an_image_has_one_mask(client: httpx.AsyncClient) -> None:
    files = [("image", RED), *2 * [("mask[]", encoded(drawn()))]]
    error = (await client.post(URL, data={"prompt": "a"}, files=files)).json()["error"]
    assert error["message"] == "mask: 2 masks were sent, an image has one"


@pytest.mark.parametrize("family", [FLUX_KONTEXT, FLUX2_KLEIN, FLUX_SCHNELL])
async def test_models_that_do_not_inpaint_refuse_masks(
    client: httpx.AsyncClient, backend: FakeBackend, family: Family
) -> None:
    backend.kind = family
    reply = await ask(client, drawn())
    assert reply.status_code == 400
    error = reply.json()["error"]
    if family is FLUX_SCHNELL:
        assert error["code"] == "edits_not_supported"
    else:
        assert (error["param"], error["code"]) == ("mask", "unknown_parameter")
        assert error["message"].startswith(f"{family.name} reads the image and takes no mask")


async def test_the_images_own_transparency_is_its_mask(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    """Where it is transparent, the colours around continue: what was left there is not seen."""
    reply = await ask(client, None, encoded(holed(colour=(0, 255, 0))))
    assert reply.json()["warnings"] == []
    (source,) = backend.jobs[0].sources
    assert source.mask is not None
    assert np.array_equal(source.mask, INSIDE * 255)
    assert (source.pixels == (255, 0, 0)).all()


@pytest.mark.parametrize(("family", "opacity", "mask"), [(FLUX2_KLEIN, 0, None), (None, 200, None), (None, 0, drawn())])
async def test_transparency_that_is_no_mask_becomes_white_with_a_warning(
    client: httpx.AsyncClient, backend: FakeBackend, family: Family | None, opacity: int, mask: Image.Image | None
) -> None:
    """Of a model that reads images, where it is slight, and beside a mask."""
    backend.kind = family or backend.kind
    reply = await ask(client, mask, encoded(holed(opacity)))
    assert reply.json()["warnings"] == ["the transparent parts of image became white"]
    (source,) = backend.jobs[0].sources
    assert (source.mask is None) == (mask is None)
    assert (source.pixels[INSIDE] == 255 - opacity).all()
    assert (await ask(client, mask, encoded(plain(mode="RGBA")))).json()["warnings"] == []


async def test_masks_in_json(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    image, mask = (f"data:image/png;base64,{base64.b64encode(one).decode()}" for one in (RED, encoded(drawn())))
    body = {"prompt": "a", "size": "96x64", "images": [{"image_url": image}], "mask": {"image_url": mask}}
    assert (await client.post(URL, json=body)).status_code == 200
    found = backend.jobs[0].sources[0].mask
    assert found is not None
    assert np.array_equal(found, INSIDE * 255)


def test_the_official_clients_mask(openai_client: openai.OpenAI, backend: FakeBackend) -> None:
    openai_client.images.edit(image=RED, mask=("mask.png", encoded(holed())), prompt="a cat", size="96x64")
    found = backend.jobs[0].sources[0].mask
    assert found is not None
    assert np.array_equal(found >= 128, INSIDE)
    with pytest.raises(openai.BadRequestError) as refused:
        openai_client.images.edit(image=RED, mask=encoded(drawn(size=(97, 64))), prompt="a cat")
    assert refused.value.param == "mask"


def test_holes_are_closed_with_the_colours_around() -> None:
    image = np.zeros((61, 83, 3), dtype=np.uint8)
    image[:, :40], image[:, 40:] = (200, 10, 10), (10, 10, 200)
    opacity = np.full((61, 83), 255, dtype=np.uint8)
    opacity[10:50, 5:35] = 0
    opacity[10:50, 50:75] = 127
    erased = image.copy()
    erased[opacity < 128] = 255
    made = np.asarray(closed(Image.fromarray(np.dstack([erased, opacity])))).astype(int)
    assert np.array_equal(made[opacity == 255], image[opacity == 255])
    assert np.abs(made[20:40, 6:8] - (200, 10, 10)).max() < 20, "white does not show at the edges"
    assert made[30, 20, 0] > 2 * made[30, 20, 2]
    assert made[30, 62, 2] > 2 * made[30, 62, 0]
    nothing = closed(Image.new("RGBA", (80, 64)))
    assert (np.asarray(nothing) == 255).all()
