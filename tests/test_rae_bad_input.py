"""Pipeline rae on bad input: it stops as early as it can, says what would do, and leaves nothing half-written.

Folders, Arrow folders and data sets that cannot be used are in `test_rae_arrow` and `test_rae_hub`, checkpoints of
another encoder and batches that images cannot fill in `test_rae_workflow`, and what does not fit in `test_rae_model`.
"""

import json
import pickle
from pathlib import Path

import pytest
import test_rae_workflow as small
import torch
import workflow
from safetensors.torch import load_file

from scripts.common.errors import KilnError
from scripts.rae import autoencoder_training, compute_latent_stats, latent_stats, train_autoencoder
from scripts.rae.settings import AutoencoderSettings

ROOT = Path(__file__).resolve().parents[1]
data = small.data
SHORT = {"epochs": 3, "warmup_epochs": 0, "discriminator_start": 1, "gan_start": 2}


def train(data, out: Path, *options, name="siglip2", **changes) -> dict[str, torch.Tensor]:
    """Train for twelve steps, through each stage of the schedule; the checkpoint's tensors."""
    train_autoencoder.main([*small.training(data, name, out, **{**SHORT, **changes}), *map(str, options)])
    return load_file(out / "autoencoder.safetensors")


@pytest.fixture(scope="module")
def undisturbed(data) -> Path:
    """The folder of such a training."""
    train(data, data / "undisturbed")
    return data / "undisturbed"


# --- sizes and statistics ---


def test_an_image_size_that_gives_no_whole_patch_stops_the_first_step_that_knows(data, tmp_path):
    settings = {"image_size": 30, "encoder": small.encoder_settings("siglip2")}
    command = ["--dataset", data / "arrow/dataset", "--encoder", data / "siglip2", "--output", tmp_path / "stat.pt"]
    command += ["--state-folder", tmp_path / "state", *small.common(tmp_path / "meta.json", settings)]
    with pytest.raises(KilnError, match="image size 30 is no multiple of the encoder's grid of 4 x 4") as caught:
        compute_latent_stats.main(list(map(str, command)))
    assert "set rae.image_size to 28 or 32" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_statistics_of_another_shape_are_refused(data, tmp_path):
    latent_stats.write_statistics(tmp_path / "stat.pt", torch.zeros(32, 5, 5), torch.ones(32, 5, 5))
    with pytest.raises(KilnError, match=r"mean has shape \[32, 5, 5\], expected \[32, 4, 4\]"):
        train(data, tmp_path / "out", "--statistics", tmp_path / "stat.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["stat.pt"]


# --- losses and weights that are no numbers ---


def at_call(number: int, function, change):
    """`function`, but call `number` (counted from 0) gives `change` of its result."""
    calls = []

    def changed(*args, **kwargs):
        calls.append(None)
        made = function(*args, **kwargs)
        return change(made) if len(calls) == number + 1 else made

    return changed


def poisoned_ema(calls: list, function):
    """The update of the average; at its third call a weight of the decoder becomes NaN."""

    def changed(ema, decoder, decay):
        calls.append(None)
        function(ema, decoder, decay)
        if len(calls) == 3:
            decoder.decoder_pred.bias.data[0] = torch.nan

    return changed


@pytest.mark.parametrize(
    ("name", "fault", "message", "last"),
    [
        (
            "reconstruction_loss",
            lambda old: at_call(6, old, lambda made: made._replace(total=made.total * torch.nan)),
            r"loss is nan at step 6, epoch 1, batch 2 \(counted from 0\): l1 0\.[0-9]+, lpips",
            6,
        ),
        (
            "discriminator_loss",
            lambda old: at_call(3, old, lambda made: made * torch.inf),
            r"the discriminator's loss is inf at step 7, epoch 1, batch 3",
            7,
        ),
        ("update_ema", lambda old: poisoned_ema([], old), r"largest decoder_pred.bias is nan at step 3, epoch 0, b", 2),
    ],
)  # fmt: skip
def test_nan_stops_training_and_the_last_good_state_carries_on(
    data, undisturbed, tmp_path, monkeypatch, name, fault, message, last
):
    losses = autoencoder_training.losses
    with monkeypatch.context() as patched:
        patched.setattr(losses, name, fault(getattr(losses, name)))
        with pytest.raises(KilnError, match=message) as caught:
            train(data, tmp_path / "out", save_minutes=0)
    assert "the last saved state is kept" in caught.value.hint
    assert not (tmp_path / "out").exists()
    saved = sorted(tmp_path.glob("out.state/*/step-*"))
    assert saved[-1].name == f"step-{last:09d}"
    state = torch.load(saved[-1] / "shared.pt", weights_only=True)
    assert all(weight.isfinite().all() for part in ("decoder", "ema", "heads") for weight in state[part].values())
    train(data, tmp_path / "out", save_minutes=0)  # the fault has passed
    for file in small.RESULTS:
        assert (tmp_path / "out" / file).read_bytes() == (undisturbed / file).read_bytes(), file


# --- a global batch and its GPUs ---


def test_processes_that_do_not_divide_the_batch_are_refused():
    values = AutoencoderSettings(batch_size=512, accumulation=2)
    train_autoencoder.check_batches(values, 10_000, 8)
    with pytest.raises(KilnError, match="batch_size 512 over 6 processes, one per GPU, and 2 passes") as caught:
        train_autoencoder.check_batches(values, 10_000, 6)
    assert "a multiple of 12" in caught.value.hint


def test_gpus_that_do_not_divide_the_batch_stop_the_plan_of_what_trains(data, tmp_path):
    encoder = {"model": str(data / "siglip2"), "input_size": 32}
    rae = {**small.TRAIN, "images": str(data / "images"), "use": ["siglip2"], "encoders": {"siglip2": encoder}}
    rae |= {"evaluate": small.EVALUATE, "resources": "gpu_single"}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"resources": {"gpu_single": {"gpu": 5}}, "rae": rae}))
    (run := tmp_path / "run").mkdir()
    target = "results/rae/train_autoencoder/main/siglip2/autoencoder.safetensors"
    more = ["--configfile", str(config), "--resources", "gpu=8"]
    done = workflow.run(ROOT, run, target, "--dry-run", *more, check=False)
    said = done.stdout + done.stderr
    assert done.returncode and "batch_size 24 over 5 processes" in said and "set it to a multiple of 5" in said
    others = workflow.planned(ROOT, run, "results/rae/compute_latent_stats/siglip2/stat.pt", *more)
    assert others == {"rae_build_arrow": 1, "rae_compute_latent_stats": 1}
    # each run of a variant by its own settings
    values = ("resources.gpu_single.gpu=4", "rae.variants.odd.autoencoder.batch_size=23",
              "rae.variants.after.autoencoder.init_from=rae-decoder-siglip2-base-vitxl")  # fmt: skip
    more += ["--config", f"set={' '.join(values)}"]
    done = workflow.run(ROOT, run, target.replace("main", "odd"), "--dry-run", *more, check=False)
    assert done.returncode and "batch_size 23 over 4 processes" in done.stdout + done.stderr
    planned = workflow.planned(ROOT, run, target.replace("main", "after"), *more)
    assert planned == {**others, "retrieve_model": 1, "rae_train_autoencoder": 1}


