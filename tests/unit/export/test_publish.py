"""What is published: the files, their card, and nothing of this machine."""

from __future__ import annotations

import base64
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig

from helpers.checkpoints import load_lora, make_checkpoint
from helpers.models import save_checkpoint
from lowrank_dist.cli import main
from lowrank_dist.export.card import Use
from lowrank_dist.export.convert import convert_checkpoint
from lowrank_dist.export.merge import merge_checkpoint
from lowrank_dist.storage.parse import Record

INPUTS = torch.tensor([[1, 2, 3, 4]])
SCORES = {
    "stages": {
        "base": {"model": "x", "results": {"sums": {"alias": "sums", "exact_match,none": 0.25}}},
        "converted": {
            "model": "y",
            "results": {"sums": {"exact_match,none": 0.75, "exact_match_stderr,none": 0.125, "acc,strict": 0.5}},
        },
    }
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a checkpoint, its LoRA of rank 2 and the merged model."""
    root = tmp_path_factory.mktemp("made")
    save_checkpoint(root / "base")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    make_checkpoint(root / "step", root / "base", config)
    convert_checkpoint(root / "step", root / "lora", rank=2)
    merge_checkpoint(root / "step", root / "merged")
    return root


def push(*arguments: str | Path) -> int:
    return main(["push", *map(str, arguments)])


def test_a_lora_in_a_directory(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "scores.json").write_text(json.dumps(SCORES))
    options = ["--base_model=org/tiny", "--dataset=org/data", "--license=mit", "--title=Sums"]
    assert push(made / "lora", "--output", tmp_path / "out", *options, "--scores", tmp_path / "scores.json") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "README.md")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors", "lowrank_dist.json"}
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict() == {
        "base_model": "org/tiny",
        "datasets": ["org/data"],
        "library_name": "peft",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["lowrank-dist", "lora"],
    }
    assert "# Sums\n" in card.text
    assert "| rank | 2 |" in card.text
    assert "| energy of the update kept at this rank | " in card.text
    assert "| task | metric | base | converted |" in card.text
    assert "| sums | exact_match | 0.2500 | 0.7500 ± 0.1250 |" in card.text
    assert "| sums | acc (strict) |  | 0.5000 |" in card.text
    assert not any(str(made) in path.read_text(errors="ignore") for path in (tmp_path / "out").iterdir())
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/tiny"
    expected = load_lora(made / "base", made / "lora")(INPUTS).logits
    torch.testing.assert_close(load_lora(made / "base", tmp_path / "out")(INPUTS).logits, expected, rtol=0, atol=0)
    assert main(["inspect", str(tmp_path / "out"), "--verify"]) == 0


def test_the_example_of_a_card_runs(made: Path, tmp_path: Path) -> None:
    """With directories for the names."""
    push(made / "lora", "--output", tmp_path / "out", "--base_model=org/tiny")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), flags=re.DOTALL)
    scope: dict[str, Any] = {}
    exec(code.replace("org/tiny", str(made / "base")).replace("ADAPTER", str(tmp_path / "out")), scope)
    assert scope["model"].peft_config["default"].r == 2


def test_a_merged_model(made: Path, tmp_path: Path) -> None:
    (made / "merged" / ".env").write_text("SECRET=1")
    assert push(made / "merged", "--output", tmp_path / "out", "--base_model=org/tiny") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in (made / "merged").iterdir()} - {".env"} | {"README.md"}
    data = (made / "merged" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == data
    assert not any(str(made) in path.read_text(errors="ignore") for path in (tmp_path / "out").iterdir())


def test_settings_name_no_directory_of_this_machine(made: Path, tmp_path: Path) -> None:
    """Neither those that transformers writes into them, at any depth, nor those of files of PEFT's methods."""
    secret = "/home/alice/secret"
    merged = shutil.copytree(made / "merged", tmp_path / "merged")
    lora = shutil.copytree(made / "lora", tmp_path / "lora")
    change_json(merged / "config.json", _name_or_path=secret, text_config={"_name_or_path": secret, "x": 1})
    settings = {"name_or_path": secret, "tokenizer_file": f"{secret}/tokenizer.json", "unk_token": "/no"}
    (merged / "tokenizer_config.json").write_text(json.dumps(settings))
    manifest = json.loads((lora / "lowrank_dist.json").read_text())
    manifest = {name: value for name, value in manifest.items() if name not in ("hashes", "seal")}
    (lora / "lowrank_dist.json").write_text(json.dumps(manifest))
    change_json(lora / "adapter_config.json", corda_config={"cache_file": f"{secret}/cache.pt", "verbose": False})
    for source in (merged, lora):
        assert push(source, "--output", tmp_path / "out" / source.name, "--base_model=org/tiny") == 0
    for path in filter(Path.is_file, (tmp_path / "out").rglob("*")):
        assert "alice" not in path.read_text(errors="ignore"), path
    config = json.loads((tmp_path / "out" / "merged" / "config.json").read_text())
    before = json.loads((made / "merged" / "config.json").read_text())
    assert config == before | {"text_config": {"x": 1}}
    assert json.loads((tmp_path / "out" / "merged" / "tokenizer_config.json").read_text()) == {"unk_token": "/no"}


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_card_says_what_the_model_is(made: Path, tmp_path: Path) -> None:
    """By the classes of its configuration; that it was trained here is said only of what was."""
    merged = shutil.copytree(made / "merged", tmp_path / "merged")
    card = card_of(merged, tmp_path)
    assert card.data.pipeline_tag == "text-generation"
    assert "trained with lowrank_dist" in card.text
    change_json(merged / "config.json", architectures=["LlamaForSequenceClassification"])
    change_json(merged / "lowrank_dist.json", adapter=str(tmp_path / "plain"))
    card = card_of(merged, tmp_path)
    assert card.data.pipeline_tag == "text-classification"
    assert 'AutoModelForSequenceClassification.from_pretrained("MODEL")' in card.text
    assert "trained with" not in card.text
    assert "an adapter merged into its weights, by lowrank_dist" in card.text
    change_json(merged / "config.json", architectures=["OwnModel"])
    card = card_of(merged, tmp_path)
    assert card.data.pipeline_tag is None
    assert "from_pretrained" not in card.text


def card_of(source: Path, work: Path) -> ModelCard:
    assert push(source, "--output", work / "card", "--base_model=org/tiny", "--overwrite") == 0
    return ModelCard.load(work / "card" / "README.md")


@pytest.mark.parametrize(
    ("adapter", "auto_class"),
    [
        ({"task_type": "SEQ_CLS"}, "AutoModelForSequenceClassification"),
        ({"auto_mapping": {"base_model_class": "LlamaForCausalLM"}}, "AutoModelForCausalLM"),
        ({"auto_mapping": None, "task_type": None}, None),
    ],
)
def test_the_use_of_an_adapter(adapter: dict[str, Any], auto_class: str | None) -> None:
    found = Use.of_adapter(Record(adapter, "adapter_config.json"))
    assert (None if found is None else found.auto_class) == auto_class


def test_the_card_says_what_servers_object_to(made: Path, tmp_path: Path) -> None:
    convert_checkpoint(made / "step", tmp_path / "lora", rank=3)
    assert "## Serving\n\n- vLLM's --max-lora-rank is one of" in card_of(tmp_path / "lora", tmp_path).text


def test_what_is_refused(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def says(*arguments: str | Path) -> str:
        assert push(*arguments) == 1
        return capsys.readouterr().err

    out = ("--output", tmp_path / "out")
    assert "pass --output DIR to see what would be uploaded" in says(made / "lora")
    assert "--private is for an upload" in says(made / "lora", *out, "--private")
    assert "a directory of this machine, which nobody else has; pass --base_model" in says(made / "lora", *out)
    assert "is of the kind None; pass a directory that convert" in says(made / "step", *out, "--base_model=org/tiny")
    assert "holds no lowrank_dist.json" in says(made / "base", *out, "--base_model=org/tiny")
    (tmp_path / "scores.json").write_text("{}")
    scores = ("--scores", tmp_path / "scores.json")
    assert "holds no `stages`" in says(made / "lora", *out, "--base_model=org/tiny", *scores)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis").touch()
    assert "not empty" in says(made / "lora", *out, "--base_model=org/tiny")
    assert "was not written by lowrank_dist" in says(made / "lora", *out, "--base_model=org/tiny", "--overwrite")


def test_a_damaged_lora_is_not_published(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert_checkpoint(made / "step", tmp_path / "lora", rank=2)
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert push(tmp_path / "lora", "--output", tmp_path / "out", "--base_model=org/tiny") == 1
    assert "is damaged: its SHA-256 is not the one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A server that takes what the client of the hub sends: repositories that were asked for, and files by name."""
    received: dict[str, Any] = {"repositories": [], "branches": [], "files": {}}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            address = f"http://{self.headers['Host']}"
            if self.path == "/api/repos/create":
                received["repositories"].append(json.loads(body))
                answer: dict[str, Any] = {"url": f"{address}/org/sums"}
            elif self.path == "/api/validate-yaml":
                answer = {"errors": [], "warnings": []}
            elif "/branch/" in self.path:
                received["branches"].append(self.path.rpartition("/")[2])
                answer = {}
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            else:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        received["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                commit = "0" * 40
                answer = {"commitUrl": f"{address}/org/sums/commit/{commit}", "commitOid": commit, "success": True}
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        huggingface_hub.close_session()
        yield received
        server.shutdown()
    huggingface_hub.close_session()


def test_an_upload_is_what_the_directory_holds(
    made: Path, tmp_path: Path, hub: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    options = ["--base_model=org/tiny", "--repo_id=org/sums", "--private", "--revision=trial"]
    assert push(made / "lora", "--output", tmp_path / "out", *options) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"/org/sums/commit/{'0' * 40}")
    (asked,) = hub["repositories"]
    assert (asked["organization"], asked["name"]) == ("org", "sums")
    assert asked.get("private") is True or asked.get("visibility") == "private"
    assert hub["branches"] == ["trial"]
    assert hub["files"] == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_a_hub_that_cannot_be_reached_is_one_line(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        huggingface_hub.close_session()
        assert push(made / "lora", "--base_model=org/tiny", "--repo_id=org/sums") == 1
    huggingface_hub.close_session()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lowrank-dist push: org/sums: not uploaded: ")


def test_every_export_replaces_its_own_kind_only(made: Path, tmp_path: Path) -> None:
    base = ("--base_model=org/tiny",)
    commands = {
        "lora": ("convert", made / "step", "--rank=2"),
        "merged": ("merge", made / "step"),
        "pushed-lora": ("push", made / "lora", *base),
        "pushed-merged": ("push", made / "merged", *base),
    }
    for name, command in commands.items():
        assert main([*map(str, command), "--output", str(tmp_path / name)]) == 0
    for target in commands:
        for name, command in commands.items():
            same = name.removeprefix("pushed-") == target.removeprefix("pushed-")
            done = main([*map(str, command), "--output", str(tmp_path / target), "--overwrite"])
            assert (done == 0) == same, (name, target)
