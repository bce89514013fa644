"""Published numbers beside ours: what is comparable follows from records, and from nothing else."""

import csv
import json
import re
import urllib.parse
from pathlib import Path

import pandas as pd
import pytest
import workflow
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from scripts import config
from scripts.common import artefacts
from scripts.common.errors import KilnError
from scripts.common.settings import of_kind
from scripts.report import compare_paper, lineage, paper_protocols, paper_tables
from scripts.report.paper_protocols import IMAGENET, INCEPTION_SHA256, Found, compare
from scripts.retrieve import models

ROOT = Path(__file__).resolve().parents[1]
TABLES = {name: ROOT / f"config/{name}.csv" for name in ("paper_targets", "paper_costs", "models")}
TARGETS = paper_tables.read_targets(TABLES["paper_targets"])
MODELS = models.read_table(TABLES["models"])
DEFAULTS = config.Config().rae


def target_of(protocol: str, value: float):
    (found,) = [one for one in TARGETS if (one.protocol, one.value) == (protocol, value)]
    return found


TRAINED, RELEASED = target_of("rae_trained", 0.54), target_of("rae_released", 0.5776)


def wrote(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text or str(path))
    return path


def retrieved(root: Path, name: str, **changes: str) -> Path:
    """A model's only file, or its listing, as rule retrieve_model leaves it."""
    folder, files = root / "models" / name, MODELS[name].files
    file = wrote(folder / (files[0] if len(files) == 1 and "*" not in files[0] else "files.json"))
    record = artefacts.Record("scripts.retrieve.model", {"name": name} | changes, {}, "code")
    outputs = {file.relative_to(folder).as_posix(): {"bytes": 1, "sha256": artefacts.sha256_file(file)}}
    record.facts |= {"source": changes.get("source", MODELS[name].source), "outputs": outputs}
    record.write(folder / "meta.json", [])
    return file


def step(name: str, output: Path, settings: dict, **inputs: Path) -> Path:
    """What a step leaves: its output, and the record beside it."""
    named = {re.sub("_safetensors$", ".safetensors", key.replace("_files_json", " files.json")): path
             for key, path in inputs.items()}  # fmt: skip
    if not output.is_file():
        wrote(output)
    artefacts.Record(name, settings, named, "code").write(output.with_name("meta.json"), [output])
    return output


def full_protocol(
    root: Path, *, released: bool = False, n: int = 50_000, metrics: dict | None = None, features: dict | None = None,
    dataset: dict | None = None, train: int = IMAGENET["train"], reference_of: str = "dataset",
    trained_on: str = "dataset", settings: dict | None = None, names: dict | None = None, source: dict | None = None,
) -> Path:  # fmt: skip
    """metrics.json of rae with all records behind it, as of ImageNet and published weights but for what is changed."""
    root.mkdir(parents=True, exist_ok=True)
    names = {
        "encoder": "dinov2-with-registers-base", "vgg": "vgg16-imagenet1k-v1", "dino": "dino-vit-small-patch8-224",
        "decoder": "rae-decoder-dinov2-base-vitxl", "statistics": "rae-stats-dinov2-base",
    } | (names or {})  # fmt: skip
    known = {role: retrieved(root, name, **(source or {}).get(role, {})) for role, name in names.items()}
    splits = {"train": {"ok": train}, "validation": {"ok": n}}
    summary = {"classes": 1000, "validation": "class folders", "splits": splits} | (dataset or {})
    built = step("scripts.rae.build_arrow", wrote(root / "build/summary.json", json.dumps(summary)), {})
    rows = {name: wrote(root / f"{name}/files.json", name) for name in {"dataset", reference_of, trained_on}}
    own = of_kind(DEFAULTS, "numerics")
    if released:
        values = {"image_size": 256, "encoder": own["encoders"]["dinov2"]} | (settings or {})
        weights = step("scripts.rae.import_published", root / "import/autoencoder.safetensors", values,
                       decoder=known["decoder"], statistics=known["statistics"])  # fmt: skip
    else:
        sections = ("image_size", "decoder", "perceptual", "discriminator", "autoencoder")
        values = {name: own[name] for name in sections} | {"encoder": own["encoders"]["dinov2"]}
        for name, changed in (settings or {}).items():
            values[name] = values[name] | changed if isinstance(changed, dict) else changed
        weights = step("scripts.rae.train_autoencoder", root / "train/autoencoder.safetensors", values,
                       dataset=rows[trained_on], model_files_json=known["encoder"], vgg=known["vgg"],
                       dino=known["dino"])  # fmt: skip
    reference = step("scripts.rae.compute_reference_stats", root / "reference/reference.safetensors", {},
                     dataset=rows[reference_of])  # fmt: skip
    made = step("scripts.rae.reconstruct", root / "reconstruct/features.safetensors", {}, dataset=rows["dataset"],
                checkpoint=weights, model_files_json=known["encoder"])  # fmt: skip
    about = {"extractor": "inception-v3-compat", "weights": INCEPTION_SHA256, "split": "validation",
             "preprocessing": "ADM centre crop 256, uint8", "reference_images": "0", "n": n}  # fmt: skip
    entry = {"value": 0.5512, "n": n, "ci95": [0.54, 0.56], "higher_is_better": False}
    found = {"summary": {"dinov2_rfid": entry, "dinov2_psnr": entry | {"value": 18.9}}, "warnings": []}
    text = json.dumps(found | {"features": about | (features or {})} | (metrics or {}))
    return step("scripts.rae.evaluate", wrote(root / "evaluate/metrics.json", text), {}, dataset=built,
                reference_safetensors=reference, features_safetensors=made)  # fmt: skip


