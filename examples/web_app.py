"""A model inside of one's own web application (Starlette; FastAPI takes the same functions), without `edgephi serve`.

python examples/web_app.py phi-4-mini 8000
curl -N "http://127.0.0.1:8000/ask?question=Hello"
"""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

import edgephi


@asynccontextmanager
async def with_model(app: Starlette) -> AsyncIterator[None]:
    with edgephi.load(sys.argv[1]) as app.state.model:
        yield


async def ask(request: Request) -> StreamingResponse:
    stream = request.app.state.model.chat(request.query_params["question"], max_new_tokens=40)

    async def pieces() -> AsyncIterator[str]:
        async for piece in stream:  # a client that leaves cancels this, and with it the answer
            yield piece

    return StreamingResponse(pieces(), media_type="text/plain")


app = Starlette(routes=[Route("/ask", ask)], lifespan=with_model)
if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[2]))
