"""Files become batches, once, and the batches of a resumed run are those that were left."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser

from helpers.sft import byte_level_tokenizer, write_jsonl
from lowrank_dist.data.datamodule import SFTDataModule
from lowrank_dist.data.sampler import ShardedSampler
from lowrank_dist.data.tokenizing import IGNORE_INDEX
from lowrank_dist.errors import InputError

RECORDS = [{"prompt": f"hello {index}", "completion": " world" * (1 + index % 5)} for index in range(23)]


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> str:
    byte_level_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.fixture
def train(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "train.jsonl", RECORDS)


def test_fit_and_validate_tokenize_once(tokenizer_dir, train):
    data = SFTDataModule(tokenizer_dir, train, train, batch_size=4)
    data.setup("fit")
    first = data.val_dataloader().dataset
    data.setup("validate")
    assert data.val_dataloader().dataset is first
    assert len(data.val_dataloader()) == 6
    assert data.test_dataloader() == []
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert len(batch["labels"]) == 4
    assert (batch["labels"] != IGNORE_INDEX).any(dim=1).all()


def trainer_of(**module):
    """What a Trainer shows of a LightningModule."""
    return SimpleNamespace(
        lightning_module=SimpleNamespace(**module), distributed_sampler_kwargs=None, strategy=None, limit_val_batches=1
    )


def test_data_are_read_again_for_another_task_or_with_other_settings(tokenizer_dir, tmp_path):
    record = {"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}
    data = SFTDataModule(tokenizer_dir, write_jsonl(tmp_path / "both.jsonl", [record]))

    def read(**module):
        data.trainer = trainer_of(**module)
        data.setup("fit")
        return data.train_dataloader().dataset

    first = read(data_task="sft")
    assert read(data_task="sft") is first
    assert set(read(data_task="preference")[0]) == {"chosen", "rejected"}
    again = read(data_task="sft")
    assert again is not first
    assert torch.equal(again[0]["labels"], first[0]["labels"])
    data.max_length = 2
    assert read(data_task="sft").lengths == [2]


def test_every_module_is_asked_whether_it_takes_weights(tokenizer_dir, tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]
    path = write_jsonl(tmp_path / "weights.jsonl", [{"messages": messages}])
    data = SFTDataModule(tokenizer_dir, [{"path": path}, {"path": path}])
    data.trainer = trainer_of(takes_weights=True)
    data.setup("fit")
    data.trainer = trainer_of()
    with pytest.raises(
        InputError, match=r"^train\[0\]='.*weights.jsonl': messages have a `weight` .* takes no weights"
    ):
        data.setup("fit")


def test_limits(tokenizer_dir, train):
    data = SFTDataModule(tokenizer_dir, train, train, limit=5, eval_limit=3)
    data.setup("fit")
    assert (len(data.train_dataloader().dataset), len(data.val_dataloader().dataset)) == (5, 3)


def test_packing_makes_fuller_rows(tokenizer_dir, train):
    data = SFTDataModule(tokenizer_dir, train, batch_size=2, packing=True, max_length=64)
    data.setup("fit")
    dataset = data.train_dataloader().dataset
    assert len(dataset) < len(RECORDS)
    assert max(dataset.lengths) <= 64
    assert set(next(iter(data.train_dataloader()))) == {"input_ids", "position_ids", "labels"}


def test_long_examples_are_cut_and_hopeless_ones_dropped(tokenizer_dir, tmp_path, caplog):
    tokenizer = byte_level_tokenizer()
    records = [
        {"prompt": "hello", "completion": " world"},
        {"prompt": "hello", "completion": " world" * 100},
        {"prompt": "hello" * 100, "completion": " world"},
    ]
    data = SFTDataModule(tokenizer_dir, write_jsonl(tmp_path / "long.jsonl", records), max_length=20)
    with caplog.at_level(logging.WARNING):
        data.setup("fit")
    assert data.train_dataloader().dataset.lengths[1] == 20
    cut = data.train_dataloader().dataset[1]
    assert tokenizer.decode(cut["input_ids"]).startswith("hello world world")
    assert cut["labels"][-1] == cut["input_ids"][-1] != tokenizer.eos_token_id
    assert (
        "2 of 3 examples are longer than max_length=20 and were cut; 1 of them had no response left and were dropped"
        in caplog.text
    )


def test_nothing_left_is_an_error(tokenizer_dir, tmp_path):
    path = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "hello" * 100, "completion": " world"}])
    with pytest.raises(ValueError, match=r"none of the 1 examples has a response token within max_length=20; raise"):
        SFTDataModule(tokenizer_dir, path, max_length=20).setup("fit")
    path = write_jsonl(tmp_path / "silent.jsonl", [{"text": ""}])
    with pytest.raises(ValueError, match=r"none of its 1 records is left: 1 examples have no token to train"):
        SFTDataModule(tokenizer_dir, path).setup("fit")


def test_an_empty_file_is_an_error(tokenizer_dir, tmp_path):
    path = write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match="holds no record"):
        SFTDataModule(tokenizer_dir, path).setup("fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": True, "group_by_length": True}, "exclude each other"),
        ({"max_length": 1}, "max_length=1 must be at least 2"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"limit": 0}, "limit=0 must be at least 1"),
        ({"num_workers": -1}, "num_workers=-1 must be at least 0"),
        ({"train_on": "all"}, "train_on='all'; valid choices: all_assistant, last_assistant, everything"),
        ({"thinking": "no"}, "thinking='no'; valid choices: keep, drop"),
        ({"on_bad_record": "stop"}, "on_bad_record='stop'; valid choices: error, skip"),
        ({"columns": {"promt": "a"}}, "columns: 'promt' is not known"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        SFTDataModule("t", "x.jsonl", **settings)


def test_missing_files_are_named(tokenizer_dir, train, tmp_path):
    missing = SFTDataModule(tokenizer_dir, str(tmp_path / "no.jsonl"))
    missing.prepare_data()  # runs on one rank only: says nothing
    with pytest.raises(ValueError, match=r"train='.*no\.jsonl' does not exist"):
        missing.setup("fit")
    with pytest.raises(ValueError, match="is not a file; give the path of a Jinja file"):
        SFTDataModule(tokenizer_dir, train, chat_template="no.jinja").setup("fit")
    with pytest.raises(ValueError, match="validate needs data: set `validation`"):
        SFTDataModule(tokenizer_dir, train).setup("validate")


def test_a_chat_template_can_be_given(tokenizer_dir, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}")
    conversation = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": conversation}])
    data = SFTDataModule(tokenizer_dir, path, chat_template=str(template))
    data.setup("fit")
    text = byte_level_tokenizer().decode(data.train_dataloader().dataset[0]["input_ids"])
    assert text == "[user] hello\n[assistant] world\n<|im_end|>"


def test_a_chat_template_can_be_given_as_text(tokenizer_dir, tmp_path):
    conversation = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": conversation}])
    data = SFTDataModule(tokenizer_dir, path, chat_template="{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    data.setup("fit")
    assert byte_level_tokenizer().decode(data.train_dataloader().dataset[0]["input_ids"]) == "[hello][world]<|im_end|>"


def test_several_files_are_one_set(tokenizer_dir, tmp_path):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", RECORDS[:count]) for name, count in (("b", 2), ("a", 3))]
    data = SFTDataModule(tokenizer_dir, files, str(tmp_path / "*.jsonl"))
    data.setup("fit")
    assert len(data.train_dataloader().dataset) == len(data.val_dataloader().dataset) == 5
    dataset = data.train_dataloader().dataset
    texts = [byte_level_tokenizer().decode(dataset[index]["input_ids"]) for index in range(5)]
    assert [text[:7] for text in texts] == [f"hello {index}" for index in (0, 1, 0, 1, 2)]


def test_skipped_records_are_said_in_one_line(tokenizer_dir, tmp_path, caplog):
    path = write_jsonl(tmp_path / "data.jsonl", [*RECORDS[:2], {"prompt": 1}, [3]])
    with caplog.at_level(logging.WARNING):
        SFTDataModule(tokenizer_dir, path, on_bad_record="skip").setup("fit")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"train='{path}': skipped 2 of 4 records; the first: {path}:")
    with pytest.raises(InputError, match=r"none of its 1 records is left: skipped 1 of 1 records; the first: "):
        SFTDataModule(tokenizer_dir, write_jsonl(tmp_path / "bad.jsonl", [{}]), on_bad_record="skip").setup("fit")


def doubled(record):
    """A user's function, by its import path."""
    return {"prompt": record["text"], "completion": record["text"]}


