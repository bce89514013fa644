"""config/smoke.yaml through Snakemake: at the published architectures on a GPU, and the same jobs, tiny, on a CPU."""

import pytest
import smoke_run

MINUTES = 10  # that a pipeline may take on one GPU
TRAININGS = {
    "vase": ["vase/train_classifier", "vase/train_grpo", "vase/train_sft"],
    "busi": ["busi/train_lora/main/lora", "busi/train_lora/main/qlora"],
    "rae": ["rae/train_autoencoder/dinov2", "rae/train_autoencoder/siglip2"],
    "coca": ["coca/train"],
    "biomedica": ["biomedica/train_clip/main/hybrid-42"],
}


@pytest.mark.gpu
@pytest.mark.slow(minutes=MINUTES)
@pytest.mark.parametrize("pipeline", TRAININGS)
def test_a_pipeline_runs_at_its_published_architecture(pipeline, tmp_path, capsys):
    """On one GPU; prints minutes and the peak of its memory in each step."""
    minutes = smoke_run.run(tmp_path / "run", pipeline, {}, cores=8)
    results = tmp_path / "run/results/smoke"
    assert smoke_run.steps(results) == dict.fromkeys(TRAININGS[pipeline], 5)
    peaks = smoke_run.peaks(results)
    assert all(name in peaks for name in TRAININGS[pipeline])
    with capsys.disabled():
        print(f"\n{pipeline}: {minutes:.1f} min of the {MINUTES} that it may take, GB of GPU memory: {peaks}")


@pytest.mark.gpu
@pytest.mark.slow(minutes=MINUTES)
def test_bmc_clips_model_trains(tmp_path):
    """The preset's ViT-L-14 in place of the default ViT-B-32."""
    smoke_run.run(tmp_path / "run", "biomedica", {}, cores=8, preset=["config/bmc_clip.yaml"])
    assert smoke_run.steps(tmp_path / "run/results/smoke") == {"biomedica/train_clip/main/hybrid-42": 5}


@pytest.mark.slow(minutes=15)  # the five together
@pytest.mark.parametrize("pipeline", TRAININGS)
def test_the_same_jobs_run_at_tiny_shapes_on_a_cpu(pipeline, tmp_path):
    smoke_run.run(tmp_path / "run", pipeline, smoke_run.TINY, cores=2)
    assert smoke_run.steps(tmp_path / "run/results/smoke") == dict.fromkeys(TRAININGS[pipeline], 5)
