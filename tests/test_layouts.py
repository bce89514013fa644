"""What is wrong with a user's own data is told while Snakemake plans: the key, what it should hold, where to read."""

from pathlib import Path

import pytest
import workflow

from scripts import config, layouts
from scripts.common.errors import KilnError

ROOT = Path(__file__).resolve().parents[1]
BUSI = ("Normal", "Benign", "Malignant")
KEY = "busi.list.classes"


def touch(place: Path, *files: str) -> Path:
    for file in files:
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).touch()
    return place


def refused(folder: Path, *tops: str, classes=BUSI, key: str | None = KEY) -> KilnError:
    for top in filter(None, tops):
        (folder / top).mkdir(parents=True, exist_ok=True)
    with pytest.raises(KilnError) as caught:
        layouts.require_classes(folder, tops, classes, key)
    return caught.value


def test_each_key_has_a_layout_and_a_section_of_the_page():
    page = (ROOT / layouts.PAGE).read_text(encoding="utf-8")
    for key in layouts.LAYOUTS:
        config.section(config.Config(), key)
        assert f"\n## {key.partition('.')[0]}\n" in page, key


def test_all_class_folders_in_any_letter_case_are_fine(tmp_path):
    layouts.require_classes(tmp_path, ["normal", "BENIGN", "malignant", "other", ""], BUSI, KEY)


@pytest.mark.parametrize(
    ("tops", "missing", "hint"),
    [
        (["Benign", "Malignant"], "Normal", "or set busi.list.classes to [Benign, Malignant] if these are all"),
        (["normal", "bening", "malignant"], "Benign", "rename the folder bening to Benign"),
        (["cat", "dog"], "Normal, Benign, Malignant", "or set busi.list.classes to [cat, dog]"),
        ([""], "Normal, Benign, Malignant", "add a folder with images for Normal, Benign, Malignant"),
    ],
)
def test_a_missing_class_is_named_beside_the_folders_that_there_are(tmp_path, tops, missing, hint):
    error = refused(tmp_path, *tops)
    assert f"{tmp_path}: no images of class {missing}: expected" in error.message
    assert "Normal, Benign, Malignant (busi.list.classes, in any letter case)" in error.message
    assert error.message.endswith(f"the folders with images are {', '.join(sorted(filter(None, tops))) or 'none'}")
    assert hint in error.hint


def test_a_folder_one_too_high_or_too_low_is_seen(tmp_path):
    touch(tmp_path, "BUSI/benign/a.png", "BUSI/normal/a.png")
    assert refused(tmp_path, "BUSI").hint == f"give {tmp_path / 'BUSI'}, which holds class folders"
    assert refused(tmp_path / "BUSI/benign", "").hint == f"give the folder above, {tmp_path / 'BUSI'}"


def test_classes_that_no_key_sets_are_not_offered_to_be_set(tmp_path):
    error = refused(tmp_path, "0", classes=("0", "1"), key=None)
    assert error.hint == "add a folder with images for 1" and "each of 0, 1; the folders" in error.message


def test_who_uses_some_pipelines_alone_is_told_how_to_say_so(tmp_path):
    error, key = KilnError("gone: no such folder", "give a folder"), "coca.slides"
    told = "set `pipelines` to those that you use"
    assert told in layouts.explained(error, "gone", [key], pipelines=("busi", "coca")).hint
    assert told not in layouts.explained(error, "gone", [key], pipelines=("coca",)).hint
    assert told not in layouts.explained(error, str(tmp_path), [key], pipelines=("busi", "coca")).hint


def test_an_error_of_no_key_stays_as_it_is():
    error = KilnError("x: bad", "mend it")
    assert layouts.explained(error, "x", []) is error


CASES = {  # key: target, settings, what is said, and of the layout
    "vase.images": ("vase_images", "{key}=gone", "gone: no such folder", "at any depth, named <vase>_<view>_"),
    "vase.labelled": ("vase_images", "vase.images=png {key}=one", "no images of class 0", "holds 0/ (images of low"),
    "vase.dataset.captions": ("vase", "vase.images=png vase.labelled=both {key}=gone", "gone: no such file", "JSON: ["),
    "busi.images": ("busi", "{key}=gone", "gone: no such folder", "a folder of images for each of busi.list.classes"),
    "rae.images": ("rae", "{key}=png", "png: no class folders", "train/CLASS/*.JPEG"),
    "coca.slides": ("coca", "coca.labels=texts.json {key}=png", "no file ends with one of .h5", "tile embeddings"),
    "coca.labels": ("coca", "coca.slides=slides {key}=gone", "gone: no such file", 'JSON: {"slide": "text"'),
    "biomedica.shards": ("biomedica", "{key}=gone", "gone: no such folder", "null streams all"),
}


