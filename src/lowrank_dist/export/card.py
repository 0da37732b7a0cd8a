"""The card of a published adapter or model: what it is, what is known of its training, and the code that loads it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_dist.storage.original import Original
from lowrank_dist.storage.parse import Record

CARD = "README.md"

Scores = Mapping[str, Mapping[tuple[str, str], tuple[float, float | None]]]
"""By model (``base``, ``converted``, ...): value and standard error by task and metric."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What a model card says that the files do not.

    Attributes
    ----------
    base_model
        Hub id of the original model. None: the name under which the run loaded it, which must then be one.
    title
        Heading of the card.
    datasets
        Names of the training data.
    license
        Identifier of the licence, as the hub knows it. None: none is stated.
    scores
        Scores of the models of the checkpoint.
    """

    base_model: str | None = None
    title: str
    datasets: Sequence[str] = ()
    license: str | None = None
    scores: Scores | None = None


@dataclass(frozen=True, kw_only=True)
class Use:
    """How a model is used.

    Attributes
    ----------
    auto_class
        The class of transformers that loads it.
    task
        What the hub calls it (``pipeline_tag``).
    """

    auto_class: str
    task: str

    @classmethod
    def of_adapter(cls, adapter: Record) -> Use | None:
        """What an adapter's configuration says; None if it says nothing."""
        mapping = adapter.get("auto_mapping")
        named = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
        return _OF_TASKS.get(str(adapter.get("task_type"))) or cls.of_class(str(named), adapter)

    @classmethod
    def of_model(cls, config: Record) -> Use | None:
        """What the ``architectures`` of a ``config.json`` say; None if they are none of the known kinds."""
        names = config.get("architectures")
        return cls.of_class(str(names[0]), config) if isinstance(names, list) and names else None

    @classmethod
    def of_class(cls, name: str, config: Mapping[str, Any]) -> Use | None:
        """What the name of a model's class says, beside its configuration."""
        if name.endswith("ForConditionalGeneration"):
            return _IMAGES if config.get("vision_config") else _SEQUENCES if config.get("is_encoder_decoder") else None
        return next((use for suffix, use in _OF_CLASSES.items() if name.endswith(suffix)), None)


_CAUSAL = Use(auto_class="AutoModelForCausalLM", task="text-generation")
_SEQUENCES = Use(auto_class="AutoModelForSeq2SeqLM", task="text2text-generation")
_IMAGES = Use(auto_class="AutoModelForImageTextToText", task="image-text-to-text")
_OF_CLASSES = {
    "ForCausalLM": _CAUSAL,
    "LMHeadModel": _CAUSAL,
    "ForSequenceClassification": Use(auto_class="AutoModelForSequenceClassification", task="text-classification"),
    "ForTokenClassification": Use(auto_class="AutoModelForTokenClassification", task="token-classification"),
    "ForQuestionAnswering": Use(auto_class="AutoModelForQuestionAnswering", task="question-answering"),
    "ForMaskedLM": Use(auto_class="AutoModelForMaskedLM", task="fill-mask"),
    "ForImageClassification": Use(auto_class="AutoModelForImageClassification", task="image-classification"),
}
#: By PEFT's task types.
_OF_TASKS = {
    "CAUSAL_LM": _CAUSAL,
    "SEQ_2_SEQ_LM": _SEQUENCES,
    "SEQ_CLS": _OF_CLASSES["ForSequenceClassification"],
    "TOKEN_CLS": _OF_CLASSES["ForTokenClassification"],
    "QUESTION_ANS": _OF_CLASSES["ForQuestionAnswering"],
}


