import math

import pytest
import torch
from torch import nn

from scantly.methods.parts.ema import ema_decay, make_teacher, update_teacher
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
