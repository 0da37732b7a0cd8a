"""The page of what works with what, from the tests that show it.

A row without a test is not written: models are those of the tests' own tables of cases, other rows name a test, and a
name that no longer exists fails the build.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib

MODELS = "tests/helpers/models.py"
FAMILIES = "docs/_extensions/families.json"
#: What a model is put through; the file of the tests; where the models are listed: a file, and the name in it.
STAGES = {
    "step 0 as the original, trained in NF4": ("tests/distributed/decomposition/test_walk.py", MODELS, "CAUSAL_LMS"),
    "embeddings, heads, experts, parameters": ("tests/distributed/initialization/test_materialize.py", None, "CASES"),
    "residual model": ("tests/distributed/residual_model/test_layouts.py", None, "CASES"),
    "converted": ("tests/unit/export/test_convert.py", None, "CASES"),
    "merged": ("tests/unit/export/test_merge.py", None, "CASES"),
    "packed": ("tests/unit/training/test_packed_examples.py", None, "APART"),
}

#: What is read and written, and the test that shows it: its file below ``tests``, and its name.
READ = {
    "safetensors of a model, sharded or not": (
        "system/test_bad_input.py",
        "test_missing_shard",
    ),
    "weights that are not files (`WeightSource`)": (
        "distributed/initialization/test_source.py",
        "test_the_same_weights_give_the_same_run",
    ),
    "residual models of the authors of PiSSA": (
        "distributed/residual_model/test_create.py",
        "test_models_that_others_publish_load",
    ),
    "residual models of `decompose`": (
        "distributed/residual_model/test_create.py",
        "test_the_strategy_starts_where_the_walk_would_have",
    ),
    "a LoRA of PEFT, to train on": (
        "distributed/initialization/test_starting_adapter.py",
        "test_a_lora_that_peft_wrote",
    ),
    "adapters of other tuners of PEFT, to train on": (
        "distributed/initialization/test_starting_tuner.py",
        "test_losses_of_stock_peft",
    ),
    "JSONL with `messages`": (
        "unit/data/test_rendering.py",
        "test_every_assistant_turn_is_trained_on_up_to_its_end_marker",
    ),
    "JSONL with `prompt` and `completion`": (
        "unit/data/test_tokenizing.py",
        "test_prompt_and_completion_are_taken_as_they_are",
    ),
    "JSONL with `query` and `response`": (
        "unit/data/test_rendering.py",
        "test_query_and_response_use_the_instruction_prompt",
    ),
    "data sets of the Hugging Face hub": (
        "unit/data/test_datamodule.py",
        "test_hub_ids_go_to_datasets",
    ),
}
WRITTEN = {
    "LoRA that stock PEFT loads on the original model": (
        "system/test_interop.py",
        "test_everything_opens_without_this_project",
    ),
    "LoRA of one rank and scaling for all modules, of ranks that servers accept": (
        "unit/export/test_convert.py",
        "test_ranks_that_servers_take",
    ),
    "residual model that stock transformers + peft load": (
        "distributed/residual_model/test_create.py",
        "test_stock_transformers_and_peft_load_it",
    ),
    "4 bits as bitsandbytes serializes them": (
        "distributed/residual_model/test_create.py",
        "test_the_serialization_is_that_of_bitsandbytes",
    ),
    "merged model": (
        "unit/export/test_merge.py",
        "test_a_checkpoint",
    ),
    "adapters of other tuners, merged as PEFT does": (
        "unit/export/test_tuned.py",
        "test_every_tuner",
    ),
    "checkpoints without code in them": (
        "distributed/checkpoints/test_resume.py",
        "test_nothing_in_it_runs_code",
    ),
}


def page(root: Path) -> str:
    """The page as Markdown."""
    lines = [
        "# Compatibility",
        "",
        "Every row is made from a test, which is named. Tests use small models with random weights, on CPUs.",
        "",
        "## Models",
        "",
        "Any model of transformers can be tried: what cannot be handled is refused before weights are read, by name.",
        "",
        "`make test-matrix` trains every family of the table dense (PiSSA) and in NF4 (QLoRA), on one and two ranks:",
        "three steps in fp32. `yes`: the answer of step 0 is that of stock transformers (in NF4, of bitsandbytes'",
        "weights), the losses are those of stock PEFT to 2e-5, and `lora/` in stock PEFT gives the trained model's",
        "answer. Empty: not tried yet. A fifth of the families is also among the tests of every change",
        "(`tests/system/test_architectures.py`; configurations and batches are in `tests/helpers/families.py`).",
        "",
        *families(root),
        "",
        "### Stages",
        "",
        "The tests put these architectures through further stages; `yes` means that the architecture is among the",
        "cases of the file named under the table.",
        "",
        *models(root),
        "",
        "## Read",
        "",
        *claims(root, READ),
        "",
        "## Written",
        "",
        *claims(root, WRITTEN),
        "",
        "## Adapters",
        "",
        "{doc}`../tuners` has a row for every tuner of PEFT, written by `make test-matrix`.",
        "",
        "## Lightning",
        "",
        "{doc}`../lightning` has every callback and flag of Lightning.",
        "",
        "## Versions",
        "",
        "`make test` passes with the versions under *tested*, `make test-lowest` with the lowest. A library with an",
        "upper bound is one whose {doc}`private names <../private-names>` are used.",
        "",
        *versions(root),
        "",
    ]
    return "\n".join(lines)


def families(root: Path) -> list[str]:
    """The matrix of families, as `make test-matrix` has written it."""
    columns = [f"{fmt}, {ranks}" for fmt in ("dense", "nf4") for ranks in (1, 2)]
    titles = ["dense, 1 rank", "dense, 2", "NF4, 1 rank", "NF4, 2"]
    table = json.loads((root / FAMILIES).read_text(encoding="utf-8"))
    rows = [f"| family | class | {' | '.join(titles)} |", "|---" * 6 + "|"]
    cell = {True: "yes", False: "**no**", None: ""}
    for name, found in table.items():
        rows.append(f"| `{name}` | `{found['class']}` | {' | '.join(cell[found.get(c)] for c in columns)} |")
    return rows


def models(root: Path) -> list[str]:
    """Architectures of the tests' lists and tables of cases."""
    known = listed(root / MODELS, "ARCHITECTURES")
    by_stage = {stage: listed(root / (other or file), name) & known for stage, (file, other, name) in STAGES.items()}
    rows = [f"| | {' | '.join(by_stage)} |", "|---" * (len(by_stage) + 1) + "|"]
    for name in sorted(set().union(*by_stage.values())):
        rows.append(f"| `{name}` | {' | '.join('yes' if name in found else '' for found in by_stage.values())} |")
    return [*rows, "", *(f"- {stage}: `{file}`" for stage, (file, _, _) in STAGES.items())]