class Card:
    """A model card in the making.

    Parameters
    ----------
    manifest
        The manifest with what is known of the training.
    base
        The original model, under its hub id.
    about
        What the user says.
    use
        How the model is used; None: unknown.
    """

    def __init__(self, manifest: Record, base: Original, about: About, use: Use | None) -> None:
        self.manifest, self.base, self.about, self.use = manifest, base, about, use
        self.rows: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self.add("base", f"`{base.name}`" + (f", commit `{base.commit}`" if base.commit else ""))
        self.add("fingerprint of its weights", _code(manifest.get("pretrained_fingerprint")))
        self.add("initialisation", manifest.get("method"))
        self.add("base in training", _code(manifest.get("quantization")))
        self.add("precision of training", manifest.get("precision"))
        self.add("optimizer steps", manifest.get("step"))
        self.add("training data", ", ".join(f"`{name}`" for name in about.datasets))
        self._add_errors()

    def add(self, name: str, value: Any) -> None:
        """A row of the table, if there is a value."""
        if value not in (None, ""):
            self.rows.append((name, str(value)))

    def _add_errors(self) -> None:
        matrices = self.manifest.records("matrices")
        known = [m for m in matrices if isinstance(m.get("error"), float) and isinstance(m.get("norm"), float)]
        norm = math.hypot(*(m["norm"] for m in known))
        if self.manifest.get("residual") and norm:
            left = math.hypot(*(m["error"] for m in known)) / norm
            self.add("lost to quantization in training, and not made up for here", f"{left:.2%} of the adapted weights")
        kept = self.manifest.get("energy_kept")
        if isinstance(kept, Mapping) and isinstance(kept.get("overall"), float):
            self.add("energy of the update kept at this rank", f"{kept['overall']:.2%}")

    def text(self, *, adapter: Record | None) -> str:
        """The card of an adapter with this configuration, or of a merged model."""
        from huggingface_hub import ModelCardData

        method = str(self.manifest.get("method") or "")
        data = ModelCardData(
            base_model=self.base.name,
            library_name="transformers" if adapter is None else "peft",
            pipeline_tag=None if self.use is None else self.use.task,
            license=self.about.license,
            datasets=list(self.about.datasets) or None,
            tags=["lowrank-dist", *(["lora"] if adapter is not None else []), *([method.lower()] if method else [])],
        )
        blocks = [
            f"---\n{data.to_yaml()}\n---",
            f"# {self.about.title}",
            self._what(adapter),
            _table(["", ""], self.rows),
        ]
        if self.about.scores:
            blocks += ["## Scores", _scores(self.about.scores)]
        if self.notes:
            blocks += ["## Serving", "\n".join(f"- {note}" for note in self.notes)]
        loading = self._loading(adapter)
        if loading:
            blocks += ["## Use", "\n".join(["```python", *loading, "```"])]
        return "\n\n".join(blocks) + "\n"

    def _what(self, adapter: Record | None) -> str:
        with_what = f"lowrank_dist {self.manifest.get('lowrank_dist')}"
        if adapter is not None:
            kind = "DoRA" if adapter.get("use_dora") else "LoRA"
            return f"A {kind} for `{self.base.name}`, trained with {with_what}."
        if self.manifest.get("kind") == "merged":  # nothing is known of its training
            return f"`{self.base.name}` with an adapter merged into its weights, by {with_what}."
        return f"`{self.base.name}` with an adapter merged into its weights, trained with {with_what}."

    def _loading(self, adapter: Record | None) -> list[str]:
        """Lines of Python that load it; none if that is not known, or if the base first needs another head."""
        if self.use is None or (adapter is not None and self.use != _CAUSAL):
            return []
        auto = self.use.auto_class
        if adapter is None:
            return [f"from transformers import {auto}", "", f'model = {auto}.from_pretrained("MODEL")']
        revision = f', revision="{self.base.commit}"' if self.base.commit else ""
        return [
            "from peft import PeftModel",
            f"from transformers import {auto}",
            "",
            f'base = {auto}.from_pretrained("{self.base.name}"{revision})',
            'model = PeftModel.from_pretrained(base, "ADAPTER")',
        ]


def _code(value: object) -> str | None:
    return None if value in (None, "") else f"`{value}`"


def _scores(scores: Scores) -> str:
    keys = list(dict.fromkeys(key for found in scores.values() for key in found))
    rows = []
    for task, metric in keys:
        cells = []
        for found in scores.values():
            value, error = found.get((task, metric), (None, None))
            cells.append("" if value is None else f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}"))
        rows.append((task, metric, *cells))
    return _table(["task", "metric", *scores], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '¦') for cell in line)} |" for line in lines)
