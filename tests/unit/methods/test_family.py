"""The initialisations beside PiSSA, LoRA and LoftQ: against PEFT's own, against whole decompositions, at step 0."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor, nn

from helpers.ranks import alone, run_ranks
from lowrank_dist import (
    EVA,
    NF4,
    QERA,
    SVFT,
    CorDA,
    LoftQ,
    LoRA,
    LoRAGA,
    LoRAOne,
    LoRAXS,
    MiLoRA,
    OLoRA,
    PiSSA,
    register,
)
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.errors import InputError
from lowrank_dist.methods import (
    METHODS,
    Decomposition,
    Factors,
    Matrix,
    Method,
    method_named,
    sharded,
)
from lowrank_dist.methods.base import residual_block
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.quantization.format import ResidualFormat

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "own-method.md"
SINGLE = ShardGroup.single()
FP32 = Dense(dtype=torch.float32)
WHOLE = 1000  # oversampling to the whole short side: the randomized SVD is exact to rounding

FAMILY = [
    OLoRA(),
    MiLoRA(),
    CorDA(oversampling=WHOLE),
    CorDA(corda_method="kpm"),
    EVA(oversampling=WHOLE),
    *[
        LoRAGA(direction=direction, scale=scale, oversampling=WHOLE)  # type: ignore[arg-type]
        for direction, scale in [
            ("ArBr", "gd_scale"),
            ("A2rBr", "weight_svd"),
            ("ArB2r", "stable"),
            ("random", "unit"),
        ]
    ],
]


def name_of(method: Method) -> str:
    return "-".join([str(method), *[getattr(method, f) for f in ("corda_method", "direction") if hasattr(method, f)]])


family = pytest.mark.parametrize("method", FAMILY, ids=name_of)


def gaussian(rows: int, columns: int, salt: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * 1000 + columns + salt * 10**6))


def covariance_of(inputs: int) -> Tensor:
    """``X^T X / tokens`` of inputs whose features differ in size."""
    x = gaussian(4 * inputs + 8, inputs, salt=1) * torch.linspace(0.5, 2, inputs)
    return x.T @ x / len(x)


def matrix(weight: Tensor, rank: int, method: Method, *, input_first: bool = False, **options: Any) -> Matrix:
    """`weight` is ``[out, in]``; it is stored transposed where `input_first`."""
    statistic = {
        None: None,
        "covariance": covariance_of(weight.shape[1]),
        "gradient": gaussian(*weight.shape, salt=2),
    }[method.statistic]
    if method.statistic == "gradient" and input_first:
        statistic = statistic.T.contiguous()
    block = weight.T.contiguous() if input_first else weight
    defaults = {"scaling": 0.5, "factor_dtype": torch.float32, "statistic": statistic}
    return Matrix(
        name="w",
        block=block,
        partition=RowPartition(rows=block.shape[0], columns=block.shape[1], world_size=1, block=64),
        group=SINGLE,
        rank=rank,
        input_first=input_first,
        **{**defaults, **options},
    )


def adapter(m: Matrix, d: Decomposition) -> tuple[Tensor, Tensor]:
    """``(A, B)`` in PEFT's orientation."""
    left, right = d.factors.left, d.factors.right
    return (left.T, right.T) if m.input_first else (right, left)


