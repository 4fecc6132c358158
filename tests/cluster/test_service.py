"""End to end: HTTP in, images out, through Ray Serve, two ranks and one coordinator."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from app.main import build, check_resources, needed_resources
from magcache_core import choose, load_profile
from tests.cluster.asking import IMAGES, PROMPT, ask, events_of, metrics, pixels
from tests.cluster.conftest import settings_of
from tests.local_group import TEXT_TOKENS, psnr
from tests.patience import wait_for


def expected(pipeline: FluxPipeline, seed: int = 7, **options: Any) -> np.ndarray:
    """Diffusers' own image, in 8 bits as a file has it."""
    values = {"height": 128, "width": 128, "num_inference_steps": 28, **options}
    generator = torch.Generator("cpu").manual_seed(seed)
    image = pipeline(PROMPT, max_sequence_length=TEXT_TOKENS, generator=generator, **values).images[0]
    return np.asarray(image) / 255


def test_the_openai_client_gets_the_pipelines_image(client: openai.OpenAI, pipeline: FluxPipeline) -> None:
    reply = client.images.generate(
        prompt=PROMPT, model="flux-tiny", size="128x128", extra_body={"seed": 7, "magcache": {"enabled": False}}
    )
    assert psnr(pixels(reply.data[0]), expected(pipeline)) >= 55
    assert reply.data[0].magcache["schedule"] == 28 * "C"


def test_true_cfg(http: httpx.Client, pipeline: FluxPipeline) -> None:
    negative = "a green square on a yellow background"
    options = {"negative_prompt": negative, "true_cfg_scale": 2.5, "num_inference_steps": 12}
    reply = ask(http, magcache={"enabled": False}, **options)
    assert psnr(pixels(reply["data"][0]), expected(pipeline, **options)) >= 55
    ignored = ask(http, true_cfg_scale=2.5, num_inference_steps=2)
    assert any("true_cfg_scale" in warning for warning in ignored["warnings"])


def test_the_schedule_is_the_profiles(http: httpx.Client) -> None:
    profile = load_profile("flux-tiny")
    image = ask(http)["data"][0]
    steps = image["magcache"]["schedule"]
    assert steps == choose(profile, 28).schedule
    assert image["magcache"]["computed"] == steps.count("C")
    assert image["magcache"]["skipped"] == steps.count(".") >= 14
    assert set(image["timings"]) == {"queue_s", "encode_s", "denoise_s", "decode_s", "total_s"}
    stricter = ask(http, magcache={"mag_max_skip_steps": 0})["data"][0]["magcache"]
    assert stricter["computed"] == 28
    budget = ask(http, magcache={"computed_steps": 11})["data"][0]["magcache"]
    assert budget["computed"] == 11
    assert budget["schedule"] == choose(profile, 28, budget=11).schedule
    refused = http.post(IMAGES, json={"prompt": PROMPT, "magcache": {"computed_steps": 1}})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "magcache.computed_steps"
    assert "an integer from" in refused.json()["error"]["message"]


def test_mixed_requests_together_are_those_alone(http: httpx.Client) -> None:
    requests: list[dict[str, Any]] = [
        {"n": 3, "num_inference_steps": 9},
        {"size": "160x96", "num_inference_steps": 14},
        {"size": "96x160", "seed": 3},
        {"negative_prompt": "a green square on a yellow background", "true_cfg_scale": 2},
        {"magcache": {"enabled": False}, "num_inference_steps": 5},
    ]
    before = metrics(http)
    with ThreadPoolExecutor(5) as pool:
        together = list(pool.map(lambda body: ask(http, **body), requests))
    after = metrics(http)
    images = [image for reply in together for image in reply["data"]]
    branches = [image["magcache"]["schedule"] for image in images]
    branches += [image["magcache"]["negative_schedule"] or "" for image in images]
    for decision, mark in (("computed", "C"), ("reused", ".")):
        name = f"flux_steps_total:{decision}"
        assert after[name] - before[name] == sum(steps.count(mark) for steps in branches)
    assert [image["seed"] for image in together[0]["data"]] == [7, 8, 9]
    alone = [ask(http, **body, seed=7 + index) for index in range(3) for body in [{"num_inference_steps": 9}]]
    alone += [ask(http, **body) for body in requests[1:]]
    for first, second in zip(images, [image for reply in alone for image in reply["data"]], strict=True):
        assert psnr(pixels(first), pixels(second)) >= 55


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_bytes_of_each_format(http: httpx.Client, output_format: str) -> None:
    body = {"prompt": PROMPT, "num_inference_steps": 1, "response_format": "file", "output_format": output_format}
    reply = http.post(IMAGES, json=body)
    assert reply.headers["content-type"] == f"image/{output_format}"
    image = Image.open(io.BytesIO(reply.content))
    assert (image.format or "").lower() == output_format
    assert image.size == (128, 128)


