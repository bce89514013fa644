"""Make an autoencoder of a published decoder and its latent statistics, with no training.

Rule `rae_import_published`. The decoder's size is read off its tensors; whatever does not fit the encoder is refused.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from scripts.common import model_folders, step
from scripts.common.errors import KilnError
from scripts.common.settings import Settings
from scripts.rae import checkpoints, latent_stats, published
from scripts.rae.autoencoder import Autoencoder
from scripts.rae.encoder import Encoder
from scripts.rae.settings import EncoderSettings, PublishedSettings


class ImportPublishedSettings(Settings):
    """Settings of this step."""

    encoder: EncoderSettings
    image_size: int = 256
    published: PublishedSettings = PublishedSettings()


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, ImportPublishedSettings)
    made.add_argument("--name", required=True, help="the encoder's name in the configuration")
    made.add_argument("--encoder", type=Path, required=True, help="folder of the encoder")
    made.add_argument("--decoder", type=Path, required=True, help="a published model.pt")
    made.add_argument("--statistics", type=Path, required=True, help="a published stat.pt")
    made.add_argument("--output", type=Path, required=True, help="autoencoder.safetensors")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Import what `args` name.

    Raises:
        KilnError: a file is damaged, holds more than tensors, or does not fit the encoder or the image size.
    """
    values = step.read_settings(args)
    inputs = {"decoder": args.decoder, "statistics": args.statistics} | model_folders.identity(args.encoder)
    record = step.record(args, "scripts.rae.import_published", values, inputs)
    own = values.published
    encoder = Encoder(args.encoder, values.encoder.input_size)
    decoder, size = published.read_decoder(args.decoder, encoder, values.image_size, own.heads)
    mean, var = latent_stats.read_statistics(args.statistics)
    try:
        Autoencoder(encoder, decoder, own.tau, mean, var)
    except KilnError as error:
        raise KilnError(f"{args.statistics}: {error.message}", error.hint) from None
    facts = checkpoints.Facts(args.name, checkpoints.identity(args.encoder), encoder.input_size, values.image_size,
                              tuple(size), own.tau, steps=0)  # fmt: skip
    checkpoints.save(args.output, decoder, mean, var, facts)
    step.log.info("decoder of %d layers, width %d, MLP %d, %d heads", *size)
    record.write(args.meta, [args.output])


if __name__ == "__main__":
    step.run(main)
