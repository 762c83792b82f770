"""The plan that a command line asks for; needs nothing but the file's header."""

from offload.gguf import GGUFFile
from planner.budget import parse_budget
from planner.plan import Plan
from planner.solve import plan_here
from runtime.cli.options import PlanOptions


def plan_by(options: PlanOptions, gguf: GGUFFile, *, prompt_tokens: int | None = None) -> Plan:
    """The planner's choice within the options."""
    return plan_here(
        gguf,
        context_tokens=options.context,
        threads=options.threads,
        budget=parse_budget(options.budget) if options.budget else None,
        loop=options.loop.value,
        prompt_tokens=prompt_tokens,
    )
