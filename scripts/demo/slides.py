"""Drawn slides: tile embeddings from a mixture of tissue kinds, and report sentences in Chinese or English.

A tile is the mean of its kind, the stain of its patient, and noise. The diagnosis decides which lesion kinds there are,
the grade how far its tiles move along one direction and how many are necrotic, the site which normal kind surrounds
them. How many tiles a slide has, and how many of these are lesion or artefact, follows from none of them.
"""

from typing import NamedTuple

import numpy as np

DIAGNOSES: dict[str, list[str]] = {
    "adenocarcinoma": ["adenocarcinoma", "腺癌"],
    "squamous cell carcinoma": ["squamous cell carcinoma", "鳞状细胞癌"],
    "neuroendocrine tumour": ["neuroendocrine tumour", "神经内分泌肿瘤"],
    "lymphoma": ["lymphoma", "淋巴瘤"],
    "chronic inflammation": ["chronic inflammation", "慢性炎症"],
}
SITES = {"lung": "肺", "stomach": "胃", "colon": "结肠", "oesophagus": "食管"}
GRADES = {"low": "低级别", "intermediate": "中级别", "high": "高级别"}
_KINDS = len(DIAGNOSES)  # of lesion tiles; besides them the normal ones of each site, stroma, necrosis and artefacts
_STROMA, _NECROSIS, _ARTEFACT = range(_KINDS + len(SITES), _KINDS + len(SITES) + 3)
_OWN = 0.6  # share of a diagnosis's own kind among its lesion tiles
_STAIN, _GRADE, _NOISE = 0.35, 0.5, 1.0  # size per feature, beside the kinds' 1
_COMMON = 0  # the random stream of kinds and directions; a slide's own has its number


class Case(NamedTuple):
    """What a slide shows."""

    diagnosis: str
    site: str
    grade: str


class Tissue(NamedTuple):
    """What all slides share, float32: means of tile kinds [kinds,dim], and the direction of high grade [dim]."""

    kinds: np.ndarray
    grade: np.ndarray


def make_tissue(seed: int, dim: int) -> Tissue:
    """Kinds whose means have the same norm."""
    rng = np.random.default_rng([seed, _COMMON])
    made = rng.standard_normal((_ARTEFACT + 2, dim), dtype=np.float32)
    made *= np.sqrt(dim) / np.linalg.norm(made, axis=1, keepdims=True)
    return Tissue(made[:-1], made[-1])


def draw_tiles(case: Case, tissue: Tissue, tiles: int, stain: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Float16 [tiles,dim], in random order; `stain` is the patient's, standard normal [dim]."""
    lesion, artefact = rng.uniform(0.15, 0.6), rng.uniform(0.02, 0.3)
    grade = [*GRADES].index(case.grade)
    necrosis = rng.uniform(0, 0.5) * (grade + 0.5) / 2.5
    shares = np.zeros(len(tissue.kinds))
    own = [*DIAGNOSES].index(case.diagnosis)
    shares[:_KINDS] = lesion * (1 - necrosis) * _mixture(own, rng)
    shares[_NECROSIS] = lesion * necrosis
    shares[_KINDS + [*SITES].index(case.site)] = (1 - lesion) * rng.uniform(0.4, 0.8)
    shares[_STROMA] = 1 - shares.sum()
    shares *= 1 - artefact
    shares[_ARTEFACT] = artefact
    kinds = rng.choice(len(shares), tiles, p=shares)
    made = rng.standard_normal((tiles, stain.size), dtype=np.float32)
    made *= np.where(kinds == _ARTEFACT, 2 * _NOISE, _NOISE).astype(np.float32)[:, None]
    made += tissue.kinds[kinds]
    made[kinds < _KINDS] += np.float32(_GRADE * (grade - 1)) * tissue.grade
    made += np.float32(_STAIN) * stain
    return made.astype(np.float16)


def _mixture(own: int, rng: np.random.Generator) -> np.ndarray:
    """Shares of the lesion kinds, around `_OWN` for that of the diagnosis; the others have what is left."""
    centre = np.full(_KINDS, (1 - _OWN) / (_KINDS - 1))
    centre[own] = _OWN
    return rng.dirichlet(12 * centre)


def write_report(case: Case, rng: np.random.Generator) -> str:
    """A sentence or two, in Chinese or English by chance."""
    term, chinese = DIAGNOSES[case.diagnosis]
    if rng.random() < 0.5:
        site, grade = SITES[case.site], GRADES[case.grade]
        phrasings = (
            f"{site}活检：{chinese}，{grade}。",
            f"（{site}）{grade}{chinese}。",
            f"送检{site}组织，镜下符合{chinese}，为{grade}。",
            f"病理诊断：{site}{chinese}，{grade}。",
        )
    else:
        grade = f"{case.grade} grade"
        phrasings = (
            f"{case.site.capitalize()} biopsy: {term}, {grade}.",
            f"{grade.capitalize()} {term} of the {case.site}.",
            f"Sections of the {case.site} show {term}. The lesion is {grade}.",
            f"Diagnosis: {term} ({grade}), {case.site}.",
        )
    return phrasings[rng.integers(len(phrasings))]
