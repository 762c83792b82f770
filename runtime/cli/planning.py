"""The plan that a command line asks for; needs nothing but the file's header."""

from dataclasses import replace
from pathlib import Path

from gpu_kernels.capabilities import GpuCapabilities
from offload.errors import RequestError
from offload.gguf import GGUFFile
from planner.budget import Budget, measure_budget, parse_budget
from planner.draft_choice import DraftWish
from planner.gpu_choice import chosen_gpu
from planner.machine import Machine
from planner.machine_files import load_machine
from planner.plan import Objective, Plan
from planner.plan_check import check_runnable
from planner.question import Question, Wish, ask
from planner.solve import question_here, solve_with_drafts
from runtime.cli.options import PlanOptions, read_text_file


def plan_by(
    options: PlanOptions,
    gguf: GGUFFile,
    *,
    loop: str,
    prompt_tokens: int | None = None,
    on_this_machine: bool = False,
    drafts: DraftWish | None = None,
) -> Plan:
    """The planner's choice within the options; what shall run `on_this_machine` may not use more than it has.

    With `drafts` the best of them is planned beside the model, or none.
    """
    gpu = chosen_gpu(options.gpu)
    kept = (options.kv, options.kv_ram_bytes, options.kv_is_free)
    wish = Wish(options.context, options.threads, prompt_tokens, loop, Objective.LATENCY, *kept)
    budget = _budget(options, gpu, confined=on_this_machine)
    return solve_with_drafts(question_here(gguf, wish, budget, gpu=gpu), drafts)


def _budget(options: PlanOptions, gpu: GpuCapabilities | None, *, confined: bool) -> Budget | None:
    """What the options allow, of what there is where it is `confined`; None where they say nothing."""
    if not options.budget:
        return None
    machine = measure_budget(gpu)
    budget = parse_budget(options.budget, machine)
    return budget.within(machine) if confined else budget


def plan_in(path: Path, gguf: GGUFFile) -> Plan:
    """The plan saved at `path`; PlanError where it is not one of this model that can be run here."""
    return check_runnable(Plan.from_json(read_text_file(path)), gguf)


def question_by(
    options: PlanOptions, gguf: GGUFFile, *, objective: Objective, machine: str | None, prompt_tokens: int | None
) -> Question:
    """What the options ask: of this machine, or of one that is described under a name or in a file."""
    numbers = (options.context, options.threads, prompt_tokens)
    wish = Wish(*numbers, options.loop.value, objective, options.kv, options.kv_ram_bytes, options.kv_is_free)
    if machine is None:
        gpu = chosen_gpu(options.gpu)
        return question_here(gguf, wish, _budget(options, gpu, confined=False), gpu=gpu)
    if options.kv_ram is not None:
        raise RequestError("--kv-ram is for this machine, not for one that is described", hint="leave out --machine")
    described = load_machine(machine)
    has = described_budget(described)
    budget = parse_budget(options.budget, has) if options.budget else has
    return ask(gguf, budget, _with_memories(described, budget), wish)


def described_budget(machine: Machine) -> Budget:
    """All that a description says may be used."""
    gpu = machine.gpu
    return Budget(
        ram_bytes=machine.ram_bytes,
        gpu_bytes=gpu.memory_bytes if gpu is not None else 0,
        ram_source=machine.name,
        gpu_source=gpu.name if gpu is not None else "no GPU",
    )


def _with_memories(machine: Machine, budget: Budget) -> Machine:
    """`machine` with the memories of `budget`."""
    gpu = None if machine.gpu is None else replace(machine.gpu, memory_bytes=budget.gpu_bytes)
    return replace(machine, ram_bytes=budget.ram_bytes, gpu=gpu)
