"""Proposition 1: when an attention layer has noise that none of its heads can see, for any input (section 2.3, A.2).

For heads (Q_i, K_i, V_i), with M_i = Q_i K_i^T, three conditions are sufficient: (1) every M_i is symmetric; (2) the
row space of V_i^T lies in that of M_i; (3) a nonzero row of some M_m lies in the row space of another head's M_n. Then
the row spaces of all M_i together miss a direction w, and head_i(X + W) = head_i(X) if every row of W is a multiple of
w. Here: how far a real layer is from each condition, the construction, and what it does to the heads.

Biases: the key's cancels in the softmax; the query's adds b K_i^T w, which is 0 when Q_i has full column rank
(M_i w = Q_i (K_i^T w) = 0 then means K_i^T w = 0); the value's is added on both sides.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_nullspace.models.attention import AttentionWeights


@dataclass(frozen=True, eq=False)
class LayerConditions:
    """How far one layer is from the three conditions, in float64."""

    name: str
    features: int
    """D."""
    asymmetry: Tensor
    """(heads,): ||M_i - M_i^T|| / ||M_i|| (Frobenius), in [0, 2]; 0 is condition 1, unrelated Q and K give sqrt(2)."""
    value_angles: tuple[Tensor, ...]
    """Per head the principal angles from R(V_i^T) to R(M_i), ascending, in [0, pi/2]; all 0 is condition 2."""
    collinearity: float
    """min over m != n, k of the distance of row k of M_m to R(M_n), relative to the row; 0 is condition 3."""
    stack_rank: int
    """Rank of all M_i stacked, (heads * D, D); below D there is a direction that every M_i maps to zero."""
    smallest_singular_value: float
    """Of that stack, relative to its largest one."""

    @property
    def largest_angle(self) -> Tensor:
        """(heads,): the largest of ``value_angles``, radians."""
        return torch.stack([angles.max() if len(angles) else angles.new_zeros(()) for angles in self.value_angles])

    def hold(self, tolerance: float = 1e-6) -> bool:
        """Whether all three conditions hold up to ``tolerance`` (asymmetry, angle, collinearity)."""
        return max(float(self.asymmetry.max()), float(self.largest_angle.max()), self.collinearity) <= tolerance

    def summary(self) -> dict[str, Any]:
        """All of it as numbers and lists, for JSON."""
        return {
            "name": self.name,
            "features": self.features,
            "asymmetry": self.asymmetry.tolist(),
            "value_angles": [angles.tolist() for angles in self.value_angles],
            "largest_angle": self.largest_angle.tolist(),
            "collinearity": self.collinearity,
            "stack_rank": self.stack_rank,
            "smallest_singular_value": self.smallest_singular_value,
            "conditions_hold": self.hold(),
        }


def layer_conditions(weights: AttentionWeights) -> LayerConditions:
    """The measures of one layer; ranks have the tolerance s_max * max(shape) * eps of the dtype of the weights.

    The shape is that of the decomposed factor, (heads * d_k, D) for the stack: with that of the stack itself, random
    float32 layers of ViT-B's size would count as singular.
    """
    exact, eps = weights.double(), torch.finfo(weights.query.dtype).eps
    rows = [_row_space(exact, head, eps) for head in range(exact.heads)]
    values = [_orthonormal(value, eps) for value in exact.value]
    spectrum = torch.linalg.svdvals(_stack(exact))
    tolerance = float(spectrum[0]) * max(exact.heads * exact.key.shape[2], exact.features) * eps
    return LayerConditions(
        name=exact.name,
        features=exact.features,
        asymmetry=torch.stack([_asymmetry(q @ k.T) for q, k in zip(exact.query, exact.key, strict=True)]),
        value_angles=tuple(principal_angles(value, row) for value, row in zip(values, rows, strict=True)),
        collinearity=_collinearity(exact, rows),
        stack_rank=int((spectrum > tolerance).sum()),
        smallest_singular_value=float(spectrum[-1] / spectrum[0]) if len(spectrum) == exact.features else 0.0,
    )


def null_direction(weights: AttentionWeights) -> Tensor:
    """w (D,), of norm 1, float64: what the stacked M_i shrink most; all M_i w = 0 if their rank is below D."""
    _, _, right = torch.linalg.svd(_stack(weights.double()), full_matrices=True)
    return right[-1]


def constructed_noise(direction: Tensor, tokens: int, generator: torch.Generator, norm: float) -> Tensor:
    """W (1, tokens, D) of Frobenius norm ``norm``: every row a normal random multiple of ``direction`` (D,)."""
    multiples = torch.randn(tokens, 1, generator=generator, dtype=torch.float64)
    noise = multiples * direction.double()
    return (noise * (norm / torch.linalg.matrix_norm(noise)))[None]


def head_outputs(weights: AttentionWeights, inputs: Tensor) -> Tensor:
    """head_i(X) for ``inputs`` X (B, tokens, D), with all biases: (B, heads, tokens, d_k)."""
    spread = inputs[:, None]
    query = spread @ weights.query + weights.query_bias[:, None]
    key = spread @ weights.key + weights.key_bias[:, None]
    value = spread @ weights.value + weights.value_bias[:, None]
    return (query @ key.transpose(-1, -2) * weights.scaling).softmax(-1) @ value


def head_changes(weights: AttentionWeights, inputs: Tensor, noise: Tensor) -> Tensor:
    """(heads,): ||head_i(X + W) - head_i(X)|| / ||head_i(X)|| over all of ``inputs`` (B, tokens, D); in float64.

    ``noise`` is W (1, tokens, D).
    """
    exact, inputs = weights.double(), inputs.double().cpu()
    before, after = head_outputs(exact, inputs), head_outputs(exact, inputs + noise)
    return torch.linalg.vector_norm(after - before, dim=(0, 2, 3)) / torch.linalg.vector_norm(before, dim=(0, 2, 3))


def principal_angles(inner: Tensor, outer: Tensor) -> Tensor:
    """Angles (r,), ascending, in [0, pi/2], of the space of orthonormal rows ``inner`` (r, D) to ``outer`` (s, D).

    All are 0 exactly if ``inner`` lies in ``outer``; if r > s, the r - s last ones are pi/2. Accurate near both ends
    (Knyazev and Argentati 2002: sines and cosines from two decompositions).
    """
    overlap = inner @ outer.T
    sines = torch.linalg.svdvals(inner - overlap @ outer).flip(0) if len(inner) else inner.new_zeros(0)
    cosines = inner.new_zeros(len(inner))
    shared = torch.linalg.svdvals(overlap) if overlap.numel() else inner.new_zeros(0)
    cosines[: len(shared)] = shared
    return torch.atan2(sines, cosines)


def _asymmetry(matrix: Tensor) -> Tensor:
    size = torch.linalg.matrix_norm(matrix)
    return torch.linalg.matrix_norm(matrix - matrix.T) / size if size else size


def _stack(weights: AttentionWeights) -> Tensor:
    """(heads * d_k, D) with the singular values and row space of all M_i stacked: Q_i = O R has M_i = O (R K_i^T)."""
    triangles = torch.linalg.qr(weights.query, mode="r")[1]
    return (triangles @ weights.key.transpose(1, 2)).flatten(0, 1)


def _row_space(weights: AttentionWeights, head: int, eps: float) -> Tensor:
    """Orthonormal rows that span R(Q_i K_i^T), (rank, D)."""
    triangle = torch.linalg.qr(weights.query[head], mode="r")[1]
    return _orthonormal(weights.key[head] @ triangle.T, eps)


def _orthonormal(columns: Tensor, eps: float) -> Tensor:
    """Orthonormal rows (rank, D) that span the columns of a (D, d_k) matrix."""
    left, spectrum, _ = torch.linalg.svd(columns, full_matrices=False)
    rank = int((spectrum > spectrum[0] * max(columns.shape) * eps).sum())
    return left[:, :rank].T


def _collinearity(weights: AttentionWeights, rows: list[Tensor]) -> float:
    """Smallest relative distance of a nonzero row q_k K_m^T of M_m to R(M_n), over m != n; 1 for a single head."""
    smallest = 1.0
    for m, (query, key) in enumerate(zip(weights.query, weights.key, strict=True)):
        lengths = torch.linalg.vector_norm(query @ torch.linalg.qr(key, mode="r")[1].T, dim=1)
        nonzero = lengths > lengths.max() * torch.finfo(torch.float64).eps * weights.features
        for n, row in enumerate(rows):
            if m == n or not nonzero.any():
                continue
            outside = key - row.T @ (row @ key)  # what of K_m's columns lies outside R(M_n); its R factor has the norms
            distances = torch.linalg.vector_norm(query @ torch.linalg.qr(outside, mode="r")[1].T, dim=1)
            smallest = min(smallest, float((distances[nonzero] / lengths[nonzero]).min()))
    return smallest
