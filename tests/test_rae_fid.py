"""rFID, PSNR, SSIM and the crops they rest on, against formulas written out here in float64."""

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import rae_fixtures
import scipy.linalg
import torch
import torch_fidelity
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch_fidelity import feature_extractor_inceptionv3, metric_fid

from scripts.common import parts, statistics
from scripts.common.errors import KilnError
from scripts.rae import crops, extractors, fid, quality

ORIGIN = fid.Origin("a" * 64, "validation", "ADM centre crop 256, uint8", "inception-v3-compat", "b" * 64)


def draw(n, dim=24, seed=0, scale=1.0):
    """Correlated features [n,dim] float64 that are far from the origin."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(dim, dim)) / dim**0.5
    return scale * generator.normal(size=(n, dim)) @ mixing + generator.normal(size=dim) + 5


def gather(features, batch=64, **origin):
    """Statistics of [n,D], taken in batches."""
    made = fid.FeatureStatistics(features.shape[1], dataclasses.replace(ORIGIN, **origin))
    for start in range(0, len(features), batch):
        made.add(torch.as_tensor(features[start : start + batch]))
    return made


def same_gaussian(n, dim, deviations, mean, seed):
    """Features whose sample mean and unbiased covariance are exactly `mean` and diag(deviations^2)."""
    raw = np.random.default_rng(seed).normal(size=(n, dim))
    raw -= raw.mean(axis=0)
    orthonormal, _ = np.linalg.qr(raw)
    return orthonormal * (n - 1) ** 0.5 * deviations + mean


# ---- statistics


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.lists(st.integers(0, 11), max_size=5))
def test_any_batches_in_any_shards_give_the_moments_of_all(batches, cuts):
    features = draw(sum(batches) + 2, dim=5, seed=1)
    pieces = np.split(features, np.cumsum(batches))
    shards = [list(piece) for piece in np.split(np.arange(len(pieces)), sorted(min(c, len(pieces)) for c in cuts))]
    partials = []
    for shard in shards:
        partial = fid.FeatureStatistics(5, ORIGIN)
        for number in shard:
            partial.add(torch.from_numpy(pieces[number]))
        partials.append(partial)
    whole = fid.merge(partials)
    assert whole.count == len(features)
    np.testing.assert_allclose(whole.mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(whole.covariance(), np.cov(features, rowvar=False), rtol=1e-9, atol=1e-12)


def test_the_batch_size_does_not_matter():
    a, b = draw(700), draw(700, seed=1)
    scores = [fid.frechet_distance(gather(a, batch), gather(b, batch)) for batch in (16, 64, 256)]
    assert scores[0] > 1
    np.testing.assert_allclose(scores, scores[0], rtol=1e-9)


def test_a_large_mean_costs_no_precision():
    features = draw(500, dim=6) + 1e6
    exact = np.cov(features - features.mean(axis=0), rowvar=False)
    np.testing.assert_allclose(gather(features, 7).covariance(), exact, rtol=1e-8, atol=1e-9)


def test_shards_merged_in_order_are_the_same_bytes_for_any_number_of_processes(tmp_path):
    shards = np.array_split(draw(311), 7)
    files = []
    for ranks in (1, 2, 3, 5):
        folder = tmp_path / str(ranks)
        for rank in range(ranks):
            for number in range(rank, len(shards), ranks):
                gather(shards[number], 16).save(folder / f"{number}.safetensors")
        partials = [fid.FeatureStatistics.load(folder / f"{number}.safetensors") for number in range(len(shards))]
        fid.merge(partials).save(folder / "all.safetensors")
        files.append((folder / "all.safetensors").read_bytes())
    assert len(set(files)) == 1


def test_half_precision_features_are_summed_in_float64():
    features = torch.from_numpy(draw(4096, dim=3)).half()
    made = gather(features, 32)
    assert made.mean.dtype == torch.float64
    np.testing.assert_allclose(made.mean, features.double().mean(dim=0), rtol=1e-12)


def test_saved_statistics_come_back_whole(tmp_path):
    made = gather(draw(50), label="random features, not comparable")
    made.save(tmp_path / "sub/stats.safetensors")
    loaded = fid.FeatureStatistics.load(tmp_path / "sub/stats.safetensors")
    assert (loaded.count, loaded.origin) == (50, made.origin)
    assert torch.equal(loaded.mean, made.mean) and torch.equal(loaded.scatter, made.scatter)
    with safe_open(tmp_path / "sub/stats.safetensors", framework="pt") as handle:
        (text,) = handle.metadata().values()
    facts = json.loads(text)
    assert text == json.dumps(facts, sort_keys=True)
    assert facts == {"n": [50]} | dataclasses.asdict(made.origin)
    loaded.add(torch.from_numpy(draw(10, seed=3)))
    assert loaded.count == 60


def test_damaged_statistics_are_refused(tmp_path):
    path = tmp_path / "stats.safetensors"
    with pytest.raises(KilnError, match="stats.safetensors"):
        fid.FeatureStatistics.load(path)
    made = gather(draw(50))
    made.save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(KilnError, match="stats.safetensors"):
        fid.FeatureStatistics.load(path)
    save_file({"mean": made.mean, "scatter": made.scatter}, path)
    with pytest.raises(KilnError, match="kiln"):
        fid.FeatureStatistics.load(path)
    good = {"mean": made.mean[None], "scatter": made.scatter[None], "n": [50]}
    for wrong in (
        {"scatter": good["scatter"][:, :, :3].clone()}, {"mean": good["mean"].float()}, {"mean": made.mean},
        {"n": [50, 50]}, {"n": [-1]},
    ):  # fmt: skip
        tensors = good | wrong
        facts = json.dumps({"n": tensors.pop("n")} | dataclasses.asdict(ORIGIN))
        save_file(tensors, path, metadata={"kiln": facts})
        with pytest.raises(KilnError, match="expected .G,D. and .G,D,D. float64"):
            fid.FeatureStatistics.load(path)


def test_features_that_cannot_be_are_refused():
    made = gather(draw(20))
    with pytest.raises(KilnError, match=r"\[4, 23\], expected \[B,24\]"):
        made.add(torch.zeros(4, 23))
    features = torch.zeros(4, 24)
    features[2, 5] = float("nan")
    with pytest.raises(KilnError, match="row 22 of extractor inception-v3-compat"):
        made.add(features)
    assert made.count == 20
    with pytest.raises(KilnError, match="1 images have no covariance"):
        fid.frechet_distance(made, gather(draw(1)))
    with pytest.raises(KilnError, match="no feature statistics to merge"):
        fid.merge([])


def test_image_lists_differ_by_order_and_by_where_a_name_ends():
    lists = (["a", "b"], ["b", "a"], ["ab"], ["a", "b", ""], [])
    assert len({fid.image_list_hash(names) for names in lists}) == len(lists)


# ---- the distance


def test_equals_torch_fidelity_on_the_same_features():
    a, b = draw(900, dim=64), draw(700, dim=64, seed=1, scale=1.3)
    theirs = metric_fid.fid_statistics_to_metric(
        *(metric_fid.fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)), verbose=False
    )
    ours = fid.frechet_distance(gather(a, 13), gather(b, 100))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_equals_the_published_formula():
    a, b = draw(900, dim=40), draw(700, dim=40, seed=1, scale=1.3)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert fid.frechet_distance(gather(a), gather(b)) == pytest.approx(expected, rel=1e-8)


def test_diagonal_gaussians_have_a_closed_form():
    deviations = np.linspace(0.5, 3, 12), np.linspace(2, 1, 12)
    means = np.zeros(12), np.linspace(0, 1, 12)
    a, b = (same_gaussian(60, 12, d, m, seed) for seed, (d, m) in enumerate(zip(deviations, means, strict=True)))
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    assert fid.frechet_distance(gather(a), gather(b)) == pytest.approx(expected, rel=1e-10)


def test_a_distance_to_itself_is_zero_and_sides_may_swap():
    a, b = gather(draw(200)), gather(draw(200, seed=1))
    assert abs(fid.frechet_distance(a, a)) < 1e-6
    assert fid.frechet_distance(a, b) == pytest.approx(fid.frechet_distance(b, a), rel=1e-9)


@pytest.mark.parametrize("field", ["preprocessing", "extractor", "weights"])
def test_statistics_of_another_origin_do_not_compare(field):
    a, b = gather(draw(50)), gather(draw(50), **{field: "another"})
    with pytest.raises(KilnError, match=f"{field} 'another', expected"):
        fid.frechet_distance(a, b)
    with pytest.raises(KilnError, match="shard 1"):
        fid.merge([a, b])


def test_other_dimensions_and_shards_of_other_lists_do_not_compare():
    with pytest.raises(KilnError, match="dimension 23, expected 24"):
        fid.frechet_distance(gather(draw(50)), gather(draw(50, dim=23)))
    with pytest.raises(KilnError, match="shard 1.*images"):
        fid.merge([gather(draw(50)), gather(draw(50), images="c" * 64)])


def test_warnings_name_each_departure_from_the_protocol():
    few = draw(24)
    deficient = fid.warnings(gather(few), gather(few))
    assert [line.split(" (")[0] for line in deficient] == ["rank-deficient covariance"] * 2 + [
        "not the paper's protocol"
    ]
    assert "other: 24 images, 24 dimensions), not comparable" in deficient[1] and "n = 24," in deficient[2]
    (short,) = fid.warnings(gather(draw(25)), gather(draw(25)))
    assert short.startswith("not the paper's protocol (n = 25,")

    whole = gather(np.repeat(few[:1], 50_000, axis=0), 10_000)
    assert fid.warnings(whole, whole) == []
    for change, words in (
        ({"split": "train"}, "train and validation images"),
        ({"images": "c" * 64}, "other images"),
        ({"label": "random features, not comparable"}, "random features, not comparable"),
    ):
        other = fid.FeatureStatistics(24, dataclasses.replace(ORIGIN, **change))
        other.count = 50_000
        (line,) = fid.warnings(whole, other)
        assert words in line
    other = fid.FeatureStatistics(24, ORIGIN)
    other.count = 49_999
    assert "n = 49999 and 50000" in fid.warnings(whole, other)[0]


# ---- groups and the jackknife


def dealt(features, groups, **origin):
    """Statistics of the groups of [n,D]: row r is of group r modulo `groups`."""
    return [gather(features[group::groups], 16, **origin) for group in range(groups)]


def slow_distance(a, b):
    """The published formula on features [n,D] themselves."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)


