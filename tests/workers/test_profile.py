"""A profile's tensors against what hooks in a tiny model hear, worked out plainly; its files, and who gets it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from transformers import AutoModelForCausalLM

from kernels.layout import CacheShape
from kvpilot.v1 import generation_pb2, job_pb2, policy_pb2
from models import profiles
from models.collect.corpus import find_files
from models.profiles import ProfileError, hash_model
from tests.tiny import prompt, tiny_engine, tiny_loaded, tiny_model, tiny_profile, tiny_tokenizer, wrap_model
from workers.engine.attention import ATTENTION_NAME, cache_shape
from workers.engine.runner import load_model
from workers.errors import INVALID_ARGUMENT, ProblemError
from workers.profile import files
from workers.profile.levels import fit_levels
from workers.profile.measure import measure
from workers.profile.profile import KINDS, LEVELS, ROPE, ModelProfile
from workers.profile.retrieval import COPIES, NEAR, Retrieval
from workers.profile.rotary import rope_of
from workers.profile.statistics import SAMPLE_TOKENS, SINKS, Statistics, unit_scaled
from workers.profile.text import pieces

WIDE = {"num_attention_heads": 6, "hidden_size": 96}  # 2 layers, 3 query heads to each of 2 KV heads, 16 channels
LAYERS, HEADS, ASKING, DIM = 2, 2, 6, 16
TEXTS = [prompt(300, seed=1), prompt(170, seed=2), prompt(256, seed=3)]
HASH = "ab" * 32


@pytest.fixture(scope="module")
def profile() -> ModelProfile:
    return measure(tiny_loaded(**WIDE), TEXTS, HASH)


def heard(model, token_ids: list[int], layer: int, name: str) -> torch.Tensor:
    """What a projection of the model's attention puts out: [heads, T, D], before any rotation."""
    found: list[torch.Tensor] = []
    module = getattr(model.model.layers[layer].self_attn, name)
    hook = module.register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.inference_mode():
        model(input_ids=torch.tensor([token_ids]), use_cache=False)
    hook.remove()
    return found[0][0].unflatten(-1, (-1, DIM)).transpose(0, 1).double()


@pytest.fixture(scope="module")
def plain():
    return tiny_model(attention="sdpa", **WIDE)


# -- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", range(LAYERS))
def test_query_statistics_are_those_of_the_projections(profile: ModelProfile, plain, layer: int) -> None:
    asked = torch.cat([heard(plain, text, layer, "q_proj")[:, SINKS:] for text in TEXTS], 1).numpy()
    for head in range(ASKING):
        mean = profile.tensor("query_mean")[layer, head].numpy()
        np.testing.assert_allclose(mean, asked[head].mean(axis=0), atol=1e-4)
        cov = profile.tensor("query_cov")[layer, head].numpy()
        np.testing.assert_allclose(cov, np.cov(asked[head].T, bias=True), atol=1e-4 * np.abs(cov).max())


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize(("name", "projection"), [("key", "k_proj"), ("value", "v_proj")])
def test_bases_diagonalise_the_second_moments(
    profile: ModelProfile, plain, layer: int, name: str, projection: str
) -> None:
    told = torch.cat([heard(plain, text, layer, projection) for text in TEXTS], 1).numpy()
    for head in range(HEADS):
        basis = profile.tensor(f"{name}_basis")[layer, head].double().numpy()
        spectrum = profile.tensor(f"{name}_spectrum")[layer, head].double().numpy()
        second = told[head].T @ told[head] / len(told[head])
        np.testing.assert_allclose(basis.T @ basis, np.eye(DIM), atol=1e-5)
        np.testing.assert_allclose(basis @ np.diag(spectrum) @ basis.T, second, atol=1e-4 * second.max())
        assert (np.diff(spectrum) <= 0).all()
        for rank in (1, 4, 9):  # what the first columns leave out is the rest of the spectrum
            left = told[head] - told[head] @ basis[:, :rank] @ basis[:, :rank].T
            np.testing.assert_allclose((left**2).sum(axis=1).mean(), spectrum[rank:].sum(), rtol=1e-3)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_ranges_and_levels_are_those_of_sorted_numbers(profile: ModelProfile, plain, layer: int) -> None:
    tokens = sum(map(len, TEXTS))
    assert tokens <= SAMPLE_TOKENS  # all are in the sample
    beyond = int(0.01 * tokens)
    for name, projection in (("key", "k_proj"), ("value", "v_proj")):
        told = torch.cat([heard(plain, text, layer, projection) for text in TEXTS], 1).numpy()
        ordered = np.sort(told, axis=1)
        ends = np.stack([ordered[:, beyond], ordered[:, tokens - 1 - beyond]], axis=-1)
        np.testing.assert_allclose(profile.tensor(f"{name}_range")[layer].numpy(), ends, atol=1e-4)
        for head in range(HEADS):
            if name == "value":
                least, most = told[head].min(axis=1, keepdims=True), told[head].max(axis=1, keepdims=True)
                scaled = np.sort(((told[head] - least) / (most - least) * 2 - 1).ravel())
                check_levels(profile.tensor("value_levels_8")[layer, head].numpy(), scaled)
            else:
                for channel in range(0, DIM, 5):
                    inside = ordered[head, beyond : tokens - beyond, channel]
                    check_levels(profile.tensor("key_levels_8")[layer, head, channel].numpy(), inside)


