"""Row 8: a quant type nobody knows does not keep a file from being opened and looked at."""

from pathlib import Path

import pytest

from cpu_kernels.reference.dequantize import dequantizable, dequantize
from offload.errors import UnsupportedModelError
from offload.gguf import GGUFFile
from tests.support.gguf_bytes import STRING, GGUFBytes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = GGUFBytes().value("general.architecture", STRING, "from-the-future")
    file.tensor("a.weight", 999, (40, 3), bytes(range(50)))
    file.tensor("b.weight", 0, (4,), bytes(16))
    file.tensor("c.ffn_up_exps.weight", 31, (32, 2, 3), bytes(90))
    path = tmp_path / "unknown.gguf"
    path.write_bytes(file.build())
    return path


def test_row_08_an_unknown_type_opens_with_the_bytes_up_to_the_next_tensor(path: Path) -> None:
    with GGUFFile.open(path) as gguf:
        unknown = gguf.tensors["a.weight"]
        assert gguf.architecture == "from-the-future"
        assert (unknown.quant_type.name, unknown.quant_type.ggml_id) == ("type 999", 999)
        assert not unknown.quant_type.is_known
        assert unknown.num_bytes == 64
        assert bytes(gguf.read(unknown))[:50] == bytes(range(50))
        assert gguf.tensors["c.ffn_up_exps.weight"].num_bytes == 90


def test_row_08_its_experts_have_no_known_slices(path: Path) -> None:
    with GGUFFile.open(path) as gguf, pytest.raises(UnsupportedModelError, match=r"type 31 .*c\.ffn_up_exps\.weight"):
        gguf.read(gguf.tensors["c.ffn_up_exps.weight"], expert=1)


def test_row_08_it_cannot_be_dequantised(path: Path) -> None:
    with GGUFFile.open(path) as gguf:
        unknown = gguf.tensors["a.weight"]
        assert not dequantizable(unknown.quant_type)
        with pytest.raises(NotImplementedError, match="type 999"):
            dequantize(gguf.read(unknown), unknown.quant_type)
