"""Choice of experts, order by expert and the joined outputs against numpy."""

import numpy as np
import pytest

from cpu_kernels.isa import ISA
from cpu_kernels.matrix import Matrix
from cpu_kernels.pool import OperationError, Pool
from cpu_kernels.program import Program
from cpu_kernels.router import NOT_FINITE, combine_row, gather_row, group_row, route_row
from tests.support.rows import ISA_NAMES, ISAS, address, close, floats

every_isa = pytest.mark.parametrize("isa", ISAS, ids=ISA_NAMES)


@every_isa
@pytest.mark.parametrize(("tokens", "experts", "used"), [(1, 64, 8), (37, 60, 4), (5, 3, 3), (2, 1, 1)])
@pytest.mark.parametrize("norm", [False, True])
def test_experts_of_tokens(isa: ISA, tokens: int, experts: int, used: int, norm: bool) -> None:
    logits, x = floats(0, tokens, experts, scale=2), floats(1, tokens, 50)
    if experts > 9:
        logits[0, 7] = logits[0, 9] = 20.0
    ids, weights = np.full((tokens, used), -1, np.int32), np.zeros((tokens, used), np.float32)
    offsets, slot_of_pair, token_of_slot = (
        np.full(n, -1, np.int32) for n in (experts + 1, tokens * used, tokens * used)
    )
    gathered, joined = np.zeros((tokens * used, 50), np.float32), np.zeros((tokens, 50), np.float32)
    program = Program()
    program.add(
        route_row(
            Matrix.of(logits),
            address(ids),
            address(weights),
            tokens,
            used=used,
            norm=norm,
            scale=1.5,
            status=program.status_address,
        )
    )
    places = {"offsets": offsets, "slot_of_pair": slot_of_pair, "token_of_slot": token_of_slot}
    program.add(
        group_row(
            address(ids), tokens, used=used, experts=experts, **{name: address(at) for name, at in places.items()}
        )
    )
    program.add(gather_row(Matrix.of(gathered), Matrix.of(x), address(token_of_slot), tokens * used, isa=isa))
    program.add(
        combine_row(
            Matrix.of(joined), Matrix.of(gathered), address(weights), address(slot_of_pair), tokens, used=used, isa=isa
        )
    )
    with Pool(2) as pool:
        pool.run(program)
    wide = np.exp(logits - logits.max(1, keepdims=True).astype(np.float64))
    wide /= wide.sum(1, keepdims=True)
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, :used]
    expected = np.take_along_axis(wide, chosen, 1)
    expected = 1.5 * (expected / expected.sum(1, keepdims=True) if norm else expected)
    assert (ids == chosen).all()
    assert close(weights, expected, 1e-6)
    assert not close(weights, expected * (1 + 1e-5), 1e-6)
    pairs = np.argsort(chosen.reshape(-1), kind="stable")
    assert (token_of_slot == pairs // used).all()
    assert (slot_of_pair[pairs] == np.arange(tokens * used)).all()
    assert (np.diff(offsets) == np.bincount(chosen.reshape(-1), minlength=experts)).all()
    assert offsets[0] == 0
    assert (gathered == x[pairs // used]).all()
    assert close(joined, x * expected.sum(1, keepdims=True))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_numbers_end_the_run(wrong: float) -> None:
    logits = floats(0, 3, 8)
    logits[1, 4] = wrong
    ids, weights = np.zeros((3, 2), np.int32), np.zeros((3, 2), np.float32)
    program = Program()
    row = route_row(
        Matrix.of(logits),
        address(ids),
        address(weights),
        3,
        used=2,
        norm=True,
        scale=1.0,
        status=program.status_address,
    )
    program.add(row)
    with Pool(2) as pool, pytest.raises(OperationError, match="'route' failed with code 101") as failure:
        pool.run(program)
    assert failure.value.code == NOT_FINITE
    with pytest.raises(ValueError, match="9 of 8 experts"):
        route_row(Matrix.of(logits), 0, 0, 3, used=9, norm=True, scale=1.0, status=0)