def test_an_images_file_holds_its_settings_if_asked(http: httpx.Client) -> None:
    reply = ask(http, n=2, metadata=True, num_inference_steps=8)
    for item in reply["data"]:
        text = Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))).info["parameters"]
        assert text.startswith(f"{PROMPT}\nSteps: 8, ")
        assert f"Seed: {item['seed']}, Size: 128x128, Model: flux-tiny, " in text
        assert f"MagCache schedule: {item['magcache']['schedule']}, " in text
    plain = ask(http, num_inference_steps=8)["data"][0]
    assert "parameters" not in Image.open(io.BytesIO(base64.b64decode(plain["b64_json"]))).info


def test_wrong_requests_name_the_field(http: httpx.Client, client: openai.OpenAI) -> None:
    reply = http.post(IMAGES, json={"prompt": PROMPT, "num_inference_step": 4})
    assert reply.status_code == 400
    assert "num_inference_steps" in reply.json()["error"]["message"]
    with pytest.raises(openai.BadRequestError, match="size"):
        client.images.generate(prompt=PROMPT, size="100x100")


def test_the_openai_client_streams_the_same_image(client: openai.OpenAI, http: httpx.Client) -> None:
    plain = ask(http, magcache={"computed_steps": 14})["data"][0]
    stream = client.images.generate(
        prompt=PROMPT,
        stream=True,
        partial_images=3,
        extra_body={"seed": 7, "magcache": {"computed_steps": 14}, "progress": True},
    )
    events = list(stream)
    completed = events[-1]
    assert completed.type == "image_generation.completed"
    assert psnr(pixels(completed), pixels(plain)) >= 55
    assert completed.magcache == plain["magcache"]
    previews = [event for event in events if event.type == "image_generation.partial_image"]
    assert [preview.partial_image_index for preview in previews] == sorted({p.partial_image_index for p in previews})
    assert len(previews) <= 3
    for preview in previews:
        assert pixels(preview).shape == (128, 128, 3)
    progress = [event.model_dump() for event in events if event.type == "flux.progress"]
    steps = [event["step"] for event in progress]
    assert steps[0] == 0
    assert steps == sorted(steps)
    for event in progress:
        assert event["steps"] == 28
        assert event["decision"] == (plain["magcache"]["schedule"][event["step"] - 1] if event["step"] else "")


def test_previews_come_nearer_to_the_image(http: httpx.Client) -> None:
    # Every step computed, many of them: there is time for all previews.
    body = {"prompt": PROMPT, "seed": 7, "stream": True, "partial_images": 3, "num_inference_steps": 100,
            "magcache": {"enabled": False}}  # fmt: skip
    with http.stream("POST", IMAGES, json=body) as reply:
        *previews, completed = list(events_of(reply))
    assert [preview["type"] for preview in previews] == ["image_generation.partial_image"] * 3
    distances = [psnr(pixels(preview), pixels(completed)) for preview in previews]
    assert distances == sorted(distances)
    assert 200 > distances[-1] > distances[0]


def test_quality_and_deadline_choose_among_schedules(http: httpx.Client) -> None:
    image = ask(http, quality="low")["data"][0]
    assert (image["magcache"]["computed"], image["magcache"]["lowered_by"]) == (7, None)
    assert ask(http, quality="high")["data"][0]["magcache"]["computed"] == 19
    easy = ask(http, deadline_s=600)["data"][0]["magcache"]
    assert easy == ask(http)["data"][0]["magcache"]
    for stream in (False, True):
        body = {"prompt": PROMPT, "deadline_s": 0.001, "num_inference_steps": 100, "stream": stream}
        refused = http.post(IMAGES, json=body)
        assert refused.status_code == 422
        assert refused.json()["error"]["param"] == "deadline_s"
        assert float(refused.headers["x-soonest-seconds"]) > 0.001


