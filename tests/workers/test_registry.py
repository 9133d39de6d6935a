"""The stages by name, and how text becomes a pipeline and a pipeline text."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from kernels.layout import CacheShape, Format
from kvpilot.pipeline import PipelineError, format_value
from kvpilot.v1 import common_pb2
from tests.tiny import tiny_profile
from workers.profile.profile import KINDS, ROPE
from workers.stages.base import Kind, LossClass, Pipeline, Stage
from workers.stages.registry import build, catalog, describe, loss_class_proto, stages

SHAPE = CacheShape(layers=2, kv_heads=2, query_heads=4, head_dim=16, dtype=torch.float32)
PROFILE = tiny_profile(SHAPE)
ROOT = Path(__file__).resolve().parents[2]
fixed = settings(derandomize=True, max_examples=100, deadline=None, database=None)


@pytest.mark.parametrize("name", stages())
def test_every_stage_builds_with_its_defaults(name: str) -> None:
    pipeline = build(name, SHAPE, PROFILE.names)
    assert pipeline == Pipeline((stages()[name](),))
    assert build(pipeline.text, SHAPE, PROFILE.names) == pipeline


def test_what_a_pipeline_is_made_of() -> None:
    pipeline = build("h2o(keep=0.25) | kivi(bits=8) | host(recent=64)", SHAPE)
    assert pipeline.evictor.keep == 0.25
    assert pipeline.codec.format is Format.INT8
    assert pipeline.placer.device_tokens() == 64
    assert not pipeline.is_full
    assert pipeline.wants_shadow
    full = build("full", SHAPE)
    assert full == Pipeline()
    assert full.is_full
    assert (full.evictor, full.codec, full.placer, full.wants_shadow) == (None, None, None, False)


@pytest.mark.parametrize(
    ("text", "loss"),
    [
        ("full", LossClass.EXACT),
        ("host", LossClass.EXACT),
        ("window", LossClass.RECOVERABLE),
        ("window(shadow=false)", LossClass.PERMANENT),
        ("h2o | kivi(shadow=false)", LossClass.PERMANENT),
        ("int8 | host", LossClass.RECOVERABLE),
        ("quest", LossClass.RECOVERABLE),
        ("snapkv(shadow=false) | quest", LossClass.PERMANENT),
    ],
)
def test_a_pipeline_is_as_lossy_as_its_worst_stage(text: str, loss: LossClass) -> None:
    assert build(text, SHAPE).loss_class is loss


@pytest.mark.parametrize(
    ("text", "wants"),
    [("quest", False), ("host", False), ("snapkv | quest", True), ("snapkv(shadow=false) | quest", False)],
)
def test_only_what_is_stored_with_a_loss_needs_an_exact_copy(text: str, wants: bool) -> None:
    assert build(text, SHAPE).wants_shadow == wants


# -- text and pipeline are inverse -----------------------------------------------------------------------------------


def some_value(field: dataclasses.Field) -> st.SearchStrategy:
    """Values of a parameter's type that it accepts."""
    if field.type == "str":
        return st.sampled_from(field.metadata["bounds"].choices)
    typed = {
        "int": st.integers(0, 5000),
        "float": st.floats(0, 1) | st.floats(allow_nan=False, allow_infinity=False),
        "bool": st.booleans(),
    }
    return (typed[str(field.type)] | st.just(field.default)).filter(field.metadata["bounds"].accept)


def some_stage(stage: type[Stage]) -> st.SearchStrategy:
    def made(**values: object) -> Stage:
        try:
            return stage(**values)
        except ValueError:  # each is accepted, but not beside the others
            reject()

    return st.builds(made, **{field.name: some_value(field) for field in dataclasses.fields(stage)})


