"""Rules whose code needs other packages than this environment has are refused before any job."""

import importlib.metadata
from pathlib import Path

import numpy as np
import pytest
import workflow
from PIL import Image

from scripts.common import env_key
from scripts.common.errors import KilnError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder of three pictures in each class of busi."""
    noise = np.random.default_rng(0)
    for name in ("normal", "benign", "malignant"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            pixels = noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"images/{name}/{number}.png")
    return tmp_path / "images"


def given(images: Path, base: str, family: str) -> tuple[str, ...]:
    return "busi", "--config", f"set=busi.images={images} busi.base.model={base} busi.base.family={family}"


def test_hulu_med_is_refused_where_transformers_is_too_new_for_it(images, tmp_path):
    if int(importlib.metadata.version("transformers").split(".")[0]) < 5:
        pytest.skip("this environment's transformers can import Hulu-Med")
    hulumed = given(images, "hulu-med-4b", "hulumed")
    planned = workflow.run(ROOT, tmp_path, "--dry-run", *hulumed)
    wanted = "busi_merge, busi_predict, busi_train_lora: made for hulumed.yaml with"
    assert wanted in planned.stdout + planned.stderr and "Hint: run with --sdm conda" in planned.stdout + planned.stderr
    done = workflow.run(ROOT, tmp_path, *hulumed, check=False)
    assert done.returncode and wanted in done.stdout + done.stderr, done.stderr
    assert not workflow.finished(done.stdout + done.stderr)
    other = workflow.run(ROOT, tmp_path, "--dry-run", *given(images, "qwen2.5-vl-3b-instruct", "qwen"))
    assert "made for" not in other.stdout + other.stderr


def test_environments_of_the_lock_fit_and_another_major_is_named(tmp_path):
    """All but those that are apart on purpose."""
    fitting = [("rule", path) for path in (ROOT / "envs").glob("*.yaml") if not path.stem.startswith("hulumed")]
    env_key.require_majors(fitting)
    old = tmp_path / "old.yaml"
    old.write_text("dependencies: [python=3.11, pip, pip: [numpy==0.9, no-such-package==1.0, pandas]]")
    with pytest.raises(KilnError, match=r"a, b: made for old.yaml with numpy 0\.9 \(here: "):
        env_key.require_majors([("b", old), ("a", old), *fitting])