def options(out: Path, *given: str, **tables: Path) -> list[str]:
    paths = TABLES | tables
    return ["--targets", str(paths["paper_targets"]), "--costs", str(paths["paper_costs"]), "--models",
            str(paths["models"]), "--output", str(out / "paper.csv"), "--meta", str(out / "paper.meta.json"),
            *given]  # fmt: skip


def compared(out: Path, *given: str, **tables: Path) -> pd.DataFrame:
    """The table that the step makes."""
    compare_paper.main(options(out, *given, **tables))
    return pd.read_csv(out / "paper.csv")


def row_of(table: pd.DataFrame, target) -> pd.Series:
    rows = table[
        (table["model"] == target.model) & (table["metric"] == target.metric) & (table["paper"] == target.value)
    ]
    return rows.iloc[0]


@pytest.mark.parametrize("target", [TRAINED, RELEASED], ids=["trained", "released"])
def test_the_full_protocol_is_the_same_and_stands_under_ours(tmp_path, target):
    file = full_protocol(tmp_path / "run", released=target is RELEASED)
    table = compared(tmp_path, "--rae", f"main/main={file}")
    row = row_of(table, target)
    assert row["protocol"] == "same" and (row["ours"], row["ours_n"]) == (0.5512, 50_000)
    assert (row["ours_ci_low"], row["ours_ci_high"]) == (0.54, 0.56)
    assert pd.isna(row["this_run"]) and pd.isna(row["differences"])
    other = row_of(table, RELEASED if target is TRAINED else TRAINED)
    assert other["protocol"] == "differs" and other["differs_in"] == "weights" and pd.isna(other["ours"])