def reconstructed(originals, seed):
    """Features of something like `originals`."""
    noise = np.random.default_rng(seed).normal(size=originals.shape)
    return 0.9 * originals + 0.3 * noise + 0.2


def test_the_jackknife_leaves_each_group_out_of_both_sides():
    a = draw(107, dim=6)
    b, groups = reconstructed(a, 1), 7
    value, left_out = fid.distance_with_leave_outs(dealt(a, groups), dealt(b, groups), "a test")
    rows = np.arange(len(a))
    expected = [slow_distance(a[rows % groups != g], b[rows % groups != g]) for g in range(groups)]
    assert value == pytest.approx(slow_distance(a, b), rel=1e-9)
    np.testing.assert_allclose(left_out, expected, rtol=1e-8)
    error, (low, high) = statistics.jackknife_interval(value, left_out, least=0)
    variance = sum((x - sum(expected) / groups) ** 2 for x in expected) * (groups - 1) / groups
    assert error == pytest.approx(variance**0.5, rel=1e-6)
    quantile = 2.4469118511449692  # of Student's t with 6 degrees of freedom at 0.975, from a table
    assert (low, high) == pytest.approx((value - quantile * error, value + quantile * error), rel=1e-6)


def test_intervals_hold_the_distance_of_so_many_pictures():
    """Gaussian features: of 200 samples, the interval holds the mean distance at that n in about 95 of 100."""
    n, found = 300, []
    for seed in range(200):
        a = np.random.default_rng(seed).normal(size=(n, 4))
        b = reconstructed(a, seed + 1000)
        value, left_out = fid.distance_with_leave_outs(dealt(a, 10), dealt(b, 10), "a test")
        found.append((value, *statistics.jackknife_interval(value, left_out, least=0)[1]))
    values, low, high = np.array(found).T
    held = ((low <= values.mean()) & (values.mean() <= high)).mean()
    assert 0.88 < held <= 0.99
    assert (high - low).mean() < 8 * values.std()


