import math

import pytest
import torch
from torch import nn

from scantly.methods.parts.ema import ema_decay, gather_statistics, make_teacher, update_teacher
from scantly.methods.parts.ramps import gaussian_rampup


def test_ema_worked_number():
    student, teacher = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.constant_(teacher.weight, 5.0)
    seen = []
    for t, value in enumerate([1.0, 2.0, 4.0]):
        nn.init.constant_(student.weight, value)
        update_teacher(teacher, student, ema_decay(t, 0.99))
        seen.append(teacher.weight.item())
    assert seen == pytest.approx([1.0, 1.5, 7 / 3])


def test_decay_zero_copies_in_place():
    student, teacher = nn.Linear(2, 2), nn.Linear(2, 2)
    before = teacher.weight.data_ptr()
    update_teacher(teacher, student, 0.0)
    assert teacher.weight.data_ptr() == before
    assert torch.equal(teacher.weight, student.weight)
    assert torch.equal(teacher.bias, student.bias)


def test_decay_is_the_running_mean_until_its_cap():
    assert [ema_decay(t, 0.99) for t in (0, 1, 98)] == pytest.approx([0, 0.5, 98 / 99])
    assert ema_decay(99, 0.99) == 0.99
    assert ema_decay(10_000, 0.99) == 0.99


@pytest.mark.parametrize("buffers", ["student", "own"])
def test_batch_norm_buffers(buffers):
    student = nn.BatchNorm2d(2)
    teacher = make_teacher(student)
    student(torch.randn(4, 2, 3, 3) + 5)
    update_teacher(teacher, student, 0.9, buffers=buffers)
    same = torch.equal(teacher.running_mean, student.running_mean)
    assert same == (buffers == "student")
    assert int(teacher.num_batches_tracked) == (1 if buffers == "student" else 0)


def test_teacher_takes_no_gradient():
    assert not any(p.requires_grad for p in make_teacher(nn.Linear(2, 2)).parameters())


def test_ramp():
    assert gaussian_rampup(0, 200) == pytest.approx(math.exp(-5))
    assert gaussian_rampup(200, 200) == gaussian_rampup(999, 200) == 1.0
    assert gaussian_rampup(3, 0) == 1.0
    values = [gaussian_rampup(t, 50) for t in range(60)]
    assert values == sorted(values)


def test_statistics_of_prediction_are_those_of_clean_passes_without_dropout():
    student = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(1), nn.Dropout(0.5))
    teacher = make_teacher(student, buffers="predicting").train()
    teacher[2].eval()
    norm = teacher[1]
    first, second = torch.tensor([1.0, 3.0]).reshape(1, 1, 1, 2), torch.tensor([5.0, 9.0]).reshape(1, 1, 1, 2)
    teacher(first + 7)  # its passes for targets leave them alone
    assert (norm.running_mean.item(), norm.running_var.item()) == (0, 1)
    gather_statistics(teacher, first, 0)
    assert (norm.running_mean.item(), norm.running_var.item()) == (2, 2)  # mean 2, unbiased variance 2
    gather_statistics(teacher, second, 1)
    assert (norm.running_mean.item(), norm.running_var.item()) == (4.5, 5)  # equal shares: (2 + 7) / 2, (2 + 8) / 2
    gather_statistics(teacher, second, 99)
    assert norm.running_mean.item() == pytest.approx(5.0)  # 0.8 * 4.5 + 0.2 * 7
    teacher(first)
    update_teacher(teacher, student, 0.9, buffers="predicting")
    assert norm.running_mean.item() == pytest.approx(5.0)
    assert [module.training for module in teacher] == [True, True, False]  # as before


def test_networks_without_such_statistics_are_not_run():
    def fail(*_):
        raise AssertionError

    network = nn.Sequential(nn.InstanceNorm2d(1))
    network.register_forward_hook(fail)
    gather_statistics(network, torch.zeros(1, 1, 2, 2), 0)
