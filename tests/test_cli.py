import json
import os
import subprocess
import sys
from pathlib import Path

GENKIT = str(Path(sys.executable).parent / "genkit")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([GENKIT, *words], capture_output=True, text=True)


def test_importing_and_asking_for_help_loads_no_torch():
    code = "import sys, json, genkit; genkit.__version__; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy"} & set(json.loads(done.stdout))
    code = (
        "import sys, genkit.cli\ntry:\n    genkit.cli.main(['--help'])\nexcept SystemExit:\n"
        "    print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


def test_help_shows_the_commands():
    assert "generate" in run("--help").stdout
    assert "--temperature" in run("generate", "--help").stdout


def test_generate_prints_the_text(trained):
    words = ("generate", "the ", "rain", "--model", str(trained), "--max-new-tokens", "9")
    done = run(*words, "--temperature", "0.5", "--seed", "1")
    assert done.returncode == 0 and done.stderr == ""
    import genkit

    records = genkit.generate(
        ["the ", "rain"], model=trained, max_new_tokens=9, temperature=0.5, seed=1
    )
    assert done.stdout == f"{records[0]}\n\n{records[1]}\n"


def test_one_text_is_printed_while_it_is_written(trained):
    words = (
        "generate",
        "the ",
        "--model",
        str(trained),
        "--strategy",
        "beam",
        "--stop",
        "e",
        "--eager",
    )
    done = run(*words, "--max-new-tokens", "20", "--bad-words", "x")
    assert done.returncode == 0 and done.stderr == ""
    import genkit

    options = {"strategy": "beam", "stop": ["e"], "max_new_tokens": 20, "bad_words": ["x"]}
    assert done.stdout == f"{genkit.generate('the ', model=trained, **options)}\n"


def test_without_a_model_or_a_network_the_error_says_what_would_do(tmp_path):
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    words = [GENKIT, "generate", "I am a"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: model: cannot load 'gpt2'")
    assert "recipes/train_charlm.py --output_dir NAME" in done.stderr


def test_errors_are_one_line(trained):
    done = run("generate", "the ", "--model", str(trained), "--temperature", "0")
    assert done.returncode == 2
    assert done.stderr.startswith("error: temperature must be above 0, got 0")
    assert len(done.stderr.splitlines()) == 1
    assert run("generate").returncode == 2