OTHER = "siglip2-base-patch16-256"
DEVIATIONS = {
    "fewer pictures": ({"n": 49_999}, "samples, split", "n = 49999 (published 50000)"),
    "another Inception": ({"features": {"weights": "0" * 64}}, "features", "Inception weights 000000000000"),
    "random features": ({"features": {"extractor": "kiln-random"}}, "features", "features of kiln-random"),
    "a warning": ({"metrics": {"warnings": ["of other images"]}}, "features", "of other images"),
    "another crop": ({"features": {"preprocessing": "ADM centre crop 512, uint8"}}, "reference", "centre crop 512"),
    "another split": ({"features": {"split": "train"}}, "split", "scored on train"),
    "fewer classes": ({"dataset": {"classes": 100}}, "split", "classes: 100 (ImageNet-1k: 1000)"),
    "a cut": ({"dataset": {"validation": "cut from train"}}, "split", "a share cut from train"),
    "another reference": ({"reference_of": "other"}, "reference", "the reference is of another data set"),
    "less training": ({"train": 1_281_166}, "split", "train: 1281166"),
    "other training data": ({"trained_on": "other"}, "split", "trained on another data set"),
    "a setting": ({"settings": {"autoencoder": {"epochs": 8}}}, "settings", "autoencoder.epochs = 8 (published 16)"),
    "another size": ({"settings": {"image_size": 512}}, "settings", "image_size = 512 (published 256)"),
    "another encoder": ({"names": {"encoder": OTHER}}, "weights", f"encoder: {OTHER}"),
    "another VGG16": ({"names": {"vgg": "inception-v3-compat"}}, "weights", "VGG16 of LPIPS: inception-v3-compat"),
    "another DINO": ({"names": {"dino": "inception-v3-compat"}}, "weights", "DINO of the discriminator"),
    "another source": ({"source": {"encoder": {"source": "me/copy"}}}, "weights", "encoder: from me/copy"),
    "another decoder": ({"released": True}, "weights", "decoder: as released (published: trained)"),
}  # fmt: skip
OF_RELEASED = {
    "another decoder": ({"names": {"decoder": "rae-decoder-siglip2-base-vitxl"}}, "weights", "decoder: rae-decoder-"),
    "other statistics": ({"names": {"statistics": "rae-stats-siglip2-base"}}, "weights", "latent statistics: rae"),
    "another input": ({"settings": {"encoder": {"model": "x", "input_size": 448}}}, "settings", "input_size = 448"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("target", "changes", "aspects", "reason"),
    [(TRAINED, *one) for one in DEVIATIONS.values()]
    + [(RELEASED, {"released": True, **one[0]}, *one[1:]) for one in OF_RELEASED.values()],
    ids=[*DEVIATIONS, *(f"released, {name}" for name in OF_RELEASED)],
)
def test_each_single_deviation_turns_it_off_for_the_right_reason(tmp_path, target, changes, aspects, reason):
    file = full_protocol(tmp_path / "run", **changes)
    row = row_of(compared(tmp_path, "--rae", f"main/main={file}"), target)
    assert row["protocol"] == "differs" and row["differs_in"] == aspects
    assert reason in row["differences"]
    assert pd.isna(row["ours"]) and row["this_run"] == 0.5512


def test_chance_and_rounding_are_no_deviation(tmp_path):
    file = full_protocol(tmp_path / "run", settings={"autoencoder": {"seed": 7, "accumulation": 16, "compile": True}})
    assert row_of(compared(tmp_path, "--rae", f"main/main={file}"), TRAINED)["protocol"] == "same"


def test_psnr_does_not_depend_on_the_features_of_rfid(tmp_path):
    changes = {"features": {"extractor": "kiln-random", "weights": "0"}, "metrics": {"warnings": ["random features"]}}
    file = full_protocol(tmp_path / "run", released=True, **changes)
    table = compared(tmp_path, "--rae", f"main/main={file}")
    assert row_of(table, target_of("rae_released", 18.94))["protocol"] == "same"
    assert row_of(table, RELEASED)["differs_in"] == "features"


def test_what_was_edited_or_lost_is_not_comparable(tmp_path):
    for number, (place, reason) in enumerate(
        {
            "evaluate/meta.json": "no record fits metrics.json", "reference/meta.json": "no record fits the reference",
            "reconstruct/meta.json": "no record fits the reconstructions", "train/meta.json": "decoder: of no record",
            "models/dinov2-with-registers-base/meta.json": "encoder: no record of a file",
            "build/summary.json": "no summary of the data set",
        }.items()
    ):  # fmt: skip
        file = full_protocol(tmp_path / f"{number}")
        (tmp_path / f"{number}/{place}").unlink()
        assert reason in row_of(compared(tmp_path, "--rae", f"main/main={file}"), TRAINED)["differences"], place
    file = full_protocol(tmp_path / "edited")
    file.write_text(file.read_text().replace("0.5512", "0.3"))
    row = row_of(compared(tmp_path, "--rae", f"main/main={file}"), TRAINED)
    assert pd.isna(row["ours"]) and "no record fits metrics.json as it is" in row["differences"]


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> lineage.Made:
    file = full_protocol(tmp_path_factory.mktemp("full"))
    return lineage.maker(file)


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "n": st.integers(1, 10**6).filter(lambda n: n != 50_000),
        "weights": st.text("0123456789abcdef", min_size=64, max_size=64).filter(lambda one: one != INCEPTION_SHA256),
        "split": st.sampled_from(["train", "test", ""]),
        "preprocessing": st.text(max_size=9),
        "warnings": st.lists(st.text("abc ", min_size=1), min_size=1, max_size=3),
    },
)


