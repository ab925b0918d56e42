"""One file knows kinds of devices, and every verb and recipe takes the one that it is given."""

import io
import re
import tokenize

import pytest
import torch
from builders import MAKE, ROOT, TINY, run_here

import genkit
from genkit import cli, machine
from genkit.commands import train as train_command
from genkit.engine import kernels
from genkit.engine.precision import check_precision, weights_type
from genkit.models import classifier
from genkit.training import checkpoints, launch
from genkit.training.settings import RunSettings, parse
from genkit.vision.text2image import Placement, choose_placement

GIB = 1 << 30
VENDORS = re.compile(
    r"(?<![a-z])(cuda|mps|xpu|npu|hpu|mlu|musa|sdaa|neuron|rocm|hip|nvidia|nccl|xccl|hccl)(?![a-z])",
    re.I,
)
GPUS = ["cpu", "cuda:0", "cuda:1"]
MAC = ["cpu", "mps:0"]


def sources():
    return [*(ROOT / "genkit").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]


def test_no_vendor_is_named_outside_of_machine():
    found = []
    for path in sources():
        text = path.read_text()
        if path != ROOT / "genkit" / "machine.py" and VENDORS.search(text):
            tokens = tokenize.generate_tokens(io.StringIO(text).readline)
            named = [t for t in tokens if VENDORS.search(t.string) and t.type != tokenize.COMMENT]
            found += [f"{path.relative_to(ROOT)}:{t.start[0]}: {t.string[:60]}" for t in named]
    assert not found


# ---- names


@pytest.mark.parametrize(
    ("name", "present", "wanted"),
    [
        ("cpu", MAC, torch.device("cpu")),
        ("cuda", GPUS, torch.device("cuda")),
        ("cuda:1", GPUS, torch.device("cuda", 1)),
        ("mps", MAC, torch.device("mps")),
        ("mps:0", MAC, torch.device("mps", 0)),
    ],
)
def test_name_to_device(name, present, wanted):
    assert machine.name_to_device(name, present) == wanted


@pytest.mark.parametrize(
    ("name", "present"),
    [("cuda", MAC), ("cuda:2", GPUS), ("mps", GPUS), ("gpu", GPUS), ("cpu:0", MAC), ("", ["cpu"])],
)
def test_name_to_device_lists_what_there_is(name, present):
    with pytest.raises(ValueError, match=f"device: {name} .*{', '.join(present)}$"):
        machine.name_to_device(name, present)


def test_every_listed_device_is_found_by_its_name():
    assert machine.list_devices()[0] == "cpu"
    for name in machine.list_devices():
        assert str(machine.find_device(name)) == name
    assert str(machine.find_device()) in machine.list_devices()


def test_start_refuses_another_device_than_the_one_begun_on():
    here = machine.state().device
    machine.start(None)
    machine.start(here.type)
    assert machine.state().device == here
    with pytest.raises(ValueError, match="device: nowhere is not there"):
        machine.start("nowhere")
    for name in set(machine.list_devices()) - {str(machine.find_device())}:
        with pytest.raises(ValueError, match=f"device: {name}, but this process has begun on"):
            machine.start(name)


# ---- memory, precision, random numbers


CUDA, METAL = torch.device("cuda", 0), torch.device("mps", 0)


def test_precision_follows_the_device(monkeypatch):
    assert weights_type("bfloat16", machine.CPU) is torch.float32  # products alone are in bfloat16
    assert weights_type("bfloat16", CUDA) is torch.bfloat16
    assert weights_type(None, METAL) is torch.float32
    check_precision("float16", None, METAL)
    check_precision(None, "int8", machine.CPU)
    for dtype, quantize, device in (("float16", None, machine.CPU), (None, "int8", METAL)):
        with pytest.raises(ValueError, match=dtype or quantize):
            check_precision(dtype, quantize, device)
    monkeypatch.setattr(kernels, "available", lambda: False)  # installed without a compiler
    with pytest.raises(ValueError, match="quantize='int4' needs the compiled kernels"):
        check_precision(None, "int4", machine.CPU, ("int8", "int4"))
    assert not machine.can_compile(METAL)


