import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genkit import checkpoints

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**53), 2**53),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(st.integers(), st.text(max_size=3)), inner, max_size=3),
    ),
    max_leaves=10,
)


def state(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    weights = torch.randn(64, 64, generator=generator)
    return {"model": {"a": weights, "tied": weights}, "progress": {"step": step}}


@given(TREES)
def test_any_tree_comes_back(tree):
    packed = json.loads(json.dumps(checkpoints.pack(tree, {})))
    assert checkpoints.unpack(packed, {}) == tree


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon", "SGD"])
def test_an_optimizer_goes_on_as_if_nothing_happened(tmp_path, optimizer):
    def build():
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 8, bias=False)
        return model, getattr(torch.optim, optimizer)(model.parameters(), lr=0.1, weight_decay=0.1)

    def step(model, optimizer):
        model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, rule = build()
    step(model, rule)
    saved = {"model": model.state_dict(), "optimizer": rule.state_dict()}
    path = checkpoints.save(tmp_path, 1, saved, keep=1)
    step(model, rule)
    again, other = build()
    loaded = checkpoints.load(path)
    again.load_state_dict(loaded["model"])
    other.load_state_dict(loaded["optimizer"])
    step(again, other)
    assert torch.equal(model.weight, again.weight)


def test_tied_weights_are_written_once(tmp_path):
    path = checkpoints.save(tmp_path, 1, state(1), keep=1)
    assert (path / checkpoints.TENSORS).stat().st_size < 1.5 * 64 * 64 * 4
    loaded = checkpoints.load(path)["model"]
    assert torch.equal(loaded["a"], state(1)["model"]["a"])
    assert torch.equal(loaded["a"], loaded["tied"])


def test_what_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(TypeError, match="state/a is a set"):
        checkpoints.save(tmp_path, 1, {"a": {1}}, keep=1)


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 11):
        checkpoints.save(tmp_path, step, state(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000011"]
    assert checkpoints.newest(tmp_path) == (tmp_path / "step-00000011", [])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [flip_a_bit, cut_short, Path.unlink])
@pytest.mark.parametrize("name", [checkpoints.TENSORS, checkpoints.STATE, checkpoints.MANIFEST])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, harm, name):
    good = checkpoints.save(tmp_path, 1, state(1), keep=5)
    bad = checkpoints.save(tmp_path, 2, state(2), keep=5)
    harm(bad / name)
    found, problems = checkpoints.newest(tmp_path)
    assert found == good
    assert len(problems) == 1 and str(bad) in problems[0] and "damaged" in problems[0]
    with pytest.raises(checkpoints.CheckpointError, match="damaged"):
        checkpoints.load(bad)
    checkpoints.save(tmp_path, 2, state(2), keep=5)
    assert checkpoints.newest(tmp_path) == (bad, [])


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_checkpoints_never_push_out_good_ones(tmp_path, keep):
    for step in (30, 40, 45):
        checkpoints.save(tmp_path, step, state(step), keep=5)
    flip_a_bit(tmp_path / "step-00000045" / checkpoints.TENSORS)
    flip_a_bit(tmp_path / "step-00000040" / checkpoints.TENSORS)
    found, problems = checkpoints.newest(tmp_path)
    assert found.name == "step-00000030" and len(problems) == 2
    checkpoints.save(tmp_path, 35, state(35), keep=keep)
    assert checkpoints.newest(tmp_path) == (tmp_path / "step-00000035", [])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000030", "step-00000035"][-keep:]


def test_every_single_flipped_byte_is_found(tmp_path):
    path = checkpoints.save(tmp_path, 1, {"a": torch.ones(2)}, keep=1)
    for name in (checkpoints.TENSORS, checkpoints.STATE):
        whole = (path / name).read_bytes()
        for i in range(len(whole)):
            (path / name).write_bytes(whole[:i] + bytes([whole[i] ^ 0x80]) + whole[i + 1 :])
            assert checkpoints.problem(path) is not None
        (path / name).write_bytes(whole)
    assert checkpoints.problem(path) is None


def test_leftovers_of_a_killed_process_are_swept(tmp_path):
    checkpoints.save(tmp_path, 1, state(1), keep=1)
    (tmp_path / ".writing-step-00000002").mkdir()
    (tmp_path / ".deleting-step-00000000").mkdir()
    checkpoints.clean(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from genkit import checkpoints
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    checkpoints.save(folder, 2, {"a": torch.ones(10_000), "b": ["x" * 10] * 5000}, keep=1)
except checkpoints.CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [50, 5_000, 45_000])
def test_a_refusing_disk_leaves_the_earlier_checkpoint(tmp_path, limit):
    good = checkpoints.save(tmp_path, 1, {"a": torch.ones(4)}, keep=1)
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(limit)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "step-00000002" in told and "intact" in told
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoints.newest(tmp_path) == (good, [])