@pytest.mark.slow
@pytest.mark.parametrize("key", CASES)
def test_the_plan_names_the_key_of_what_is_missing_and_what_it_should_hold(tmp_path, key):
    target, values, message, layout = CASES[key]
    labelled = ("both/0/a_1_ac001001.png", "both/1/b_1_ac001001.png", "one/1/b_1_ac001001.png")
    touch(tmp_path / "run", "png/a_1_ac001001.jpg", *labelled, "slides/a.h5", "texts.json")
    settings = f"set={values.format(key=key)} device=cpu check_disk=false"
    done = workflow.run(ROOT, tmp_path / "run", "--dry-run", target, "--config", settings, check=False)
    said = done.stdout + done.stderr
    assert done.returncode and message in said and f"(the value of {key}, given by --config set=...)" in said, said
    hint = said.partition("Hint: ")[2].splitlines()[0]
    assert f"{key} is " in hint and layout in hint
    assert f"(docs/your-data.md, section {key.partition('.')[0]})" in hint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "values", "says"),
    [
        ("vase_images", "", "matches none of 1 file names, such as 'pot.png'"),
        ("vase", " vase.list.view_pattern=null", "vase.dataset.captions and vase.dataset.questions are not given"),
    ],
)
def test_names_of_no_vase_and_a_second_half_without_questions_are_refused_by_the_plan(tmp_path, target, values, says):
    touch(tmp_path / "run", "raw/pot.png", "both/0/a.png", "both/1/b.png")
    settings = f"set=vase.images=raw vase.labelled=both device=cpu check_disk=false{values}"
    done = workflow.run(ROOT, tmp_path / "run", "--dry-run", target, "--config", settings, check=False)
    assert done.returncode and says in done.stdout + done.stderr


def test_a_model_of_another_family_is_refused():
    with pytest.raises(KilnError, match="qwen2.5-vl-3b-instruct is of family qwen, not hulumed: set busi.base.family"):
        config.load({"busi": {"base": {"model": "qwen2.5-vl-3b-instruct"}}}, Path("none"))
    config.load({"busi": {"base": {"model": "qwen2.5-vl-3b-instruct", "family": "qwen"}}}, Path("none"))
    config.load({"busi": {"base": {"model": "qwen/of/mine"}}}, Path("none"))


@pytest.mark.slow
def test_an_arrow_folder_that_is_none_is_refused_by_the_plan(tmp_path):
    touch(tmp_path / "run", "png/a/1.png")
    settings = "set=rae.images=png rae.dataset.source=arrow device=cpu check_disk=false"
    done = workflow.run(ROOT, tmp_path / "run", "--dry-run", "rae", "--config", settings, check=False)
    said = done.stdout + done.stderr
    assert done.returncode and "png: no Arrow data set: no */state.json (the value of rae.images" in said, said


@pytest.mark.slow
def test_a_missing_class_stops_before_any_job(tmp_path):
    touch(tmp_path / "run", "images/benign/a.png", "images/malignant/a.png", "base/config.json")
    settings = "set=busi.images=images busi.base.model=base device=cpu check_disk=false"
    done = workflow.run(ROOT, tmp_path / "run", "busi", "--config", settings, check=False)
    said = done.stdout + done.stderr
    assert done.returncode and "images: no images of class Normal: expected" in said, said
    assert "the folders with images are benign, malignant" in said
    assert "set busi.list.classes to [benign, malignant] if these are all your classes" in said
    assert not (tmp_path / "run/results/logs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "why"), [("biomedica.shards=png ", "png: no .tar in it"), ("", "data/biomedica: no such folder")]
)
def test_a_plan_that_streams_all_says_so(tmp_path, values, why):
    touch(tmp_path / "run", "png/a.png")
    settings = f"set={values}device=cpu check_disk=false"
    done = workflow.run(ROOT, tmp_path / "run", "--dry-run", "biomedica", "--config", settings)
    assert f"{why} (biomedica.shards), so all is streamed" in done.stdout + done.stderr