def test_kind_of_a_device():
    kinds = [machine.kind(device) for device in (machine.CPU, CUDA, METAL)]
    assert kinds == ["cpu", "accelerator", "accelerator"]
    assert [machine.has_own_memory(device) for device in (CUDA, METAL)] == [True, False]


@pytest.mark.parametrize(
    ("parameters", "device", "free", "half", "own", "wanted"),
    [
        (10**9, machine.CPU, 16, torch.bfloat16, False, (torch.float32, False)),
        (4 * 10**9, machine.CPU, 16, torch.bfloat16, False, (torch.bfloat16, False)),
        (10**9, CUDA, 8, torch.bfloat16, True, (torch.bfloat16, False)),
        (10**9, CUDA, 8, torch.float16, True, (torch.float16, False)),
        (4 * 10**9, CUDA, 8, torch.bfloat16, True, (torch.bfloat16, True)),
        (4 * 10**9, METAL, 8, torch.bfloat16, False, (torch.bfloat16, False)),
        (12 * 10**9, CUDA, 80, torch.bfloat16, True, (torch.bfloat16, False)),
    ],
)
def test_choose_placement_by_parameters_and_memory(parameters, device, free, half, own, wanted):
    placement = choose_placement(parameters, device, free * GIB, half, own)
    assert placement == Placement(device, *wanted)


def test_fork_random_state_restores_it():
    torch.manual_seed(0)
    with machine.fork_random_state():
        torch.manual_seed(5)
        torch.rand(3)
    forked = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(forked, torch.rand(3))


def test_memory_is_counted_in_bytes():
    assert machine.free_memory(machine.CPU) > 1 << 20
    assert machine.peak_memory() > 1 << 20
    machine.empty_cache(machine.CPU)


def test_shifts_of_a_step_are_drawn_on_the_cpu():
    """On the meta device nothing can be drawn, and random state would not move."""
    torch.manual_seed(0)
    classifier.random_shift(torch.zeros(4, 1, 8, 8, device="meta"), 2)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    classifier.random_shift(torch.zeros(4, 1, 8, 8), 2)
    assert torch.equal(drawn, torch.rand(3))


def test_packed_states_distinguish_views_of_one_storage():
    base = torch.arange(6.0)
    tensors: dict[str, torch.Tensor] = {}
    tree = checkpoints.pack([base[:2], base[2:4], base[:2]], tensors)
    assert tree == [{"tensor": "/0"}, {"tensor": "/1"}, {"tensor": "/0"}]


# ---- recipes


def no_preset(settings, device):
    return {"batch_size": 2, "mixed_precision": "no", "compile": False}


def test_recipes_take_a_device_that_is_no_part_of_the_run(tmp_path):
    assert parse(RunSettings, no_preset, ["--device", machine.state().device.type]).device
    with pytest.raises(ValueError, match="device: nowhere is not there; this machine has cpu"):
        parse(RunSettings, no_preset, ["--device", "nowhere"])