def some_pipeline() -> st.SearchStrategy:
    by_kind = {kind: [stage for stage in stages().values() if stage.kind is kind] for kind in Kind}
    choices = [
        st.none() | st.one_of([some_stage(stage) for stage in by_kind[kind]]) for kind in Kind if kind is not Kind.FULL
    ]
    some = st.tuples(*choices).map(lambda found: tuple(stage for stage in found if stage))
    return some.filter(bool).filter(go_together).map(Pipeline) | st.just(Pipeline())


def go_together(found: tuple[Stage, ...]) -> bool:
    return not any(stage.refuses_beside(other) for stage, other in itertools.permutations(found, 2))


@fixed
@given(pipeline=some_pipeline())
def test_the_text_of_a_pipeline_builds_an_equal_one(pipeline: Pipeline) -> None:
    again = build(pipeline.text, SHAPE, PROFILE.names)
    assert again == pipeline
    assert hash(again) == hash(pipeline)
    assert again.text == pipeline.text
    assert again.loss_class is pipeline.loss_class


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("h2o(keep=1)", "h2o(keep=1.0)"),  # an integer where a float is wanted
        ("snapkv(pool=5)", "snapkv"),  # minor parameters are not written while they have their defaults
        ("window( recent = 64 )|host", "window(sinks=4, recent=64) | host(recent=256)"),
        ("kivi(shadow=true)", "kivi(bits=4)"),
        ("snapkv(budgets=ada)", 'snapkv(keep=0.5, budgets="ada")'),
        ("h2o(budgets='uniform')", "h2o"),
    ],
)
def test_equal_pipelines_are_written_alike(text: str, same: str) -> None:
    assert build(text, SHAPE).text == build(same, SHAPE).text


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("h2o(keep=0)", ["keep", "h2o", "0.0", "more than 0, at most 1"]),
        ("h2o(keep=1.5)", ["keep", "h2o", "1.5", "more than 0, at most 1"]),
        ("snapkv(pool=4)", ["pool", "snapkv", "4", "1, 3, 5 and so on, at most 63"]),
        ("window(recent=31)", ["recent", "window", "31", "at least 32 (tokens)"]),
        ("window(sinks=-1)", ["sinks", "window", "-1", "at least 0, at most 1024"]),
        ("kivi(bits=3)", ["bits", "kivi", "3", "2 or 4 or 8"]),
        ("host(recent=0)", ["recent", "host", "0", "at least 32"]),
        ("kivi(bits=4.0)", ["bits", "kivi", "4.0", "type int"]),
        ("kivi(bits=true)", ["bits", "kivi", "true", "type int"]),
        ("kivi(shadow=1)", ["shadow", "kivi", "1", "type bool"]),
        ("h2o(keep='half')", ["keep", "h2o", '"half"', "type float"]),
        ("h2o(kept=0.5)", ["kept", "h2o", "keep, budgets, shadow"]),
        ("h2o(keep=half)", ["keep", "h2o", '"half"', "type float"]),
        ("snapkv(budgets=fair)", ["budgets", "snapkv", '"fair"', '"uniform" or "pyramid" or "ada"']),
        ("full(recent=64)", ["recent", "full", "none"]),
        ("squeeze", ["squeeze", *stages()]),
    ],
)
def test_bad_parameters_name_the_field_the_value_and_what_is_accepted(text: str, words: list[str]) -> None:
    with pytest.raises(PipelineError) as refused:
        build(text, SHAPE)
    assert all(word in str(refused.value) for word in words)


@pytest.mark.parametrize("name", [name for name, stage in stages().items() if dataclasses.fields(stage)])
def test_every_parameter_refuses_something_outside_its_words(name: str) -> None:
    for field in dataclasses.fields(stages()[name]):
        if field.type == "bool":
            continue
        with pytest.raises(ValueError, match=f"parameter '{field.name}' of stage '{name}': -1 given; accepted: "):
            stages()[name](**{field.name: -1})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("host | kivi", "in the order evict | compress | offload; this one reads offload | compress"),
        ("kivi | window", "reads compress | evict"),
        ("kivi | int8", "at most one stage of each kind"),
        ("window | h2o | host", "reads evict | evict | offload"),
        ("full | host", "`full` stands alone"),
        ("full | full", "`full` stands alone"),
    ],
)
def test_one_stage_of_each_kind_in_their_order(text: str, words: str) -> None:
    with pytest.raises(PipelineError) as refused:
        build(text, SHAPE)
    assert words in str(refused.value)


