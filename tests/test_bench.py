"""The bench: its subjects, the rivals' pictures, and a short run from end to end."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import replace

import pytest
import torch

from benchmarks.quality import run as bench_run
from benchmarks.quality.arms import ALL, CORE, FUSION, find_arms
from benchmarks.quality.claims import Claim, claims_table, weigh
from benchmarks.quality.groups import dev_groups, dev_singles, dev_triple, test_groups
from benchmarks.quality.plans import Plan, build_plan
from benchmarks.quality.rivals import ResizedPhotos, SegMix, ShuffledMasks, TruePairs, TrueScenes, degrade, refine_masks
from benchmarks.quality.run import concepts, prompts, reference_places
from benchmarks.quality.settings import BenchConfig
from benchmarks.quality.summary import contrasts, per_group, summarise
from benchmarks.quality.tables import write_report
from benchmarks.small_models.held_out import held_out_identities
from benchmarks.small_models.small_sam import mask_iou
from far_train.data.captions import Name
from far_train.data.fusion import ConceptFusion
from far_train.data.images import load_photo
from far_train.mini import shipped
from far_train.mini.identity import describe
from far_train.utils.errors import CheckpointError, ConfigError, Interrupted

PAIR = dev_groups()[0]


def test_dev_and_test_subjects_are_apart_and_unknown_to_the_base():
    dev = {i for g in dev_groups() for i in g.identities}
    test = [i for g in test_groups() for i in g.identities]
    assert len(dev) == 18 and len(set(test)) == len(test) == 53 and not dev & set(test)
    assert dev | set(test) <= held_out_identities()
    assert set(dev_triple().identities) <= dev and len(dev_triple().names) == 3
    assert all(len(g.names) == 1 and set(g.identities) <= dev for g in dev_singles())
    assert not (dev | set(test)) & {identity for _, identity in shipped.SUBJECTS.values()}


def test_groups_stay_who_they_were():
    """Settings were tuned on the dev pairs, and results are published for the test groups."""
    everyone = repr([(g.key, g.seed, g.identities) for g in (*dev_groups(), *test_groups())])
    assert hashlib.sha256(everyone.encode()).hexdigest()[:16] == "8cc98ee082cf24d0"


def test_test_groups_by_kind():
    kinds = [g.kind for g in test_groups()]
    wanted = {"near": 8, "far": 4, "classes": 4, "triple": 4, "single": 4, "five": 1}
    assert {kind: kinds.count(kind) for kind in kinds} == wanted
    for group in test_groups():
        assert len(group.identities) == {"single": 1, "triple": 3, "five": 5}.get(group.kind, 2)
        if group.kind == "triple":
            first, second, third = group.identities
            assert len({i.noun for i in group.identities}) == 1 and len(first.differs(second)) <= 2
            assert min(len(third.differs(first)), len(third.differs(second))) >= 3


PAIRS = [g for g in (*dev_groups(), *test_groups()) if g.kind in ("near", "far", "classes")]


@pytest.mark.parametrize("group", PAIRS, ids=lambda g: g.key)
def test_pairs_are_as_alike_as_their_kind_says(group):
    first, second = group.identities
    differ = first.differs(second)
    assert (first.noun == second.noun) == (group.kind != "classes")
    if group.kind != "classes":
        assert len(differ) in {"near": (1, 2), "far": (4, 5)}[group.kind]
    assert group.distinguishing == set(differ) - {"noun"}


def test_prompts_never_ask_for_the_places_of_the_photos():
    asked = prompts(PAIR, PAIR.names, {"joint": 12, "solo": 4, "binding": 2, "prior": 3})
    assert [sum(a[0] == kind for a in asked) for kind in ("joint", "solo", "binding", "prior")] == [12, 4, 2, 3]
    assert len(reference_places(PAIR)) == 4
    assert not {a[2] for a in asked} & reference_places(PAIR)
    assert "<v1> dog and a <v2> dog" in asked[0][1]
    bare = prompts(PAIR, [Name("dog"), Name("dog")], {"joint": 1, "solo": 0, "binding": 0, "prior": 0})
    assert "a dog and another dog" in bare[0][1]


def test_resized_photos_count_the_photo_alone():
    pictures = ResizedPhotos(concepts(PAIR), 128, 40, 0)
    for i in range(40):
        composite = pictures.composite(i)
        (mention,) = composite.mentions
        outside = composite.image[mention.mask == 0]
        assert torch.allclose(outside, torch.full_like(outside, 128 / 255))
        if "close up" in composite.caption:
            assert bool((mention.mask == 1).all())
        if "far away" in composite.caption:
            assert mention.mask.mean() < 0.37
    captions = " ".join(pictures.composite(i).caption for i in range(40))
    assert "far away" in captions and "close up" in captions
    assert torch.equal(pictures.composite(3).image, ResizedPhotos(concepts(PAIR), 128, 40, 0).composite(3).image)


def test_seg_mix_shows_two_cut_outs_on_plain_colours_in_three_of_ten():
    pictures = SegMix(concepts(PAIR), 128, 100, 0)
    made = [pictures.composite(i) for i in range(100)]
    pairs = [c for c in made if c.layout == "pair"]
    assert 18 <= len(pairs) <= 42
    for composite in pairs[:5]:
        assert {m.name for m in composite.mentions} == set(PAIR.names)
        outside = torch.stack([m.mask for m in composite.mentions]).amax(0) == 0
        steps = composite.image.diff(dim=1).abs().amax(-1)[outside[:, 1:] & outside[:, :-1]]
        assert float(steps.max()) < 0.02 and float(composite.image[outside].mean()) > 0.05
        assert composite.caption.endswith("background")


def test_true_scenes_put_every_mask_on_its_own_subject():
    group = dev_groups()[3]  # a bird and a cup: colours tell them apart
    scene = TrueScenes(concepts(group), group.identities, 128, 4, 0).composite(0)
    assert {m.name for m in scene.mentions} == set(group.names)
    means = {m.name.noun: (scene.image * m.mask[..., None]).sum((0, 1)) / m.mask.sum() for m in scene.mentions}
    assert means["cup"][0] > means["cup"][2]  # yellow: more red than blue
    assert means["bird"][2] > means["bird"][1]  # purple: more blue than green


def test_who_stands_in_front_does_not_tell_the_oracle_arm_who_is_who():
    """The world itself puts the robot with a hat behind the other one in nine scenes of ten."""
    group = dev_groups()[1]
    true = TrueScenes(concepts(group), group.identities, 64, 40, 0)
    first = 0
    for i in range(40):
        feet = {m.name: int(m.mask.amax(1).gt(0.5).nonzero().max()) for m in true.composite(i).mentions}
        first += feet[group.names[0]] > feet[group.names[1]]
    assert 11 <= first <= 29  # a fair coin leaves this once in 300 seeds


def test_shuffled_masks_belong_to_the_other_subject():
    true = TrueScenes(concepts(PAIR), PAIR.identities, 128, 4, 0)
    wrong = ShuffledMasks(true)
    right, shuffled = true.composite(1), wrong.composite(1)
    assert torch.equal(right.mentions[0].mask, shuffled.mentions[1].mask)
    assert torch.equal(right.mentions[1].mask, shuffled.mentions[0].mask)
    assert right.caption == shuffled.caption and true.digest() != wrong.digest()


def test_true_pairs_stand_for_the_composites_of_both_and_for_no_others():
    found = concepts(PAIR)
    fused = ConceptFusion(found, config=FUSION.replace(count=40))
    true = TrueScenes(found, PAIR.identities, fused.size, fused.composite_count(), 0)
    mixed, exchanged = TruePairs(fused, true), 0
    for i in range(40):
        layout = fused.composite(i).layout
        source = true if layout == "pair" else fused
        assert torch.equal(mixed.composite(i).image, source.composite(i).image)
        exchanged += layout == "pair"
    assert 0 < exchanged < 40
    assert len({fused.digest(), true.digest(), mixed.digest()}) == 3


def test_degraded_masks_are_off_but_still_on_the_subject():
    for concept in concepts(PAIR):
        for before, after in zip(concept.masks, degrade(concept, 0).masks):
            assert 0.5 < mask_iou(before > 0.5, after > 0.5) < 0.97


def test_sam_refines_degraded_masks(models):
    for concept in concepts(PAIR):
        refined = refine_masks(degrade(concept, 0), models[0])
        assert all(mask_iou(m > 0.5, exact > 0.5) > 0.93 for m, exact in zip(refined.masks, concept.masks, strict=True))


def test_arms_differ_from_far_in_what_they_say_and_spend_the_same_budget():
    budgets = {
        (a.train_config(0).steps, a.train_config(0).batch_size, a.train_config(0).prior_batch_size) for a in CORE
    }
    assert len(budgets) == 1
    assert {a.name for a in ALL if a.train_config(0).refinement_weight == 0} == {
        "custom-diffusion",
        "seg-mix",
        "fusion",
        "textual-inversion",
        "dreambooth-lora",
        "masked-loss",
    }
    with pytest.raises(ConfigError, match="unknown arm 'fra'"):
        find_arms(("fra",))


def test_arms_ask_for_the_subjects_by_token_in_words_or_by_noun():
    counts = {"joint": 1, "solo": 1, "binding": 1, "prior": 1}
    asked = {}
    for arm in find_arms(("far", "words", "floor")):
        names = bench_run.names_in_prompts(arm, PAIR)
        asked[arm.name] = [text for _, text, _, _ in bench_run.prompts(PAIR, names, counts)]
    first, second = (describe(identity) for identity in PAIR.identities)
    assert asked["far"][0].startswith(f"a photo of a <v1> {PAIR.identities[0].noun} and a <v2> ")
    assert asked["words"][0].startswith(f"a photo of {first} and {second}, ")
    assert asked["words"][1].startswith(f"a photo of {first}, ")
    assert asked["floor"][0].startswith(f"a photo of a {PAIR.identities[0].noun} and another ")


def test_plans():
    assert len(build_plan(BenchConfig()).runs()) == 2 * len(CORE)
    assert len(build_plan(BenchConfig(plan="core")).runs()) == 25 * 2 * (len(CORE) + 1)
    kinds = {g.kind for g in build_plan(BenchConfig(plan="full")).groups}
    assert kinds == {"near", "far", "classes", "triple", "five", "single"}
    assert len(build_plan(BenchConfig(arms=("far",))).runs()) == 2
    some = build_plan(BenchConfig(plan="dev", arms=("far",), groups=("dev-far-1",), more_pictures=4, seeds=2))
    assert [(a.name, g.key, s) for a, g, s in some.runs()] == [("far", "dev-far-1", 0), ("far", "dev-far-1", 1)]
    assert some.pictures["joint"] == 128
    with pytest.raises(ConfigError, match="plan 'reduced' has no group 'near-1'"):
        build_plan(BenchConfig(groups=("near-1",)))


def test_tuned_rates_leave_alone_what_an_arm_does_not_learn(models, tmp_path):
    changes = BenchConfig(lora_lr=8e-5, embedding_lr=1e-2).training_changes()
    assert changes == {"lora_lr": 8e-5, "embedding_lr": 1e-2}
    bench = bench_run.Bench(tmp_path, build_plan(BenchConfig()), shipped.BASE, *models, {}, changes=changes)
    far, inversion = find_arms(("far", "textual-inversion"))
    assert bench.train_config(far, PAIR, 0).lora_lr == 8e-5 and bench.train_config(inversion, PAIR, 0).lora_lr == 0
    assert bench.train_config(inversion, PAIR, 0).embedding_lr == 1e-2


def test_more_than_two_subjects_get_more_steps(models, tmp_path):
    bench = bench_run.Bench(tmp_path, build_plan(BenchConfig()), shipped.BASE, *models, {})
    far, *_ = find_arms(("far",))
    steps = {g.kind: bench.train_config(far, g, 0).steps for g in test_groups()}
    assert steps == {"near": 300, "far": 300, "classes": 300, "single": 300, "triple": 450, "five": 750}
    fixed = bench_run.Bench(tmp_path, build_plan(BenchConfig()), shipped.BASE, *models, {}, changes={"steps": 7})
    assert fixed.train_config(far, test_groups()[-1], 0).steps == 7


@pytest.fixture(scope="module")
def models():
    return shipped.small_sam(), shipped.small_oracle()


def make_bench(models, out, arms=("floor", "custom-diffusion", "far", "words"), **options):
    plan = Plan(
        tuple(replace(a, class_pictures=2) for a in find_arms(arms)),
        (PAIR,),
        1,
        {"joint": 2, "solo": 2, "binding": 1, "prior": 2},
    )
    return bench_run.Bench(out, plan, shipped.BASE, *models, {}, changes={"steps": options.pop("steps", 2)}, **options)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(bench_run, "EMPTY_SCENES", 1)
    monkeypatch.setattr(bench_run, "PROBES", 1)
    for place in ("run", "arms"):
        monkeypatch.setattr(f"benchmarks.quality.{place}.FUSION", bench_run.FUSION.replace(count=8))
    for place in ("benchmarks.quality.run.DRAWING", "far_train.mini.materials.EMPTY_PLACES"):
        monkeypatch.setattr(place, shipped.DRAWING.replace(sampling_steps=1))
    monkeypatch.setattr(bench_run, "corrected_leakage", lambda *_: 0.0)


def test_a_run_from_end_to_end_goes_on_where_it_stopped(quick, models, tmp_path):
    asked = []

    def stop() -> bool:
        asked.append(1)
        return (tmp_path / "runs" / "floor").exists()

    with pytest.raises(Interrupted, match="start again"):
        make_bench(models, tmp_path, should_stop=stop).run()
    rows = make_bench(models, tmp_path).run()
    assert [row["arm"] for row in rows] == ["floor", "custom-diffusion", "far", "words"]
    assert "solo" not in rows[0]["figures"]
    assert all(0 <= row["figures"]["attention_own"] <= 1 and "copied" in row["figures"] for row in rows[1:3])
    assert "solo" in rows[3]["figures"] and "prior_drift" not in rows[3]["figures"]  # it learns nothing
    folder = tmp_path / "runs" / "far" / f"{PAIR.key}-s0"
    assert (folder / "training" / "weights.safetensors").exists()
    assert not (folder / "training" / "checkpoints").exists()
    assert len((folder / "seen.jsonl").read_text().splitlines()) == 7
    before = (folder / "row.json").read_bytes()
    assert make_bench(models, tmp_path).run() == rows and (folder / "row.json").read_bytes() == before
    with pytest.raises(CheckpointError, match="other settings"):
        make_bench(models, tmp_path, steps=3).run()

    report = write_report(rows, tmp_path, "A short bench")
    text = report.read_text()
    assert "# A short bench" in text and "| custom-diffusion |" in text and "Near twins (1)" in text
    table = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [r["arm"] for r in table] == ["floor", "custom-diffusion", "far", "words"]
    for name in ("success-drift.png", "leakage-similarity.png", "sheets/far.jpg"):
        assert load_photo(tmp_path / name).image.shape[2] == 3


def rows_of(**success: list[float]) -> list[dict]:
    return [
        {"arm": arm.replace("_", "-"), "group": f"g{i // 2}", "kind": "near", "seed": i % 2, "figures": {"success": v}}
        for arm, values in success.items()
        for i, v in enumerate(values)
    ]


def test_seeds_are_averaged_before_pairs_are_compared():
    rows = rows_of(far=[1.0, 0.5, 0.5, 0.5], custom_diffusion=[0.25, 0.25, 0.0, 0.0])
    assert per_group(rows, "far", "success", ("near",)) == {"g0": 0.75, "g1": 0.5}
    assert summarise(rows, ("near",))["far"]["success"] == pytest.approx((0.625, 0.5, 0.75))
    (contrast,) = contrasts(rows)
    assert (contrast["first"], contrast["second"], contrast["pairs"]) == ("far", "custom-diffusion", 2)
    assert contrast["difference"] == pytest.approx(0.5) and contrast["p"] == 0.5


def test_claims_are_weighed_against_the_best_other_arm():
    claim = Claim("most often", "success", "far", ("fusion", "seg-mix", "refinement"), ("near",), over=0)
    rows = rows_of(far=[0.5, 0.5, 0.25, 0.25], fusion=[0.25, 0.25, 0.5, 0.5], seg_mix=[0.0, 0.0, 0.5, 0.5])
    rows += [row | {"arm": "refinement"} for row in rows_of(far=[1.0, 1.0])]  # not run on g1: can't be compared
    found = weigh(rows, claim)
    assert (found["second"], found["groups"], found["value"]) == ("fusion", 2, 0)
    assert (found["low"], found["high"]) == pytest.approx((-0.25, 0.25)) and found["verdict"] == "no, open"
    assert weigh(rows, replace(claim, over=-0.3))["verdict"] == "yes"
    assert weigh(rows, replace(claim, over=0.3))["verdict"] == "no"
    both_around_it = replace(claim, over=-0.2, under=-0.1)  # the interval reaches past either bound
    assert weigh(rows, both_around_it)["verdict"] == "no, open"
    assert weigh(rows, replace(claim, second="ceiling")) is None
    lower = replace(claim, measure="leakage", second=("fusion", "seg-mix"), over=None, under=0)
    leaking = [row | {"figures": {"leakage": row["figures"]["success"]}} for row in rows]
    assert weigh(leaking, lower)["second"] == "seg-mix"


def test_ratios_are_of_means_over_resampled_groups():
    claim = Claim("of the oracle arm's", "success", "far", "ceiling", ("near",), ratio=True, over=0.85)
    rows = rows_of(far=[0.25, 0.25, 0.5, 0.5], ceiling=[0.5, 0.5, 0.5, 0.5])
    found = weigh(rows, claim)
    assert (found["value"], found["low"], found["high"]) == pytest.approx((0.75, 0.5, 1.0))
    assert found["verdict"] == "no, open"
    assert weigh(rows_of(far=[0.5, 0.5], ceiling=[0.0, 0.0]), claim) is None
    absolute, ratio = claims_table(rows)[2:]
    assert "| joint accuracy, far (2) | 37.5 | 25.0 … 50.0 | > 90 | no |" in absolute
    assert "| joint accuracy, far to ceiling (2) | 0.75 × | 0.50 … 1.00 × | > 0.95 × | no, open |" in ratio
    assert claims_table(rows_of(floor=[0.0, 0.0])) == []


def test_a_claim_about_one_arm_alone_is_weighed_against_its_bound():
    claim = Claim("high", "success", "far", kinds=("near",), over=0.9)
    found = weigh(rows_of(far=[1.0, 1.0, 0.75, 0.75]), claim)
    assert (found["second"], found["groups"], found["value"], found["verdict"]) == ("", 2, 0.875, "no, open")
    assert weigh(rows_of(far=[1.0, 1.0]), claim)["verdict"] == "yes"
    assert weigh(rows_of(fusion=[1.0, 1.0]), claim) is None
