"""What is said of bf16 on processors without instructions for it."""

from __future__ import annotations

import logging

import pytest
import torch

from scantly.networks.precision import say_slow_bf16


@pytest.mark.parametrize(
    ("device", "capability", "said"),
    [
        ("cpu", "AVX2", True),
        ("cpu", "NO AVX", True),
        ("cpu", "DEFAULT", False),  # other architectures: not known
        ("cpu", "AVX512", False),
        ("cpu", "SVE256", False),
        ("meta", "AVX2", False),
    ],
)
def test_a_processor_that_emulates_bf16_is_told_once(device, capability, said, monkeypatch, caplog):
    say_slow_bf16.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with caplog.at_level(logging.WARNING, logger="scantly"):
        for _ in range(2):
            say_slow_bf16(device)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * said
    if said:
        assert "--precision 32" in caplog.text
    say_slow_bf16.cache_clear()
