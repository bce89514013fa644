"""A representation autoencoder: a frozen encoder, noise while training, latent statistics, and a trained decoder.

Source: Zheng et al., 2025, https://arxiv.org/abs/2510.11690.
"""

from collections.abc import Sequence

import torch
from torch import nn

from scripts.common.errors import KilnError
from scripts.rae.decoder import Decoder
from scripts.rae.encoder import Encoder

STATISTICS_EPS = 1e-5


Generators = torch.Generator | Sequence[torch.Generator] | None


def add_noise(latents: torch.Tensor, tau: float, generators: Generators = None) -> torch.Tensor:
    """latents + sigma * eps, with sigma = tau * U(0,1) drawn per sample and eps ~ N(0,1) (the paper's section 4).

    Numbers are drawn on the generators' device, sigma first: one generator for the batch, one for each sample (whose
    noise then does not depend on its neighbours), or None for torch's global one.
    """
    if isinstance(generators, Sequence):
        return torch.cat([add_noise(one[None], tau, own) for one, own in zip(latents, generators, strict=True)])
    options = {"generator": generators, "device": generators.device if generators else latents.device}
    sigma = tau * torch.rand(len(latents), 1, 1, 1, dtype=latents.dtype, **options)
    noise = torch.randn(latents.shape, dtype=latents.dtype, **options)
    return latents + (sigma * noise).to(latents.device)


class Autoencoder(nn.Module):
    """Images [B,3,S,S] in [0,1] to latents [B,C,H,W] and back.

    Args:
        encoder, decoder: of the same latent width and grid.
        noise_tau: greatest standard deviation of the noise on latents while training; 0 for none.
        mean, var: [C,H,W] statistics of clean latents, kept as buffers `latent_mean` and `latent_var`; None leaves
            latents as they are.

    Raises:
        KilnError: widths differ, noise_tau is negative, only one statistic is given, or one of another shape.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        noise_tau: float = 0.0,
        mean: torch.Tensor | None = None,
        var: torch.Tensor | None = None,
    ):
        super().__init__()
        if (decoder.latent_dim, decoder.grid) != (encoder.dim, encoder.grid):
            raise KilnError(
                f"the decoder takes {decoder.latent_dim} x {decoder.grid} x {decoder.grid} latents, "
                f"the encoder gives {encoder.dim} x {encoder.grid} x {encoder.grid}",
                "build the decoder from this encoder's dim and grid",
            )
        if not noise_tau >= 0:
            raise KilnError(f"noise_tau is {noise_tau}, expected 0 or more", "0.8 is the published value")
        if (mean is None) != (var is None):
            raise KilnError("latent statistics need both mean and var, one is absent", "give both or none")
        self.encoder, self.decoder, self.noise_tau = encoder, decoder, noise_tau
        for name, value in (("mean", mean), ("var", var)):
            self.register_buffer(f"latent_{name}", None if value is None else self._checked(name, value))

    def _checked(self, name: str, value: torch.Tensor) -> torch.Tensor:
        expected = [self.encoder.dim, self.encoder.grid, self.encoder.grid]
        if list(value.shape) != expected:
            raise KilnError(
                f"the latents' {name} has shape {list(value.shape)}, expected {expected} (channels, rows, columns)",
                "use statistics computed with this encoder and input size",
            )
        if not torch.isfinite(value).all() or (name == "var" and (value < 0).any()):
            raise KilnError(f"the latents' {name} has impossible values", "compute the latent statistics again")
        return value.float()

    def encode(self, images: torch.Tensor, generators: Generators = None) -> torch.Tensor:
        """Images [B,3,S,S] in [0,1] -> latents [B,C,H,W]: noise (in training only), then (z - mean) / sqrt(var + 1e-5).

        `generators` draw the noise, see `add_noise`; no gradient reaches the encoder.
        """
        latents = self.encoder(images)
        if self.training and self.noise_tau > 0:
            latents = add_noise(latents, self.noise_tau, generators)
        if self.latent_mean is not None:
            latents = (latents - self.latent_mean) / (self.latent_var + STATISTICS_EPS).sqrt()
        return latents

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents of `encode` -> images [B,3,S,S] around [0,1], not clamped."""
        if self.latent_mean is not None:
            latents = latents * (self.latent_var + STATISTICS_EPS).sqrt() + self.latent_mean
        pixels = self.decoder.unpatchify(self.decoder(latents))
        return pixels * self.encoder.std[:, None, None] + self.encoder.mean[:, None, None]

    def forward(self, images: torch.Tensor, generators: Generators = None) -> torch.Tensor:
        """Images [B,3,S,S] in [0,1] -> their reconstructions; see `encode` and `decode`."""
        return self.decode(self.encode(images, generators))