def test_a_yaml_file_names_columns_and_a_function(tokenizer_dir, tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [{"text": "hello"}])
    parser = ArgumentParser()
    parser.add_class_arguments(SFTDataModule, "data")
    options = [f"--data.tokenizer={tokenizer_dir}", f"--data.train=[{path}, {path}]"]
    for extra in ([f"--data.transform={__name__}.doubled"], ["--data.columns={prompt: text, completion: text}"]):
        settings = parser.parse_args([*options, *extra])
        assert parser.dump(settings)  # as a run writes it down
        data = getattr(parser, "instantiate", parser.instantiate_classes)(settings).data
        data.setup("fit")
        assert len(data.train_dataloader().dataset) == 2
        assert byte_level_tokenizer().decode(data.train_dataloader().dataset[0]["input_ids"]) == "hellohello<|im_end|>"


def test_hub_ids_go_to_datasets(tokenizer_dir, monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        if kwargs["split"] == "nope":
            raise ValueError("Unknown split nope")
        return RECORDS[:4]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    data = SFTDataModule(tokenizer_dir, "org/set", subset="math", train_split="train[:4]")
    data.prepare_data()
    data.setup("fit")
    assert calls == [(("org/set", "math"), {"split": "train[:4]"})] * 2
    assert len(data.train_dataloader().dataset) == 4
    with pytest.raises(ValueError, match=r"subset=None, split='nope'\) cannot be loaded: Unknown split nope"):
        SFTDataModule(tokenizer_dir, "org/set", train_split="nope").setup("fit")
    monkeypatch.setitem(sys.modules, "datasets", None)
    missing = SFTDataModule(tokenizer_dir, "org/set")
    missing.prepare_data()
    with pytest.raises(ImportError, match=r"pip install lowrank-dist\[datasets\]"):
        missing.setup("fit")


def test_the_command_line_documents_every_option(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    parser = ArgumentParser()
    parser.add_class_arguments(SFTDataModule, "data")
    undocumented = [a.dest for a in parser._actions if a.dest.startswith("data.") and not a.help]
    assert undocumented == []
    assert "--data.group_by_length" in parser.format_help()


# ------------------------------------------------------------------------------------- under Lightning
class Recorder(L.LightningModule):
    """Writes down the items of every batch; a parameter is there for the sake of the loop."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.validated: list[list[int]] = []

    @staticmethod
    def items(batch):
        return [hash(tuple(row)) for row in batch["input_ids"][:, :6].tolist()]

    def training_step(self, batch, batch_idx):
        self.seen.append(self.items(batch))
        return self.weight**2

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.items(batch))

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches  # creates the loader before the checkpoint is read
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Saver(L.Callback):
    def __init__(self, directory):
        self.directory = directory

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step % 2 == 0:
            trainer.save_checkpoint(self.directory / f"{trainer.global_step}.ckpt")


def fit(data, tmp_path, *, epochs=2, checkpoint=None, **settings):
    module = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **settings,
    )
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False)
    return module, trainer


def test_a_run_by_tokens_resumes_in_the_middle_of_an_epoch(tokenizer_dir, train, tmp_path):
    def data(**settings):
        return SFTDataModule(tokenizer_dir, train, max_length=64, **{"tokens_per_batch": 64, **settings})

    whole, trainer = fit(data(), tmp_path, callbacks=[Saver(tmp_path)])
    steps = len(trainer.train_dataloader)
    assert isinstance(trainer.train_dataloader.sampler, ShardedSampler)  # not replaced
    assert len(whole.seen) == 2 * steps > 8
    assert whole.seen[:steps] != whole.seen[steps:]
    for step in (2, 4, steps + steps % 2 + 2):
        resumed, _ = fit(data(), tmp_path, checkpoint=tmp_path / f"{step}.ckpt")
        assert resumed.seen == whole.seen[step:]
    for settings in ({"tokens_per_batch": 192}, {"tokens_per_batch": None, "batch_size": 4}):
        with pytest.raises(InputError, match="the resumed run had tokens_per_batch=64"):
            fit(data(**settings), tmp_path, checkpoint=tmp_path / "2.ckpt")


@pytest.mark.parametrize("grouped", [False, True])
def test_a_run_resumes_in_the_middle_of_an_epoch(tokenizer_dir, train, tmp_path, grouped):
    def data():
        return SFTDataModule(tokenizer_dir, train, batch_size=4, group_by_length=grouped)

    whole, trainer = fit(data(), tmp_path, callbacks=[Saver(tmp_path)])
    assert isinstance(trainer.train_dataloader.sampler, ShardedSampler)  # not replaced
    assert len(whole.seen) == 12
    assert len({item for batch in whole.seen[:6] for item in batch}) == 23
    assert whole.seen[:6] != whole.seen[6:]
    for step in (2, 4, 8):
        resumed, _ = fit(data(), tmp_path, checkpoint=tmp_path / f"{step}.ckpt")
        assert resumed.seen == whole.seen[step:]


def test_a_run_resumes_with_loaders_that_are_made_anew(tokenizer_dir, train, tmp_path):
    def run(checkpoint=None, **settings):
        data = SFTDataModule(tokenizer_dir, train, batch_size=4)
        return fit(data, tmp_path, epochs=3, checkpoint=checkpoint, reload_dataloaders_every_n_epochs=1, **settings)[
            0
        ].seen

    whole = run(callbacks=[Saver(tmp_path)])
    assert whole == fit(SFTDataModule(tokenizer_dir, train, batch_size=4), tmp_path, epochs=3)[0].seen
    assert run(tmp_path / "4.ckpt") == whole[4:]


def test_a_run_resumes_at_the_end_of_an_epoch(tokenizer_dir, train, tmp_path):
    def data():
        return SFTDataModule(tokenizer_dir, train, train, batch_size=4)

    whole, trainer = fit(data(), tmp_path, epochs=2)
    assert isinstance(trainer.val_dataloaders.sampler, ShardedSampler)
    first, trainer = fit(data(), tmp_path, epochs=1)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    second, _ = fit(data(), tmp_path, epochs=2, checkpoint=tmp_path / "end.ckpt")
    assert first.seen + second.seen == whole.seen


@pytest.mark.parametrize("workers", [0, 2])
def test_a_checkpoint_may_be_read_after_the_iterator_was_made(tokenizer_dir, train, workers):
    """The order under DeepSpeed, whose checkpoints are restored after `configure_optimizers` made the loader."""
    before = SFTDataModule(tokenizer_dir, train, batch_size=4, num_workers=workers)
    before.setup("fit")
    loader = before.train_dataloader()
    loader.sampler.set_epoch(3)
    batches = iter(loader)
    next(batches), next(batches)
    state = before.state_dict()
    rest = [batch["input_ids"].tolist() for batch in batches]
    assert len(rest) == 4

    after = SFTDataModule(tokenizer_dir, train, batch_size=4, num_workers=workers)
    after.setup("fit")
    loader = after.train_dataloader()
    batches = iter(loader)
    after.load_state_dict(state)
    loader.sampler.set_epoch(3)
    assert [batch["input_ids"].tolist() for batch in batches] == rest
    loader.sampler.set_epoch(4)
    assert len(list(loader)) == 6


def test_workers_and_overfitting_work(tokenizer_dir, train, tmp_path):
    alone, _ = fit(SFTDataModule(tokenizer_dir, train, batch_size=4), tmp_path, epochs=2)
    data = SFTDataModule(tokenizer_dir, train, batch_size=4, num_workers=2)
    assert fit(data, tmp_path, epochs=2)[0].seen == alone.seen
    data = SFTDataModule(tokenizer_dir, train, batch_size=4)
    with pytest.warns(UserWarning, match="requested to overfit"):
        module, _ = fit(data, tmp_path, epochs=2, overfit_batches=1)
    assert len(module.seen) == 2
    assert module.seen[0] == module.seen[1]


class OwnEvaluation(SFTDataModule):
    """A class of a user with loaders of its own."""

    def val_dataloader(self):
        return torch.utils.data.DataLoader(
            torch.arange(8).view(2, 4), collate_fn=lambda rows: {"input_ids": rows[0][None]}
        )

    test_dataloader = val_dataloader


def test_loaders_of_a_subclass_are_used(tokenizer_dir, train, tmp_path):
    module, trainer = fit(OwnEvaluation(tokenizer_dir, train, batch_size=4), tmp_path, num_sanity_val_steps=0)
    assert len(module.validated) == 4  # two epochs of two batches
    assert fit(SFTDataModule(tokenizer_dir, train, batch_size=4), tmp_path)[0].validated == []
    data = OwnEvaluation(tokenizer_dir, train)
    trainer.validate(module, data)
    assert len(module.validated) == 6
    data.setup("test")
    with pytest.raises(InputError, match="test needs data: set `test`"):
        SFTDataModule(tokenizer_dir, train).setup("test")


def test_bad_records_are_bad_input_with_file_and_line(tmp_path):
    """A job with one of them stops for good: it is found before the weights are read, by the data module's set-up."""
    byte_level_tokenizer().save_pretrained(tmp_path / "tokenizer")
    good = json.dumps({"prompt": "a", "completion": "b"})
    bad = [
        f"\n{good}",
        "{",
        "[1]",
        "{}",
        '{"prompt": "a", "completion": 1}',
        '{"prompt": "\\ud800", "completion": "b"}',
        b"\xff",
    ]
    for number, line in enumerate(bad):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(f"{good}\n{good}\n".encode() + (line if isinstance(line, bytes) else line.encode()) + b"\n")
        with pytest.raises(InputError) as caught:
            SFTDataModule(str(tmp_path / "tokenizer"), str(path)).setup("fit")
        assert str(caught.value).startswith(f"{path}:3: "), line
