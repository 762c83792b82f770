"""The command: what goes to stdout, what to stderr, exit codes, files."""

import json
import re

import pytest

from runtime.models import DEMO_MODEL
from tests.support.command import strata

FAST = ("-m", "demo", "-t", "1", "--temp", "0")


@pytest.fixture
def run(capsys, monkeypatch):
    return lambda *arguments, stdin="": strata(capsys, monkeypatch, *arguments, stdin=stdin)


def test_run_puts_the_text_alone_on_stdout(run):
    outcome = run("run", *FAST, "-p", "Once upon a time", "-n", "12")
    assert outcome.code == 0
    assert outcome.stdout.startswith(", there was a")
    assert "\n" not in outcome.stdout[:-1]
    for word in ("predicted", "measured", "experts", "RAM"):
        assert word in outcome.stderr


def test_run_quietly_says_nothing_else(run):
    outcome = run("run", *FAST, "-p", "Once", "-n", "3", "-q")
    assert outcome.stderr == ""
    assert outcome.stdout


def test_run_json_is_one_document(run):
    document = json.loads(run("run", *FAST, "-p", "Once upon a time", "-n", "5", "--json").stdout)
    assert document["finish_reason"] == "length"
    assert len(document["token_ids"]) == 5
    assert document["prompt_tokens"] == 4
    for side in ("predicted", "measured"):
        assert {"decode_tokens_per_s", "prefill_tokens_per_s", "ttft_s", "peak_ram_bytes"} <= set(document[side])
    assert document["predicted"]["bottleneck"]
    assert document["replanned"] == []


def test_run_tells_where_it_departed_from_the_plan(run, monkeypatch):
    monkeypatch.setattr("runtime.drift.WINDOW_TOKENS", 4)
    monkeypatch.setattr("runtime.drift.TOLERANCE", 0.0)
    outcome = run("-v", "run", *FAST, "-p", "Once upon a time", "-n", "12", "--json", "-q")
    replanned = json.loads(outcome.stdout)["replanned"]
    assert replanned[0]["token"] == 4
    assert replanned[0].keys() == {"token", "reason", "change", "advice"}
    assert " ".join(outcome.stderr.split()).count("decoding at") == len(replanned)


def test_run_reads_a_file_or_stdin(run, tmp_path):
    (tmp_path / "prompt.txt").write_text("Once upon a time")
    from_file = run("run", *FAST, "-f", str(tmp_path / "prompt.txt"), "-n", "4", "-q").stdout
    assert from_file == run("run", *FAST, "-f", "-", "-n", "4", "-q", stdin="Once upon a time").stdout
    assert from_file == run("run", *FAST, "-p", "Once upon a time", "-n", "4", "-q").stdout


def test_run_reads_a_pipe_where_no_prompt_is_named(run):
    piped = run("run", "-m", "demo", "-n", "4", "--temp", "0", "-q", stdin="Once upon a time")
    assert piped.code == 0
    assert piped.stdout == run("run", "-m", "demo", "-p", "Once upon a time", "-n", "4", "--temp", "0", "-q").stdout


def test_the_version_is_told(run):
    assert run("--version").stdout.startswith("strata ")


