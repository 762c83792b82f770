"""The plan that a command line asks for; needs nothing but the file's header."""

from offload.gguf import GGUFFile
from planner.budget import measure_budget, parse_budget
from planner.plan import Plan
from planner.solve import plan_here
from runtime.cli.options import PlanOptions


def plan_by(
    options: PlanOptions,
    gguf: GGUFFile,
    *,
    loop: str,
    prompt_tokens: int | None = None,
    on_this_machine: bool = False,
) -> Plan:
    """The planner's choice within the options; what shall run `on_this_machine` may not use more than it has."""
    budget = parse_budget(options.budget) if options.budget else None
    return plan_here(
        gguf,
        context_tokens=options.context,
        threads=options.threads,
        budget=budget.within(measure_budget()) if budget and on_this_machine else budget,
        loop=loop,
        prompt_tokens=prompt_tokens,
    )