def listed(file: Path, name: str) -> set[str]:
    """The strings in what a file assigns to `name`: of a dictionary of options its keys; of cases what they name.

    The default architecture of a file's ``Case`` counts too.
    """
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            options = isinstance(node.value, ast.Dict) and name == "ARCHITECTURES"
            searched = node.value.keys if options else [node]
            constants = [inner for part in searched for inner in ast.walk(part) if isinstance(inner, ast.Constant)]
            found |= {constant.value for constant in constants if isinstance(constant.value, str)}
        if name == "CASES" and isinstance(node, ast.ClassDef) and node.name == "Case":
            defaults = [field.value for field in node.body if isinstance(field, ast.AnnAssign)]
            found |= {default.value for default in defaults if isinstance(default, ast.Constant)}
    if not found:
        raise ValueError(f"{file}: assigns nothing to {name}, but the page of compatibility rests on it")
    return found


def claims(root: Path, rows: dict[str, tuple[str, str]]) -> list[str]:
    """A table of claims with their tests, which exist."""
    lines = ["| what | test |", "|---|---|"]
    for what, (file, name) in rows.items():
        tree = ast.parse((root / "tests" / file).read_text(encoding="utf-8"))
        if name not in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}:
            raise ValueError(f"tests/{file} has no {name}, but the page of compatibility rests on it")
        lines.append(f"| {what} | `{file}`, `{name}` |")
    return lines


def versions(root: Path) -> list[str]:
    """What `pyproject.toml` admits, and what CI installs."""
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    asked = tomllib.loads(project)["project"]
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", (root / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    rows = ["| library | admitted | tested |", "|---|---|---|", f"| Python | `{asked['requires-python']}` | `3.11` |"]
    for text in sorted(asked["dependencies"], key=str.lower):
        name, bounds = re.fullmatch(r"([\w.-]+)(?:\[.*\])?(.*)", text).groups()  # type: ignore[union-attr]
        rows.append(f"| {name} | `{bounds}` | `{pins[name.lower().replace('_', '-')]}` |")
    return rows
