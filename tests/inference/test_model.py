import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from scantly.data.plan import Plan
from scantly.errors import RunError
from scantly.inference.model import load_model, save_model
from scantly.methods.base import Task
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
    with pytest.raises(RunError, match="--resume"):
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
    with pytest.raises(Exception, match="unknown method 'os:system'"):
        load_model(path)