@hypothesis_settings(deadline=None)
@given(CHANGES)
def test_any_change_of_what_metrics_say_makes_another_protocol(full, changes):
    metrics = json.loads(full.path.read_text())
    entry = metrics["summary"]["dinov2_rfid"] | {name: changes[name] for name in ("n",) if name in changes}
    metrics["warnings"] = changes.get("warnings", [])
    metrics["features"] |= {name: changes[name] for name in ("weights", "split", "preprocessing") if name in changes}
    found = compare(TRAINED, Found(entry, metrics, full), MODELS)
    assert found.same == (not changes)
    kinds = {"n": "samples", "split": "split", "preprocessing": "reference", "weights": "features"}
    expected = {kinds[name] for name in changes if name in kinds}
    if not expected - {"samples"} and "warnings" in changes:
        expected.add("features")
    assert set(found.aspects) == expected
    assert found.aspects == [one for one in paper_protocols.ASPECTS if one in found.aspects]


def test_the_run_nearest_to_the_protocol_is_shown(tmp_path):
    """A variant without noise is beside 0.49, main beside 0.54."""
    main, quiet = (
        full_protocol(tmp_path / name, settings={"autoencoder": {"tau": tau}})
        for name, tau in (("main", 0.8), ("quiet", 0.0))
    )
    table = compared(tmp_path, "--rae", f"main/main={main}", f"quiet/quiet={quiet}", f"quiet/quiet-1={quiet}")
    for value, run in ((0.54, "main"), (0.49, "quiet")):
        row = row_of(table, target_of("rae_trained", value))
        assert (row["protocol"], row["run"]) == ("same", run)


def full_vase(root: Path, *, n: int = 96, names: dict | None = None, sft: dict | None = None, grpo: dict | None = None,
              lost: str | None = None, value: float = 0.25) -> Path:  # fmt: skip
    """metrics.json of vase with all records behind it: a merged adapter of SFT, a whole model of GRPO."""
    root.mkdir(parents=True)
    names = {"base": "qwen2.5-vl-7b-instruct", "clip": "clip-vit-b-32-openai"} | (names or {})
    base, clip = (retrieved(root, name) for name in names.values())
    own = of_kind(config.Config().vase, "numerics")
    adapter = wrote(root / "train_sft/best/adapter_model.safetensors")
    listing = {adapter.name: {"bytes": 1, "sha256": artefacts.sha256_file(adapter)}}
    listing = wrote(adapter.with_name("files.json"), json.dumps(listing))
    record = artefacts.Record("scripts.vase.train_sft", {"vlm": own["vlm"], "sft": own["sft"] | (sft or {})},
                              {"model files.json": base}, "code")  # fmt: skip
    record.write(root / "train_sft/meta.json", [listing])
    merged = step("scripts.vase.merge", root / "merge_sft/files.json", {}, adapter=adapter, model_files_json=base)
    values = {"vlm": own["vlm"], "grpo": own["grpo"] | (grpo or {})}
    last = step("scripts.vase.train_grpo", root / "train_grpo/files.json", values, model_files_json=merged)
    models_of = {"base: model_files_json": base, "sft: model_files_json": merged, "grpo: model_files_json": last}
    predicted = step("scripts.vase.predict", root / "predict/predictions.parquet", {}, **models_of)
    entry = {"value": value, "n": n, "ci95": [0.1, 0.4]}
    recall = {"from_generated": {"recall": {"1": entry}}}
    scores = {"retrieval": {"caption": recall}, "greedy": {"caption": {"lexical_overlap": entry}}}
    found = {"summary": {"sft_accuracy": entry}, "models": dict.fromkeys(("base", "sft", "grpo"), scores)}
    file = wrote(root / "evaluate/metrics.json", json.dumps(found))
    step("scripts.vase.evaluate", file, {}, predictions=predicted, clip=clip)
    if lost:
        (root / lost).unlink()
    return file