def test_an_interval_does_not_pass_its_least_value():
    assert statistics.jackknife_interval(0.5, [0.0, 1.0, 2.0], least=0)[1][0] == 0
    assert statistics.jackknife_interval(-1e-9, [-1e-9, -1e-9], least=0) == (0, (0, 0))
    with pytest.raises(KilnError, match="at least two"):
        statistics.jackknife_interval(1.0, [1.0])


def test_groups_have_two_pictures_each():
    assert [fid.group_count(n) for n in (4, 5, 6, 19, 20, 21, 50_000)] == [2, 2, 3, 9, 10, 10, 10]
    with pytest.raises(KilnError, match="3 images.*expected 4 or more"):
        fid.group_count(3)


def test_saved_groups_come_back_whole(tmp_path):
    groups = dealt(draw(23), 3)
    fid.save_groups(tmp_path / "g.safetensors", groups)
    loaded = fid.load_groups(tmp_path / "g.safetensors")
    assert [one.count for one in loaded] == [8, 8, 7]
    assert all(
        torch.equal(x.scatter, y.scatter) and torch.equal(x.mean, y.mean) for x, y in zip(loaded, groups, strict=True)
    )
    whole = fid.FeatureStatistics.load(tmp_path / "g.safetensors")
    np.testing.assert_allclose(whole.covariance(), gather(draw(23)).covariance(), rtol=1e-9, atol=1e-12)