def test_processes_follow_the_device(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert train_command.count_processes(None, "cpu") == 1
    assert train_command.count_processes(3, "cpu") == 3
    with pytest.raises(ValueError, match="device: nowhere"):
        train_command.count_processes(2, "nowhere")


@pytest.mark.parametrize("name", launch.SHARDED)
def test_sharded_launches_are_refused(monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=f"distributed_type: {name} is not supported"):
        launch.check_launch()


# ---- verbs and commands

REFUSED = {
    "generate": lambda **o: genkit.generate("a", **o),
    "stream": lambda **o: list(genkit.stream("a", **o)),
    "next_tokens": lambda **o: genkit.next_tokens("a", **o),
    "temperature_series": lambda **o: genkit.temperature_series("a", **o),
    "beam_tree": lambda **o: genkit.beam_tree("a", **o),
    "alternatives": lambda **o: genkit.alternatives("ab", **o),
    "perplexity": lambda **o: genkit.perplexity("ab", **o),
    "rescore": lambda **o: genkit.rescore([("a", -1.0)], **o),
    "correct": lambda **o: genkit.correct("a", lexicon=["a"], **o),
    "answer": lambda **o: genkit.answer("a?", "b", **o),
    "compare": lambda **o: genkit.compare(reference="b", prompts=["a"], reward="length=3", **o),
    "search_errors": lambda **o: genkit.search_errors(pairs=[("a", "b")], **o),
}
IMAGES = {
    "load": lambda **o: genkit.load(**o),
    "sample_table": lambda **o: genkit.sample_table(**o),
    "fill": lambda **o: genkit.fill("a.csv", **o),
    "features": lambda **o: genkit.features("a.csv", **o),
    "anomalies": lambda **o: genkit.anomalies("a.csv", **o),
    "sample": lambda **o: genkit.sample(**o),
    "imagine": lambda **o: genkit.imagine("a fox", **o),
    "evaluate": lambda **o: genkit.evaluate(**o),
    "stylize": lambda **o: genkit.stylize("a.png", **o),
    "translate": lambda **o: genkit.translate("a.png", **o),
    "attribute": lambda **o: genkit.attribute("a.png", **o),
    "attack": lambda **o: genkit.attack("a.png", **o),
    "dream": lambda **o: genkit.dream("a.png", **o),
    "visualize": lambda **o: genkit.visualize(**o),
}


@pytest.mark.parametrize("verb", sorted(set(genkit.__all__) - {"push", "save"}))
def test_every_verb_refuses_a_device_before_it_loads(verb):
    with pytest.raises(ValueError, match="device: nowhere is not there; this machine has cpu"):
        (REFUSED | IMAGES)[verb](model="no/such/model", device="nowhere")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, make in MAKE.items():
            make(folder / name)
    return folder


@pytest.mark.parametrize("verb", REFUSED)
def test_a_loaded_model_takes_no_device(saved, verb):
    folder = saved / ("answers" if verb == "answer" else "text")
    loaded = genkit.load(folder, device="cpu")
    assert loaded.model.device == machine.CPU and genkit.load(folder, device="cpu") is loaded
    with pytest.raises(ValueError, match="device='cpu' is for loading"):
        REFUSED[verb](model=loaded, device="cpu")


def test_commands_take_a_device(saved, tmp_path, capsys):
    (tmp_path / "text").write_text("The alpha is omega.")
    text, picture = ["--model", str(saved / "text")], str(tmp_path / "samples.png")
    for words in (
        ["generate", "ab", *text, "--max-new-tokens", "2"],
        ["explain", "ab", *text, "--top", "2"],
        ["answer", "Where?", "--context", str(tmp_path / "text"), "--model", saved / "answers"],
        ["sample", saved / "gan", "-n", "1", "--output", picture],
        ["evaluate", saved / "text", "--data", str(tmp_path / "text")],
    ):
        cli.main([*map(str, words), "--device", "cpu"])
        assert capsys.readouterr().out
        with pytest.raises(SystemExit):
            cli.main([*map(str, words), "--device", "nowhere"])
        assert "device: nowhere is not there; this machine has cpu" in capsys.readouterr().err


def test_recipes_train_and_resume_on_a_named_device(text_file, tmp_path):
    """The device that it began on may be gone."""
    words = [*TINY, "--output_dir", tmp_path, "--text", text_file]
    run_here("train_charlm", *words, "--max_steps", "2", "--device", "cpu")
    record = tmp_path / "run.json"
    record.write_text(record.read_text().replace('"device": "cpu"', '"device": "cuda:7"'))
    assert "cuda:7" in record.read_text()
    run_here("train_charlm", "--output_dir", tmp_path, "--resume", "--device", "cpu")