# -- step 0 ------------------------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(
    outputs=st.integers(1, 40),
    inputs=st.integers(1, 40),
    scaling=st.sampled_from([0.25, 1.0, 2.0, 1 / math.sqrt(3)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    method=st.sampled_from(FAMILY),
    input_first=st.booleans(),
    deficient=st.booleans(),
    data=st.data(),
)
def test_without_quantization_nothing_is_lost(
    outputs: int,
    inputs: int,
    scaling: float,
    dtype: torch.dtype,
    method: Method,
    input_first: bool,
    deficient: bool,
    data: st.DataObject,
) -> None:
    """For any rank up to min(out, in), and for weights of rank one. The bound is that of the sums: r + 2 roundings of
    6e-8 (the residual, the products, their sum) of what is added up, entry by entry, and twice that.
    """
    rank = data.draw(st.integers(1, min(outputs, inputs)))
    weight = gaussian(outputs, 1) @ gaussian(1, inputs) if deficient else gaussian(outputs, inputs)
    m = matrix(weight, rank, method, scaling=scaling, factor_dtype=dtype, input_first=input_first)
    rows, columns = m.partition.rows, m.partition.columns
    objection = method.objection(rows=rows, columns=columns, rank=rank, lookup=False, wrapped=False)
    if isinstance(method, LoRAGA) and 2 * rank > min(outputs, inputs):
        assert f"takes 2r={2 * rank} singular triplets" in str(objection)
        return
    assert objection is None
    d = method.decompose(m, FP32)
    left, right = d.factors.left, d.factors.right
    assert torch.equal(left, left.to(dtype).float())
    assert torch.equal(right, right.to(dtype).float())
    assert bool(left.isfinite().all())
    assert bool(right.isfinite().all())
    bound = 2 * (rank + 2) * 6e-8 * (m.block.abs() + scaling * left.abs() @ right.abs())
    lost = m.block.double() - (d.residual.decoded.double() + scaling * left.double() @ right.double())
    assert bool((lost.abs() <= bound).all())


@family
@pytest.mark.parametrize("input_first", [False, True])
def test_a_quantized_residual_is_that_of_the_factors(method: Method, input_first: bool) -> None:
    m = matrix(gaussian(48, 64), 4, method, input_first=input_first, factor_dtype=torch.bfloat16)
    d = method.decompose(m, NF4())
    encoded = NF4().encode(residual_block(m, d.factors), m.partition, SINGLE)
    assert torch.equal(d.residual.decoded, encoded.decoded)
    assert all(torch.equal(d.residual.shards[name], shard) for name, shard in encoded.shards.items())


@pytest.mark.parametrize("residual", [FP32, Dense(dtype=torch.bfloat16), NF4(double_quant=True)], ids=str)
@pytest.mark.parametrize(
    "method",
    [*FAMILY, LoRA(), LoRAXS(), SVFT(), PiSSA(), PiSSA(quantization_iterations=3), LoftQ(quantization_iterations=2)],
    ids=repr,
)
def test_what_may_be_overwritten(method: Method, residual: ResidualFormat) -> None:
    """What lies in the memory of W is bit for bit what would have been made beside it; where `encoded_of` does not
    say what was encoded, W is as it was."""
    w = gaussian(48, 64)
    beside, instead = (
        matrix(w.clone(), 4, method, spare=spare, factor_dtype=torch.bfloat16) for spare in (False, True)
    )
    expected, found = method.decompose(beside, residual), method.decompose(instead, residual)
    assert torch.equal(beside.block, w)
    assert torch.equal(found.factors.left, expected.factors.left)
    assert torch.equal(found.factors.right, expected.factors.right)
    assert all(torch.equal(found.residual.shards[name], shard) for name, shard in expected.residual.shards.items())
    if found.encoded_of is None:
        assert torch.equal(instead.block, w)
    else:
        rest = w if method.starts_at_zero else residual_block(beside, expected.factors)
        assert torch.equal(found.encoded_of, rest)
        assert torch.equal(residual.encode(rest, beside.partition, SINGLE).decoded, found.residual.decoded)


@pytest.mark.parametrize("method", [*FAMILY, LoRA(), PiSSA()], ids=name_of)
def test_starts_at_zero_says_whether_b_a_is_zero(method: Method) -> None:
    m = matrix(gaussian(48, 64), 4, method)
    d = method.decompose(m, FP32)
    assert (float((d.factors.left @ d.factors.right).abs().max()) == 0) is method.starts_at_zero
    assert torch.equal(d.residual.decoded, m.block) is method.starts_at_zero


@family
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 64), (64, 48)])
def test_a_transposed_weight_gets_the_same_adapter(method: Method, outputs: int, inputs: int) -> None:
    """Conv1D stores W^T. The signs of the triplets that A and B take may turn with the orientation, hence sizes only;
    5e-5 is fp32 rounding over the gaps between singular values (about 1/50 of the largest).
    """
    weight = gaussian(outputs, inputs)
    linear, conv = (matrix(weight, 4, method, input_first=flag) for flag in (False, True))
    factors = [adapter(m, method.decompose(m, FP32)) for m in (linear, conv)]
    for ours, transposed in zip(*factors, strict=True):
        assert ours.shape == transposed.shape
        scale = max(float(ours.abs().max()), 1.0)
        torch.testing.assert_close(transposed.abs(), ours.abs(), rtol=0, atol=5e-5 * scale)
    if not isinstance(method, LoRAGA):
        (a, b), (a_t, b_t) = factors
        torch.testing.assert_close(b_t @ a_t, b @ a, rtol=0, atol=2e-4)


