"""Boxes and points in the forms that packs send them in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .nodes_pack import pack_module

prompts = pack_module("nodes.prompts")
errors = pack_module("far_train.utils.errors")
Prompt, ConfigError, SubjectError = prompts.Prompt, errors.ConfigError, errors.SubjectError
CORNERS, SIZED = prompts.BOX_FORMATS
BOX = (10.0, 20.0, 40.0, 60.0)


@pytest.mark.parametrize(
    "value, box_format",
    [
        ((10, 20, 40, 60), CORNERS),
        ([10, 20, 30, 40], SIZED),
        ([[10, 20, 40, 60]], CORNERS),
        (torch.tensor([[10, 20, 40, 60]]), CORNERS),
        (np.array([10, 20, 30, 40]), SIZED),
        ({"x": 10, "y": 20, "width": 30, "height": 40}, CORNERS),
        ({"x": 10, "y": 20, "w": 30, "h": 40}, CORNERS),
        ({"startX": 10, "startY": 20, "endX": 40, "endY": 60}, SIZED),
        ({"x1": 10, "y1": 20, "x2": 40, "y2": 60}, SIZED),
        ("[10, 20, 40, 60]", CORNERS),
        ([np.int64(10), np.float32(20), 40, 60], CORNERS),
    ],
)
def test_boxes_in_all_forms(value, box_format):
    assert prompts.read_boxes([value], box_format) == [BOX]


def test_lists_of_boxes_keep_their_order():
    nested = [[[10, 20, 40, 60], [1, 2, 3, 4]], {"x0": 5, "y0": 6, "x1": 7, "y1": 8}]
    assert prompts.read_boxes(nested) == [BOX, (1, 2, 3, 4), (5, 6, 7, 8)]
    assert prompts.read_boxes([None, [], ""]) == []


@pytest.mark.parametrize(
    "value",
    [
        [1, 2, 3],
        5,
        [1, 2, 3, 4, 5],
        {"x": 1, "y": 2},
        {"x0": "a", "y0": 1, "x1": 2, "y1": 3},
    ],
)
def test_what_is_no_box_is_refused(value):
    with pytest.raises(ConfigError, match="box: "):
        prompts.read_boxes([value])


def test_nothing_given_is_an_automatic_prompt_for_each():
    assert prompts.read_prompts(2, [], CORNERS, [""]) == [Prompt(), Prompt()]


def test_a_points_editor_that_was_left_empty_asks_for_nothing():
    """KJNodes' editor: no negative points are the JSON text of "", and a box that nobody drew has no sides."""
    sent = [[{}], [{"startX": None, "startY": None, "endX": None, "endY": None}]]
    for box in sent:
        found = prompts.read_prompts(2, [box], CORNERS, ['[{"x": 3, "y": 4}]'], negative=['""'])
        assert found == [Prompt(points=((3, 4, 1),))] * 2


def test_a_photo_of_several_may_have_no_box_and_no_points():
    other = {"startX": None, "startY": None, "endX": None, "endY": None}
    for nothing in (None, other, ""):
        for sent in ([nothing, BOX], [[nothing, BOX]]):
            assert prompts.read_prompts(2, sent, CORNERS, [""]) == [Prompt(), Prompt(BOX)]
    texts = ["[[1, 2]]", "", "[[5, 6]]"]
    found = prompts.read_prompts(3, [], CORNERS, texts, negative=["", "", "[[9, 9]]"])
    assert found == [Prompt(points=((1, 2, 1),)), Prompt(), Prompt(points=((5, 6, 1), (9, 9, 0)))]
    with pytest.raises(ConfigError, match="3 lists of points for 2 photos"):
        prompts.read_prompts(2, [], CORNERS, texts)


def test_points_as_shares_of_the_sides_are_refused():
    with pytest.raises(ConfigError, match=r"\(0.25, 1.0\) is a share .*switch 'normalize' off"):
        prompts.read_prompts(1, [], CORNERS, ['[{"x": 0.25, "y": 1}]'])
    assert prompts.read_prompts(1, [], CORNERS, ["[[1, 0]]"]) == [Prompt(points=((1, 0, 1),))]


def test_a_box_that_reaches_a_little_out_of_the_photo_is_cut_at_its_edges():
    """SAM3 Detect's box of a dog that the photo crops: center and size are estimated, its edges are not."""
    points = ((3, 4, 1),)
    cut = prompts.cut_at_edges(Prompt((-2.5, 10.0, 101.5, 50.2), points), 100, 50)
    assert cut == Prompt((0, 10, 100, 50), points)
    for box in ((-6, 10, 50, 40), (10, 10, 50, 53), (-3, 10, -1, 40), (100, 10, 101, 40)):
        assert prompts.cut_at_edges(Prompt(box), 100, 50) == Prompt(box)
    assert prompts.cut_at_edges(Prompt(), 100, 50) == Prompt()


def test_one_box_serves_all_photos_and_several_one_each():
    assert prompts.read_prompts(2, [BOX], CORNERS, [""]) == [Prompt(BOX)] * 2
    other = (1.0, 2.0, 3.0, 4.0)
    assert prompts.read_prompts(2, [[BOX, other]], CORNERS, [""]) == [Prompt(BOX), Prompt(other)]
    with pytest.raises(ConfigError, match="2 boxes for 3 photos"):
        prompts.read_prompts(3, [BOX, other], CORNERS, [""])


def detected(*scores: float) -> list[dict]:
    """What a detector finds in a photo; each box begins at its score."""
    return [{"x": score, "y": 0, "width": 10, "height": 10, "label": "dog", "score": score} for score in scores]


@pytest.mark.parametrize("send", [lambda frames: [frames], lambda frames: [[frame] for frame in frames]])
def test_of_a_detectors_boxes_each_photo_gets_its_own_best(send):
    """Flattened, two boxes in one photo and none in the next would be taken for one each."""
    frames = [detected(0.5), detected(0.25, 0.75), []]
    expected = [Prompt((0.5, 0, 10.5, 10)), Prompt((0.75, 0, 10.75, 10)), Prompt()]
    assert prompts.read_prompts(3, send(frames), CORNERS, [""]) == expected
    assert prompts.read_prompts(1, send([detected(0.25, 0.75)]), CORNERS, [""]) == expected[1:2]
    with pytest.raises(ConfigError, match="boxes of 3 photos for 2 photos"):
        prompts.read_prompts(2, send(frames), CORNERS, [""])
    numbered = [Prompt(), Prompt((0.75, 0, 10.75, 10)), Prompt()]
    assert prompts.read_prompts(3, send(frames), CORNERS, [""], index=2) == numbered


SMALLER = (1.0, 2.0, 3.0, 4.0)


@pytest.mark.parametrize(
    "sent",
    [
        [[[SMALLER, BOX], [SMALLER]]],
        [[[list(SMALLER), list(BOX)]], [[list(SMALLER)]]],
        [[torch.tensor([SMALLER, BOX]), torch.tensor([SMALLER])]],
        [[np.array([SMALLER, BOX])], [np.array([SMALLER])]],
    ],
)
def test_of_several_boxes_without_scores_the_largest_or_the_numbered_one(sent):
    assert prompts.read_prompts(2, sent, CORNERS, [""]) == [Prompt(BOX), Prompt(SMALLER)]
    assert prompts.read_prompts(2, sent, CORNERS, [""], index=1) == [Prompt(SMALLER), Prompt(SMALLER)]
    assert prompts.read_prompts(2, sent, CORNERS, [""], index=2) == [Prompt(BOX), Prompt()]
    assert prompts.unscored(prompts.boxes_by_photo(sent, 2)) == [0]


@pytest.mark.parametrize("sent", [[[SMALLER, BOX]], [SMALLER, BOX], [[[SMALLER, BOX]]], [torch.tensor([SMALLER, BOX])]])
def test_all_boxes_belong_to_a_single_photo(sent):
    assert prompts.read_prompts(1, sent, CORNERS, [""]) == [Prompt(BOX)]
    assert [len(frame) for frame in prompts.boxes_by_photo(sent, 1)] == [2]
    assert prompts.boxes_by_photo([], 1) == []


def test_the_hosts_dicts_of_width_and_height_are_compared_by_area():
    wide, tall = ({"x": 1, "y": 2, "width": w, "height": h} for w, h in ((30, 2), (8, 9)))
    assert prompts.read_prompts(1, [[wide, tall]], CORNERS, [""]) == [Prompt((1, 2, 9, 11))]


def test_points_of_a_points_editor_positive_and_negative():
    """KJNodes' form, which SAM3 Detect takes too: two texts without labels."""
    positive, negative = '[{"x": 5, "y": 6}, {"x": 7, "y": 8}]', '[{"x": 1, "y": 2}]'
    expected = Prompt(None, ((5, 6, 1), (7, 8, 1), (1, 2, 0)))
    assert prompts.read_prompts(2, [], CORNERS, [positive], negative=[negative]) == [expected] * 2
    keyed = prompts.read_prompts(2, [BOX], CORNERS, ['{"2": [[5, 6]]}'], negative=["[]", negative])
    assert keyed == [Prompt(BOX), Prompt(BOX, ((5, 6, 1), (1, 2, 0)))]
    with pytest.raises(ConfigError, match="negative_points: there are 2 lists of points for 3 photos"):
        prompts.read_prompts(3, [], CORNERS, [positive], negative=[negative, negative])
    with pytest.raises(SubjectError, match="all mark background"):
        prompts.read_prompts(1, [], CORNERS, [""], negative=[negative])


@pytest.mark.parametrize(
    "text, points",
    [
        ("[[5, 6]]", ((5, 6, 1),)),
        ("[5, 6]", ((5, 6, 1),)),
        ("[[5, 6, 1], [7, 8, 0]]", ((5, 6, 1), (7, 8, 0))),
        ('[{"x": 5, "y": 6}, {"x": 7, "y": 8, "label": 0}]', ((5, 6, 1), (7, 8, 0))),
        ("[]", ()),
    ],
)
def test_points_in_all_forms(text, points):
    assert prompts.read_prompts(2, [], CORNERS, [text]) == [Prompt(None, points)] * 2


def test_one_text_per_photo():
    found = prompts.read_prompts(2, [], CORNERS, ["[[5, 6]]", "[[7, 8]]"])
    assert found == [Prompt(None, ((5, 6, 1),)), Prompt(None, ((7, 8, 1),))]


def test_photos_by_number_or_name():
    text = '{"2": [[5, 6]], "garden": {"box": [1, 2, 3, 4], "points": [[2, 3, 1]]}}'
    found = prompts.read_prompts(3, [BOX], CORNERS, [text], ["home", "street", "garden"])
    assert found == [Prompt(BOX), Prompt(BOX, ((5, 6, 1),)), Prompt((1, 2, 3, 4), ((2, 3, 1),))]


@pytest.mark.parametrize(
    "text, reason",
    [
        ("5, 6", "is not JSON"),
        ("7", "no list of points"),
        ('[["a", 2]]', "is no point"),
        ("[[1]]", "is no point"),
        ('{"4": [[1, 2]]}', "there is no photo '4'; use the numbers 1 to 3"),
        ('{"1": {"bx": 1}}', "unknown key"),
    ],
)
def test_bad_points_are_refused_with_an_example(text: str, reason: str):
    with pytest.raises(ConfigError, match=reason):
        prompts.read_prompts(3, [], CORNERS, [text])


def test_a_photo_whose_name_is_anothers_number_is_told():
    names = ["0", "1", "2", "2"]
    for key, which in (("1", "1 and 2"), ("2", "2 and 3 and 4")):
        with pytest.raises(ConfigError, match=f"'{key}' may be each of the photos {which}; rename them"):
            prompts.read_prompts(4, [], CORNERS, [f'{{"{key}": [[1, 2]]}}'], names)
    found = prompts.read_prompts(4, [], CORNERS, ['{"0": [[1, 2]]}'], names)
    assert found == [Prompt(points=((1, 2, 1),)), *[Prompt()] * 3]
    with pytest.raises(ConfigError, match="two entries for photo 1; the second is 'home'"):
        prompts.read_prompts(2, [], CORNERS, ['{"1": [[1, 2]], "home": [[3, 4]]}'], ["home", "street"])


def test_an_impossible_box_is_refused():
    with pytest.raises(SubjectError, match="x0 < x1"):
        prompts.read_prompts(1, [[40, 20, 10, 60]], CORNERS, [""])