def test_groups_of_other_sizes_do_not_compare():
    with pytest.raises(KilnError, match=r"\[5, 5\] and \[6, 5\] images"):
        fid.distance_with_leave_outs(dealt(draw(10), 2), dealt(draw(11), 2), "a test")


class OneOf:
    """What `parts.built` asks of an accelerator, for a process of several that work one after the other."""

    def __init__(self, process_index, num_processes):
        self.process_index, self.num_processes = process_index, num_processes
        self.is_main_process = process_index == 0

    def wait_for_everyone(self):
        pass


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 7), st.integers(1, 4))
def test_parts_deal_every_row_to_its_group_whatever_the_processes(items, per_part, groups, processes):
    groups = min(groups, items)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:

        def build(part, _, file):
            assert file not in rows and 0 < len(part) <= per_part
            rows[file] = list(part)

        for index in reversed(range(processes)):
            with parts.built(
                Path(folder), "key", items, per_part, iter, build, OneOf(index, processes), "a test", groups
            ) as files:
                pass
    assert set(files) == set(rows)
    for group in range(groups):
        together = [row for file in files[group::groups] for row in rows[file]]
        assert together == list(range(group, items, groups))


# ---- PSNR and SSIM


def pictures(n=3, height=23, width=31, seed=0):
    """A smooth and noisy uint8 batch [n,3,H,W] and a damaged copy."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (2 + i) + c) + np.cos(y / (3 + c) + i) for i in range(n) for c in range(3)]
    smooth = 127 + 50 * np.stack(waves).reshape(n, 3, height, width)
    noise = generator.normal(size=smooth.shape) * np.linspace(4, 40, n)[:, None, None, None]
    a, b = (np.clip(np.round(p), 0, 255).astype(np.uint8) for p in (smooth, smooth + noise))
    return torch.from_numpy(a), torch.from_numpy(b)


def slow_ssim(a, b):
    """SSIM of [3,H,W] in [0,1] window by window, with the 11x11 weights spelt out (Wang et al. 2004, eq. 13-16)."""
    i, j = np.mgrid[-5:6, -5:6]
    weights = np.exp(-(i**2 + j**2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for x, y in zip(a, b, strict=True):
        for top in range(x.shape[0] - 10):
            for left in range(x.shape[1] - 10):
                p, q = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
                mp, mq = (weights * p).sum(), (weights * q).sum()
                vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
                cov = (weights * (p - mp) * (q - mq)).sum()
                high = (2 * mp * mq + 0.01**2) * (2 * cov + 0.03**2)
                values.append(high / ((mp**2 + mq**2 + 0.01**2) * (vp + vq + 0.03**2)))
    return np.mean(values)


def test_ssim_equals_the_windowed_formula():
    a, b = pictures()
    expected = [slow_ssim(x.numpy() / 255, y.numpy() / 255) for x, y in zip(a, b, strict=True)]
    found = quality.ssim(a, b)
    assert found.dtype == torch.float64 and expected[0] > expected[-1] + 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    np.testing.assert_allclose(quality.ssim(a, a), 1, rtol=1e-12)


def test_psnr_is_of_each_picture_and_peaks_at_255():
    a, b = pictures()
    difference = a.numpy().astype(np.float64) - b.numpy()
    expected = [10 * np.log10(255**2 / np.mean(d**2)) for d in difference]
    np.testing.assert_allclose(quality.psnr(a, b), expected, rtol=1e-12)
    assert quality.psnr(torch.zeros(1, 3, 4, 4).byte(), torch.full((1, 3, 4, 4), 255).byte()).item() == 0
    assert quality.psnr(a, a).tolist() == pytest.approx([100.0] * 3)


@pytest.mark.parametrize("metric", [quality.psnr, quality.ssim])
def test_batches_do_not_change_a_picture_s_value(metric):
    a, b = pictures(5)
    alone = torch.cat([metric(a[i : i + 1], b[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(metric(a, b), alone, rtol=1e-13)
    np.testing.assert_allclose(metric(b, a), alone, rtol=1e-12)


def test_uint8_is_clamped_and_rounded():
    values = torch.tensor([-0.02, 0.0, 0.4999 / 255, 0.51 / 255, 127.4 / 255, 127.6 / 255, 254.7 / 255, 1.0, 1.02])
    found = quality.to_uint8(values)
    assert found.dtype == torch.uint8
    assert found.tolist() == [0, 0, 0, 1, 127, 128, 255, 255, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(quality.to_uint8(every.float() / 255), every)
    assert torch.equal(quality.to_uint8(every.double() / 255), every)


def test_pictures_that_cannot_be_compared_are_refused():
    a, b = pictures()
    with pytest.raises(KilnError, match="1 of 4 values"):
        quality.to_uint8(torch.tensor([0.0, 1.0, float("nan"), 0.5]))
    for metric in (quality.psnr, quality.ssim):
        with pytest.raises(KilnError, match="to_uint8"):
            metric(a, b.float() / 255)
        with pytest.raises(KilnError, match="expected uint8"):
            metric(a, b[:1])
    with pytest.raises(KilnError, match="11 pixels a side"):
        quality.ssim(a[..., :10], b[..., :10])


# ---- extractors


class Pictures(torch.utils.data.Dataset):
    """uint8 [3,H,W] one by one, as torch-fidelity reads them."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def noise_pictures(n, seed=0, size=24, high=256):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, high, (n, 3, size, size), dtype=np.uint8))


