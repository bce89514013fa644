"""Threshold, acceptance, best views and their scores: the published rules and reports, by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from vase_fixtures import command_line, error_of, files_below, picture, run, write

from scripts.common import artefacts
from scripts.common.errors import KilnError
from scripts.vase import accept_images, choose_threshold, evaluate_filter, link_classes, select_views

VIEWS = 3
VASES = 12
SIDES = ["train"] * 6 + ["validation"] * 3 + ["test"] * 3


class Case:
    """A folder of images with all tables that the filter reads; a test changes tables before it runs a step."""

    def __init__(self, folder: Path, images: Path):
        self.folder, self.images = folder, images
        rng = np.random.default_rng(8)
        rows = []
        for v in range(VASES):
            for view in range(1, VIEWS + 1):
                path = f"{'ab'[v % 2]}/V{v:02d}_{view}.png"
                high, low = rng.uniform(0, 0.4, 2)
                rows.append(
                    {
                        "path": path, "vase": f"V{v:02d}", "view": str(view), "status": "ok",
                        "bytes": (images / path).stat().st_size, "sha256": artefacts.sha256_file(images / path),
                        "label": int((v + view) % 4 != 0), "probability": 0.5,
                        "high_quality_similarity": high, "low_quality_similarity": low, "score": high - low,
                        "side": SIDES[v],
                    }
                )  # fmt: skip
        self.rows = pd.DataFrame(rows)
        self.quarantined = pd.DataFrame(
            [{"path": "a/broken.png", "vase": "V00", "view": "9", "status": "quarantined", "bytes": 0, "sha256": "e"}]
        )

    def path(self, name):
        return self.folder / name

    def tables(self):
        """Write every table, in shuffled order where order must not matter; {argument: path}."""
        ok = self.rows.sample(frac=1, random_state=1)
        manifest = pd.concat([ok[list(self.quarantined.columns)], self.quarantined])
        scores = ["path", "high_quality_similarity", "low_quality_similarity", "score"]
        made = {
            "manifest": manifest,
            "predictions": ok[["path", "vase", "view", "probability", "label"]],
            "scores": ok[scores],
            "truth": ok[["path"]].assign(quality=ok.get("quality", 0), view_quality=ok.get("view_quality", 0.0)),
        }
        paths = {f"--{name}": write(self.path(f"{name}.parquet"), table) for name, table in made.items()}
        sides = ok[["vase", "side"]].drop_duplicates("vase").assign(group=lambda f: f["vase"])
        return {**paths, "--splits": write(self.path("splits.parquet"), sides, "vase")}

    def arguments(self, names, out):
        tables = self.tables()
        made = [x for n in names for x in (n, tables[n])]
        return [*made, "--output-folder", self.path(out), "--meta", self.path(out) / "meta.json"]

    def threshold(self, **settings):
        arguments = self.arguments(["--scores", "--predictions", "--splits"], "threshold")
        run(choose_threshold.main, *arguments, settings=settings)
        return self.json("threshold/threshold.json"), pd.read_parquet(self.path("threshold/sample.parquet"))

    def accept_arguments(self, threshold, timed=()):
        artefacts.write_json(self.path("t.json"), {"threshold": threshold})
        arguments = self.arguments(["--manifest", "--predictions", "--scores"], "accept")
        extra = ["--timed", *timed] if timed else []
        return [*arguments, "--threshold", self.path("t.json"), "--images", self.images, *extra]

    def accept(self, threshold, timed=()):
        run(accept_images.main, *self.accept_arguments(threshold, timed))
        return self.json("accept/filtering_report.json")

    def select(self, timed=()):
        arguments = self.arguments(["--manifest"], "select")
        extra = ["--timed", *timed] if timed else []
        accepted = self.path("accept/accepted.parquet")
        run(select_views.main, *arguments, "--accepted", accepted, "--images", self.images, *extra)
        return self.json("select/best_views_report.json"), self.json("select/filtering_stats.json")

    def evaluate(self):
        arguments = self.arguments(["--truth", "--manifest", "--splits", "--scores"], "unused")[:-4]
        arguments += ["--images", self.images, "--accepted", self.path("accept/accepted.parquet")]
        arguments += ["--best-views", self.path("select/best_views.parquet")]
        run(
            evaluate_filter.main,
            *arguments,
            "--output",
            self.path("e/metrics.json"),
            "--meta",
            self.path("e/meta.json"),
        )
        return self.json("e/metrics.json")["summary"]

    def json(self, name):
        return json.loads(self.path(name).read_text())

    @property
    def high(self):
        return self.rows[self.rows["label"] == 1]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for v in range(VASES):
        for view in range(1, VIEWS + 1):
            picture(folder / f"{'ab'[v % 2]}/V{v:02d}_{view}.png", 10 * v + view)
    return folder


@pytest.fixture
def case(tmp_path, images):
    return Case(tmp_path, images)


def links_of(folder):
    """{name: resolved target}, after checking that each is a relative link to an existing file."""
    found = {}
    for name in files_below(folder):
        place = folder / name
        if name == "files.json":
            continue
        assert place.is_symlink() and not place.readlink().is_absolute(), name
        found[name] = place.resolve(strict=True)
    return found


# --- threshold ---


@pytest.mark.parametrize("percentile", [0, 10, 25, 62.5, 100])
def test_the_threshold_is_a_percentile_of_the_allowed_sides(case, percentile):
    found, sample = case.threshold(percentile=percentile)
    scores = sorted(case.high.query("side != 'test'")["score"])
    place = percentile / 100 * (len(scores) - 1)  # linear between neighbours, by hand
    low = int(np.floor(place))
    expected = scores[low] + (place - low) * (scores[min(low + 1, len(scores) - 1)] - scores[low])
    assert found["threshold"] == pytest.approx(expected, abs=1e-12)
    assert found["rule"] == "percentile" and found["sampled_images"] == len(scores) == len(sample)
    assert found["share_kept_of_sample"] == np.mean(np.array(scores) >= found["threshold"])


def test_the_published_rule_keeps_about_three_quarters(case):
    found, sample = case.threshold()
    assert found["threshold"] == pytest.approx(np.percentile(sample["score"], 25))
    assert found["share_kept_of_sample"] == pytest.approx(0.75, abs=1 / len(sample))


@pytest.mark.parametrize("sides", [["train"], ["validation"], ["test"], ["train", "validation", "test"]])
def test_only_the_configured_sides_and_high_quality_images_are_sampled(case, sides):
    _, sample = case.threshold(sides=sides)
    expected = case.high[case.high["side"].isin(sides)]
    assert sample["path"].tolist() == sorted(expected["path"])
    assert set(sample["side"]) == set(sides)
    assert set(sample["vase"]) == set(expected["vase"])


def test_the_test_side_is_not_sampled_by_default(case):
    _, sample = case.threshold()
    assert set(sample["side"]) == {"train", "validation"}


def test_a_sample_is_drawn_without_replacement_by_its_seed(case):
    drawn = {seed: case.threshold(sample_size=9, seed=seed)[1] for seed in (1, 2, 3)}
    for sample in drawn.values():
        assert len(sample) == 9 and sample["path"].is_unique
        assert set(sample["path"]) <= set(case.high.query("side != 'test'")["path"])
    assert len({tuple(s["path"]) for s in drawn.values()}) == 3
    found, again = case.threshold(sample_size=9, seed=2)
    pd.testing.assert_frame_equal(again, drawn[2])
    assert found["threshold"] == pytest.approx(np.percentile(again["score"], 25)) and found["sampled_images"] == 9


def test_the_sample_does_not_depend_on_the_order_of_rows():
    frame = pd.DataFrame({"path": [f"{i:03d}" for i in range(100)], "score": np.arange(100.0)})
    one = choose_threshold.draw_sample(frame, 20, 7)
    two = choose_threshold.draw_sample(frame.sample(frac=1, random_state=0), 20, 7)
    pd.testing.assert_frame_equal(one, two)
    assert choose_threshold.draw_sample(frame, 100, 7)["path"].tolist() == frame["path"].tolist()


def test_every_image_is_as_likely_to_be_sampled():
    frame = pd.DataFrame({"path": [f"{i:02d}" for i in range(20)], "score": 0.0})
    counts = pd.concat([choose_threshold.draw_sample(frame, 5, s) for s in range(400)])["path"].value_counts()
    assert len(counts) == 20 and counts.between(60, 145).all()  # 100 expected, sd 8.7


def test_a_fixed_threshold_is_taken_as_it_is(case):
    found, _ = case.threshold(rule="fixed", value=0.125)
    assert found["threshold"] == 0.125 and found["rule"] == "fixed"
    with pytest.raises(KilnError, match="needs `value`"):
        case.threshold(rule="fixed")


def test_the_table_of_percentiles_says_what_each_keeps(case):
    _, sample = case.threshold()
    table = pd.read_csv(case.path("threshold/percentiles.csv"))
    assert table["percentile"].tolist() == [10, 25, 50, 75, 90]
    for row in table.itertuples():
        assert row.threshold == pytest.approx(np.percentile(sample["score"], row.percentile))
        assert row.share_kept == pytest.approx((sample["score"] >= row.threshold - 1e-12).mean())


def test_no_high_quality_image_to_sample_is_said(case):
    case.rows.loc[case.rows["side"] != "test", "label"] = 0
    arguments = case.arguments(["--scores", "--predictions", "--splits"], "threshold")
    said = error_of(command_line("choose_threshold", *arguments))
    count = len(case.high)
    assert f"no high-quality image on side train or validation: {count} of all images are of high quality" in said
    assert not case.path("threshold").exists()


# --- classes ---


def link(case, parts):
    arguments = ["--images", case.images, "--manifest", case.tables()["--manifest"], "--predictions", *parts]
    run(link_classes.main, *arguments, "--output-folder", case.path("l"), "--meta", case.path("l/meta.json"))
    return case.json("l/summary.json")


def prediction_parts(case, rows):
    columns = ["path", "probability", "label"]
    return [write(case.path(f"part{i}.parquet"), rows.iloc[i::2][columns]) for i in (0, 1)]


def test_classes_are_relative_links_that_keep_subfolders(case):
    counts = link(case, prediction_parts(case, case.rows))
    found = links_of(case.path("l/classes"))
    expected = {f"{r.label}/{r.path}": (case.images / r.path).resolve() for r in case.rows.itertuples()}
    assert found == expected
    listing = case.json("l/classes/files.json")
    assert {n: r["sha256"] for n, r in listing.items()} == {n: artefacts.sha256_file(t) for n, t in found.items()}
    low = int((case.rows["label"] == 0).sum())
    assert counts == {"in": 37, "high_quality": 36 - low, "low_quality": low, "quarantined": 1}


def test_links_survive_a_move_of_folder_and_images(case, images):
    shutil.copytree(images, case.path("set/images"))
    case.images = case.path("set/images")
    arguments = ["--images", case.images, "--manifest", case.tables()["--manifest"]]
    out = case.path("set/out")
    parts = prediction_parts(case, case.rows)
    run(link_classes.main, *arguments, "--predictions", *parts, "--output-folder", out, "--meta", out / "meta.json")
    case.path("set").rename(case.path("elsewhere"))
    assert len(links_of(case.path("elsewhere/out/classes"))) == 36


def test_a_class_that_changed_leaves_no_old_link(case):
    link(case, prediction_parts(case, case.rows))
    case.rows["label"] = 1 - case.rows["label"]
    link(case, prediction_parts(case, case.rows))
    assert set(links_of(case.path("l/classes"))) == {f"{r.label}/{r.path}" for r in case.rows.itertuples()}


@pytest.mark.parametrize("lost", ["prediction", "manifest"])
def test_an_image_that_got_lost_on_the_way_is_noticed(case, lost):
    parts = prediction_parts(case, case.rows.iloc[1:] if lost == "prediction" else case.rows)
    if lost == "manifest":
        case.rows = case.rows.iloc[1:]
    with pytest.raises(KilnError, match="vase_link_classes: 3"):
        link(case, parts)
    assert not case.path("l").exists()


# --- acceptance ---

REPORT = ["input_directory", "output_directory", "total_images", "accepted_images", "rejected_images"]
REPORT += ["acceptance_rate", "threshold", "processing_time_seconds", "results"]
RESULT = ["filename", "quality_score", "high_quality_similarity", "low_quality_similarity", "accepted"]


def test_the_acceptance_report_has_the_published_fields_and_values(case):
    threshold = float(case.high["score"].median())
    report = case.accept(threshold)
    assert list(report) == REPORT
    high = case.high.set_index("path").sort_index()
    accepted = high["score"] >= threshold
    assert report["input_directory"] == str(case.images) and report["output_directory"] == str(case.path("accept"))
    assert (report["total_images"], report["accepted_images"]) == (len(high), accepted.sum())
    assert report["rejected_images"] == len(high) - accepted.sum() > 0
    assert report["acceptance_rate"] == pytest.approx(accepted.mean())
    assert report["threshold"] == threshold
    assert [r["filename"] for r in report["results"]] == list(high.index)
    for result in report["results"]:
        assert list(result) == RESULT
        row = high.loc[result["filename"]]
        assert result["quality_score"] == row["score"]
        assert result["high_quality_similarity"] == row["high_quality_similarity"]
        assert result["low_quality_similarity"] == row["low_quality_similarity"]
        assert result["accepted"] is bool(accepted[result["filename"]])


def test_an_image_at_the_threshold_is_accepted(case):
    score = float(case.high["score"].sort_values().iloc[5])
    report = case.accept(score)
    assert report["accepted_images"] == len(case.high) - 5
    assert min(r["quality_score"] for r in report["results"] if r["accepted"]) == score


def test_every_image_is_accounted_for(case):
    report = case.accept(0.0)
    counts = case.json("accept/summary.json")
    low = int((case.rows["label"] == 0).sum())
    assert counts == {
        "in": 37,
        "accepted": report["accepted_images"],
        "rejected": report["rejected_images"],
        "low_quality": low,
        "quarantined": 1,
    }
    assert counts["in"] == sum(v for k, v in counts.items() if k != "in")


def test_accepted_and_rejected_are_relative_links_that_keep_subfolders(case):
    case.accept(0.0)
    accepted, rejected = (links_of(case.path(f"accept/{n}")) for n in ("accepted", "rejected"))
    above = case.high["score"] >= 0
    assert accepted == {p: (case.images / p).resolve() for p in case.high[above]["path"]}
    assert rejected == {p: (case.images / p).resolve() for p in case.high[~above]["path"]}
    table = pd.read_parquet(case.path("accept/accepted.parquet"))
    assert set(table.query("accepted")["path"]) == set(accepted) and set(table["path"]) == {*accepted, *rejected}


def test_a_threshold_that_accepts_all_leaves_an_empty_folder_of_rejected(case):
    report = case.accept(-2.0)
    assert report["rejected_images"] == 0 and report["acceptance_rate"] == 1
    assert files_below(case.path("accept/rejected")) == ["files.json"]


def test_a_threshold_that_rejects_all_says_where_the_scores_are(case):
    said = error_of(command_line("accept_images", *case.accept_arguments(1.5)))
    low, high = case.high["score"].min(), case.high["score"].max()
    assert f"threshold 1.50000 accepts none of {len(case.high)} high-quality images" in said
    assert f"from {low:.5f} to {high:.5f}" in said and "vase.threshold.value" in said
    assert not case.path("accept").exists()


def test_an_image_without_score_is_noticed(case):
    arguments = case.accept_arguments(0.0)
    scores = pd.read_parquet(case.path("scores.parquet"))
    write(case.path("scores.parquet"), scores[scores["path"] != case.high["path"].iloc[0]])
    with pytest.raises(KilnError, match="vase_accept_images: 37 in"):
        run(accept_images.main, *arguments)
    assert not case.path("accept").exists()


def test_the_reported_time_is_that_of_the_named_records(case):
    for name, seconds in (("one", 1.25), ("two", 60.5)):
        artefacts.write_json(case.path(f"{name}.meta.json"), {"wall_seconds": seconds})
    timed = [case.path("one.meta.json"), case.path("two.meta.json")]
    assert case.accept(0.0)["processing_time_seconds"] == 0
    assert case.accept(0.0, timed)["processing_time_seconds"] == 61.75
    report, stats = case.select(timed)
    assert report["processing_time_seconds"] == 61.75
    assert stats["summary"]["processing_time_minutes"] == pytest.approx(61.75 / 60, abs=1e-3)


# --- best views ---

VIEWS_REPORT = ["input_directory", "output_directory", "processing_time_seconds", "total_vases"]
VIEWS_REPORT += ["total_original_images", "total_selected_images", "reduction_rate", "average_clip_score", "results"]
VASE = ["vase_id", "selected_view", "selected_filename", "clip_score", "total_views", "reason", "all_view_scores"]


def test_the_best_view_of_each_vase_is_its_most_similar_accepted_one(case):
    case.accept(0.0)
    report, _ = case.select()
    accepted = case.high[case.high["score"] >= 0]
    assert list(report) == VIEWS_REPORT
    assert [r["vase_id"] for r in report["results"]] == sorted(set(accepted["vase"]))
    for result in report["results"]:
        assert list(result) == VASE
        own = accepted[accepted["vase"] == result["vase_id"]]
        best = own.loc[own["high_quality_similarity"].idxmax()]
        assert result["selected_filename"] == best["path"] and result["selected_view"] == int(best["view"])
        assert result["clip_score"] == best["high_quality_similarity"]
        assert result["total_views"] == len(own)
        assert result["reason"] == ("only_one_view" if len(own) == 1 else "best_clip_score")
        scores = {s["filename"]: (s["view_number"], s["clip_score"]) for s in result["all_view_scores"]}
        assert scores == {r.path: (int(r.view), r.high_quality_similarity) for r in own.itertuples()}
        assert list(result["all_view_scores"][0]) == ["view_number", "filename", "clip_score"]
    assert {r["reason"] for r in report["results"]} == {"only_one_view", "best_clip_score"}


def test_totals_and_rates_add_up(case):
    case.accept(0.0)
    report, stats = case.select()
    accepted = case.high[case.high["score"] >= 0]
    best = accepted.groupby("vase")["high_quality_similarity"].max().to_numpy()
    assert (report["total_vases"], report["total_selected_images"]) == (len(best), len(best))
    assert report["total_original_images"] == len(accepted)
    assert report["reduction_rate"] == pytest.approx(1 - len(best) / len(accepted))
    assert report["average_clip_score"] == pytest.approx(sum(best) / len(best))
    summary = stats["summary"]
    assert list(summary) == ["total_vases", "original_images", "selected_images", "reduction_rate",
                             "average_clip_score", "processing_time_minutes"]  # fmt: skip
    assert (summary["total_vases"], summary["original_images"]) == (len(best), len(accepted))
    assert summary["reduction_rate"] == f"{100 * report['reduction_rate']:.1f}%"
    sizes = accepted.groupby("vase").size()
    assert stats["view_distribution"] == {str(n): int((sizes == n).sum()) for n in sorted(set(sizes))}
    mean = sum(best) / len(best)
    spread = (sum((b - mean) ** 2 for b in best) / len(best)) ** 0.5
    assert stats["clip_score_stats"] == pytest.approx({"min": min(best), "max": max(best), "mean": mean, "std": spread})
    assert list(stats) == ["summary", "view_distribution", "clip_score_stats"]


def test_vases_without_accepted_view_are_counted(case):
    case.rows.loc[case.rows["vase"].isin(["V03", "V04"]), "label"] = 0
    case.accept(-2.0)
    report, _ = case.select()
    vases = case.json("select/summary.json")["vases"]
    assert vases == {"in": VASES, "with_view": VASES - 2, "without_accepted_view": 2}
    assert len(report["results"]) == VASES - 2


def test_ties_go_to_the_first_path(case):
    case.rows["high_quality_similarity"] = 0.25
    case.accept(-2.0)
    report, _ = case.select()
    first = case.high.sort_values("path").drop_duplicates("vase").set_index("vase")["path"]
    assert {r["vase_id"]: r["selected_filename"] for r in report["results"]} == first.to_dict()
    assert {s["clip_score"] for r in report["results"] for s in r["all_view_scores"]} == {0.25}


def test_best_views_are_relative_links_to_the_chosen_files(case):
    case.accept(0.0)
    report, _ = case.select()
    links = links_of(case.path("select/best_views"))
    assert links == {
        r["selected_filename"]: (case.images / r["selected_filename"]).resolve() for r in report["results"]
    }
    table = pd.read_parquet(case.path("select/best_views.parquet"))
    assert set(table["path"]) == set(links) and table["vase"].is_unique
    assert all(artefacts.sha256_file(links[r.path]) == r.sha256 for r in table.itertuples())


@pytest.mark.parametrize("view", ["front", "²", "007"])
def test_a_view_that_is_no_number_keeps_its_name(case, view):
    case.rows["view"] = view
    case.accept(-2.0)
    report, _ = case.select()
    assert {r["selected_view"] for r in report["results"]} == {7 if view == "007" else view}


# --- evaluation ---


def known(case):
    """Truth by which acceptance and choice can be counted by hand on the three test vases."""
    table = case.rows.set_index("path")
    table["label"], table["score"], table["quality"] = 1, -1.0, 0
    table["view_quality"] = 0.0
    good = {"b/V09_1.png": 0.9, "b/V09_2.png": 0.5, "a/V10_1.png": 0.4, "a/V10_3.png": 1.0}
    for path, quality in good.items():
        table.loc[path, ["quality", "view_quality"]] = [1, quality]
    for path in ("b/V09_1.png", "b/V09_2.png", "a/V10_1.png", "a/V10_2.png", "a/V10_3.png"):
        table.loc[path, "score"] = 1.0
    similarity = {"b/V09_1.png": 0.3, "b/V09_2.png": 0.2, "a/V10_1.png": 0.3, "a/V10_2.png": 0.2, "a/V10_3.png": 0.1}
    for path, value in similarity.items():
        table.loc[path, "high_quality_similarity"] = value
    train = table["side"] == "train"
    table.loc[train, "quality"] = np.arange(train.sum()) % 2
    table.loc[train, "score"] = 1.0
    case.rows = table.reset_index()
    return case


def test_evaluation_counts_the_test_side_by_hand(case):
    known(case).accept(0.5)
    case.select()
    found = case.evaluate()
    accepted = found["accepted_quality"]
    assert accepted["value"] == 4 / 5 and accepted["n"] == 5
    assert (accepted["groups"], accepted["grouped_by"]) == (2, "vase")
    assert accepted["baseline"] == pytest.approx(4 / 9) and accepted["baseline_kind"] == "before_filtering"
    # 4 good, 5 bad: all good ones and one bad one are at score 1, the other bad ones below
    assert accepted["auc_of_score"] == pytest.approx((4 * 4 + 4 * 0.5) / 20)
    lo, hi = accepted["ci95"]
    assert 2 / 3 - 1e-9 <= lo <= 4 / 5 <= hi <= 1  # vases are resampled: shares of good ones are 2/2 and 2/3
    views = found["best_view_quality"]
    assert views["value"] == pytest.approx((0.9 + 0.4) / 2) and views["n"] == 2
    assert views["baseline"] == pytest.approx(((0.9 + 0.5 + 0) / 3 + (0.4 + 0 + 1.0) / 3) / 2)
    assert views["baseline_kind"] == "random_view" and views["vases_without_accepted_view"] == 1
    assert views["ci95"] == pytest.approx([0.4, 0.9])


def test_other_sides_decide_no_score(case):
    """Neither what was accepted on train nor its truth moves the counts of the test side."""
    known(case).accept(0.5)
    case.select()
    one = case.evaluate()
    case.rows.loc[case.rows["side"] == "validation", "quality"] = 1
    case.rows.loc[case.rows["side"] == "validation", "score"] = 1.0
    case.accept(0.5)
    case.select()
    assert case.evaluate() == one


def test_the_trivial_answer_is_fitted_on_train_and_counted_alike(case, images):
    """Quality that is the mean colour's: the trivial ranking then finds all good images."""
    known(case)
    rows = case.rows
    case.images = case.path("tinted")
    rng = np.random.default_rng(0)
    train = rows["side"] == "train"
    rows.loc[~train & (rows["side"] == "validation"), "quality"] = 0
    for row in rows.itertuples():
        tint = (200, 200, 200) if row.quality else (60, 60, 60)
        picture(case.images / row.path, int(rng.integers(1e6)), tint=tint)
    case.accept(0.5)
    case.select()
    found = case.evaluate()
    assert found["accepted_quality"]["trivial"] == 4 / 5  # five picks, four good images in all
    assert found["accepted_quality"]["value"] == 4 / 5


def test_a_truth_that_says_too_little_is_refused(case):
    known(case).accept(0.5)
    case.select()
    case.rows.loc[case.rows["side"] == "test", "quality"] = 1
    with pytest.raises(KilnError, match="need known images of both qualities; 9 of test known"):
        case.evaluate()
    assert not case.path("e").exists()


def test_a_test_side_without_accepted_image_is_said(case):
    known(case)
    case.rows.loc[case.rows["side"] == "test", "score"] = -1.0
    case.accept(0.5)
    case.select()
    with pytest.raises(KilnError, match="test") as caught:
        case.evaluate()
    assert "accepted" in caught.value.message
    assert not case.path("e").exists()


def test_a_chosen_view_of_unknown_quality_is_not_a_vase_without_view(case):
    known(case).rows.loc[case.rows["path"] == "b/V11_1.png", "score"] = 1.0
    case.accept(0.5)
    case.select()
    tables = case.tables()
    truth = pd.read_parquet(tables["--truth"])
    short = truth[truth["path"] != "b/V11_1.png"]
    case.tables = lambda: {**tables, "--truth": write(case.path("short.parquet"), short)}
    found = case.evaluate()["best_view_quality"]
    assert found["n"] == 2 and found["vases_without_accepted_view"] == 0
