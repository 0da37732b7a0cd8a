"""Several sources: what an epoch draws of each by weight, and that its rest is the same on any number of ranks."""

from __future__ import annotations

import json
import logging
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from helpers.sft import byte_level_tokenizer, write_jsonl
from lowrank_dist.data.datamodule import SFTDataModule
from lowrank_dist.data.mixture import Mixing, parts_of
from lowrank_dist.data.packing import Collator, ItemLists, JoinedItems, TokenDataset
from lowrank_dist.data.sampler import ResumableLoader, ShardedSampler
from lowrank_dist.data.token_batches import TokenBatchSampler
from lowrank_dist.errors import InputError

STRATEGIES = ("first_exhausted", "all_exhausted")


def mixing_of(weights: list[float], strategy: Any = "first_exhausted") -> Mixing:
    return Mixing(parts=[(f"part {place}", weight) for place, weight in enumerate(weights)], strategy=strategy)


parts = st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0.1, 0.5, 1.0, 2.0, 3.0, 0.7])), min_size=2, max_size=4)


@given(parts, st.sampled_from(STRATEGIES))
def test_shares_are_exact_and_no_example_comes_again_before_all_others(given_parts: Any, strategy: str) -> None:
    sizes, weights = [size for size, _ in given_parts], [weight for _, weight in given_parts]
    try:
        mixture = mixing_of(weights, strategy).over(sizes, seed=3, unit="examples")
    except InputError:  # an epoch would have none of a part
        return
    exact = [weight / sum(weights) * mixture.total for weight in weights]
    # each count is rounded by half a unit at most, and the total is their sum
    assert all(abs(count - share) < 0.5 + len(sizes) / 2 for count, share in zip(mixture.counts, exact, strict=True))
    ends = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    seen: Counter[int] = Counter()
    for epoch in range(4):
        drawn = mixture.drawn(epoch).tolist()
        assert len(drawn) == mixture.total
        for (begin, end), count in zip(pairwise(ends), mixture.counts, strict=True):
            assert sum(begin <= unit < end for unit in drawn) == count
        seen.update(drawn)
        for begin, end in pairwise(ends):
            times = [seen[unit] for unit in range(begin, end)]
            assert max(times) - min(times) <= 1
    once = [count == size for count, size in zip(mixture.counts, sizes, strict=True)]
    assert any(once)
    assert all(c <= s if strategy == STRATEGIES[0] else c >= s for c, s in zip(mixture.counts, sizes, strict=True))


def items_of(sizes: list[int]) -> JoinedItems:
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    return JoinedItems(
        TokenDataset([torch.full((2, 1 + index % 7), start + index, dtype=torch.int32) for index in range(size)])
        for start, size in zip(starts, sizes, strict=True)
    )


@pytest.mark.parametrize("way", ["examples", "grouped", "tokens", "grouped tokens"])
@given(ranks=st.integers(1, 3), after=st.integers(1, 3), steps=st.integers(0, 12), strategy=st.sampled_from(STRATEGIES))
def test_an_epoch_goes_on_elsewhere(way: str, ranks: int, after: int, steps: int, strategy: str) -> None:
    dataset = items_of([23, 40, 9])
    mixing = mixing_of([2.0, 1.0, 1.0], strategy)
    by_tokens, grouped = "tokens" in way, "grouped" in way

    def loaders(ranks: int) -> list[ResumableLoader]:
        made = []
        for rank in range(ranks):
            settings: Any = {"num_replicas": ranks, "rank": rank, "shuffle": True, "seed": 1, "mixing": mixing}
            settings["group_by_length"] = grouped
            sampler: Any
            if by_tokens:
                sampler = TokenBatchSampler(dataset, tokens_per_batch=24, **settings)
            else:
                sampler = ShardedSampler(dataset, batch_size=2, **settings)
            sampler.set_epoch(1)
            source: Any = ItemLists(dataset) if by_tokens else dataset
            size = None if by_tokens else 2
            made.append(ResumableLoader(source, batch_size=size, sampler=sampler, collate_fn=Collator(0)))
        return made

    def items(loader: ResumableLoader, steps: int = 10**6) -> Counter[int]:
        batches = [batch for _, batch in zip(range(steps), loader, strict=False)]
        trained = [
            (batch["labels"] != -100).any(dim=1) | (batch["attention_mask"].sum(dim=1) == 1) for batch in batches
        ]
        rows = [b["input_ids"][t].max(dim=1).values.tolist() for b, t in zip(batches, trained, strict=True)]
        return Counter(index for row in rows for index in row)

    before = loaders(ranks)
    whole: Any = before[0].sampler
    expected = (
        Counter(index for batch in whole.epoch_batches()[0] for index in batch) if by_tokens else Counter(whole.order())
    )
    assert len(before[0]) == len(list(before[0]))
    before = loaders(ranks)
    seen = sum((items(loader, steps) for loader in before), Counter())
    states = [loader.state_dict() for loader in before]
    assert all(state == states[0] for state in states)
    if steps >= len(before[0]):
        return
    rest: Counter[int] = Counter()
    for loader in loaders(after):
        loader.load_state_dict(json.loads(json.dumps(states[0])))
        loader.sampler.set_epoch(1)  # type: ignore[attr-defined]
        rest += items(loader)
    total = seen + rest
    # fillers of one token cannot be told from items here, one for each rank at most
    assert not expected - total
    assert (total - expected).total() < ranks + after


