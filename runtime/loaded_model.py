"""A model that a plan placed: file, text, weights and drafts, and what may be asked of them before any answer.

Knows nothing about answers, and of how a step is computed no more than the executor tells.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offload.cache_counts import CacheCounts
from offload.closing import Closing, closed_on_error
from offload.errors import RequestError
from offload.gguf import GGUFFile
from offload.routing_trace import TraceRecorder, model_name
from planner.plan import Plan
from runtime.backend import make_executor
from runtime.chat_template import ChatTemplate
from runtime.executor.base import GpuExecutor, RoutedExecutor, Step
from runtime.generation import Prompt, check_prompt
from runtime.measured import ExpertCounts
from runtime.session_rows import RowsKeys
from runtime.speculative.options import DraftOptions
from runtime.speculative.speculation import make_speculation
from runtime.text import ModelText
from runtime.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
"""Called with (done, total): bytes while loading, tokens while a prompt is read."""


class LoadedModel(Closing):
    """The weights of `gguf` where `plan` puts them; owns the file, the text and all that it loads."""

    def __init__(
        self, gguf: GGUFFile, text: ModelText, plan: Plan, *, draft: DraftOptions, on_load: Progress | None
    ) -> None:
        self._gguf, self.text, self.plan = gguf, text, plan
        self.executor = make_executor(gguf, plan, on_load=on_load)
        with closed_on_error(self.executor):
            self._drafts = make_speculation(draft, gguf, text, plan, self.executor)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the file's own vocabulary."""
        return self.text.tokenizer

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The file's chat template, or the one that was given in its place."""
        return self.text.chat_template

    @property
    def model_id(self) -> str:
        """Names the model in answers and journals: the file's name."""
        return self._gguf.path.name

    @property
    def context_tokens(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.plan.settings.context_tokens

    def rows_keys(self) -> RowsKeys:
        """What rows of KV that this model computes are kept under."""
        return RowsKeys(self._gguf, self.plan)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: text is encoded with the special tokens that the model wants, ids are taken as is."""
        return self.text.prompt_ids(prompt) if isinstance(prompt, str) else list(prompt)

    def chat_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation by the chat template; see `ModelText.chat_ids`."""
        return self.text.chat_ids(messages)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after every token of `ids`, computed from an empty cache: float32 (tokens, vocabulary)."""
        check_prompt(ids, self.tokenizer.vocab_size, len(ids) + 1)
        if len(ids) > self.context_tokens:
            raise RequestError(f"{len(ids)} tokens do not fit the context of {self.context_tokens}")
        kv = self.executor.new_kv(len(ids))
        chunk = self.plan.settings.prefill_chunk_tokens
        parts = (ids[start : start + chunk] for start in range(0, len(ids), chunk))
        return np.concatenate([self.executor.forward([Step(part, kv)], logits="all")[0] for part in parts])

    def record_routing(self) -> TraceRecorder:
        """Collects which experts tokens use from now on; RequestError where no program runs routed experts."""
        if not isinstance(self.executor, RoutedExecutor):
            raise RequestError(f"the {self.plan.settings.loop} loop records no routing", hint="use --loop program")
        return self.executor.record_routing(model_name(self._gguf))

    @property
    def cache_counts(self) -> CacheCounts | None:
        """What the cache of streamed weights has seen; None where all are in RAM."""
        return self.executor.cache_counts if isinstance(self.executor, RoutedExecutor) else None

    @property
    def expert_counts(self) -> ExpertCounts:
        """Where experts were found: on the GPU, where its layers have some, and in the cache of streamed weights."""
        gpu = self.executor.gpu_expert_counts if isinstance(self.executor, GpuExecutor) else None
        return ExpertCounts(gpu, self.cache_counts)

    @property
    def gpu_bytes(self) -> int | None:
        """What the GPU's memory holds; None without a GPU."""
        return self.executor.gpu_bytes if isinstance(self.executor, GpuExecutor) else None

    def close(self) -> None:
        """Free weights and helper processes."""
        if self._drafts is not None:
            self._drafts.close()
        self.executor.close()
        self.text.close()
        self._gguf.close()
