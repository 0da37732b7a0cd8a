"""The measured effect of an initialisation on every matrix, as JSON and as a table by layer type."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lowrank_dist.storage.layout import check_matrix
from lowrank_dist.storage.parse import Record


@dataclass(kw_only=True)
class MatrixReport:
    """The measures of one matrix; norms are Frobenius norms of the whole matrix.

    Attributes
    ----------
    name : str
        Name of the layer in the model.
    rows, columns, rank : int
        Shape as stored, and rank of the adapter.
    norm : float or None
        ``||W||``. This and the next two are None if only the residual model is known, not W (a published model).
    error : float or None
        ``||W - (Q(W_res) + scaling B A)||``, the difference between W and the weight that the model uses at step 0.
    quantization_error : float or None
        ``||W - Q(W)||``, the error of plain quantization; 0 for residuals that are not quantized.
    error_reduction : float
        ``1 - error / quantization_error``; 0 if nothing is quantized.
    sigma_1, sigma_r : float or None
        Largest and smallest singular value of the part in the factors; None if the method does not compute them.
    captured_energy : float or None
        ``sum sigma_i^2 / ||W||^2`` over those r singular values.
    excess_residual : float or None
        Estimate of ``||W - U S V^T|| / min ||W - X|| - 1`` over X of rank r, for the SVD that the factors come from.
    nuclear_error, nuclear_quantization_error : float or None
        Nuclear norms of the two errors, exact for small matrices and estimated for others; None if not measured.
    nuclear_reduction : float or None
        ``1 - nuclear_error / nuclear_quantization_error``, the figure of the PiSSA paper.
    singular_values : list of float or None
        The r singular values of the part in the factors, descending.
    ended_on : str or None
        The last step that was kept, "quantize" or "decompose" (`lowrank_dist.methods.Decomposition`); None if nothing
        is quantized or nothing was measured.
    seconds : float
        Wall-clock time of this matrix on this rank, including the wait for the disk.
    nbytes : int
        Bytes of the matrix in the pretrained weights.
    group_size : int
        Number of ranks that decomposed it together.
    digest : str or None
        Digest of the encoded residual (`lowrank_dist.storage.digest`), the same on any number of ranks; None if no
        model holds the residual.
    """

    name: str
    rows: int
    columns: int
    rank: int
    norm: float | None = None
    error: float | None = None
    quantization_error: float | None = None
    sigma_1: float | None = None
    sigma_r: float | None = None
    captured_energy: float | None = None
    excess_residual: float | None = None
    nuclear_error: float | None = None
    nuclear_quantization_error: float | None = None
    singular_values: list[float] | None = None
    ended_on: str | None = None
    seconds: float = 0.0
    nbytes: int = 0
    group_size: int = 1
    digest: str | None = None

    @property
    def error_reduction(self) -> float:
        return 1 - self.error / self.quantization_error if self.quantization_error and self.error is not None else 0.0

    @property
    def nuclear_reduction(self) -> float | None:
        if self.nuclear_error is None or not self.nuclear_quantization_error:
            return None
        return 1 - self.nuclear_error / self.nuclear_quantization_error

    @property
    def relative_error(self) -> float | None:
        """``error / norm``."""
        return None if self.error is None or self.norm is None else self.error / self.norm if self.norm else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Fields and derived figures, for JSON."""
        derived = {"error_reduction": self.error_reduction, "nuclear_reduction": self.nuclear_reduction}
        return {**asdict(self), **derived}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MatrixReport:
        """Make a report from the result of `as_dict`; entries unknown to this version are dropped.

        Raises
        ------
        CheckpointError
            If an entry is missing or of another type.
        """
        entry = values if isinstance(values, Record) else Record(values, "the entry of a matrix")
        check_matrix(entry)
        required = {name: entry[name] for name in ("name", "rows", "columns", "rank")}
        known = {f.name for f in fields(cls)}
        return cls(**required | {name: value for name, value in values.items() if name in known and value is not None})


