"""The texts are true: commands parse, settings exist, links resolve, examples run."""

from __future__ import annotations

import functools
import inspect
import json
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.main import get_command

from scantly.cli import main
from scantly.cli.app import app
from scantly.cli.arguments import join_values, take_debug
from scantly.data.plan import Plan
from scantly.data.splitfile import SplitFile
from scantly.inference.settings import InferenceSettings
from scantly.methods import catalogue
from scantly.methods.base import Batch, Method, Progress, Task
from scantly.networks import UNet, VNet, build, known_networks
from scantly.networks.dynunet import DynUNet
from scantly.settings import Settings, parse
from scantly.training.config import (
    DataSection,
    EvaluationSection,
    NetworkSection,
    RunConfig,
    TrainingSection,
)
from scantly.training.optimizers import TrainingHandles
from scantly.training.resolve import known_recipes, read_recipe
from scantly.views import WeakConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SECTIONS: dict[str, type[Settings]] = {
    "data": DataSection,
    "plan": Plan,
    "network": NetworkSection,
    "training": TrainingSection,
    "evaluation": EvaluationSection,
}
SETTING = re.compile(r"`((?:data|plan|network|method|training|evaluation)\.[a-z_.]+)(?:=[^`]*)?`")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def _blocks() -> Iterator[Block]:
    for page in PAGES:
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
            line = page.read_text(encoding="utf-8")[: match.start()].count("\n") + 1
            yield Block(page, line, match[1], match[2])


BLOCKS = list(_blocks())


def _in(language: str, *pages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language and (not pages or block.page.name in pages)]


