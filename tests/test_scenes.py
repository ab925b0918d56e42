"""Scenes of digits: they show what captions say, and training sees none that are held out."""

import itertools

import numpy as np
import pyarrow.parquet as pq
import pytest

from genkit.data import scenes
from genkit.data.images import load_images
from genkit.data.scenes import CELL, COLOURS, PLACES, Description, Item, parse_caption

INK = {digit: np.full((1, CELL, CELL), 255, np.uint8) for digit in range(10)}


def descriptions(count: int = 300) -> list[Description]:
    rng = np.random.default_rng(0)
    return [scenes.draw_description(rng) for _ in range(count)]


def test_captions_are_read_as_what_they_say():
    drawn = descriptions()
    assert {each.kind for each in drawn} == set(scenes.KINDS)
    for each in drawn:
        assert parse_caption(str(each)) == each
    assert str(Description(Item(6, "red"), 2)) == "two red sixes"
    seven = Description(Item(3, "red"), 1, "left of", Item(7, "blue"))
    assert parse_caption("a red three left of a blue seven") == seven


@pytest.mark.parametrize(
    "caption",
    ["", "a red", "a pink three", "two red three", "a red threes", "two red sixs", "a red three "],
)
def test_other_texts_are_refused(caption):
    with pytest.raises(ValueError, match="caption must be that of a scene, got"):
        parse_caption(caption)


def test_what_is_placed_is_shown_and_nothing_else_is():
    rng = np.random.default_rng(1)
    for each in descriptions():
        scene = scenes.place_items(each, rng)
        assert each.is_shown(scene)
        free = next((cell for cell in range(4) if cell not in scene), None)
        if free is not None:
            assert not each.is_shown(scene | {free: each.item})
        cell = next(iter(scene))
        other = Item((scene[cell].digit + 1) % 10, scene[cell].colour)
        assert not each.is_shown(scene | {cell: other})
        assert not each.is_shown({k: item for k, item in scene.items() if k != cell})


def test_a_pair_in_the_other_order_is_not_what_was_said():
    first, second = Item(3, "red"), Item(7, "blue")
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for relation in PLACES:
        scene = scenes.place_items(
            Description(first, 1, relation, second), np.random.default_rng(0)
        )
        right = [r for r in PLACES if Description(first, 1, r, second).is_shown(scene)]
        assert right == [relation]
        assert Description(second, 1, opposite[relation], first).is_shown(scene)


def test_a_drawn_scene_has_each_item_in_its_cell_and_colour():
    scene = {1: Item(3, "red"), 2: Item(7, "blue")}
    image = scenes.draw_scene(scene, INK, np.random.default_rng(0))
    assert image.shape == (2 * CELL, 2 * CELL, 3)
    corners = image[:: 2 * CELL - 1, :: 2 * CELL - 1].reshape(4, 3)
    black = (0, 0, 0)
    assert corners.tolist() == [list(c) for c in (black, COLOURS["red"], COLOURS["blue"], black)]


def test_a_digit_fills_the_middle_of_its_cell():
    image = np.zeros((28, 28), np.uint8)
    image[20:28, 1:3] = 200
    fitted = scenes.fit_digit(image)
    rows, columns = (np.flatnonzero(fitted.any(axis)) for axis in (1, 0))
    assert fitted.shape == (CELL, CELL) and len(rows) == scenes.INK
    assert abs(rows[0] + rows[-1] - CELL + 1) <= 1 and abs(columns[0] + columns[-1] - CELL + 1) <= 1


def test_each_digit_is_in_one_pair_that_never_meets():
    pairs = [
        (a, b)
        for a, b in itertools.combinations_with_replacement(range(10), 2)
        if Description(Item(a, "red"), 1, "above", Item(b, "red")).unseen
    ]
    assert len(pairs) == 5 and sorted(itertools.chain(*pairs)) == list(range(10))


def test_written_scenes_keep_the_parts_apart(tmp_path):
    scenes.write_scenes(tmp_path / "a", count=300, test_count=40)
    scenes.write_scenes(tmp_path / "b", count=300, test_count=40)
    texts = {}
    for part in ("train", "test", "unseen"):
        file = tmp_path / "a" / f"{part}.parquet"
        assert file.read_bytes() == (tmp_path / "b" / f"{part}.parquet").read_bytes()
        texts[part] = [parse_caption(text) for text in pq.read_table(file)["text"].to_pylist()]
        assert load_images(file, label_column="text").size == (3, 2 * CELL, 2 * CELL)
    assert [len(rows) for rows in texts.values()] == [300, 40, 40]
    assert not any(each.held_out for each in texts["train"])
    assert all(each.held_out and not each.unseen for each in texts["test"])
    assert all(each.unseen for each in texts["unseen"])


def test_digits_of_other_classes_are_refused(tmp_path):
    (tmp_path / "pictures" / "cats").mkdir(parents=True)
    for i in range(3):
        image = scenes.Image.fromarray(np.full((8, 8), 60 * i, np.uint8))
        image.save(tmp_path / "pictures" / "cats" / f"{i}.png")
    with pytest.raises(ValueError, match=r"--digits .* has 1 classes; give 10 digits"):
        scenes.write_scenes(tmp_path, digits=str(tmp_path / "pictures"))