@dataclass(kw_only=True)
class InitializationReport:
    """The measures of the initialisation of a model.

    Attributes
    ----------
    matrices
        One entry per adapted matrix.
    bytes_read
        Bytes of tensor data read by all ranks together.
    checkpoint_bytes
        Bytes of all tensors of the pretrained weights.
    residual_bytes_per_rank
        Bytes of the encoded residual that this rank stores, padding included.
    residual_bytes
        Bytes of the encoded residual on all ranks together, padding included.
    world_size
        Number of ranks that share the model.
    seconds
        Wall-clock time on this rank.
    """

    matrices: list[MatrixReport] = field(default_factory=list)
    bytes_read: int = 0
    checkpoint_bytes: int = 0
    residual_bytes_per_rank: int = 0
    residual_bytes: int = 0
    world_size: int = 1
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return {**asdict(self), "matrices": [matrix.as_dict() for matrix in self.matrices]}


def layer_type(name: str) -> str:
    """Last part of a layer's name, without the index of an expert."""
    return name.rsplit(".", 1)[-1].partition("[")[0]


def as_table(matrices: list[MatrixReport]) -> str:
    """Format one line per layer type: number of matrices, shape, rank, means over the matrices and total seconds.

    Matrices without an adapter, which are only stored in the residual format, have no rank and nothing to reduce.
    """
    if not matrices:
        return "No matrix was decomposed or stored in a residual format."
    groups: dict[tuple[str, int, int, int], list[MatrixReport]] = defaultdict(list)
    for matrix in matrices:
        groups[layer_type(matrix.name), matrix.rows, matrix.columns, matrix.rank].append(matrix)
    lines = [
        f"{'layer':<16}{'matrices':>9}{'shape':>15}{'rank':>6}{'sigma_1':>10}{'sigma_r':>10}{'energy':>8}"
        f"{'excess':>10}{'rel. error':>12}{'error reduction':>17}{'nuclear':>9}{'seconds':>9}"
    ]
    for (layer, rows, columns, rank), members in sorted(groups.items()):
        lines.append(
            f"{layer:<16}{len(members):>9}{f'{rows} x {columns}':>15}{rank or '-':>6}"
            f"{_mean(members, lambda m: m.sigma_1, '.3g'):>10}{_mean(members, lambda m: m.sigma_r, '.3g'):>10}"
            f"{_mean(members, lambda m: m.captured_energy, '.1%'):>8}"
            f"{_mean(members, lambda m: m.excess_residual, '.1e'):>10}"
            f"{_mean(members, lambda m: m.relative_error, '.2e'):>12}"
            f"{_mean(members, lambda m: m.error_reduction if m.rank else None, '.1%'):>17}"
            f"{_mean(members, lambda m: m.nuclear_reduction, '.1%'):>9}"
            f"{sum(m.seconds for m in members):>9.1f}"
        )
    return "\n".join(lines)


def ranks_as_table(rank_by_layer: Mapping[str, int]) -> str:
    """Format one line per layer type, and one for all: number of layers, sum, mean, least and largest of their ranks.

    `rank_by_layer` has the ranks that an adapter keeps, such as AdaLoRA's.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for name, rank in rank_by_layer.items():
        groups[layer_type(name)].append(rank)
    groups["all"] = list(rank_by_layer.values())
    lines = [f"{'layer':<16}{'layers':>9}{'triplets':>10}{'mean rank':>11}{'least':>7}{'largest':>9}"]
    for layer, ranks in groups.items():
        lines.append(
            f"{layer:<16}{len(ranks):>9}{sum(ranks):>10}{sum(ranks) / len(ranks):>11.2f}{min(ranks):>7}{max(ranks):>9}"
        )
    return "\n".join(lines)


def _mean(members: list[MatrixReport], value: Callable[[MatrixReport], float | None], spec: str) -> str:
    values = [v for v in map(value, members) if v is not None]
    return format(sum(values) / len(values), spec) if values else "-"