def test_run_uses_a_template_file_unless_raw(run, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    common = (*FAST, "-p", "Once", "-n", "2", "--json", "--chat-template-file", str(template))
    plain = json.loads(run("run", *FAST, "-p", "Once", "-n", "2", "--json").stdout)
    assert json.loads(run("run", *common).stdout)["prompt_tokens"] > plain["prompt_tokens"]
    assert json.loads(run("run", *common, "--raw").stdout)["prompt_tokens"] == plain["prompt_tokens"]
    with_system = json.loads(run("run", *common, "--system", "Be brief").stdout)
    assert with_system["prompt_tokens"] > json.loads(run("run", *common).stdout)["prompt_tokens"]
    assert run("run", *FAST, "-p", "Once", "--system", "Be brief").code == 2


def test_the_budget_refuses_before_loading(run):
    outcome = run("run", *FAST, "-p", "Once", "--budget", "ram=100MiB")
    assert outcome.code == 1
    assert "error:" in outcome.stderr
    assert "hint:" in outcome.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "-m", "nowhere.gguf", "-p", "x"), "there is no file nowhere.gguf"),
        (("run", "-m", "demo"), "either -p TEXT or -f FILE"),
        (("run", "-m", "demo", "-p", "x", "-f", "x.txt"), "either -p TEXT or -f FILE"),
        (("run", "-m", "demo", "-p", "x", "--temp", "-1"), "temperature"),
        (("run", "-m", "demo", "-p", "x", "--prefix-cache", "much"), "'much' is not a size"),
        (("run", "-m", "demo", "-p", "x", "--record-routing", "no/folder.npz"), "there is no folder no"),
        (("batch", "-m", "nowhere.gguf", "no.jsonl", "-o", "x.jsonl"), "there is no batch no.jsonl"),
        (("inspect",), "no model is named"),
        (("run", "-m", "demo", "-p", "x", "--budget", "ram=lots"), "'lots' is not a size"),
        (("run", "-m", "demo", "-p", ""), "empty"),
        (("run", "-m", "demo", "-f", "nowhere.txt"), "nowhere.txt"),
        (("bench", "-m", "demo", "-p", "0", "-n", "0"), "nothing to measure"),
    ],
)
def test_bad_requests_are_one_line_and_code_2(run, arguments, words):
    outcome = run(*arguments)
    assert outcome.code == 2
    assert words in outcome.stderr
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr


def test_debug_shows_the_traceback(run):
    from offload.errors import RequestError

    with pytest.raises(RequestError):
        run("--debug", "run", "-m", "nowhere.gguf", "-p", "x")


def test_llama_cpp_without_its_extra_is_refused_with_the_command_that_mends_it(run):
    import importlib.util

    if importlib.util.find_spec("llama_cpp"):
        pytest.skip("llama-cpp-python is installed")
    outcome = run("run", *FAST, "-p", "Once", "--engine", "llama.cpp")
    assert outcome.code == 1
    assert "pip install" in outcome.stderr


def test_plan_is_shown_saved_and_run_by(run, tmp_path):
    path = tmp_path / "plan.json"
    shown = run("plan", "-m", "demo", "-c", "128", "--save", str(path))
    assert shown.code == 0
    assert "experts" in shown.stdout
    document = json.loads(run("plan", "-m", "demo", "--json").stdout)
    assert document["predicted"]["decode_tokens_per_s"] > 0
    outcome = run("run", *FAST, "-p", "Once", "-n", "500", "--plan", str(path), "--json")
    answer = json.loads(outcome.stdout)
    assert answer["prompt_tokens"] + len(answer["token_ids"]) <= 129
    broken = tmp_path / "broken.json"
    broken.write_text(path.read_text().replace('"context_tokens": 128', '"context_tokens": -1'))
    assert run("run", *FAST, "-p", "Once", "--plan", str(broken)).code == 1


def test_inspect_tells_what_is_in_a_file(run):
    shown = run("inspect", "demo")
    assert shown.code == 0
    for word in ("qwen3moe.expert_count", "Q8_0", "tokenizer.ggml.tokens", "[4096]"):
        assert word in shown.stdout
    assert "blk.0.ffn_gate_exps.weight" in run("inspect", "demo", "--tensors").stdout
    document = json.loads(run("inspect", str(DEMO_MODEL), "--json").stdout)
    experts = next(one for one in document["tensors"] if one["name"] == "blk.0.ffn_gate_exps.weight")
    assert experts["shape"] == [16, 256, 256]
    assert experts["experts"] == 16
    assert document["metadata"]["tokenizer.ggml.tokens"]["length"] == 4096


def test_inspect_wants_a_file(run):
    assert run("inspect").code == 2


def test_tokenize_prints_a_json_list(run):
    ids = json.loads(run("tokenize", "-m", "demo", stdin="Once upon a time\r\n").stdout)
    assert ids[:4] == json.loads(run("tokenize", "-m", "demo", "--no-special", stdin="Once upon a time").stdout)
    assert len(ids) > 4
    marked = "<|endoftext|>"
    plain = json.loads(run("tokenize", "-m", "demo", stdin=marked).stdout)
    assert len(plain) > 1
    assert json.loads(run("tokenize", "-m", "demo", "--parse-special", stdin=marked).stdout) == [0]