# --- decoders to start from ---

STILL = {"epochs": 1, "lr": 1e-12, "final_lr": 0, "discriminator_start": 1, "gan_start": 1}


def test_training_starts_from_a_checkpoint_or_a_published_decoder(data, undisturbed, tmp_path):
    start = undisturbed / "autoencoder.safetensors"
    tensors = load_file(start)
    decoder = {name.removeprefix("decoder."): one for name, one in tensors.items() if name.startswith("decoder.")}
    torch.save(decoder, tmp_path / "model.pt")
    for number, made in enumerate(
        (
            train(data, tmp_path / "a", **STILL, init_from=str(start)),
            train(data, tmp_path / "b", **STILL, init_from=str(tmp_path / "model.pt")),
            train(data, tmp_path / "c", "--init-from", tmp_path / "model.pt", **STILL, init_from="a name"),
        )
    ):
        for name, weight in tensors.items():
            torch.testing.assert_close(made[name], weight, msg=f"{number}: {name}")
    inputs = json.loads((tmp_path / "c/meta.json").read_text())["inputs"]
    assert inputs["init_from"]["path"] == str(tmp_path / "model.pt")


class _Harm:
    def __reduce__(self):
        return Path.touch, (Path("harm"),)


def test_other_files_are_no_start(data, undisturbed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"decoder_pred.weight": torch.zeros(2, 2)}, "step": 3}, "ep-last.pt")
    Path("harm.pt").write_bytes(pickle.dumps(_Harm(), protocol=2))
    torch.save({"decoder_pred.weight": torch.zeros(2, 2)}, "half.pt")
    Path("cut.safetensors").write_bytes((undisturbed / "autoencoder.safetensors").read_bytes()[:-9])
    files = set(tmp_path.iterdir())
    for path, message in (
        ("gone.pt", "gone.pt: no such file"),
        ("harm.pt", "harm.pt: damaged, or holds more than tensors"),
        ("ep-last.pt", "ep-last.pt: no state dict of a decoder, but model, step"),
        ("half.pt", "half.pt: no tensor decoder_embed.weight"),
        ("cut.safetensors", "cut.safetensors: no checkpoint of an autoencoder"),
    ):
        with pytest.raises(KilnError, match=message) as caught:
            train(data, tmp_path / "out", init_from=path)
        assert caught.value.hint
    with pytest.raises(KilnError, match="trained on encoder siglip2 .*dinov2 holds another"):
        train(data, tmp_path / "out", name="dinov2", init_from=str(undisturbed / "autoencoder.safetensors"))
    assert set(tmp_path.iterdir()) == files  # nothing was run, and nothing left