def extracted(extractor, images, batch):
    return torch.cat([extractor(part) for part in images.split(batch)])


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    path = rae_fixtures.inception_weights(tmp_path_factory.mktemp("inception") / "inception.pth")
    yield path
    path.unlink()


def test_a_score_of_pictures_equals_torch_fidelity_s_own():
    extractor = extractors.load_extractor("kiln-random", None)
    sides = noise_pictures(90), noise_pictures(80, seed=1, high=200)
    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(sides[0]), input2=Pictures(sides[1]), cuda=False, fid=True, verbose=False, cache=False,
        batch_size=16, feature_extractor="kiln-random", feature_layer_fid="64", save_cpu_ram=True,
    )  # fmt: skip
    for batch in (7, 80):
        found = fid.frechet_distance(*(gather(extracted(extractor, side, batch), 32) for side in sides))
        assert found == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)


def test_random_features_say_so_and_stay_the_same():
    first, again = (extractors.load_extractor("kiln-random", None) for _ in range(2))
    assert (first.name, first.dim, first.comparable) == ("kiln-random", 64, False)
    assert first.label == "random features, not comparable"
    assert first.weights_sha256 == again.weights_sha256
    images = noise_pictures(5)
    features = first(images)
    assert features.shape == (5, 64) and features.dtype == torch.float64
    assert torch.equal(features, again(images))
    exact = extractors.load_extractor("kiln-random", None, dtype="float64")
    assert exact.weights_sha256 == first.weights_sha256
    np.testing.assert_allclose(features, exact(images), rtol=1e-4, atol=1e-6)


def test_random_features_are_means_of_rectified_convolutions():
    extractor = extractors.load_extractor("kiln-random", None, dtype="float64")
    images = noise_pictures(2, size=7)
    maps, expected = images.numpy() / 127.5 - 1, []
    for number, layer in enumerate(extractor.model.layers):
        weight, step = layer.weight.numpy(), 1 if number == 0 else 2
        padded = np.pad(maps, ((0, 0), (0, 0), (1, 1), (1, 1)))
        side = (maps.shape[2] - 1) // step + 1
        found = np.zeros((2, len(weight), side, side))
        for y, x in np.ndindex(side, side):
            window = padded[:, :, y * step : y * step + 3, x * step : x * step + 3]
            found[:, :, y, x] = np.einsum("bchw,ochw->bo", window, weight)
        maps = np.maximum(found, 0)
        expected.append(maps.mean(axis=(2, 3)))
    np.testing.assert_allclose(extractor(images), np.concatenate(expected, axis=1), rtol=1e-6)


