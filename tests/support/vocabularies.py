"""A small vocabulary of the SentencePiece kind for generated models."""

import gguf

LETTERS = "▁etaoinshrdlucmfwgypbvk.,"
PIECES = [*LETTERS, "▁t", "▁a", "he", "in", "re", "on", "er", "nd", "▁th", "▁s", "▁the", "▁and", "▁w", "ed", "ing"]


def add_spm_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """<unk>, <s>, </s>, all bytes, pieces, and unused fillers up to `size` tokens."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    kinds += [gguf.TokenType.NORMAL] * (size - len(kinds))
    tokens += [f"▁filler{index}" for index in range(size - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(index) for index in range(size - 259)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
