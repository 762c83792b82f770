"""Types of the KV cache as a plan has them: what a user may ask for, and which loops can keep them.

Knows nothing about how plans are found.
"""

from collections.abc import Iterator

from cpu_kernels.kv_policy import DENSE_LAYERS, EDGE_TYPE, LEAST_BUDGET_TOKENS, KVPolicy
from cpu_kernels.kv_types import KVType
from offload.errors import PlanError, RequestError

AUTO = "auto"  # types are chosen
LLAMA_CPP_TYPES = (KVType.F16, KVType.BF16, KVType.Q8_0, KVType.Q4_0)
GPU_TYPES = (KVType.F16, KVType.BF16, KVType.Q8_0, KVType.Q4_0)  # that the GPU's kernels read
BUDGET_LOOPS = ("auto", "program", "simulated")  # that can read a part
_LOOPS = {
    "program": tuple(KVType),
    "simulated": tuple(KVType),
    "llama.cpp": LLAMA_CPP_TYPES,
    "hybrid": GPU_TYPES,
    "sequential": (KVType.F16,),
}


def keeps(loop: str, policy: KVPolicy) -> bool:
    """Whether a loop can keep keys and values so; a loop that is not known is left to others to refuse."""
    known = _LOOPS.get(loop, tuple(KVType))
    reads = policy.budget_tokens is None or loop in BUDGET_LOOPS
    return reads and policy.key in known and policy.value in known


def check_kv(policy: KVPolicy, loop: str) -> None:
    """PlanError naming the field, where a plan's loop cannot keep keys and values so."""
    for field, kind in (("cache_type_k", policy.key), ("cache_type_v", policy.value)):
        known = _LOOPS.get(loop, tuple(KVType))
        if kind not in known:
            raise PlanError(
                f"settings.{field} is {kind.value!r}; the {loop} loop keeps {', '.join(known)}",
                hint="plan with --loop program, or leave out -ctk and -ctv",
            )
    budget = policy.budget_tokens
    if budget is not None and budget < LEAST_BUDGET_TOKENS:
        raise PlanError(f"settings.kv_budget_tokens is {budget}; it must be at least {LEAST_BUDGET_TOKENS}")
    if budget is not None and loop not in BUDGET_LOOPS:
        raise PlanError(
            f"settings.kv_budget_tokens is {budget}; the {loop} loop reads all of the KV cache",
            hint="plan with --loop program, or leave out --kv-budget",
        )


def kv_notes(policy: KVPolicy, layers: int, *, has_gpu: bool) -> Iterator[str]:
    """What a user should know of a policy."""
    if policy.budget_tokens is not None:
        yield (
            f"new tokens choose {policy.budget_tokens} tokens of the KV cache to read, from layer {DENSE_LAYERS} on: "
            "answers can differ (--kv-budget)"
        )
    if has_gpu and not keeps("hybrid", policy):
        yield f"the GPU is left out: it keeps keys and values as {', '.join(GPU_TYPES)} and reads them all"
    if policy.of_layer(0, layers) != (policy.key, policy.value):
        yield f"the first and the last layer keep keys and values as {EDGE_TYPE}; `strata kv-eval` shows what it saves"


def kv_type(name: str, option: str) -> KVType:
    """The type called `name`, f16 for "auto"; RequestError, naming the option, if there is none."""
    try:
        return KVType.F16 if name == AUTO else KVType(name)
    except ValueError as error:
        raise RequestError(
            f"{option} {name!r} is no type of the KV cache", hint=f"it can be {AUTO}, {', '.join(KVType)}"
        ) from error
