"""Models on a server: planned for and looked at by their header alone, not run."""

import json
import sys
from pathlib import Path

import pytest

from offload import http_range
from offload.flash_probe import filesystem_key
from runtime.models import DEMO_MODEL
from tests.support.command import strata
from tests.support.file_server import file_server, unused_url
from tests.support.large_gguf import write_sparse
from tests.support.planning import llama_8b
from tests.unit.offload.test_gguf_shards import three

DEMO = DEMO_MODEL.read_bytes()


@pytest.fixture
def run(capsys, monkeypatch):
    return lambda *arguments: strata(capsys, monkeypatch, *arguments)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(http_range, "PAUSE_S", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with file_server() as told:
        yield told


@pytest.fixture
def hub(server, monkeypatch):
    """A hub at the server, with one repository; nobody is logged in."""
    pytest.importorskip("huggingface_hub", reason="needs the extra `hub`")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    server.hub(
        "org/tiny-GGUF",
        {
            "README.md": b"",
            "tiny-Q4_K_M.gguf": DEMO,
            "tiny-IQ4_XS.gguf": DEMO,
            "tiny-f16.gguf": DEMO,
            "mmproj-f16.gguf": b"",
            "UD/tiny-UD-Q2_K_XL.gguf": DEMO,
            "UD/tiny-Q2_K_XL.gguf": DEMO,
            **{f"Q8_0/tiny.Q8_0-{n:05}-of-00003.gguf": file.build() for n, file in enumerate(three(), start=1)},
        },
    )
    return server


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A header of Llama 3 8B, before room for its weights."""
    path = tmp_path_factory.mktemp("large") / "large.gguf"
    write_sparse(path, llama_8b(), vocabulary=128_256)
    return path


def planned(outcome):
    assert outcome.code == 0, outcome.stderr
    return json.loads(outcome.stdout)


def test_a_url_is_planned_as_the_file_is(run, server, large, tmp_path):
    url = server.serve("/models/large.gguf", large)
    settings = ("-c", "4096", "--budget", "ram=32GiB,gpu=0", "--json")
    remote, local = planned(run("plan", url, *settings)), planned(run("plan", str(large), *settings))
    assert remote["placements"] == local["placements"]
    assert remote["needs"] == local["needs"]
    assert remote["model"] == local["model"] | {"path": url}
    assert server.sent_bytes < 16e6 < large.stat().st_size / 200
    assert remote["notes"][:-1] == local["notes"]
    assert remote["notes"][-1] == f"planned from the header on the server; to run it, first: curl -L -O {url}"


@pytest.mark.parametrize("name", ["hf:org/tiny-GGUF:q4_k_m", "hf:org/tiny-GGUF/tiny-Q4_K_M.gguf"])
def test_a_name_of_the_hub(name, run, hub):
    document = planned(run("plan", name, "--json"))
    assert document["model"]["path"] == "hf:org/tiny-GGUF/tiny-Q4_K_M.gguf"
    assert document["notes"][-1].endswith("first: hf download org/tiny-GGUF tiny-Q4_K_M.gguf --local-dir .")
    shown = run("plan", name)
    assert "hf download" in " ".join(shown.stdout.split())
    assert shown.stderr == ""


@pytest.mark.parametrize(
    ("quant", "file"),
    [
        ("IQ4_XS", "tiny-IQ4_XS.gguf"),
        ("F16", "tiny-f16.gguf"),
        ("UD-Q2_K_XL", "UD/tiny-UD-Q2_K_XL.gguf"),
        ("Q8_0", "Q8_0/tiny.Q8_0-00001-of-00003.gguf"),
    ],
)
def test_the_quant_type_picks_the_file(quant, file, run, hub):
    document = planned(run("inspect", f"hf:org/tiny-GGUF:{quant}", "--json"))
    assert document["files"][0] == f"hf:org/tiny-GGUF/{file}"
    assert len(document["files"]) == (3 if quant == "Q8_0" else 1)


@pytest.mark.parametrize(
    ("name", "problem", "hint"),
    [
        ("hf:org/tiny-GGUF:Q4_K", "has no file of Q4_K", "tiny-Q4_K_M.gguf"),
        ("hf:org/tiny-GGUF:Q2_K_XL", "has 2 files of Q2_K_XL", "hf:org/tiny-GGUF/UD/tiny-UD-Q2_K_XL.gguf"),
        ("hf:org/tiny-GGUF", "has 6 GGUF files", "hf:org/tiny-GGUF/tiny-f16.gguf"),
        ("hf:org/tiny-GGUF/none.gguf", "there is no such file", "check the name"),
        ("hf:org/none:Q4_K_M", "shows no such repository", "HF_TOKEN"),
        ("hf:org/text", "holds no GGUF file", "GGUF conversions"),
        ("hf:tiny", "is not the name of a model on the hub", "hf:org/repo:Q4_K_M"),
        ("hf:org/--tiny:Q4", "org/--tiny", "hf:org/repo:Q4_K_M"),
        ("hf:org/--tiny/f.gguf", "org/--tiny", "hf:org/repo:Q4_K_M"),
        ("https://host", "names no file on a server", "https://host/file.gguf"),
    ],
)
def test_names_that_mean_no_file(name, problem, hint, run, hub):
    hub.hub("org/text", {"README.md": b""})
    outcome = run("plan", name)
    assert outcome.code == 2
    assert problem in outcome.stderr
    assert hint in outcome.stderr
    assert outcome.stdout == ""


def test_the_only_file_needs_no_quant_type(run, hub):
    hub.hub("org/one", {"a.gguf": DEMO, "mmproj.gguf": b""})
    assert planned(run("inspect", "hf:org/one", "--json"))["files"] == ["hf:org/one/a.gguf"]


def test_a_hub_that_fails(run, hub, monkeypatch):
    hub.statuses = [500]
    outcome = run("plan", "hf:org/tiny-GGUF:Q4_K_M")
    assert (outcome.code, "answers 500" in outcome.stderr) == (1, True)
    hub.serve("/page/api/models/org/tiny-GGUF", b"")
    hub.ranges = False
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/page/")
    outcome = run("plan", "hf:org/tiny-GGUF:Q4_K_M")
    assert (outcome.code, "does not answer as a hub does" in outcome.stderr) == (1, True)
    monkeypatch.setenv("HF_ENDPOINT", unused_url())
    outcome = run("plan", "hf:org/tiny-GGUF:Q4_K_M")
    assert (outcome.code, "cannot be asked" in outcome.stderr) == (1, True)


def test_the_token_goes_to_the_hub_alone(run, hub, monkeypatch):
    hub.token = "secret"
    assert run("plan", "hf:org/tiny-GGUF:Q4_K_M").code == 2
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    assert run("plan", "hf:org/tiny-GGUF:Q4_K_M").code == 0
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert run("inspect", f"{hub.url}/org/tiny-GGUF/resolve/main/tiny-f16.gguf").code == 0
    outcome = run("inspect", f"{hub.url}/org/tiny-GGUF/blob/main/tiny-f16.gguf", "--json")
    assert planned(outcome)["files"] == [f"{hub.url}/org/tiny-GGUF/resolve/main/tiny-f16.gguf"]
    with file_server() as other:
        assert run("inspect", other.serve("/tiny.gguf", DEMO)).code == 0
        assert {seen.authorization for seen in other.seen} == {None}


def test_without_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    outcome = run("plan", "hf:org/repo:Q4_K_M")
    assert outcome.code == 2
    assert "pip install 'strata[hub]'" in outcome.stderr


def test_files_are_compared_wherever_they_lie(run, hub):
    names = [str(DEMO_MODEL), "hf:org/tiny-GGUF:F16", hub.serve("/demo.gguf", DEMO)]
    document = planned(run("plan", "--compare", *names, "--json"))
    paths = {str(DEMO_MODEL), "hf:org/tiny-GGUF/tiny-f16.gguf", f"{hub.url}/demo.gguf"}
    assert {file["path"] for file in document["files"]} == paths
    assert "tiny-f16.gguf" in run("plan", "--compare", *names).stdout


def test_a_plan_made_ahead_runs_the_file_once_it_is_here(run, server, tmp_path):
    path = tmp_path / "plan.json"
    outcome = run("plan", server.serve("/demo.gguf", DEMO), "--save", str(path))
    assert outcome.code == 0
    assert "to run it, first: curl" in json.loads(path.read_text())["notes"][-1]
    assert run("run", "-m", "demo", "-p", "Once", "-n", "2", "--plan", str(path), "-q").code == 0


def test_flags_of_llama_cpp_name_the_file_as_it_does(run, hub):
    settings = ("-t", "1", "-c", "128", "--for", "llama.cpp")
    line = run("plan", "hf:org/tiny-GGUF:F16", *settings).stdout
    assert line.startswith("-hf org/tiny-GGUF -hff tiny-f16.gguf -ngl 0 ")
    url = hub.serve("/demo.gguf", DEMO)
    assert run("plan", url, *settings).stdout.startswith(f"-mu {url} -ngl 0 ")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("hf:org/repo:Q4_K_M", "hf download org/repo --include '*Q4_K_M*' --local-dir ."),
        ("hf:org/repo/a/file.gguf", "hf download org/repo a/file.gguf --local-dir ."),
        ("https://host/a/file.gguf", "curl -L -O https://host/a/file.gguf"),
    ],
)
@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "-p", "Once", "-m"),
        ("chat", "-m"),
        ("bench", "-m"),
        ("perplexity", "-f", __file__, "-m"),
        ("pack", "-m"),
        ("profile", "-m"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_needs_weights_refuses_and_says_what_to_do(arguments, name, command, run):
    outcome = run(*arguments, name)
    assert outcome.code == 2
    assert outcome.stderr == (
        f"error: {name} lies on a server, and weights are read from local files\nhint: first: {command}\n"
    )


def test_figures_of_the_drive_are_those_of_the_current_folder():
    for name in ("hf:org/repo/file.gguf", "https://host/file.gguf"):
        assert filesystem_key(Path(name)) == filesystem_key(Path.cwd())


def test_texts_are_cut_into_tokens_by_the_header(run, server):
    url = server.serve("/demo.gguf", DEMO)
    assert run("tokenize", "-m", url, "-f", __file__).stdout == run("tokenize", "-m", "demo", "-f", __file__).stdout


@pytest.mark.parametrize("endpoint", ["nowhere", "https://host:port"])
def test_an_endpoint_that_is_no_url(endpoint, run, hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    outcome = run("plan", "hf:org/tiny-GGUF:F16")
    assert outcome.code == 2
    assert "HF_ENDPOINT" in outcome.stderr


def test_batch_refuses_too(run, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Once"}\n')
    outcome = run("batch", "-m", "https://host/f.gguf", str(prompts), "-o", str(tmp_path / "out.jsonl"))
    assert outcome.code == 2
    assert "curl -L -O https://host/f.gguf" in outcome.stderr