def _text_outside_blocks(page: Path) -> str:
    return re.sub(r"^```\w*\n.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def _words(line: str) -> list[str]:
    """The words behind ``scantly``, without comment and redirection."""
    words = shlex.split(line, comments=True)[1:]
    ends = [number for number, word in enumerate(words) if word in {">", "|", "..."}]
    return words[: ends[0]] if ends else words


COMMANDS = [
    (f"{block} {line}", _words(line))
    for block in BLOCKS
    for line in block.text.replace("\\\n", " ").splitlines()
    if line.startswith("scantly ")
]
MENTIONS = [
    (f"{page.name} {match[1]}", _words(match[1]))
    for page in PAGES
    for match in re.finditer(r"`(scantly [^`]+)`", _text_outside_blocks(page))
]


def _of_documents() -> dict[str, str]:
    """Methods that the pages add by entry point: name -> target."""
    groups = [tomllib.loads(block.text)["project"]["entry-points"] for block in _in("toml")]
    return {name: target for group in groups for name, target in group[catalogue.ENTRY_POINTS].items()}


def test_the_pages_were_found() -> None:
    assert {"README.md", "tutorial.md", "decisions.md"} <= {page.name for page in PAGES}
    assert len(COMMANDS) > 20
    assert len(MENTIONS) > 10


def _parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Command and values of its parameters, as the command line itself would see them."""
    group: Any = get_command(app)
    joined = join_values(take_debug(words)[0])
    name, command, rest = group.resolve_command(group.context_class(group), joined)
    return name, command.make_context(name, rest).params


@pytest.mark.parametrize(("where", "words"), COMMANDS, ids=[where for where, _ in COMMANDS])
def test_every_command_parses(where: str, words: list[str]) -> None:
    if words in (["--help"], ["--version"]):
        return
    _, values = _parse(words)
    method, recipe = values.get("method"), values.get("recipe")
    assert method is None or method in {*catalogue.methods(), *_of_documents()}
    assert recipe is None or recipe in known_recipes() or _shown_file(recipe)
    assert not values.get("config") or str(values["config"]) == "plan.yaml" or _shown_file(str(values["config"]))
    for assignment in values.get("sets") or ():
        _require_setting(assignment.partition("=")[0], method)


def _shown_file(name: str) -> bool:
    return any(re.match(rf"# (?:recipe: )?{re.escape(name)}\n", block.text) for block in _in("yaml"))


@pytest.mark.parametrize(("where", "words"), MENTIONS, ids=[where for where, _ in MENTIONS])
def test_every_command_mentioned_exists(where: str, words: list[str]) -> None:
    group: Any = get_command(app)
    command = group if words[0].startswith("-") else group.commands[words[0]]
    known = {"--help", *(option for parameter in command.params for option in parameter.opts)}
    assert {word for word in words if word.startswith("--")} <= known


def test_every_option_mentioned_exists() -> None:
    group: Any = get_command(app)
    known = {"--help", *(option for parameter in group.params for option in parameter.opts)}
    for command in group.commands.values():
        known |= {option for parameter in command.params for option in parameter.opts}
    for page in PAGES:
        mentioned = set(re.findall(r"`(--[a-z-]+)", _text_outside_blocks(page)))
        assert mentioned <= known, page.name


def _require_setting(key: str, method: str | None = None) -> None:
    """Fail unless a setting of that full name exists."""
    section, *path = key.split(".")
    if section == "method":
        names = catalogue.methods() if method is None or method in _of_documents() else [method]
        fields = {field for name in names for field in catalogue.load(name).Config.model_fields} | {"name"}
        if method in _of_documents():
            fields = set(_classes()[_of_documents()[method].partition(":")[2]].Config.model_fields)
        assert path[0] in fields, key
        return
    if path[:1] == ["arguments"] and path[1:]:
        taken = [inspect.signature(kind).parameters for kind in (UNet, VNet, DynUNet, _monai("SegResNet"))]
        assert any(path[1] in parameters for parameters in taken), key
        return
    model: Any = SECTIONS[section]
    for part in path:
        assert part in model.model_fields, key
        model = model.model_fields[part].annotation


def _monai(name: str) -> Any:
    assert name in known_networks()
    return type(build(name, spatial_dims=2, in_channels=1, out_channels=2))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_mentioned_exists(page: Path) -> None:
    for key in set(SETTING.findall(page.read_text(encoding="utf-8"))):
        _require_setting(key)


def test_defaults_in_the_configuration_page() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z_.]+)` \| ([^|]+) \| [^|]+ \|$", text, re.M)
    shown = {key: yaml.safe_load(value) for key, value in rows}
    models: dict[str, type[Settings]] = {
        **SECTIONS,
        "data.augmentation": WeakConfig,
        "evaluation.inference": InferenceSettings,
    }
    for section, model in models.items():
        for name, field in model.model_fields.items():
            key = f"{section}.{name}"
            if section == "plan":
                assert f"`{key}`" in text
            elif key not in {"data.dataset", "data.augmentation", "evaluation.inference"}:
                default = field.get_default(call_default_factory=True)
                default = list(default) if isinstance(default, tuple) else default
                assert shown.pop(key) == default, key
    assert not shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_resolves(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", _text_outside_blocks(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, target


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in {"json", "yaml", "toml"}], ids=str)
def test_data_blocks_are_what_they_show(block: Block) -> None:
    if block.language == "toml":
        tomllib.loads(block.text)
        return
    values = json.loads(block.text) if block.language == "json" else yaml.safe_load(block.text)
    if "dev_split" in values:
        parse(SplitFile, values, where=str(block))
    if block.language == "yaml":
        for key in _flat({name: values[name] for name in values if name in RunConfig.model_fields}):
            _require_setting(key)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_the_recipe_shown_is_one(tmp_path: Path) -> None:
    (block,) = (block for block in _in("yaml") if block.text.startswith("# recipe: "))
    path = tmp_path / "lab.yaml"
    path.write_text(block.text)
    for name, settings in read_recipe(str(path))["methods"].items():
        parse(catalogue.load(name).Config, settings, where=name)


def test_recipes_are_listed() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([a-z][a-z0-9-]*)` \|", text, re.M)) == set(known_recipes())


def test_methods_are_listed_in_the_readme() -> None:
    rows = re.findall(r"^\|[^|]+\| `([a-z_]+)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert rows == [entry.name for entry in catalogue.CATALOGUE]


def test_the_pages_of_methods_are_current() -> None:
    """``python docs/method_pages.py`` writes them."""
    made = runpy.run_path(str(ROOT / "docs" / "method_pages.py"))["pages"]()
    folder = ROOT / "docs" / "methods"
    assert {path.name for path in folder.iterdir()} == set(made)
    for name, text in made.items():
        assert (folder / name).read_text(encoding="utf-8") == text, f"{name}: run python docs/method_pages.py"


def test_the_page_of_agreement_is_current() -> None:
    """``python docs/agreement_page.py`` writes it; the tests in ``tests/golden`` hold Scantly to it."""
    made = runpy.run_path(str(ROOT / "docs" / "agreement_page.py"))["page"]()
    assert (ROOT / "docs" / "agreement.md").read_text(encoding="utf-8") == made, "run python docs/agreement_page.py"


def test_codes_of_findings_are_listed() -> None:
    text = (ROOT / "docs" / "dataset-format.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| ((?:`[a-z_]+`(?:, )?)+) \|", text, re.M)
    shown = {code for row in table for code in re.findall(r"`([a-z_]+)`", row)}
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src" / "scantly" / "data").glob("*.py"))
    raised = r'(?:Finding\(\s*"(?:error|warning)",|Fault\(|yield \(?)\s*"([a-z_]+)",'
    assert shown == set(re.findall(raised, source)) | {"duplicate_image"}


def test_commands_are_listed() -> None:
    group: Any = get_command(app)
    listed = re.findall(r"^\| `scantly (\w+)` \|", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"), re.M)
    assert listed == list(group.commands)


@pytest.mark.parametrize("block", _in("python"), ids=str)
def test_python_blocks_compile(block: Block) -> None:
    compile(block.text, str(block), "exec")


def test_the_example_of_the_evaluation_page_holds() -> None:
    (block,) = _in("python", "evaluation.md")
    exec(compile(block.text, str(block), "exec"), {})


@functools.cache
def _classes() -> dict[str, Any]:
    """Names that the blocks of the page on new methods define, run in order as one module."""
    names: dict[str, Any] = {"__name__": "documented"}
    for block in _in("python", "new-method.md"):
        exec(compile(block.text, str(block), "exec"), names)
    return names


def test_the_documented_method_learns() -> None:
    names = _classes()
    (target,) = _of_documents().values()
    assert isinstance(names["method"], names[target.partition(":")[2]])
    supervised = [float(terms["supervised"].detach()) for terms in names["history"]]
    assert sum(supervised[-3:]) < 0.8 * sum(supervised[:3])
    assert float(names["method"].pop_logged()["accepted"]) <= 1


def _batch(unlabeled: int, spatial_dims: int) -> Batch:
    size = (32,) * spatial_dims
    images, others = torch.rand(4, 1, *size), torch.rand(unlabeled, 1, *size)
    labels = (images[:, 0] > 0.5).long()
    return Batch(images, labels, others, images, labels, others)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("name", ["WeakToStrong", "Adversarial", "SelfTraining"])
def test_every_documented_method_takes_steps(name: str, spatial_dims: Any) -> None:
    torch.manual_seed(0)
    small = {"widths": [4, 8], "dropout": [0.0, 0.0]}
    task = Task(1, ("background", "bright"), spatial_dims, (32,) * spatial_dims, "unet", small)
    kind = _classes()[name]
    method: Method = kind(task, kind.Config()).train()
    before = {key: value.clone() for key, value in method.named_parameters()}
    for stage in method.stages():
        method.enter_stage(stage, first=True)
        handles = TrainingHandles(method, stage, TrainingSection(), total=3)
        for iteration in range(3):
            batch = _batch(0 if stage.unlabeled.count == 0 else 4, spatial_dims)
            if stage.relabel:
                batch.pseudo_labels = (batch.unlabeled[:, 0] > 0.5).long()
            handles.set_iteration(iteration)
            terms = method.step(batch, Progress(iteration, 3, stage.name), handles)
            assert terms
            assert all(torch.isfinite(value) for value in terms.values())
    assert all(not torch.equal(before[key], value) for key, value in method.named_parameters() if value.ndim > 1)


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = [block for block in BLOCKS if block.page.name == "tutorial.md"]
    for block in page:
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), {})
        if block.language == "json":
            Path("hearts/dataset.json").write_text(block.text)
        if block.language != "console":
            continue
        for line in block.text.splitlines():
            words = _words(line)
            if words[0] == "train":
                words += ["--steps", "3", "--device", "cpu"]
            with pytest.raises(SystemExit) as ended:
                main(words)
            assert not ended.value.code, line
    assert Path("predictions/subject018_uncertainty.nii.gz").is_file()
    assert Path("runs/mean-teacher/evaluation/val.csv").is_file()
    assert "<html" in Path("report.html").read_text(encoding="utf-8")
