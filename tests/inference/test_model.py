import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from scantly.data.plan import Plan
from scantly.errors import ConfigError, RunError
from scantly.inference.model import load_model, save_model
from scantly.methods.base import Task
from scantly.methods.diffcl import DiffCL
from scantly.methods.mean_teacher import MeanTeacher

PLAN = Plan(
    spatial_dims=2,
    size=(32, 32),
    normalization=[{"scheme": "zscore"}],
    patch_size=(32, 32),
    labeled_batch_size=2,
    unlabeled_batch_size=2,
)
TASK = Task(1, ("background", "a"), 2, (32, 32), "unet", {"widths": [4, 8], "dropout": [0.1, 0.1]})


def save(path, **changes):
    torch.manual_seed(0)
    method = MeanTeacher(TASK, MeanTeacher.Config())
    arguments = {
        "task": TASK,
        "plan": PLAN,
        "method": "mean_teacher",
        "configuration": MeanTeacher.Config().model_dump(mode="json"),
        **changes,
    }
    save_model(path, method.predictor.state_dict(), **arguments)
    return method.predictor


def test_a_copy_in_an_empty_folder_predicts_the_same(tmp_path):
    network = save(tmp_path / "run" / "model.safetensors").eval()
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "run" / "model.safetensors", tmp_path / "alone")
    model = load_model(tmp_path / "alone" / "model.safetensors")
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(model.network(images), network(images))
    assert (model.task, model.plan, model.method) == (TASK, PLAN, "mean_teacher")
    assert not model.network.training


def test_equal_models_are_equal_bytes_and_metadata_is_one_entry(tmp_path):
    save(tmp_path / "a.safetensors")
    save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with safe_open(str(tmp_path / "a.safetensors"), "pt") as stream:
        assert list(stream.metadata()) == ["scantly"]
        content = json.loads(stream.metadata()["scantly"])
    assert set(content) == {"format", "task", "plan", "method", "configuration"}
    assert str(tmp_path) not in json.dumps(content)


def test_a_missing_model_says_how_to_get_one(tmp_path):
    with pytest.raises(RunError, match=r"does not exist; give the run folder of a finished training"):
        load_model(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(RunError, match=r"the training has not finished; it left no checkpoint"):
        load_model(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(RunError, match=r"the training has not finished; continue it with --resume"):
        load_model(tmp_path)


def test_damage_and_strangers_are_told(tmp_path):
    path = tmp_path / "model.safetensors"
    save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunError, match="damaged"):
        load_model(path)
    save_file({"a": torch.zeros(1)}, str(path))
    with pytest.raises(RunError, match="not written by Scantly"):
        load_model(path)


def test_weights_must_fit_strictly(tmp_path):
    path = tmp_path / "model.safetensors"
    save(path, task=Task(1, ("background", "a", "b"), 2, (32, 32), "unet", TASK.network_arguments))
    with pytest.raises(RunError, match="does not fit"):
        load_model(path)


def test_a_class_path_in_the_file_is_never_imported(tmp_path):
    path = tmp_path / "model.safetensors"
    save(path, method="os:system")
    with pytest.raises(Exception, match="method 'os:system', which no installed package has"):
        load_model(path)


def save_diffcl(path, **settings):
    torch.manual_seed(0)
    config = DiffCL.Config(**settings)
    method = DiffCL(TASK, config)
    save_model(
        path,
        method.predictor.state_dict(),
        task=TASK,
        plan=PLAN,
        method="diffcl",
        configuration=config.model_dump(mode="json"),
    )
    return method.eval()


def test_a_finished_model_can_be_asked_for_another_of_its_predictors(tmp_path):
    path = tmp_path / "model.safetensors"
    method, images = save_diffcl(path), torch.randn(2, 1, 32, 32)
    usual = load_model(path)
    assert usual.changed == {}
    assert torch.equal(usual.network(images), method.cs(images)[0])
    asked = {"infer": "ds", "sampling_steps": 2, "sampling_seed": 7, "sampling_clip": True}
    model = load_model(path, method=asked)
    assert model.changed == asked
    assert model.configuration["sampling_steps"] == 2
    noise = torch.randn(1, 2, 32, 32, generator=torch.Generator().manual_seed(7)).repeat(2, 1, 1, 1)
    assert torch.equal(model.network(images), method.ds.sample(images, noise, steps=2, clip=True))
    assert not model.network.training
    assert load_model(path, method={"infer": "cs", "sampling_steps": 10}).changed == {}  # as it was trained


def test_what_was_trained_for_one_predictor_can_be_asked_for_the_other(tmp_path):
    path = tmp_path / "model.safetensors"
    method, images = save_diffcl(path, infer="mean"), torch.randn(1, 1, 32, 32)
    model = load_model(path, method={"infer": "cs"})
    assert model.changed == {"infer": "cs"}
    assert torch.equal(model.network(images), method.cs(images)[0])


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"inferr": "ds"}, "unknown setting of method diffcl 'inferr'; did you mean 'infer'?"),
        (
            {"mu1": 1.0},
            "setting 'method.mu1' belongs to the training of this diffcl model; for a prediction method.infer",
        ),
        ({"mu1": 0.1}, "setting 'method.mu1' belongs to the training"),  # even where nothing would change
        ({"infer": "both"}, "setting 'method.infer' is 'both'"),
        ({"sampling_steps": 0}, "setting 'method.sampling_steps' is 0"),
    ],
)
def test_what_a_finished_model_cannot_change_is_told_in_one_sentence(tmp_path, values, sentence):
    save_diffcl(tmp_path / "model.safetensors")
    with pytest.raises(ConfigError) as told:
        load_model(tmp_path, method=values)
    assert str(told.value).startswith(sentence)
    assert "\n" not in str(told.value)


def test_of_other_methods_nothing_can_be_changed(tmp_path):
    save(tmp_path / "model.safetensors")
    with pytest.raises(
        ConfigError, match=r"'method\.ema_decay' .* mean_teacher model; for a prediction nothing can be"
    ):
        load_model(tmp_path, method={"ema_decay": 0.5})
    with pytest.raises(ConfigError, match="unknown setting of method mean_teacher 'infer'"):
        load_model(tmp_path, method={"infer": "ds"})


def test_a_network_that_was_not_trained_cannot_be_asked_for(tmp_path):
    save_diffcl(tmp_path / "model.safetensors", use_ds=False)
    assert load_model(tmp_path, method={"sampling_steps": 3}).changed == {"sampling_steps": 3}
    with pytest.raises(ConfigError, match=r"method\.infer=ds needs the diffusion network, .* set method\.infer=cs"):
        load_model(tmp_path, method={"infer": "ds"})
