import json
import os
from pathlib import Path

import pytest
import torch
from builders import full_disk, listing
from hypothesis import given
from hypothesis import strategies as st

from genkit.training import checkpoints

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
    path = checkpoints.save_checkpoint(tmp_path, 1, saved, keep=1)
    step(model, rule)
    again, other = build()
    loaded = checkpoints.load_checkpoint(path)
    again.load_state_dict(loaded["model"])
    other.load_state_dict(loaded["optimizer"])
    step(again, other)
    assert torch.equal(model.weight, again.weight)


def test_tied_weights_are_written_once(tmp_path):
    path = checkpoints.save_checkpoint(tmp_path, 1, state(1), keep=1)
    assert (path / checkpoints.TENSORS).stat().st_size < 1.5 * 64 * 64 * 4
    loaded = checkpoints.load_checkpoint(path)["model"]
    assert torch.equal(loaded["a"], state(1)["model"]["a"])
    assert torch.equal(loaded["a"], loaded["tied"])


def test_what_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(TypeError, match="state/a is a set"):
        checkpoints.save_checkpoint(tmp_path, 1, {"a": {1}}, keep=1)


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 11):
        checkpoints.save_checkpoint(tmp_path, step, state(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000011"]
    assert checkpoints.find_newest(tmp_path) == (tmp_path / "step-00000011", [])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [flip_a_bit, cut_short, Path.unlink])
@pytest.mark.parametrize("name", [checkpoints.TENSORS, checkpoints.STATE, checkpoints.MANIFEST])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, harm, name):
    good = checkpoints.save_checkpoint(tmp_path, 1, state(1), keep=5)
    bad = checkpoints.save_checkpoint(tmp_path, 2, state(2), keep=5)
    harm(bad / name)
    found, problems = checkpoints.find_newest(tmp_path)
    assert found == good
    assert len(problems) == 1 and str(bad) in problems[0] and "damaged" in problems[0]
    with pytest.raises(checkpoints.CheckpointError, match="damaged"):
        checkpoints.load_checkpoint(bad)
    checkpoints.save_checkpoint(tmp_path, 2, state(2), keep=5)
    assert checkpoints.find_newest(tmp_path) == (bad, [])


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_checkpoints_never_push_out_good_ones(tmp_path, keep):
    for step in (30, 40, 45):
        checkpoints.save_checkpoint(tmp_path, step, state(step), keep=5)
    flip_a_bit(tmp_path / "step-00000045" / checkpoints.TENSORS)
    flip_a_bit(tmp_path / "step-00000040" / checkpoints.TENSORS)
    found, problems = checkpoints.find_newest(tmp_path)
    assert found.name == "step-00000030" and len(problems) == 2
    checkpoints.save_checkpoint(tmp_path, 35, state(35), keep=keep)
    assert checkpoints.find_newest(tmp_path) == (tmp_path / "step-00000035", [])
    names = sorted(path.name for path in tmp_path.iterdir())
    aside = ["step-00000040.aside-1", "step-00000045.aside-1"]
    assert names == ["step-00000030", "step-00000035"][-keep:] + aside
    assert (tmp_path / aside[1] / checkpoints.STATE).exists()


def test_every_single_flipped_byte_is_found(tmp_path):
    path = checkpoints.save_checkpoint(tmp_path, 1, {"a": torch.ones(2)}, keep=1)
    for name in (checkpoints.TENSORS, checkpoints.STATE):
        whole = (path / name).read_bytes()
        for i in range(len(whole)):
            (path / name).write_bytes(whole[:i] + bytes([whole[i] ^ 0x80]) + whole[i + 1 :])
            assert checkpoints.find_damage(path) is not None
        (path / name).write_bytes(whole)
    assert checkpoints.find_damage(path) is None


def test_leftovers_of_a_killed_process_are_swept(tmp_path):
    checkpoints.save_checkpoint(tmp_path, 1, state(1), keep=1)
    (tmp_path / ".writing-step-00000002").mkdir()
    (tmp_path / ".deleting-step-00000000").mkdir()
    checkpoints.remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


