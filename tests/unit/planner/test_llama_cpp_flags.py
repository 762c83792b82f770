"""Flags for llama.cpp: whole models, divided layers, and where it cannot follow."""

import re
import shlex
from dataclasses import replace

from offload.tiers import Device, Tier
from planner.budget import GIB, Budget
from planner.llama_cpp_flags import llama_cpp_flags
from planner.model_shape import UnitKind
from planner.plan import Placement, Plan
from planner.solve import make_plan
from tests.support.planning import header, profile

BUDGET = Budget(GIB, 0, "test", "no GPU")


def plan(where, *, layers: int = 4, experts: int = 8) -> Plan:  # type: ignore[no-untyped-def]
    """A plan whose units lie where `where(placement)` says."""
    model = header(layers=layers, experts=experts, used=min(experts, 2), tied=False)
    made = make_plan(model, budget=BUDGET, profile=profile(), threads=3, context_tokens=256)

    def moved(placement: Placement) -> Placement:
        tier = where(placement)
        return replace(placement, tier=tier, device=Device.GPU if tier is Tier.GPU else Device.CPU)

    return replace(made, placements=tuple(moved(placement) for placement in made.placements))


def matched(flags, layer: int, tensor: str) -> bool:  # type: ignore[no-untyped-def]
    """Whether llama.cpp would hold a tensor back by `-ot`: by a search in its name."""
    return any(re.search(pattern, f"blk.{layer}.{tensor}.weight") for pattern in flags.cpu_tensors)


def test_all_in_ram() -> None:
    flags = llama_cpp_flags(plan(lambda _: Tier.RAM))
    assert flags.arguments() == (
        "-m", "models/test.gguf", "-ngl", "0", "-ctk", "f16", "-ctv", "f16", "-t", "3", "-c", "256", "-b", "256",
        "-ub", "256",
    )  # fmt: skip
    assert flags.unlike == ()
    assert shlex.split(flags.line()) == list(flags.arguments())


def test_all_on_the_gpu_counts_the_output() -> None:
    flags = llama_cpp_flags(plan(lambda _: Tier.GPU))
    assert flags.gpu_layers == 5
    assert not flags.cpu_tensors
    assert not flags.cpu_expert_layers


def test_the_output_alone() -> None:
    assert llama_cpp_flags(plan(lambda p: Tier.GPU if p.kind is UnitKind.OUTPUT else Tier.RAM)).gpu_layers == 1


def test_experts_of_all_layers_stay_in_ram() -> None:
    flags = llama_cpp_flags(plan(lambda p: Tier.RAM if p.kind is UnitKind.EXPERTS else Tier.GPU))
    assert (flags.gpu_layers, flags.cpu_expert_layers, flags.cpu_tensors) == (5, 4, ())
    assert "--n-cpu-moe 4" in flags.line()
    for layer in range(4):
        assert [bool(re.search(one, f"blk.{layer}.ffn_up_exps.weight")) for one in flags.held_back()].count(True) == 1
    assert not any(re.search(pattern, "blk.4.ffn_up_exps.weight") for pattern in flags.held_back())


def test_experts_of_the_first_and_of_a_later_layer() -> None:
    flags = llama_cpp_flags(plan(lambda p: Tier.RAM if p.kind is UnitKind.EXPERTS and p.layer != 2 else Tier.GPU))
    assert flags.cpu_expert_layers == 2
    assert matched(flags, 3, "ffn_up_exps")
    assert not matched(flags, 2, "ffn_up_exps")
    assert not matched(flags, 3, "attn_q")
    assert "-ot" in flags.arguments()


def test_the_last_layers() -> None:
    flags = llama_cpp_flags(plan(lambda p: Tier.GPU if (p.layer or 0) >= 2 else Tier.RAM, experts=0))
    assert flags.gpu_layers == 3
    assert flags.cpu_tensors == (r"^output\.weight",)


def test_the_first_layers_are_told_by_tensors() -> None:
    flags = llama_cpp_flags(plan(lambda p: Tier.GPU if p.layer in (None, 0) else Tier.RAM, experts=0))
    assert flags.gpu_layers == 5
    for layer in (1, 2, 3):
        assert matched(flags, layer, "attn_q")
        assert matched(flags, layer, "ffn_down")
    assert not matched(flags, 0, "attn_q")
    assert not matched(flags, 11, "attn_q")


def test_what_it_cannot_follow_is_said() -> None:
    on_flash = llama_cpp_flags(plan(lambda p: Tier.FLASH if p.kind is UnitKind.EXPERTS else Tier.RAM))
    assert any("flash" in line for line in on_flash.unlike)
    assert on_flash.mmap
    made = plan(lambda _: Tier.RAM)
    streamed = replace(made, placements=tuple(replace(p, device=Device.GPU) for p in made.placements))
    assert any("computes on the CPU" in line for line in llama_cpp_flags(streamed).unlike)
    apart = llama_cpp_flags(plan(lambda p: Tier.GPU if p.kind is UnitKind.ATTENTION else Tier.RAM))
    assert any("KV cache" in line for line in apart.unlike)


def test_divided_experts_are_held_back_whole() -> None:
    made = plan(lambda _: Tier.GPU)
    placements: list[Placement] = []
    for p in made.placements:
        if p.unit == "blk.1.experts":
            placements += [replace(p, unit="blk.1.experts#0"), replace(p, unit="blk.1.experts#1", tier=Tier.RAM)]
        else:
            placements.append(p)
    flags = llama_cpp_flags(replace(made, placements=tuple(placements)))
    assert matched(flags, 1, "ffn_up_exps")
    assert any("one memory" in line for line in flags.unlike)


def test_slots_for_experts_become_whole_layers() -> None:
    made = plan(lambda p: Tier.RAM if p.kind in (UnitKind.EXPERTS, UnitKind.EMBEDDING) else Tier.GPU)
    hybrid = replace(made, settings=replace(made.settings, loop="hybrid", gpu_slots=17))
    flags = llama_cpp_flags(hybrid)
    assert (flags.gpu_layers, flags.cpu_expert_layers) == (5, 2)
    assert any("whole layers of experts" in line for line in flags.unlike)
    resident = replace(made, settings=replace(made.settings, loop="hybrid", gpu_slots=0))
    assert llama_cpp_flags(resident).cpu_expert_layers == 4
