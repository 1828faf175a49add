"""Which images of a step the local contrastive loss pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scantly.losses.local_contrastive import Variant

__all__ = ["PairTable", "pair_table"]

#: Tenths of the pairs: labeled alone, labeled with unlabeled, unlabeled alone, two unlabeled.
_TENTHS = (2, 3, 2, 3)


@dataclass(frozen=True)
class PairTable:
    """Pairs of the images ``labeled ... unlabeled ...`` of a step.

    Attributes:
        labeled: Number of labeled images; they come first.
        unlabeled: Number of unlabeled images.
        first: Index of each pair's first image.
        second: Index of its second.
    """

    labeled: int
    unlabeled: int
    first: tuple[int, ...]
    second: tuple[int, ...]


def pair_table(pairs: int, variant: Variant, *, labeled_pairs: Literal["same", "different"] = "same") -> PairTable:
    """The pairs of a step, those with the most unlabeled images last.

    *Inter*: of ten pairs two are a labeled image with itself (two views of it), three a labeled with an unlabeled
    image, two an unlabeled image with itself and three two unlabeled images; with ten pairs exactly the table of the
    public code of Chaitanya et al., Medical Image Analysis 2023, else rounded to the largest remainders.
    *Intra*: every image with itself.

    Args:
        pairs: Number of pairs, at least 4; so many images, too.
        variant: ``intra`` or ``inter``.
        labeled_pairs: ``different``: inter pairs of labeled images alone are two images instead of one.

    Example:
        >>> table = pair_table(10, "inter")
        >>> table.first, table.second  # images 0 to 4 are labeled
        ((0, 1, 2, 3, 4, 5, 5, 7, 7, 8), (0, 6, 2, 8, 9, 5, 6, 7, 8, 9))
    """
    own, crossed, unlabeled_own, _ = counts = _shares(pairs)
    labeled, unlabeled = own + crossed, pairs - own - crossed
    if variant == "intra":
        return PairTable(labeled, unlabeled, tuple(range(pairs)), tuple(range(pairs)))
    # Images at even places are paired with themselves, as long as there are such pairs; the others across.
    labeled_rest = [i for i in range(labeled) if i % 2 or i >= 2 * own]
    rest = [labeled + i for i in range(unlabeled) if i % 2 or i >= 2 * unlabeled_own]
    shift = 1 if labeled_pairs == "different" else 0
    table = [(2 * i, 2 * i + shift) for i in range(own)]
    table += [(i, rest[k % len(rest)]) for k, i in enumerate(labeled_rest)]
    selves = [labeled + 2 * i for i in range(unlabeled_own)]
    table += [(i, i) for i in selves]
    table += [(selves[k] if k < len(selves) else rest[k - 1], rest[k]) for k in range(counts[3])]
    first, second = zip(*sorted(table), strict=True)
    return PairTable(labeled, unlabeled, first, second)


def _shares(pairs: int) -> list[int]:
    counts = [pairs * tenths // 10 for tenths in _TENTHS]
    by_remainder = sorted(range(len(_TENTHS)), key=lambda i: -(pairs * _TENTHS[i] % 10))
    for index in by_remainder[: pairs - sum(counts)]:
        counts[index] += 1
    return counts
