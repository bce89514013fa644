"""The report's steps: funnels, what jobs took, pictures with captions, and the front page."""

import html.parser
import json
import re

import pandas as pd
import pytest
import report_fixtures as fixtures
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.common import statistics
from scripts.common.errors import KilnError
from scripts.report import draw_funnels, headlines, introduction, measure_jobs, overview, write_index
from scripts.report.fonts import embedded_face
from scripts.report.funnels import FORMS, read_stage
from scripts.report.jobs import OTHER_UNITS, by_rule, read_jobs
from scripts.report.pictures import ALIKE, Picture, by_kind, find_pictures

COUNTS = st.integers(0, 10**7)


class Page(html.parser.HTMLParser):
    """Tags and texts of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data.strip())


@pytest.mark.parametrize(("pipeline", "step"), [(name, step) for name, steps in FORMS.items() for step in steps])
def test_a_funnel_counts_every_item_of_each_stage(tmp_path_factory, pipeline, step):
    form = FORMS[pipeline][step]

    @settings(max_examples=20, deadline=None)
    @given(st.data())
    def check(data):
        counts = {key: data.draw(COUNTS) for key in (*form.passed, *form.lost)}
        total, kept = sum(counts.values()), sum(counts[key] for key in form.passed)
        summary = found = {"in": total, **counts}
        for key in reversed(form.place):
            summary = {"train" if key == "*" else key: summary}
        unnamed = sum(counts[key] for key, reason in form.lost.items() if reason is None)
        summary |= {"reasons": {"torn": unnamed}} if unnamed else {"reasons": {}}
        folder = tmp_path_factory.mktemp("stage") / step
        stage = read_stage(pipeline, fixtures.write_summary(folder, f"{pipeline}.{step}", summary))
        assert (stage.total, stage.passed, sum(stage.lost.values())) == (total, kept, total - kept)
        assert sum(row["count"] for row in draw_funnels.rows(stage)) == 2 * total
        shown = draw_funnels.parts(stage)
        assert sum(shown.values()) == total and len(shown) <= 4
        found["in"] += 1
        (folder / "summary.json").write_text(json.dumps(summary))
        with pytest.raises(KilnError, match="in, but"):
            read_stage(pipeline, folder / "summary.json")

    check()


def test_a_funnel_of_another_stage_or_without_counts_is_refused(tmp_path):
    other = fixtures.write_summary(tmp_path / "train", "rae.train_autoencoder", {})
    with pytest.raises(KilnError, match="train_autoencoder is no stage of rae that filters"):
        read_stage("rae", other)
    empty = fixtures.write_summary(tmp_path / "split", "coca.split", {"in": 3, "train": 3})
    with pytest.raises(KilnError, match="no count 'validation'"):
        read_stage("coca", empty)


def test_funnels_become_a_table_and_a_picture_for_each_pipeline(tmp_path):
    reasons = {"torn": 4, "empty": 3, "small": 2, "late": 1}
    listed = {"files": {"in": 30, "ok": 20, "quarantined": 10}, "reasons": reasons}
    listed["files"]["reasons"] = reasons
    files = [
        fixtures.write_summary(tmp_path / "coca/list_slides", "coca.list_slides", listed),
        fixtures.write_summary(
            tmp_path / "coca/split", "coca.split", {"in": 20, "train": 16, "validation": 2, "test": 2}
        ),
    ]
    out = tmp_path / "out"
    arguments = [f"--output-folder={out}", "--code-key=k", f"--meta={out}/meta.json"]
    draw_funnels.main([*arguments, "--coca", *map(str, files)])
    table = pd.read_csv(out / "funnels.csv", keep_default_na=False)
    assert list(table["count"]) == [30, 20, 4, 3, 2, 1, 20, 20]
    assert (out / "coca.png").stat().st_size > 5000 and json.loads((out / "meta.json").read_text())["outputs"]
    stage = read_stage("coca", files[0])
    assert draw_funnels.parts(stage) == {"passed on": 20, "torn": 4, "empty": 3, "2 other reasons": 3}
    with pytest.raises(KilnError, match="no summary is given"):
        draw_funnels.main(arguments)


def test_jobs_take_their_last_attempt_and_a_training_all_of_them(tmp_path):
    fixtures.write_benchmark(tmp_path, "coca/train/main", 50, 7, rss=900, cpu=3)
    fixtures.write_benchmark(tmp_path, "vase/classify_images/main/s00000", 4)
    fixtures.write_benchmark(tmp_path, "vase/classify_images/main/s00001", 6, rss=300)
    (tmp_path / "coca/train/main").mkdir(parents=True)
    facts = {"wall_seconds": 60.5, "peak_vram_mb": 512.0, "items": 100, "items_per_second": 2.0}
    (tmp_path / "coca/train/main/meta.json").write_text(json.dumps(facts))
    (tmp_path / "vase/classify_images/main").mkdir(parents=True)
    for shard, rate in (("s00000", 5.0), ("s00001", 7.0)):
        facts = {"wall_seconds": 1.0, "peak_vram_mb": None, "items": 10, "items_per_second": rate}
        (tmp_path / f"vase/classify_images/main/{shard}.meta.json").write_text(json.dumps(facts))
    jobs = read_jobs(tmp_path)
    assert list(jobs["job"]) == ["main", "main/s00000", "main/s00001"]
    assert list(jobs["seconds"]) == [60.5, 4, 6]
    table = by_rule(jobs).set_index("rule")
    assert list(table.index) == ["coca_train", "vase_classify_images"]
    shards = table.loc["vase_classify_images"]
    assert (shards["jobs"], shards["seconds"], shards["longest"], shards["peak_rss_mb"]) == (2, 10, 6, 300)
    assert (shards["items"], shards["items_per_second"]) == (20, 6.0)
    assert table.loc["coca_train", "peak_vram_mb"] == 512 and pd.isna(shards["peak_vram_mb"])
    assert (shards["unit"], table.loc["coca_train", "unit"]) == ("images", "slides")
    out = tmp_path / "out"
    measure_jobs.main([f"--results={tmp_path}", f"--output-folder={out}", "--code-key=k", f"--meta={out}/meta.json"])
    assert len(pd.read_csv(out / "jobs.csv")) == 3 and len(pd.read_csv(out / "rules.csv")) == 2


def test_a_torn_benchmark_and_an_empty_folder_are_refused(tmp_path):
    arguments = [f"--results={tmp_path}", f"--output-folder={tmp_path}/out", "--code-key=k"]
    with pytest.raises(KilnError, match="no job is noted"):
        measure_jobs.main([*arguments, f"--meta={tmp_path}/meta.json"])
    fixtures.write_benchmark(tmp_path, "coca/train/main")
    with pytest.raises(KilnError, match=r"main\.tsv: no benchmark"):
        read_jobs(tmp_path)
    assert not (tmp_path / "out").exists()


def test_pictures_are_found_by_their_wildcards_and_captioned(tmp_path):
    for place in ("main/lora", "main/qlora", "other/lora", "main/extra/lora"):
        fixtures.picture(tmp_path / f"{place}/loss.png")
    caption = tmp_path / "caption.rst"
    caption.write_text("Loss of **{{ snakemake.wildcards.method }}** & ``vase.sft``.")
    marked = {"pattern": f"{tmp_path}/main/{{method,lora|qlora}}/loss.png", "caption": str(caption), "category": "busi",
              "labels": {"step": "train", "method": "{method}"}}  # fmt: skip
    found = list(find_pictures(marked))
    assert [one.path.parent.name for one in found] == ["lora", "qlora"]
    assert found[1].labels == {"step": "train", "method": "qlora"}
    assert "<strong>qlora</strong> &amp; " in found[1].caption
    twice = marked | {"pattern": f"{tmp_path}/{{one}}/{{two}}/loss.png", "labels": {}}
    caption.write_text("{{ snakemake.wildcards.one }}")
    assert [one.caption for one in find_pictures(twice)] == ["<p>main</p>", "<p>main</p>", "<p>other</p>"]
    assert list(find_pictures(marked | {"pattern": f"{tmp_path}/nowhere/{{x}}.png"})) == []


@pytest.mark.parametrize(
    "text", ["{{ snakemake.wildcards.unknown }}", "{{ torn", "`torn role", ".. raw:: html\n\n  <b>"]
)
def test_a_wrong_caption_is_named(tmp_path, text):
    (tmp_path / "caption.rst").write_text(text)
    path = fixtures.picture(tmp_path / "loss.png")
    marked = {"pattern": str(path), "caption": f"{tmp_path}/caption.rst", "category": "busi", "labels": {}}
    with pytest.raises(KilnError, match=r"caption\.rst: "):
        list(find_pictures(marked))


NUMBERS = st.floats(-1e6, 1e6)


@settings(deadline=None)
@given(NUMBERS, NUMBERS, NUMBERS, st.none() | NUMBERS)
def test_a_metrics_line_stays_on_its_bar_in_order(one, two, three, baseline):
    low, value, high = sorted((one, two, three))
    places = write_index.bar({"value": value, "ci95": [low, high], "baseline": baseline})
    assert all(0 <= place <= 100 for place in places.values())
    assert places["low"] <= places["value"] <= places["high"]
    assert ("baseline" in places) == (baseline is not None)


def test_beating_the_baseline_takes_the_interval_and_its_side():
    assert headlines.beats(fixtures.METRIC) is True
    assert headlines.beats(fixtures.METRIC | {"ci95": [0.05, 0.7]}) is False
    assert headlines.beats(fixtures.METRIC | {"higher_is_better": False}) is False
    assert headlines.beats(fixtures.METRIC | {"higher_is_better": False, "baseline": 0.8}) is True
    assert headlines.beats(fixtures.METRIC | {"baseline": None}) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "better"),
        ({"ci95": [0.05, 0.7]}, "not clearly better"),
        ({"higher_is_better": False}, "not clearly better"),
        ({"baseline": None, "baseline_kind": None}, "no baseline"),
        ({"ci95": None, "reason": "one vase: no interval"}, "no interval"),
    ],
)
def test_each_number_says_in_words_whether_it_beats_its_baseline(tmp_path, changes, words):
    assert headlines.verdict(fixtures.METRIC | changes) == words
    text = fixtures.rendered(tmp_path, {"coca": {"retrieval_r5": fixtures.METRIC | changes}})
    said = f"{words} than its baseline" if words == "not clearly better" else words
    assert Page(text).texts.count(said) == 2 + (words == "better")  # overview, and the pipeline's table; the legend
    assert text.count("not clearly better than its baseline") == 2 * (words == "not clearly better")


def test_a_number_shows_its_sign_where_it_is_a_difference_and_its_groups_where_they_are_known(tmp_path):
    gap = fixtures.METRIC | {"baseline": 0.0, "difference_of": "recall at 5", "groups": 60, "grouped_by": "article"}
    found = Page(fixtures.rendered(tmp_path, {"biomedica": {"hybrid_over_local": gap}})).texts
    for text in ("+0.600", "+0.500 to +0.700", "difference of recall at 5", "1,234 (60\u00a0articles)"):
        assert found.count(text) == 2, text  # overview, and the pipeline's table


def test_baselines_and_intervals_lead_to_what_their_words_mean(tmp_path):
    rfid = fixtures.METRIC | {"baseline_kind": "shrunk_input", "interval_of": "delete-a-group jackknife"}
    gain = fixtures.METRIC | {"baseline_kind": "before_grpo", "interval_of": "baseline + paired difference"}
    shown = Page(fixtures.rendered(tmp_path, {"rae": {"dinov2_rfid": rfid}, "vase": {"grpo_reward": gain}}))
    anchors = [one["id"] for _, one in shown.tags if "id" in one]
    links = {one["href"][1:] for tag, one in shown.tags if tag == "a" and one["href"].startswith("#word-")}
    assert len(links) == 5 and links <= set(anchors) and len(set(anchors)) == len(anchors)


def test_words_of_the_glossary_are_those_of_the_summaries():
    kinds = {kind.replace("_", " ") for kind in statistics.BASELINE_KINDS}
    unused = {"untrained", "before training", "downsampled"}
    assert kinds - unused <= set(write_index.WORDS)


def test_the_overview_has_a_row_for_each_pipeline_of_the_run_and_leads_to_its_sections(tmp_path):
    first = {"first": fixtures.METRIC | {"value": 0.125}}
    text = fixtures.rendered(tmp_path, {"coca": {"other": fixtures.METRIC | {"value": 0.25}, "retrieval_r5":
                                                 fixtures.METRIC}, "rae": first, "busi": {}})  # fmt: skip
    table = text[text.index('<section id="overview">') :].partition("</section>")[0]
    shown = Page(table)
    assert table.count("<tr><td>") == 3 and "vase" not in shown.texts and "biomedica" not in shown.texts
    assert {"retrieval r5", "0.600", "0.500 to 0.700", "0.100", "chance", "1,234", "first", "0.125"} <= set(shown.texts)
    assert "0.250" not in shown.texts and any(one.startswith("no headline number") for one in shown.texts)
    anchors = {one["id"] for _, one in Page(text).tags if "id" in one}
    targets = {one["href"].removeprefix("#") for tag, one in shown.tags if tag == "a"}
    assert {"coca", "coca-items", "coca-pictures", "busi"} <= targets <= anchors


def test_a_pipeline_without_its_headline_is_shown_by_its_first_number():
    assert overview.main_metric("coca", {"other": 1, "retrieval_r5": 2}) == "retrieval_r5"
    assert overview.main_metric("coca", {"other": 1}) == overview.main_metric("words", {"other": 1}) == "other"
    assert overview.main_metric("coca", {}) is None


def test_parts_of_a_number_that_do_not_beat_their_baseline_are_named(tmp_path):
    parts = {"fabric": fixtures.METRIC | {"baseline": 0.6}, "shape": fixtures.METRIC}
    for one in parts.values():
        del one["file"]
    whole = fixtures.METRIC | {"parted_by": "dimension", "parts": parts}
    text = fixtures.rendered(tmp_path, {"coca": {"retrieval_r5": whole}})
    said = re.search(r"<summary>(by dimension.*?)</summary>", text)[1]
    assert re.sub("<[^>]*>", "", said) == "by dimension: not clearly better than its baseline in fabric"
    assert {"fabric", "shape"} <= set(Page(text).texts)


@given(st.lists(st.sampled_from("abc")))
def test_pictures_of_a_kind_stand_together_and_none_is_lost(kinds):
    pictures = [Picture(None, "coca", {"n": str(number)}, "", kind) for number, kind in enumerate(kinds)]
    found = by_kind(pictures)
    assert [one.shown[0].kind for one in found] == list(dict.fromkeys(kinds))
    for one in found:
        assert one.shown + one.others == [picture for picture in pictures if picture.kind == one.shown[0].kind]
        assert len(one.shown) == (1 if one.others else len(one.shown)) and len(one.shown) <= ALIKE
        assert not 0 < len(one.others) < ALIKE


def test_of_many_like_pictures_one_is_open_and_leads_to_the_others(tmp_path):
    text = fixtures.rendered(tmp_path, None, runs=6)
    body, folded, rest = re.split(r"<details>(?=<summary id=)|</details>", text)
    assert text.count("<img") == 9 and folded.count("<img") == 5 and "<img" not in rest
    place = re.search(r'<a href="#([^"]+)">5 more of this kind</a>', body)[1]
    assert f'<summary id="{place}">Curve · train 0: 5 more of this kind</summary>' in folded


@pytest.mark.parametrize(
    ("labels", "title"),
    [
        ({"step": "train_lora", "picture": "loss", "method": "qlora"}, "Loss · train LoRA · QLoRA"),
        ({"step": "reconstruct", "encoder": "dinov2", "picture": "reconstructions"},
         "Reconstructions · reconstruct · DINOv2"),
        ({"step": "all", "picture": "what became of the items"}, "What became of the items"),
        ({}, ""),
    ],
)  # fmt: skip
def test_a_pictures_title_begins_with_what_it_shows(labels, title):
    assert Picture(None, "busi", labels, "", "").title == title


@pytest.mark.parametrize("stages", [1, 2])
def test_a_funnel_is_drawn_once_beside_its_table(tmp_path, stages):
    funnel = fixtures.picture(tmp_path / "results/coca.png")
    marked = {"pattern": str(funnel), "caption": f"{tmp_path}/funnel.rst", "category": "coca", "labels": {"a": "items"}}
    (tmp_path / "funnel.rst").write_text("In and out.")
    text = fixtures.rendered(tmp_path, None, marked, stages=stages)
    items, pictures = text.partition('id="coca-items"')[2].split('id="coca-pictures"')
    assert items.count("In and out.") == items.count("<img") == 1 and pictures.count("<img") == 3
    assert items.count("<tr>") == 1 + stages


@pytest.mark.parametrize("drawn", [True, False])
def test_a_results_folder_says_which_run_made_it_and_how_to_check_it(tmp_path, monkeypatch, drawn):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results/rae").mkdir(parents=True)
    config = {"results": "results", "pipelines": ["coca", "rae"], "rae": {"images": "results/demo/x" if drawn else "x"}}
    argv = ["/bin/snakemake", "--cores", "all", "--config", "set=a.b=1 c.d=2"]
    text = introduction.introduction(config, [tmp_path / "config/demo.yaml"], argv)
    assert text.startswith("# results\n") and "- pipelines: rae\n" in text and "`config/demo.yaml`" in text
    assert "\nsnakemake --cores all --config 'set=a.b=1 c.d=2'\n" in text
    assert f"\npython -m scripts.report.verify_results {tmp_path}/results\n" in text
    assert ("compare with no published one" in text) == drawn
    assert "not made yet" in text and len(text.splitlines()) <= 22
    (tmp_path / "results/index.html").write_text("")
    assert "[index.html](index.html)" in introduction.introduction(config, [], argv)
    assert "set=" not in introduction.introduction(config, [], ["/bin/other", *argv[1:]])


def test_the_tree_leaves_out_pipelines_of_which_nothing_is_there(tmp_path):
    (tmp_path / "rae").mkdir()
    tree = "| place | what |\n|---|---|\n| `summary.json` | a |\n| `vase/x/`, `rae/y/` | b |\n| `rae/x/` | c |\n"
    assert introduction.rows_of(tree, tmp_path, ["vase", "rae"]) == tree.replace("| `vase/x/`, `rae/y/` | b |\n", "")
    assert introduction.rows_of(tree, tmp_path, ["rae"]) == tree


@pytest.fixture
def page(tmp_path):
    """The front page of the small results folder, and its caption file."""
    caption = tmp_path / "caption.rst"
    caption.write_text("What {{ snakemake.wildcards.name }} shows.")
    folder = fixtures.results(tmp_path / "results")
    write_index.main(fixtures.index_arguments(folder, caption))
    return folder / "index.html"


def test_the_front_page_holds_numbers_pictures_costs_and_links(page):
    found = Page(page.read_text())
    for text in ("retrieval r5", "0.600", "0.500 to 0.700", "chance", "better", "1,234", "fast", "2.0 h", "1,234 MB",
                 "What loss shows.", "H200", "a" * 40, "torch 2.14.1", "浸润性导管癌", "<b>bold</b>"):  # fmt: skip
        assert text in found.texts, text
    assert "3 truncated <file>" in found.texts
    images = [attributes for tag, attributes in found.tags if tag == "img"]
    assert len(images) == 3 and all(one["src"].startswith("data:image/png;base64,") and one["alt"] for one in images)
    forms = [attributes.get("class") for tag, attributes in found.tags if tag == "figure"]
    assert sorted(forms) == ["", "tall", "wide"]
    assert ("a", {"href": "config.yaml"}) in found.tags
    assert json.loads(page.with_name("index.meta.json").read_text())["outputs"]["index.html"]["bytes"] > 1000


def test_times_have_sums_and_units_and_no_zeros(page):
    rows = [Page(row).texts for row in page.read_text().partition('id="cost"')[2].split("<tr>")[2:]]
    cells = [[text for text in row if text] for row in rows]
    total = ["3", "2.0 h", "2.0 h", "3.0 s", "1,234 MB"]  # without the service
    assert [row[:6] for row in cells[:2]] == [["all", *total], ["coca", *total]]
    assert cells[2][:2] == ["coca_", "train"] and cells[2][-1] == "2.5 slides/s"
    assert cells[3] == ["coca_", "split", "2", "< 0.1 s", "< 0.1 s", "–", "50 MB", "–"]
    assert cells[4][:3] == ["demo_", "serve_", "hub"] and "15.0 min" in cells[4]


def test_rules_with_units_of_their_own_exist():
    for rule in OTHER_UNITS:
        pipeline, _, name = rule.partition("_")
        assert (introduction.ROOT / f"scripts/{pipeline}/{name}.py").is_file(), rule


def test_the_front_page_needs_no_network_and_no_file_but_its_links(page):
    text = page.read_text()
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", text)
    assert not re.search(r"url\((?!data:)", text) and "@import" not in text and "<script" not in text
    for tag, attributes in Page(text).tags:
        target = attributes.get("href", "#")
        assert target.startswith(("#", "data:")) or (page.parent / target).is_file(), (tag, target)


def test_equal_results_give_an_equal_page_and_broken_links_are_refused(page, tmp_path):
    before = page.read_bytes()
    arguments = fixtures.index_arguments(page.parent, tmp_path / "caption.rst")
    write_index.main(arguments)
    assert page.read_bytes() == before
    with pytest.raises(KilnError, match="expected TITLE=FILE below"):
        write_index.main([one.replace("config.yaml", "gone.yaml") for one in arguments])


def test_drawn_data_are_told_from_a_users_own():
    assert write_index.uses_drawn_data({"results": "r", "rae": {"images": "r/demo/draw_digits/images"}})
    assert write_index.uses_drawn_data({"results": "r", "biomedica": {"folders": ["a", "r/demo/x"]}})
    assert not write_index.uses_drawn_data({"results": "r", "rae": {"images": "demo/images", "model": None}})


def test_the_font_holds_what_is_used_and_nothing_for_latin_text():
    assert embedded_face("plain text, é, “quotes”") == ""
    one, two = embedded_face("浸"), embedded_face("浸润性导管癌")
    assert one == embedded_face("浸 and latin") and 0 < len(one) < len(two) < 20_000