def test_a_reply_says_what_was_estimated(http: httpx.Client) -> None:
    reply = http.post(IMAGES, json={"prompt": PROMPT, "num_inference_steps": 8, "n": 2})
    for name in ("x-eta-seconds", "x-queue-position", "x-magcache-schedule", "x-magcache-computed"):
        assert len(reply.headers[name].split(", ")) == 2
    with http.stream("POST", IMAGES, json={"prompt": PROMPT, "num_inference_steps": 8, "stream": True}) as stream:
        assert float(stream.headers["x-eta-seconds"]) > 0
        assert [event["type"] for event in events_of(stream)] == ["image_generation.completed"]


def test_health_and_models(http: httpx.Client, client: openai.OpenAI) -> None:
    assert http.get("/health").status_code == 200
    assert [model.id for model in client.models.list()] == ["flux-tiny"]


def wait_until_idle(http: httpx.Client) -> None:
    names = ("flux_running_pictures", "flux_waiting_pictures")
    wait_for(lambda: sum(metrics(http)[name] for name in names) == 0, "the request has ended")


# Long, and yet with residuals to free.
LONG = {"prompt": PROMPT, "num_inference_steps": 100, "n": 4, "magcache": {"computed_steps": 90}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(http: httpx.Client, service: str, stream: bool) -> None:
    before = metrics(http)["flux_group_rebuilds_total"]
    if stream:
        with http.stream("POST", IMAGES, json={**LONG, "stream": True, "progress": True}) as reply:
            assert next(events_of(reply))["type"] == "flux.progress"
    else:
        with httpx.Client(base_url=service, timeout=1.0) as impatient, pytest.raises(httpx.ReadTimeout):
            impatient.post(IMAGES, json=LONG)
    wait_until_idle(http)
    ask(http, num_inference_steps=2)  # its first plan frees what was dropped, its last what it kept itself
    assert metrics(http)["flux_residual_bytes"] == 0
    assert metrics(http)["flux_group_rebuilds_total"] == before, "the ranks must not feel it"


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_cancelled_by_its_id(http: httpx.Client, stream: bool) -> None:
    assert http.delete("/v1/requests/long").status_code == 404
    headers = {"X-Request-Id": "long"}
    with ThreadPoolExecutor(1) as pool:
        # More than may run at once: those that wait end, too.
        waiting = pool.submit(http.post, IMAGES, json={**LONG, "n": 10, "stream": stream}, headers=headers)
        wait_for(
            lambda: (
                (seen := metrics(http))["flux_running_pictures"] == 8
                and seen["flux_waiting_pictures"] == 2
                and seen["flux_residual_bytes"] > 0
            ),
            "eight images run and two wait",
        )
        reply = http.delete("/v1/requests/long")
        ended = waiting.result()
    assert reply.status_code == 200
    assert reply.json()["pictures"] == 10
    if stream:
        assert '"request_cancelled"' in ended.text.strip().rpartition("data: ")[2]
    else:
        assert ended.status_code == 409
        assert ended.json()["error"]["code"] == "request_cancelled"
    wait_until_idle(http)
    ask(http, num_inference_steps=2)
    assert metrics(http)["flux_residual_bytes"] == 0
    assert http.delete("/v1/requests/long").status_code == 404


def test_a_cluster_without_gpus_is_told_what_is_needed(cluster: None) -> None:
    flux = settings_of("flux.yaml").model_copy(update={"resources_timeout_s": 0.0})
    with pytest.raises(RuntimeError, match=r"FLUX\.1-dev .* needs .*2 GPUs; the Ray cluster has .*flux-tiny\.yaml"):
        build(flux)
    assert needed_resources(flux)["GPU"] == pytest.approx(2.0)
    check_resources(settings_of("flux-tiny.yaml"))