# -- parity with PEFT --------------------------------------------------------------------------------------------------


def model_of(weight: Tensor) -> nn.Module:
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight.data = weight.clone()
    return model


def peft_adapter(model: nn.Module, config: LoraConfig) -> tuple[Tensor, Tensor, Tensor]:
    """``(A, B, W_res)`` that PEFT's initialiser leaves."""
    layer = get_peft_model(model, config).base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return a.detach(), b.detach(), layer.base_layer.weight.detach()


SHAPES = pytest.mark.parametrize(("outputs", "inputs"), [(24, 16), (16, 24), (20, 20)])


def assert_near(actual: Tensor, expected: Tensor, share: float = 2e-5) -> None:
    """Entries within a share of the largest one. Two fp32 decompositions of a 24 x 16 matrix differ by the rounding of
    6e-8 over gaps between singular values of a few percent, 3e-6, and some of these add up.
    """
    torch.testing.assert_close(actual, expected, rtol=0, atol=share * float(expected.abs().max()))


@SHAPES
@pytest.mark.parametrize("alpha", [4, 2])
def test_olora_is_pefts(outputs: int, inputs: int, alpha: int) -> None:
    weight = gaussian(outputs, inputs)
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=["0"], init_lora_weights="olora")
    a, b, rest = peft_adapter(model_of(weight), config)
    m = matrix(weight, 4, OLoRA(), scaling=alpha / 4)
    d = OLoRA().decompose(m, FP32)
    ours_a, ours_b = adapter(m, d)
    assert_near(ours_b @ ours_a, b @ a)
    assert_near(d.residual.decoded, rest)
    assert_near(ours_b.abs(), b.abs())
    assert_near(ours_a.abs(), a.abs())
    assert bool((ours_a.diagonal() > 0).all())


def test_olora_with_dependent_columns_stays_orthonormal() -> None:
    """The first four columns span two directions: B is orthonormal all the same, and A is B^T W."""
    weight = torch.cat([gaussian(24, 2) @ gaussian(2, 4), gaussian(24, 12)], dim=1)
    m = matrix(weight, 4, OLoRA())
    a, b = adapter(m, OLoRA().decompose(m, FP32))
    torch.testing.assert_close(b.T @ b, torch.eye(4), rtol=0, atol=2e-6)
    assert_near(a, b.T @ weight)
    assert_near(b @ a[:, :4], weight[:, :4])


@pytest.mark.parametrize(("outputs", "inputs"), [(24, 16), (16, 24)])
@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_is_pefts(outputs: int, inputs: int, method: Any, tmp_path: Path) -> None:
    """Given PEFT's own covariance file: product and both factors up to the signs of the triplets.

    PEFT multiplies with an fp32 inverse whose product with C it lets differ from I by 0.05: with this C it is off by
    about 1e-6.
    """
    weight, covariance = gaussian(outputs, inputs), covariance_of(inputs)
    file = tmp_path / "covariance.pt"
    torch.save({"0": covariance}, file)
    config = LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=["0"],
        init_lora_weights="corda",
        corda_config=CordaConfig(covariance_file=str(file), corda_method=method),
    )
    model = model_of(weight)
    preprocess_corda(model, config)
    a, b, rest = peft_adapter(model, config)
    init = CorDA(corda_method=method, oversampling=WHOLE)
    m = matrix(weight, 4, init, scaling=0.5, statistic=covariance)
    d = init.decompose(m, FP32)
    ours_a, ours_b = adapter(m, d)
    assert_near(ours_b @ ours_a, b @ a)
    assert_near(d.residual.decoded, rest)
    assert_near(ours_b.abs(), b.abs())
    assert_near(ours_a.abs(), a.abs())


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("alpha", [4, 2])
def test_lora_ga_is_pefts(direction: Any, scale: Any, alpha: int) -> None:
    """Up to the signs of the triplets. r = 4 of 16: PEFT's ``svd_lowrank(q=4r)`` is exact then, and ours too; its norm
    of W (``q=r``) is not, hence the looser bound.
    """
    weight, gradient = gaussian(24, 16), gaussian(24, 16, salt=2)
    model = model_of(weight)
    model[0]._peft_loraga_grad = gradient
    config = LoraConfig(
        r=4,
        lora_alpha=alpha,
        target_modules=["0"],
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction=direction, scale=scale, stable_gamma=9),
    )
    torch.manual_seed(0)
    a, b, rest = peft_adapter(model, config)
    init = LoRAGA(direction=direction, scale=scale, stable_gamma=9, oversampling=WHOLE)
    m = matrix(weight, 4, init, scaling=alpha / 4, statistic=gradient)
    d = init.decompose(m, FP32)
    ours_a, ours_b = adapter(m, d)
    share = 2e-2 if scale == "weight_svd" else 2e-5
    assert_near(ours_a.abs(), a.abs())
    assert_near(ours_b.abs(), b.abs(), share)
    signs = ((ours_a * a).sum(dim=1) * (ours_b * b).sum(dim=0)).sign()
    assert_near((ours_b * signs) @ ours_a, b @ a, share)
    assert_near(weight - m.scaling * (ours_b * signs) @ ours_a, rest, share)