def check_levels(found: np.ndarray, numbers: np.ndarray) -> None:
    """Each is about the mean of the numbers nearest to it, and together they serve better than equal steps."""
    nearest = np.abs(numbers[:, None] - found).argmin(axis=1)
    means = np.array([numbers[nearest == index].mean() for index in range(len(found))])
    span = numbers[-1] - numbers[0]
    np.testing.assert_allclose(found, means, atol=0.02 * span)
    steps = np.linspace(numbers[0], numbers[-1], len(found))
    equal = (np.abs(numbers[:, None] - steps).min(axis=1) ** 2).mean()
    assert ((numbers - found[nearest]) ** 2).mean() < equal


def test_levels_are_lloyds() -> None:
    ordered = torch.randn(3, 500, generator=torch.Generator().manual_seed(1)).sort(1).values
    found = fit_levels(ordered, 4)
    for row, numbers in enumerate(ordered.double().numpy()):
        level = numbers[[62, 187, 312, 437]]
        for _ in range(40):
            nearest = np.abs(numbers[:, None] - level).argmin(axis=1)
            level = np.array([numbers[nearest == index].mean() for index in range(4)])
        np.testing.assert_allclose(found[row].numpy(), level, atol=1e-6)


def test_levels_of_few_different_numbers_stay_where_they_are() -> None:
    found = fit_levels(torch.tensor([[1.0] * 9 + [2.0]]), 4)
    assert found.tolist() == [[1.0, 1.0, 1.0, 2.0]]


def test_a_long_text_is_sampled_at_equal_distances() -> None:
    shape = CacheShape(layers=1, kv_heads=1, query_heads=1, head_dim=2, dtype=torch.float32)
    statistics = Statistics(shape, 3 * 1500, torch.device("cpu"))
    number = torch.arange(4500.0)
    for start in range(0, 4500, 1500):
        part = number[None, start : start + 1500, None].expand(1, -1, 2)
        statistics.add(0, part, part, -part)
    keys, values = (torch.cat(part, 1) for part in zip(*statistics._sample[0], strict=True))
    assert keys[0, :, 0].tolist() == list(range(0, 4500, 3))
    assert torch.equal(values, -keys)
    found = statistics.tensors()
    assert found["key_range"][0, 0].tolist() == [[45.0, 4452.0]] * 2
    torch.testing.assert_close(
        found["key_levels_4"][0, 0, 0], torch.tensor([594.0, 1696.5, 2799.0, 3901.5]), rtol=0.01, atol=0
    )


