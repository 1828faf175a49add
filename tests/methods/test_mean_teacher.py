import pytest
import torch
from torch import nn

from scantly.methods.base import Batch, Progress, Task
from scantly.methods.mean_teacher import MeanTeacher
from scantly.methods.supervised import Supervised

ARGUMENTS = {"widths": [4, 8], "dropout": [0.0, 0.0]}


def task(dims=2):
    return Task(1, ("background", "a", "b"), dims, (16,) * dims, "unet", ARGUMENTS)


def batch(dims=2, labeled=2, unlabeled=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    side = (16,) * dims
    x = torch.rand(labeled, 1, *side, generator=generator)
    u = torch.rand(unlabeled, 1, *side, generator=generator)
    y = torch.randint(3, (labeled, *side), generator=generator)
    return Batch(x, y, u, x, y, u)


def method(dims=2, **settings):
    torch.manual_seed(0)
    return MeanTeacher(task(dims), MeanTeacher.Config(**settings))


def test_weight_of_the_published_schedule():
    mt = method()
    values = {t: mt.config.consistency_weight(Progress(t, 30_000)) for t in (0, 7_500, 15_000, 29_999, 30_000, 40_000)}
    assert values[0] == pytest.approx(0.000674, abs=1e-6)
    assert values[7_500] == pytest.approx(0.006005, abs=1e-6)
    assert values[15_000] == pytest.approx(0.028650, abs=1e-6)
    assert values[29_999] == pytest.approx(0.099988, abs=1e-6)
    assert values[30_000] == values[40_000] == pytest.approx(0.1)


def test_a_shortened_run_keeps_the_proportions_of_ramp_and_start():
    mt = method(start_iteration=1_000)
    assert mt.config.consistency_weight(Progress(49, 1_500)) == 0.0
    assert mt.config.consistency_weight(Progress(50, 1_500)) > 0.0
    halfway = mt.config.consistency_weight(Progress(15_000, 30_000))
    assert mt.config.consistency_weight(Progress(750, 1_500)) == pytest.approx(halfway)


def test_consistency_divides_by_batch_classes_and_voxels():
    class Fixed(nn.Module):
        def __init__(self, probs):
            super().__init__()
            self.logits = nn.Parameter(torch.tensor(probs).log())

        def forward(self, images):
            return self.logits.view(1, -1, 1, 1).expand(len(images), -1, 1, 1)

    mt = MeanTeacher(Task(1, ("background", "a"), 2, (16, 16), "unet", ARGUMENTS), MeanTeacher.Config())
    mt.student, mt.teacher = Fixed([0.8, 0.2]), Fixed([0.6, 0.4])
    x, y = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long)
    mt.losses(Batch(x, y, x, x, y, x), Progress(0, 1))
    assert mt.pop_logged()["disagreement"].item() == pytest.approx(0.04, abs=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
def test_gradient_reaches_the_student_only(dims):
    mt = method(dims, consistency=1.0, rampup_iterations=0)
    terms = mt.losses(batch(dims), Progress(5, 10))
    terms["consistency"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mt.student.head.parameters())
    assert all(p.grad is None for p in mt.teacher.parameters())


def test_equal_networks_without_noise_in_evaluation_mode_agree():
    mt = method(noise_std=0.0).eval()
    assert mt.losses(batch(), Progress(0, 10))["consistency"].item() == pytest.approx(0, abs=1e-12)


def test_noise_goes_to_the_teacher_only():
    mt = method()
    seen = {}
    mt.student.register_forward_hook(lambda module, args, output: seen.update(student=args[0]))
    mt.teacher.register_forward_hook(lambda module, args, output: seen.update(teacher=args[0]))
    data = batch()
    mt.losses(data, Progress(1, 10))
    assert torch.equal(seen["student"], data.images)
    difference = seen["teacher"] - data.unlabeled
    assert 0 < difference.abs().max() <= 0.2 + 1e-6


def test_weight_zero_is_supervised_training_up_to_batch_statistics():
    mt = method(consistency=0.0).eval()  # running statistics instead of batch statistics
    torch.manual_seed(0)
    plain = Supervised(task(), Supervised.Config()).eval()
    data = batch()
    sum(mt.losses(data, Progress(0, 10)).values()).backward()
    plain.losses(data, Progress(0, 10))["supervised"].backward()
    for ours, theirs in zip(mt.student.parameters(), plain.network.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_first_update_copies_the_student_and_buffers_follow_the_setting():
    mt = method(teacher_buffers="student")
    with torch.no_grad():
        for p in mt.student.parameters():
            p.add_(1.0)
    mt.student(batch().labeled + 3)
    mt.after_step(Progress(0, 10))
    for (name, ours), theirs in zip(mt.teacher.state_dict().items(), mt.student.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_teacher_with_the_students_statistics_predicts_as_well_as_the_student():
    """With statistics of its own passes it does not: those lag behind its weights."""
    torch.manual_seed(0)
    scores = {}
    for buffers in ("predicting", "student", "own"):
        mt = method(teacher_buffers=buffers, ema_decay=0.9)
        optimizer = torch.optim.SGD(mt.student.parameters(), lr=0.05, momentum=0.9)
        data = batch(labeled=4)
        data.labels = (data.labeled[:, 0] > 0.5).long()
        mt.train()
        for t in range(60):
            sum(mt.losses(data, Progress(t, 60)).values()).backward()
            optimizer.step()
            optimizer.zero_grad()
            mt.after_step(Progress(t, 60))
        mt.eval()
        with torch.no_grad():
            scores[buffers] = (mt.teacher(data.labeled).argmax(1) == data.labels).float().mean().item()
            student = (mt.student(data.labeled).argmax(1) == data.labels).float().mean().item()
    assert min(scores["predicting"], scores["student"]) > 0.9
    assert scores["student"] >= student - 0.02


@pytest.mark.parametrize(("choice", "attribute"), [("teacher", "teacher"), ("student", "student")])
def test_who_predicts(choice, attribute):
    mt = method(predict_with=choice)
    assert mt.predictor is getattr(mt, attribute)
    assert method().predictor is not method().student


def test_a_poisoned_unlabeled_row_does_not_change_the_supervised_term():
    mt = method().eval()
    one, other = batch(), batch()
    other.unlabeled = torch.full_like(other.unlabeled, 7.0)
    a, b = (mt.losses(data, Progress(0, 10))["supervised"] for data in (one, other))
    torch.testing.assert_close(a, b)
