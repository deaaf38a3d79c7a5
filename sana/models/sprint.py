"""SANA-Sprint (arXiv 2503.09641): the transformer of the flow, asked in the coordinates of TrigFlow.

TrigFlow (Lu & Song 2024, arXiv 2410.11081) goes from data to noise on a circle, by the angle tau in [0, pi/2]; the
flow of `sana.diffusion.flow` goes on a line, by the time t in [0, 1]:

    x_tau = cos(tau) x_0 + sin(tau) eps          x_t = (1 - t) x_0 + t eps

At t = sin(tau) / (cos(tau) + sin(tau)) the two have the same ratio of signal to noise, and x_t = r x_tau with
r = sqrt(t^2 + (1 - t)^2). So the network v(x_t, t) of the flow gives the tangent dx_tau / dtau of the circle:

    F(x, tau) = ((1 - 2t) r x + (1 - 2t + 2t^2) v(r x, t)) / r
"""

import math

import torch

from sana.models.transformer import SanaTransformer

NETWORK_TIME = 1000.0
"""The network's time at t = 1; Sprint sees it untruncated."""


class TrigFlow:
    """F(x, tau) for one batch of prompts, whose cross-attention keys and values are computed once.

    Latents are in units of sigma_data throughout: data and noise both have about variance 1.
    """

    def __init__(
        self,
        transformer: SanaTransformer,
        text_embeds: torch.Tensor,
        text_mask: torch.Tensor | None = None,
        *,
        guidance: float | None,
    ) -> None:
        """Wrap a transformer in eval mode.

        Args:
            transformer: one of the zoo's `SanaMSCM_...`.
            text_embeds: (B, L, C).
            text_mask: (B, L), non-zero = valid; None: every token.
            guidance: the scale of classifier-free guidance that the network imitates; None for a transformer
                without `cfg_embed`.

        Raises:
            ValueError: features that do not fit the transformer.
        """
        self.transformer = transformer
        self.text_cache = transformer.encode_text(text_embeds, text_mask)
        self.guidance = guidance

    def __call__(self, x: torch.Tensor, tau: float) -> torch.Tensor:
        """x: (B, c, h, w), best float32; tau: in [0, pi/2] -> F(x, tau), of the same shape and dtype.

        Raises:
            ValueError: as `SanaTransformer.forward`.
        """
        t = math.sin(tau) / (math.cos(tau) + math.sin(tau))
        r = math.hypot(t, 1 - t)
        x = r * x
        time = torch.full((len(x),), NETWORK_TIME * t, dtype=torch.float32, device=x.device)
        guidance = None if self.guidance is None else torch.full_like(time, self.guidance)
        velocity = self.transformer(x, time, None, text_cache=self.text_cache, guidance=guidance)
        return ((1 - 2 * t) * x + (1 - 2 * t + 2 * t * t) * velocity.to(x.dtype)) / r
