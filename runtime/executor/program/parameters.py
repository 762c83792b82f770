"""What differs between the runs of a program, by name. Knows nothing about rows of operations.

A *lane* is a run of a sequence's tokens that takes part.
"""

from enum import StrEnum

from cpu_kernels.program import Parameter


class Name(StrEnum):
    """The parameters of a step's program."""

    TOKENS = "tokens"  # of all lanes
    SEGMENTS = "segments"  # the most experts that the tokens may use
    WANTED = "wanted"  # tokens whose logits are computed
    FIRST_WANTED = "first_wanted"  # address of the first such token's row of `normed`
    # of a lane, whose number follows
    COUNT = "count"  # its tokens, where there are several lanes
    QKV = "qkv"  # addresses of its first rows of `attention_matrices`
    ATTENDED = "attended"
    START = "start"  # position of the first token
    PIECES = "pieces"  # of the context, where few tokens share it out
    PART = "part"  # address of its first row of `part_matrix`, where another device attends to the rest
    PART_PIECES = "part_pieces"  # the first pieces, of which that is told
    KV = "kv"  # address of the cache's table of chunks
    WINDOW = "window"  # address of the cache's windows of keys
    ABSTRACTS = "abstracts"  # address of the cache's abstracts of keys, where some blocks are chosen
    CHOICES = "choices"  # address of its counters of what was chosen
    FILLED = "filled"  # its KV heads where the run fills a block of tokens, else 0
    COS = "cos"  # addresses of angles; the number of the model's `Rope` follows
    SIN = "sin"

    def of(self, lane: int, number: int = 0) -> str:
        """The parameter's name for a lane."""
        return f"{self}_{lane}_{number}"


TOKENS = Parameter(Name.TOKENS)
SEGMENTS = Parameter(Name.SEGMENTS)
WANTED = Parameter(Name.WANTED)