def test_random_directions_are_the_same_for_a_and_b() -> None:
    """As PEFT does: the adapter is then a part of the gradient itself."""
    init = LoRAGA(direction="random", scale="unit", oversampling=WHOLE)
    m = matrix(gaussian(24, 16), 4, init)
    assert m.statistic is not None
    a, b = adapter(m, init.decompose(m, FP32))
    assert_near(m.statistic @ a.T, b)
    drawn = {tuple(init.triplets(replace(m, name=name))[0].tolist()) for name in "abcdefgh"}
    assert len(drawn) > 1
    assert all(len(set(indices)) == 4 and max(indices) < 8 for indices in drawn)


@pytest.mark.parametrize("input_first", [False, True])
def test_lora_one_starts_with_a_step_down_the_gradient(input_first: bool) -> None:
    """W stays; B A is the best approximation of rank r of the negative gradient, over gamma S_1, in equal parts."""
    init = LoRAOne(stable_gamma=9, oversampling=WHOLE)
    m = matrix(gaussian(24, 16), 4, init, input_first=input_first)
    d = init.decompose(m, FP32)
    assert torch.equal(d.residual.decoded, m.block)
    a, b = adapter(m, d)
    u, s, vh = torch.linalg.svd(-gaussian(24, 16, salt=2))
    assert_near(b @ a, (u[:, :4] * s[:4]) @ vh[:4] / (9 * s[0]))
    assert_near(b.norm(dim=0), (s[:4] / (9 * s[0])).sqrt())
    assert_near(a.norm(dim=1), (s[:4] / (9 * s[0])).sqrt())
    with pytest.raises(InputError, match="the gradient of w is zero, so that both factors would be and stay zero"):
        init.decompose(replace(m, statistic=torch.zeros_like(m.block)), FP32)


# -- against whole decompositions --------------------------------------------------------------------------------------


@SHAPES
def test_milora_takes_the_minor_triplets(outputs: int, inputs: int) -> None:
    m = matrix(gaussian(outputs, inputs), 4, MiLoRA(), scaling=0.5)
    d = MiLoRA().decompose(m, FP32)
    a, b = adapter(m, d)
    u, s, vh = torch.linalg.svd(m.block.double(), full_matrices=False)
    assert_near((0.5 * b @ a).double(), (u[:, -4:] * s[-4:]) @ vh[-4:])
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1), rtol=1e-5, atol=0)
    kept = torch.linalg.svdvals(d.residual.decoded.double())
    torch.testing.assert_close(kept[:-4], s[:-4], rtol=0, atol=1e-5)
    assert float(kept[-4:].max()) < 1e-5