def test_a_stage_that_cannot_serve_the_model_says_why() -> None:
    narrow = CacheShape(layers=1, kv_heads=1, query_heads=1, head_dim=8, dtype=torch.float32)
    with pytest.raises(PipelineError, match=r"'kivi' cannot serve this model: head_dim 8 is below 16"):
        build("window | kivi", narrow)
    build("window", narrow)


def test_stages_that_do_not_go_together_are_refused_wherever_text_is_read_in_the_same_words() -> None:
    known = catalog(SHAPE, PROFILE.names)
    for one, other in itertools.permutations(stages().values(), 2):
        reason = one().refuses_beside(other())
        if not reason or Kind.FULL in (one.kind, other.kind) or one.kind is other.kind:
            continue
        text = " | ".join(stage.name for stage in sorted((one, other), key=lambda stage: list(Kind).index(stage.kind)))
        for read in (known.check, lambda text: build(text, SHAPE, PROFILE.names)):
            with pytest.raises(PipelineError) as refused:
                read(text)
            assert str(refused.value) == f"stage {one.name!r} does not go with {other.name!r}: {reason}"
    assert known.knows("window | minicache")
    assert not known.knows("snapkv | minicache")


@pytest.mark.parametrize("name", [name for name, stage in stages().items() if stage.needs])
def test_a_stage_that_needs_what_is_not_known_of_the_model_says_how_to_find_it(name: str) -> None:
    words = f"stage '{name}' cannot serve this model: it needs the model's [a-z ]+; `kvpilot model profile NAME` finds"
    with pytest.raises(PipelineError, match=words):
        build(name, SHAPE)
    with pytest.raises(PipelineError, match=words):
        catalog(SHAPE, PROFILE.names - {stages()[name].needs[-1]}).check(f"{name} | kivi")
    build(name, SHAPE, PROFILE.names)


def test_clients_are_told_which_stages_lack_a_profile() -> None:
    without = {info.name: info.unfit for info in describe(SHAPE)}
    assert without["expected_attention"] == (
        "it needs the model's query statistics; `kvpilot model profile NAME` finds them"
    )
    assert {name for name, unfit in without.items() if unfit} == {n for n, stage in stages().items() if stage.needs}
    assert not any(info.unfit for info in describe(SHAPE, PROFILE.names))


def test_stages_need_only_what_profiles_have() -> None:
    assert {needed for stage in stages().values() for needed in stage.needs} <= {*KINDS, ROPE}


# -- what clients are told -------------------------------------------------------------------------------------------


def test_the_description_is_complete() -> None:
    described = describe(SHAPE)
    assert [info.name for info in described] == list(stages())
    for info in described:
        stage = stages()[info.name]
        assert info.kind == stage.kind.value
        assert info.summary == stage.summary
        assert info.summary.endswith(".")
        assert info.loss_class == loss_class_proto(stage().loss_class) != common_pb2.LOSS_CLASS_UNSPECIFIED
        assert [parameter.name for parameter in info.parameters] == [field.name for field in dataclasses.fields(stage)]
        for parameter in info.parameters:
            assert parameter.type in ("int", "float", "bool", "str")
            assert parameter.accepts
            given_ = f"{info.name}({parameter.name}={parameter.default_value})"  # reads back as it is written
            assert build(given_, SHAPE, PROFILE.names) == build(info.name, SHAPE, PROFILE.names)
            assert parameter.default_value == format_value(getattr(stage(), parameter.name))


def test_every_loss_class_has_a_word_of_the_api() -> None:
    assert len({loss_class_proto(loss) for loss in LossClass}) == len(LossClass)


