"""What a draft model costs and brings beside a target: its RAM, its time a token, a pass over several, the gain.

Knows nothing about how drafts are made or accepted. A target's pass over n tokens is predicted as its decode step times
the ratio that the CPU's kernels give for n columns against one; for experts with the union of those that n tokens use.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from offload.tiers import Device
from planner import unit_cost
from planner.budget import Budget, format_size
from planner.draft_depth import Costs, Depth, best_depth
from planner.machine_here import cpu_here
from planner.memory import memory_needs
from planner.model_shape import ModelShape, UnitKind
from planner.plan import Plan, WeightsForm
from planner.profile import Profile

EXPECTED_ACCEPTANCE = 0.6  # of a draft model whose acceptance was not measured yet
MOST_DRAFTS = 16
DRAFT_CONTEXT_TOKENS = 4096  # more of the sequence than that is seldom of use to a draft
CHUNK_TOKENS = 256
DEPTH_TOKENS = 256  # of context that a pass is predicted behind


@dataclass(frozen=True, slots=True)
class DraftForecast:
    """What a draft model promises: RAM, seconds a drafted token, drafts a pass and the speed against plain decoding."""

    ram_bytes: int
    draft_s: float
    depth: Depth
    gain: float
    acceptance: float

    def __str__(self) -> str:
        taken = f"{format_size(self.ram_bytes)} of RAM, {1e3 * self.draft_s:.3g} ms a drafted token"
        if not self.depth.drafts:
            return f"not expected to pay at {self.acceptance:.0%} accepted; {taken}"
        return (
            f"{self.gain:.2f}x with {self.depth.drafts} at a time predicted at {self.acceptance:.0%} accepted; {taken}"
        )


def pass_ratios(shape: ModelShape, profile: Profile, threads: int, most_tokens: int) -> list[float]:
    """Time of a pass over 1, 2, ... `most_tokens` tokens, all with logits, over that of one token; never falling."""
    seconds = [_pass_seconds(shape, profile, threads, tokens) for tokens in range(1, most_tokens + 1)]
    ratios: list[float] = []
    for each in seconds:
        ratios.append(max(each / seconds[0], ratios[-1] if ratios else 1.0))
    return ratios


def draft_bytes(shape: ModelShape, context_tokens: int) -> int:
    """RAM that a draft model takes beside a target in the same process."""
    nothing = Budget(0, 0, "", "")  # margins are the target's
    ram = memory_needs(
        shape, nothing, Device.CPU, WeightsForm.PACKED, context_tokens=context_tokens, chunk_tokens=CHUNK_TOKENS
    ).ram
    return ram.peak_bytes - ram.process_bytes


def without(budget: Budget, ram_bytes: int) -> Budget:
    """`budget` with so much RAM set aside."""
    return replace(budget, ram_bytes=max(budget.ram_bytes - ram_bytes, 0))


def left_over(plan: Plan, reserved_bytes: int = 0) -> Budget:
    """What a plan leaves for a second model in the same process, whose share of the process is the first one's.

    `reserved_bytes` of RAM were set aside for it before the plan was made.
    """
    ram, gpu = plan.needs.ram, plan.needs.gpu
    return replace(
        plan.budget,
        ram_bytes=max(plan.budget.ram_bytes - ram.needed_bytes, 0) + reserved_bytes + ram.process_bytes,
        gpu_bytes=max(plan.budget.gpu_bytes - gpu.needed_bytes, 0),
        ram_margin_bytes=0,
        gpu_margin_bytes=0,
    )


def forecast(
    plan: Plan,
    target: ModelShape,
    draft_plan: Plan,
    draft: ModelShape,
    profile: Profile,
    *,
    acceptance: float = EXPECTED_ACCEPTANCE,
    most: int = MOST_DRAFTS,
) -> DraftForecast:
    """What drafts of `draft`, run by `draft_plan`, promise for `target`, run by `plan`."""
    plain_s = 1 / plan.predicted.decode_tokens_per_s
    draft_s = 1 / draft_plan.predicted.decode_tokens_per_s
    ratios = pass_ratios(target, profile, plan.settings.threads, most + 1)
    costs = Costs(draft_s, 0.0, lambda tokens: plain_s * ratios[tokens - 1], plain_s)
    depth = best_depth([acceptance] * most, costs)
    ram = draft_bytes(draft, draft_plan.settings.context_tokens)
    return DraftForecast(ram, draft_s, depth, depth.tokens_per_s * plain_s, acceptance)


def gain_at(ratios: Sequence[float], draft_share: float, acceptance: float, most: int = MOST_DRAFTS) -> Depth:
    """The best depth in units of a plain token's time; `draft_share`: of it, for a drafted token."""
    return best_depth([acceptance] * most, Costs(draft_share, 0.0, lambda tokens: ratios[tokens - 1], 1.0))


def _pass_seconds(shape: ModelShape, profile: Profile, threads: int, tokens: int) -> float:
    """A pass of packed weights on the CPU behind some context, logits of every token."""
    cpu, seconds = cpu_here(profile), 0.0
    for unit in shape.units:
        if unit.kind is UnitKind.EMBEDDING:
            continue
        share, scale = unit_cost.dense(tokens), 1.0
        if unit.kind is UnitKind.EXPERTS and shape.expert_count:
            probability = shape.expert_used_count / shape.expert_count
            share, scale = unit_cost.experts(tokens, probability), 1 / probability
        by_type = unit_cost.bytes_by_type(unit, scale)
        seconds += unit_cost.cpu_seconds(cpu, threads, by_type, share, unit.num_matmuls)
        if unit.kind is UnitKind.ATTENTION and unit.layer is not None:
            seconds += unit_cost.cpu_attention_seconds(cpu, threads, shape, unit.layer, tokens, DEPTH_TOKENS)
    return seconds