def test_blur_raises_the_score_of_random_features():
    extractor = extractors.load_extractor("kiln-random", None)
    sharp = noise_pictures(100, size=16)
    mild, strong = (
        quality.to_uint8(torch.nn.functional.interpolate(
            torch.nn.functional.avg_pool2d(sharp / 255, k), scale_factor=k
        )) for k in (2, 8)
    )  # fmt: skip
    reference, *others = (gather(extractor(side)) for side in (sharp, mild, strong))
    scores = [fid.frechet_distance(reference, other) for other in others]
    assert 0.01 < scores[0] < scores[1]


def test_inception_is_torch_fidelity_s_own_and_says_that_its_weights_are_not(inception):
    extractor = extractors.load_extractor("inception-v3-compat", inception)
    assert (extractor.name, extractor.dim, extractor.comparable) == ("inception-v3-compat", 2048, False)
    assert "not comparable" in extractor.label
    images = noise_pictures(4, size=40)
    own = feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(inception)
    )
    (expected,) = own(images)
    features = extractor(images)
    assert features.dtype == torch.float64 and expected.std() > 1e-3
    np.testing.assert_allclose(features, expected.double(), rtol=1e-5, atol=1e-5 * float(expected.max()))

    double = extractors.load_extractor("inception-v3-compat", inception, dtype="float64")
    assert double.weights_sha256 == extractor.weights_sha256
    together, apart = double(images[:2]), extracted(double, images[:2], 1)
    np.testing.assert_allclose(together, apart, rtol=2e-7)
    np.testing.assert_allclose(together, features[:2], rtol=1e-3, atol=1e-4 * float(expected.max()))


def test_the_published_weights_are_known_by_their_hash(inception, monkeypatch):
    found = extractors.load_extractor("inception-v3-compat", inception).weights_sha256
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", found)
    extractor = extractors.load_extractor("inception-v3-compat", inception)
    assert extractor.comparable and extractor.label == ""


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_weights_that_cannot_be_used_are_refused(inception, tmp_path):
    name, path = "inception-v3-compat", tmp_path / "w.pth"
    with pytest.raises(KilnError, match="w.pth: no such weights"):
        extractors.load_extractor(name, path)
    with pytest.raises(KilnError, match="needs a file"):
        extractors.load_extractor(name, None)
    path.write_bytes(inception.read_bytes()[:100_000])
    with pytest.raises(KilnError, match="w.pth: unreadable"):
        extractors.load_extractor(name, path)
    torch.save({"fc.weight": torch.zeros(3)}, path)
    with pytest.raises(KilnError, match="w.pth: not the weights of inception-v3-compat"):
        extractors.load_extractor(name, path)
    torch.save(Bomb(tmp_path / "ran"), path)
    with pytest.raises(KilnError, match="w.pth: unreadable"):
        extractors.load_extractor(name, path)
    assert not (tmp_path / "ran").exists()


def test_other_misuse_of_extractors_is_refused(tmp_path):
    with pytest.raises(KilnError, match="unknown feature extractor 'inception'"):
        extractors.load_extractor("inception", None)
    with pytest.raises(KilnError, match="float16"):
        extractors.load_extractor("kiln-random", None, dtype="float16")
    with pytest.raises(KilnError, match="draws its own weights"):
        extractors.load_extractor("kiln-random", tmp_path / "w.pth")
    extractor = extractors.load_extractor("kiln-random", None)
    for images in (torch.rand(2, 3, 8, 8), torch.zeros(2, 1, 8, 8).byte(), torch.zeros(3, 8, 8).byte()):
        with pytest.raises(KilnError, match=r"expected uint8 \[B,3,H,W\]"):
            extractor(images)


# ---- crops


