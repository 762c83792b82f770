"""The text side of a model file: its tokenizer and its chat template, from prompts to token ids.

Knows nothing of weights, plans or logits; opening it costs the file's header alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from offload.closing import Closing
from offload.errors import RequestError
from offload.gguf import GGUFFile
from runtime.chat_template import ChatTemplate
from runtime.tokenizer import Tokenizer


class ModelText(Closing):
    """Tokenizer and chat template of `gguf`; `chat_template` (Jinja source) goes before the file's own."""

    def __init__(self, gguf: GGUFFile, *, chat_template: str | None = None) -> None:
        self._path = gguf.path
        self.tokenizer = Tokenizer.from_gguf(gguf)
        self.chat_template = (
            ChatTemplate.from_gguf(gguf, self.tokenizer)
            if chat_template is None
            else ChatTemplate.for_tokenizer(chat_template, self.tokenizer)
        )

    def use_chat_template(self, source: str) -> None:
        """Render conversations with this Jinja source from now on."""
        self.close()
        self.chat_template = ChatTemplate.for_tokenizer(source, self.tokenizer)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of a text, with the special tokens that the model wants around it."""
        return self.tokenizer.encode(prompt, parse_special=True)

    def chat_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation by the chat template, ready for the assistant's next turn.

        A template that writes the begin-of-text token itself does not get a second one.
        """
        if self.chat_template is None:
            raise RequestError(
                f"{self._path} has no chat template", hint="give one with --chat-template-file, or use --raw"
            )
        ids = self.prompt_ids(self.chat_template.render(messages))
        bos = self.tokenizer.bos_id
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def close(self) -> None:
        """End the template's helper process."""
        if self.chat_template is not None:
            self.chat_template.close()
