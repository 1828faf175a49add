"""The memory bank, against a plain list."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from scantly.methods.parts.memory_bank import MemoryBank


def test_36_rows_filled_by_fours_are_replaced_once_after_nine_steps():
    start = torch.nn.functional.normalize(torch.randn(36, 5), dim=1)
    bank = MemoryBank(36, (5,), initial=start)
    steps = [torch.nn.functional.normalize(torch.randn(4, 5), dim=1) for _ in range(10)]
    for step, rows in enumerate(steps[:9]):
        assert torch.equal(bank.values[4 * step :], start[4 * step :])  # the oldest leave first
        bank.push(rows)
    assert torch.equal(bank.values, torch.cat(steps[:9]))
    assert bank.pointer == 0
    assert bank.fill == 1
    assert torch.allclose(bank.values.norm(dim=1), torch.ones(36))
    bank.push(steps[9])
    assert torch.equal(bank.values, torch.cat([steps[9], *steps[1:9]]))


@given(
    capacity=st.integers(1, 7),
    pushes=st.lists(st.lists(st.booleans(), max_size=20), max_size=6),
    masked=st.booleans(),
)
def test_it_holds_what_a_ring_holds(capacity, pushes, masked):
    bank, ring, came = MemoryBank(capacity, (2,)), {}, 0
    number = 0
    for push in pushes:
        rows = torch.arange(number, number + len(push)).float()[:, None].expand(-1, 2)
        number += len(push)
        keep = torch.tensor(push, dtype=torch.bool)
        bank.push(rows, keep if masked else None)
        for row, kept in zip(rows, push, strict=True):
            if kept or not masked:
                ring[came % capacity] = row
                came += 1
    assert int(bank.filled) == min(came, capacity)
    assert int(bank.pointer) == came % capacity
    assert int(bank.valid.sum()) == int(bank.filled)
    for slot, row in ring.items():
        assert torch.equal(bank.values[slot], row)


def test_it_is_saved_and_takes_no_gradient():
    bank = MemoryBank(3, (2,))
    rows = torch.ones(2, 2, requires_grad=True)
    bank.push(rows * 2)
    assert not bank.values.requires_grad
    other = MemoryBank(3, (2,))
    other.load_state_dict(bank.state_dict())
    other.push(torch.zeros(2, 2))
    assert other.values.tolist() == [[0, 0], [2, 2], [0, 0]]