@pytest.fixture(scope="module")
def all_known(tmp_path_factory) -> Path:
    """The published numbers, as if the sources said all that a comparison needs."""
    path = tmp_path_factory.mktemp("known") / "targets.csv"
    rows = list(csv.DictReader(TABLES["paper_targets"].read_text().splitlines()))
    with path.open("w", newline="") as file:
        known = csv.DictWriter(file, list(rows[0]))
        known.writeheader()
        known.writerows(row | {"unknown": "", "n_is": row["n_is"] and "stated"} for row in rows)
    return path


SCORES = ("base_caption_r1", "sft_caption_r1", "grpo_caption_r1", "grpo_caption_lexical_overlap")


@pytest.mark.parametrize(
    ("changes", "same", "reason"),
    [
        ({}, SCORES, None),
        ({"sft": {"seed": 3, "save_steps": 7}}, SCORES, None),
        ({"n": 95}, (), "n = 95 (published 96)"),
        ({"names": {"base": "qwen2.5-vl-3b-instruct"}}, (), "base model: qwen2.5-vl-3b-instruct"),
        ({"names": {"clip": "clip-vit-l-14-commonpool-xl"}}, SCORES[3:], "CLIP: clip-vit-l-14-commonpool-xl"),
        ({"sft": {"lr": 0.5}}, SCORES[:1], "sft.lr = 0.5 (published 0.0001)"),
        ({"grpo": {"max_steps": 5}}, SCORES[:2], "grpo.max_steps = 5 (published null)"),
        ({"lost": "train_sft/meta.json"}, SCORES[:1], "sft model: of no record"),
        ({"lost": "merge_sft/meta.json"}, SCORES[:1], "model: of no record"),
        ({"lost": "predict/meta.json"}, (), "no record fits the predictions"),
    ],
)
def test_captions_compare_where_models_settings_and_items_do(tmp_path, all_known, changes, same, reason):
    file = full_vase(tmp_path / "run", **changes)
    table = compared(tmp_path, "--vase", f"main/main={file}", paper_targets=all_known).set_index("metric")
    for metric in SCORES:
        row = table.loc[metric]
        if metric in same:
            assert (row["protocol"], row["ours"]) == ("same", 0.25) and pd.isna(row["this_run"])
        else:
            assert row["protocol"] == "differs" and reason in row["differences"] and pd.isna(row["ours"])


def vase_metrics(root: Path, n: int) -> Path:
    entry = {"value": 0.25, "n": n, "ci95": [0.1, 0.4]}
    recall = {"from_generated": {"recall": {"1": entry, "5": entry}}}
    own = {
        "retrieval": {"caption_similarity": entry, "caption": recall},
        "greedy": {"caption": {"lexical_overlap": entry}},
    }
    headline = {"sft_accuracy": entry | {"value": 0.77}}
    file = wrote(root / "metrics.json", json.dumps({"summary": headline, "models": {"grpo": own}}))
    return step("scripts.vase.evaluate", file, {})


def test_a_run_without_the_published_data_has_a_column_of_its_own(tmp_path):
    """Whatever it reaches, and whether or not a number is known that it could stand beside."""
    table = compared(tmp_path, "--vase", f"main/main={vase_metrics(tmp_path / 'v', 96)}", "--pipelines", "vase")
    assert set(table["pipeline"]) == {"vase"}
    assert table[["ours", "ours_n", "ours_ci_low", "ours_ci_high"]].isna().all(axis=None)
    by_metric = table.set_index("metric")
    assert by_metric.loc["grpo_caption_r1", ["this_run", "this_run_n", "paper"]].tolist() == [0.25, 96, 0.0352]
    assert "not known: which captions are its test items" in by_metric.loc["grpo_caption_r1", "differences"]
    assert "no record fits the predictions" in by_metric.loc["grpo_caption_r1", "differences"]
    assert by_metric.loc["sft_accuracy", ["protocol", "this_run"]].tolist() == ["no number known", 0.77]
    for metric in ("grpo_caption_r10", "sft_caption_r1"):  # too few candidates; a model without answers
        assert by_metric.loc[metric, "protocol"] == "not run" and pd.isna(by_metric.loc[metric, "this_run"])