# ---- what is no checkpoint


def foreign(folder: Path, good: Path) -> None:
    """Put files and folders of the user's own among checkpoints."""
    folder.mkdir(exist_ok=True)
    for name in ("step-00000010.bak", "step-00000010 (copy)", "step-10", "step-000000010", "mine"):
        (folder / name).mkdir()
        (folder / name / checkpoints.MANIFEST).write_text("mine")
    for name in ("step-00000009", "step-٠٠٠٠٠٠١٠", ".writing-notes", ".deleting-step-00000003"):
        (folder / name).write_text("mine")
    (folder / "step-00000008").symlink_to(good)
    (folder / ".writing-step-00000004").symlink_to(good)


def test_what_is_no_checkpoint_is_left_alone(tmp_path):
    elsewhere = checkpoints.save_checkpoint(tmp_path / "elsewhere", 8, state(8), keep=1)
    folder = tmp_path / "checkpoints"
    foreign(folder, elsewhere)
    before = listing(tmp_path)
    assert checkpoints.find_newest(folder) == (None, [])
    for step in (1, 2, 3):
        checkpoints.save_checkpoint(folder, step, state(step), keep=1)
    checkpoints.remove_leftovers(folder)
    assert checkpoints.find_newest(folder) == (folder / "step-00000003", [])
    after = listing(tmp_path)
    ours = {name for name in after if name.startswith("checkpoints/step-00000003")}
    assert {name: after[name] for name in after.keys() - ours} == before


@pytest.mark.parametrize("kind", ["file", "link", "damaged"])
def test_what_stands_in_a_checkpoints_place_is_set_aside(tmp_path, kind):
    place = tmp_path / "step-00000009"
    for turn in (1, 2):
        if kind == "file":
            place.write_text("mine")
        elif kind == "link":
            place.symlink_to("nowhere")
        else:
            checkpoints.save_checkpoint(tmp_path, 9, state(9), keep=1)
            flip_a_bit(place / checkpoints.TENSORS)
        checkpoints.save_checkpoint(tmp_path, 9, state(9), keep=1)
        assert checkpoints.find_newest(tmp_path) == (place, [])
        assert os.path.lexists(f"{place}.aside-{turn}")
        checkpoints.delete_checkpoint(place)
    for turn in range(3, checkpoints.ASIDE + 1):
        Path(f"{place}.aside-{turn}").mkdir()
    place.write_text("mine")
    with pytest.raises(checkpoints.CheckpointError, match="check this disk, and delete them"):
        checkpoints.save_checkpoint(tmp_path, 9, state(9), keep=1)
    assert place.read_text() == "mine"


def test_steps_of_nine_digits_come_after_those_of_eight(tmp_path):
    for step in (99_999_999, 100_000_000):
        checkpoints.save_checkpoint(tmp_path, step, state(1), keep=2)
    found, _ = checkpoints.find_newest(tmp_path)
    assert checkpoints.step_of(found) == 100_000_000


# ---- what cannot be read is not damaged


def a_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def a_share_that_is_away(path: Path) -> None:
    path.unlink()
    path.symlink_to("/mnt/away/file")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("harm", [a_loop, a_share_that_is_away])
@pytest.mark.parametrize("name", [checkpoints.TENSORS, checkpoints.STATE, checkpoints.MANIFEST])
def test_what_cannot_be_read_is_no_damage(tmp_path, harm, name):
    checkpoints.save_checkpoint(tmp_path, 1, state(1), keep=5)
    away = checkpoints.save_checkpoint(tmp_path, 2, state(2), keep=5)
    harm(away / name)
    before = listing(tmp_path)
    for look in (
        lambda: checkpoints.find_newest(tmp_path),
        lambda: checkpoints.load_checkpoint(away),
    ):
        with pytest.raises(checkpoints.CheckpointError, match="step-00000002 cannot be read"):
            look()
    assert listing(tmp_path) == before


