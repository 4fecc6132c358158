"""A request that comes again through the running service."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
from ray import serve
from starlette.requests import Request

from app.api.proxy_guard import WITHOUT_ID
from tests.cluster.asking import IMAGES, PROMPT, ask, events_of, metrics, pixels
from tests.patience import ANSWER_S, wait_for

LONG = {"prompt": PROMPT, "num_inference_steps": 100, "magcache": {"enabled": False}}


def finished(http: httpx.Client) -> float:
    return metrics(http)["flux_pictures_finished_total"]


def test_a_repetition_joins_the_image_under_way_or_gets_the_finished_one(http: httpx.Client) -> None:
    before, joined = finished(http), metrics(http)["flux_pictures_joined_total"]
    headers = {"Idempotency-Key": "together"}
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(http.post, IMAGES, json=LONG, headers=headers)
        wait_for(lambda: metrics(http)["flux_running_pictures"] == 1, "it runs")
        second = pool.submit(http.post, IMAGES, json=LONG, headers=headers)
        replies = [first.result(), second.result(), http.post(IMAGES, json=LONG, headers=headers)]
    images = [reply.json()["data"][0] for reply in replies]
    assert len({image["b64_json"] for image in images}) == 1
    assert [reply.headers.get("idempotent-replayed") for reply in replies] == [None, "true", "true"]
    after = metrics(http)
    assert finished(http) - before == 1
    assert after["flux_pictures_joined_total"] - joined == 2
    other = http.post(IMAGES, json={**LONG, "num_inference_steps": 99}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")


def test_a_repeated_stream_gets_progress_from_then_on_and_the_image(http: httpx.Client) -> None:
    before = finished(http)
    body = {**LONG, "stream": True, "progress": True}
    headers = {"X-Request-Id": "streamed-twice"}
    with http.stream("POST", IMAGES, json=body, headers=headers) as first:
        events = events_of(first)
        while next(events)["step"] < 5:
            pass
        with http.stream("POST", IMAGES, json=body, headers=headers) as second:
            *news, again = list(events_of(second))
        *_, image = list(events)
    assert min(event["step"] for event in news) >= 4
    assert (again["type"], again["b64_json"]) == ("image_generation.completed", image["b64_json"])
    assert finished(http) - before == 1


def test_the_last_of_those_who_share_an_image_ends_it(http: httpx.Client, service: str) -> None:
    headers = {"X-Request-Id": "shared-and-left"}
    impatient = httpx.Client(base_url=service, timeout=ANSWER_S)
    body = {**LONG, "stream": True, "progress": True}
    with impatient.stream("POST", IMAGES, json=body, headers=headers) as one:
        assert next(events_of(one))["type"] == "flux.progress"
        with http.stream("POST", IMAGES, json=body, headers=headers) as two:
            events = events_of(two)
            step = next(events)["step"]
            one.close()
            while next(events)["step"] < step + 30:
                pass
    wait_for(lambda: metrics(http)["flux_running_pictures"] == 0, "nothing runs for those who left")
    impatient.close()


def test_equal_requests_are_no_repetitions(http: httpx.Client) -> None:
    before = finished(http)
    body = {"num_inference_steps": 4, "size": "64x64", "seed": None}
    first, second = (ask(http, **body)["data"][0] for _ in range(2))
    assert first["seed"] != second["seed"]
    assert pixels(first).shape == (64, 64, 3)
    assert finished(http) - before == 2


class Echo:
    """Answers with the names of the headers that came through Ray's proxy."""

    async def __call__(self, request: Request) -> list[str]:
        return list(request.headers)


def test_the_service_knows_which_ids_rays_proxy_made(service: str) -> None:
    """It gives one to each request that has none, and asking all replicas about it would be in vain."""
    serve.run(serve.deployment(ray_actor_options={"num_cpus": 0})(Echo).bind(), name="echo", route_prefix="/echo")
    with_and_without = [httpx.get(f"{service}/echo", headers=each).json() for each in ({"X-Request-Id": "mine"}, {})]
    serve.delete("echo")
    assert [(WITHOUT_ID in names, "x-request-id" in names) for names in with_and_without] == [
        (False, True),
        (True, True),
    ]
