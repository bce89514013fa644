"""The Fréchet distance of features from statistics that are gathered batch by batch and shard by shard, in float64.

Memory is that of one [D,D] matrix for each group of images, whatever their number. Batches and shards are joined by the
updates of Chan, Golub and LeVeque (1979). Images are dealt to groups in turn, row number modulo the count of groups, so
that each group holds all classes; leaving one out at a time says how far the distance is to be trusted.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from scripts.common import progress
from scripts.common.artefacts import atomic_path, sha256_text
from scripts.common.errors import KilnError

PROTOCOL_IMAGES = 50_000
GROUPS = 10


@dataclass(frozen=True)
class Origin:
    """What features were taken of; two sets compare only where `COMPARED` is the same."""

    images: str  # `image_list_hash` of the whole list
    split: str
    preprocessing: str  # such as "ADM centre crop 256, uint8"
    extractor: str
    weights: str  # sha256
    label: str = ""  # the extractor's own: why its scores do not compare with published ones


COMPARED = ("preprocessing", "extractor", "weights")


def image_list_hash(names: Sequence[str]) -> str:
    """Hex sha256 of image names in their order."""
    return sha256_text(*names)


class FeatureStatistics:
    """Count, mean [D] and scatter [D,D] = sum of (x-mean)(x-mean)^T of features, float64 on the CPU."""

    def __init__(self, dim: int, origin: Origin):
        self.origin, self.count = origin, 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, features: torch.Tensor) -> None:
        """Take in features [B,D] of any float type, B >= 0.

        Raises:
            KilnError: another D, or a value that is not finite.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise KilnError(
                f"features of shape {list(features.shape)}, expected [B,{len(self.mean)}]",
                "use one extractor for all images",
            )
        bad = (~features.isfinite()).any(dim=1).nonzero()
        if len(bad):
            row = self.count + int(bad[0])
            raise KilnError(
                f"feature row {row} of extractor {self.origin.extractor} is not finite",
                "check the extractor's weights, and that the pictures are finite before they become uint8",
            )
        if len(features):
            features = features.detach().cpu().double()
            mean = features.mean(dim=0)
            centred = features - mean
            self._join(len(features), mean, centred.T @ centred)

    def _join(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        if not count:
            return
        total, delta = self.count + count, mean - self.mean
        self.scatter += scatter
        self.scatter.addr_(delta, delta, alpha=self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    def covariance(self) -> torch.Tensor:
        """Unbiased covariance [D,D] float64, divided by n - 1.

        Raises:
            KilnError: fewer than two images.
        """
        if self.count < 2:
            raise KilnError(f"{self.count} images have no covariance; expected 2 or more", "give more images")
        return self.scatter / (self.count - 1)

    def save(self, path: Path) -> None:
        """Write as the one group of a file; see `save_groups`."""
        save_groups(path, [self])

    @classmethod
    def load(cls, path: Path) -> "FeatureStatistics":
        """All groups of a file together.

        Raises:
            KilnError: the file is missing, damaged, or of another kind.
        """
        return merge(load_groups(path))


def group_count(images: int) -> int:
    """Groups that so many images are dealt to: ten, or fewer such that each has two images, but at least two.

    Raises:
        KilnError: fewer than four images.
    """
    if images < 4:
        raise KilnError(
            f"{images} images are too few for an interval of their distance; expected 4 or more", "give more images"
        )
    return min(GROUPS, images // 2)


def save_groups(path: Path, groups: Sequence[FeatureStatistics]) -> None:
    """Write means [G,D] and scatters [G,D,D] as safetensors, atomically.

    One metadata key holds, as sorted JSON, the origin of them all and `n`, the list of counts.
    """
    facts = json.dumps({"n": [one.count for one in groups]} | asdict(groups[0].origin), sort_keys=True)
    tensors = {
        "mean": torch.stack([one.mean for one in groups]), "scatter": torch.stack([one.scatter for one in groups])
    }  # fmt: skip
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"kiln": facts})


def load_groups(path: Path) -> list[FeatureStatistics]:
    """What `save_groups` wrote.

    Raises:
        KilnError: the file is missing, damaged, or of another kind.
    """
    again = "delete it and run again"
    try:
        with safe_open(path, framework="pt") as handle:
            facts = json.loads((handle.metadata() or {})["kiln"])
            mean, scatter = handle.get_tensor("mean"), handle.get_tensor("scatter")
        counts = [int(n) for n in facts.pop("n")]
        origin = Origin(**facts)
    except Exception as error:  # safetensors raises an error class of its own
        raise KilnError(f"{path}: no feature statistics: {error}", again) from None
    expected = (len(counts), mean.shape[-1], mean.shape[-1])
    if (
        (*mean.shape, mean.shape[-1]) != expected or scatter.shape != expected
        or {mean.dtype, scatter.dtype} != {torch.float64} or min(counts, default=-1) < 0
    ):  # fmt: skip
        raise KilnError(
            f"{path}: no feature statistics: n = {counts}, mean {list(mean.shape)} {mean.dtype}, "
            f"scatter {list(scatter.shape)} {scatter.dtype}; expected [G,D] and [G,D,D] float64",
            again,
        )
    groups = []
    for number, count in enumerate(counts):
        one = FeatureStatistics(0, origin)
        one.count, one.mean, one.scatter = count, mean[number], scatter[number]
        groups.append(one)
    return groups


def merge_parts(files: Sequence[Path], groups: int) -> list[FeatureStatistics]:
    """The groups of a split from the files of its parts, of which the p-th belongs to group p modulo `groups`."""
    return [merge(FeatureStatistics.load(file) for file in files[group::groups]) for group in range(groups)]


def merge(partials: Iterable[FeatureStatistics]) -> FeatureStatistics:
    """The statistics of all shards together; the result depends on their order alone, so give them in shard order.

    Shards are taken one at a time.

    Raises:
        KilnError: no partials, or partials that differ in any field of `Origin` or in D.
    """
    total = None
    for number, partial in enumerate(partials):
        if total is None:
            total = FeatureStatistics(len(partial.mean), partial.origin)
        _check_same(total, partial, tuple(asdict(total.origin)), f"shard {number}")
        total._join(partial.count, partial.mean, partial.scatter)
    if total is None:
        raise KilnError("no feature statistics to merge", "the list of images is empty: check the split")
    return total


def _check_same(a: FeatureStatistics, b: FeatureStatistics, fields: Sequence[str], what: str) -> None:
    unlike = [
        f"{name} {getattr(b.origin, name)!r}, expected {getattr(a.origin, name)!r}"
        for name in fields
        if getattr(a.origin, name) != getattr(b.origin, name)
    ]
    if len(a.mean) != len(b.mean):
        unlike.append(f"dimension {len(b.mean)}, expected {len(a.mean)}")
    if unlike:
        raise KilnError(
            f"{what}: feature statistics that do not compare: {'; '.join(unlike)}",
            "take both with the same extractor, weights and preprocessing: delete the older one and run again",
        )


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """||mu_a - mu_b||^2 + tr S_a + tr S_b - 2 sum sqrt(eig(S_a S_b)), by torch-fidelity's own function.

    Heusel et al. 2017 (arXiv:1706.08500), eq. 6; S is the unbiased covariance. Rounding may put the distance of
    equal sets a little below 0. `warnings` says where the value compares with no published one.

    Raises:
        KilnError: other preprocessing, extractor, weights or dimension; fewer than two images.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    _check_same(a, b, COMPARED, "Fréchet distance")
    stats = [{"mu": s.mean.numpy(), "sigma": s.covariance().numpy()} for s in (a, b)]
    return float(fid_statistics_to_metric(*stats, verbose=False)[KEY_METRIC_FID])


def distance_with_leave_outs(
    a: Sequence[FeatureStatistics], b: Sequence[FeatureStatistics], name: str
) -> tuple[float, list[float]]:
    """(distance of all images, [G] distances without one group each, which is left out of both sides).

    Raises:
        KilnError: see `frechet_distance`; also groups of other sizes on the two sides.
    """
    sizes = [[one.count for one in side] for side in (a, b)]
    if sizes[0] != sizes[1] or len(a) < 2:
        raise KilnError(
            f"{name}: groups of {sizes[0]} and {sizes[1]} images; expected the same two or more on both sides",
            "take both of one list of images: delete the older one and run again",
        )
    found = []
    for left in progress.bar(range(-1, len(a)), f"distances of {name}"):
        found.append(frechet_distance(*(merge(one for i, one in enumerate(side) if i != left) for side in (a, b))))
    return found[0], found[1:]


def warnings(reference: FeatureStatistics, other: FeatureStatistics) -> list[str]:
    """Why the distance of the two is no rFID as published, a line each; empty for the paper's protocol.

    The protocol: the same 50,000 validation images on both sides, comparable features, more images than dimensions.
    """
    dim, found = len(reference.mean), []
    for side, n in (("reference", reference.count), ("other", other.count)):
        if n <= dim:
            found.append(f"rank-deficient covariance ({side}: {n} images, {dim} dimensions), not comparable")
    counts = sorted({reference.count, other.count})
    splits = sorted({reference.origin.split, other.origin.split})
    if counts != [PROTOCOL_IMAGES] or splits != ["validation"]:
        n, split = " and ".join(map(str, counts)), " and ".join(splits)
        found.append(f"not the paper's protocol (n = {n}, {split} images; expected {PROTOCOL_IMAGES} validation)")
    if reference.origin.images != other.origin.images:
        found.append("the reference is of other images than the reconstructions, not an rFID")
    return found + sorted({reference.origin.label, other.origin.label} - {""})
