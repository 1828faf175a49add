"""Parameter counts and outputs of networks whose parameters are filled by a rule, against those of the public codes."""

from __future__ import annotations

import pytest
import torch
from golden_runs import computed_in
from golden_values import entries, fill, image
from known_deviations import check
from network_comparisons import NETWORKS, compared_network
from torch import nn

ENTRIES = entries("networks")


def test_every_entry_is_compared() -> None:
    assert NETWORKS.keys() == ENTRIES.keys()


def test_the_filling_and_the_input_are_those_of_the_rule() -> None:
    """First values and sums that the description of the files has."""
    convolution, norm = nn.Conv2d(3, 2, 3).double(), nn.BatchNorm2d(2).double()
    fill(nn.Sequential(convolution, norm))
    first = convolution.weight.flatten()[:3].tolist()
    assert first == pytest.approx([-0.471159900689, -0.356764029433, -0.241476014275], rel=1e-11)
    assert convolution.weight.sum().item() == pytest.approx(-0.833751644318)
    assert norm.weight.tolist() == pytest.approx([1.24651256849, 0.780310892691])
    assert norm.bias.tolist() == pytest.approx([-0.0505410479083, -0.0477694174387])
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.running_mean.tolist() == pytest.approx([0.0526136658476, 0.0446375971063])
    assert norm.running_var.tolist() == pytest.approx([1.04034584332, 0.946727003556])
    shown = image((2, 1, 32, 48))
    assert shown[0, 0, 0, 0].item() == 0.5
    assert shown[1, 0, 2, 3].item() == pytest.approx(0.506728211756)
    assert shown.sum().item() == pytest.approx(-8.72910158033)


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, precision: str) -> None:
    with computed_in(precision) as dtype:
        compared = list(compared_network(name, dtype))
    terms = {each.term for each in compared}
    assert terms == {"parameters", *ENTRIES[name]["by_kind"], *ENTRIES[name]["outputs"]}
    check("networks", name, compared, precision)
    assert torch.get_default_dtype() == torch.float32
