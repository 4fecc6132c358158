"""Two API processes of one service: what each holds is known to both, and either can end."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
from prometheus_client.parser import text_string_to_metric_families

from app.cluster.api_processes import ApiProcesses
from tests.cluster.asking import IMAGES, PROMPT, ask, metrics
from tests.patience import ANSWER_S, wait_for

SHORT = {"num_inference_steps": 2, "size": "64x64"}


async def test_a_process_alone_asks_itself_only() -> None:
    alone = ApiProcesses()
    assert (alone.is_first, alone.this, await alone.ask("cancel_here", "a", "")) == (True, "api", [])


def new_connections(service: str, path: str, times: int) -> list[httpx.Response]:
    """Replies on as many connections, which Serve spreads over the processes."""
    return [httpx.get(f"{service}{path}", timeout=ANSWER_S) for _ in range(times)]


def ok_by_process(text: str) -> Counter[str]:
    """Requests that went well, by the API process that served them."""
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return Counter(
        {
            sample.labels["process"]: int(sample.value)
            for sample in samples
            if sample.name == "flux_requests_total" and sample.labels["outcome"] == "ok"
        }
    )


def test_each_process_has_the_metrics_of_all(http: httpx.Client, service: str) -> None:
    wait_for(lambda: len(ok_by_process(http.get("/metrics").text)) == 2, "both processes are there")
    before = ok_by_process(http.get("/metrics").text)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: ask(http, seed=seed, **SHORT), range(16)))
    for reply in new_connections(service, "/metrics", 8):
        served = ok_by_process(reply.text)
        served.subtract(before)
        assert sum(served.values()) == 16, "whichever process answers"
        assert min(served.values()) > 0, "both took a part"


def test_a_request_is_cancelled_through_any_process(http: httpx.Client, service: str) -> None:
    body = {"prompt": PROMPT, "num_inference_steps": 100, "magcache": {"enabled": False}}
    for number in range(4):
        headers = {"X-Request-Id": f"through-any-{number}"}
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(http.post, IMAGES, json=body, headers=headers)
            wait_for(lambda: metrics(http)["flux_running_pictures"] == 1, "the image runs")
            ended = httpx.delete(f"{service}/v1/requests/{headers['X-Request-Id']}", timeout=ANSWER_S)
            assert (ended.status_code, ended.json()["pictures"]) == (200, 1)
            assert waiting.result().status_code == 409


def test_a_calibration_is_known_to_all_processes(http: httpx.Client, service: str) -> None:
    asked = {"size": "64x80", "num_inference_steps": 6, "prompts": [PROMPT], "trial_runs": 0, "moves": 0}
    started = http.post("/v1/calibrations", json=asked)
    assert started.status_code == 202, started.text
    path = f"/v1/calibrations/{started.json()['id']}"
    assert [reply.status_code for reply in new_connections(service, path, 6)] == 6 * [200]
    second = [httpx.post(f"{service}/v1/calibrations", json=asked, timeout=ANSWER_S) for _ in range(4)]
    assert {reply.status_code for reply in second} <= {202, 409}
    wait_for(lambda: http.get(path).json()["status"] == "done", "the calibration is over")