def test_unit_scaled_values() -> None:
    assert unit_scaled(torch.tensor([[2.0, 3.0, 6.0], [5.0, 5.0, 5.0]])).tolist() == [[-1, -0.5, 1], [0, 0, 0]]


# -- rotary positions -------------------------------------------------------------------------------------------------

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "original_max_position_embeddings": 512},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
    "yarn": {
        **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024},
        "attention_factor": 1.3,
    },
}


@pytest.mark.parametrize("name", ROPES)
def test_the_rotation_is_undone_as_the_model_does_it(name: str) -> None:
    """Queries after it, undone, are those that the projection put out; turned again, they are those after it."""
    changes = WIDE | {"rope_parameters": ROPES[name]}
    loaded = tiny_loaded(**changes)
    found = measure(loaded, TEXTS, HASH)
    turned: list[torch.Tensor] = []
    positions = torch.arange(50, 350)

    class Listening:
        def attend(self, layer, q, k, v, scaling):
            turned.append(q[0])
            return q.transpose(1, 2)

    with torch.inference_mode():
        loaded.model(
            input_ids=torch.tensor([TEXTS[0]]), position_ids=positions[None], use_cache=False, kvpilot_step=Listening()
        )
    before = heard(tiny_model(attention="sdpa", **changes), TEXTS[0], 0, "q_proj").float()
    torch.testing.assert_close(found.rope.undo(turned[0], positions), before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.rope.rotate(before, positions), turned[0], atol=1e-5, rtol=1e-5)
    cos, sin = found.rope(positions)
    assert cos.shape == sin.shape == (300, DIM)
    scale = 1.3 if name == "yarn" else 1.0
    torch.testing.assert_close(cos.square() + sin.square(), torch.full((300, DIM), scale**2), atol=1e-5, rtol=0)


def test_queries_are_taken_behind_their_norm() -> None:
    """Qwen3 normalises each head's queries between projection and rotation."""
    found = measure(tiny_loaded("qwen3", head_dim=DIM, **WIDE), TEXTS, HASH)
    model, told = tiny_model("qwen3", attention="sdpa", head_dim=DIM, **WIDE), []
    model.model.layers[1].self_attn.q_norm.register_forward_hook(lambda m, i, output: told.append(output[0, SINKS:]))
    with torch.inference_mode():
        for text in TEXTS:
            model(input_ids=torch.tensor([text]), use_cache=False)
    wanted = torch.cat(told).double().mean(0).float()  # [Q, D]
    torch.testing.assert_close(found.tensor("query_mean")[1], wanted, atol=1e-5, rtol=1e-4)


def test_a_half_precision_model_has_a_profile_too() -> None:
    loaded = tiny_loaded(dtype=torch.bfloat16, **WIDE)
    found, exact = measure(loaded, TEXTS, HASH), measure(tiny_loaded(**WIDE), TEXTS, HASH)
    deviation = (found.tensor("query_mean")[0] - exact.tensor("query_mean")[0]).norm()
    assert deviation < 0.02 * exact.tensor("query_mean")[0].norm()


@pytest.mark.parametrize(
    ("model_type", "changes", "why"),
    [
        ("gpt2", {}, "model type 'gpt2' has no rotary embeddings"),
        ("gpt_neox", {}, "model type 'gpt_neox' rotates 4 of 16 channels"),
        ("cohere", {}, "model type 'cohere' does not rotate queries and keys of layer 0 by halves"),
        (
            "smollm3",
            {"no_rope_layers": [1, 0]},
            "model type 'smollm3' does not rotate queries and keys of layer 1 by halves",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
            "model type 'llama' has rotary positions of type 'dynamic', whose angles change",
        ),
    ],
)
def test_models_that_turn_otherwise_are_refused_by_name(model_type: str, changes: dict, why: str) -> None:
    with pytest.raises(ProfileError, match=why):
        measure(tiny_loaded(model_type, **changes), TEXTS, HASH)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ProfileError, match="no text of 64 tokens"):
        measure(tiny_loaded(), [prompt(63)], HASH)


