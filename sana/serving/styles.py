"""Styles of the demo page: what they add to a prompt, and to what it steers away from."""

NO_STYLE = "None"

STYLES = {
    NO_STYLE: ("{prompt}", ""),
    "Photo": (
        "{prompt}, photographed with a 50 mm lens in soft daylight, natural colours, fine detail",
        "painting, drawing, rendering, plastic skin",
    ),
    "Film": (
        "a frame from a film: {prompt}, wide shot, warm light against deep shadows, slight grain",
        "flat light, snapshot, cartoon",
    ),
    "Watercolour": (
        "{prompt}, watercolour on rough paper, loose brush, colours that run into each other",
        "photo, sharp outlines, glossy",
    ),
    "Ink": ("{prompt}, drawn with pen and black ink, hatching, white paper", "colour, photo, blur"),
    "Anime": ("{prompt}, anime key visual, clean outlines, flat bright shading", "photo, realistic, noise"),
    "Pixel art": ("{prompt}, pixel art, few colours, visible square pixels", "smooth, photo, blur"),
    "Clay": (
        "{prompt}, modelled in clay, small studio scene, soft shadows",
        "photo of people, drawing, flat",
    ),
    "Low poly": ("{prompt}, low-polygon 3D rendering, plain facets, isometric view", "photo, noise, drawing"),
    "Poster": (
        "{prompt}, screen-printed poster, three bold colours, plain shapes",
        "photo, gradient, clutter",
    ),
}
"""Name -> (template of the prompt, what is added to the negative prompt)."""

EXAMPLES = (
    "a lighthouse on a cliff at dusk, its beam in the rain",
    "an old watchmaker at his bench, a lamp beside him",
    "a fox asleep between the roots of a birch, first snow",
    "a bowl of ramen from above, steam, wooden table",
    "a glass greenhouse full of ferns in the middle of a city street",
    'a shop window with the words "open late" in neon',
    "a small red sailing boat on a green lake, mountains behind",
)
"""Prompts for a model that was trained on pictures of the world."""


def apply(style: str, prompt: str, negative_prompt: str) -> tuple[str, str]:
    """Prompt and negative prompt in a style.

    Raises:
        ValueError: there is no such style.
    """
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}; choose from {', '.join(STYLES)}")
    template, avoided = STYLES[style]
    return template.replace("{prompt}", prompt), ", ".join(
        part for part in (avoided, negative_prompt) if part
    )