# -- stages from outside ---------------------------------------------------------------------------------------------

STAGE_MODULE = '''
import torch
from dataclasses import dataclass
from typing import ClassVar
from kvpilot.bounds import Bounds
from workers.stages.base import Evictor, parameter, shadow

@dataclass(frozen=True)
class Stride(Evictor):
    """Every nth token."""
    name: ClassVar[str] = "{name}"
    summary: ClassVar[str] = "Every nth token."
    step: int = parameter(4, Bounds(least=2))
    share: float = parameter(0.5, Bounds(least=0, most=1))
    shadow: bool = shadow()

    def budget(self, seen):
        return max(64, seen // self.step)

    def protected(self, seen):
        return 0, 32

    def score(self, layer):
        return -(layer.position % self.step).float()
'''


@pytest.fixture
def elsewhere(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python where a package with a stage is installed."""

    def run(
        code: str, name: str = "stride", postponed: bool = False, spoiled: tuple[str, str] = ("", "")
    ) -> subprocess.CompletedProcess[str]:
        head = "from __future__ import annotations\n" if postponed else ""
        (tmp_path / "kvpilot_stride.py").write_text(head + STAGE_MODULE.replace("{name}", name).replace(*spoiled))
        info = tmp_path / "kvpilot_stride-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvpilot-stride\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[kvpilot.stages]\nstride = kvpilot_stride:Stride\n")
        setup = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        return subprocess.run([sys.executable, "-c", setup + code], capture_output=True, text=True, timeout=120)

    return run


@pytest.mark.parametrize("postponed", [False, True], ids=["annotations are classes", "annotations are text"])
def test_a_stage_of_another_package_is_found_described_and_built(elsewhere, postponed: bool) -> None:
    answer = elsewhere(
        """
import torch
from kernels.layout import CacheShape
from workers.stages.registry import build, describe, stages
shape = CacheShape(2, 2, 4, 16, torch.float32)
print(build("stride(step=8) | kivi", shape).text)
info = describe(shape)[-1]
print(info.name, info.kind, [(p.name, p.type, p.default_value) for p in info.parameters])
try:
    build("stride(step=0.5)", shape)
except ValueError as error:
    print(error)
""",
        postponed=postponed,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines() == [
        "stride(step=8, share=0.5) | kivi(bits=4)",
        "stride evict [('step', 'int', '4'), ('share', 'float', '0.5'), ('shadow', 'bool', 'true')]",
        "parameter 'step' of stage 'stride': 0.5 is not of type int; accepted: at least 2",
    ]


def test_a_stage_of_another_package_may_not_take_a_name_that_is_taken(elsewhere) -> None:
    answer = elsewhere("from workers.stages.registry import stages; stages()", name="window")
    assert answer.returncode != 0
    assert "ValueError: stage 'window' is defined by" in answer.stderr
    assert "kvpilot_stride.Stride" in answer.stderr


@pytest.mark.parametrize(
    ("spoiled", "why"),
    [
        (("import torch", "import torch_of_nobody"), "No module named 'torch_of_nobody'"),
        (("class Stride(Evictor)", "class Stride"), "is not a subclass of workers.stages.base.Stage"),
        (("    summary: ClassVar", "    abstract: ClassVar"), "no class variable summary"),
        (("share: float = parameter(0.5, Bounds(least=0, most=1))", "share: float = 0.5"), "parameter 'share' is not"),
        (("step: int =", "step: list ="), "parameter 'step' is of type list"),
        (("parameter(4, Bounds(least=2))", "parameter(1, Bounds(least=2))"), "1 given; accepted: at least 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_stage_of_another_package_is_left_out_and_said_so(
    elsewhere, spoiled: tuple[str, str], why: str
) -> None:
    answer = elsewhere("from workers.stages.registry import stages; print(list(stages()))", spoiled=spoiled)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[-1] == str([name for name in stages() if name != "stride"])
    assert why in answer.stdout