def cells_of(page: str) -> list[list[str]]:
    """The cells of the page in Markdown, without their links."""
    lines = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| metric |")]
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line) for line in lines]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in plain]


def hrefs(html: str) -> list[str]:
    return re.findall(r'<a href="([^"]*)"', html)


def test_pages_and_table_say_the_same(tmp_path):
    rae = full_protocol(tmp_path / "run")
    given = ("--rae", f"main/main={rae}", "--vase", f"main/main={vase_metrics(tmp_path / 'v', 7)}")
    table = compared(tmp_path, *given)
    page, html = (tmp_path.joinpath(f"paper.{ending}").read_text() for ending in ("md", "html"))
    rows = cells_of(page)
    assert len(rows) == len(table) == len(TARGETS) == html.count("<tr") - table["pipeline"].nunique()
    notes = {
        pipeline: re.findall(r"^\d+\. (.*)$", section, flags=re.MULTILINE)
        for pipeline, section in re.findall(r"^## (\w+)$(.*?)(?=^## |\Z)", page, flags=re.MULTILINE | re.DOTALL)
    }
    for own in notes.values():
        assert len(set(own)) == len(own)  # each is said once
    for cells, (_, row) in zip(rows, table.iterrows(), strict=True):
        metric, model, paper, ours, this_run, protocol, source = cells
        assert metric[:-2] == row["metric"] and model == f"{row['model']}; {row['split']}" and source == row["source"]
        assert {"↑": "higher", "↓": "lower"}[metric[-1]] == row["better"]
        assert protocol.startswith(row["protocol"])
        for cell, name in ((paper, "paper"), (ours, "ours"), (this_run, "this_run")):
            if pd.isna(row[name]):
                assert cell == ""
            else:
                assert float(cell.split()[0].rstrip(",")) == pytest.approx(row[name], rel=1e-3)
                assert f"n = {row[f'{name}_n']:.0f}" in cell
        if row["protocol"] == "differs":
            numbers = [int(one) for one in re.findall(r"\((\d+)\)", protocol)]
            assert row["differences"] == "; ".join(notes[row["pipeline"]][number - 1] for number in numbers)
            said = re.sub(r" \(\d+\)", "", protocol)
            assert said == f"differs in {row['differs_in']}"
    for pipeline, costs in paper_tables.read_costs(TABLES["paper_costs"]).items():
        own = table[table["pipeline"] == pipeline]
        assert set(own["command"]) == {f"snakemake --profile slurm reproduce_{pipeline}"}
        for name, cost in costs.items():
            assert set(own[name]) == {cost.value} and f"({cost.basis}): {cost.how}" in page
    record = json.loads((tmp_path / "paper.meta.json").read_text())
    assert set(record["outputs"]) == {"paper.csv", "paper.md", "paper.html"}


def test_the_page_needs_no_other_file_and_escapes_text(tmp_path):
    tables = {"paper_targets": tmp_path / "targets.csv"}
    text = TABLES["paper_targets"].read_text().replace("BUSI,", "<b>BUSI</b> | x,", 1)
    tables["paper_targets"].write_text(text)
    compared(tmp_path, **tables)
    html = (tmp_path / "paper.html").read_text()
    assert not re.search(r"<(script|link|img|iframe)|src=|url\(|@import|(?<!<a href=\")https?:", html)
    assert "&lt;b&gt;BUSI" in html and "<b>" not in html
    assert "BUSI</b> \\| x" in (tmp_path / "paper.md").read_text()


