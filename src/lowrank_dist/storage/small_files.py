"""The small files of a model, beside its weights: which there are, and which links among them are followed."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from lowrank_dist.errors import CheckpointError

log = logging.getLogger(__name__)

#: Configuration, tokenizer, processors and licence, by the names that transformers and the hub give them.
SMALL_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab*.json", "merges.txt", "vocab.txt", "vocab.bpe", "spiece.model", "*.tiktoken"),
    *("tokenizer*.model", "tokenizer.model.v*", "tekken.json", "sentencepiece*.model", "spm*.model", "*.spm"),
    *("bpe.codes", "dict.txt", "emoji.json", "normalizer.json", "byte_maps.json", "prophetnet.tokenizer"),
    *("entity_vocab.json", "target_vocab.json", "word_shape.json", "word_pronunciation.json"),
    *("chat_template*.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("preprocessor_config.json", "processor_config.json", "image_processor_config.json"),
    *("video_preprocessor_config.json", "feature_extractor_config.json"),
    *("config_sentence_transformers.json", "modules.json"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "README.md"),
)


def small_files(source: Path, weights: Iterable[Path]) -> dict[str, Path]:
    """The files of a model beside its weights (`SMALL_FILES`), and no others: where each is, by its path in `source`.

    Links are followed where the weights are, too: into the directories in which `weights` are after following links,
    into `source`, and into the hub's cache that `source` is in. A link to another place could be one to a private file
    of the user, which must not be published with the model; it is left out, and a line says so.

    Parameters
    ----------
    source
        Directory of the model, or a GGUF file in it.
    weights
        The files that its tensors are read from.

    Raises
    ------
    CheckpointError
        If ``config.json`` is such a link: without it the model cannot be loaded.
    """
    if not source.is_dir():  # a GGUF file
        source = source.parent
    places = {path.resolve().parent for path in weights}
    if source.parent.name == "snapshots":  # of <cache>/models--.../snapshots/<commit>, whose files are in blobs
        places.add((source.parents[1] / "blobs").resolve())
    found, left_out = dict[str, Path](), dict[str, Path]()
    for path in sorted({path for pattern in SMALL_FILES for path in source.glob(pattern)}):
        name, real = path.relative_to(source), path.resolve()
        if real.is_dir():
            continue
        is_beside = real.is_relative_to(source.resolve()) or any(real.parent in (p, p / name.parent) for p in places)
        (found if is_beside and real.is_file() else left_out)[str(name)] = real
    if "config.json" in left_out:
        raise CheckpointError(
            f"{source / 'config.json'} is a link to {left_out['config.json']}, where no weights of the model are, and "
            "is not followed; put a copy in its place"
        )
    if left_out:
        log.warning(
            "%s: links to where no weights of the model are, which are not followed: %s; put copies in their place",
            source,
            ", ".join(left_out),
        )
    return found


def copy_small_files(files: Mapping[str, Path], target: Path) -> None:
    """Copy the files that `small_files` has found into the directory `target`."""
    for name, path in files.items():
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / name)
