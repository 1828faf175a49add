"""The pair table of the local contrastive loss."""

import pytest

from scantly.methods.parts.image_pairs import pair_table


def kinds(table):
    """Pairs of labeled images alone, labeled with unlabeled, an unlabeled one with itself, two unlabeled."""
    counts = [0, 0, 0, 0]
    for first, second in zip(table.first, table.second, strict=True):
        if second < table.labeled:
            counts[0] += 1
        elif first < table.labeled:
            counts[1] += 1
        else:
            counts[2 if first == second else 3] += 1
    return counts


def test_ten_pairs_are_the_published_ones():
    images = ["l0", "l1", "l2", "l3", "l4", "u0", "u1", "u2", "u3", "u4"]
    table = pair_table(10, "inter")
    assert (table.labeled, table.unlabeled) == (5, 5)
    pairs = [(images[a], images[b]) for a, b in zip(table.first, table.second, strict=True)]
    assert pairs[0] == ("l0", "l0")
    assert pairs[2] == ("l2", "l2")
    assert [pairs[i] for i in (1, 3, 4)] == [("l1", "u1"), ("l3", "u3"), ("l4", "u4")]
    assert [pairs[i] for i in (5, 7)] == [("u0", "u0"), ("u2", "u2")]
    assert [pairs[i] for i in (6, 8)] == [("u0", "u1"), ("u2", "u3")]
    assert pairs[9] == ("u3", "u4")


@pytest.mark.parametrize("pairs", range(4, 33))
def test_shares_of_other_numbers_and_every_image_takes_part(pairs):
    table = pair_table(pairs, "inter")
    found = kinds(table)
    assert len(table.first) == len(table.second) == sum(found) == table.labeled + table.unlabeled == pairs
    for count, share in zip(found, (0.2, 0.3, 0.2, 0.3), strict=True):
        assert abs(count - share * pairs) < 1
    assert {*table.first, *table.second} == set(range(pairs))
    labeled_alone = [(a, b) for a, b in zip(table.first, table.second, strict=True) if b < table.labeled]
    assert all(a == b for a, b in labeled_alone)


def test_intra_pairs_every_image_with_itself():
    table = pair_table(10, "intra")
    assert table.first == table.second == tuple(range(10))
    assert (table.labeled, table.unlabeled) == (5, 5)


def test_labeled_pairs_can_be_two_images():
    table = pair_table(10, "inter", labeled_pairs="different")
    labeled_alone = [(a, b) for a, b in zip(table.first, table.second, strict=True) if b < 5]
    assert labeled_alone == [(0, 1), (2, 3)]
    assert kinds(table) == [2, 3, 2, 3]
