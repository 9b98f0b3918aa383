from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from rewards.scorer import RewardError, Unavailable
from rewards.scorers.vlm_judge import JudgeScorer
from rewards.worker import RewardWorker
from rollout.records import Prompt
from tests.support.paths import ROOT
from tests.support.ports import free_port

Images = NDArray[np.uint8]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The address of a running endpoint."""
    command = [sys.executable, str(ROOT / "tests" / "support" / "judge_endpoint.py"), str(free_port())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield next(word for word in process.stdout.readline().split() if word.startswith("http://"))
    process.terminate()
    assert process.wait(20) == 0


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "judge-key")


def judge(endpoint: str, **options: Any) -> JudgeScorer:
    options = {"model": "qwen-vl", "api_key_env": "JUDGE_KEY", **options}
    return JudgeScorer(base_url=f"{endpoint}/v1", **options)


def grey(*levels: int) -> Images:
    return np.stack([np.full((8, 8, 3), level, dtype=np.uint8) for level in levels])


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(index=i, text=text) for i, text in enumerate(texts)]


def test_images_are_judged_on_the_scale(endpoint: str) -> None:
    judgement = judge(endpoint)(grey(0, 128, 255), prompts("a", "b", "c"))
    assert judgement.values.tolist() == [0.0, 0.5, 1.0]
    assert judgement.valid.all()
    assert judgement.details["answer"].tolist() == ['{"score": 0}', '{"score": 5}', '{"score": 10}']
    from_one = judge(endpoint, low=1, high=5)(grey(0, 128, 255), prompts("a", "b", "c"))
    assert from_one.values.tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    "fault",
    "prose,fenced,words,flag,over,nan,more,cut,null,empty,500,gone,slow 9".split(","),
)  # fmt: skip
def test_an_answer_that_is_none_is_missing_and_not_zero(endpoint: str, fault: str) -> None:
    judgement = judge(endpoint, timeout=1.0)(grey(255, 255), prompts(f"[{fault}]", "fine"))
    assert judgement.valid.tolist() == [False, True]
    assert np.isnan(judgement.values).tolist() == [True, False]
    assert judgement.details["answer"][0]


def test_the_question_holds_the_prompt_as_it_is(endpoint: str) -> None:
    asked = prompts('braces {prompt} {low} {0} "quotes" [prose]', "plain")
    judgement = judge(endpoint, question="From {low} to {high}: {prompt}?")(grey(9, 9), asked)
    assert judgement.details["answer"].tolist() == ["I would say 7 out of 10.", '{"score": 0}']
    body = judge(endpoint, question="From {low} to {high}: {prompt}?")._body(grey(9)[0], asked[0])
    assert body["messages"][0]["content"][1]["text"] == f"From 0 to 10: {asked[0].text}?"


def test_questions_are_asked_at_a_time_but_not_more_than_allowed(endpoint: str) -> None:
    started = time.monotonic()
    judgement = judge(endpoint, concurrency=12)(grey(*[255] * 48), prompts(*["[slow 0.25]"] * 48))
    assert judgement.values.tolist() == [1.0] * 48
    assert time.monotonic() - started < 6  # one after the other would take 12 s
    assert 2 <= httpx.get(f"{endpoint}/most").json() <= 12


@pytest.mark.parametrize(
    ("options", "texts", "message"),
    [
        ({"api_key_env": ""}, ["a", "b"], '401: {"error": {"message": "no such key"}}'),
        ({}, ["[500]", "[500]"], "500: .*out of memory"),
        ({"timeout": 0.3}, ["[slow 5]", "[slow 5]"], "ReadTimeout"),
    ],
)
def test_no_answer_at_all_is_an_error(
    endpoint: str, options: dict[str, Any], texts: list[str], message: str
) -> None:
    with pytest.raises(RewardError, match=rf"the judge at {endpoint}/v1/?: .*{message}") as caught:
        judge(endpoint, **options)(grey(9, 9), prompts(*texts))
    assert not isinstance(caught.value, Unavailable)  # it is there, whatever it makes of these


def test_an_endpoint_that_is_not_there_is_an_error() -> None:
    absent = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(RewardError, match=r"reward 'judge' failed: Unavailable: the judge .*ConnectError"):
        RewardWorker("judge", {"base_url": absent, "model": "m"}).score(grey(9, 9), prompts("a", "b"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 5, "high": 5}, "low must be below high, got 5 and 5"),
        ({"concurrency": 0}, "must be above 0, got 60.0 and 0"),
        ({"api_key_env": "NO_SUCH_KEY"}, "the environment variable NO_SUCH_KEY is not set"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge("http://127.0.0.1:1", **options)
    with pytest.raises(ValueError, match=r"^expected a text"):
        JudgeScorer.check(prompts(" ")[0])
