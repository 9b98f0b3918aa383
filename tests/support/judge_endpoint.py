"""An OpenAI-compatible endpoint in a process of its own, which looks at the image as a model would.

It scores the mean brightness of the image from 0 to 10; a prompt's text may ask it to misbehave. Run as
``python judge_endpoint.py PORT``.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from base64 import b64decode
from functools import partial
from io import BytesIO
from typing import Any

import jsonschema
import numpy as np
from aiohttp import web
from PIL import Image

SAID = {
    "prose": "I would say 7 out of 10.",
    "fenced": '```json\n{"score": 7}\n```',
    "words": '{"score": "seven"}',
    "flag": '{"score": true}',
    "over": '{"score": 11}',
    "nan": '{"score": NaN}',
    "more": '{"score": 7, "reason": "nice"}',
    "cut": '{"score": ',
    "null": None,
}
STATE = {"open": 0, "most": 0}


def brightness(url: str) -> float:
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return float(np.asarray(Image.open(BytesIO(b64decode(data)))).mean() / 255)


def answer(body: dict[str, Any], text: str, picture: str) -> str | None:
    asked = body["response_format"]["json_schema"]
    low, high = (asked["schema"]["properties"]["score"][bound] for bound in ("minimum", "maximum"))
    said = json.dumps({"score": round(low + brightness(picture) * (high - low))})
    jsonschema.validate(json.loads(said), asked["schema"])
    return next((other for word, other in SAID.items() if f"[{word}]" in text), said)


async def complete(request: web.Request) -> web.Response:
    if request.headers.get("Authorization") != "Bearer judge-key":
        return web.json_response({"error": {"message": "no such key"}}, status=401)
    body = await request.json()
    picture, text = (part for part in body["messages"][0]["content"])
    STATE["open"] += 1
    STATE["most"] = max(STATE.values())
    slow = re.search(r"\[slow ([0-9.]+)\]", text["text"])
    try:
        await asyncio.sleep(float(slow.group(1)) if slow else 0.05)
    finally:
        STATE["open"] -= 1
    if "[500]" in text["text"]:
        return web.json_response({"error": {"message": "out of memory"}}, status=500)
    if "[gone]" in text["text"]:
        assert request.transport is not None
        request.transport.close()
    if "[empty]" in text["text"]:
        return web.json_response({"choices": []})
    content = answer(body, text["text"], picture["image_url"]["url"])
    message = {"role": "assistant", "content": content}
    return web.json_response({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})


async def most(request: web.Request) -> web.Response:
    return web.json_response(STATE["most"])


if __name__ == "__main__":
    app = web.Application(client_max_size=2**26)
    app.add_routes([web.post("/v1/chat/completions", complete), web.get("/most", most)])
    say = partial(print, flush=True)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), handler_cancellation=True, print=say)