def test_links_lead_to_sources_to_our_files_and_within_the_page(tmp_path):
    results = tmp_path / "a run"
    file = full_protocol(results / "rae 1")
    out, front = results / "paper", results / "index.html"
    compare_paper.main(options(out, "--rae", f"main/main={file}", "--pipelines", "rae", "--front-page", str(front)))
    front.touch()
    html, page = ((out / f"paper.{ending}").read_text() for ending in ("html", "md"))
    own = [one for one in hrefs(html) if not one.startswith("https:")]
    files = [(out / urllib.parse.unquote(one)).resolve() for one in own if not one.startswith("#")]
    assert set(files) == {file.resolve(), front.resolve(), (out / "paper.csv").resolve()}
    assert all(path.is_file() for path in files)
    anchors = set(re.findall(r'id="([^"]*)"', html))
    assert {one[1:] for one in own if one.startswith("#")} == anchors >= {"rae", "rae-1"}
    repo = "github.com/bytetriper/RAE"
    for one in ("arxiv.org/abs/2510.11690", f"{repo}/tree/a4d18c4", f"{repo}/issues/11"):
        assert f"https://{one}" in hrefs(html) and f"](https://{one})" in page
    assert "[front page (made by snakemake report)](../index.html)" in page
    assert "(../rae%201/evaluate/metrics.json)" in page
    table = pd.read_csv(out / "paper.csv")
    assert set(table["file"].dropna()) == {"../rae 1/evaluate/metrics.json"}


@pytest.mark.parametrize(
    ("pipelines", "drawn", "said"),
    [
        (["rae", "busi"], [], None),
        (["rae", "busi"], ["coca"], None),
        (["rae"], ["rae", "coca"], "Our numbers here are numbers of drawn data and tiny models."),
        (["rae", "busi"], ["busi"], "Our numbers of busi are numbers of drawn data and tiny models."),
    ],
)
def test_numbers_of_the_demos_data_are_marked_above_all(tmp_path, pipelines, drawn, said):
    compared(tmp_path, "--pipelines", *pipelines, *(["--drawn", *drawn] if drawn else []))
    for ending in ("html", "md"):
        page = (tmp_path / f"paper.{ending}").read_text()
        assert ("drawn data" in page) == bool(said)
        assert not said or page.index(said) < page.index("snakemake --profile")


