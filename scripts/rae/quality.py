"""PSNR and SSIM of each picture, on 8-bit values; the mean over any number of batches is the mean of their values."""

import torch

from scripts.common.errors import KilnError

PEAK = 255.0
COLUMNS = ("psnr", "ssim", "lpips")
SCORED = (*COLUMNS, "shrunk_lpips")  # of each picture; the last is of a poor copy, for comparison
HIGHER_IS_BETTER = {"psnr": True, "ssim": True, "lpips": False}
WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03
LEAST_MSE = 1e-10
ROWS = 32


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Floats in [0,1] to 0..255 uint8 of the same shape: clamped, then rounded to the nearest (half to even).

    Raises:
        KilnError: a value is not finite.
    """
    if not images.isfinite().all():
        raise KilnError(
            f"{int((~images.isfinite()).sum())} of {images.numel()} values of a batch of pictures are not finite",
            "the model diverged: use an earlier checkpoint, or a smaller learning rate",
        )
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def psnr(reference: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """10 log10(255^2 / MSE) of each picture in dB: uint8 [B,C,H,W] twice -> float64 [B].

    As in the original evaluation, the MSE of pictures in [0,1] counts as 1e-10 at least: equal pictures give 100 dB.

    Raises:
        KilnError: not uint8, or unlike shapes.
    """
    _check(reference, pictures)
    error = (reference.double() - pictures.double()).div(PEAK).square().mean(dim=(1, 2, 3))
    return -10 * error.clamp(min=LEAST_MSE).log10()


def ssim(reference: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each picture: uint8 [B,C,H,W] twice -> float64 [B].

    Wang et al. 2004 (IEEE TIP 13(4), eq. 13): Gaussian window 11x11, sigma 1.5, K1 = 0.01, K2 = 0.03, population
    (co)variances, mean over channels and over all positions where the window lies inside the picture. These are the
    settings of torchmetrics, which the original uses; written here as the lock has neither it nor skimage.

    Raises:
        KilnError: not uint8, unlike shapes, or a side under 11 pixels.
    """
    _check(reference, pictures)
    if min(reference.shape[2:]) < WINDOW:
        raise KilnError(f"pictures of shape {list(reference.shape)}: SSIM needs {WINDOW} pixels a side", "use larger")
    # one by one: float64 maps of a whole batch do not fit a processor's cache, which costs more than the sums
    return torch.stack([_ssim(x.double(), y.double()) for x, y in zip(reference, pictures, strict=True)])


def _ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of one picture, [C,H,W] float64 twice: a scalar."""
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = _blur(torch.stack([x, y, x * x, y * y, x * y]))
    var_x, var_y, covariance = mean_xx - mean_x**2, mean_yy - mean_y**2, mean_xy - mean_x * mean_y
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean()


def _blur(maps: torch.Tensor) -> torch.Tensor:
    """[...,H,W] -> [...,H-10,W-10]: the separable Gaussian window as a banded matrix on each axis.

    Matrix products, as float64 convolutions of one channel are ten times slower on a CPU.
    """
    return _along_rows(_along_rows(maps).mT).mT


def _along_rows(maps: torch.Tensor) -> torch.Tensor:
    """[...,H,W] -> [...,H-10,W], some rows at a time: elsewhere the banded matrix is empty."""
    side, made = ROWS + WINDOW - 1, []
    band = _band(side, maps)
    for start in range(0, maps.shape[-2] - WINDOW + 1, ROWS):
        piece = maps[..., start : start + side, :]
        rows = piece.shape[-2]
        made.append(band[: rows - WINDOW + 1, :rows] @ piece)
    return torch.cat(made, dim=-2)


def _band(side: int, like: torch.Tensor) -> torch.Tensor:
    """[side-10,side], each row the normalised window one place further on."""
    places = torch.arange(side, dtype=like.dtype, device=like.device)
    offsets = places - places[: side - WINDOW + 1, None] - WINDOW // 2
    band = torch.exp(-(offsets**2) / (2 * SIGMA**2)) * (offsets.abs() <= WINDOW // 2)
    return band / band.sum(dim=1, keepdim=True)


def _check(reference: torch.Tensor, pictures: torch.Tensor) -> None:
    if {reference.dtype, pictures.dtype} != {torch.uint8} or reference.shape != pictures.shape or reference.ndim != 4:
        raise KilnError(
            f"pictures {list(pictures.shape)} {pictures.dtype} against {list(reference.shape)} {reference.dtype}; "
            "expected uint8 [B,C,H,W] twice",
            "pass both through to_uint8 at one size",
        )
