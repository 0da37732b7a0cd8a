"""A chat in the terminal: rank 0 reads, computes and writes, and the other ranks hold their part of the model."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Mapping

from transformers import PreTrainedTokenizerBase, TextStreamer

from lowrank_dist.data.messages import Message, assistant
from lowrank_dist.data.prompts import Prompt, Prompter
from lowrank_dist.errors import InputError
from lowrank_dist.inference.generation import Answer, Sampling, check_prompts, generate_one
from lowrank_dist.inference.sharded import ShardedCausalLM

#: Seconds after which waiting ranks hear that the user is still thinking: collectives time out.
_PATIENCE = 60.0

HELP = "/reset begins again, /exit or Ctrl-D ends"


class Streamer(TextStreamer):
    """Writes an answer as it is generated."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text + ("\n" if stream_end else ""))


def to_terminal(text: str) -> None:
    """Write text at once; control characters that a model writes do not reach the terminal."""
    sys.stdout.write("".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text))
    sys.stdout.flush()


def stream(
    model: ShardedCausalLM,
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    *,
    stops: Mapping[int, str],
    number: int = 0,
) -> Answer | None:
    """Answer one prompt on rank 0 and write the answer as it is generated; None on other ranks. Collective."""
    found = None
    with model.in_step():
        if model.group.rank == 0:
            streamer = Streamer(tokenizer, to_terminal)
            found = generate_one(model, prompt, tokenizer, sampling, stops=stops, number=number, streamer=streamer)
    return found


def chat(
    model: ShardedCausalLM,
    prompter: Prompter,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    *,
    stops: Mapping[int, str],
) -> None:
    """Talk until the user ends it. Collective.

    Raises
    ------
    InputError
        On every rank, if the chat template cannot render the conversation.
    """
    first, number = model.group.rank == 0, 0
    messages: list[Message] = []
    reader = _Reader() if first else None
    if first:
        print(f"({HELP})", file=sys.stderr)
    while True:
        said = model.group.broadcast_object(reader.next() if reader is not None else None)
        if said is None:  # still waiting
            continue
        text = str(said).strip()
        if text == "/exit":
            return
        if text == "/reset":
            messages = []
            continue
        if not text:
            continue
        messages = [*messages, Message(role="user", text=text)]
        try:  # the same on every rank
            prompt = prompter.conversation(messages, "the conversation")
            check_prompts([prompt], sampling, rows=model.rows, context=model.context, tokenizer=tokenizer.name_or_path)
        except InputError as error:
            if len(messages) == 1 and "chat template" in str(error):
                raise
            messages = messages[:-1]
            if first:
                print(f"{error}\n({HELP})", file=sys.stderr)
            continue
        found = model.group.broadcast_object(stream(model, prompt, tokenizer, sampling, stops=stops, number=number))
        assert isinstance(found, Answer)
        messages = [*messages, assistant(found.text)]
        number += 1
        if first and found.ended == "length":
            print(f"(cut after {len(found.tokens)} tokens)", file=sys.stderr)


class _Reader:
    """Reads lines in a thread of its own."""

    def __init__(self) -> None:
        self._lines: queue.Queue[str] = queue.Queue()
        self._wanted = threading.Event()
        self._asked = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            try:
                self._lines.put(input("> " if sys.stdin.isatty() else ""))
            except (EOFError, OSError, UnicodeError):
                self._lines.put("/exit")
                return

    def next(self) -> str | None:
        """The next line; None if there is none yet."""
        if not self._asked:
            self._asked = True
            self._wanted.set()
        try:
            line = self._lines.get(timeout=_PATIENCE)
        except queue.Empty:
            return None
        self._asked = False
        return line
