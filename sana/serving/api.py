"""The HTTP server: OpenAI's `POST /v1/images/generations` over an `Engine`, health and metrics."""

import asyncio
import base64
import contextlib
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Annotated, Literal

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from sana import __version__
from sana.generation import Settings
from sana.serving.counters import CONTENT_TYPE
from sana.serving.engine import Engine
from sana.serving.ticket import Closed, Drawn, Expired, QueueFull, Ticket

KEPT_IMAGES = 64
"""How many images with a URL are kept; older ones are forgotten."""


class ImageRequest(BaseModel):
    """A request of OpenAI's images API, and this server's extensions. An unknown field is an error."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=False)

    prompt: str
    n: Annotated[int, Field(strict=True)] = 1
    size: Annotated[str | None, Field(pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$")] = None
    """WIDTHxHEIGHT; `auto` is the model's own."""
    response_format: Literal["b64_json", "url"] = "b64_json"
    model: str | None = None
    """If given, the name that /health tells."""
    user: str | None = None
    """Accepted for clients that send it; not looked at."""

    seed: Annotated[int | None, Field(strict=True)] = None
    """Extension: None is a new one each time; the answer tells it."""
    negative_prompt: str = ""
    """Extension, as all that follow."""
    steps: Annotated[int | None, Field(strict=True)] = None
    guidance_scale: float = 4.5
    pag_guidance_scale: float = 1.0
    sampler: str | None = None

    def settings(self) -> Settings:
        """In the terms of `sana.generation`."""
        width, height = (None, None) if self.size in (None, "auto") else map(int, self.size.split("x"))
        return Settings(
            seed=secrets.randbelow(2**31) if self.seed is None else self.seed,
            height=height,
            width=width,
            negative_prompt=self.negative_prompt,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            pag_guidance_scale=self.pag_guidance_scale,
            sampler=self.sampler,
        )


class KeptImages(OrderedDict[str, bytes]):
    """The last KEPT_IMAGES images, by the end of their URL."""

    def add(self, png: bytes) -> str:
        """Keep one; returns its key, which nobody can guess."""
        key = f"{secrets.token_urlsafe(16)}.png"
        self[key] = png
        if len(self) > KEPT_IMAGES:
            self.popitem(last=False)
        return key


class ClientGone(Exception):  # noqa: N818 nobody is told of it
    """The client of a request has closed its connection."""


STATUS = ((QueueFull, 429), (Closed, 503), (Expired, 504), (ClientGone, 499), (ValueError, 400))
"""Error -> HTTP status; any other is 500."""


def make_app(engine: Engine) -> FastAPI:
    """The application; leaving its lifespan drains and closes the engine."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.close)

    app = FastAPI(title="Sana", version=__version__, lifespan=lifespan)
    name = engine.pipeline.config.model.model
    kept = KeptImages()

    @app.post("/v1/images/generations")
    async def generations(asked: ImageRequest, request: Request) -> Response:
        """Draw `n` images of a prompt; each is a PNG that holds its prompt, seed and settings."""
        if asked.model not in (None, name):
            raise HTTPException(404, f"this server draws with {name!r}, not with {asked.model!r}")
        try:
            ticket = await run_in_threadpool(engine.submit, asked.prompt, asked.settings(), asked.n)
            drawn = await finished(ticket, request)
        except Exception as error:
            raise _refusal(error) from error
        if all(one.picture is None for one in drawn):
            raise HTTPException(400, drawn[0].withheld)
        # In a thread: packing large PNGs takes seconds, in which /health would not answer.
        files = await run_in_threadpool(lambda: [one.picture and ticket.png(one) for one in drawn])
        data = [_entry(one, png, asked, request, kept) for one, png in zip(drawn, files, strict=True)]
        return JSONResponse({"created": int(time.time()), "seed": ticket.settings.seed, "data": data})

    @app.get("/v1/images/{key}")
    async def image(key: str) -> Response:
        """One of the last images that were asked for with `response_format: url`."""
        if key not in kept:
            raise HTTPException(404, f"no such image: only the last {KEPT_IMAGES} are kept")
        return Response(kept[key], media_type="image/png")

    _add_status(app, engine, name)
    for kind in (
        HTTPException,
        404,
        405,
    ):  # the numbers are for Starlette's own: an unknown path, a wrong method
        app.add_exception_handler(kind, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)
    return app


def _add_status(app: FastAPI, engine: Engine, name: str) -> None:
    """The addresses that say how the server is."""

    @app.get("/health")
    async def health() -> Response:
        """200 as long as requests are taken, else 503."""
        status = {"status": "ok" if engine.alive else "closing", "model": name, "version": __version__}
        sizes = {"waiting": engine.waiting, "drawing": engine.drawing}
        return JSONResponse(status | sizes, 200 if engine.alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        gauges = {
            "sana_images_waiting": (engine.waiting, "Images in the queue."),
            "sana_images_drawing": (engine.drawing, "Images in the batch that is being drawn."),
        }
        return Response(engine.counters.text(gauges), media_type=CONTENT_TYPE)


async def finished(ticket: Ticket, request: Request) -> list[Drawn]:
    """Wait for a request's images, as long as it has time and its client stays; else it is cancelled.

    Raises:
        Expired, ClientGone: it has not, or it did not. Also what the engine met.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    drawing, leaving = asyncio.wrap_future(ticket.future), asyncio.create_task(gone())
    try:
        await asyncio.wait({drawing, leaving}, timeout=ticket.remaining, return_when=asyncio.FIRST_COMPLETED)
        if drawing.done() or ticket.over:
            return await drawing
        raise ClientGone("the client has gone")
    finally:
        leaving.cancel()
        ticket.cancel()  # without effect if it is over


def _entry(
    one: Drawn, png: bytes | None, asked: ImageRequest, request: Request, kept: KeptImages
) -> dict[str, str]:
    """An image in the answer."""
    if png is None:
        return {"withheld": one.withheld}
    if asked.response_format == "url":
        return {"url": str(request.url_for("image", key=kept.add(png)))}
    return {"b64_json": base64.b64encode(png).decode()}


def _refusal(error: Exception) -> HTTPException:
    status = next((status for kind, status in STATUS if isinstance(error, kind)), 500)
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, QueueFull) else None
    return HTTPException(status, " ".join(str(error).split()), headers)


async def _refused(request: Request, error: HTTPException) -> Response:
    return _error(error.status_code, str(error.detail), error.headers)


async def _malformed(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    # A number is a place in broken JSON.
    where = ".".join(part for part in first["loc"][1:] if isinstance(part, str))
    return _error(422, f"{where or 'the body'}: {first['msg']}")


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """In OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status, headers)