def test_perplexity_scores_a_text(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl named Lily. She loved to play with her toys. " * 12)
    document = json.loads(run("perplexity", "-m", "demo", "-t", "1", "-f", str(text), "-c", "64", "--json").stdout)
    assert 1 < document["perplexity"] < 20
    assert document["standard_error"] > 0
    assert document["chunks"] == 3 or document["chunks"] > 1
    line = run("perplexity", "-m", "demo", "-t", "1", "-f", str(text), "-c", "64", "--chunks", "1").stdout
    assert line.startswith("perplexity ")


@pytest.mark.parametrize("form", ["md", "csv", "json", "jsonl"])
def test_bench_prints_llama_benchs_columns(run, form):
    outcome = run("bench", "-m", "demo", "-t", "1", "-p", "8", "-n", "4", "-d", "0", "-d", "8", "-r", "2", "-o", form)
    assert outcome.code == 0
    if form == "md":
        assert outcome.stdout.startswith("| model | size | params | backend | threads | test | t/s |")
        assert "| pp8 |" in outcome.stdout
        assert "| tg4 @ d8 |" in outcome.stdout
    elif form == "csv":
        assert outcome.stdout.splitlines()[0].startswith("model_filename,")
        assert len(outcome.stdout.splitlines()) == 5
    else:
        rows = json.loads(outcome.stdout) if form == "json" else list(map(json.loads, outcome.stdout.splitlines()))
        assert [row["test"] for row in rows] == ["pp8", "pp8 @ d8", "tg4", "tg4 @ d8"]
        assert all(row["avg_ts"] > 0 for row in rows)


def test_bench_takes_lists_and_has_a_row_for_every_combination(run):
    outcome = run(
        "bench", "-m", "demo", "-t", "1,2", "-p", "8,16", "-p", "4", "-n", "2, 3", "-d", "0,8", "-r", "1", "-o", "jsonl"
    )
    assert outcome.code == 0
    rows = [json.loads(line) for line in outcome.stdout.splitlines()]
    tests = [f"{kind} @ d8" if depth else kind for depth in (0, 8) for kind in ("pp8", "pp16", "pp4")]
    tests += [f"{kind} @ d8" if depth else kind for depth in (0, 8) for kind in ("tg2", "tg3")]
    assert [(row["n_threads"], row["test"]) for row in rows] == [(count, test) for count in (1, 2) for test in tests]


@pytest.mark.parametrize(
    ("option", "text", "words"),
    [
        ("-p", "128,", "-p has '': not a whole number from 0 on"),
        ("-n", "32;64", "-n has '32;64'"),
        ("-d", "-1", "-d has '-1'"),
        ("-t", "1,0", "-t has '0': not a whole number from 1 on"),
        ("-p", "9" * 10, "not a whole number"),
        ("-p", "١", "not a whole number"),
    ],
)
def test_bench_refuses_lists_that_are_none(run, option, text, words):
    outcome = run("bench", "-m", "demo", option, text)
    assert outcome.code == 2
    assert words in outcome.stderr
    assert outcome.stdout == ""


def test_bench_refuses_what_the_context_cannot_hold(run):
    outcome = run("bench", "-m", "demo", "-t", "1", "-p", "64", "-n", "0", "-c", "32")
    assert outcome.code == 2
    assert "give -c 64" in outcome.stderr


def test_doctor_reports_the_machine(run):
    outcome = run("doctor")
    assert outcome.code == 0
    for word in ("torch", "cpu", "memory", "gpu", "llama.cpp"):
        assert word in outcome.stdout
    assert {line["name"] for line in json.loads(run("doctor", "--json").stdout)} >= {"cpu", "gpu", "memory"}


def test_chat_answers_keeps_the_context_and_obeys_commands(run, tmp_path):
    saved = tmp_path / "talk.json"
    lines = ["Hello", "/stats", '"""a block', 'of lines"""', "goes \\", "on", f"/save {saved}", "/save", "/nonsense",
             "/save /nowhere/x", "/help", "/clear", "/stats", "/exit", "never read"]  # fmt: skip
    outcome = run("chat", *FAST, "-n", "4", "--system", "Be brief", stdin="\n".join(lines))
    assert outcome.code == 0
    messages = json.loads(saved.read_text())
    assert [m["content"] for m in messages if m["role"] == "user"] == ["Hello", "a block\nof lines", "goes \non"]
    assert len(outcome.stdout.splitlines()) >= 3
    for words in ("no chat template", "of context in use", "cleared", "no command /nonsense", "name a file",
                  "cannot write", "/help"):  # fmt: skip
        assert words in outcome.stderr
    assert "0 of 512 tokens" in outcome.stderr


def test_chat_ends_with_its_input(run):
    assert run("chat", *FAST, "-n", "2", "-q", stdin="Hello").code == 0


def test_chat_refuses_a_message_too_long_and_goes_on(run):
    outcome = run("chat", *FAST, "-n", "2", "-q", stdin="word " * 3000 + "\nHello\n")
    assert outcome.code == 0
    assert "the context holds 512" in outcome.stderr
    assert outcome.stdout.strip()


def test_batch_answers_a_file(run, tmp_path):
    lines = [{"prompt": "Once upon a time"}, {"custom_id": "x", "body": {"prompt": "A dog", "max_tokens": 3}}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\nnot json\n")
    arguments = ("batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), *FAST, "-n", "4")
    outcome = run(*arguments)
    assert outcome.code == 0, outcome.stderr
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(records) == 3
    assert "2 answered, 1 refused" in outcome.stderr
    assert re.search(r"\d tokens in [\d.]+ s, [\d.]+ tokens/s", outcome.stderr)
    again = run(*arguments)
    assert "tokens/s" not in again.stderr.split("0 answered")[1]
    assert "3 done before" in again.stderr
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3


def test_row_08_inspect_shows_a_file_that_cannot_be_run(run, tmp_path):
    from tests.support import gguf_bytes as raw

    file = raw.GGUFBytes()
    file.value("general.architecture", raw.STRING, "nobody_knows")
    file.tensor("strange.weight", 99, (32, 2), b"\0" * 64)
    path = tmp_path / "strange.gguf"
    path.write_bytes(file.build())
    shown = run("inspect", str(path), "--tensors")
    assert shown.code == 0
    assert "type 99" in shown.stdout
    assert "nobody_knows" in shown.stdout
    assert json.loads(run("inspect", str(path), "--json").stdout)["tensors"][0]["type"] == "type 99"
    refused = run("run", "-m", str(path), "-p", "x")
    assert refused.code == 1
    assert "Traceback" not in refused.stderr


def test_progress_shows_long_work_on_a_terminal_only(monkeypatch):
    import io

    from rich.console import Console

    from runtime.cli import console as module

    for terminal, total, shown in ((True, 1 << 30, True), (True, 100, False), (False, 1 << 30, False)):
        screen = io.StringIO()
        monkeypatch.setattr(module, "console", Console(file=screen, force_terminal=terminal))
        with module.progress("loading") as report:
            report(0, total)
            report(total, total)
        assert ("loading" in screen.getvalue()) is shown


def test_bench_kernels_prints_shares(run):
    arguments = ("bench", "kernels", "--type", "Q8_0", "--type", "Q1_0", "--columns", "1", "--seconds", "0.2")
    rows = json.loads(run(*arguments, "--json").stdout)
    assert {row["quant_type"] for row in rows} == {"Q8_0", "Q1_0"}
    assert all(row["seconds"] > 0 and row["share_of_read"] > 0 for row in rows)
    assert {row["family"] for row in rows if row["quant_type"] == "Q1_0"} == {"dot", "tables"}
    shown = run(*arguments).stdout
    assert shown.split()[:3] == ["type", "kernel", "tokens"]
    refused = run("bench", "kernels", "--type", "Q9")
    assert refused.code == 2
    assert "no quant type Q9" in refused.stderr
