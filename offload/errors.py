"""Every error a user may meet: one tree, each message naming the cause and the next step.

Kernels raise `ValueError`, `TypeError` and `NotImplementedError` alone; the layers above them raise these.
The command line prints the message in one line, `hint` in a second, and exits with 1 (2 for a bad request).
"""


class StrataError(Exception):
    """Base of all errors; `hint` says what the user can do next."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ModelFormatError(StrataError):
    """A model file is not what its format demands; the message names file, byte offset, and key or tensor."""


class UnsupportedModelError(StrataError):
    """A sound file that this version cannot run: unknown architecture, quant type, tokenizer or RoPE scaling."""


class PlanError(StrataError):
    """A plan cannot be made or does not match the model or machine."""


class DoesNotFitError(PlanError):
    """The model needs more memory than the budget allows."""

    def __init__(self, message: str, *, needed_bytes: int, available_bytes: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


class DeviceError(StrataError):
    """A device failed or is not there."""


class FlashError(StrataError):
    """Reading or writing files of weights, KV or journals failed."""


class SequenceError(StrataError):
    """One sequence cannot go on as it is; the others can.

    `kv`: its cache, of which the first `kept_tokens` tokens are as they were; what follows can be computed again.
    """

    def __init__(self, message: str, *, kv: object, kept_tokens: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.kv = kv
        self.kept_tokens = kept_tokens


class RequestError(StrataError):
    """A request that cannot be served: bad parameters, a prompt longer than the context, a broken template."""
