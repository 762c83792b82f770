"""Choices as a person sees them: within 80 columns, every fact there."""

import io
from collections.abc import Callable

from rich.console import Console

from cpu_kernels.kv_types import KVType
from offload.tiers import Device, Tier
from planner.budget import GIB, Budget
from planner.compare import Ranked
from planner.explain_choices import best_line, render_kv_costs, render_ranking, render_what_if, render_why
from planner.figures import figures
from planner.kv_costs import KVCost
from planner.plan import Plan
from planner.solve import make_plan
from planner.what_if import Alternative
from planner.why import Choice
from tests.support.planning import llama_8b, profile


def shown(draw: Callable[[Console], None]) -> str:
    file = io.StringIO()
    draw(Console(file=file, width=80, highlight=False))
    assert all(len(line) <= 80 for line in file.getvalue().splitlines())
    return file.getvalue()


def plan() -> Plan:
    return make_plan(llama_8b(), budget=Budget(16 * GIB, 0, "test", "no GPU"), profile=profile())


def test_the_best_help_is_one_line() -> None:
    now = plan()
    speed = now.predicted.decode_tokens_per_s
    line = best_line(now, Alternative("2.0 GiB more RAM", 2 * speed, 1.0, 1))
    assert line == f"2.0 GiB more RAM: {figures(speed)} -> {figures(2 * speed)} tokens/s"


def test_alternatives() -> None:
    now = plan()
    speed = now.predicted.decode_tokens_per_s
    rows = (
        Alternative("2.0 GiB more RAM", speed, 1.0, GIB),
        Alternative("as Q3_K_M", 1.5 * speed, 0.5, GIB),
        Alternative("context of 65536 tokens", None, None, None),
    )
    lines = shown(lambda console: render_what_if(console, now, rows)).splitlines()
    assert "as planned" in lines[1]
    assert "same" in lines[2]
    assert "1.50x" in lines[3]
    assert "500 ms" in lines[3]
    assert "does not fit" in lines[4]


def test_contexts() -> None:
    rows = (
        KVCost(4096, KVType.F16, GIB, 0, 41.5, 2048, None),
        KVCost(131072, KVType.KIVI4, 19 * GIB, 14 * GIB, 0.213, 2048, 0.41),
        KVCost(131072, KVType.F16, 64 * GIB, 0, None, 2048, None),
    )
    lines = shown(lambda console: render_kv_costs(console, rows)).splitlines()
    heads = ["full", "context", "KV", "size", "on", "flash", "tokens/s", "--kv-budget", "2048"]
    assert lines[0].split() == heads
    assert lines[1].split() == ["4096", "f16", "1.0", "GiB", "-", "41.5", "-"]
    assert lines[2].split() == ["131072", "kivi4", "19.0", "GiB", "14.0", "GiB", "0.21", "0.41"]
    assert lines[3].split()[-4:] == ["does", "not", "fit", "-"]


def test_options_of_a_unit() -> None:
    rows = (
        Choice("blk.3.experts", Tier.RAM, Device.CPU, 0.002, 0.0, GIB, 0, taken=True, reason="taken"),
        Choice("blk.3.experts", Tier.FLASH, Device.GPU, 2e-5, 0.1, 0, 4096, taken=False, reason="98 ms [longer]"),
    )
    text = shown(lambda console: render_why(console, rows))
    for word in ("2.00 ms", "1.0 GiB", "taken", "flash", "20.0 us", "100 ms", "[longer]"):
        assert word in text


def test_ranking() -> None:
    rows = (
        Ranked("folder/a.gguf", GIB, 4.5, plan()),
        Ranked("b.gguf", 4 * GIB, 8.5, None, "b.gguf needs [more]"),
    )
    text = shown(lambda console: render_ranking(console, rows))
    assert "a.gguf" in text
    assert "folder" not in text
    assert "4.50" in text
    assert "does not fit" in text
    assert "b.gguf needs [more]" in text
