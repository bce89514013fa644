"""Which article a pair is from, and on which side that article is, wherever its pairs lie."""

from scripts.biomedica.settings import HeldOutSettings
from scripts.common import hashed

SIDES = ("train", "validation", "test")


def article_of(key: str) -> str:
    """The accession in a key `{batch}-{accession}-{figure}-{soft id}`; a key of another form is its own article."""
    parts = key.rpartition("/")[2].split("-", 3)
    return parts[1] if len(parts) == 4 and all(parts) else key


def side_of(article: str, values: HeldOutSettings) -> str:
    """One of `SIDES`, from seed and article alone: pairs that come later move no other, and no article is cut."""
    place = hashed.unit(values.seed, "biomedica", article)
    if place < values.test:
        return "test"
    return "validation" if place < values.test + values.validation else "train"