@SHAPES
@pytest.mark.parametrize("input_first", [False, True])
def test_svft_freezes_the_leading_singular_vectors(outputs: int, inputs: int, input_first: bool) -> None:
    init = SVFT(oversampling=WHOLE)
    m = matrix(gaussian(outputs, inputs), 4, init, input_first=input_first)
    d = init.decompose(m, FP32)
    a, b = adapter(m, d)
    u, _, vh = torch.linalg.svd(gaussian(outputs, inputs).double(), full_matrices=False)
    torch.testing.assert_close((b.T.double() @ u[:, :4]).abs(), torch.eye(4).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close((a.double() @ vh[:4].T).abs(), torch.eye(4).double(), rtol=0, atol=1e-5)
    assert bool(((b.T @ gaussian(outputs, inputs) @ a.T).diagonal() > 0).all())
    assert torch.equal(d.residual.decoded, m.block)


def test_eva_takes_the_leading_eigenvectors() -> None:
    """Those of the covariance; on centred inputs they are the components of PEFT's incremental PCA too."""
    x = gaussian(200, 16) * torch.linspace(0.5, 3, 16)
    x -= x.mean(dim=0)
    init = EVA(oversampling=WHOLE)
    m = matrix(gaussian(24, 16), 4, init, statistic=x.T @ x / 200)
    assert m.statistic is not None
    a, b = adapter(m, init.decompose(m, FP32))
    eigenvectors = torch.linalg.eigh(m.statistic.double()).eigenvectors[:, -4:].flip(1)
    torch.testing.assert_close((a.double() @ eigenvectors).abs(), torch.eye(4).double(), rtol=0, atol=1e-5)
    pca = IncrementalPCA(n_components=4, batch_size=200).fit(x).components_
    torch.testing.assert_close((a @ pca.float().T).abs(), torch.eye(4), rtol=0, atol=1e-3)
    assert float(b.abs().max()) == 0


def test_the_unit_of_the_covariance_moves_only_the_split() -> None:
    """C times 16: B times 4, A by 4, B A the same."""
    init = CorDA(oversampling=WHOLE)
    m = matrix(gaussian(24, 16), 4, init)
    assert m.statistic is not None
    a, b = adapter(m, init.decompose(m, FP32))
    a16, b16 = adapter(m, init.decompose(replace(m, statistic=16 * m.statistic), FP32))
    torch.testing.assert_close(b16, 4 * b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(4 * a16, a, rtol=1e-4, atol=1e-5)


def test_corda_keeps_what_the_inputs_use() -> None:
    """ipm: what the layer computes on inputs of rank 3 lies in the adapter; kpm: in the residual."""
    x = gaussian(50, 3) @ gaussian(3, 16)
    for mode, share in (("ipm", 1.0), ("kpm", 0.0)):
        init = CorDA(corda_method=mode, damping=1e-4, oversampling=WHOLE)  # type: ignore[arg-type]
        m = matrix(gaussian(24, 16), 4, init, statistic=x.T @ x / 50)
        a, b = adapter(m, init.decompose(m, FP32))
        computed, whole = m.scaling * x @ a.T @ b.T, x @ m.block.T
        assert float(computed.norm() / whole.norm()) == pytest.approx(share, abs=1e-2)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: CorDA(corda_method="imp"), "corda_method='imp' is none of ipm, kpm"),
        (lambda: CorDA(damping=-1), "damping=-1 must not be negative"),
        (lambda: LoRAGA(direction="BrAr"), "direction='BrAr' is none of ArBr, A2rBr, ArB2r, random"),
        (lambda: LoRAGA(scale="stabel"), "scale='stabel' is none of stable, weight_svd, gd_scale, unit"),
        (lambda: LoRAOne(stable_gamma=0), "stable_gamma=0 must be positive"),
        (lambda: LoRAGA(stable_gamma=0), "stable_gamma=0 must be positive"),
        (lambda: EVA(power_iterations=-1), "power_iterations=-1 must not be negative"),
        (lambda: SVFT(pattern="top-k"), "pattern='top-k' is none of plain, banded, random"),  # type: ignore[arg-type]
        (lambda: SVFT(pattern="banded", off_diagonal=-1), "off_diagonal=-1 must not be negative"),
        (lambda: SVFT(off_diagonal=2), "off_diagonal=2 has no effect with pattern='plain'"),
    ],
)
def test_senseless_options_are_refused(build: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build()


@pytest.mark.parametrize(
    ("method", "statistic"),
    [
        (CorDA(), "covariance"),
        (EVA(), "covariance"),
        (LoRAGA(), "gradient"),
        (LoRAOne(), "gradient"),
        (QERA(), "covariance"),
    ],
    ids=str,
)
def test_without_calibration_the_error_says_what_to_do(method: Method, statistic: str) -> None:
    m = matrix(gaussian(24, 16), 4, method, statistic=None)
    with pytest.raises(ValueError, match=rf"needs the {statistic} of w .* PiSSAStrategy\(calibration=\.\.\.\)"):
        method.decompose(m, NF4())


@pytest.mark.parametrize("method", [CorDA(), EVA(), QERA()], ids=str)
def test_embeddings_have_no_covariance(method: Method) -> None:
    options = {"rows": 16, "columns": 24, "rank": 4, "wrapped": False}
    assert method.objection(**options, lookup=False) is None
    assert "those of an embedding are ids; drop it" in str(method.objection(**options, lookup=True))


@pytest.mark.parametrize("method", [CorDA(), QERA(), QERA(approximate=True)], ids=repr)
def test_a_layer_that_saw_no_input_is_refused(method: Method) -> None:
    m = matrix(gaussian(24, 16), 4, method, statistic=torch.zeros(16, 16))
    with pytest.raises(InputError, match="the covariance of w is zero, its layer saw no input"):
        method.decompose(m, NF4())


# -- the registry ------------------------------------------------------------------------------------------------------


def test_the_family_is_registered() -> None:
    assert sorted(METHODS) == [
        "corda",
        "eva",
        "loftq",
        "lora",
        "lora_ga",
        "lora_one",
        "lora_xs",
        "milora",
        "olora",
        "pissa",
        "qera",
        "svft",
    ]
    assert all(str(cls()).lower() == name.replace("_", "") for name, cls in METHODS.items())
    assert method_named("milora") is MiLoRA


def test_a_wrong_name_gets_the_list() -> None:
    with pytest.raises(InputError, match="no initialisation 'pisa'; registered are corda, eva, .*, pissa"):
        method_named("pisa")


def test_names_are_given_once_and_to_methods_only() -> None:
    with pytest.raises(InputError, match="the name is taken by PiSSA"):
        register("pissa")(LoRA)
    for other in (dict, Method, PiSSA()):
        with pytest.raises(InputError, match="is not an initialisation; derive it from"):
            register("other")(other)  # type: ignore[type-var]
    assert "other" not in METHODS


@alone
def decomposed_by_the_guide() -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """A, B, the residual with the adapter, and the matrix, in both orientations. The name stays registered."""
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (example,) = (block for block in blocks if "@register" in block)
    exec(compile(example, "own-method.md", "exec"), {"__name__": "guide"})
    init, found = method_named("orthogonal")(), []
    for input_first in (False, True):
        m = matrix(gaussian(24, 16), 4, init, input_first=input_first)
        d = init.decompose(m, FP32)
        whole = d.residual.decoded + m.scaling * d.factors.left @ d.factors.right
        found.append((*adapter(m, d), whole, m.block))
    return found


def test_a_users_own_method() -> None:
    """The example of the guide."""
    for a, b, whole, block in run_ranks(1, decomposed_by_the_guide)[0]:
        torch.testing.assert_close(a @ a.T, torch.eye(4), rtol=0, atol=1e-6)
        torch.testing.assert_close(b.T @ b, torch.eye(4), rtol=0, atol=1e-6)
        torch.testing.assert_close(whole, block, rtol=0, atol=1e-6)


def test_sharded_cuts_replicated_factors() -> None:
    """On the second of two ranks, in both orientations."""
    group = ShardGroup.single()
    group.rank = 1
    a, b = gaussian(2, 6), gaussian(8, 2)
    for input_first, (rows, columns) in ((False, (8, 6)), (True, (6, 8))):
        m = replace(
            matrix(gaussian(8, 6), 2, OLoRA(), input_first=input_first),
            partition=RowPartition(rows=rows, columns=columns, world_size=2),
            group=group,
        )
        factors: Factors = sharded(m, a, b)
        whole = (b @ a).T if input_first else b @ a
        torch.testing.assert_close(factors.left @ factors.right, whole[rows // 2 :])