def test_a_resumed_run_must_draw_the_same() -> None:
    dataset = items_of([20, 20])
    settings: Any = {"batch_size": 2, "num_replicas": 1, "rank": 0, "shuffle": True}
    weighted = ShardedSampler(dataset, mixing=mixing_of([1, 3]), **settings)
    state = weighted.state() | {"start": 4}
    for other in (None, mixing_of([1, 2])):
        with pytest.raises(InputError, match=r"the resumed run drew 7 \+ 20 of its sources an epoch, and this one"):
            ShardedSampler(dataset, mixing=other, **settings).resume(**state)
    weighted.resume(**state)
    assert len(list(weighted)) == 23


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    byte_level_tokenizer().save_pretrained(tmp_path / "tokenizer")
    found = {"tokenizer": str(tmp_path / "tokenizer")}
    for name, count in (("a", 30), ("b", 12), ("c", 5)):
        records: list[Any] = [{"prompt": f"{name} {index}", "completion": " world"} for index in range(count)]
        if name == "c":  # weights of tokens, which the others do not have
            turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world", "weight": 0.5}]
            records = [{"messages": turns}] * count
        found[name] = write_jsonl(tmp_path / f"{name}.jsonl", records)
    return found


@pytest.mark.parametrize("options", [{}, {"packing": True}, {"tokens_per_batch": 64}, {"group_by_length": True}])
def test_the_data_module_mixes_and_says_so(
    files: dict[str, str], tmp_path: Path, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    given = {
        "data": {
            "tokenizer": files["tokenizer"],
            "train": [{"path": files["a"], "weight": 2}, {"path": [files["b"], files["c"]], "weight": 1.0}],
            "validation": [files["a"], {"path": files["b"], "limit": 3}],
            "max_length": 48,
            "cache_dir": str(tmp_path / "cache"),
            **options,
        }
    }
    parser = ArgumentParser()
    parser.add_class_arguments(SFTDataModule, "data")
    settings = parser.parse_object(parser.parse_string(parser.dump(parser.parse_object(given))))  # as a run writes it
    data = getattr(parser, "instantiate", parser.instantiate_classes)(settings).data
    with caplog.at_level(logging.WARNING):
        data.setup("fit")
        loader = data.train_dataloader()
    (line,) = [record.getMessage() for record in caplog.records]
    unit = "packed rows" if "packing" in options else "batches" if "tokens_per_batch" in options else "examples"
    assert line.startswith(f"train: {loader.sampler.mixture.total} {unit} an epoch, by weight (first_exhausted): ")
    if unit == "examples":
        assert f"30 of the 30 of train[0]='{files['a']}' (66.67%), 15 of the 17 of train[1]=" in line
    batches = list(loader)
    assert len(batches) == len(loader)
    assert all("weights" in batch for batch in batches)  # also where all of them are one
    if unit == "examples" and not options.get("group_by_length"):
        assert sum(len(batch["input_ids"]) for batch in data.val_dataloader()) == 33


def test_names_alone_are_read_as_before(files: dict[str, str]) -> None:
    (part,) = parts_of("train", [files["a"], files["b"]], split="train", subset=None, limit=4)
    assert (part.limit, part.weight, part.source.role) == (4, None, "train")
    entries: Any = [{"path": files["a"]}, {"path": files["b"]}]
    orders = []
    for train in ([files["a"], files["b"]], entries, [files["a"], {"path": files["b"]}]):
        data = SFTDataModule(files["tokenizer"], train, batch_size=2)
        data.setup("fit")
        orders.append([batch["input_ids"].tolist() for batch in data.train_dataloader()])
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("[{path: a, weight: 0}, {path: b, weight: 1}]", r"train\[0\].weight=0 must be a number above 0"),
        ("[{path: a, weight: 1}, {path: b, weight: -1.5}]", r"train\[1\].weight=-1.5 must be"),
        ("[{path: a, weight: .inf}, {path: b, weight: 1}]", r"train\[0\].weight=inf must be"),
        ("[{path: a, weight: .nan}, {path: b, weight: 1}]", r"train\[0\].weight=nan must be"),
        ("[{path: a, weight: true}, {path: b, weight: 1}]", r"train\[0\].weight=True must be"),
        ("[{path: a, weight: two}, {path: b, weight: 1}]", r"train\[0\].weight='two' must be"),
        ("[{path: a, weight: 1}, {path: b}]", r"^train\[1\]='b' has no weight, and train\[0\]='a' has the weight 1"),
        ("[{path: a, weight: 1}, b]", r"^train\[1\]='b' has no weight"),
        ("[{path: a, wieght: 1}, b]", r"train\[0\]: 'wieght' is not known; valid choices: path, weight"),
        ("[{weight: 1}, b]", r"train\[0\]={'weight': 1}: neither a name nor an entry with a `path`"),
        ("[{path: a, limit: 0}, b]", r"train\[0\].limit=0 must be at least 1"),
    ],
)
def test_wrong_entries_are_named(entries: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SFTDataModule("t", yaml.safe_load(entries))


def test_what_does_not_go_with_weights_is_named(files: dict[str, str]) -> None:
    weighted: Any = [{"path": files["a"], "weight": 1000}, {"path": files["b"], "weight": 1}]
    with pytest.raises(InputError, match=r"validation\[0\].weight=1000.0: in `validation` every example counts once"):
        SFTDataModule("t", files["a"], weighted)
    with pytest.raises(InputError, match=r"^limit=3 does not say from which entries of `train`"):
        SFTDataModule("t", weighted, limit=3)
    with pytest.raises(InputError, match="stopping_strategy='never'; valid choices: first_exhausted, all_exhausted"):
        SFTDataModule("t", weighted, stopping_strategy="never")  # type: ignore[arg-type]
    data = SFTDataModule(files["tokenizer"], weighted)
    with pytest.raises(InputError, match=r"train\[1\]='.*b.jsonl': with the weight 1 its share of an epoch of 30 exam"):
        data.setup("fit")