def test_a_folder_that_cannot_be_read_is_not_empty(tmp_path):
    assert checkpoints.find_newest(tmp_path / "checkpoints") == (None, [])
    for target in ("checkpoints", "/mnt/away"):
        (tmp_path / "checkpoints").symlink_to(target)
        with pytest.raises(checkpoints.CheckpointError, match="checkpoints cannot be read"):
            checkpoints.find_newest(tmp_path / "checkpoints")
        (tmp_path / "checkpoints").unlink()


@pytest.mark.parametrize("name", ["", "step-00000002", "step-00000002/state.json"])
def test_what_nobody_may_read_is_no_damage(tmp_path, name):
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        checkpoints.save_checkpoint(folder, step, state(step), keep=5)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    (folder / name).chmod(0)
    try:
        if os.geteuid() == 0:  # who may read all
            os.seteuid(65534)
        with pytest.raises(checkpoints.CheckpointError) as refused:
            checkpoints.find_newest(folder)
    finally:
        os.seteuid(os.getuid())
    (folder / name).chmod(0o755)
    assert "cannot be read (Permission denied): nothing was changed" in str(refused.value)


@pytest.mark.parametrize("name", [checkpoints.TENSORS, checkpoints.STATE, checkpoints.MANIFEST])
def test_nobody_waits_for_a_pipe(tmp_path, name):
    checkpoint = checkpoints.save_checkpoint(tmp_path, 1, state(1), keep=5)
    a_pipe(checkpoint / name)
    with pytest.raises(checkpoints.CheckpointError, match=r"regular file|has 0 bytes"):
        checkpoints.load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "odd",
    [
        "3",
        "[]",
        '{"dict": 3}',
        '{"dict": [[["a"], 1]]}',
        '{"dict": [["a", {"tensor": "b"}]]}',
        '{"a": 1, "b": 2}',
        "{}",
        '{"nothing": 1}',
        "[" * 100_000,
        "NaN NaN",
    ],
)
def test_a_state_of_odd_shape_is_named(tmp_path, odd):
    checkpoint = checkpoints.save_checkpoint(tmp_path, 1, state(1), keep=5)
    (checkpoint / checkpoints.STATE).write_text(odd)
    sealed = {
        n: checkpoints._seal(checkpoint / n) for n in (checkpoints.TENSORS, checkpoints.STATE)
    }
    (checkpoint / checkpoints.MANIFEST).write_text(json.dumps(sealed))
    assert checkpoints.find_damage(checkpoint) is None
    with pytest.raises(checkpoints.CheckpointError, match="step-00000001 holds no state of a run"):
        checkpoints.load_checkpoint(checkpoint)


@pytest.mark.parametrize("odd", ["", "3", "[]", "{}", '{"state.json": 3}', "[" * 100_000, "\xff"])
def test_a_manifest_of_odd_shape_is_damage(tmp_path, odd):
    checkpoint = checkpoints.save_checkpoint(tmp_path, 1, state(1), keep=5)
    (checkpoint / checkpoints.MANIFEST).write_text(odd, encoding="latin-1")
    found, (problem,) = checkpoints.find_newest(tmp_path)
    assert found is None and "step-00000001 is damaged: manifest.json" in problem


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_have_the_modes_that_the_umask_says(tmp_path, umask):
    old = os.umask(umask)
    try:
        checkpoint = checkpoints.save_checkpoint(tmp_path, 1, state(1), keep=1)
    finally:
        os.umask(old)
    modes = {path.stat().st_mode & 0o777 for path in checkpoint.iterdir()}
    assert modes == {0o666 & ~umask}


@pytest.mark.parametrize("limit", [50, 5_000, 45_000])
def test_a_refusing_disk_leaves_the_earlier_checkpoint(tmp_path, limit):
    good = checkpoints.save_checkpoint(tmp_path, 1, {"a": torch.ones(4)}, keep=1)
    state = {"a": torch.ones(10_000), "b": ["x" * 10] * 5000}
    with full_disk(limit), pytest.raises(checkpoints.CheckpointError) as refused:
        checkpoints.save_checkpoint(tmp_path, 2, state, keep=1)
    assert "step-00000002" in str(refused.value) and "intact" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoints.find_newest(tmp_path) == (good, [])
