"""The demo page: a form over an `Engine`, with a bar and previews while it draws, and PNGs that hold their settings."""

from __future__ import annotations

import asyncio
import html
import inspect
import math
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from sana.generation import Settings
from sana.pipeline import SAMPLERS
from sana.serving import styles
from sana.serving.plan import plan_line
from sana.serving.ticket import Closed, Drawn, Expired, QueueFull, Ticket

if TYPE_CHECKING:
    from sana.pipeline import SanaPipeline
    from sana.serving.engine import Engine

PREVIEWS = 5
"""How many previews an image has at most."""
REFRESH = 0.1
"""Seconds between two looks at a request."""

CSS = "progress { width: 100%; height: 1.2em } .plan { opacity: 0.7 }"

Update = tuple[Any, ...]
"""New values of gallery, status, files, settings and seed."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What the form shows at first; None is the model's own."""

    image_size: int | None = None
    steps: int | None = None
    guidance_scale: float = 4.5
    pag_guidance_scale: float = 1.0
    seed: int = 0
    examples: Sequence[str] = styles.EXAMPLES


def build(engine: Engine, start: Start) -> gr.Blocks:
    """The page, ready to be launched."""
    model = engine.pipeline.config.model.model
    # Gradio keeps copies of the pictures; those of yesterday are removed.
    with gr.Blocks(title="Sana", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(f"# Sana\n{model}: text to image with a linear diffusion transformer")
        with gr.Row():
            with gr.Column(scale=2):
                form, run, cancel = _form(engine, start)
            with gr.Column(scale=3):
                gallery = gr.Gallery(label="Images", columns=2, format="png", elem_id="gallery", height=560)
                status = gr.HTML(label="Status", elem_id="status")
                files = gr.File(label="Files", file_count="multiple", interactive=False)
                with gr.Accordion("Settings of these images", open=False):
                    settings = gr.JSON(label="Settings")
        _connect(engine, form, run, cancel, [gallery, status, files, settings, form["seed"]])
        gr.Examples([[text] for text in start.examples], [form["prompt"]])
    return page


def _form(engine: Engine, start: Start) -> tuple[dict[str, gr.components.Component], gr.Button, gr.Button]:
    """The controls, by the names of `draw`'s arguments; and the two buttons."""
    limits, own = engine.limits, start.image_size or engine.pipeline.config.model.image_size
    names = _samplers(engine.pipeline)
    form: dict[str, gr.components.Component] = {}
    form["prompt"] = gr.Textbox(label="Prompt", lines=2, max_length=limits.prompt, elem_id="prompt")
    with gr.Row():
        run = gr.Button("Run", variant="primary", elem_id="run")
        cancel = gr.Button("Cancel", elem_id="cancel")
    with gr.Row():
        form["width"] = gr.Number(own, label="Width", precision=0, elem_id="width")
        form["height"] = gr.Number(own, label="Height", precision=0, elem_id="height")
        form["count"] = gr.Slider(1, limits.images, 1, step=1, label="Images", elem_id="count")
    plan = gr.Markdown(elem_classes="plan", elem_id="plan")
    with gr.Row():
        form["seed"] = gr.Number(start.seed, label="Seed", precision=0, elem_id="seed")
        form["randomise"] = gr.Checkbox(True, label="Another seed each time", elem_id="randomise")
    with gr.Accordion("More", open=False):
        form["negative_prompt"] = gr.Textbox("", label="Negative prompt", max_length=limits.prompt)
        form["style"] = gr.Radio(list(styles.STYLES), value=styles.NO_STYLE, label="Style")
        steps = start.steps or SAMPLERS[names[0]]
        form["steps"] = gr.Slider(1, limits.steps, steps, step=1, label="Steps", elem_id="steps")
        form["guidance_scale"] = gr.Slider(
            1, limits.guidance, start.guidance_scale, step=0.1, label="CFG scale"
        )
        form["pag_scale"] = gr.Slider(
            1, limits.guidance, start.pag_guidance_scale, step=0.1, label="PAG scale"
        )
        form["sampler"] = gr.Radio(names, value=names[0], label="Solver")

    def show_plan(width: int | None, height: int | None, count: int) -> str:
        """Before a run: how much memory it will take."""
        try:
            batch = min(int(count), engine.max_batch)
            return f"Memory: {plan_line(engine.pipeline, (height or own, width or own), batch)}."
        except ValueError as error:
            return str(error)

    sized = [form["width"], form["height"], form["count"]]
    gr.on(
        [control.change for control in sized],
        show_plan,
        sized,
        plan,
        api_visibility="private",
        show_progress="hidden",
    )
    plan.value = show_plan(own, own, 1)
    return form, run, cancel


def _connect(
    engine: Engine,
    form: dict[str, gr.components.Component],
    run: gr.Button,
    cancel: gr.Button,
    outputs: list[gr.components.Component],
) -> None:
    """What the buttons do."""
    under_way: set[tuple[str | None, Ticket]] = set()  # with the visitors

    async def draw(  # noqa: PLR0913 the controls; these names are those of the API
        prompt: str,
        width: float,
        height: float,
        count: float,
        seed: float,
        randomise: bool,
        negative_prompt: str,
        style: str,
        steps: float,
        guidance_scale: float,
        pag_scale: float,
        sampler: str,
        request: gr.Request,
    ) -> AsyncIterator[Update]:
        """Draw images of a prompt. Of several answers the last holds the images: those before it are previews."""
        try:
            prompt, negative_prompt = styles.apply(style, prompt, negative_prompt)
            settings = Settings(
                seed=secrets.randbelow(2**31) if randomise else _whole("seed", seed),
                width=_whole("width", width),
                height=_whole("height", height),
                negative_prompt=negative_prompt,
                num_inference_steps=_whole("number of steps", steps),
                guidance_scale=guidance_scale,
                pag_guidance_scale=pag_scale,
                sampler=sampler,
            )
            images = _whole("number of images", count)
            # In a thread: a safety model may look at the prompt, and the first request hashes the weights.
            ticket = await asyncio.to_thread(engine.submit, prompt, settings, images, previews=PREVIEWS)
            entry = (request.session_hash, ticket)
            under_way.add(entry)
            try:
                async for update in follow(engine, ticket):
                    yield update
            finally:
                under_way.remove(entry)
        except (ValueError, ArithmeticError, QueueFull, Closed, Expired) as error:
            raise gr.Error(" ".join(str(error).split()), print_exception=False) from error

    async def stop(request: gr.Request) -> None:
        """Let `draw` end: after gradio's own way to cancel, an update that is on its way may cover the word that it is over."""
        for visitor, ticket in under_way:
            if visitor == request.session_hash:
                ticket.cancel()

    controls = [form[name] for name in inspect.signature(draw).parameters if name in form]
    gr.on(
        [run.click, form["prompt"].submit],
        draw,
        controls,
        outputs,
        api_name="run",
        concurrency_limit=None,  # the engine has a queue and its limit
        show_progress="hidden",  # there is our own bar, and the previews should be seen
    )
    cancel.click(stop, queue=False, api_visibility="private", show_progress="hidden")


async def follow(engine: Engine, ticket: Ticket) -> AsyncIterator[Update]:
    """Show how far a request is, then its images; who leaves before the end has cancelled it."""
    shown = ""
    try:
        while not ticket.over:
            bar = progress_bar(ticket, engine.waiting)
            if bar != shown:
                shown, previews = bar, [picture for _, picture in sorted(ticket.previews.items())]
                yield previews or gr.skip(), bar, None, None, ticket.settings.seed
            await asyncio.sleep(REFRESH)
        drawn = ticket.result()
    except CancelledError:
        yield gr.skip(), "Cancelled.", None, None, ticket.settings.seed
        return
    finally:
        ticket.cancel()  # without effect when it is over
    with tempfile.TemporaryDirectory(prefix="sana-") as folder:  # gradio copies what it is given
        paths = await asyncio.to_thread(_save, ticket, drawn, Path(folder))  # others' bars go on meanwhile
        captions = [caption(ticket, one) for one in drawn if one.picture is not None]
        gallery = list(zip(paths, captions, strict=True))
        status = "<br>".join([f"Drawn in {time.monotonic() - ticket.submitted:.1f} s.", *_withheld(drawn)])
        yield gallery, status, paths, ticket.record, ticket.settings.seed


def progress_bar(ticket: Ticket, waiting: int) -> str:
    """How far a request is, as HTML."""
    if not ticket.drawing and not ticket.drawn:
        return f"Waiting; images in the queue: {waiting}<progress></progress>"
    done = f", {len(ticket.drawn)} of {len(ticket.tasks)} images done" if ticket.drawn else ""
    return f'Step {ticket.step} of {ticket.total}{done}<progress value="{ticket.progress:.3f}"></progress>'


def caption(ticket: Ticket, one: Drawn) -> str:
    """The settings of an image, short."""
    settings, (height, width) = ticket.settings, one.task.size
    parts = [
        f"seed {settings.seed}",
        f"image {one.task.sample + 1}" if len(ticket.tasks) > 1 else "",
        f"CFG {settings.guidance_scale:g}",
        f"PAG {settings.pag_guidance_scale:g}" if settings.pag_guidance_scale != 1 else "",
        f"{settings.num_inference_steps} steps",
        f"{width} x {height}",
        f"{settings.sampler}",
    ]
    return " · ".join(part for part in parts if part)


def _save(ticket: Ticket, drawn: Sequence[Drawn], folder: Path) -> list[str]:
    paths = []
    for one in drawn:
        if one.picture is not None:
            path = folder / one.task.file
            path.write_bytes(ticket.png(one))
            paths.append(str(path))
    return paths


def _withheld(drawn: Sequence[Drawn]) -> list[str]:
    return [
        f"<b>Image {one.task.sample + 1}: {html.escape(one.withheld)}</b>" for one in drawn if one.withheld
    ]


def _samplers(pipeline: SanaPipeline) -> list[str]:
    """Those that fit the model, its own first."""
    own = pipeline.config.scheduler.vis_sampler
    fitting = [name for name in SAMPLERS if (name == "scm") == pipeline.transformer.config.cfg_embed]
    return sorted(fitting, key=lambda name: name != own)


def _whole(what: str, value: float | None) -> int:
    if value is None or not math.isfinite(value) or value != int(value):
        raise ValueError(f"the {what} must be a whole number, got {value}")
    return int(value)