def with_row(path: Path, table: Path, number: int, changes: dict[str, str]) -> Path:
    """A copy of a table with other values in the row of that line."""
    rows = list(csv.reader(table.read_text().splitlines()))
    for name, value in changes.items():
        rows[number - 1][rows[0].index(name)] = value
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.mark.parametrize(
    ("table", "changes", "message"),
    [
        ("paper_targets", {"pipeline": "ray"}, "pipeline = 'ray': Input should be"),
        ("paper_targets", {"metric": "dinov3_rfid"}, "metric = 'dinov3_rfid' is none of rae's: dinov2_rfid"),
        ("paper_targets", {"source": " "}, "source = ''"),
        ("paper_targets", {"value": "0,57"}, "value = '0,57': Input should be a valid number"),
        ("paper_targets", {"value": "nan"}, "value = 'nan'"),
        ("paper_targets", {"value": ""}, "empty where protocol is none"),
        ("paper_targets", {"n": ""}, "empty where protocol is none"),
        ("paper_targets", {"n": "many"}, "n = 'many'"),
        ("paper_targets", {"n_is": ""}, "n_is says of n whether the source states it"),
        ("paper_targets", {"n_is": "guessed"}, "n_is = 'guessed'"),
        ("paper_targets", {"protocol": "fid"}, "protocol = 'fid'"),
        ("paper_targets", {"protocol": "vase_captions"}, "not of pipeline rae"),
        ("paper_targets", {"better": "more"}, "better = 'more'"),
        ("paper_targets", {"settings": "tau"}, "override 'tau' is not of the form"),
        ("paper_costs", {"pipeline": "ray"}, "pipeline = 'ray'"),
        ("paper_costs", {"quantity": "euro"}, "quantity = 'euro'"),
        ("paper_costs", {"value": "-1"}, "value = '-1'"),
        ("paper_costs", {"basis": "guessed"}, "basis = 'guessed'"),
        ("paper_costs", {"how": ""}, "how = ''"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_written(tmp_path, table, changes, message):
    bad = with_row(tmp_path / "bad.csv", TABLES[table], 2, changes)
    with pytest.raises(KilnError) as caught:
        compared(tmp_path / "out", **{table: bad})
    assert caught.value.message.startswith(f"{bad}, row 2: ") and message in caught.value.message
    assert caught.value.hint and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("table", "old", "new", "message"),
    [
        ("paper_targets", "pipeline,metric,", "pipeline,measure,", "row 1: pipeline,measure,"),
        ("paper_targets", "\nbusi,", "\nbusi,,", "14 values for 13 columns"),
        ("paper_costs", "\nrae,gpu_hours", "\nrae,gpus", "row 3: gpus of rae is there twice"),
        ("paper_costs", re.search("\ncoca,disk_gb.*", TABLES["paper_costs"].read_text())[0], "", "no disk_gb of coca"),
    ],
)
def test_a_bad_table_is_named(tmp_path, table, old, new, message):
    text = TABLES[table].read_text()
    assert old in text
    bad = wrote(tmp_path / "bad.csv", text.replace(old, new, 1))
    with pytest.raises(KilnError, match=re.escape(message)) as caught:
        compared(tmp_path / "out", **{table: bad})
    assert str(bad) in caught.value.message and not (tmp_path / "out").exists()


def test_a_damaged_record_is_named(tmp_path):
    file = full_protocol(tmp_path / "run")
    wrote(tmp_path / "run/train/meta.json", "{")
    with pytest.raises(KilnError, match="train/meta.json: not JSON"):
        compared(tmp_path / "out", "--rae", f"main/main={file}")
    assert not (tmp_path / "out").exists()


def test_every_number_names_a_source_that_can_be_looked_up():
    for one in TARGETS:
        assert re.search(r"arXiv:\d{4}\.\d{5}|[\w.-]+/[\w.-]+(@[0-9a-f]{7}| issue #\d+)", one.source), one
        assert any(piece.url for piece in compare_paper.linked(one.source)), f"no link: {one.source}"
    assert {one.pipeline for one in TARGETS} == set(paper_tables.METRICS)


def test_constants_are_those_of_the_pipeline():
    from scripts.rae import extractors, fid, settings

    assert (paper_protocols.INCEPTION, INCEPTION_SHA256) == (extractors.INCEPTION, extractors.INCEPTION_SHA256)
    assert IMAGENET["validation"] == fid.PROTOCOL_IMAGES
    assert settings.CUT_FROM_TRAIN == "cut from train"


DEMO = ("--configfile", str(ROOT / "config/demo.yaml"))
PIPELINES = sorted(paper_tables.METRICS)


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_demo_reproduces_one_pipeline_and_no_other(tmp_path, pipeline):
    jobs = workflow.planned(ROOT, tmp_path, f"reproduce_{pipeline}", *DEMO)
    assert jobs["report_compare_paper"] == 1
    assert not [rule for rule in jobs if rule.split("_")[0] in set(PIPELINES) - {pipeline} or "retrieve" in rule]
    assert jobs == workflow.planned(ROOT, tmp_path, pipeline, *DEMO) | {"report_compare_paper": 1}


@pytest.mark.slow
def test_the_whole_table_needs_all_pipelines_and_one_job(tmp_path):
    jobs = workflow.planned(ROOT, tmp_path, "paper", *DEMO)
    assert jobs["report_compare_paper"] == 1 and {name.split("_")[0] for name in jobs} >= set(PIPELINES)


@pytest.mark.slow
def test_with_retrieved_encoders_the_released_decoders_are_scored_too(tmp_path):
    for place in ("train/a/1.png", "val/a/2.png", "val/a/3.png"):
        (tmp_path / "data" / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / place)
    settings = "rae.images=data rae.use=[dinov2] device=cpu check_disk=false"
    jobs = workflow.planned(ROOT, tmp_path, "reproduce_rae", "--config", f"set={settings}")
    assert jobs["rae_score_published"] == jobs["rae_evaluate"] == jobs["report_compare_paper"] == 1
    assert jobs["rae_train_autoencoder"] == 1 and jobs["retrieve_model"] == 6
