"""Learning rates at which methods were published, as starting points.

Only what the publication itself, or its code, states. Rates of different methods, scalings and batch sizes are not
comparable: compare methods each at its own best rate (arXiv:2602.04998).
"""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_dist.errors import InputError
from lowrank_dist.methods import METHODS, Method


@dataclass(frozen=True, kw_only=True)
class PublishedRate:
    """A published starting point.

    Parameters
    ----------
    advice
        The rate, or how it follows from another one.
    setting
        What it was published for.
    source
        Where.
    rate
        The learning rate, if it is a number.

    See Also
    --------
    published_rates : Those of a method.

    Examples
    --------
    >>> from lowrank_dist import published_rates
    >>> str(published_rates("pissa")[0])
    '2e-05 (AdamW, cosine, warm-up 0.03, batches of 128, alpha = r; arXiv:2404.02948)'
    """

    advice: str
    setting: str
    source: str
    rate: float | None = None

    def __str__(self) -> str:
        return f"{self.advice} ({self.setting}; {self.source})"


def _rate(rate: float, setting: str, source: str) -> PublishedRate:
    return PublishedRate(advice=f"{rate:g}", setting=setting, source=source, rate=rate)


_PISSA = _rate(2e-5, "AdamW, cosine, warm-up 0.03, batches of 128, alpha = r", "arXiv:2404.02948")
_TEN_TIMES = PublishedRate(
    advice="about 10 times the best rate of full fine-tuning",
    setting="supervised fine-tuning, at most ranks",
    source="thinkingmachines.ai, 'LoRA Without Regret'; arXiv:2602.04998",
)
_LORA = _rate(2e-4, "GPT-3 175B, AdamW", "arXiv:2106.09685")
_QLORA = (
    _rate(2e-4, "LLaMA 7B and 13B, batches of 16, constant, r = 64, alpha = 16", "arXiv:2305.14314"),
    _rate(1e-4, "LLaMA 33B and 65B, batches of 16, constant, r = 64, alpha = 16", "arXiv:2305.14314"),
)
_LOFTQ = _rate(3e-4, "Llama-2-7B, 4 bits, rank 64, GSM8K and WikiText-2, weight decay 0.1", "github.com/yxli2123/LoftQ")
_QERA = _rate(
    3e-5, "Llama-2-7B, 4 bits, rank 128, alpha = 2 r, GSM8K, cosine, warm-up 100", "github.com/ChengZhang-98/QERA"
)
_SVFT = tuple(
    _rate(rate, f"{pattern}; Gemma-2B, MetaMathQA-40K, batches of 64, cosine", "github.com/VijayLingam95/SVFT")
    for rate, pattern in ((5e-2, "plain"), (5e-3, "banded, off_diagonal=16"))
)
_LORA_PLUS = PublishedRate(
    advice="B 16 times as fast as A (loraplus_lr_ratio=16), A slower than in LoRA",
    setting="LoRA+, which starts at B = 0",
    source="arXiv:2402.12354",
)
_RSLORA = PublishedRate(
    advice="a rate found with alpha / r does not carry over: rsLoRA scales by alpha / sqrt(r)",
    setting="use_rslora=True",
    source="arXiv:2312.03732",
)


def published_rates(init: str | Method, *, quantized: bool = False, rslora: bool = False) -> tuple[PublishedRate, ...]:
    """Return the published starting points of a method's learning rate, the closest first.

    Parameters
    ----------
    init
        The method, or its name: ``"pissa"``, ``"lora"``, ``"loftq"``, ...
    quantized
        Whether the residual is in 4 bits (QLoRA).
    rslora
        Whether the adapter is scaled by ``alpha / sqrt(r)``.

    Returns
    -------
    tuple of PublishedRate
        Empty if this package knows of none.

    Raises
    ------
    InputError
        If there is no method of that name.

    See Also
    --------
    CausalLMModule : Takes the rate (`lr`), and that of B (`loraplus_lr_ratio`).

    Examples
    --------
    >>> from lowrank_dist import published_rates
    >>> [found.rate for found in published_rates("lora", quantized=True)][:2]
    [0.0002, 0.0001]
    """
    if isinstance(init, str):
        if init not in METHODS:
            raise InputError(f"there is no initialisation {init!r}; registered are {', '.join(sorted(METHODS))}")
        kind = METHODS[init]
    else:
        kind = type(init)
    known: dict[type[Method], tuple[PublishedRate, ...]] = {
        METHODS["pissa"]: (_PISSA,),
        METHODS["lora"]: (*(_QLORA if quantized else ()), _TEN_TIMES, _LORA, _LORA_PLUS),
        METHODS["loftq"]: (_LOFTQ,),
        METHODS["qera"]: (_QERA,),
        METHODS["svft"]: _SVFT,
    }
    found = known.get(kind, ())
    return (*found, _RSLORA) if rslora and found else found


def hint(lr: float, init: Method, *, quantized: bool, rslora: bool) -> str | None:
    """One line for a run whose learning rate nobody chose; None if nothing is known of the method."""
    found = published_rates(init, quantized=quantized, rslora=rslora)
    if not found:
        return None
    return f"lr={lr:g} is the default of CausalLMModule; published for {type(init).__name__}: " + "; or ".join(
        map(str, found[:2])
    )