def picture(width, height, seed=0):
    """A picture with edges, waves and noise."""
    y, x = np.mgrid[:height, :width]
    base = 120 + 60 * np.sin(x / 7)[..., None] * np.cos(y / 5)[..., None] + 40 * ((x // 9 + y // 11) % 2)[..., None]
    noisy = base + np.random.default_rng(seed).normal(size=(height, width, 3)) * 20
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def kernel_box(t):
    return ((t > -0.5) & (t <= 0.5)).astype(np.float64)


def kernel_cubic(t, a=-0.5):
    """Keys 1981 with a = -0.5."""
    t = np.abs(t)
    near, far = (a + 2) * t**3 - (a + 3) * t**2 + 1, a * (t**3 - 5 * t**2 + 8 * t - 4)
    return np.where(t < 1, near, np.where(t < 2, far, 0))


def resample(array, size, axis, kernel, support):
    """Antialiased resampling of one axis in float64, then 8-bit levels: the kernel widens as the picture shrinks."""
    old = array.shape[axis]
    scale = old / size
    widen = max(scale, 1)
    weights = np.zeros((size, old))
    for i in range(size):
        centre = (i + 0.5) * scale
        low, high = max(int(centre - support * widen + 0.5), 0), min(int(centre + support * widen + 0.5), old)
        row = kernel((np.arange(low, high) - centre + 0.5) / widen)
        weights[i, low:high] = row / row.sum()
    moved = np.tensordot(weights, array, axes=(1, axis))
    return np.clip(np.floor(np.moveaxis(moved, 0, axis) + 0.5), 0, 255)


def resized(array, width, height, kernel, support):
    return resample(resample(array, width, 1, kernel, support), height, 0, kernel, support)


def slow_center_crop(image, size):
    array = np.asarray(image).astype(np.float64)
    while min(array.shape[:2]) >= 2 * size:
        array = resized(array, array.shape[1] // 2, array.shape[0] // 2, kernel_box, 0.5)
    scale = size / min(array.shape[:2])
    array = resized(array, round(array.shape[1] * scale), round(array.shape[0] * scale), kernel_cubic, 2)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize(
    "shape", [(64, 64), (65, 63), (127, 129), (128, 128), (261, 517), (391, 307), (31, 45), (200, 65), (64, 333)]
)
def test_the_centre_crop_is_adm_s(shape):
    image = picture(*shape)
    found, expected = np.asarray(crops.center_crop_arr(image, 64)).astype(np.float64), slow_center_crop(image, 64)
    assert found.shape == (64, 64, 3)
    difference = np.abs(found - expected)
    assert difference.max() <= 2 and difference.mean() < 0.02  # Pillow weighs with integers, so a level may tip over


def test_the_centre_crop_is_no_single_resize():
    image = picture(401, 401)
    single = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)).astype(float)
    assert np.abs(single - np.asarray(crops.center_crop_arr(image, 64))).mean() > 0.5


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 40))
def test_crops_are_squares_of_any_picture(width, height, size):
    image = Image.new("RGB", (width, height), (10, 200, 30))
    cut = np.asarray(crops.center_crop_arr(image, size))
    assert cut.shape == (size, size, 3) and (cut == (10, 200, 30)).all()
    drawn = crops.random_crop(image, size, torch.Generator().manual_seed(0))
    assert drawn.shape == (3, size, size) and drawn.dtype == torch.float32
    assert torch.equal(quality.to_uint8(drawn).flatten(1).unique(dim=1).flatten(), torch.tensor([10, 200, 30]).byte())


@pytest.mark.parametrize("shape", [(500, 375), (333, 517), (40, 31)])
def test_the_random_crop_is_the_published_transform(shape):
    image = picture(*shape)
    published = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(384, interpolation=torchvision.transforms.InterpolationMode.BICUBIC),
            torchvision.transforms.RandomCrop(256),
            torchvision.transforms.ToTensor(),
        ]
    )
    for seed in range(3):
        torch.manual_seed(seed)
        expected = published(image)
        state = torch.random.get_rng_state()
        found = crops.random_crop(image, 256, torch.Generator().manual_seed(seed))
        assert torch.equal(found, expected)
        assert torch.equal(state, torch.random.get_rng_state())


def test_random_crops_reach_every_place_and_never_flip():
    side = 9  # of a crop of 6: the picture keeps its size, and 4x4 places are possible
    array = np.arange(side * side * 3, dtype=np.uint8).reshape(side, side, 3)
    generator = torch.Generator().manual_seed(0)
    whole = torchvision.transforms.functional.to_tensor(Image.fromarray(array))
    places = {(y, x): whole[:, y : y + 6, x : x + 6] for y in range(4) for x in range(4)}
    seen = set()
    for _ in range(200):
        cut = crops.random_crop(Image.fromarray(array), 6, generator)
        (place,) = [place for place, expected in places.items() if torch.equal(cut, expected)]
        seen.add(place)
    assert seen == set(places)