# -- retrieval --------------------------------------------------------------------------------------------------------


def test_retrieval_is_what_the_models_own_attention_pays() -> None:
    loaded = tiny_loaded(**WIDE)
    found = measure(loaded, TEXTS, HASH)
    model = tiny_model(attention="eager", **WIDE)
    retrieval = Retrieval(found.shape, 256, torch.device("cpu"))
    ordinary = [token for token in range(258) if token not in (256, 257)]
    random = retrieval.random_text(ordinary, 0)
    period = len(random) // COPIES
    assert random == random[:period] * COPIES
    passages = [retrieval.passage_text(TEXTS[0]), retrieval.passage_text(TEXTS[2])]
    with torch.inference_mode():
        paid = model(input_ids=torch.tensor([random]), output_attentions=True).attentions
        over = [model(input_ids=torch.tensor([text]), output_attentions=True).attentions for text in passages]
    for layer in range(LAYERS):
        echo, induction, near = np.zeros(ASKING), np.zeros(ASKING), np.zeros(ASKING)
        for head in range(ASKING):
            table = paid[layer][0, head].double().numpy()
            for place in range(period, len(random)):
                for copy in range(place - period, -1, -period):
                    echo[head] += table[place, copy] / (len(random) - period)
                    induction[head] += table[place, copy + 1] / (len(random) - period)
            for text, attention in zip(passages, over, strict=True):
                table, length = attention[layer][0, head].double().numpy(), retrieval.passage_tokens
                shares = []
                for own in range(NEAR + SINKS, length):
                    place = len(text) - length + own
                    shares.append(sum(table[place, t] for t in range(len(text)) if abs(t - own) <= NEAR))
                near[head] += np.mean(shares) / len(passages)
        np.testing.assert_allclose(found.tensor("echo")[layer].numpy(), echo, atol=1e-5)
        np.testing.assert_allclose(found.tensor("induction")[layer].numpy(), induction, atol=1e-5)
        wanted = near.reshape(HEADS, -1).max(axis=1)
        np.testing.assert_allclose(found.tensor("retrieval")[layer].numpy(), wanted, atol=1e-5)


def test_concentration_is_what_the_models_own_attention_pays() -> None:
    even = WIDE | {"initializer_range": 0.15}  # larger weights make all attention pay to single tokens
    found = measure(tiny_loaded(**even), TEXTS, HASH)
    model = tiny_model(attention="eager", **even)
    shares: dict[int, list[float]] = {layer: [] for layer in range(LAYERS)}
    for text in TEXTS:
        with torch.inference_mode():
            paid = model(input_ids=torch.tensor([text]), output_attentions=True).attentions
        for layer, head, place in np.ndindex(LAYERS, ASKING, 64):
            row = paid[layer][0, head, len(text) - 1 - place].double().tolist()
            shares[layer].append(sum(sorted(row, reverse=True)[: -(-len(text) // 16)]))
    wanted = [np.mean(shares[layer]) for layer in range(LAYERS)]
    np.testing.assert_allclose(found.tensor("concentration").numpy(), wanted, atol=1e-5)
    assert all(0.1 < share < 0.999 for share in wanted)


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model on disk, and a cache folder of its own."""
    monkeypatch.setenv("KVPILOT_CACHE", str(tmp_path / "cache"))
    tiny_model(attention="sdpa", **WIDE).save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def stored(folder: Path, profile: ModelProfile) -> Path:
    return files.save(dataclasses.replace(profile, hash=hash_model(folder)))


def load(folder: Path, path: Path, **changes) -> ModelProfile:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=ATTENTION_NAME)
    shape = dataclasses.replace(cache_shape(model.config, torch.float32), **changes)
    return files.load(path, hash_model(folder), model, shape)


def test_a_profile_comes_back_from_its_file(folder: Path, profile: ModelProfile) -> None:
    assert profiles.find_profile(folder) is None
    path = stored(folder, profile)
    assert path == profiles.find_profile(folder) == profiles.profile_path(hash_model(folder))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    again = load(folder, path)
    assert (again.model, again.hash, again.tokens) == ("tiny", hash_model(folder), profile.tokens)
    assert again.names == profile.names == {*KINDS, ROPE}
    for name in KINDS:
        assert torch.equal(again.tensor(name), profile.tensor(name))
        assert torch.equal(again.layer(1).tensor(name), profile.tensor(name)[1])
    at = torch.tensor([[0, 5], [17, 4000]])
    assert all(torch.equal(a, b) for a, b in zip(again.rope(at), profile.rope(at), strict=True))


def test_levels_have_tables_for_2_3_and_4_bits(profile: ModelProfile) -> None:
    assert LEVELS == (4, 8, 16)
    for count in LEVELS:
        assert profile.tensor(f"key_levels_{count}").shape == (LAYERS, HEADS, DIM, count)
        assert (profile.tensor(f"value_levels_{count}").diff(dim=-1) > 0).all()


def test_the_hash_is_of_the_models_content(folder: Path, tmp_path: Path) -> None:
    first = hash_model(folder)
    assert hash_model(folder.rename(tmp_path / "renamed")) == first
    folder = tmp_path / "renamed"
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    second = hash_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0}))
    assert len({first, second, hash_model(folder)}) == 3


def rewritten(path: Path, metadata: dict[str, str], **tensors: torch.Tensor | None) -> None:
    found = load_file(path) | tensors
    kept = {name: tensor for name, tensor in found.items() if tensor is not None}
    save_file(kept, path, profiles.read_metadata(path) | metadata)


@pytest.mark.parametrize(
    ("metadata", "tensors", "why"),
    [
        ({"model_hash": "f" * 64}, {}, r"model_hash 'f{64}'; expected '"),
        ({"schema": "1"}, {"concentration": None}, "schema '1'; expected '2'"),  # from before there was one
        ({"tokens": "many"}, {}, "tokens 'many'; expected a number"),
        ({}, {"query_cov": None}, "no tensor 'query_cov'"),
        ({}, {"retrieval": torch.zeros(2, 3)}, r"'retrieval' is torch.float32 \[2, 3\]; expected torch.float32 \[2, 2"),
        ({}, {"retrieval": torch.full((2, 2), torch.nan)}, "'retrieval' has numbers that are not finite"),
        ({}, {"echo": torch.zeros(2, 6).half()}, "'echo' is torch.float16"),
    ],
)
def test_files_of_another_model_or_schema_are_refused(
    folder: Path, profile: ModelProfile, metadata: dict[str, str], tensors: dict, why: str
) -> None:
    path = stored(folder, profile)
    rewritten(path, metadata, **tensors)
    with pytest.raises(ProfileError, match=why):
        load(folder, path)


def test_damaged_files_are_refused(folder: Path, profile: ModelProfile) -> None:
    path = stored(folder, profile)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ProfileError, match=path.name):
        load(folder, path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ProfileError, match="not a safetensors file"):
        profiles.find_profile(folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ProfileError, match=r"model\.safetensors: not a safetensors file"):
        hash_model(folder)


def test_other_weights_do_not_find_the_profile(folder: Path, profile: ModelProfile) -> None:
    stored(folder, profile)
    tiny_model(attention="sdpa", initializer_range=0.3, **WIDE).save_pretrained(folder)
    assert profiles.find_profile(folder) is None


def test_text_is_pieces_of_different_documents() -> None:
    found = pieces(tiny_tokenizer(), 2500, 900)
    assert [len(piece) for piece in found] == [900, 900, 700]
    assert len({tuple(piece[:200]) for piece in found}) == 3
    assert found == pieces(tiny_tokenizer(), 2500, 900)


def test_too_few_documents_are_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.txt").write_text("A line of text.\n" * 100)
    monkeypatch.setattr("workers.profile.text.find_builtin", lambda: find_files(tmp_path))
    assert len(pieces(tiny_tokenizer(), 1000, 1000)) == 1
    with pytest.raises(ProfileError, match="2000 tokens of text wanted; the documents on this machine have 1000"):
        pieces(tiny_tokenizer(), 2000, 1000)


# -- who gets it ------------------------------------------------------------------------------------------------------


def test_a_model_is_loaded_with_its_profile_and_the_log_says_so(folder: Path, profile: ModelProfile) -> None:
    def loaded():
        with capture_logs() as logs:
            found = load_model(folder, "tiny", torch.device("cpu"), torch.float32)
        return found, [(entry["log_level"], entry["event"]) for entry in logs]

    without, said = loaded()
    assert without.profile is None
    assert said == [("info", "no profile of this model: stages that need one are refused")]
    path = stored(folder, profile)
    with_it, said = loaded()
    assert said == [("info", "profile loaded")]
    assert with_it.profile.tokens == profile.tokens
    engine = tiny_engine(with_it)
    assert engine.cache.profile is with_it.profile
    assert [stage.name for stage in engine.hello().model.stages if stage.unfit] == [
        "disk",
        "swap",
        "oneiros",
    ]
    rewritten(path, {"schema": "1"}, concentration=None)
    assert profiles.find_profile(folder) is None
    spoilt, said = loaded()
    assert spoilt.profile is None
    assert said == [("error", "profile left out: stages that need it are refused")]


def job(pipeline: str, **more) -> job_pb2.Job:
    request = generation_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=prompt(100)), pipeline=pipeline, **more
    )
    return job_pb2.Job(job_id="job", request=request)


def test_a_worker_without_a_profile_refuses_the_stages_that_need_it(profile: ModelProfile) -> None:
    engine = tiny_engine(tiny_loaded(**WIDE))
    said = (
        "stage 'expected_attention' cannot serve this model: it needs the model's query statistics;"
        " `kvpilot model profile NAME` finds them"
    )
    with pytest.raises(ProblemError) as refused:
        engine.submit(job("expected_attention(keep=0.5) | kivi(bits=4)"))
    assert refused.value.problem.code == INVALID_ARGUMENT
    assert [(v.field, v.description) for v in refused.value.problem.violations] == [("pipeline", said)]
    replay = generation_pb2.Replay(at_tokens=[64], pipelines=["full", "expected_attention"])
    with pytest.raises(ProblemError, match=r"replay\.pipelines\[1\]: stage 'expected_attention' cannot"):
        engine.submit(job("", replay=replay))
    engine.submit(job("full"))
    answer = engine.direct(policy_pb2.Directive(nonce="n", epoch=1, request_id="job", pipeline="expected_attention"))
    engine.step()
    with pytest.raises(ProblemError, match="needs the model's query statistics"):
        answer.result(timeout=0)
    with pytest.raises(ValueError, match="needs the model's query statistics"):
        tiny_engine(tiny_loaded(**WIDE), default_pipeline="expected_attention")


def test_a_worker_with_a_profile_serves_them(profile: ModelProfile) -> None:
    model = wrap_model(tiny_model(**WIDE), tiny_tokenizer(), "tiny", profile)
    engine = tiny_engine(model, default_pipeline="expected_attention(keep=0.5)")
    engine.submit(job(""))
    while engine.live_jobs() and engine.step():
        pass
    assert not engine.live_jobs()


def test_shapes_are_as_listed() -> None:
    shape = CacheShape(layers=2, kv_heads=2, query_heads=4, head_dim=16, dtype=torch.float32)
    found = tiny_profile(shape)
    assert {name: tuple(found.tensor(name).shape) for name in KINDS} == {n: k.shape(shape) for n, k in KINDS.items()}


def test_a_rope_needs_a_rotary_embedding() -> None:
    with pytest.raises(ProfileError, match="rotates 16 of 32 channels"):
        rope_of(tiny_model(**WIDE), 32)
