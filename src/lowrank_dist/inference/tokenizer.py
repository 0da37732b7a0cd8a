"""The tokenizer of a model, with the chat template that is to be used."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lowrank_dist.data.chat_template import read_template
from lowrank_dist.errors import InputError, is_passing


def load_tokenizer(name: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory or of a hub id.

    Parameters
    ----------
    name
        Directory or hub id.
    chat_template
        A Jinja file, or its text, in place of the tokenizer's own.

    Raises
    ------
    InputError
        If transformers loads none, or the template is neither.
    """
    template = read_template(chat_template)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # whatever a tokenizer's class raises
        if is_passing(error):
            raise
        raise InputError(
            f"{name}: holds no tokenizer that transformers loads ({error}); name one (--tokenizer)"
        ) from error
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer
