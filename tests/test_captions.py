"""Captions: every mention's words are found again, and what can't be found is named."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from far_train.data.captions import (
    COLLAGE_TEMPLATES,
    TEMPLATES,
    MentionSpans,
    Name,
    check_noun,
    check_token,
    join_phrases,
    locate_mentions,
    with_article,
    write_caption,
)
from far_train.utils.errors import CaptionError, TokenError

CORGI, CHOW, CAT, DOG = Name("dog", "<corgi-dog>"), Name("dog", "<chow>"), Name("cat", "<cat>"), Name("dog")
BEAR = Name("teddy bear", "<my-bear>")


def cut(caption: str, spans: tuple[MentionSpans, ...]) -> list[tuple[str | None, str]]:
    return [(caption[slice(*s.token)] if s.token else None, caption[slice(*s.noun)]) for s in spans]


# ---- tokens and nouns


@pytest.mark.parametrize("token", ["<a>", "<corgi-dog>", "<dog2>", "<my_dog-3>", f"<{'x' * 62}>"])
def test_good_tokens_pass(token):
    assert check_token(token) == token


@pytest.mark.parametrize(
    ("token", "fix"),
    [
        ("corgi", "<corgi>"),
        ("<Corgi Dog>", "<corgi-dog>"),
        ("<corgi", "<corgi>"),
        ("<a><b>", "<a-b>"),
        ("<corgi->", "<corgi>"),
        ("<corgi-dog>\n", "<corgi-dog>"),
        ("", "<my-dog>"),
        ("<>", "<my-dog>"),
        ("<ü>", "<my-dog>"),
        (f"<{'x' * 63}>", f"<{'x' * 60}>"),
    ],
)
def test_bad_tokens_come_with_a_good_one(token, fix):
    with pytest.raises(TokenError) as error:
        check_token(token)
    assert f"write it as {fix})" in str(error.value) and str(error.value).startswith("token: ")
    assert check_token(fix) == fix


@pytest.mark.parametrize("noun", ["dog", "teddy bear", "t-shirt", "dog's bowl", "robot 2"])
def test_good_nouns_pass(noun):
    assert check_noun(noun) == noun


@pytest.mark.parametrize(
    ("noun", "fix"),
    [("Dog", "dog"), ("<dog>", "dog"), (" dog", "dog"), ("teddy  bear", "teddy bear"), ("", "dog"), ("dog\n", "dog")],
)
def test_bad_nouns_come_with_a_good_one(noun, fix):
    with pytest.raises(CaptionError, match=f"such as '{fix}'"):
        check_noun(noun)
    assert check_noun(fix) == fix


# ---- writing


def test_articles():
    assert [with_article(w) for w in ("dog", "elephant", "<owl> owl", "owl")] == [
        "a dog",
        "an elephant",
        "a <owl> owl",
        "an owl",
    ]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([CORGI], "a <corgi-dog> dog"),
        ([CORGI, DOG], "a <corgi-dog> dog and a dog"),
        ([DOG, DOG], "a dog and another dog"),
        ([CORGI, CHOW, CAT], "a <corgi-dog> dog, a <chow> dog and a <cat> cat"),
        ([Name("owl"), CHOW, Name("owl"), BEAR], "an owl, a <chow> dog, another owl and a <my-bear> teddy bear"),
    ],
)
def test_lists_read_as_a_sentence_does(names, text):
    assert join_phrases(names) == text


def test_background_and_size_words_stand_behind_the_subjects():
    rng = np.random.default_rng(0)
    caption = write_caption([CORGI], rng, background="in a garden", size_word="far away")
    assert caption.endswith(" of a <corgi-dog> dog far away, in a garden")


def test_all_templates_of_a_kind_are_drawn():
    rng = np.random.default_rng(0)
    for collage, templates in ((False, TEMPLATES), (True, COLLAGE_TEMPLATES)):
        drawn = {write_caption([CORGI], rng, collage=collage) for _ in range(200)}
        assert drawn == {t.format("a <corgi-dog> dog") for t in templates}


# ---- finding


def test_generated_captions_are_found_again_for_thousands_of_draws():
    pool = [CORGI, CHOW, CAT, BEAR, DOG, Name("cat"), Name("teddy bear"), Name("hot dog"), Name("picture")]
    backgrounds = ("", "in a garden with a dog", "on a plain grey background", "in front of a <chow> poster")
    for seed in range(4000):
        rng = np.random.default_rng(seed)
        names = [pool[i] for i in rng.permutation(len(pool))[: rng.integers(1, 5)]]
        if Name("hot dog") in names and DOG in names:
            continue  # in a caption that people read, these two can't be told apart either
        background = str(rng.choice(backgrounds))
        caption = write_caption(
            names,
            rng,
            background=background,
            collage=bool(rng.random() < 0.5),
            size_word=str(rng.choice(["", "far away"])) if len(names) == 1 else "",
        )
        spans = locate_mentions(caption, names)
        assert cut(caption, spans) == [(n.token, n.noun) for n in names], caption
        places = [s for m in spans for s in (m.token, m.noun) if s]
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(places)), caption
        for name, span in zip(names, spans):
            # Each span is the mention itself, and not the same word in the template or the background.
            start = span.token[0] if span.token else span.noun[0]
            assert caption[:start].endswith(("a ", "an ", "another ")), caption
            assert span.noun[1] <= len(caption) - len(background), caption
            if name.token:
                assert span.noun[0] == span.token[1] + 1


@pytest.mark.parametrize("noun", ["photo", "picture", "image", "collage"])
def test_a_noun_that_templates_hold_is_found_where_the_subject_is(noun):
    for seed in range(100):
        rng = np.random.default_rng(seed)
        caption = write_caption([Name(noun)], rng, collage=seed % 2 == 0 and noun == "photo")
        (mention,) = locate_mentions(caption, [Name(noun)])
        assert mention.noun == (len(caption) - len(noun), len(caption)), caption


def test_two_dogs_of_one_caption_have_their_own_spans():
    caption = "a photo of a <chow> dog and a <corgi-dog> dog"
    chow, corgi = locate_mentions(caption, [CHOW, CORGI])
    assert (chow.noun, corgi.noun) == ((20, 23), (42, 45))
    first, second = locate_mentions("a dog and another dog", [DOG, DOG])
    assert (first.noun, second.noun) == ((2, 5), (18, 21)) and first.token is None


@pytest.mark.parametrize(
    ("caption", "names", "starts"),
    [
        ("a <corgi-dog> dog and a dog", [CORGI, DOG], [14, 24]),
        ("a dog and a <corgi-dog> dog", [DOG, CORGI], [2, 24]),
        ("a <chow> dog beside a dog", [DOG], [22]),
    ],
)
def test_a_class_subject_never_takes_the_concepts_noun(caption, names, starts):
    assert [m.noun[0] for m in locate_mentions(caption, names)] == starts


def test_edited_captions_are_followed():
    caption = "My <Corgi-Dog>, a fat Dog, sleeps by the hot-dog stand; hotdogs, dogs and a dog's bowl"
    (corgi,) = locate_mentions(caption, [CORGI])
    assert cut(caption, (corgi,)) == [("<Corgi-Dog>", "Dog")]


@pytest.mark.parametrize("word", ["dogs", "hotdog", "hot-dog", "dog-house", "<dog>", "dog2", "dog_"])
def test_a_noun_inside_another_word_is_missing(word):
    with pytest.raises(CaptionError, match="class noun 'dog' is missing"):
        locate_mentions(f"a photo of a <corgi-dog> {word}", [CORGI])


def test_multi_word_nouns():
    caption = "a <my-bear> teddy bear and a teddy bear"
    assert [m.noun for m in locate_mentions(caption, [BEAR, Name("teddy bear")])] == [(12, 22), (29, 39)]
    with pytest.raises(CaptionError, match="'teddy bear' is missing behind '<my-bear>'"):
        locate_mentions("a <my-bear> teddy and a bear", [BEAR])


@pytest.mark.parametrize(
    ("caption", "names", "message"),
    [
        ("a photo of a dog", [CORGI], "'<corgi-dog>' is missing in"),
        ("a photo of a <corgi-dog>", [CORGI], "class noun 'dog' is missing behind '<corgi-dog>'"),
        ("a dog <corgi-dog>", [CORGI], "class noun 'dog' is missing behind '<corgi-dog>'"),
        # The other concept's noun does not stand in for the missing one.
        ("a <corgi-dog> and a <chow> dog", [CORGI, CHOW], "class noun 'dog' is missing behind '<corgi-dog>'"),
        ("a <chow> dog and a <corgi-dog> dog", [CORGI, CHOW], "'<chow>' is missing behind '<corgi-dog> dog'"),
        ("a <corgi-dog> dog", [CORGI, DOG], "class noun 'dog' is missing behind '<corgi-dog> dog'"),
        ("a <corgi-dog> dog", [CORGI, CORGI], "'<corgi-dog>' is missing behind '<corgi-dog> dog'"),
        ("", [DOG], "class noun 'dog' is missing in"),
    ],
)
def test_what_is_missing_is_named(caption, names, message):
    with pytest.raises(CaptionError) as error:
        locate_mentions(caption, names, "set/0001.txt")
    assert str(error.value).startswith("set/0001.txt: ") and message in str(error.value)
